"""
rows: train and score one row of the report's tables. A row is stage 03 or 04 with the constants of
the toy preset, except those that ROWS names; so a row is also a command line.

    python tests/toy/rows.py sam 0                  row and seed -> runs/report/seed0/sam
    python tests/toy/rows.py sam 0 OUT validation --LR=0.001    into another folder, scored on
                                                    validation scenes, with further constants

Rows with an oracle replace one part of the method by the truth, which only the miniature world
knows, or by another decoder. REPORT=PATH in the environment takes the place of runs/report.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import world
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import common
import ideas
from common import IGNORE

ROOT = Path(common.absolute(os.environ.get("REPORT") or common.HERE / "runs/report"))
STYLES = ("day", "night", "snow", "fog", "rain")
# scenes of the unseen styles straight from the renderer: a perfect generator
RENDERED = Path(common.DATA) / "toy/rendered"

PAINTED = f"--GENERATED={ROOT}/02_generate/index.jsonl"
FROM_RENDERER = f"--GENERATED={RENDERED}/images/index.jsonl"
SOURCE, SELF = "03_train_source", "04_selftrain"
#   row                  stage   constants                                              oracle
ROWS = {
    "source":            (SOURCE, (),                                                   ""),
    "source_only":       (SELF,  ("--N_GENERATED=0",),                                  ""),
    "raw":               (SELF,  (PAINTED, "--REFINE=off"),                             ""),
    "control":           (SELF,  (PAINTED,),                            "raw where SAM kept"),
    "sam":               (SELF,  (PAINTED,),                                            ""),
    "vote":              (SELF,  (PAINTED, "--REFINE=vote"),                            ""),
    # one part replaced by the truth
    "rendered_raw":      (SELF,  (FROM_RENDERER, "--REFINE=off"),                       ""),
    "rendered_sam":      (SELF,  (FROM_RENDERER,),                                      ""),
    "rendered_masks":    (SELF,  (FROM_RENDERER,),                              "true masks"),
    "rendered_truth":    (SELF,  (FROM_RENDERER,),                              "true labels"),
    # how long and how fast 03 learns
    "source_400":        (SOURCE, ("--ITERATIONS=400", "--LR=0.004"),                   ""),
    "source_only_400":   (SELF,  ("--N_GENERATED=0",),                                  ""),
    "sam_400":           (SELF,  (PAINTED,),                                            ""),
    # Table 5: other encoders; other decoders
    "source_random":     (SOURCE, (f"--ENCODER=open_clip:local-dir:{ROOT}/random_clip",), ""),
    "trainable":         (SOURCE, ("--FREEZE_ENCODER=False",),                          ""),
    "trainable_sam":     (SELF,  (PAINTED, "--FREEZE_ENCODER=False"),                   ""),
    "source_stride_8":   (SOURCE, (),                                         "masks at 1/8"),
    "source_mask2former": (SOURCE, (),                                  "Mask2Former's head"),
    # Figure 5; "sam" has 120 pictures
    "images_12":         (SELF,  (PAINTED, "--N_PICTURES=12"),                          ""),
    "images_40":         (SELF,  (PAINTED, "--N_PICTURES=40"),                          ""),
    "images_240":        (SELF,  (f"--GENERATED={ROOT}/02_240/index.jsonl",),           ""),
    # Figure 6; "sam" has 5 points and 100 pixels
    "points_1":          (SELF,  (PAINTED, "--SAM_POINTS=1"),                           ""),
    "points_10":         (SELF,  (PAINTED, "--SAM_POINTS=10"),                          ""),
    "points_50":         (SELF,  (PAINTED, "--SAM_POINTS=50"),                          ""),
    "area_0":            (SELF,  (PAINTED, "--SAM_MIN_AREA=0"),                         ""),
    "area_280":          (SELF,  (PAINTED, "--SAM_MIN_AREA=280"),                       ""),
    "area_560":          (SELF,  (PAINTED, "--SAM_MIN_AREA=560"),                       ""),
    # beyond the paper
    "negative":          (SELF,  (PAINTED, "--UNLABELLED=negative"),                    ""),
    "ema_100":           (SELF,  (PAINTED, "--EMA_EVERY=100"),                          ""),
    "one_prompt":        (SELF,  (f"--GENERATED={ROOT}/02_one_prompt/index.jsonl",),    ""),
    # what the paper could try next, see ideas.py
    "one_class":         (SELF,  (f"--GENERATED={ROOT}/02_one_class/index.jsonl",),     ""),
    "four_classes":      (SELF,  (f"--GENERATED={ROOT}/02_four_classes/index.jsonl",),  ""),
    "grid":              (SELF,  (PAINTED,),                                        "grid"),
    "text_scores":       (SELF,  (PAINTED,),                          "CLIP's text scores"),
    "source_wide":       (SOURCE, ("--DIM=128", "--HIDDEN=256"),                        ""),
    "source_only_wide":  (SELF,  ("--N_GENERATED=0",),                                  ""),
    "sam_wide":          (SELF,  (PAINTED,),                                            ""),
    "mirror":            (SELF,  (PAINTED,),                                      "mirror"),
    "surest_half":       (SELF,  (PAINTED,),                                "surest half"),
    "surest_half_raw":   (SELF,  (PAINTED, "--REFINE=off"),                 "surest half"),
    "sure_besides":      (SELF,  (PAINTED,),                           "sure besides SAM"),
    "no_dice":           (SELF,  (PAINTED,),                                     "no dice"),
    "soft_labels":       (SELF,  (PAINTED,),                                 "soft labels"),
    "by_iou":            (SELF,  (PAINTED,),                                      "by IoU"),
    "like_its_piece":    (SELF,  (PAINTED,),                              "like its piece"),
    "deep_points":       (SELF,  (PAINTED,),                                 "deep points"),
    "ramp":              (SELF,  (PAINTED,),                                        "ramp")}
# the rows of stage 04 that do not begin with "source"
SOURCES = {"trainable_sam": "trainable", "source_only_400": "source_400", "sam_400": "source_400",
           "source_only_wide": "source_wide", "sam_wide": "source_wide"}


def write_json(path, value):
    common.write_text(path, json.dumps(value, indent=1) + "\n")


# ------------------------------------------------------------------- what the rows need
def draw_rendered(n=40):
    """n web scenes of each unseen style as 02 would have left them, with their labels."""
    if RENDERED.exists():
        return
    jobs = []
    for style in STYLES:
        jobs += [(seed, style) for seed in world.seeds("web", style, n)]
    images, labels, _, captions = world.draw_many(jobs, title="rendered scenes")
    part = RENDERED.with_name("rendered.part")
    for kind, arrays in (("images", images), ("labels", labels)):
        (part / kind).mkdir(parents=True, exist_ok=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(part / kind / f"{i:06d}.png")
    lines = []
    for i, (caption, (seed, _)) in enumerate(zip(captions, jobs)):
        lines.append(json.dumps({"file": f"{i:06d}.png", "prompt": caption, "seed": seed}) + "\n")
    common.write_text(part / "images/index.jsonl", "".join(lines))
    part.rename(RENDERED)


def draw_random_tower():
    """The miniature CLIP as it was before it saw anything, as a folder."""
    folder = ROOT / "random_clip"
    if folder.exists():
        return
    part = folder.with_name("random_clip.part")
    shutil.copytree(HERE / "weights/clip", part, dirs_exist_ok=True)
    config = json.loads((part / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(0)
    weights = open_clip.CLIP(**config).state_dict()
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, part / "open_clip_model.safetensors")
    part.rename(folder)


def call(stage, *arguments):
    subprocess.run([sys.executable, f"{common.HERE}/{stage}.py", *arguments], check=True)


def prepare():
    """Ask and paint once for all seeds, as the toy preset does."""
    draw_rendered()
    draw_random_tower()
    prompts = f"{ROOT}/01_prompts/prompts.txt"
    call("01_prompts", f"--OUT={ROOT}/01_prompts")
    call("02_generate", f"--PROMPTS={prompts}", f"--OUT={ROOT}/02_generate")


def prepare_ablations():
    """Twice as many pictures, and pictures of one prompt."""
    prompts, one_prompt = f"{ROOT}/01_prompts/prompts.txt", f"{ROOT}/one_prompt.txt"
    common.write_text(one_prompt, "a photo of a street in a town\n")
    call("02_generate", f"--PROMPTS={prompts}", "--N_IMAGES=240", f"--OUT={ROOT}/02_240")
    call("02_generate", f"--PROMPTS={one_prompt}", f"--OUT={ROOT}/02_one_prompt")


def prepare_ideas():
    """Pictures of the same places and weathers with one class, and with four, in every prompt."""
    prompts = Path(ROOT, "01_prompts/prompts.txt").read_text().splitlines()
    for count, name in ((1, "one_class"), (4, "four_classes")):
        file = f"{ROOT}/{name}.txt"
        common.write_text(file, "\n".join(ideas.prompts_naming(count, prompts)) + "\n")
        call("02_generate", f"--PROMPTS={file}", f"--OUT={ROOT}/02_{name}")


# ------------------------------------------------------------------- oracles
def decoder_with(oracle, Decoder):
    """The class of decoder that takes the place of ours, or ours."""
    class Coarse(Decoder):
        def pixels(self, features):
            levels, _ = super().pixels(features)
            return levels, self.mask_features(levels[2])

    if oracle == "masks at 1/8":
        return Coarse
    if oracle == "Mask2Former's head":
        return import_module("bench").Mask2FormerHead
    return Decoder


def raw_where_kept(refine):
    """Of a refinement: the teacher's own labels, where the refinement leaves a label."""
    def control(sam, embedding, label, random):
        redrawn, points = refine(sam, embedding, label, random)
        return torch.where(redrawn == IGNORE, IGNORE, label), points
    return control


def true_label(pictures, k):
    """In the place of SAM's embedding of rendered scene k: its label, int64 (H, W)."""
    with Image.open(RENDERED / "labels" / pictures.files[k].name) as file:
        return torch.from_numpy(np.array(file)).long()


def true_masks(components):
    """What a perfect SAM would answer: the true piece in which most of the points lie."""
    def sam_masks(sam, truth, points, shape):
        piece = torch.from_numpy(components(truth.byte().cpu().numpy())[0]).long()
        x, y = points.long().cpu().unbind(-1)
        most = piece[y, x].mode(1).values
        return (piece == most[:, None, None]).to(points.device)
    return sam_masks


def with_oracle(oracle, selftrain):
    """Replace parts of the module of stage 04, or of that of stage 03, which it uses."""
    stage = selftrain.source_stage
    stage.Decoder = decoder_with(oracle, stage.Decoder)
    if oracle in ideas.IDEAS:
        ideas.IDEAS[oracle](selftrain)
    if oracle == "raw where SAM kept":
        selftrain.refine = raw_where_kept(selftrain.refine)
    if oracle in ("true labels", "true masks"):
        selftrain.embed_pictures = lambda sam, files, size, half: files
        selftrain.PaintedPictures.embedding = true_label
    if oracle == "true labels":
        no_points = np.zeros((0, 1, 2), np.float32)
        selftrain.refine = lambda sam, truth, label, random: (truth.clone(), no_points)
    if oracle == "true masks":
        selftrain.sam_masks = true_masks(selftrain.components)


# ------------------------------------------------------------------- one row
def folder_of(row, seed):
    return ROOT / f"seed{seed}" / row


def source_of(row, seed):
    """The network that a row of stage 04 begins with."""
    return folder_of(SOURCES.get(row, "source"), seed) / "model.safetensors"


def load_network(path):
    """-> encoder and decoder on the device"""
    encoder, decoder, *_ = import_module(SOURCE).load_model(path)
    return encoder.to(common.device()), decoder.to(common.device())


def score(out, split, styles):
    """mIoU and the IoU of every class of a trained network -> {style: {"miou", "iou"}}"""
    evaluate = import_module("05_eval")
    network = load_network(out / "model.safetensors")
    found = {}
    for style in styles:
        folder = f"{style}_validation" if split == "validation" else style
        target = f"folder:{common.DATA}/toy/{folder}"
        scenes = evaluate.Scenes(target)
        matrix = evaluate.score(network, scenes, out / "scores" / f"{folder}.npy", folder)
        miou, each = evaluate.mean_iou(matrix)
        found[style] = {"miou": round(miou, 3), "iou": each}
    return found


def code():
    """The last commit that changed a script: what has the same one, the same code has made."""
    command = ["git", "log", "-1", "--format=%h", "--", "0*.py", "common.py"]
    return subprocess.run(command, cwd=common.HERE, capture_output=True, text=True).stdout.strip()


def train_and_score(row, seed, out="", split="test", *constants):
    """Train a row and score it; OUT/SPLIT.json holds its scores."""
    name, own, oracle = ROWS[row]
    out = Path(out or folder_of(row, seed))
    selftrain = import_module(SELF)
    stage = selftrain if name == SELF else selftrain.source_stage
    if name == SELF:
        own += (f"--INIT={source_of(row, seed)}",)
    if oracle:
        with_oracle(oracle, selftrain)
    sys.argv = [f"{name}.py", f"--OUT={out}", f"--SEED={seed}", *own, *constants]
    common.launch(vars(stage))
    kept = out / f"{split}.json"
    if not kept.exists():
        styles = score(out, split, ("game", *STYLES) if name == SOURCE else STYLES)
        mean = round(float(np.mean([styles[style]["miou"] for style in STYLES])), 3)
        write_json(kept, {"row": row, "seed": int(seed), "split": split, "code": code(),
                          "mean": mean, "styles": styles})
    print(row, seed, split, json.loads(kept.read_text())["mean"], flush=True)


# ------------------------------------------------------------------- many rows
class Job(NamedTuple):
    row: str
    seed: int
    out: Path
    split: str = "test"
    constants: tuple = ()

    def is_done(self):
        return (self.out / f"{self.split}.json").exists()

    def is_ready(self):
        return ROWS[self.row][0] == SOURCE or source_of(self.row, self.seed).exists()

    def start(self):
        """-> the running process, which writes OUT.log"""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        arguments = [self.row, self.seed, self.out, self.split, *self.constants]
        with open(f"{self.out}.log", "a") as log:
            return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=log,
                                    stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def work(jobs, at_once=2):
    """Run jobs that are not done yet, so many at a time, on one core each. A job of stage 04 waits
    for its source model. Raises Stop if a job fails, or waits for what nobody makes."""
    waiting = [job for job in jobs if not job.is_done()]
    running = {}
    try:
        with tqdm(total=len(waiting), desc="rows", disable=None, dynamic_ncols=True) as bar:
            while waiting or running:
                start_ready(waiting, running, at_once)
                time.sleep(1)
                bar.update(collect_ended(running))
    finally:
        for process in running.values():
            process.terminate()


def start_ready(waiting, running, at_once):
    for job in [job for job in waiting if job.is_ready()][:at_once - len(running)]:
        waiting.remove(job)
        running[job] = job.start()
    if not running:
        needed = source_of(waiting[0].row, waiting[0].seed)
        raise common.Stop(f"{waiting[0].out} needs {needed}: run its source row first")


def collect_ended(running):
    """-> how many jobs have ended; each one's last line is printed."""
    ended = [job for job, process in running.items() if process.poll() is not None]
    for job in ended:
        process = running.pop(job)
        lines = Path(f"{job.out}.log").read_text().strip().splitlines()
        tqdm.write(f"{job.out}: {lines[-1] if lines else ''}")
        if process.returncode:
            raise common.Stop(f"{job.out} failed, see {job.out}.log")
    return len(ended)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ROWS:
        sys.exit(__doc__ + f"\nrows: {', '.join(ROWS)}")
    train_and_score(*sys.argv[1:])
