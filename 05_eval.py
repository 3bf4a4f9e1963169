"""
05_eval: score every checkpoint of the run on domains it has never seen (paper 4), or label anyone's own pictures.

    in    RUN/0*/model.safetensors             all of them, or those that --CHECKPOINTS names
          TARGETS                              labelled data sets, used for scoring only
    out   RUN/05_eval/results.json             per checkpoint and target: mIoU, IoU of every class, the confusion matrix
          RUN/05_eval/results.md               the table that is also printed
          RUN/05_eval/panels/TARGET.png        image | truth | then for every checkpoint: prediction | errors
    time  toy: see README

One int64 confusion matrix per target: IoU = TP / (TP + FP + FN) over labelled pixels, mIoU = mean over classes, in percent.
  PROTOCOL=native   scores up-sampled to the truth's own size; a class that is predicted but nowhere in the truth counts 0, one in
                    neither is left out: equal to cityscapesScripts. This is the number to compare across papers.
  PROTOCOL=clouds   truth resized to the network's input (nearest), classes that the truth lacks left out: as the official code.
Scored checkpoints are remembered by their content: run it again after an ablation and only the new rows are computed.

    python 05_eval.py --IMAGES=my_photos       writes colour overlays and train-id PNGs of every picture in a folder"""
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import CLASSES, DATA, IGNORE, RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
TARGETS = preset(toy=tuple(f"folder:{DATA}/toy/{style}" for style in ("day", "night", "snow", "fog", "rain")), gta=("cityscapes", "bdd", "mapillary"),
                 synthia=("cityscapes", "bdd", "mapillary"), cityscapes=("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))
OUT = f"{RUN}/05_eval"
CHECKPOINTS = ()                                  # files or folders, separated by commas; () = every RUN/0*/model.safetensors
IMAGES = ""                                       # a folder of pictures to label with the last checkpoint, instead of scoring
PROTOCOL = "native"                               # | "clouds"
SHORT_SIDE = preset(toy=0, paper=1024)            # pictures are resized to this short side before the network (official); 0 = as they are
SCORED = preset(toy=tuple(CLASSES), paper=tuple(CLASSES), synthia=tuple(c for c in CLASSES if c not in ("terrain", "truck", "train")))    # SYNTHIA has 16 of the 19
PANELS = 3                                        # pictures a target in panels/
WORKERS = preset(toy=0, paper=4)


# ---------------------------------------------------------------------------- scoring
def confusion(truth, prediction, n):
    """Integer arrays of one shape, truth IGNORE where unlabelled -> int64 (n, n): [truth, prediction] pixel counts."""
    labelled = truth != IGNORE
    return np.bincount(truth[labelled].astype(np.int64) * n + prediction[labelled], minlength=n * n).reshape(n, n)


def iou(matrix, absent_counts=True):
    """(n, n) counts -> float (n,) in 0..1; nan = left out. absent_counts: a class predicted but not in the truth is 0 (cityscapesScripts), else left out."""
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    out = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    if not absent_counts:
        out[matrix.sum(1) == 0] = np.nan
    return out


def mean_iou(matrix):
    """-> mIoU in percent over the classes SCORED, {class: IoU in percent or None}. The other classes' pixels still count as errors, as usual for SYNTHIA's 16."""
    each = 100 * iou(matrix, absent_counts=PROTOCOL == "native")
    scored = [each[CLASSES.index(c)] for c in SCORED]
    known = [v for v in scored if not np.isnan(v)]
    return float(np.mean(known)) if known else 0., {c: None if np.isnan(v) else round(float(v), 2) for c, v in zip(SCORED, scored)}


def network_input(image):
    """PIL RGB -> uint8 (1, 3, H, W), resized to SHORT_SIDE."""
    if SHORT_SIDE:
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def segment(encoder, decoder, pixels, size):
    """-> uint8 `size` (rows, columns) train ids. Class scores, not labels, are resized: thin things survive."""
    scores = common.predict(encoder, decoder, pixels)
    if scores.shape[-2:] != size:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def score(encoder, decoder, target, found, device):
    """-> confusion matrix of a target, and a few (image, truth, prediction) to look at."""
    matrix, seen = np.zeros((len(CLASSES), len(CLASSES)), np.int64), []
    shown = {int(i) for i in np.linspace(0, len(found) - 1, PANELS)} if PANELS else set()

    def read(i):
        image = common.read_image(found[i][0])
        return image, common.read_label(found[i][1], target, image.size)
    for i, (image, truth) in enumerate(common.ahead(read, range(len(found)), WORKERS)):
        pixels = network_input(image)
        if PROTOCOL == "clouds":
            truth = np.asarray(Image.fromarray(truth).resize(pixels.shape[:1:-1], Image.NEAREST))
        prediction = segment(encoder, decoder, pixels.to(device), truth.shape)
        matrix += confusion(truth, prediction, len(CLASSES))
        if i in shown:
            small = (min(512, truth.shape[1]), round(truth.shape[0] * min(512, truth.shape[1]) / truth.shape[1]))
            seen.append(tuple(np.asarray(x.resize(small, Image.NEAREST)) for x in (image, Image.fromarray(truth), Image.fromarray(prediction))))
    return matrix, seen


# ---------------------------------------------------------------------------- tables and pictures
def show(target):
    return Path(target).name if target.startswith("folder:") else target


def table(results):
    """results.json -> markdown: a row per checkpoint, a column per target, their mean; then IoU per class, averaged over the targets."""
    targets = list(results["rows"][0]["targets"])
    lines = ["| checkpoint | " + " | ".join(map(show, targets)) + " | mean |", "|---|" + "---:|" * (len(targets) + 1)]
    for row in results["rows"]:
        lines.append(f"| {row['name']} | " + " | ".join(f"{row['targets'][t]['miou']:.1f}" for t in targets) + f" | **{row['mean_miou']:.1f}** |")
    lines += ["", "| IoU, mean of the targets | " + " | ".join(results["classes"]) + " |", "|---|" + "---:|" * len(results["classes"])]
    for row in results["rows"]:
        cells = [[row["targets"][t]["iou"][c] for t in targets if row["targets"][t]["iou"][c] is not None] for c in results["classes"]]
        lines.append(f"| {row['name']} | " + " | ".join(f"{np.mean(c):.0f}" if c else "-" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def draw_panel(path, columns):
    """columns: per checkpoint the list of (image, truth, prediction). Errors are shown in their predicted colour on grey; black = not labelled."""
    rows = []
    for k, (image, truth, _) in enumerate(columns[0]):
        cells = [image, common.colourise(truth)]
        for seen in columns:
            prediction = seen[k][2]
            wrong = np.where(((prediction != truth) & (truth != IGNORE))[..., None], common.colourise(prediction), np.uint8(225))
            cells += [common.colourise(prediction), np.where((truth == IGNORE)[..., None], np.uint8(0), wrong)]
        rows.append(np.concatenate(cells, 1))
    width = min(r.shape[1] for r in rows)
    with common.whole(path) as part:
        Image.fromarray(np.concatenate([r[:, :width] for r in rows])).save(part, "PNG")


def label_folder(folder, encoder, decoder, device):
    """Label every picture of a folder. A picture that cannot be read is passed over and named at the end."""
    out, broken = Path(OUT) / "images", []
    for kind in ("train_ids", "overlay"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    for path in files:
        try:
            image = common.read_image(path)
        except Stop as problem:
            broken.append(str(problem))
            continue
        label = segment(encoder, decoder, network_input(image).to(device), image.size[::-1])
        for kind, picture in (("train_ids", label), ("overlay", (np.asarray(image) * .45 + common.colourise(label) * .55).astype(np.uint8))):
            with common.whole(out / kind / f"{path.stem}.png") as part:
                Image.fromarray(picture).save(part, "PNG")
    print(f"{len(files) - len(broken)} pictures labelled in {out}")
    if broken:
        raise Stop(f"{len(broken)} could not be read:\n  " + "\n  ".join(broken))


def checkpoints():
    """-> sorted [(name, file)]; the name is that of the folder."""
    if CHECKPOINTS:
        files = [Path(c) / "model.safetensors" if Path(c).is_dir() else Path(c) for c in CHECKPOINTS]
        common.need(*((f, "give finished checkpoints: --CHECKPOINTS=FILE,FILE") for f in files))
    else:
        files = sorted(Path(RUN).glob("0*/model.safetensors"))
    if not files:
        raise Stop(f"no {RUN}/0*/model.safetensors\n  03_train_source.py and 04_selftrain.py write them when they are finished: run them first")
    return [(file.parent.name if file.stem == "model" else f"{file.parent.name}/{file.stem}", file) for file in files]


def main():
    run = common.Run(globals(), "results.json", free=("TARGETS", "CHECKPOINTS", "IMAGES", "PANELS", "WORKERS"))
    if PROTOCOL not in ("native", "clouds"):
        raise Stop(f"--PROTOCOL={PROTOCOL}: native or clouds")
    unknown = [c for c in SCORED if c not in CLASSES]
    if unknown or not TARGETS:
        raise Stop(f"--SCORED={','.join(SCORED)}: {unknown[0]} is not a class" if unknown else "--TARGETS= is empty: name at least one data set")
    models = checkpoints()
    if IMAGES and not Path(IMAGES).is_dir():
        raise Stop(f"--IMAGES={IMAGES}: no such folder")
    if not IMAGES:
        common.toy_data(*TARGETS)
    targets = {} if IMAGES else {target: common.pairs(target, "val") for target in TARGETS}
    device, encoder = common.device(), None
    run.start()
    if IMAGES:
        encoder, decoder, _ = common.load_model(models[-1][1])
        return label_folder(IMAGES, encoder.to(device), decoder.to(device), device)

    (Path(OUT) / "panels").mkdir(exist_ok=True)
    rows, seen = [], {target: [] for target in targets}
    for name, file in models:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        folder = Path(OUT) / "confusion" / f"{name.replace('/', '_')}_{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        encoder, decoder, about = common.load_model(file, encoder)
        encoder.to(device), decoder.to(device)
        row = {"name": name, "checkpoint": str(file), "iteration": about["iteration"], "seed": about["seed"], "targets": {}}
        for target, found in targets.items():
            kept, start = folder / f"{show(target)}_{len(found)}.npz", time.time()
            try:
                with np.load(kept) as arrays:
                    matrix = arrays["matrix"]
                    looks = [tuple(arrays[f"{what}_{k}"] for what in ("image", "truth", "prediction")) for k in range(int(arrays["looks"]))]
            except (OSError, ValueError, KeyError):
                matrix, looks = score(encoder, decoder, target, found, device)
                with common.whole(kept) as part, open(part, "wb") as out:
                    np.savez(out, matrix=matrix, looks=len(looks), **{f"{what}_{k}": a for k, look in enumerate(looks) for what, a in zip(("image", "truth", "prediction"), look)})
                print(f"{name} on {show(target)}: mIoU {mean_iou(matrix)[0]:.1f}, {len(found)} images, {len(found) / (time.time() - start):.1f} a second", flush=True)
            with common.whole(folder / f"{show(target)}.npy") as part, open(part, "wb") as out:
                np.save(out, matrix)
            miou, each = mean_iou(matrix)
            row["targets"][target] = {"miou": round(miou, 3), "iou": each, "images": len(found), "confusion": str(folder / f"{show(target)}.npy")}
            seen[target].append(looks)
        row["mean_miou"] = round(float(np.mean([t["miou"] for t in row["targets"].values()])), 3)
        rows.append(row)
    for target, columns in seen.items():
        if PANELS:
            draw_panel(Path(OUT) / "panels" / f"{show(target)}.png", columns)
    results = {"preset": common.PRESET, "protocol": PROTOCOL, "classes": list(SCORED), "rows": rows}
    print("\n" + table(results))
    with common.whole(Path(OUT) / "results.md") as part:
        part.write_text(table(results))
    run.finish()
    common.write_json(run.result, results)


if __name__ == "__main__":
    common.launch(globals())
