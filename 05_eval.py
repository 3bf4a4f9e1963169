"""
05_eval: score every checkpoint on domains that no training has seen (paper 4), or label pictures.

    in    RUN/0*/model.safetensors         all of them, or those that --CHECKPOINTS names
          TARGETS                          labelled data sets, used for nothing but scoring
    out   RUN/05_eval/results.json, .md    mIoU, IoU of every class; the tables that are printed
          classes.png, panels/TARGET.png   bars; image | predictions | truth | errors (first six)
          confusion/                       pixel counts, made again only if their origin changed
    time  toy: half a minute on two CPU cores; paper: see README

One confusion matrix per target counts the labelled pixels of all images: IoU = TP / (TP + FP + FN),
mIoU is the mean over classes, in percent. There are two protocols:
    native    scores up-sampled to the truth's own size; a class that is predicted but nowhere in
              the truth counts 0: as cityscapesScripts, and the number to compare across papers.
    clouds    truth resized to the network's input, classes that it lacks left out: as officially.
Folders whose names differ only in a suffix, 04_selftrain and 04_selftrain_seed1, are seeds of one
experiment. It worked if 04_selftrain has a higher mean than 03_train_source (toy: by 3 points).
--IMAGES=my_photos labels pictures instead: overlays, train ids, ids for Cityscapes' server."""
import hashlib
import json
import re
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm

import common
from common import CLASSES, DATA, IGNORE, RUN, TABLE, Stop, preset

source_stage = import_module("03_train_source")                 # the network (paper 3.1)
bar = partial(tqdm, leave=False, disable=None, dynamic_ncols=True)

# ---------------------------------------------------------------------------- constants
# in and out
TARGETS = preset(toy=tuple(f"folder:{DATA}/toy/{s}" for s in "day night snow fog rain".split()),
                 paper=("cityscapes", "bdd", "mapillary"),
                 cityscapes=("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))
CHECKPOINTS = ()                # files, run folders, folders of runs; () = RUN/0*/model.safetensors
IMAGES = ""                     # a folder of pictures to label with the last checkpoint
OUT = f"{RUN}/05_eval"
# scoring
PROTOCOL = "native"             # | "clouds"
SHORT_SIDE = preset(toy=0, paper=1024)      # of the network's input (official); 0: as the image is
SCORED = preset(toy=tuple(CLASSES), paper=tuple(CLASSES),       # SYNTHIA has 16 of the 19
                synthia=tuple(c for c in CLASSES if c not in ("terrain", "truck", "train")))
HALF = False                    # bfloat16 in the network: faster on a GPU; officially float32
# running
PANELS = 3                      # images per target in panels/
WORKERS = preset(toy=0, paper=4)            # processes that read ahead; 0 is best on two cores

RULES = """
len(set(TARGETS)) == len(TARGETS) > 0
PROTOCOL in ("native", "clouds")
SHORT_SIDE == 0 or 32 <= SHORT_SIDE <= 8192
len(OUT.strip()) > 0
len(set(SCORED)) == len(SCORED) > 0 and set(SCORED) <= set(CLASSES)
0 <= PANELS <= 100
0 <= WORKERS <= 256
"""


# ---------------------------------------------------------------------------- scores
def confusion(truth, prediction, n):
    """Integer maps below 256, truth IGNORE where unlabelled -> int64 (n, n) [truth, prediction]"""
    both = truth.astype(np.uint16) * 256 + prediction
    counts = np.bincount(both.ravel(), minlength=2 ** 16)
    return counts.reshape(256, 256)[:n, :n]             # the rows from n on are IGNORE's


def iou(matrix):
    """IoU of every class: int64 (n, n) -> float (n,) in percent, masked where left out."""
    hit = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hit
    known = union if PROTOCOL == "native" else matrix.sum(1)
    return np.ma.array(100 * hit / np.maximum(union, 1), mask=known == 0)


def mean_iou(matrix, classes=None):
    """-> mIoU over `classes` (default SCORED), {class: IoU or None}, both in percent. Pixels of
    the other classes still count as errors, as is usual for SYNTHIA's 16."""
    names = classes or SCORED
    each = iou(matrix)[[CLASSES.index(name) for name in names]]
    mean = float(each.mean()) if each.count() else 0.0
    return mean, dict(zip(names, each.round(2).tolist()))           # None where masked


def network_input(image, short_side):
    """PIL RGB -> uint8 (H, W, 3), resized to a short side of `short_side` pixels; 0: as it is"""
    scale = short_side / min(image.size) if short_side else 1
    return np.array(ImageOps.scale(image, scale, Image.BILINEAR))


def segment(encoder, decoder, image, size):
    """uint8 (H, W, 3) -> uint8 `size` (rows, columns): at every pixel the train id with the highest
    score. Scores are resized, not labels, so that thin things survive."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(common.device())
    scores = source_stage.predict(encoder, decoder, pixels, HALF)
    scores = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores[0].argmax(0).to(torch.uint8).cpu().numpy()


def read(target, short_side, protocol, pair):
    """(image, label) paths -> network input uint8 (h, w, 3), truth uint8 (H, W). Raises Stop."""
    image = common.read_image(pair[0])
    truth = common.read_label(pair[1], target, image.size)
    pixels = network_input(image, short_side)
    if protocol == "clouds":
        truth = np.array(Image.fromarray(truth).resize(pixels.shape[1::-1], Image.NEAREST))
    return pixels, truth


def score(encoder, decoder, target, pairs, path, title):
    """-> confusion matrix int64 (C, C) of (image, label) pairs; kept in `path`. Raises Stop."""
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    since = time.time()
    try:
        return matrix + np.load(path)
    except Exception:                   # not there or damaged, in whatever way: it is made again
        path.parent.mkdir(parents=True, exist_ok=True)
    reader = partial(read, target, SHORT_SIDE, PROTOCOL)
    loader = torch.utils.data.DataLoader(pairs, None, collate_fn=reader, num_workers=WORKERS)
    for image, truth in bar(loader, title):
        prediction = segment(encoder, decoder, image, truth.shape)
        matrix += confusion(truth, prediction, len(CLASSES))
    with common.whole(path) as part, open(part, "wb") as file:
        np.save(file, matrix)
    pace = f"{len(pairs)} images, {len(pairs) / (time.time() - since):.1f} per second"
    print(f"{title}: mIoU {mean_iou(matrix)[0]:.1f}, {pace}", flush=True)
    return matrix


def digest(files, text, title=""):
    """SHA-256 of a text and of the bytes of files, in order."""
    total = hashlib.sha256(text.encode())
    for file in bar(files, title):
        total.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return total.hexdigest()[:16]


def short_names(paths):
    """The last parts of every path or `folder:PATH`, as few as tell all of them apart."""
    parts = [Path(path).absolute().parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]).removeprefix("folder:") for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def checkpoints():
    """{name: file} of what is to be scored; a name is that of the folder. Raises Stop."""
    finished = sorted(Path(RUN).glob("0*/model.safetensors"))
    files, found = [], {}
    for given in CHECKPOINTS or finished or [f"{RUN}/03_train_source/model.safetensors"]:
        files += sorted(Path(given).rglob("model.safetensors")) or [Path(given)]
    hint = "03_train_source.py and 04_selftrain.py write it when they are finished: run them first"
    common.need([(file, hint) for file in files])
    for file in files:                  # another file's name stands behind it, as of 04's teacher
        found[f"{file.absolute().parent} ({file.stem})".removesuffix(" (model)")] = file
    return dict(zip(short_names(found), found.values()))


# ---------------------------------------------------------------------------- results
def together(targets):
    """{title: mIoU} of targets that are parts of one data set, as one matrix: ACDC's conditions."""
    parts = [np.load(targets[t]["confusion"]) for t in targets if t.startswith("acdc_")]
    return {"acdc, one matrix": mean_iou(sum(parts))[0]} if len(parts) > 1 else {}


def class_means(row):
    """IoU of every class, the mean over the targets that have it; nan where none has."""
    each = [list(target["iou"].values()) for target in row["targets"].values()]
    return np.ma.masked_invalid(np.array(each, float)).mean(0).filled(np.nan)


def markdown(head, rows):
    """Rows of texts and numbers -> a table in Markdown; nan is written as -."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        lines.append([c if isinstance(c, str) else f"{c:.1f}".replace("nan", "-") for c in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def comparison(rows):
    """A line per experiment, whose seeds are rows that differ only in a suffix _seedN: mean and
    sample standard deviation of their means, difference to the first line's mean."""
    experiments, lines = {}, []
    for row in rows:
        name = re.sub(r"_seed\d+(?=[/ ]|$)", "", row["name"])
        experiments.setdefault(name, []).append(row["mean_miou"])
    for name, means in experiments.items():
        spread = np.std(means, ddof=1) if len(means) > 1 else np.nan
        difference = f"{np.mean(means) - lines[0][2]:+.1f}" if lines else ""
        lines.append([name, str(len(means)), np.mean(means), spread, difference])
    return markdown(["experiment", "seeds", "mean", "spread", "difference to the first"], lines)


def tables(rows):
    """The rows of results.json as Markdown."""
    means, each = [], []
    for row in rows:
        values = [target["miou"] for target in row["targets"].values()]
        means.append([row["name"], *values, row["mean_miou"], *row["together"].values()])
        each.append([row["name"], *class_means(row)])
    text = markdown(["mIoU", *short_names(row["targets"]), "mean", *row["together"]], means)
    text += comparison(rows) if len(rows) > 1 else ""
    return text + markdown(["IoU, mean of the targets", *SCORED], each)


def draw_classes(path, rows):
    """IoU of every class, mean of the targets, as bars, one per checkpoint."""
    places = np.arange(len(SCORED))
    width = 0.85 / len(rows)
    figure = Figure((8, 1 + len(SCORED) * (0.11 / width + 0.2)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(places + 0.425, SCORED)
    axes.set(ylim=(len(SCORED), -0.15), xlabel="IoU in percent, mean of the targets")
    for k, row in enumerate(rows):
        edges = places + k * width
        bars = axes.barh(edges, class_means(row), width, align="edge", label=row["name"])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    figure.legend(loc="outside upper left", fontsize=8)
    with common.whole(path) as part:
        figure.savefig(part, format="png")


def add_to_panel(rows, name, network, target, pairs):
    """Add a checkpoint's prediction and errors to rows of image | predictions | truth | errors. A
    wrong pixel has the colour of the prediction, a right one is grey, an unlabelled one black."""
    for k, pair in enumerate(pairs[::-(-len(pairs) // PANELS)]):
        image, truth = read(target, SHORT_SIDE, PROTOCOL, pair)
        step = max(1, truth.shape[1] // 512)
        truth = truth[::step, ::step]
        label = segment(*network, image, truth.shape)
        errors = common.colourise(label)
        errors[label == truth] = 225
        errors[truth == IGNORE] = 0
        if k == len(rows):
            rows.append([(pair[0].name, image), ("truth", truth)])
        rows[k].insert(len(rows[k]) // 2, (name, label))
        rows[k].append((f"errors of\n{name}", errors))


# ---------------------------------------------------------------------------- main
def label_pictures(run, file):
    """Label IMAGES; a.jpg becomes OUT/images/KIND/a.jpg.png, so no two meet. Raises Stop."""
    folder = Path(IMAGES).resolve()
    out = run.out.resolve()
    if out.is_relative_to(folder) or folder.is_relative_to(out):
        raise Stop(f"--IMAGES={IMAGES} and --OUT={OUT} lie in one another: name another --OUT")
    kinds = ".png .jpg .jpeg .webp .bmp .tif .tiff"
    paths = [path for path in Path(IMAGES).rglob("*") if path.suffix.lower() in kinds.split()]
    if not paths:
        raise Stop(f"--IMAGES={IMAGES}: expected a folder with pictures ({kinds})")
    run.start()
    encoder, decoder, _ = source_stage.load_model(file)
    network = encoder.to(common.device()), decoder.to(common.device())
    failed = []
    for path in bar(sorted(paths), "labelling"):
        try:
            image = common.read_image(path)
            label = segment(*network, network_input(image, SHORT_SIDE), image.size[::-1])
            overlay = np.array(image) // 2 + common.colourise(label) // 2
            made = {"train_ids": label, "overlay": overlay}
            label_ids = [row[1] for row in TABLE.values() if row[1:]]
            if len(label_ids) == 19:                    # as Cityscapes' server takes them
                made["label_ids"] = np.array(label_ids, np.uint8)[label]
            for kind, array in made.items():
                png = Path(OUT, "images", kind, f"{path.relative_to(IMAGES)}.png")
                png.parent.mkdir(parents=True, exist_ok=True)
                with common.whole(png) as part:
                    Image.fromarray(array).save(part, "PNG")
        except Exception as problem:    # one bad picture does not end the others
            failed.append(f"\n  {path}: " + str(problem).removeprefix(f"{path} "))
    print(f"{file} labelled {len(paths) - len(failed)} of {len(paths)} pictures: {OUT}/images")
    if failed:
        raise Stop(f"{len(failed)} of {len(paths)} pictures failed:" + "".join(failed))


def main():
    free = ("TARGETS", "CHECKPOINTS", "IMAGES", "PANELS", "WORKERS")
    run = common.Run(globals(), "results.json", free)
    models = checkpoints()
    if IMAGES:
        return label_pictures(run, list(models.values())[-1])
    titles = dict(zip(TARGETS, short_names(TARGETS)))
    pairs = {target: common.pairs(target, "val") for target in TARGETS}
    run.start()
    rows, contents, panels = [], {}, {}
    for target, title in titles.items():
        settings = f"{target} {PROTOCOL} {SHORT_SIDE} {HALF} {TABLE}"
        contents[target] = digest(sum(pairs[target], ()), settings, f"reading {title}")
    for name, file in models.items():
        encoder, decoder, about = source_stage.load_model(file)
        network = encoder.to(common.device()), decoder.to(common.device())
        row = {"name": name, "checkpoint": str(file), "targets": {},
               "iteration": about["constants"]["ITERATIONS"], "seed": about["constants"]["SEED"]}
        for target, title in titles.items():
            key = digest([file], contents[target])
            path = Path(OUT, "confusion", f"{file.parent.name}_{Path(target).name}_{key}.npy")
            matrix = score(*network, target, pairs[target], path, f"{name} on {title}")
            miou, each = mean_iou(matrix)
            row["targets"][target] = {
                "miou": miou, "miou_all": mean_iou(matrix, CLASSES)[0], "iou": each,
                "images": len(pairs[target]), "confusion": str(path)}
            if PANELS and len(rows) < 6:
                add_to_panel(panels.setdefault(title, []), name, network, target, pairs[target])
        row["mean_miou"] = np.mean([target["miou"] for target in row["targets"].values()])
        row["together"] = together(row["targets"])
        rows.append(row)
    common.write_text(Path(OUT, "results.md"), tables(rows))
    print("\n" + tables(rows))
    draw_classes(Path(OUT, "classes.png"), rows)
    for title, panel in panels.items():
        path = Path(OUT, "panels", f"{title}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        common.save_sheet(path, panel)
    run.finish()
    results = {"preset": common.PRESET, "protocol": PROTOCOL, "classes": SCORED, "rows": rows}
    common.write_text(run.result, json.dumps(results) + "\n")


if __name__ == "__main__":
    common.launch(globals())
