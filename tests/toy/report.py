"""
report: the paper's tables in miniature, with seeds and intervals. Trains every row, scores it, writes tests/toy/README.md.

    python tests/toy/report.py run                        the rows of Tables 4 and 5, all seeds, two at a time, one core each; goes on where it was stopped
    python tests/toy/report.py ablations                  the rows of Figures 5 and 6 and beyond, seeds 0, 1, 2
    python tests/toy/report.py run raw,sam 0,1            some rows of some seeds
    python tests/toy/report.py tried                      single changes of the settings, seed 0, on validation scenes
    python tests/toy/report.py sizes                      the decoder in other sizes, seed 0, on validation scenes
    python tests/toy/report.py seconds                    what a training step of each size takes: run it on an idle machine
    python tests/toy/report.py models                     scores of the miniature foundation models
    python tests/toy/report.py pictures                   the paper's Figures 2, 3 and 4 from seed 0 -> tests/toy/pictures
    python tests/toy/report.py write                      runs/report -> results.json, and with report.md -> README.md

Rows lie in runs/report/seedS/ROW. A row is stage 03 or 04 with the toy preset's constants except those that ROWS names, so a row is also
a command line. Rows with an oracle replace one part of stage 04 by the truth, which only the miniature world knows.
results.json holds scores of the test split, except `tried` and `sizes`, which are of the validation split.
"""
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import world
from common import IGNORE

HERE = Path(__file__).resolve().parent
ROOT = Path("runs/report")
RESULTS = HERE / "results.json"
STYLES = ("day", "night", "snow", "fog", "rain")
RENDERED = Path(common.DATA) / "toy/rendered"          # scenes of the unseen styles straight from the renderer: a perfect generator
SEEDS = (0, 1, 2, 3, 4)
PAINTED = f"--GENERATED={ROOT}/02_generate/index.jsonl"
#        row                   stage              constants                                                     oracle
ROWS = {"source":             ("03_train_source", (),                                                           None),
        "source_only":        ("04_selftrain",    ("--N_GENERATED=0",),                                         None),
        "raw":                ("04_selftrain",    (PAINTED, "--REFINE=off"),                                    None),
        "control":            ("04_selftrain",    (PAINTED,),                                                   "raw where SAM kept"),
        "sam":                ("04_selftrain",    (PAINTED,),                                                   None),
        "vote":               ("04_selftrain",    (PAINTED, "--REFINE=vote"),                                   None),
        "rendered_raw":       ("04_selftrain",    (f"--GENERATED={RENDERED}/images/index.jsonl", "--REFINE=off"), None),
        "rendered_sam":       ("04_selftrain",    (f"--GENERATED={RENDERED}/images/index.jsonl",),              None),
        "rendered_masks":     ("04_selftrain",    (f"--GENERATED={RENDERED}/images/index.jsonl",),              "true masks"),
        "rendered_truth":     ("04_selftrain",    (f"--GENERATED={RENDERED}/images/index.jsonl",),              "true labels"),
        "source_random":      ("03_train_source", (f"--ENCODER=local-dir:{ROOT}/random_clip",),                 None),
        "source_stride_8":    ("03_train_source", (),                                                           "masks at 1/8"),
        "source_mask2former": ("03_train_source", (),                                                           "Mask2Former's head"),
        "trainable":          ("03_train_source", ("--FREEZE_ENCODER=False",),                                  None),
        "trainable_sam":      ("04_selftrain",    (PAINTED, "--FREEZE_ENCODER=False"),                          None),
        **{f"images_{n}":     ("04_selftrain",    (f"--GENERATED={ROOT}/02_generate/first_{n}.jsonl",),         None) for n in (20, 100)},             # Figure 5; "sam" has 200
        "images_400":         ("04_selftrain",    (f"--GENERATED={ROOT}/02_400/index.jsonl",),                  None),
        **{f"points_{n}":     ("04_selftrain",    (PAINTED, f"--SAM_POINTS={n}"),                               None) for n in (1, 10, 50)},           # Figure 6; "sam" has 5
        **{f"area_{n}":       ("04_selftrain",    (PAINTED, f"--SAM_MIN_AREA={n}"),                             None) for n in (0, 280, 560)},         # Figure 6; "sam" has 100
        "purity":             ("04_selftrain",    (PAINTED, "--REFINE=purity"),                                 None),
        "negative":           ("04_selftrain",    (PAINTED, "--UNLABELLED=negative"),                           None),
        "ema_100":            ("04_selftrain",    (PAINTED, "--EMA_EVERY=100"),                                 None),
        "rare":               ("04_selftrain",    (PAINTED, "--RARE=0.1"),                                      None),
        "one_prompt":         ("04_selftrain",    (f"--GENERATED={ROOT}/02_one_prompt/index.jsonl",),           None)}
MORE = ("images_20", "images_100", "images_400", "points_1", "points_10", "points_50", "area_0", "area_280", "area_560", "purity", "negative", "ema_100", "rare", "one_prompt")
#        what was tried                                row            constants
TRIED = {"as shipped":                                ("sam",         ()),
         "source only, as many steps":                ("source_only", ()),
         "raw labels":                                ("raw",         ()),
         "pieces from 40 px":                         ("sam",         ("--SAM_MIN_AREA=40",)),
         "pieces from 280 px (0.85 %, as the paper)": ("sam",         ("--SAM_MIN_AREA=280",)),
         "8 painted scenes a step":                   ("sam",         ("--N_GENERATED=8",)),
         "learning rate 1e-3":                        ("sam",         ("--LR=0.001",)),
         "EMA 0.99":                                  ("sam",         ("--EMA=0.99",)),
         "10 points":                                 ("sam",         ("--SAM_POINTS=10",)),
         "majority vote":                             ("vote",        ()),
         "purity":                                    ("sam",         ("--REFINE=purity",)),
         "unlabelled = negative (official)":          ("sam",         ("--UNLABELLED=negative",))}
#        the decoder's size                           row                constants: 24 queries, 3 layers, 3 pixel layers, width 64 unless said
SIZES = {"as shipped":                                ("source",          ()),
         "no pixel layers: a plain FPN":              ("source",          ("--PIXEL_LAYERS=0",)),
         "6 pixel layers":                            ("source",          ("--PIXEL_LAYERS=6",)),
         "1 layer":                                   ("source",          ("--LAYERS=1",)),
         "6 layers":                                  ("source",          ("--LAYERS=6",)),
         "12 queries":                                ("source",          ("--QUERIES=12",)),
         "48 queries":                                ("source",          ("--QUERIES=48",)),
         "width 32":                                  ("source",          ("--DIM=32", "--HIDDEN=64")),
         "width 128":                                 ("source",          ("--DIM=128", "--HIDDEN=256")),
         "masks at 1/8":                              ("source_stride_8", ()),
         "Mask2Former's head (transformers)":         ("source_mask2former", ("--PIXEL_LAYERS=6",)),
         "the same, for as long as ours took":        ("source_mask2former", ("--PIXEL_LAYERS=6", "--ITERATIONS=160"))}


#        a pseudo-label                              REFINE     oracle
LABELS = {"the teacher's, raw":                       ("",        None),
          "raw, where SAM kept a label":              ("points",  "raw where SAM kept"),
          "redrawn by SAM":                           ("points",  None),
          "SAM, majority vote":                       ("vote",    None),
          "SAM, impure masks dropped":                ("purity",  None),
          "redrawn with true masks":                  ("points",  "true masks")}


# ----------------------------------------------------------------------------- one row
def draw_rendered(n=40):
    """n web scenes of each unseen style as 02 would have left them, with their labels beside them."""
    if not RENDERED.exists():
        jobs = [(seed, style) for style in STYLES for seed in world.seeds("web", style, n)]
        images, labels, _, captions = world.draw_many(jobs)
        part = RENDERED.with_name("rendered.part")
        for kind, arrays in (("images", images), ("labels", labels)):
            (part / kind).mkdir(parents=True, exist_ok=True)
            for i, array in enumerate(arrays):
                world.Image.fromarray(array).save(part / kind / f"{i:06d}.png")
        (part / "images/index.jsonl").write_text("".join(json.dumps({"file": f"{i:06d}.png", "prompt": c, "seed": s}) + "\n" for i, (c, (s, _)) in enumerate(zip(captions, jobs))))
        part.rename(RENDERED)


def draw_random_tower():
    """The miniature CLIP as it was before it saw anything, as a folder."""
    folder = ROOT / "random_clip"
    if not folder.exists():
        import shutil
        import open_clip
        from safetensors.torch import save_file
        part = folder.with_name("random_clip.part")
        shutil.copytree(HERE / "weights/clip", part, dirs_exist_ok=True)
        torch.manual_seed(0)
        save_file({k: v.contiguous() for k, v in open_clip.CLIP(**json.loads((part / "open_clip_config.json").read_text())["model_cfg"]).state_dict().items()}, part / "open_clip_model.safetensors")
        part.rename(folder)


def with_oracle(stage, oracle):
    """Replace a part of stage 04 by the truth, or by what a control needs; or the decoder's mask features by coarser ones."""
    if oracle == "masks at 1/8":
        class Coarse(common.Decoder):
            def pixels(self, features):
                levels, _ = super().pixels(features)
                return levels, self.mask_features(levels[2])
        common.Decoder = Coarse
        return
    if oracle == "Mask2Former's head":
        sys.path.append(str(HERE.parent))
        common.Decoder = importlib.import_module("bench").Mask2FormerHead
        return
    if oracle == "raw where SAM kept":
        redraw = stage["refine"]

        def refine(sam, embeddings, labels, random):
            redrawn, prompts = redraw(sam, embeddings, labels, random)
            return torch.where(redrawn == IGNORE, IGNORE, torch.from_numpy(labels.astype(np.int64)).to(redrawn.device)), prompts
        stage["refine"] = refine
        return
    truth_of = lambda name: common.read_label(RENDERED / "labels" / name, "folder", world.Image.open(RENDERED / "labels" / name).size)
    stage["Embeddings"] = lambda *_: lambda name, image: torch.from_numpy(truth_of(name).astype(np.int64))       # in the place of an embedding: the true label
    if oracle == "true labels":
        stage["refine"] = lambda sam, truth, labels, random: (truth.clone(), [])
        return

    def sam_masks(sam, truth, which, points, shape):
        """What a perfect SAM would say: the true piece in which most of the points lie."""
        pieces = [torch.from_numpy(stage["components"](t.numpy().astype(np.uint8))[0].astype(np.int64)) for t in truth]
        at = points.long()
        return torch.stack([pieces[i] == pieces[i][p[:, 1], p[:, 0]].mode().values for i, p in zip(which.tolist(), at)])
    stage["sam_masks"] = sam_masks


def source_of(row, seed):
    """The checkpoint that a row of stage 04 begins at."""
    return ROOT / f"seed{seed}/{'trainable' if 'trainable' in row else 'source'}/model.safetensors"


def slug(title):
    return "".join(c if c.isalnum() else "_" for c in title)


def one(row, seed, out=None, extra=(), split="test"):
    """Train a row and score it -> its checkpoint's scores, kept beside it."""
    name, arguments, oracle = ROWS[row]
    out = Path(out or ROOT / f"seed{seed}" / row)
    stage = vars(importlib.import_module(name))
    if name == "04_selftrain":
        arguments += (f"--INIT={source_of(row, seed)}",)
    sys.argv = [f"{name}.py", f"--OUT={out}", f"--SEED={seed}", *arguments, *extra]
    if oracle:
        with_oracle(stage, oracle)
    common.launch(stage)
    kept = out / f"{split}.json"
    if not kept.exists():
        evaluate, device = importlib.import_module("05_eval"), common.device()
        evaluate.PANELS = 0
        encoder, decoder, _ = common.load_model(out / "model.safetensors")
        scores = {}
        for style in (("game", *STYLES) if name == "03_train_source" else STYLES):
            target = f"folder:{common.DATA}/toy/{style}{'_validation' if split == 'validation' else ''}"
            matrix, _ = evaluate.score(encoder.to(device), decoder.to(device), target, common.pairs(target, "val"), device)
            miou, each = evaluate.mean_iou(matrix)
            scores[style] = {"miou": round(miou, 3), "iou": each}
        common.write_json(kept, {"row": row, "seed": seed, "split": split, "mean": round(float(np.mean([scores[s]["miou"] for s in STYLES])), 3), "styles": scores})
    found = json.loads(kept.read_text())
    print(row, seed, split, found["mean"], {s: round(v["miou"], 1) for s, v in found["styles"].items()}, flush=True)
    return found


def prepare():
    """Paint once for all seeds: 01 and 02 as the toy preset has them."""
    draw_rendered()
    draw_random_tower()
    call("01_prompts", f"--OUT={ROOT}/01_prompts")
    call("02_generate", f"--PROMPTS={ROOT}/01_prompts/prompts.txt", f"--OUT={ROOT}/02_generate")


def call(stage, *arguments):
    subprocess.run([sys.executable, f"{stage}.py", *arguments], check=True)


def ablations(at_once=2):
    """Lists of the first pictures, twice as many pictures, pictures of one prompt; then the rows of MORE."""
    prepare()
    lines = (ROOT / "02_generate/index.jsonl").read_text().splitlines(keepends=True)
    for n in (20, 100):
        with common.whole(ROOT / f"02_generate/first_{n}.jsonl") as part:
            part.write_text("".join(lines[:n]))
    (ROOT / "one_prompt.txt").write_text("a photo of a street in a town\n")
    call("02_generate", f"--PROMPTS={ROOT}/01_prompts/prompts.txt", "--N_IMAGES=400", f"--OUT={ROOT}/02_400")
    call("02_generate", f"--PROMPTS={ROOT}/one_prompt.txt", f"--OUT={ROOT}/02_one_prompt")
    work([((row, seed), ROOT / f"seed{seed}/{row}", "test.json") for seed in (0, 1, 2) for row in MORE], at_once)


def work(jobs, at_once=2):
    """Run jobs [(arguments of `one`, folder, result file)] at a time on one core each; a job of stage 04 waits for its source model."""
    waiting, going = [job for job in jobs if not (job[1] / job[2]).exists()], []
    while waiting or going:
        for job in waiting[:]:
            (row, seed, *_), folder, _ = job
            ready = ROWS[row][0] == "03_train_source" or source_of(row, seed).exists()
            if len(going) < at_once and ready:
                log = folder.with_suffix(".log")
                log.parent.mkdir(parents=True, exist_ok=True)
                going.append((subprocess.Popen([sys.executable, __file__, "one", *map(str, job[0])], stdout=open(log, "a"), stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}), log, time.time()))
                waiting.remove(job)
        if waiting and not going:
            raise SystemExit(f"{waiting[0][0]} needs {source_of(*waiting[0][0][:2])}: run its source row first")
        time.sleep(1)
        for entry in [e for e in going if e[0].poll() is not None]:
            going.remove(entry)
            process, log, since = entry
            print(f"{(time.time() - since) / 60:.1f} min", log.read_text().strip().splitlines()[-1], flush=True)
            if process.returncode:
                raise SystemExit(f"a row failed, see {log}")


def run(rows, seeds, at_once=2):
    """Every row of every seed, scored on test scenes."""
    prepare()
    work([((row, seed), ROOT / f"seed{seed}/{row}", "test.json") for seed in seeds for row in rows], at_once)


def single(name, changes, at_once=2):
    """Single changes {title: (row, constants)}, seed 0, scored on validation scenes."""
    prepare()
    folder_of = lambda title: ROOT / name / slug(title)
    work([((row, 0, folder_of(title), "validation", *constants), folder_of(title), "validation.json") for title, (row, constants) in changes.items()], at_once)


def seconds():
    """Forward and backward of decoder and loss on the encoder's maps of 16 source images, each size in turn, the median of 15 -> runs/report/seconds.json"""
    stage, found = importlib.import_module("03_train_source"), {}
    common.steady_cpu()
    torch.set_num_threads(1)
    encoder = common.Encoder(stage.ENCODER, True)
    images, labels = common.source_batch(common.pairs(stage.SOURCE, "train"), stage.SOURCE, 0, stage.BATCH, 0, stage.CROP, stage.SCALE, encoder.fill)
    features, plain, decoders = encoder(images), common.Decoder, {}
    for title, (row, constants) in SIZES.items():
        size = {k: getattr(stage, k) for k in ("DIM", "QUERIES", "LAYERS", "HIDDEN", "PIXEL_LAYERS")} | {k: int(v) for k, v in (c.removeprefix("--").split("=") for c in constants) if k != "ITERATIONS"}
        if ROWS[row][2]:
            with_oracle(vars(stage), ROWS[row][2])
        torch.manual_seed(0)
        decoders[title] = common.Decoder(encoder.channels, len(common.CLASSES), *(size[k] for k in ("DIM", "QUERIES", "LAYERS", "HIDDEN", "PIXEL_LAYERS")))
        common.Decoder = plain
    times = {title: [] for title in SIZES}
    for i in range(17):
        for title, decoder in decoders.items():                         # one of each in turn: a busy moment hits them all
            since = time.perf_counter()
            loss, _ = common.mask_loss(*decoder(features), labels, stage.POINTS, common.seeded(0, i, 5))
            loss.backward()
            times[title].append(time.perf_counter() - since)
            decoder.zero_grad(set_to_none=True)
    for title, decoder in decoders.items():
        found[title] = {"seconds": round(float(np.median(times[title][2:])), 3), "parameters": sum(p.numel() for p in decoder.parameters())}
        print(title, found[title])
    common.write_json(ROOT / "seconds.json", found)


# ----------------------------------------------------------------------------- the miniature foundation models
def pictures(split, style, n):
    return np.stack([world.draw(seed, style)[0] for seed in world.seeds(split, style)[:n]])


def score_sam(n=20):
    """Five points in every connected piece of a test scene: IoU of the mask that SAM itself rates highest, by size; rank correlation of its ratings with the truth."""
    from scipy.stats import spearmanr
    stage, random = importlib.import_module("04_selftrain"), np.random.default_rng(0)
    sam, large, small, rated, true, by_class = stage.load_sam(stage.SAM), {s: [] for s in world.STYLES}, [], [], [], {c: [] for c in common.CLASSES}
    for style in world.STYLES:
        for seed in world.seeds("test", style, n):
            image, label, *_ = world.draw(seed, style)
            piece, cls, area = stage.components(label)
            keep = np.flatnonzero((area >= 30) & (np.arange(len(area)) > 0))
            with torch.no_grad():
                logits, scores = stage.sam_decode(sam, stage.sam_encode(sam, torch.from_numpy(image.copy()).permute(2, 0, 1)), torch.zeros(len(keep), dtype=torch.int64),
                                                  torch.from_numpy(stage.random_points(piece, area, keep, 5, random)))
                masks = torch.nn.functional.interpolate(logits, label.shape, mode="bilinear", align_corners=False) > 0
            truth = torch.from_numpy(piece == keep[:, None, None])[:, None]
            iou = ((masks & truth).sum((2, 3)) / (masks | truth).sum((2, 3))).numpy()
            best = iou[np.arange(len(keep)), scores.argmax(1).numpy()]
            for k, value in zip(keep, best):
                large[style].append(value) if area[k] >= 100 else small.append(value)
                if area[k] >= 100:
                    by_class[common.CLASSES[cls[k]]].append(value)
            rated += scores.flatten().tolist()
            true += iou.ravel().tolist()
    return {"iou_100_px_and_more": float(np.mean(sum(large.values(), []))), "iou_under_100_px": float(np.mean(small)), "pieces": sum(map(len, large.values())), "rank_correlation": float(spearmanr(rated, true)[0]),
            "by_style": {s: float(np.mean(v)) for s, v in large.items()}, "by_class": {c: float(np.mean(v)) for c, v in by_class.items()}}


class Clip:
    """The miniature CLIP, whole: codes of pictures and words."""

    def __init__(self):
        import open_clip
        folder = HERE / "weights/clip"
        self.model, self.words = open_clip.create_model(f"local-dir:{folder}").eval(), open_clip.get_tokenizer(f"local-dir:{folder}")
        self.mean, self.std = (torch.tensor(self.model.visual.preprocess_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))

    @torch.no_grad()
    def images(self, images):
        """uint8 (N, 128, 256, 3) -> the mean code of the left and the right half (N, 64)"""
        x = (torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return torch.cat([sum(torch.nn.functional.normalize(self.model.encode_image(half), dim=-1) for half in (part[..., :128], part[..., 128:])) / 2 for part in x.split(50)])

    @torch.no_grad()
    def texts(self, texts):
        return torch.nn.functional.normalize(self.model.encode_text(self.words(texts)), dim=-1)


PLACES = dict(game="daylight", day="daylight", night="the dark", snow="the snow", fog="the fog", rain="the rain")


@torch.no_grad()
def score_labels():
    """What the student would be taught of the rendered scenes, whose truth is known: share of pixels with a label, of those the share that is right, and mIoU on them; theta_0 of seed 0."""
    stage, evaluate, found = importlib.import_module("04_selftrain"), importlib.import_module("05_eval"), {}
    sam, whole, (encoder, teacher, _) = stage.load_sam(stage.SAM), (stage.sam_masks, stage.refine, stage.REFINE), common.load_model(source_of("sam", 0))
    scenes = []
    for path in sorted((RENDERED / "images").glob("*.png")):
        image, truth = stage.to_crop(path), np.array(world.Image.open(RENDERED / "labels" / path.name))
        scenes.append((common.predict(encoder, teacher, image[None]).argmax(1).to(torch.uint8).numpy(), stage.sam_encode(sam, image), truth))
    for kind, (rule, oracle) in LABELS.items():
        stage.REFINE, found[kind] = rule, {}
        if oracle:
            with_oracle(vars(stage), oracle)
        for style, part in zip(STYLES, np.array_split(np.arange(len(scenes)), len(STYLES))):
            matrix = 0
            for i in part:
                rough, embedding, truth = scenes[i]
                seen = torch.from_numpy(truth.astype(np.int64))[None] if oracle == "true masks" else embedding
                label = stage.refine(sam, seen, rough, [common.randomness(0, i, 4)])[0].numpy()[0] if rule else rough[0]
                matrix = matrix + evaluate.confusion(truth, label.astype(np.uint8), len(common.CLASSES))
            found[kind][style] = {"labelled": matrix.sum() / len(part) / truth.size, "right": np.trace(matrix) / matrix.sum(), "miou": evaluate.mean_iou(matrix)[0]}
        stage.sam_masks, stage.refine, stage.REFINE = whole
    return found


def score_clip(n=60):
    """Zero-shot: the style by the nearest of six sentences; mean average precision of 'is this class in the picture', one sentence a class and weather."""
    clip = Clip()
    start = lambda style: "a video game picture" if style == "game" else "a photo"
    sentences = clip.texts([f"{start(s)} of a street in {PLACES[s]}" for s in world.STYLES])
    right, aps = {}, {c: [] for c in common.CLASSES}
    for k, style in enumerate(world.STYLES):
        drawn = [world.draw(seed, style) for seed in world.seeds("test", style)[:n]]
        codes = clip.images(np.stack([d[0] for d in drawn]))
        right[style] = float(((codes @ sentences.T).argmax(1) == k).float().mean())
        scores = codes @ clip.texts([f"{start(style)} of {'the sky' if c == 'sky' else 'a traffic sign' if c == 'sign' else 'a tree' if c == 'vegetation' else 'a ' + c} in {PLACES[style]}" for c in common.CLASSES]).T
        for c, name in enumerate(common.CLASSES):
            there = np.array([(d[1] == c).sum() >= 60 for d in drawn])
            if 0 < there.sum() < n:
                ranked = there[np.argsort(-scores[:, c].numpy(), kind="stable")]
                aps[name].append((float((np.cumsum(ranked)[ranked] / (np.flatnonzero(ranked) + 1)).mean()), float(there.mean())))
    known = {c: np.mean(v, 0) for c, v in aps.items() if v}
    return {"style": right, "style_mean": float(np.mean(list(right.values()))), "mAP": float(np.mean([v[0] for v in known.values()])), "mAP_of_chance": float(np.mean([v[1] for v in known.values()])),
            "AP": {c: float(v[0]) for c, v in known.items()}}


def frechet(a, b):
    """Frechet distance of two clouds of codes (N, D), (M, D), as Gaussians."""
    from scipy.linalg import sqrtm
    a, b = a.double().numpy(), b.double().numpy()
    cross = sqrtm(np.cov(a.T) @ np.cov(b.T))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(cross)))


def style_of(prompt):
    """The weather that a prompt asks for."""
    return next(s for s, words in (("night", ("dark", "night")), ("snow", ("snow", "winter")), ("fog", ("fog", "mist")), ("rain", ("rain", "wet")), ("day", ("",))) if any(w in prompt for w in words))


def score_diffusion():
    """Painted pictures of runs/report/02_generate against rendered ones: does the weather follow the prompt, how far are the codes, how sure is the teacher."""
    rows = [json.loads(line) for line in (ROOT / "02_generate/index.jsonl").read_text().splitlines()]
    painted = np.stack([np.asarray(common.read_image(ROOT / "02_generate" / row["file"])) for row in rows])
    asked = np.array([STYLES.index(style_of(row["prompt"].split(" in ", 1)[1])) for row in rows])
    clip, encoder = Clip(), common.load_model(ROOT / "seed0/source/model.safetensors")[0]

    @torch.no_grad()
    def features(images):                                                   # colour and texture at every scale: means of the encoder's maps
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return torch.cat([torch.cat([f.mean((2, 3)) for f in encoder(part)], 1) for part in x.split(50)])
    train = {s: pictures("web", s, 200) for s in STYLES}
    held = {s: pictures("test", s, 60) for s in STYLES}
    x, y = features(np.concatenate(list(train.values()))), torch.arange(5).repeat_interleave(200)
    mean, std = x.mean(0), x.std(0) + 1e-6
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], 5)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer((x - mean) / std), y).backward()
        optimizer.step()
    with torch.no_grad():
        guess = lambda images: layer((features(images) - mean) / std).argmax(1).numpy()
        held_out = float(np.mean(guess(np.concatenate(list(held.values()))) == np.arange(5).repeat(60)))
        follows = guess(painted) == asked
    found = {"classifier_on_held_out_scenes": held_out, "follows_the_prompt": float(follows.mean()), "by_style": {}}
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 256, 3), dtype=np.uint8)
    decoder = common.load_model(ROOT / "seed0/source/model.safetensors")[1]

    @torch.no_grad()
    def sure(images):
        return float(torch.cat([common.predict(encoder, decoder, part).amax(1).mean((1, 2)) for part in torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).split(20)]).mean())
    for k, style in enumerate(STYLES):
        own, n = painted[asked == k], min(60, int((asked == k).sum()))
        codes = clip.images(held[style][:n])
        found["by_style"][style] = {"n": n, "follows": float(follows[asked == k].mean()), "frechet": frechet(clip.images(own[:n]), codes), "frechet_real_to_real": frechet(clip.images(train[style][:n]), codes),
                                    "frechet_noise": frechet(clip.images(noise[:n]), codes), "sure_painted": sure(own), "sure_rendered": sure(held[style])}
    return found


def score_llm():
    """What 01 kept and dropped."""
    info = json.loads((ROOT / "01_prompts/run.json").read_text())
    lines = info["kept"] + sum(info["dropped"].values())
    unparsed = sum(n for why, n in info["dropped"].items() if why not in ("repeated", "enough of these", "cut off"))
    return {"kept": info["kept"], "lines": lines, "parse": 1 - unparsed / lines, "dropped": info["dropped"], "named": info["named"]}


def models():
    rounded = lambda x: {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else round(x, 3) if isinstance(x, float) else x
    (ROOT / "models").mkdir(parents=True, exist_ok=True)
    for name, score in (("sam", score_sam), ("labels", score_labels), ("clip", score_clip), ("diffusion", score_diffusion), ("llm", score_llm)):
        found = rounded(score())
        common.write_json(ROOT / f"models/{name}.json", found)
        print(name, found, flush=True)


# ----------------------------------------------------------------------------- the report
def gather():
    """runs/report -> results.json: {"rows": {row: {seed: scores}}, "models": {...}}. What lies in results.json and not in runs/ is kept."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "models": {}}
    for path in sorted(ROOT.glob("seed*/*/test.json")):
        found = json.loads(path.read_text())
        results["rows"].setdefault(found["row"], {})[str(found["seed"])] = {s: {"miou": v["miou"], "iou": [v["iou"][c] for c in common.CLASSES]} for s, v in found["styles"].items()}
    for name, changes in (("tried", TRIED), ("sizes", SIZES)):
        for title in changes:
            path = ROOT / name / slug(title) / "validation.json"
            if path.exists():
                found = json.loads(path.read_text())
                results.setdefault(name, {}).setdefault(title, {}).update({"mean": found["mean"], **({"game": found["styles"]["game"]["miou"]} if "game" in found["styles"] else {})})
    if (ROOT / "seconds.json").exists():
        for title, found in json.loads((ROOT / "seconds.json").read_text()).items():
            results.setdefault("sizes", {}).setdefault(title, {}).update(found)
    for path in sorted((ROOT / "models").glob("*.json")):
        results["models"][path.stem] = json.loads(path.read_text())
    text = json.dumps(results, sort_keys=True)
    with common.whole(RESULTS) as part:
        part.write_text(text.replace('"rows"', '\n"rows"').replace('"models"', '\n"models"').replace("]}}, ", "]}},\n ") + "\n")
    return results


def mean_of(row, seed):
    return float(np.mean([row[seed][s]["miou"] for s in STYLES]))


def table(results, wanted, base):
    """Rows of one table, markdown: mIoU per style (mean of the seeds), the mean with its interval, the difference to `base` paired by seed."""
    interval = importlib.import_module("05_eval").interval
    lines = ["| | " + " | ".join(STYLES) + " | mean of five | seeds | difference to the first row, paired |", "|---|" + "---:|" * (len(STYLES) + 3)]
    for name, title in wanted.items():
        row = results["rows"].get(name)
        if not row:
            continue
        each = [f"{np.mean([row[s][style]['miou'] for s in row]):.1f}" for style in STYLES]
        mean, half = interval([mean_of(row, s) for s in row])
        shared = sorted(set(row) & set(results["rows"][base]))
        gain, width = interval([mean_of(row, s) - mean_of(results["rows"][base], s) for s in shared])
        sure = lambda half: f" ± {half:.1f}" if np.isfinite(half) else ""
        lines.append(f"| {title} | " + " | ".join(each) + f" | **{mean:.1f}**{sure(half)} | {len(row)} | " + ("" if name == base else f"{gain:+.1f}{sure(width)}") + " |")
    return "\n".join(lines)


def by_class(results, wanted):
    lines = ["| IoU, mean of styles and seeds | " + " | ".join(common.CLASSES) + " |", "|---|" + "---:|" * len(common.CLASSES)]
    for name, title in wanted.items():
        row = results["rows"].get(name)
        if row:
            cells = np.nanmean(np.array([[row[s][style]["iou"] for style in STYLES] for s in row], float), (0, 1))
            lines.append(f"| {title} | " + " | ".join(f"{c:.0f}" for c in cells) + " |")
    return "\n".join(lines)


TABLE4 = {"source_only": "source only, as many steps", "raw": "+ painted scenes, the teacher's raw labels", "control": "+ the same, but raw labels only where SAM kept a label",
          "sam": "+ painted scenes, SAM (the paper's rule)", "vote": "+ painted scenes, SAM, majority vote"}
ORACLES = {"source_only": "source only, as many steps", "sam": "+ painted scenes, SAM", "rendered_raw": "rendered scenes (a perfect generator), raw labels", "rendered_sam": "rendered scenes, SAM",
           "rendered_masks": "rendered scenes, true masks (a perfect SAM)", "rendered_truth": "rendered scenes, true labels (a perfect teacher)"}
TABLE5 = {"source": "source, frozen CLIP", "source_random": "source, a frozen tower of random weights", "trainable": "source, CLIP trained along at a tenth of the rate",
          "sam": "self-trained, frozen CLIP", "trainable_sam": "self-trained, CLIP trained along"}

UNLIKE = {"sam": "as shipped", "vote": "a mask takes the teacher's majority", "purity": "a mask with under half of its class is dropped", "negative": "unlabelled pixels are background, as officially",
          "ema_100": "the teacher moves at every hundredth step, as officially", "rare": "rare classes of the source come often (temperature 0.1)", "one_prompt": "200 pictures of one prompt",
          "images_20": "20 painted pictures, not 200", "images_100": "100 pictures", "images_400": "400 pictures", "points_1": "1 point a piece, not 5", "points_10": "10 points", "points_50": "50 points",
          "area_0": "every piece, not from 100 px on", "area_280": "pieces from 280 px on (0.85 % of the picture, as the paper)", "area_560": "pieces from 560 px on", "source_only": "no painted scenes"}
FIGURES = {"figure5": ("painted pictures (their share of a batch stays a third)", {20: "images_20", 100: "images_100", 200: "sam", 400: "images_400"}),
           "figure6_points": ("points a piece", {1: "points_1", 5: "sam", 10: "points_10", 50: "points_50"}),
           "figure6_area": ("smallest piece, pixels (0.85 % of the picture is 280)", {0: "area_0", 100: "sam", 280: "area_280", 560: "area_560"})}


def figure(path, results, title, rows, seeds=("0", "1", "2")):
    """Mean of the five styles over seeds against a setting, with 95 % intervals; the grey line is source only. Equal steps along x: the settings are a list, not a scale."""
    interval = importlib.import_module("05_eval").interval
    points = [(x, *interval([mean_of(results["rows"][row], s) for s in seeds])) for x, row in rows.items() if all(s in results["rows"].get(row, {}) for s in seeds)]
    if len(points) < 2:
        return False
    base = float(np.mean([mean_of(results["rows"]["source_only"], s) for s in seeds]))
    low, high = min([base] + [m - h for _, m, h in points]) - .5, max([base] + [m + h for _, m, h in points]) + .5
    sheet = world.Image.new("RGB", (520, 300), "white")
    draw = world.ImageDraw.Draw(sheet)
    at = lambda i, value: (70 + i * 420 // (len(points) - 1), int(260 - 220 * (value - low) / (high - low)))
    for value in range(int(np.ceil(low)), int(high) + 1):
        draw.line((*at(0, value), *at(len(points) - 1, value)), fill=(225, 225, 225))
        draw.text((40, at(0, value)[1] - 6), str(value), fill="black")
    draw.line((*at(0, base), *at(len(points) - 1, base)), fill=(110, 110, 110), width=2)
    draw.text((at(len(points) - 1, base)[0] - 66, at(0, base)[1] + 3), "source only", fill=(110, 110, 110))
    draw.line([at(i, mean) for i, (_, mean, _) in enumerate(points)], fill=(31, 119, 180), width=2)
    for i, (x, mean, half) in enumerate(points):
        px, py = at(i, mean)
        draw.line((px, at(i, mean - half)[1], px, at(i, mean + half)[1]), fill=(31, 119, 180))
        draw.ellipse((px - 4, py - 4, px + 4, py + 4), fill=(31, 119, 180))
        draw.text((px - 8, 268), str(x), fill="black")
    draw.text((40, 8), "mIoU, mean of the five unseen styles, 3 seeds", fill="black")
    draw.text((170, 284), title, fill="black")
    with common.whole(path) as part:
        sheet.save(part, "PNG")
    return True


# ----------------------------------------------------------------------------- the paper's Figures 2, 3 and 4
def titled(pictures, columns, height=256):
    """[(title, uint8 (h, w, 3))] -> one picture of so many columns, titles above."""
    tiles = []
    for title, array in pictures:
        tile = world.Image.new("RGB", (height * array.shape[1] // array.shape[0] + 4, height + 20), "white")
        tile.paste(world.Image.fromarray(array).resize((tile.width - 4, height), world.Image.NEAREST), (0, 18))
        world.ImageDraw.Draw(tile).text((2, 3), title, fill="black")
        tiles.append(np.asarray(tile))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def figure4(image, encoder, teacher, seed=0):
    """One painted image through `refine`, step by step: teacher's label, components, points, SAM's masks, redrawn label. image uint8 (3, H, W)"""
    stage = importlib.import_module("04_selftrain")
    sam = stage.load_sam(stage.SAM)
    label = common.predict(encoder, teacher, image[None])[0].argmax(0).to(torch.uint8).numpy()
    embedding = stage.sam_encode(sam, image)
    refined, prompts = stage.refine(sam, embedding, label[None], [common.randomness(seed, 0, 4)])
    points, (piece, _, area) = np.stack([at for _, _, at in prompts]), stage.components(label)
    keep = [piece[int(y), int(x)] for (x, y), *_ in points]              # the piece that each prompt's points were drawn in
    with torch.no_grad():
        masks = stage.sam_masks(sam, embedding, torch.zeros(len(keep), dtype=torch.int64), torch.from_numpy(points), label.shape).numpy()
    hue = np.random.default_rng(3).integers(60, 256, (len(keep), 3), dtype=np.uint8)
    pieces, drawn = np.full((*label.shape, 3), 30, np.uint8), np.full((*label.shape, 3), 30, np.uint8)
    for colour, k in zip(hue, keep):
        pieces[piece == k] = colour
    for m in np.argsort(-masks.sum((1, 2))):                             # small masks on top
        drawn[masks[m]] = hue[m]
    marked = world.Image.fromarray(pieces).resize((2 * label.shape[1], 2 * label.shape[0]), world.Image.NEAREST)
    draw = world.ImageDraw.Draw(marked)
    for of_piece in points:
        for x, y in of_piece:
            draw.rectangle((2 * x - 2, 2 * y - 2, 2 * x + 3, 2 * y + 3), fill="white", outline="black")
    small = int((area[1:] < stage.SAM_MIN_AREA).sum())
    return titled([("a painted image", image.permute(1, 2, 0).numpy()), ("1. the teacher's label", common.colourise(label)),
                   (f"2. components: {len(keep)}, each in a colour of its own; {small} are smaller than {stage.SAM_MIN_AREA} px (dark)", pieces),
                   (f"3. {stage.SAM_POINTS} random points in each", np.asarray(marked)), ("4. the mask that SAM rates highest, for each", drawn),
                   ("5. union by class; black: no mask, or two classes claim it", common.colourise(refined[0].to(torch.uint8).numpy()))], 2)


def draw_pictures(painted=8):
    """tests/toy/pictures: figure2 (a test scene of each unseen style, before and after self-training), figure3 (painted images, their prompts), figure4. Models of seed 0."""
    folder, stage, evaluate = HERE / "pictures", importlib.import_module("04_selftrain"), importlib.import_module("05_eval")
    models = {name: common.load_model(ROOT / f"seed0/{row}/model.safetensors")[:2] for name, row in (("source only, as many steps", "source_only"), ("CLOUDS", "sam"))}
    scenes = {style: world.draw(world.seeds("test", style, 3)[2], style)[:2] for style in STYLES}
    columns = [[(image, label, evaluate.segment(*model, world.Image.fromarray(image), label.shape, torch.device("cpu"))) for image, label in scenes.values()] for model in models.values()]
    evaluate.draw_panel(folder / "figure2.png", list(models), columns)
    rows = [json.loads(line) for line in (ROOT / "02_generate/index.jsonl").read_text().splitlines()]
    importlib.import_module("02_generate").contact_sheet(folder / "figure3.png", ROOT / "02_generate", rows)
    encoder, teacher, _ = common.load_model(source_of("sam", 0))         # theta_0: what the first steps of 04 see
    with common.whole(folder / "figure4.png") as part:
        world.Image.fromarray(np.concatenate([figure4(stage.to_crop(ROOT / "02_generate" / rows[painted]["file"]), encoder, teacher), common.legend(1032)])).save(part, "PNG")


def sizes_table(found):
    lines = ["| decoder | parameters | seconds a step | game | mean of the five unseen |", "|---|---:|---:|---:|---:|"]
    cell = lambda row, key, form: format(row[key], form) if key in row else ""
    return "\n".join(lines + [f"| {title} | {cell(row, 'parameters', ',')} | {cell(row, 'seconds', '.2f')} | {cell(row, 'game', '.1f')} | {cell(row, 'mean', '.1f')} |" for title, row in found.items()])


def tried_table(found):
    return "\n".join(["| | mean of five |", "|---|---:|", *(f"| {title} | {row['mean']:.1f} |" for title, row in found.items())])


def models_table(found):
    """One line a model."""
    lines = ["| model | measured on test scenes | |", "|---|---|---:|"]
    if "sam" in found:
        m = found["sam"]
        lines += [f"| SAM | IoU of five random points in a piece of 100 px and more (the mask that it rates highest; {m['pieces']} pieces) | {m['iou_100_px_and_more']:.2f} |",
                  f"| | the same under 100 px | {m['iou_under_100_px']:.2f} |", f"| | rank correlation of its ratings with the true IoU | {m['rank_correlation']:.2f} |",
                  "| | by class | " + ", ".join(f"{c} {v:.2f}" for c, v in m["by_class"].items()) + " |"]
    if "clip" in found:
        m = found["clip"]
        lines += [f"| CLIP | style by the nearest of six sentences, zero-shot | {100 * m['style_mean']:.0f} % |", f"| | which classes are there, mean average precision (chance {m['mAP_of_chance']:.2f}) | {m['mAP']:.2f} |"]
    if "diffusion" in found:
        m = found["diffusion"]
        lines += [f"| diffusion | weather follows the prompt, by a linear classifier (right on {100 * m['classifier_on_held_out_scenes']:.0f} % of held-out rendered scenes) | {100 * m['follows_the_prompt']:.1f} % |"]
        for s, v in m["by_style"].items():
            lines.append(f"| | {s}, n = {v['n']}: Frechet distance of CLIP codes to rendered scenes (real to real, noise); teacher's confidence (on rendered) | "
                         f"{v['frechet']:.3f} ({v['frechet_real_to_real']:.3f}, {v['frechet_noise']:.3f}); {v['sure_painted']:.2f} ({v['sure_rendered']:.2f}) |")
    if "llm" in found:
        m = found["llm"]
        lines.append(f"| LLM | of {m['lines']} lines parse; {m['kept']} prompts kept, least named class {min(m['named'].values())} times | {100 * m['parse']:.0f} % |")
    return "\n".join(lines)


def labels_table(found):
    """Of each style: right per cent of the labelled pixels, and how many are labelled."""
    lines = ["| right % (labelled %) | " + " | ".join(STYLES) + " | mean | mIoU where labelled |", "|---|" + "---:|" * (len(STYLES) + 2)]
    for kind in (kind for kind in LABELS if kind in found):
        each = 100 * np.array([[found[kind][s][k] for k in ("right", "labelled")] for s in STYLES])
        lines.append(f"| {kind} | " + " | ".join(f"{right:.0f} ({labelled:.0f})" for right, labelled in (*each, each.mean(0))) + f" | {np.mean([found[kind][s]['miou'] for s in STYLES]):.1f} |")
    return "\n".join(lines)


def write():
    results = gather()
    text = (HERE / "report.md").read_text()
    parts = {"table4": table(results, TABLE4, "source_only"), "classes": by_class(results, TABLE4), "oracles": table(results, ORACLES, "source_only"), "table5": table(results, TABLE5, "source"),
             "sizes": sizes_table({t: results["sizes"][t] for t in SIZES if "mean" in results.get("sizes", {}).get(t, {})}), "tried": tried_table({t: results["tried"][t] for t in TRIED if t in results.get("tried", {})}),
             "more": table(results, UNLIKE, "sam"), "models": models_table(results["models"]),
             "labels": labels_table(results["models"].get("labels", {}))}
    for name, (title, rows) in FIGURES.items():
        figure(HERE / f"pictures/{name}.png", results, title, rows)
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part)
    with common.whole(HERE / "README.md") as part:
        part.write_text(text)


if __name__ == "__main__":
    what, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if what == "one" and len(rest) >= 2:
        one(rest[0], int(rest[1]), *rest[2:3], extra=tuple(rest[4:]), split=(rest[3:4] or ["test"])[0])
    elif what == "run" and len(rest) <= 2:
        run(rest[0].split(",") if rest else list(dict.fromkeys((*TABLE5, *TABLE4, *ORACLES))), [int(s) for s in rest[1].split(",")] if len(rest) == 2 else SEEDS)
    elif what in ("ablations", "tried", "sizes", "seconds", "models", "pictures", "write") and not rest:
        {"ablations": ablations, "tried": lambda: single("tried", TRIED), "sizes": lambda: single("sizes", SIZES), "seconds": seconds, "models": models, "pictures": draw_pictures, "write": write}[what]()
    else:
        sys.exit(__doc__)
