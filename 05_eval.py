"""
05_eval: score every checkpoint on domains that no training has seen (paper 4), or label pictures.

    in    RUN/0*/model.safetensors         all of them, or those that --CHECKPOINTS names
          TARGETS                          labelled data sets, used for nothing but scoring
    out   RUN/05_eval/results.json, .md    mIoU, IoU of every class; the tables that are printed
          panels/TARGET.png                image | truth | prediction | errors | prediction ...
          confusion/                       pixel counts, made again if a file behind them changed
    time  toy: see README; paper: not measured

One confusion matrix per target counts the labelled pixels of all images: IoU = TP / (TP + FP + FN),
mIoU is the mean over classes, in percent. There are two protocols:
    native    scores resized to the truth's own size; a class that is predicted but nowhere in
              the truth counts 0: as cityscapesScripts, and the number to compare across papers.
    clouds    truth resized to the network's input, classes that it lacks left out: officially.
Folders whose names differ only in a suffix, 04_selftrain and 04_selftrain_seed1, are seeds of one
experiment. Check: 04_selftrain has a higher mean than 03_train_source.
--IMAGES=my_photos labels pictures instead: train ids and overlays in OUT/images."""
import re
from importlib import import_module
from pathlib import Path

import common
import numpy as np
import torch
from common import (CLASSES, COLOURS, DATA, IGNORE, RUN, Stop, expect, expect_kind,
                    expect_numbers, preset)
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

source_stage = import_module("03_train_source")                 # the network (paper 3.1)

# ---------------------------------------------------------------------------- constants
# in and out
TARGETS = preset(toy=tuple(f"folder:{DATA}/toy/{s}" for s in "day night snow fog rain".split()),
                 paper=("cityscapes", "bdd", "mapillary"),
                 cityscapes=("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))
CHECKPOINTS = ()                # files, run folders, folders of runs; () = RUN/0*/model.safetensors
IMAGES = ""                     # a folder of pictures to label, by the last checkpoint by name
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


def check():
    """Refuse what would fail late, hang, or score nonsense in silence. Raises Stop."""
    expect_kind(tuple, TARGETS=TARGETS, CHECKPOINTS=CHECKPOINTS, SCORED=SCORED)
    expect_kind(str, OUT=OUT, IMAGES=IMAGES)
    expect_kind(bool, HALF=HALF)
    titles = {Path(target).name for target in TARGETS}
    expect(TARGETS and len(titles) == len(TARGETS),
           f"TARGETS={','.join(TARGETS)}: expected targets whose last folders differ")
    expect(PROTOCOL in ("native", "clouds"), f"{PROTOCOL=}: expected native or clouds")
    expect_numbers(int, 0, 8192, SHORT_SIDE=SHORT_SIDE)
    expect(SHORT_SIDE == 0 or SHORT_SIDE >= 32, f"{SHORT_SIDE=}: expected 0, or 32 and more")
    expect(SCORED and len(set(SCORED) & set(CLASSES)) == len(SCORED),
           f"SCORED={','.join(SCORED)}: expected distinct names out of {', '.join(CLASSES)}")
    expect_numbers(int, 0, 256, PANELS=PANELS, WORKERS=WORKERS)


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
    encoder, decoder, about = source_stage.load_model(file)
    init = source_stage.model_file(common.located(about["constants"].get("INIT", "")))
    before = about["constants"].get("weights of INIT")
    if before and init.is_file() and before != common.digest([init.read_bytes()]):
        print(f"warning: {file} began from an earlier {init}, which was trained again since then: "
              "run 04 again, in another --OUT")
    return encoder.to(common.device()), decoder.to(common.device())


def network_input(image, short_side):
    """PIL RGB -> uint8 (H, W, 3), resized to a short side of `short_side` pixels; 0: as it is.
    Raises Stop if that is too large."""
    scale = short_side / min(image.size) if short_side else 1
    width, height = (round(side * scale) for side in image.size)
    expect(width * height <= 10 ** 8, f"a picture of {image.width} x {image.height} would become "
                                      f"{width} x {height}: a smaller --SHORT_SIDE, or 0")
    return np.array(ImageOps.scale(image, scale, Image.BILINEAR))


def segment(encoder, decoder, image, size):
    """uint8 (H, W, 3) -> uint8 `size` (rows, columns): at every pixel the train id with the highest
    score. Scores are resized, not labels, so that thin objects survive."""
    pixels = torch.as_tensor(image).permute(2, 0, 1)[None].to(common.device())
    scores = source_stage.predict(encoder, decoder, pixels, common.bfloat16(HALF))
    scores = source_stage.resize(scores, size)
    return scores[0].argmax(0).byte().cpu().numpy()


class Scenes(Dataset):
    """The (image, label) pairs of a target: item i is the network's input uint8 (h, w, 3) and the
    truth uint8 (H, W). Raises Stop."""

    def __init__(self, target):
        self.target, self.pairs = target, common.pairs(target, "val")
        self.short_side, self.protocol = SHORT_SIDE, PROTOCOL       # a worker reads the file anew

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, truth = common.read_pair(*self.pairs[i], self.target)
        pixels = network_input(image, self.short_side)
        if self.protocol == "clouds":
            size = pixels.shape[1], pixels.shape[0]             # PIL's order: width, height
            truth = np.array(Image.fromarray(truth).resize(size, Image.NEAREST))
        return pixels, truth

    def digest(self):
        """16 hexadecimal digits of everything that a confusion matrix of this target depends on
        besides the network. A file's content is told by its size and time, as make does."""
        train_ids, colours = common.numbering(self.target)
        settings = self.target, self.protocol, self.short_side, HALF, train_ids.tolist(), colours
        code = common.code_digest(__file__, source_stage.__file__, common.__file__)
        rows = [common.portable(str(settings)), code]
        for pair in self.pairs:
            for file in pair:
                about = file.stat()
                rows.append(f"{common.portable(str(file))} {about.st_size} {about.st_mtime_ns}")
        return common.digest(rows)


def kept_matrix(path):
    """The confusion matrix in a file, int64 (C, C), or None: absent, damaged, of other classes."""
    try:
        matrix = np.load(path)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    right = matrix.shape == (len(CLASSES), len(CLASSES)) and matrix.dtype == np.int64
    return matrix if right and matrix.min() >= 0 and matrix.any() else None


def score(network, scenes, path, title):
    """-> confusion matrix int64 (C, C) of a network on Scenes; kept in `path`. Several processes
    deal the images among them. Raises Stop."""
    common.agree(f"score {path.name}")
    matrix = kept_matrix(path)
    known = common.sum_of_processes(torch.tensor(matrix is not None, device=common.device()).int())
    if known == common.PROCESSES:
        return matrix
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    mine = range(common.RANK, len(scenes), common.PROCESSES)
    loader = DataLoader(scenes, None, sampler=mine, num_workers=WORKERS)
    for image, truth in tqdm(loader, title, leave=False, disable=None, dynamic_ncols=True):
        prediction = segment(*network, image, truth.shape)
        matrix += confusion(truth.numpy(), prediction, len(CLASSES))
    matrix = common.sum_of_processes(torch.from_numpy(matrix).to(common.device())).cpu().numpy()
    if common.RANK == 0:
        with common.whole(path) as part, part.open("wb") as file:
            np.save(file, matrix)
    print(f"{title}: mIoU {mean_iou(matrix)[0]:.1f}, {len(scenes)} images")
    return matrix


def checkpoints():
    """{name: file} of what is to be scored. A name is a folder's path in RUN, or as given; a file
    other than model.safetensors is added in brackets: 04_selftrain (teacher). Raises Stop."""
    finished = sorted(Path(RUN).glob("0*/model.safetensors"))
    files, named = [], {}
    for given in CHECKPOINTS or finished or [f"{RUN}/03_train_source/model.safetensors"]:
        files += sorted(Path(given).rglob("model.safetensors")) or [source_stage.model_file(given)]
    hint = "03_train_source.py and 04_selftrain.py write it when they are finished: run them first"
    common.need([(file, hint) for file in files])
    for file in files:
        folder = common.absolute(file.parent).removeprefix(f"{RUN}/")
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


def add_to_panel(panel, name, network, scenes):
    """Add a checkpoint's prediction and errors to the cells of some images, panel[number]. A wrong
    pixel has the colour of the prediction, a right one is grey, an unlabelled one black."""
    every = int(np.ceil(len(scenes) / PANELS))
    for i in range(0, len(scenes), every):
        image, truth = scenes[i]
        step = max(1, truth.shape[1] // 512)
        truth = truth[::step, ::step]
        label = segment(*network, image, truth.shape)
        errors = COLOURS[label]
        errors[label == truth] = 225
        errors[truth == IGNORE] = 0
        title = scenes.pairs[i][0].name
        cells = panel.setdefault(i, [(title, image), ("truth", truth)])
        cells += [(name, label), ("errors", errors)]


# ---------------------------------------------------------------------------- main
def label_pictures(run, file):
    """Label IMAGES; a.jpg becomes OUT/images/KIND/a.jpg.png: no two collide. Raises Stop."""
    folder = Path(IMAGES)
    paths = common.pictures(folder)
    expect(paths, f"--IMAGES={IMAGES}: expected a folder with pictures")
    expect(not run.out.resolve().is_relative_to(folder.resolve()),
           f"--OUT={OUT} lies in --IMAGES={IMAGES}: name another --OUT")
    run.start()
    network, failed = load(file), []
    paths = paths[common.RANK::common.PROCESSES]        # torchrun's processes deal them
    for path in tqdm(paths, "labelling", leave=False, disable=None, dynamic_ncols=True):
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
    common.wait_for_others()
    expect(not failed, f"{len(failed)} of {len(paths)} pictures failed:" + "".join(failed))


def score_all(models, targets):
    """Score checkpoints {name: file} on targets {target: Scenes} -> the rows of results.json, and
    of the first six checkpoints the panels {title: {number: cells}}. Raises Stop."""
    rows, panels = [], {}
    contents = {target: scenes.digest() for target, scenes in targets.items()}
    for name, file in models.items():
        network, weights = load(file), common.digest([file.read_bytes()])
        scores = {}
        for target, scenes in targets.items():
            title = Path(target).name               # path: in OUT, which may be moved
            path = f"confusion/{file.parent.name}_{title}_{weights}_{contents[target]}.npy"
            matrix = score(network, scenes, Path(OUT, path), f"{name} on {title}")
            miou, each = mean_iou(matrix)
            scores[target] = {"miou": miou, "iou": each, "images": len(scenes), "confusion": path}
            if PANELS and len(rows) < 6 and common.RANK == 0:
                add_to_panel(panels.setdefault(title, {}), name, network, scenes)
        mean = np.mean([found["miou"] for found in scores.values()])
        rows.append({"name": name, "checkpoint": common.portable(file.as_posix()),
                     "targets": scores, "mean_miou": mean})
    return rows, panels


def main():
    free = ("TARGETS", "CHECKPOINTS", "IMAGES", "PANELS", "SCORED")
    run = common.Run(globals(), "results.json", free, {"classes and ids": common.class_ids()})
    models = checkpoints()
    if IMAGES:
        return label_pictures(run, list(models.values())[-1])
    targets = {target: Scenes(target) for target in TARGETS}
    common.device()
    run.start()
    rows, panels = score_all(models, targets)
    if common.RANK:
        return
    text = tables(rows)
    print("\n" + text)
    common.write_text(run.out / "results.md", text)
    run.finish()
    results = {"protocol": PROTOCOL, "classes": SCORED, "rows": rows}
    common.write_lines(run.result, [results])
    for title, panel in panels.items():         # last: no drawing may cost the scores
        common.save_sheet(run.out / "panels" / f"{title}.png", list(panel.values()))


if __name__ == "__main__":
    common.launch(globals())
