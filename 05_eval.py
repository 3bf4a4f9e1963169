"""
05_eval: score every checkpoint of the run on domains it has never seen (paper 4), or label anyone's own pictures.

    in    RUN/0*/model.safetensors             all of them, or those that --CHECKPOINTS names
          TARGETS                              labelled data sets, used for scoring only
    out   RUN/05_eval/results.json             per checkpoint and target: mIoU, IoU of every class, the confusion matrix
          RUN/05_eval/results.md               the tables that are also printed
          RUN/05_eval/classes.png              IoU of every class as bars, a colour per checkpoint
          RUN/05_eval/panels/TARGET.png        image | prediction of every checkpoint | truth | errors of every checkpoint
    time  toy: see README

One int64 confusion matrix per target: IoU = TP / (TP + FP + FN) over labelled pixels, mIoU = mean over classes, in percent.
  PROTOCOL=native   scores up-sampled to the truth's own size; a class that is predicted but nowhere in the truth counts 0, one in
                    neither is left out: equal to cityscapesScripts. This is the number to compare across papers.
  PROTOCOL=clouds   truth resized to the network's input (nearest), classes that the truth lacks left out: as the official code.
Scored checkpoints are remembered by their content: run it again after an ablation and only the new rows are computed.
Runs that differ only in SEED share a line of the comparison: mean, 95 % interval, and the difference to the first line, paired by seed.

    python 05_eval.py --IMAGES=my_photos       labels every picture in a folder: overlays and PNGs of train ids and, of
                                               Cityscapes' 19 classes, of label ids as its server wants them"""
import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
from common import CLASSES, DATA, IGNORE, RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
TARGETS = preset(toy=tuple(f"folder:{DATA}/toy/{style}" for style in ("day", "night", "snow", "fog", "rain")), gta=("cityscapes", "bdd", "mapillary"),
                 synthia=("cityscapes", "bdd", "mapillary"), cityscapes=("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))
OUT = f"{RUN}/05_eval"
CHECKPOINTS = ()                                  # files, run folders or folders of runs, separated by commas; () = every RUN/0*/model.safetensors
STEPS = False                                     # score the step_*.safetensors beside them too (KEEP_EVERY of 03 and 04)
IMAGES = ""                                       # a folder of pictures to label with the last checkpoint, instead of scoring
PROTOCOL = "native"                               # | "clouds"
SHORT_SIDE = preset(toy=0, paper=1024)            # pictures are resized to this short side before the network (official); 0 = as they are
SCORED = preset(toy=tuple(CLASSES), paper=tuple(CLASSES), synthia=tuple(c for c in CLASSES if c not in ("terrain", "truck", "train")))    # SYNTHIA has 16 of the 19
WINDOW = 0                                        # side of a sliding window in pixels of the network's input, moved by two thirds; 0 = the whole picture at once (official)
FLIP = False                                      # add the scores of the mirrored picture. Say so where you report the number
PANELS = 3                                        # pictures a target in panels/, of the first six checkpoints
WORKERS = preset(toy=0, paper=4)


# ---------------------------------------------------------------------------- scoring
def confusion(truth, prediction, n):
    """Integer arrays of one shape below 256, truth IGNORE where unlabelled -> int64 (n, n): [truth, prediction] pixel counts."""
    pairs = np.bincount((truth.astype(np.uint16) * 256 + prediction).ravel(), minlength=2 ** 16)
    return pairs.reshape(256, 256)[:n, :n]                              # the rows from n on are IGNORE's


def iou(matrix, absent_counts=True):
    """(n, n) counts -> float (n,) in 0..1; nan = left out. absent_counts: a class predicted but not in the truth is 0 (cityscapesScripts), else left out."""
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    out = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    if not absent_counts:
        out[matrix.sum(1) == 0] = np.nan
    return out


def mean_iou(matrix, classes=None):
    """-> mIoU in percent over `classes` (default SCORED), {class: IoU in percent or None}. The other classes' pixels still count as errors, as usual for SYNTHIA's 16."""
    each = 100 * iou(matrix, absent_counts=PROTOCOL == "native")
    scored = {c: each[CLASSES.index(c)] for c in classes or SCORED}
    known = [v for v in scored.values() if not np.isnan(v)]
    return float(np.mean(known)) if known else 0., {c: None if np.isnan(v) else round(float(v), 2) for c, v in scored.items()}


def network_input(image):
    """PIL RGB -> uint8 (1, 3, H, W), resized to SHORT_SIDE."""
    if SHORT_SIDE:
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def starts(length, window):
    """Where windows begin so that they cover a length, each at most two thirds of a window after the one before."""
    last = max(0, length - window)
    return [round(i * last / n) for n in [max(1, -(-3 * last // (2 * window)))] for i in range(n + 1 if last else 1)]


def class_scores(encoder, decoder, pixels):
    """uint8 (1, 3, H, W) -> (1, C, H, W): of the whole picture or the mean of overlapping windows; with FLIP the mirrored picture's too."""
    views = [pixels, pixels.flip(3)] if FLIP else [pixels]
    if not WINDOW:
        scores = [common.predict(encoder, decoder, view) for view in views]
    else:
        height, width = pixels.shape[-2:]
        scores = [torch.zeros(1, len(CLASSES), height, width, device=pixels.device) for _ in views]
        hits = torch.zeros(height, width, device=pixels.device)
        for y in starts(height, WINDOW):
            for x in starts(width, WINDOW):
                box = (..., slice(y, y + WINDOW), slice(x, x + WINDOW))
                hits[box] += 1
                for total, view in zip(scores, views):
                    total[box] += common.predict(encoder, decoder, view[box])
        scores = [total / hits for total in scores]
    return scores[0] + scores[1].flip(3) if FLIP else scores[0]


def class_map(scores, size):
    """(1, C, h, w) -> uint8 `size` (rows, columns): the class whose up-sampled score is highest. Scores, not labels, are resized: thin things survive.

    A few classes at a time: all 19 at the size of Mapillary's largest pictures would be gigabytes."""
    best = None
    for start in range(0, scores.shape[1], 4):
        part = scores[:, start:start + 4]
        value, index = (part if part.shape[-2:] == size else F.interpolate(part, size, mode="bilinear", align_corners=False)).max(1)
        if best is None:
            best, label = value, index
        else:
            label = torch.where(value > best, index + start, label)
            best = torch.maximum(value, best)
    return label[0].to(torch.uint8).cpu().numpy()


def segment(encoder, decoder, image, size, device):
    """PIL RGB -> uint8 `size` (rows, columns) of train ids."""
    return class_map(class_scores(encoder, decoder, network_input(image).to(device)), size)


def score(encoder, decoder, target, found, device):
    """-> confusion matrix of a target, and a few (image, truth, prediction) to look at."""
    matrix, seen = np.zeros((len(CLASSES), len(CLASSES)), np.int64), []
    shown = {int(i) for i in np.linspace(0, len(found) - 1, PANELS)} if PANELS else set()

    def read(i):
        image = common.read_image(found[i][0])
        return image, common.read_label(found[i][1], target, image.size)
    for i, (image, truth) in enumerate(common.ahead(read, range(len(found)), WORKERS)):
        if PROTOCOL == "clouds":
            truth = np.asarray(Image.fromarray(truth).resize(network_input(image).shape[:1:-1], Image.NEAREST))
        prediction = segment(encoder, decoder, image, truth.shape, device)
        matrix += confusion(truth, prediction, len(CLASSES))
        if i in shown:
            small = (min(512, truth.shape[1]), round(truth.shape[0] * min(512, truth.shape[1]) / truth.shape[1]))
            seen.append(tuple(np.asarray(x.resize(small, Image.NEAREST)) for x in (image, Image.fromarray(truth), Image.fromarray(prediction))))
    return matrix, seen


# ---------------------------------------------------------------------------- tables and pictures
def show(target):
    return Path(target).name if target.startswith("folder:") else target


def file_name(target):
    """As shown, and for a folder some letters of its whole path: two folders may have one name."""
    return f"{show(target)}_{hashlib.sha256(target.encode()).hexdigest()[:6]}" if target.startswith("folder:") else target


def together(row):
    """{name: targets} of those targets of a row that are parts of one data set and are also given as one matrix: ACDC's conditions."""
    parts = [t for t in row["targets"] if t.startswith("acdc_")]
    return {"acdc, one matrix": parts} if len(parts) > 1 else {}


def table(results):
    """results.json -> markdown: a row per checkpoint, a column per target, their mean; then IoU per class, averaged over the targets."""
    targets, rows = list(results["rows"][0]["targets"]), results["rows"]
    head = lambda first, cells: [f"| {first} | " + " | ".join(cells) + " |", "|---|" + "---:|" * len(cells)]
    joint = list(rows[0].get("together", {}))
    lines = head("checkpoint", [*map(show, targets), "mean", *joint])
    for row in rows:
        lines.append(f"| {row['name']} | " + " | ".join([*(f"{row['targets'][t]['miou']:.1f}" for t in targets), f"**{row['mean_miou']:.1f}**", *(f"{row['together'][j]['miou']:.1f}" for j in joint)]) + " |")
    if "miou_all" in rows[0]["targets"][targets[0]]:
        lines += ["", *head(f"mean of all {len(CLASSES)} classes, not of {len(results['classes'])}", [*map(show, targets), "mean"])]
        for row in rows:
            every = [row["targets"][t]["miou_all"] for t in targets]
            lines.append(f"| {row['name']} | " + " | ".join(f"{v:.1f}" for v in every) + f" | **{np.mean(every):.1f}** |")
    if len(rows) > 1:
        lines += ["", *head("comparison", ["seeds", "mean", "difference to the first"])]
        runs = list(groups(rows).items())
        for name, by_seed in runs:
            first = runs[0][1]
            shared = sorted(set(first) & set(by_seed))
            pairs = [(by_seed[s], first[s]) for s in shared] or [(a, b) for a in by_seed.values() for b in first.values()][:1]
            difference = "" if name == runs[0][0] else plus_minus([a["mean_miou"] - b["mean_miou"] for a, b in pairs], "+.1f") + ("" if shared else " (other seeds)")
            lines.append(f"| {name} | {', '.join(map(str, sorted(by_seed)))} | {plus_minus([row['mean_miou'] for row in by_seed.values()], '.1f')} | {difference} |")
    lines += ["", *head("IoU, mean of the targets", results["classes"])]
    for row in rows:
        lines.append(f"| {row['name']} | " + " | ".join("-" if v is None else f"{v:.0f}" for v in class_means(row, results["classes"])) + " |")
    return "\n".join(lines) + "\n"


def groups(rows):
    """{name: {seed: row}} of runs that differ in nothing but SEED, and so in the source model (INIT) that they began at."""
    found = {}
    for row in rows:
        found.setdefault(row.get("group", row["name"]), {})[row["seed"]] = row
    return {next(iter(by_seed.values()))["name"]: by_seed for by_seed in found.values()}


def interval(values):
    """-> mean, half width of the 95 % interval by Student's t; nan for one value"""
    from scipy.stats import t
    n = len(values)
    return float(np.mean(values)), float(t.ppf(.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def plus_minus(values, form):
    mean, half = interval(values)
    return format(mean, form) + ("" if np.isnan(half) else f" ± {half:.1f}")


def class_means(row, classes):
    """IoU of every class, averaged over the targets that have it; None where none has."""
    cells = [[t["iou"][c] for t in row["targets"].values() if t["iou"][c] is not None] for c in classes]
    return [float(np.mean(c)) if c else None for c in cells]


def draw_classes(path, results):
    """IoU of every class (mean of the targets) as bars, one per checkpoint."""
    paint = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194), (127, 127, 127))
    rows, classes, bar, wide, low = results["rows"], results["classes"], 11, 420, 110
    step = bar * len(rows) + 8
    sheet = Image.new("RGB", (low + wide + 60, 24 + 18 * len(rows) + step * len(classes)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, row in enumerate(rows):
        draw.rectangle((8, 8 + 18 * k, 18, 18 + 18 * k), fill=paint[k % len(paint)])
        draw.text((26, 7 + 18 * k), f"{row['name']}: mIoU {row['mean_miou']:.1f}", fill="black")
        for i, value in enumerate(class_means(row, classes)):
            y = 20 + 18 * len(rows) + i * step
            if k == 0:
                draw.text((8, y + (step - 20) // 2), classes[i], fill="black")
            draw.rectangle((low, y + bar * k, low + wide * (value or 0) / 100, y + bar * k + bar - 2), fill=paint[k % len(paint)])
            draw.text((low + wide * (value or 0) / 100 + 4, y + bar * k - 2), "-" if value is None else f"{value:.0f}", fill="black")
    with common.whole(path) as part:
        sheet.save(part, "PNG")


def draw_panel(path, names, columns):
    """columns: per checkpoint the list of (image, truth, prediction), all of them `size`d alike. Errors are shown in their predicted colour on grey; black = not labelled."""
    rows, titles = [], ["image", *names, "truth", *(f"errors of {name}" for name in names)]
    for k, (image, truth, _) in enumerate(columns[0]):
        errors = []
        for seen in columns:
            wrong = np.where(((seen[k][2] != truth) & (truth != IGNORE))[..., None], common.colourise(seen[k][2]), np.uint8(225))
            errors.append(np.where((truth == IGNORE)[..., None], np.uint8(0), wrong))
        rows.append(np.concatenate([image, *(common.colourise(seen[k][2]) for seen in columns), common.colourise(truth), *errors], 1))
    width = min(r.shape[1] for r in rows)
    head = Image.new("RGB", (width, 18), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(head).text((i * width // len(titles) + 4, 3), title, fill="black")
    with common.whole(path) as part:
        Image.fromarray(np.concatenate([np.asarray(head), *(r[:, :width] for r in rows), common.legend(width)])).save(part, "PNG")


def label_folder(folder, encoder, decoder, device):
    """Label every picture of a folder and the folders in it. A picture that cannot be read is passed over and named at the end."""
    out, broken = Path(OUT) / "images", []
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff") and p.is_file())
    twice = [k for k, n in Counter(p.with_suffix("") for p in files).items() if n > 1]
    server = np.full(256, 0, np.uint8)
    server[list(common.CITYSCAPES_IDS.values())] = list(common.CITYSCAPES_IDS)
    for path in files:
        try:
            image = common.read_image(path)
        except Stop as problem:
            broken.append(str(problem))
            continue
        label = segment(encoder, decoder, image, image.size[::-1], device)
        made = {"train_ids": label, "overlay": (np.asarray(image) * .45 + common.colourise(label) * .55).astype(np.uint8)}
        if CLASSES == list(common.CITYSCAPES_CLASSES):
            made["label_ids"] = server[label]                           # what Cityscapes' server takes
        name = path.relative_to(folder)
        for kind, picture in made.items():
            target = out / kind / name.with_name((name.name if path.with_suffix("") in twice else name.stem) + ".png")      # a.jpg and a.png do not overwrite each other
            target.parent.mkdir(parents=True, exist_ok=True)
            with common.whole(target) as part:
                Image.fromarray(picture).save(part, "PNG")
    if files:
        print(f"{len(files) - len(broken)} pictures labelled in {out}")
    if broken or not files:
        raise Stop(f"{len(broken)} could not be read:\n  " + "\n  ".join(broken) if files else f"--IMAGES={folder}: no pictures in it")


def checkpoints():
    """-> sorted [(name, file)]; the name is that of the folder."""
    if CHECKPOINTS:
        files = []
        for c in map(Path, CHECKPOINTS):
            inside = sorted(c.rglob("model.safetensors")) if c.is_dir() and not (c / "model.safetensors").exists() else []
            files += inside or [c / "model.safetensors" if c.is_dir() else c]
        common.need(*((f, "give finished checkpoints: --CHECKPOINTS=FILE,FILE") for f in files))
    else:
        files = sorted(Path(RUN).glob("0*/model.safetensors"))
    if STEPS:
        files = [f for file in files for f in (*sorted(file.parent.glob("step_*.safetensors")), file)]
    if not files:
        raise Stop(f"no {RUN}/0*/model.safetensors\n  03_train_source.py and 04_selftrain.py write them when they are finished: run them first")
    folders = Counter(file.parent.name for file in files if file.stem == "model")
    name = lambda file: file.parent.name if folders[file.parent.name] < 2 else f"{file.parent.parent.name}/{file.parent.name}"
    return [(name(file) if file.stem == "model" else f"{name(file)}/{file.stem}", file) for file in files]


def main():
    run = common.Run(globals(), "results.json", free=("TARGETS", "CHECKPOINTS", "STEPS", "IMAGES", "PANELS", "WORKERS"))
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
        alike = [about["stage"], about["iteration"], {k: v for k, v in about["constants"].items() if k not in ("SEED", "INIT", "WORKERS", "LOG_EVERY", "SAVE_EVERY", "KEEP_EVERY", "PREVIEW_EVERY")}, file.stem]
        row = {"name": name, "checkpoint": str(file), "iteration": about["iteration"], "seed": about["seed"], "group": hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:8], "targets": {}}
        for target, found in targets.items():
            kept, start = folder / f"{file_name(target)}_{len(found)}.npz", time.time()
            try:
                with np.load(kept) as arrays:
                    matrix = arrays["matrix"]
                    looks = [tuple(arrays[f"{what}_{k}"] for what in ("image", "truth", "prediction")) for k in range(int(arrays["looks"]))]
            except (OSError, ValueError, KeyError):
                matrix, looks = score(encoder, decoder, target, found, device)
                with common.whole(kept) as part, open(part, "wb") as out:
                    np.savez(out, matrix=matrix, looks=len(looks), **{f"{what}_{k}": a for k, look in enumerate(looks) for what, a in zip(("image", "truth", "prediction"), look)})
                print(f"{name} on {show(target)}: mIoU {mean_iou(matrix)[0]:.1f}, {len(found)} images, {len(found) / (time.time() - start):.1f} a second", flush=True)
            with common.whole(folder / f"{file_name(target)}.npy") as part, open(part, "wb") as out:
                np.save(out, matrix)
            miou, each = mean_iou(matrix)
            row["targets"][target] = {"miou": round(miou, 3), **({"miou_all": round(mean_iou(matrix, CLASSES)[0], 3)} if len(SCORED) < len(CLASSES) else {}), "iou": each, "images": len(found), "confusion": str(folder / f"{file_name(target)}.npy")}
            seen[target].append(looks)
        for name_of_all, parts in together(row).items():
            matrix = sum(np.load(row["targets"][part]["confusion"]) for part in parts)
            with common.whole(folder / "together.npy") as part, open(part, "wb") as out:
                np.save(out, matrix)
            row.setdefault("together", {})[name_of_all] = dict(zip(("miou", "iou"), mean_iou(matrix)), confusion=str(folder / "together.npy"))
        row["mean_miou"] = round(float(np.mean([t["miou"] for t in row["targets"].values()])), 3)
        rows.append(row)
    for target, columns in seen.items():
        if PANELS:
            draw_panel(Path(OUT) / "panels" / f"{show(target) if [*map(show, targets)].count(show(target)) == 1 else file_name(target)}.png", [name for name, _ in models][:6], columns[:6])
    results = {"preset": common.PRESET, "protocol": PROTOCOL, "classes": list(SCORED), "rows": rows}
    draw_classes(Path(OUT) / "classes.png", results)
    print("\n" + table(results))
    with common.whole(Path(OUT) / "results.md") as part:
        part.write_text(table(results))
    run.finish()
    common.write_json(run.result, results)


if __name__ == "__main__":
    common.launch(globals())
