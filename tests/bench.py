"""
bench: how fast the scripts are; ratios to the plain way, both in turn in one process, as machines
differ.

    python tests/bench.py                   on a CPU, one thread, about 15 minutes
    python tests/bench.py refine decoder    some parts of it
    python tests/bench.py gpu | tiny        full-size models on a GPU: see bench_gpu.py
    python tests/bench.py memory            GB of a card that they take: see bench_memory.py

refine    04's refine against the official one, written plainly with SamPredictor
decoder   our decoder against the head of transformers' Mask2Former: time, size, memory
scores    the confusion matrix against cityscapesScripts, if that is installed
step      where the time of one step of 04 goes
growth    02 and 04 with 100 and with 1,000 pictures
"""
import cProfile
import io
import os
import platform
import pstats
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

WORK = tempfile.TemporaryDirectory()
ROOT = Path(__file__).resolve().parents[1]
MODE = sys.argv[1] if sys.argv[1:] and sys.argv[1] in ("gpu", "tiny", "memory") else "cpu"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/toy")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "RUN": WORK.name,
                   "PRESET": "toy" if MODE == "cpu" else "gta"}
    if MODE != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
import world
from PIL import Image
from scipy import ndimage
from torch import nn

import common

generate, source = import_module("02_generate"), import_module("03_train_source")
selftrain, evaluation = import_module("04_selftrain"), import_module("05_eval")
DEVICE = common.device()


def configure(stage, **constants):
    """Set constants of a stage as the shell does, without the lines that say so."""
    with redirect_stdout(io.StringIO()):
        common.override(vars(stage), [f"--{name}={value}" for name, value in constants.items()])


def run_main(stage, **constants):
    """main() of a stage in this process, with these constants and without its lines."""
    configure(stage, **constants)
    with redirect_stdout(io.StringIO()):
        stage.main()


def scenes(shape, n):
    """n street scenes of `shape`: image, label. Noise makes their PNGs as heavy as GTA5's."""
    noise = np.random.default_rng(0).integers(0, 8, (*shape, 3), dtype=np.uint8)
    for seed in world.seeds("validation", "day", n):
        image, label = [Image.fromarray(array) for array in world.draw(seed, "day")[:2]]
        label = np.array(label.resize(shape[::-1], Image.NEAREST))
        yield np.asarray(image.resize(shape[::-1])) // 8 * 8 + noise, label


def data_set(name, shape, n):
    """Write n scenes -> their name as a data set."""
    for kind in ("images", "labels"):
        Path(WORK.name, name, kind).mkdir(parents=True)
    for i, (image, label) in enumerate(scenes(shape, n)):
        Image.fromarray(image).save(f"{WORK.name}/{name}/images/{i}.png")
        Image.fromarray(label).save(f"{WORK.name}/{name}/labels/{i}.png")
    return f"folder:{WORK.name}/{name}"


def in_turn(ways, times):
    """Functions, called in turn -> median seconds of each. A busy moment hits all of them."""
    seconds = np.zeros((times + 1, len(ways)))
    for when in np.ndindex(seconds.shape):
        since = time.perf_counter()
        ways[when[1]]()
        seconds[when] = time.perf_counter() - since
    return np.median(seconds[1:], 0).tolist()                   # the first round warms up


def line(*cells):
    """Print a row of a table in Markdown: texts, and numbers with four digits."""
    texts = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def head(*cells):
    print()
    line(*cells)
    line("---", *["---:"] * (len(cells) - 1))


def ratio(what, plain, ours):
    line(what, plain, ours, plain / ours)


# ---------------------------------------------------------------------------- ratios
def plain_refine(predictor, label, random):
    """The official refinement: class by class, all three masks of a prompt at full size."""
    prompts, owners, by_class = [], [], {}
    for cls in np.unique(label):
        pieces, n = ndimage.label(label == cls)
        for k in range(1, n + 1):
            inside = np.argwhere(pieces == k)
            if len(inside) >= selftrain.SAM_MIN_AREA:
                drawn = inside[random.integers(len(inside), size=selftrain.SAM_POINTS)]
                prompts.append(drawn[:, ::-1].astype(np.float32))
                owners.append(cls)
    points = torch.from_numpy(np.stack(prompts))
    points = predictor.transform.apply_coords_torch(points, label.shape)
    masks, ratings, _ = predictor.predict_torch(points, torch.ones(points.shape[:2]))
    best = torch.stack([three[rating.argmax()] for three, rating in zip(masks, ratings)])
    for cls, mask in zip(owners, best & (best.sum(0) <= 1)):
        by_class[cls] = by_class.get(cls, False) | mask
    return by_class


def refine():
    head("refine", "the official way", "ours", "ratio")
    from segment_anything import SamPredictor, sam_model_registry
    small, large = selftrain.load_sam(selftrain.SAM), sam_model_registry["vit_h"]().eval()
    for name, sam, shape, area, times in (("miniature SAM", small, (128, 256), 100, 9),
                                          ("SAM ViT-H", large, (768, 768), 5_000, 2)):
        selftrain.SAM_MIN_AREA = area
        image, label = next(scenes(shape, 1))
        predictor, random = SamPredictor(sam), np.random.default_rng(0)
        encoding, = in_turn([partial(predictor.set_image, image)], 1)
        given = predictor.features[0], torch.from_numpy(label).long(), random
        plain, ours = in_turn([partial(plain_refine, predictor, label, random),
                               partial(selftrain.refine, sam, *given)], times)
        ratio(f"{name}, {shape}: seconds, embedding given", plain, ours)
        # in the gta preset a picture is used 40,000 x 2 / 5,000 times
        ratio("with the encoder, per use of 16", plain + encoding, ours + encoding / 16)


class Mask2FormerHead(nn.Module):
    """The head of transformers' Mask2Former, made and called as our Decoder is."""

    def __init__(self, channels, classes, dim, queries, layers, width, pixel_layers=6, heads=8):
        super().__init__()
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former import modeling_mask2former as library
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries,
                          layers=layers, width=width, pixel_layers=pixel_layers, heads=heads)
        config = Mask2FormerConfig(
            feature_size=dim, mask_feature_size=dim, hidden_dim=dim, encoder_layers=pixel_layers,
            encoder_feedforward_dim=4 * dim, dim_feedforward=width, num_queries=queries,
            decoder_layers=layers + 1, num_attention_heads=heads, num_labels=classes)
        self.pixels = library.Mask2FormerPixelDecoder(config, list(channels))
        self.transformer = library.Mask2FormerTransformerModule(dim, config)
        self.class_head = nn.Linear(dim, classes + 1)
        self.apply(library.Mask2FormerPreTrainedModel(config)._init_weights)

    def forward(self, features):
        pixels = self.pixels([map_.contiguous() for map_ in features], output_hidden_states=False)
        out = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        states = torch.stack(out.intermediate_hidden_states).transpose(1, 2)
        return self.class_head(states), torch.stack(out.masks_queries_logits)


def forward_and_back(decoder, features):
    classes, masks = decoder(features)
    (classes.float().mean() + masks.float().mean()).backward()
    decoder.zero_grad()


def random_maps(channels, batch, shape):
    sides = [(shape[0] // stride, shape[1] // stride) for stride in (4, 8, 16, 32)]
    return [torch.randn(batch, c, *side, device=DEVICE) for c, side in zip(channels, sides)]


# encoder's channels, images, their shape, classes; then width, queries, layers, width of
# feed-forwards and pixel layers, of Mask2Former and of ours
CASES = {"paper": ((192, 384, 768, 1536), 1, (768, 768), 19,
                   (256, 100, 9, 2048, 6), (256, 100, 6, 512, 3)),
         "toy": ((96, 192, 384, 768), 16, (128, 256), 12,
                 (64, 24, 9, 512, 6), (64, 24, 3, 128, 3))}


def decoder_pass(name, which):
    """-> million parameters, and a pass forward and back as a function."""
    *maps, classes, theirs, ours = CASES[name]
    make, sizes = ((Mask2FormerHead, theirs), (source.Decoder, ours))[which]
    decoder = make(maps[0], classes, *sizes)
    million = sum(p.numel() for p in decoder.parameters()) / 1e6
    return million, partial(forward_and_back, decoder, random_maps(*maps))


def gigabytes(status=None):
    """Peak memory of this process alone, or of that with this text in /proc: getrusage would count
    who started it, too."""
    status = status or Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2 ** 20


def peak(name, which):
    """Print the peak memory of a pass, in a process of its own, without that of the libraries."""
    before = gigabytes()
    decoder_pass(name, int(which))[1]()
    print(gigabytes() - before)


def decoder():
    head("decoder", "Mask2Former's head", "ours", "ratio")
    for name in CASES:
        sizes, ways = zip(*[decoder_pass(name, which) for which in (0, 1)])
        ratio(f"{name}: seconds, forward and back", *in_turn(ways, 3))
        ratio(f"{name}: million parameters", *sizes)
        command = [sys.executable, __file__, "peak", name]
        peaks = [subprocess.check_output([*command, which], text=True) for which in "01"]
        ratio(f"{name}: GB", *[float(text.split()[-1]) for text in peaks])


def scores():
    head("scores", "cityscapesScripts", "ours", "ratio")
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as scripts
    except ImportError:
        return line("not installed", "", "", "")
    random = np.random.default_rng(0)
    ids = np.array([row[1][0] for row in common.TABLE.values()], np.uint8)      # Cityscapes' own
    truth = random.integers(len(ids), size=(64, 128), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    guess = np.where(random.random(truth.shape) < .8, truth, np.uint8(0))
    files = [f"{WORK.name}/guess.png", f"{WORK.name}/truth.png"]
    Image.fromarray(ids[truth]).save(files[1])
    scripts.args.evalInstLevelScore = scripts.args.evalPixelAccuracy = False
    scripts.args.JSONOutput, scripts.args.quiet = False, True

    def plain():
        Image.fromarray(ids[guess]).save(files[0])              # it takes files of label ids
        scripts.evaluateImgLists(files[:1], files[1:], scripts.args)

    def ours():
        label = common.read_label(files[1], "cityscapes", truth.shape[::-1])
        evaluation.iou(evaluation.confusion(label, guess, len(ids)))
    ratio("a picture of 1024 x 2048: seconds", *in_turn([plain, ours], 7))


# ---------------------------------------------------------------------------- no ratios
TITLES = {("03_train_source.py", "__getitem__"): "labelled pictures, read and augmented",
          ("04_selftrain.py", "__getitem__"): "painted pictures, read and jittered",
          ("03_train_source.py", "predict"): "teacher's labels",
          ("04_selftrain.py", "refine"): "SAM's refinement",
          ("03_train_source.py", "mask_loss"): "matching and loss",
          ("_tensor.py", "backward"): "backward", ("adam.py", "step"): "optimiser"}


def step(steps=10):
    """Where the time of a step of 04 in the toy preset goes, by Python's profiler."""
    data, profile = data_set("source", (128, 256), 8), cProfile.Profile()
    run_main(source, SOURCE=data, ITERATIONS=1, BATCH=2)
    selftrain.preview = lambda *_: None
    profile.runcall(run_main, selftrain, SOURCE=data, GENERATED=f"{data}/images", ITERATIONS=steps,
                    LOG_EVERY=steps)
    log, = common.read_lines(f"{WORK.name}/04_selftrain/log.jsonl", "seconds")
    rest = log["seconds"]
    head("part of a step of 04", "ms", "percent")
    for (file, _, function), facts in pstats.Stats(profile).stats.items():
        if title := TITLES.get((Path(file).name, function)):
            seconds = facts[3] / steps          # with all that it calls
            rest -= seconds
            line(title, 1000 * seconds, 100 * seconds / log["seconds"])
    line("the student's networks, and the rest", 1000 * rest, 100 * rest / log["seconds"])


def growth():
    """02 where all is painted before, and 04, with n pictures, each in a process of its own."""
    head("pictures", "02: seconds", "GB", "04: seconds", "GB", "per step", "MB of embedding")
    for n in (100, 1_000):
        run = Path(WORK.name, f"{n}")
        data = data_set(f"{n}/source", (128, 256), n)
        (run / "02_generate").mkdir()
        (run / "prompts.txt").write_text("a photo of a street\n")
        for i in range(n):
            os.link(run / f"source/images/{i}.png", run / f"02_generate/{i:05d}_p0000.png")

        def facts(stage, *arguments):
            code = (f"import runpy; runpy.run_path('{ROOT / stage}.py', run_name='__main__'); "
                    "print(open('/proc/self/status').read())")
            command = [sys.executable, "-c", code, *arguments]
            output = subprocess.check_output(command, text=True, cwd=ROOT,
                                             env=os.environ | {"RUN": str(run)})
            info, = common.read_lines(run / stage / "run.json", "wall_seconds")
            return info["wall_seconds"], gigabytes(output)
        painting = facts("02_generate", f"--N_IMAGES={n}", f"--PROMPTS={run}/prompts.txt")
        facts("03_train_source", f"--SOURCE={data}", "--ITERATIONS=1", "--BATCH=1")
        training = facts("04_selftrain", f"--SOURCE={data}", "--ITERATIONS=20", "--LOG_EVERY=20")
        log, = common.read_lines(run / "04_selftrain/log.jsonl", "seconds")
        embedding = next(run.glob("sam_embeddings/*/*.npy"))
        line(f"{n:,}", *painting, *training, log["seconds"], embedding.stat().st_size / 1e6)


PARTS = {part.__name__: part for part in (refine, decoder, scores, step, growth)}


def main(wanted):
    for name in wanted:
        if name not in PARTS:
            sys.exit(f"bench.py: no part {name}; there are {', '.join(PARTS)}")
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}")
    for name in wanted or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    sys.modules["bench"] = sys.modules["__main__"]      # bench_gpu imports it
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
    elif MODE == "cpu":
        main(sys.argv[1:])
    elif MODE == "memory":
        import_module("bench_memory").main()
    else:
        import_module("bench_gpu").main(sys.argv[2:])
