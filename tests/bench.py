"""
bench: what is fast here, measured side by side in one process against the plain way of doing it. Ratios, because machines differ.

    python tests/bench.py                   the table (about 15 minutes on one idle core; numbers of one thread)
    python tests/bench.py refine decoder    some of its parts

refine    04's refinement against the official path written down plainly: class by class, one image at a time, three masks up-sampled, regrouped in Python
decoder   common.Decoder against the head of Mask2Former from transformers: forward and backward on the same feature maps, parameters, peak memory
step      where the time of one step of 04 goes
scores    the confusion matrix against cityscapesScripts' evaluation, if it is installed
growth    02 and 04 with 100, 1,000 and 5,000 pictures: seconds, memory, disk"""
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/toy")]
import numpy as np
import torch
from scipy import ndimage
from torch import nn

import common
import world


def side_by_side(ways, times):
    """{name: function} each called in turn, `times` times -> {name: median seconds}. A busy moment hits them all."""
    seconds = {name: [] for name in ways}
    for _ in range(times + 1):
        for name, way in ways.items():
            since = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - since)
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}              # the first round warms up


# ----------------------------------------------------------------------------- refinement
def official_refine(stage, sam, embedding, label, points_of, encode=None):
    """The official path on one image: METHOD's steps 3 to 8 as they stand in its code, with points given. -> masks (K, H, W) by class"""
    from segment_anything import SamPredictor
    predictor, shape = SamPredictor(sam), label.shape
    size = sam.image_encoder.img_size
    predictor.original_size, predictor.is_image_set = shape, True
    predictor.input_size = tuple(int(s * size / max(shape) + .5) for s in shape)
    predictor.features = encode() if encode else embedding
    prompts, owner = [], []
    for cls in np.unique(label):                                        # class by class
        pieces, n = ndimage.label(label == cls)
        for k in range(1, n + 1):
            piece = pieces == k
            if piece.sum() >= stage.SAM_MIN_AREA:
                prompts.append(points_of(piece))
                owner.append(cls)
    points = predictor.transform.apply_coords_torch(torch.tensor(np.stack(prompts)), shape)
    masks, rated, _ = predictor.predict_torch(points, torch.ones(points.shape[:2]), multimask_output=True)       # three masks each, all up-sampled
    best = torch.stack([m[r.argmax()] for m, r in zip(masks, rated)])
    best = best & (best.sum(0) <= 1)
    out = {}
    for mask, cls in zip(best, owner):
        out[cls] = out.get(cls, torch.zeros_like(mask)) | mask
    return torch.stack([out[c] for c in sorted(out)])


def padded(sam, embedding):
    """The miniature's embedding with the rows of the padding, which SamPredictor expects."""
    side = sam.prompt_encoder.image_embedding_size[0]
    return torch.nn.functional.pad(embedding, (0, side - embedding.shape[-1], 0, side - embedding.shape[-2]))


def bench_refine():
    stage = importlib.import_module("04_selftrain")
    scenes = [world.draw(world.seeds("validation", style)[0], style) for style in ("day", "night", "snow", "fog")]
    rows = []
    for name, sam, images, labels, area in (
            ("miniature SAM, 128 x 256", stage.load_sam("tests/toy/weights/sam"), [s[0] for s in scenes], [s[1] for s in scenes], 100),
            ("SAM ViT-H, 768 x 768", _vit_h(), [s[0][:, :128].repeat(6, 0).repeat(6, 1) for s in scenes[:1]], [s[1][:, :128].repeat(6, 0).repeat(6, 1) for s in scenes[:1]], 5_000)):
        stage.SAM_MIN_AREA = area
        pixels, labels, random = [torch.from_numpy(i.copy()).permute(2, 0, 1) for i in images], np.stack(labels), np.random.default_rng(0)
        since = time.perf_counter()
        embeddings = torch.cat([stage.sam_encode(sam, p) for p in pixels])
        encoding = (time.perf_counter() - since) / len(pixels)

        def points_of(piece):
            at = np.argwhere(piece)
            return at[random.integers(len(at), size=5)][:, ::-1].astype(np.float32)
        with torch.no_grad():
            seconds = side_by_side({
                "ours": lambda: stage.refine(sam, embeddings, labels, [np.random.default_rng(i) for i in range(len(labels))]),
                "official": lambda: [official_refine(stage, sam, padded(sam, e[None]), l, points_of) for e, l in zip(embeddings, labels)]}, 5 if area == 100 else 2)
        ours, theirs = seconds["ours"] / len(labels), seconds["official"] / len(labels)
        uses = 91_700 / 5_000                                           # how often an image comes up in 40,000 steps of the GTA preset
        rows.append((f"refinement, {name}: given the embedding", theirs, ours))
        rows.append((f"refinement, {name}: with the encoder, over {uses:.1f} uses of an image", theirs + encoding, ours + encoding / uses))
    return rows


def _vit_h():
    from segment_anything import sam_model_registry
    torch.manual_seed(0)
    return sam_model_registry["vit_h"]().eval().requires_grad_(False)


# ----------------------------------------------------------------------------- decoder
class Mask2FormerHead(nn.Module):
    """The head of transformers' Mask2Former (deformable pixel decoder, masked attention) behind the interface of common.Decoder."""

    def __init__(self, channels, classes, dim, queries, layers, hidden, pixel_layers=6, heads=8):
        super().__init__()
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former import modeling_mask2former as library
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries, layers=layers, hidden=hidden, pixel_layers=pixel_layers, heads=heads)
        config = Mask2FormerConfig(feature_size=dim, mask_feature_size=dim, hidden_dim=dim, encoder_layers=pixel_layers, encoder_feedforward_dim=4 * dim, dim_feedforward=hidden, num_queries=queries,
                                   decoder_layers=layers + 1, num_attention_heads=heads, num_labels=classes)
        self.pixels, self.transformer = library.Mask2FormerPixelDecoder(config, list(channels)), library.Mask2FormerTransformerModule(dim, config)
        self.class_head = nn.Linear(dim, classes + 1)
        library_model = library.Mask2FormerPreTrainedModel(config)      # only for its initialisation
        self.apply(library_model._init_weights)

    def forward(self, features):
        pixels = self.pixels([f.contiguous() for f in features], output_hidden_states=False)
        out = self.transformer(multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features)
        return torch.stack([self.class_head(h.transpose(0, 1)) for h in out.intermediate_hidden_states]), torch.stack(list(out.masks_queries_logits))


DECODERS = {"768 x 768, ConvNeXt-L": ((192, 384, 768, 1536), (768, 768), 19, 1, dict(ours=(256, 100, 6, 512, 3), official=(256, 100, 9, 2048, 6))),
            "the same with LAYERS = 3": ((192, 384, 768, 1536), (768, 768), 19, 1, dict(ours=(256, 100, 3, 512, 3), official=(256, 100, 9, 2048, 6))),
            "toy, 16 images": ((96, 192, 384, 768), (128, 256), 12, 16, dict(ours=(64, 24, 3, 128, 3), official=(64, 24, 9, 512, 6)))}


def decoder_way(which, name):
    """-> forward and backward of a decoder, once, and its number of parameters."""
    channels, (height, width), classes, batch, sizes = DECODERS[name]
    torch.manual_seed(0)
    decoder = {"ours": common.Decoder, "official": Mask2FormerHead}[which](channels, classes, *sizes[which])
    features = [torch.randn(batch, c, height // s, width // s) for c, s in zip(channels, (4, 8, 16, 32))]

    def way():
        a, b = decoder(features)
        (a.float().mean() + b.float().mean()).backward()
        decoder.zero_grad(set_to_none=True)
    return way, sum(p.numel() for p in decoder.parameters())


def bench_decoder():
    rows = []
    for name in DECODERS:
        (ours, n_ours), (theirs, n_theirs) = decoder_way("ours", name), decoder_way("official", name)
        seconds = side_by_side({"ours": ours, "official": theirs}, 3)
        rows.append((f"decoder, forward and backward, {name}", seconds["official"], seconds["ours"]))
        rows.append((f"decoder, million parameters, {name}", n_theirs / 1e6, n_ours / 1e6))
        peaks = {which: float(subprocess.run([sys.executable, __file__, "_peak", which, name], capture_output=True, text=True, check=True).stdout) for which in ("official", "ours")}
        rows.append((f"decoder, GB above the libraries, {name}", peaks["official"], peaks["ours"]))
    return rows


def peak(which, name):
    """Peak memory of one pass in a process of its own, without what the libraries take."""
    way, _ = decoder_way(which, name)
    before = common.peak_memory()
    way()
    print(common.peak_memory() - before)


# ----------------------------------------------------------------------------- the rest
def bench_step():
    """Shares of one step of 04 with the toy preset's constants -> rows (what, seconds)."""
    stage, source_stage = importlib.import_module("04_selftrain"), importlib.import_module("03_train_source")
    encoder = common.Encoder(source_stage.ENCODER)
    torch.manual_seed(0)
    student = common.Decoder(encoder.channels, len(common.CLASSES), source_stage.DIM, source_stage.QUERIES, source_stage.LAYERS, source_stage.HIDDEN, source_stage.PIXEL_LAYERS)
    optimizer, sam = common.make_optimizer(student, .05), stage.load_sam(stage.SAM)
    scenes = [world.draw(s, "day") for s in world.seeds("validation", "day", 12)]
    source = [(world.Image.fromarray(s[0]), s[1]) for s in scenes[:8]]
    clean = torch.from_numpy(np.stack([s[0] for s in scenes[8:]])).permute(0, 3, 1, 2)
    embeddings = torch.cat([stage.sam_encode(sam, c) for c in clean])
    crops = [common.scale_and_crop(i, l, np.random.default_rng(k), stage.CROP, stage.SCALE, encoder.fill) for k, (i, l) in enumerate(source)]
    images, labels = torch.cat((torch.stack([c[0] for c in crops]), clean)), torch.cat((torch.stack([c[1] for c in crops]), torch.from_numpy(np.stack([s[1] for s in scenes[8:]])).long()))
    rough = np.stack([s[1] for s in scenes[8:]])
    state = {}

    def student_forward():
        state["predictions"] = student(state["features"])

    def backward():
        optimizer.zero_grad(set_to_none=True)
        state["loss"].backward()
    return [(what, seconds) for what, seconds in side_by_side({
        "augmentation of 8 source images": lambda: [common.scale_and_crop(i, l, np.random.default_rng(k), stage.CROP, stage.SCALE, encoder.fill) for k, (i, l) in enumerate(source)],
        "teacher's labels of 4 painted images": lambda: common.predict(encoder, student, clean).argmax(1),
        "SAM's refinement of them": lambda: stage.refine(sam, embeddings, rough, [np.random.default_rng(i) for i in range(4)]),
        "frozen encoder, 12 images": lambda: state.update(features=encoder(images)),
        "decoder, forward": student_forward,
        "matching and loss": lambda: state.update(loss=common.mask_loss(*state["predictions"], labels, stage.POINTS, common.seeded(0))[0]),
        "backward": backward,
        "optimiser": optimizer.step}, 5).items()]


def bench_scores():
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as scripts
    except ImportError:
        return []
    stage, random = importlib.import_module("05_eval"), np.random.default_rng(0)
    truth = random.integers(7, 34, (64, 128)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    guess = np.where(random.random((128, 256)).repeat(8, 0).repeat(8, 1) < .8, truth, 26).astype(np.uint8)
    table = np.full(256, common.IGNORE, np.uint8)
    table[list(common.CITYSCAPES_IDS)] = list(common.CITYSCAPES_IDS.values())
    guess = np.where(table[guess] == common.IGNORE, 7, guess).astype(np.uint8)
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    files = [str(folder / f"bench_{os.getpid()}_{kind}.png") for kind in ("guess", "truth")]
    world.Image.fromarray(truth).save(files[1])
    args, prediction = scripts.args, table[guess]
    args.evalInstLevelScore = args.evalPixelAccuracy = args.JSONOutput = False
    args.quiet = True

    def official():
        world.Image.fromarray(guess).save(files[0])                     # it takes files of label ids
        return scripts.evaluateImgLists(files[:1], files[1:], args)

    def ours():
        return stage.iou(stage.confusion(common.read_label(files[1], "cityscapes", truth.shape[::-1]), prediction, 19))
    seconds = side_by_side({"ours": ours, "official": official}, 7)
    for file in files:
        os.remove(file)
    return [("scoring a 2048 x 1024 prediction against its label file, cityscapesScripts", seconds["official"], seconds["ours"])]


def bench_growth(counts=(100, 1_000, 5_000), steps=20):
    """02 over a folder where everything is painted, and 04 with as many labelled and painted images -> rows (n, 02: seconds, GB; 04: seconds before the first step, a step, GB, MB of cache an image)"""
    rows, image, label = [], *world.draw(world.seeds("validation", "day")[0], "day")[:2]
    paint = importlib.import_module("02_generate")
    with tempfile.TemporaryDirectory() as work:
        def run(stage, *arguments):
            subprocess.run([sys.executable, ROOT / f"{stage}.py", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "RUN": str(folder)})
            return json.loads((folder / stage / "run.json").read_text())
        for n in counts:
            folder = Path(work) / str(n)
            for part in ("01_prompts", "02_generate", "source/images", "source/labels"):
                (folder / part).mkdir(parents=True)
            (folder / "01_prompts/prompts.txt").write_text("a photo of a street\n")
            for i in range(n):
                note = paint.PngImagePlugin.PngInfo()
                note.add_text("prompt", "a photo of a street"), note.add_text("seed", str(i))
                world.Image.fromarray(image).save(folder / f"02_generate/{i:05d}_p0000.png", pnginfo=note)
                (folder / f"source/images/{i}.png").symlink_to(folder / f"02_generate/{i:05d}_p0000.png")
                world.Image.fromarray(label).save(folder / f"source/labels/{i}.png")
            listing, source = run("02_generate", f"--N_IMAGES={n}"), f"--SOURCE=folder:{folder}/source"
            run("03_train_source", source, "--ITERATIONS=1", "--BATCH=1")
            training = run("04_selftrain", source, f"--ITERATIONS={steps}", f"--LOG_EVERY={steps}", "--PREVIEW_EVERY=1000")
            pace = json.loads((folder / "04_selftrain/log.jsonl").read_text())["seconds"]
            cached = next((folder / "02_generate").glob("sam_*/*.npy"))
            rows.append((n, listing["wall_seconds"], listing["peak_memory_gb"], training["wall_seconds"] - steps * pace, pace, training["peak_memory_gb"], cached.stat().st_size / 1e6))
    return rows


def main(parts):
    common.steady_cpu()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), " + ", ".join(f"{k} {v}" for k, v in common.versions().items()) + "\n")
    ratios = [row for part, bench in (("refine", bench_refine), ("decoder", bench_decoder), ("scores", bench_scores)) if part in parts for row in bench()]
    if ratios:
        print("| | the plain way | here | ratio |\n|---|---:|---:|---:|")
        for what, theirs, ours in ratios:
            print(f"| {what} | {theirs:.3g} | {ours:.3g} | {theirs / max(ours, 1e-9):.1f} |", flush=True)
    if "step" in parts:
        rows = bench_step()
        total = sum(seconds for _, seconds in rows)
        print("\n| a step of 04 (toy) | ms | share |\n|---|---:|---:|")
        for what, seconds in rows:
            print(f"| {what} | {1000 * seconds:.0f} | {100 * seconds / total:.0f} % |")
    if "growth" in parts:
        print("\n| pictures | 02, all of them there: seconds | GB | 04: seconds before and after the steps | a step | GB | SAM's cache, MB a picture |\n|---:|---:|---:|---:|---:|---:|---:|")
        for row in bench_growth():
            print("| " + " | ".join(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["_peak"]:
        peak(*sys.argv[2:])
    else:
        main(sys.argv[1:] or ("refine", "decoder", "scores", "step", "growth"))
