"""
05_eval: score every checkpoint on domains that no training has seen (paper 4), or label pictures.

    in    RUN/0*/model.safetensors         all of them, or those that --CHECKPOINTS names
          TARGETS                          labelled data sets, used for nothing but scoring
    out   RUN/05_eval/results.json, .md    mIoU, IoU of every class; the tables that are printed
          panels/TARGET.png                image | truth | prediction | errors | prediction ...
          confusion/                       pixel counts, made again only if their origin changed
    time  toy: see README; paper: not measured

One confusion matrix per target counts the labelled pixels of all images: IoU = TP / (TP + FP + FN),
mIoU is the mean over classes, in percent. There are two protocols:
    native    scores up-sampled to the truth's own size; a class that is predicted but nowhere in
              the truth counts 0: as cityscapesScripts, and the number to compare across papers.
    clouds    truth resized to the network's input, classes that it lacks left out: as officially.
Folders whose names differ only in a suffix, 04_selftrain and 04_selftrain_seed1, are seeds of one
experiment. It worked if 04_selftrain has a higher mean than 03_train_source.
--IMAGES=my_photos labels pictures instead: train ids and overlays in OUT/images."""
import hashlib
import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import common
from common import CLASSES, COLOURS, DATA, IGNORE, RUN, TABLE, Stop, preset

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
HALF = preset(toy=False, paper=True)        # bfloat16 in the network; official: float32
# running
PANELS = 3                      # images per target in panels/
WORKERS = preset(toy=0, paper=4)            # processes that read ahead; 0 is best on two cores

RULES = """
len({target.rstrip('/').rpartition('/')[2] for target in TARGETS}) == len(TARGETS) > 0
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


def mean_iou(matrix):
    """-> mIoU over SCORED, {class: IoU or None}, both in percent. Pixels of the other classes
    still count as errors, as is usual for SYNTHIA's 16."""
    each = iou(matrix)[[CLASSES.index(name) for name in SCORED]]
    mean = float(each.mean()) if each.count() else 0.0
    return mean, dict(zip(SCORED, each.round(2).tolist()))          # None where masked


def load(file):
    """-> encoder and decoder of a checkpoint, on the device. Raises Stop."""
    encoder, decoder, _ = source_stage.load_model(file)
    return encoder.to(common.device()), decoder.to(common.device())


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
    try:
        return np.load(path)
    except Exception:                   # not there or damaged, in whatever way: it is made again
        matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    reader = partial(read, target, SHORT_SIDE, PROTOCOL)
    loader = torch.utils.data.DataLoader(pairs, None, collate_fn=reader, num_workers=WORKERS)
    for image, truth in bar(loader, title):
        prediction = segment(encoder, decoder, image, truth.shape)
        matrix += confusion(truth, prediction, len(CLASSES))
    with common.whole(path) as part, open(part, "wb") as file:
        np.save(file, matrix)
    print(f"{title}: mIoU {mean_iou(matrix)[0]:.1f}, {len(pairs)} images")
    return matrix


def digest(files, settings=""):
    """Hexadecimal digits of the SHA-256 of a text and of the bytes of files"""
    total = hashlib.sha256(settings.encode())
    for file in bar(files, "reading"):
        total.update(Path(file).read_bytes())
    return total.hexdigest()[:16]


def checkpoints():
    """{name: file} of what is to be scored. A name is a folder's path in RUN, or as given; another
    file than the model's stands behind it, as 04_selftrain (teacher). Raises Stop."""
    finished = sorted(Path(RUN).glob("0*/model.safetensors"))
    files, named = [], {}
    for given in CHECKPOINTS or finished or [f"{RUN}/03_train_source/model.safetensors"]:
        files += sorted(Path(given).rglob("model.safetensors")) or [Path(given)]
    hint = "03_train_source.py and 04_selftrain.py write it when they are finished: run them first"
    common.need([(file, hint) for file in files])
    for file in files:
        folder = file.parent
        if folder.is_relative_to(RUN):
            folder = folder.relative_to(RUN)
        named[f"{folder} ({file.stem})".removesuffix(" (model)")] = file
    return named


# ---------------------------------------------------------------------------- results
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
    means, classes = [], []
    for row in rows:
        targets = row["targets"].values()
        means.append([row["name"], *(target["miou"] for target in targets), row["mean_miou"]])
        each = np.array([list(target["iou"].values()) for target in targets], float)
        each = np.ma.masked_invalid(each).mean(0)       # over the targets that have the class
        classes.append([row["name"], *each.filled(np.nan)])
    titles = [Path(target).name for target in rows[0]["targets"]]
    text = markdown(["mIoU", *titles, "mean"], means)
    if len(rows) > 1:
        text += comparison(rows)
    return text + markdown(["IoU, mean of the targets", *SCORED], classes)


def add_to_panel(panel, name, network, target, pairs):
    """Add a checkpoint's prediction and errors to the cells of some images, panel[image]. A wrong
    pixel has the colour of the prediction, a right one is grey, an unlabelled one black."""
    every = int(np.ceil(len(pairs) / PANELS))
    for pair in pairs[::every]:
        image, truth = read(target, SHORT_SIDE, PROTOCOL, pair)
        step = max(1, truth.shape[1] // 512)
        truth = truth[::step, ::step]
        label = segment(*network, image, truth.shape)
        errors = COLOURS[label]
        errors[label == truth] = 225
        errors[truth == IGNORE] = 0
        cells = panel.setdefault(pair, [(pair[0].name, image), ("truth", truth)])
        cells += [(name, label), ("errors", errors)]


# ---------------------------------------------------------------------------- main
def label_pictures(run, file):
    """Label IMAGES; a.jpg becomes OUT/images/KIND/a.jpg.png, so no two meet. Raises Stop."""
    folder = Path(IMAGES)
    kinds = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if not paths:
        raise Stop(f"--IMAGES={IMAGES}: expected a folder with pictures ({', '.join(kinds)})")
    if run.out.resolve().is_relative_to(folder.resolve()):
        raise Stop(f"--OUT={OUT} lies in --IMAGES={IMAGES}: name another --OUT")
    run.start()
    network, failed = load(file), []
    for path in bar(paths, "labelling"):
        try:
            image = common.read_image(path)
            label = segment(*network, network_input(image, SHORT_SIDE), image.size[::-1])
            overlay = np.array(image) // 2 + COLOURS[label] // 2
            for kind, array in (("train_ids", label), ("overlay", overlay)):
                with common.whole(f"{OUT}/images/{kind}/{path.relative_to(folder)}.png") as part:
                    Image.fromarray(array).save(part, "PNG")
        except Stop as problem:         # one bad picture does not end the others
            failed.append(f"\n{problem}")
    print(f"{file} labelled {len(paths) - len(failed)} of {len(paths)} pictures: {OUT}/images")
    if failed:
        raise Stop(f"{len(failed)} of {len(paths)} pictures failed:" + "".join(failed))


def score_all(models, pairs):
    """Score checkpoints {name: file} on targets {name: pairs} -> the rows of results.json, and of
    the first six checkpoints the panels {title: {pair: cells}}. Raises Stop."""
    rows, panels, contents = [], {}, {}
    for target, files in pairs.items():
        settings = f"{target} {PROTOCOL} {SHORT_SIDE} {HALF} {TABLE}"
        contents[target] = digest(sum(files, ()), settings)
    for name, file in models.items():
        network, weights = load(file), digest([file])
        targets = {}
        for target, found in pairs.items():
            title = Path(target).name
            key = f"{file.parent.name}_{title}_{weights}_{contents[target]}"
            path = f"{OUT}/confusion/{key}.npy"
            matrix = score(*network, target, found, path, f"{name} on {title}")
            miou, each = mean_iou(matrix)
            targets[target] = {"miou": miou, "iou": each, "images": len(found), "confusion": path}
            if PANELS and len(rows) < 6:
                add_to_panel(panels.setdefault(title, {}), name, network, target, found)
        mean = np.mean([found["miou"] for found in targets.values()])
        rows.append({"name": name, "checkpoint": str(file), "targets": targets, "mean_miou": mean})
    return rows, panels


def main():
    free = ("TARGETS", "CHECKPOINTS", "IMAGES", "PANELS", "WORKERS")
    run = common.Run(globals(), "results.json", free)
    models = checkpoints()
    if IMAGES:
        return label_pictures(run, list(models.values())[-1])
    pairs = {target: common.pairs(target, "val") for target in TARGETS}
    run.start()
    rows, panels = score_all(models, pairs)
    text = tables(rows)
    print("\n" + text)
    common.write_text(run.out / "results.md", text)
    for title, panel in panels.items():
        common.save_sheet(run.out / "panels" / f"{title}.png", list(panel.values()))
    run.finish()
    results = {"protocol": PROTOCOL, "classes": SCORED, "rows": rows}
    common.write_text(run.result, json.dumps(results) + "\n")


if __name__ == "__main__":
    common.launch(globals())
