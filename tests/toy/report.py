"""
report: the paper's tables and figures in miniature. Trains every row, scores it, writes the report.

    python tests/toy/report.py all          everything below, in this order
    python tests/toy/report.py run          rows of Tables 4 and 5 and of the oracles, all seeds
    python tests/toy/report.py ablations    rows of Figures 5 and 6 and beyond, seeds 0, 1, 2
    python tests/toy/report.py ideas        what the paper could try next: the same, on validation
                                            scenes, as are 03's steps and rate
    python tests/toy/report.py tried        other settings: seed 0, validation scenes
    python tests/toy/report.py sizes        the decoder in other sizes: seed 0, validation scenes
    python tests/toy/report.py seconds      what a step of each size takes: on an idle machine
    python tests/toy/report.py models       scores of the miniature foundation models
    python tests/toy/report.py pictures     Figures 2, 3 and 4, from seed 0
    python tests/toy/report.py write        runs/report -> results.json, figures, README.md

    python tests/toy/report.py compare RUN  does your run of the toy preset lie where ours lie?

`run raw,sam 0,1` trains some rows of some seeds only. Constants behind a command (--ITERATIONS=4)
hold for all its rows. Rows lie in runs/report/seedS/ROW, two are trained at a time, on one core
each, and a command that was stopped goes on where it was. What each row is, says rows.py.

results.json holds scores of the test split, except `validation`, `tried` and `sizes`, which are of
the validation split; what is in it and not in runs/report is kept.
README.md is report.md with the tables in it.
"""
import json
import re
import signal
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import world
from matplotlib.figure import Figure
from scipy.stats import t as student

import rows                             # puts the top of the repo on the path
import common
from rows import HERE, ROWS, STYLES, Job, write_json
from scores import IDEA_LABELS, LABELS, SCORES

RESULTS = HERE / "results.json"
PICTURES = HERE / "pictures"
SEEDS, FEW_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)

# ------------------------------------------------------------------- tables: row and its title
TABLE4 = {
    "source_only": "source only, as many steps",
    "raw": "+ painted scenes, the teacher's raw labels",
    "control": "+ the same, but raw labels only where SAM kept a label",
    "sam": "+ painted scenes, SAM (the paper's rule)",
    "vote": "+ painted scenes, SAM, majority vote"}
ORACLES = {
    "source_only": "source only, as many steps",
    "sam": "+ painted scenes, SAM",
    "rendered_raw": "rendered scenes (a perfect generator), raw labels",
    "rendered_sam": "rendered scenes, SAM",
    "rendered_masks": "rendered scenes, true masks (a perfect SAM)",
    "rendered_truth": "rendered scenes, true labels (a perfect teacher)"}
TABLE5 = {
    "source": "source, frozen CLIP",
    "source_random": "source, a frozen tower of random weights",
    "trainable": "source, CLIP trained along at a tenth of the rate",
    "sam": "self-trained, frozen CLIP",
    "trainable_sam": "self-trained, CLIP trained along"}
ABLATIONS = {
    "sam": "as shipped",
    "vote": "a mask takes the teacher's majority",
    "negative": "unlabelled pixels are background, as officially",
    "ema_100": "the teacher moves at every hundredth step, as officially",
    "one_prompt": "as many pictures, of one prompt",
    "images_12": "12 painted pictures, not 120",
    "images_40": "40 pictures",
    "images_240": "240 pictures",
    "points_1": "1 point per piece, not 5",
    "points_10": "10 points",
    "points_50": "50 points",
    "area_0": "every piece, not from 100 px on",
    "area_280": "pieces from 280 px on (0.85 % of the picture, as the paper)",
    "area_560": "pieces from 560 px on",
    "source_only": "no painted scenes"}
SETTINGS = {                # pairs: the second is compared with the first
    "source": "03: 600 steps, learning rate 1.5e-3 (shipped)",
    "source_400": "03: 400 steps, learning rate 4e-3",
    "source_only": "04, source only, after 600 steps of 03",
    "source_only_400": "04, source only, after 400",
    "sam": "04, SAM, after 600 steps of 03",
    "sam_400": "04, SAM, after 400"}
IDEAS = {
    "sam": "as shipped",
    "source_only": "no painted scenes",
    "four_classes": "(a) prompts that name four classes",
    "one_class": "(a) prompts that name one class",
    "no_dice": "(b) no dice loss on painted pictures",
    "soft_labels": "(b) the teacher's scores in place of labels on painted pictures",
    "grid": "(c) SAM's masks of a grid of points, majority of the teacher's sure pixels",
    "surest_half": "(d) only the surest half of the pixels, after SAM",
    "surest_half_raw": "(d) only the surest half of the pixels, raw labels",
    "sure_besides": "where SAM leaves no label, the teacher's of over 0.9",
    "by_iou": "(e) of SAM's three masks the one most like its piece",
    "like_its_piece": "(e) masks of IoU under 0.5 with their piece are dropped",
    "deep_points": "(e) points deep inside the piece",
    "text_scores": "(f) the teacher's scores times CLIP's text scores",
    "mirror": "(g) the teacher sees the picture and its mirror image",
    "ramp": "(h) HRDA's ramp of the EMA",
    "sam_wide": "(i) a decoder of width 128",
    "source_only_wide": "(i) the same, no painted scenes"}
#                  title of the axis, {value: row}
FIGURES = {
    "figure5":        ("painted pictures (their share of a batch stays a third)",
                       {12: "images_12", 40: "images_40", 120: "sam", 240: "images_240"}),
    "figure6_points": ("points per piece",
                       {1: "points_1", 5: "sam", 10: "points_10", 50: "points_50"}),
    "figure6_area":   ("smallest piece, pixels (0.85 % of the picture is 280)",
                       {0: "area_0", 100: "sam", 280: "area_280", 560: "area_560"})}

# ------------------------------------------------------------------- single changes, seed 0
#    what was changed                           row            constants
TRIED = {
    "03 as shipped: 8 images per step, 600 steps, learning rate 1.5e-3": ("source", ()),
    "03, 400 steps":                            ("source",      ("--ITERATIONS=400",)),
    "03, 400 steps, learning rate 2.5e-3":      ("source", ("--ITERATIONS=400", "--LR=0.0025")),
    "03, 400 steps, learning rate 4e-3":        ("source",      ("--ITERATIONS=400", "--LR=0.004")),
    "04 as shipped: 4 source images and 2 painted ones per step": ("sam", ()),
    "04, 4 and 4":                              ("sam",         ("--N_GENERATED=4",)),
    "04, 6 and 2":                              ("sam",         ("--N_SOURCE=6",)),
    "04, 8 and 4":                      ("sam", ("--N_SOURCE=8", "--N_GENERATED=4")),
    "04, 4 and 0: source only":                 ("source_only", ()),
    "04, 8 and 0: source only":                 ("source_only", ("--N_SOURCE=8",)),
    "04, raw labels":                           ("raw",         ()),
    "04, pieces from 40 px":                    ("sam",         ("--SAM_MIN_AREA=40",)),
    "04, pieces from 280 px (0.85 %, as the paper)": ("sam",    ("--SAM_MIN_AREA=280",)),
    "04, learning rate 1e-3":                   ("sam",         ("--LR=0.001",)),
    "04, EMA 0.99":                             ("sam",         ("--EMA=0.99",)),
    "04, 10 points":                            ("sam",         ("--SAM_POINTS=10",)),
    "04, majority vote":                        ("vote",        ()),
    "04, unlabelled = negative (official)":     ("sam",         ("--UNLABELLED=negative",))}
#    the decoder (24 queries, 3 layers, 3 pixel layers, width 64)     constants
SIZES = {
    "as shipped":                        ("source",             ()),
    "no pixel layers: a plain FPN":      ("source",             ("--PIXEL_LAYERS=0",)),
    "6 pixel layers":                    ("source",             ("--PIXEL_LAYERS=6",)),
    "1 layer":                           ("source",             ("--LAYERS=1",)),
    "6 layers":                          ("source",             ("--LAYERS=6",)),
    "12 queries":                        ("source",             ("--QUERIES=12",)),
    "48 queries":                        ("source",             ("--QUERIES=48",)),
    "width 32":                          ("source",             ("--DIM=32", "--HIDDEN=64")),
    "width 128":                         ("source",             ("--DIM=128", "--HIDDEN=256")),
    "masks at 1/8":                      ("source_stride_8",    ()),
    "Mask2Former's head (transformers)": ("source_mask2former", ("--PIXEL_LAYERS=6",)),
    "the same, for as long as ours took": ("source_mask2former",
                                           ("--PIXEL_LAYERS=6", "--ITERATIONS=270"))}


# ------------------------------------------------------------------- running
def run(names, seeds, constants):
    rows.prepare()
    jobs = []
    for seed in seeds:
        for name in names:
            jobs.append(Job(name, seed, rows.folder_of(name, seed), constants=constants))
    rows.work(jobs)


def run_ablations(constants):
    rows.prepare_ablations()
    run([name for name in ABLATIONS if name not in TABLE4], FEW_SEEDS, constants)


def run_ideas(constants):
    """What is compared on validation scenes. A row that has test scores is only scored again."""
    rows.prepare()
    rows.prepare_ideas()
    jobs = []
    for seed in FEW_SEEDS:
        for name in dict.fromkeys(["source", "source_wide", *SETTINGS, *IDEAS]):
            jobs.append(Job(name, seed, rows.folder_of(name, seed), "validation", constants))
    rows.work(jobs)


def folder_of_change(name, title):
    letters = [letter if letter.isalnum() else "_" for letter in title]
    return rows.ROOT / name / "".join(letters)


def run_changes(name, changes, constants):
    """name: "tried" or "sizes"; changes: TRIED or SIZES"""
    rows.prepare()
    jobs = []
    for title, (row, own) in changes.items():
        out = folder_of_change(name, title)
        jobs.append(Job(row, 0, out, "validation", own + constants))
    rows.work(jobs)


def decoder_of(stage, encoder, row, constants):
    """A new decoder of one of SIZES."""
    size = {name: getattr(stage, name) for name in ("DIM", "QUERIES", "LAYERS", "HIDDEN",
                                                    "PIXEL_LAYERS")}
    for constant in constants:
        name, _, value = constant.removeprefix("--").partition("=")
        if name in size:
            size[name] = int(value)
    torch.manual_seed(0)
    kind = rows.decoder_with(ROWS[row][2], stage.Decoder)
    return kind(encoder.channels, len(common.CLASSES), *size.values())


def time_sizes(rounds=17):
    """Forward and backward of decoder and loss on the encoder's maps of 16 source images, on one
    thread: the median of all rounds but two. One of each size in turn, so that a busy moment hits
    them all."""
    stage = import_module(rows.SOURCE)
    common.device()
    torch.set_num_threads(1)
    encoder = stage.Encoder(stage.ENCODER)
    crops = stage.SourceCrops(stage.SOURCE, (0, 3), stage.CROP, stage.SCALE, encoder.fill)
    images, labels = next(iter(stage.batches(crops, 16, 0, 1, 0)))
    features = encoder(images)
    decoders, times, found = {}, {}, {}
    for title, (row, constants) in SIZES.items():
        decoders[title] = decoder_of(stage, encoder, row, constants)
        times[title] = []
    for i in range(rounds):
        for title, decoder in decoders.items():
            torch.manual_seed(i)
            since = time.perf_counter()
            loss, _ = stage.mask_loss(*decoder(features), labels.long(), stage.POINTS,
                                      stage.LOSS_WEIGHTS, stage.NO_OBJECT)
            loss.backward()
            times[title].append(time.perf_counter() - since)
            decoder.zero_grad()
    for title, decoder in decoders.items():
        parameters = sum(p.numel() for p in decoder.parameters())
        seconds = round(float(np.median(times[title][2:])), 3)
        found[title] = {"seconds": seconds, "parameters": parameters}
        print(title, found[title])
    write_json(rows.ROOT / "seconds.json", found)


def rounded(value):
    """Floats to three digits, also within dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(float(value), 3) if isinstance(value, (float, np.floating)) else value


def score_models():
    (rows.ROOT / "models").mkdir(parents=True, exist_ok=True)
    for name, score in SCORES.items():
        found = rounded(score())
        write_json(rows.ROOT / f"models/{name}.json", found)
        print(name, found, flush=True)


# ------------------------------------------------------------------- results.json
def toy_run():
    """The toy preset's own run, if 05 has scored it -> {stage: {"seconds", "miou" per style}}"""
    run, found = Path(common.RUN), {}
    if not (run / "05_eval/results.json").exists():
        return found
    for script in sorted(HERE.parents[1].glob("0*.py")):
        record = run / script.stem / "run.json"
        about = json.loads(record.read_text()) if record.exists() else {}
        if "wall_seconds" in about:
            found[script.stem] = {"seconds": about["wall_seconds"]}
    for row in json.loads((run / "05_eval/results.json").read_text())["rows"]:
        if row["name"] in found:            # others are the user's own experiments
            scores = row["targets"].values()
            found[row["name"]]["miou"] = [round(score["miou"], 3) for score in scores]
    return found


def scores_of(path):
    """A row's file of scores -> {style: {"miou", "iou"}}"""
    styles = {}
    for style, scores in json.loads(path.read_text())["styles"].items():
        each = [scores["iou"][name] for name in common.CLASSES]
        styles[style] = {"miou": scores["miou"], "iou": each}
    return styles


def last_loss(folder):
    """The mean loss of the last five lines of a log."""
    lines = common.read_lines(Path(folder, "log.jsonl"), "step", "loss")
    return round(float(np.mean([line["loss"] for line in lines[-5:]])), 3)


def gather():
    """runs/report -> results.json: {"rows": {row: {seed: {style: {"miou", "iou"}}}}, "validation":
    the same on validation scenes, "loss": {row: {seed: last_loss()}}, "code": {row: {seed:
    commit}}, "models", "tried", "sizes", "toy"}. Rows in it that are not in runs/report stay,
    unless there is no such row any more."""
    kinds = ("rows", "validation", "loss", "code", "models", "tried", "sizes", "toy")
    results = {kind: {} for kind in kinds}
    if RESULTS.exists():
        old = json.loads(RESULTS.read_text())
        results |= {kind: old[kind] for kind in kinds if kind in old}
    for kind, known in (("rows", ROWS), ("validation", ROWS), ("loss", ROWS), ("code", ROWS),
                        ("models", SCORES), ("tried", TRIED), ("sizes", SIZES)):
        results[kind] = {name: row for name, row in results[kind].items() if name in known}
    for kind, split in (("rows", "test"), ("validation", "validation")):
        for path in sorted(rows.ROOT.glob(f"seed*/*/{split}.json")):
            found = json.loads(path.read_text())
            row, seed = found["row"], str(found["seed"])
            results[kind].setdefault(row, {})[seed] = scores_of(path)
            results["loss"].setdefault(row, {})[seed] = last_loss(path.parent)
            results["code"].setdefault(row, {})[seed] = found["code"]
    for name, changes in (("tried", TRIED), ("sizes", SIZES)):
        for title in changes:
            path = folder_of_change(name, title) / "validation.json"
            if path.exists():
                found = json.loads(path.read_text())
                row = results[name].setdefault(title, {})
                row["mean"] = found["mean"]
                if "game" in found["styles"]:
                    row["game"] = found["styles"]["game"]["miou"]
    if (rows.ROOT / "seconds.json").exists():
        for title, found in json.loads((rows.ROOT / "seconds.json").read_text()).items():
            results["sizes"].setdefault(title, {}).update(found)
    for path in sorted((rows.ROOT / "models").glob("*.json")):
        results["models"][path.stem] = json.loads(path.read_text())
    results["toy"] |= toy_run()
    text = json.dumps(results, indent=1, sort_keys=True)
    text = re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)   # a list: a line
    common.write_text(RESULTS, text + "\n")
    return json.loads(text)             # its keys are sorted, so that the tables repeat


# ------------------------------------------------------------------- tables in Markdown
def markdown(head, lines):
    """[texts], [[texts]] -> a table"""
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines))


def mean_of(row, seed):
    return float(np.mean([row[seed][style]["miou"] for style in STYLES]))


def mean_and_spread(values):
    """-> mean, sample standard deviation (nan of a single value)"""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else np.nan


def plus_minus(spread):
    return "" if np.isnan(spread) else f" ± {spread:.1f}"


def interval(values):
    """The 95 % interval of a mean (Student's t), as a text; two values are too few for one."""
    mean, spread = mean_and_spread(values)
    if len(values) < 3:
        return ""
    half = student.ppf(.975, len(values) - 1) * spread / len(values) ** .5
    return f"{mean - half:+.1f} to {mean + half:+.1f}"


def table(found, wanted, base):
    """mIoU per style, mean of the seeds; the mean of five with the standard deviation of the seeds;
    the difference to row `base`, seed by seed, and its interval. found: {row: {seed: scores}},
    wanted: {row: title}"""
    head = ["", *STYLES, "mean of five", "seeds", "difference to the first row, paired",
            "95 % interval"]
    lines = []
    for name, title in wanted.items():
        row, first = found.get(name), found.get(base, {})
        if not row:
            continue
        line = [title]
        for style in STYLES:
            line.append(f"{np.mean([scores[style]['miou'] for scores in row.values()]):.1f}")
        mean, spread = mean_and_spread([mean_of(row, seed) for seed in row])
        line += [f"**{mean:.1f}**{plus_minus(spread)}", str(len(row))]
        shared = sorted(set(row) & set(first))
        if name == base or not shared:
            line += ["", ""]
        else:
            gains = [mean_of(row, seed) - mean_of(first, seed) for seed in shared]
            gain, spread = mean_and_spread(gains)
            line += [f"{gain:+.1f}{plus_minus(spread)}", interval(gains)]
        lines.append(line)
    return markdown(head, lines)


def table_of_settings(found):
    """SETTINGS pair by pair, as one table."""
    names, lines = list(SETTINGS), []
    for first, second in zip(names[::2], names[1::2]):
        part = table(found, {name: SETTINGS[name] for name in (first, second)}, first)
        lines += part.splitlines()[2 if lines else 0:]
    return "\n".join(lines).replace("to the first row", "to the row above")


def table_of_classes(found, wanted, base=None):
    lines = []
    for name, title in wanted.items():
        each = []
        for scores in found.get(name, {}).values():
            each += [scores[style]["iou"] for style in STYLES]
        if each:
            means = np.nanmean(np.array(each, float), 0)
            lines.append([title, *(f"{mean:.0f}" for mean in means)])
    return markdown(["IoU, mean of styles and seeds", *common.CLASSES], lines)


def with_commits(results, make, wanted, base):
    """make(rows, wanted, base), below the commits of whose scripts its numbers are."""
    commits = set()
    for name in wanted:
        commits |= set(results["code"].get(name, {}).values())
    text = make(results["rows"], wanted, base)
    return f"Of commit {' and '.join(sorted(commits))}:\n\n{text}"


def table_of_sizes(found):
    head = ["decoder", "parameters", "seconds per step", "game", "mean of the five unseen"]
    lines = []
    for title in (title for title in SIZES if "mean" in found.get(title, {})):
        line, row = [title], found[title]
        forms = {"parameters": ",", "seconds": ".2f", "game": ".1f", "mean": ".1f"}
        for key, form in forms.items():
            line.append(format(row[key], form) if key in row else "")
        lines.append(line)
    return markdown(head, lines)


def table_of_tried(found):
    lines = [[title, f"{found[title]['mean']:.1f}"] for title in TRIED if title in found]
    return markdown(["", "mean of five"], lines)


def table_of_labels(found, kinds):
    """Per style: right per cent of the labelled pixels, and in brackets how many are labelled."""
    lines = []
    for kind in (kind for kind in kinds if kind in found):
        scores = [found[kind][style] for style in STYLES]
        right = [100 * score["right"] for score in scores]
        labelled = [100 * score["labelled"] for score in scores]
        line = [kind]
        for a, b in zip([*right, np.mean(right)], [*labelled, np.mean(labelled)]):
            line.append(f"{a:.0f} ({b:.0f})")
        line.append(f"{np.mean([score['miou'] for score in scores]):.1f}")
        lines.append(line)
    return markdown(["right % (labelled %)", *STYLES, "mean", "mIoU where labelled"], lines)


def lines_of_sam(m):
    classes = ", ".join(f"{name} {iou:.2f}" for name, iou in m["by_class"].items())
    of_five = ("IoU of five random points in a piece of 100 px and more (the mask that it rates "
               f"highest; {m['pieces']} pieces)")
    correlation = "rank correlation of its ratings with the true IoU"
    return [["SAM", of_five, f"{m['iou_100_px_and_more']:.2f}"],
            ["", "the same, 30 to 99 px", f"{m['iou_under_100_px']:.2f}"],
            ["", correlation, f"{m['rank_correlation']:.2f}"],
            ["", "by class", classes]]


def lines_of_clip(m):
    zero_shot = "style by the nearest of six sentences, zero-shot"
    precision = ("which classes are there, mean average precision "
                 f"(chance {m['mAP_of_chance']:.2f})")
    return [["CLIP", zero_shot, f"{100 * m['style_mean']:.0f} %"],
            ["", precision, f"{m['mAP']:.2f}"]]


def lines_of_diffusion(m):
    held_out = 100 * m["classifier_on_held_out_scenes"]
    follows = ("weather follows the prompt, by a linear classifier (right on "
               f"{held_out:.0f} % of held-out rendered scenes)")
    lines = [["diffusion", follows, f"{100 * m['follows_the_prompt']:.1f} %"]]
    for style, v in m["by_style"].items():
        measured = (f"{style}, n = {v['n']}: Frechet distance of CLIP codes to rendered scenes "
                    "(real to real, noise); teacher's confidence (on rendered)")
        limits = f"{v['frechet_real_to_real']:.3f}, {v['frechet_noise']:.3f}"
        sure = f"{v['sure_painted']:.2f} ({v['sure_rendered']:.2f})"
        lines.append(["", measured, f"{v['frechet']:.3f} ({limits}); {sure}"])
    return lines


def lines_of_llm(m):
    least = min(m["named"].values())
    measured = (f"lines that parse, of {m['lines']}; {m['kept']} prompts are kept, the rarest "
                f"class is named {least} times")
    return [["LLM", measured, f"{100 * m['parse']:.0f} %"]]


def table_of_models(found):
    lines = []
    for name, lines_of in (("sam", lines_of_sam), ("clip", lines_of_clip),
                           ("diffusion", lines_of_diffusion), ("llm", lines_of_llm)):
        if name in found:
            lines += lines_of(found[name])
    return markdown(["model", "measured on test scenes", ""], lines)


# ------------------------------------------------------------------- the paper's figures
def draw_figure(path, found_rows, title, wanted, seeds=FEW_SEEDS):
    """The mean of the five styles against a setting, with the standard deviation over the seeds,
    and source only as a grey line. Settings are a list, not a scale. Rows without all the seeds are
    left out. wanted: {setting: row} -> whether there was something to draw"""
    found = {}
    for setting, name in {"base": "source_only", **wanted}.items():
        row = found_rows.get(name, {})
        if all(str(seed) in row for seed in seeds):
            found[setting] = mean_and_spread([mean_of(row, str(seed)) for seed in seeds])
    base = found.pop("base", None)
    if base is None or len(found) < 2:
        return False
    means, spreads = zip(*found.values())
    figure = Figure((5.2, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.errorbar(range(len(found)), means, spreads, marker="o", capsize=3)
    axes.axhline(base[0], color="grey", label="source only")
    axes.set_xticks(range(len(found)), [str(setting) for setting in found])
    axes.set(xlabel=title, ylabel=f"mIoU, mean of five styles, {len(seeds)} seeds")
    axes.legend()
    with common.whole(path) as part:
        figure.savefig(part, format="png")
    return True


def draw_bars(path, found_rows, wanted):
    """The mean of the five styles as a bar per row, with the standard deviation over its seeds.
    wanted: {row: title}. Rows that were not run are left out."""
    figure = Figure((7, 2.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, title in wanted.items():
        row = found_rows.get(name)
        if row:
            mean, spread = mean_and_spread([mean_of(row, seed) for seed in row])
            axes.barh(title, mean, xerr=spread, capsize=3, color="tab:blue", alpha=.6)
    axes.invert_yaxis()
    axes.set_xlabel("mIoU, mean of five styles")
    with common.whole(path) as part:
        figure.savefig(part, format="png")


def draw_figure4(path, image, encoder, teacher):
    """One painted image through refine(), step by step. image: uint8 (H, W, 3)"""
    stage = import_module(rows.SELF)
    sam = stage.load_sam(stage.SAM)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        embedding = sam.image_encoder(sam.preprocess(pixels.float()))[0]
        scores = stage.source_stage.predict(encoder, teacher, pixels.to(common.device()))
        label = scores[0].argmax(0).cpu()
        refined, points = stage.refine(sam, embedding, label, np.random.default_rng((0, 0, 4)))
        masks = stage.sam_masks(sam, embedding, torch.from_numpy(points), label.shape).numpy()
    piece, _, area = stage.components(label.byte().numpy())
    first_x, first_y = points[:, 0].astype(int).T
    hues = np.random.default_rng(3).integers(60, 256, (len(masks), 3), dtype=np.uint8)
    pieces, drawn = np.full_like(image, 30), np.full_like(image, 30)
    for hue, k in zip(hues, piece[first_y, first_x]):       # the piece of each prompt
        pieces[piece == k] = hue
    for m in np.argsort(-masks.sum((1, 2))):                # small masks on top
        drawn[masks[m]] = hues[m]
    marked = pieces.repeat(2, 0).repeat(2, 1)
    for x, y in 2 * points.reshape(-1, 2).astype(int):
        marked[max(0, y - 2):y + 4, max(0, x - 2):x + 4] = 0
        marked[max(0, y - 1):y + 3, max(0, x - 1):x + 3] = 255
    small = int((area[1:] < stage.SAM_MIN_AREA).sum())
    common.save_sheet(path, [
        [("a painted image", image), ("1. the teacher's label", label.byte().numpy())],
        [(f"2. {len(masks)} components; {small} are under {stage.SAM_MIN_AREA} px (dark)", pieces),
         (f"3. {stage.SAM_POINTS} random points in each", marked)],
        [("4. the mask that SAM rates highest, for each", drawn),
         ("5. union by class; black: no mask, or two classes", refined.byte().numpy())]])


def draw_pictures(painted=4):
    """Figures 2 (test scenes before and after self-training), 3 (painted images) and 4."""
    evaluate = import_module("05_eval")
    networks = {"source only, as many steps": rows.folder_of("source_only", 0),
                "CLOUDS": rows.folder_of("sam", 0)}
    networks = {name: rows.load_network(folder / "model.safetensors")
                for name, folder in networks.items()}
    lines = []
    for style in STYLES:
        image, truth, *_ = world.draw(world.seeds("test", style, 3)[2], style)
        line = [(f"{style}, a test scene", image)]
        for name, network in networks.items():
            line.append((name, evaluate.segment(*network, image, truth.shape)))
        lines.append([*line, ("truth", truth)])
    common.save_sheet(PICTURES / "figure2.png", lines)
    folder = rows.ROOT / "02_generate"
    plan = common.read_lines(folder / "index.jsonl", "file", "prompt")
    import_module("02_generate").contact_sheet(PICTURES / "figure3.png", folder, plan)
    image = np.array(common.read_image(folder / plan[painted % len(plan)]["file"]))
    theta_0 = rows.load_network(rows.source_of("sam", 0))   # what the first steps of 04 see
    draw_figure4(PICTURES / "figure4.png", image, *theta_0)


# ------------------------------------------------------------------- the report
def tables(results):
    made, checked = partial(with_commits, results), results["validation"]
    return {
        "table4": made(table, TABLE4, "source_only"),
        "classes": made(table_of_classes, TABLE4, "source_only"),
        "oracles": made(table, ORACLES, "source_only"),
        "table5": made(table, TABLE5, "source"),
        "more": made(table, ABLATIONS, "sam"),
        "settings": table_of_settings(checked),
        "ideas": table(checked, IDEAS, "sam"),
        "sizes": table_of_sizes(results["sizes"]),
        "tried": table_of_tried(results["tried"]),
        "models": table_of_models(results["models"]),
        "labels": table_of_labels(results["models"].get("labels", {}), LABELS),
        "idea_labels": table_of_labels(results["models"].get("idea_labels", {}), IDEA_LABELS)}


def write():
    results = gather()
    for name, (title, wanted) in FIGURES.items():
        draw_figure(PICTURES / f"{name}.png", results["rows"], title, wanted)
    enough = {name: row for name, row in results["rows"].items() if len(row) >= len(FEW_SEEDS)}
    if set(TABLE4) & set(enough):
        draw_bars(PICTURES / "table4.png", enough, TABLE4)
    text = (HERE / "report.md").read_text()
    for name, part in tables(results).items():
        text = text.replace("{" + name + "}", part)
    common.write_text(HERE / "README.md", text)


# ------------------------------------------------------------------- a run of your own
def usual(values):
    """Where 95 % of further seeds would lie, if they are spread as these -> lowest, highest"""
    mean, spread = mean_and_spread(values)
    half = student.ppf(.975, len(values) - 1) * spread * (1 + 1 / len(values)) ** .5
    return mean - half, mean + half


def compare(run):
    """Print, for each score and for the loss at the end of 03 and 04, whether a run of the toy
    preset lies where another seed would. -> how many numbers do not. Raises Stop."""
    results = json.loads(RESULTS.read_text())
    scored = Path(run, "05_eval/results.json")
    common.need([(scored, "python 05_eval.py writes it: run the five stages first")])
    mine = {row["name"]: row["targets"] for row in json.loads(scored.read_text())["rows"]}
    outside = 0
    for stage, row in (("03_train_source", "source"), ("04_selftrain", "sam")):
        common.expect(stage in mine, f"{scored} has no {stage}: run 05_eval.py after it")
        compare_logs(Path(run, stage), HERE / f"log_{stage[:2]}.jsonl")
        seeds, found = results["rows"][row], {}
        losses = list(results["loss"][row].values())
        found["loss at the end"] = last_loss(Path(run, stage)), losses
        for target, scores in mine[stage].items():
            style = Path(target).name
            found[style] = scores["miou"], [scores[style]["miou"] for scores in seeds.values()]
        found["mean of five"] = (np.mean([scores["miou"] for scores in mine[stage].values()]),
                                 [mean_of(seeds, seed) for seed in seeds])
        for name, (value, others) in found.items():
            low, high = usual(others)
            within = low <= value <= high
            outside += not within
            print(f"  {name:16} {value:6.1f}   {len(others)} seeds here: {np.mean(others):.1f}, a "
                  f"further one {low:.1f} to {high:.1f}{'' if within else '   <- outside'}")
    print("all numbers lie where another seed would" if not outside else
          f"{outside} numbers lie outside; by chance one of twenty does")
    return outside


def compare_logs(folder, shipped):
    """Print from which line on a log differs from the shipped one, and by how much at most."""
    pairs = zip(common.read_lines(folder / "log.jsonl", "step", "loss"),
                common.read_lines(shipped, "step", "loss"))
    apart = [(line["step"], abs(line["loss"] / ours["loss"] - 1)) for line, ours in pairs]
    most = max(difference for _, difference in apart)
    first = [step for step, difference in apart if difference > .001]
    since = f", from step {first[0]} on by more than 0.1 %" if first else ""
    print(f"{folder.name}: its losses are within {100 * most:.1f} % of the shipped log of seed 0"
          f"{since}")


def main(command="", *arguments):
    constants = tuple(text for text in arguments if text.startswith("--"))
    given = [text for text in arguments if text not in constants]
    names, seeds = list(dict.fromkeys([*TABLE5, *TABLE4, *ORACLES])), SEEDS
    if command == "run" and given:
        names = given.pop(0).split(",")
        seeds = [int(seed) for seed in given.pop(0).split(",")] if given else SEEDS
    if command == "compare" and len(given) == 1:
        return compare(given[0])
    steps = {"run": partial(run, names, seeds, constants),
             "ablations": partial(run_ablations, constants),
             "ideas": partial(run_ideas, constants),
             "tried": partial(run_changes, "tried", TRIED, constants),
             "sizes": partial(run_changes, "sizes", SIZES, constants),
             "seconds": time_sizes, "models": score_models, "pictures": draw_pictures,
             "write": write}
    if command not in ("all", *steps) or given or not set(names) <= set(ROWS):
        sys.exit(f"{__doc__}\nrows: {', '.join(ROWS)}")
    for step in steps if command == "all" else [command]:
        print(f"report: {step}", flush=True)
        steps[step]()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # ended from outside: as Ctrl-C
    try:
        main(*sys.argv[1:])
    except common.Stop as problem:
        sys.exit(f"report.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("\nreport.py: stopped. The same command goes on from what was saved.")
