"""
bench_gpu: the gta preset with full-size models and random weights, beside what the card can do.

    python tests/bench.py gpu               one CUDA GPU, at most 8 minutes, no network
    python tests/bench.py gpu card steps    some parts, see PARTS; floors need `card`
    python tests/bench.py tiny              the same functions at tiny sizes on a CPU: a test

s           seconds per step or picture: the median of some, after a first one
floor       FLOPs, counted by torch, over the card's own rate in large matrix products
GB          the most that was held at once on the GPU (tiny: by the process)
precision   float32: without TensorFloat-32. bfloat16: HALF. channels_last: the order of the weights
            of encoder or UNet, as 02 (float16) and 03 to 05 have it

A step is one of the real main() of 03 or 04, with one batch of real crops again and again; reading
is a part of its own. Drawn labels take the place of the teacher's: those of a random network
have no components for SAM. "syncs" counts how often the CPU waits for the GPU per step. 02 paints
with its own load_pipeline() and StableDiffusionPipeline; its text encoder is random, too.
A row or a part that fails is named with its error, and the rest goes on.
"""
import gc
import io
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import torch
from bench import (DEVICE, MODE, WORK, Mask2FormerHead, configure, data_set, evaluation,
                   forward_and_back, generate, gigabytes, head, line, random_maps, run_main,
                   scenes, selftrain, source)
from matplotlib.figure import Figure
from PIL import Image
from segment_anything import sam_model_registry
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import common
from tests.toy.sam import build_sam


def size(full, tiny):
    return tiny if MODE == "tiny" else full


# ---------------------------------------------------------------------------- sizes
MINUTES = size(8, 60)                                       # what is not begun by then is left out
REPEATS = size(3, 1)
MATMUL = size(8192, 64)
STEPS = size(14, 2)                                         # of 03 and 04; the second half is timed
PICTURE = size((1052, 1914), (96, 160))                     # GTA5's
SCORED = size(((1024, 2048), (3024, 4032)), ((64, 128), (96, 128)))     # Cityscapes'; 12 megapixels
WORKERS = size((1, 2, 4, 8, 16), (1, 2))
GROUPS = size((4, 8, 16), (1, 2))                           # pictures at once in 02
FEW = size((2, 12), (1, 4))                                 # steps of 02, from which 50 follow
MASK2FORMER = size((256, 100, 9, 2048, 6), (32, 19, 1, 32, 1))
TOWERS = size({}, {"convnext_large_d_320": dict(timm_model_name="test_convnext", image_size=64),
                   "RN50-quickgelu": dict(layers=(1, 1, 1, 1), width=8)})
SAM = size(sam_model_registry["vit_h"], partial(build_sam, dict(
    image_size=64, stride=8, width=16, mlp_dim=16, heads=1, encoder=(8,) * 4, blocks=(0,) * 4)))
# Stable Diffusion 2: UNet of 866 M parameters, autoencoder of 84 M
UNET = size(dict(sample_size=96, block_out_channels=(320, 640, 1280, 1280),
                 cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                 use_linear_projection=True),
            dict(sample_size=8, block_out_channels=(32, 32), cross_attention_dim=32,
                 attention_head_dim=4, layers_per_block=1,
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
AUTOENCODER = size((128, 256, 512, 512), (32, 32))
TEXT = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                size((1024, 4096, 23, 16), (32, 32, 1, 2))))
# constants of the stages; full: those of PRESET=gta
CONSTANTS = size({}, {
    generate: dict(SIZE="16,16"), evaluation: dict(SHORT_SIDE=64),
    source: dict(CROP="64,64", DIM=32, QUERIES=19, LAYERS=1, HIDDEN=32, POINTS=16, PIXEL_LAYERS=1,
                 BATCH=2),
    selftrain: dict(SAM_MIN_AREA=200, N_SOURCE=1, N_GENERATED=1)})

CUDA = DEVICE.type == "cuda"
PRECISIONS = ("float32", "TF32", "bfloat16", "bfloat16 channels_last")
STARTED, RATE, SECONDS, FAILED = time.perf_counter(), {}, {}, []


# ---------------------------------------------------------------------------- measuring
@contextmanager
def guarded(what, precision="-"):
    """An error ends this row or part only, and is a row of the table. Frees memory before."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except (Exception, SystemExit) as problem:
        error = " ".join(f"{type(problem).__name__}: {problem}".replace("|", "/").split())
        line(what, precision, f"failed: {error[:300]}", *6 * [""])
        FAILED.append(what)


def check_time():
    if time.perf_counter() - STARTED > 60 * MINUTES:
        raise TimeoutError(f"left out, for {MINUTES} minutes are over")


def measure(way, times=REPEATS):
    """-> median seconds of a call, and the FLOPs of a first one."""
    check_time()
    with FlopCounterMode(display=False) as counter:
        way()
    seconds = []
    for _ in range(times):
        synchronise()
        since = time.perf_counter()
        way()
        synchronise()
        seconds.append(time.perf_counter() - since)
    return np.median(seconds), counter.get_total_flops()


def synchronise():
    if CUDA:
        torch.cuda.synchronize()


def row(what, precision, seconds, flops, n=1, note=""):
    """Print a row; seconds and FLOPs are those of n steps or pictures together."""
    seconds = SECONDS[what, precision] = seconds / n
    floor = flops / n / RATE.get(precision.split()[0], np.nan)
    line(what, precision, seconds, 1 / seconds, flops / n / 1e12, floor, seconds / floor,
         torch.cuda.max_memory_allocated() / 2 ** 30 if MODE == "gpu" else gigabytes(), note)


def set_precision(precision, *networks):
    """Allow TensorFloat-32 or not; set the order of weights -> whether bfloat16"""
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    last = precision.endswith("channels_last")
    order = torch.channels_last if last else torch.contiguous_format
    for network in networks:
        network.to(memory_format=order)
    return precision.startswith("bfloat16")


def row_per_precision(what, network, way, n):
    """Rows of `way`, a pass of a network over n pictures, in every precision."""
    for precision in PRECISIONS:
        with guarded(what, precision):
            half = set_precision(precision, network)
            evaluation.HALF = half              # 05 sets autocast itself

            def cast():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                    way()
            row(what, precision, *measure(cast), n)


# ---------------------------------------------------------------------------- stand-ins
def random_tower(name, **_):
    """For open_clip.create_model: the visual tower with random weights."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | TOWERS.get(name, {})
    with DEVICE:
        clip = open_clip.CLIP(config["embed_dim"], vision, {"width": 32, "heads": 2, "layers": 1})
    tower = clip.visual
    tower.image_mean, tower.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return SimpleNamespace(visual=tower)


def one_batch(dataset, size, first, last, workers, offset=0):
    """For batches() of 03 and 04: the same batch again and again, so that reading takes no time."""
    batch = default_collate([dataset[i] for i in range(size)])
    if CUDA:
        batch = [part.pin_memory() for part in batch]
    return [batch] * (last - first)


@lru_cache
def drawn_label(shape):
    return torch.from_numpy(next(scenes(shape, 1))[1])[None, None].long().to(DEVICE)


def predict_drawn(encoder, decoder, images, half=False, predict=source.predict):
    """For predict() of 04: the same work, and then a drawn scene's classes win."""
    scores = predict(encoder, decoder, images, half)
    label = drawn_label(images.shape[-2:]).expand(len(scores), -1, -1, -1)
    return scores.scatter_(1, label, 1000.)


def no_picture(*_):
    """For preview of 03 and 04."""


def make_encoder(name=source.ENCODER):
    open_clip.create_model = random_tower
    return source.Encoder(name).to(DEVICE)


def make_decoder(channels):
    sizes = source.DIM, source.QUERIES, source.LAYERS, source.HIDDEN, source.PIXEL_LAYERS
    return source.Decoder(channels, len(common.CLASSES), *sizes).to(DEVICE)


def make_sam():
    with DEVICE:
        return SAM().to(DEVICE).eval().requires_grad_(False)


def make_pipeline():
    """Stable Diffusion 2 with random weights and the miniature's tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    depth = len(AUTOENCODER)
    with DEVICE:
        networks = dict(
            unet=diffusers.UNet2DConditionModel(**UNET),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            vae=diffusers.AutoencoderKL(
                block_out_channels=AUTOENCODER, layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * depth,
                up_block_types=("UpDecoderBlock2D",) * depth))
    tokenizer = CLIPTokenizer.from_pretrained(f"{common.MINIATURES}/diffusion/tokenizer",
                                              model_max_length=77)
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(
        **networks, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


# ---------------------------------------------------------------------------- parts
def card():
    """The rates from which floors are computed."""
    for precision in ("float32", "TF32", "bfloat16", "float16"):
        with guarded("matrix product", precision):
            set_precision(precision)
            dtype = getattr(torch, precision.replace("TF32", "float32"))
            a, b = torch.randn(2, MATMUL, MATMUL, device=DEVICE).to(dtype)
            seconds, flops = measure(partial(torch.mm, a, b), 3 * REPEATS)
            RATE[precision] = flops / seconds
            row("matrix product", precision, seconds, flops,
                note=f"{RATE[precision] / 1e12:.3g} TFLOP/s")


@mock.patch.multiple(source, batches=one_batch, preview=no_picture)
@mock.patch.multiple(selftrain, predict=predict_drawn, preview=no_picture)
@mock.patch.object(Figure, "savefig", lambda figure, file, **_: Path(file).touch())
def steps():
    """03 and 04, with the frozen encoder and with the trainable one of Table 5."""
    data, painted = data_set("source", PICTURE, 8), data_set("painted", source.CROP, 4)
    runs = [("", precision) for precision in PRECISIONS[:3]]
    runs += [(", trainable encoder", "TF32"), (", trainable encoder", "bfloat16")]
    for kind, precision in runs:
        with guarded(f"step of 03{kind}", precision):
            step_row("03", kind, precision, source, SOURCE=data)
    # SAM's embeddings are made once, by 04's own function
    sam = make_sam()
    files = sorted(Path(painted.removeprefix("folder:"), "images").iterdir())
    embeddings = selftrain.embed_pictures(sam, files, source.CROP, True)
    drawn_label(source.CROP)
    with mock.patch.multiple(selftrain, load_sam=lambda name: sam,
                             embed_pictures=lambda *_: embeddings):
        for kind, precision in runs:
            with guarded(f"step of 04{kind}", precision):
                step_row("04", kind, precision, selftrain, SOURCE=data,
                         GENERATED=f"{painted}/images",
                         INIT=f"{WORK.name}/03{kind}, {precision}/model.safetensors")


def step_row(number, kind, precision, stage, **constants):
    """A row of a stage's main(): FLOPs from a run of one step, the time from a longer one, the
    CPU's waits for the GPU from what the longer one has more."""
    def run(n, out):
        constants.update(OUT=out, ITERATIONS=n, LOG_EVERY=max(1, n // 2))
        with warnings.catch_warnings(record=True) as caught, warned_of_waits():
            warnings.simplefilter("always")
            run_main(stage, **constants)
        log = common.read_lines(f"{out}/log.jsonl", "seconds")[-1]
        return log, sum("synchronizing" in str(warning.message) for warning in caught)

    check_time()
    half = set_precision(precision)
    open_clip.create_model = random_tower
    constants |= {"HALF": half, "FREEZE_ENCODER": not kind}
    out = f"{WORK.name}/{number}{kind}, {precision}"
    with FlopCounterMode(display=False) as counter:
        _, before = run(1, f"{out}, one step")
    log, waits = run(STEPS, out)
    note = f"{(waits - before) / (STEPS - 1):.1f} syncs" if CUDA else "syncs need CUDA"
    if "prompts" in log:
        note += f", {log['prompts']:.0f} prompts per picture"
    row(f"step of {number}{kind}", precision, log["seconds"], counter.get_total_flops(), note=note)


@contextmanager
def warned_of_waits():
    """torch warns whenever the CPU waits for the GPU."""
    try:
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def sam():
    """SAM's encoder, per picture."""
    model = make_sam()
    side = model.image_encoder.img_size
    for n in (1, 8):
        pixels = 255 * torch.rand(n, 3, side, side, device=DEVICE)
        row_per_precision(f"SAM's encoder, {n} at once", model.image_encoder,
                          partial(embed, model, pixels), n)


def embed(model, pixels):
    model.image_encoder(model.preprocess(pixels))


def painting():
    """02, per picture: a few steps, from which 50 are extrapolated."""
    from diffusers import AutoPipelineForText2Image
    pipeline = make_pipeline()
    runs = [(GROUPS[0], precision) for precision in (*PRECISIONS, "float16")]
    runs += [(group, "float16 channels_last") for group in GROUPS]
    with mock.patch.object(AutoPipelineForText2Image, "from_pretrained",
                           lambda *_, dtype, **__: pipeline.to(dtype)):
        for group, precision in runs:
            with guarded(f"02, {group} at once", precision):
                painting_rows(pipeline.unet, group, precision)


def painting_rows(unet, group, precision):
    costs = []
    for few in FEW:
        dtype = precision.replace("TF32", "float32").split()[0]
        configure(generate, STEPS=few, DTYPE=dtype, **CONSTANTS.get(generate, {}))
        way = partial(paint, *generate.load_pipeline("random"), group)
        set_precision(precision, unet)
        costs.append(np.array(measure(way, 1)))
        row(f"02, {few} steps, {group} at once", precision, *costs[-1], group)
    per_step = (costs[1] - costs[0]) / (FEW[1] - FEW[0])
    row(f"02, 50 steps, {group} at once", precision, *costs[1] + (50 - FEW[1]) * per_step, group,
        "extrapolated")


def paint(pipeline, options, n):
    noise = [torch.Generator().manual_seed(seed) for seed in range(n)]
    pipeline(prompt=["a photo of a street in the rain"] * n, generator=noise, **options)


def scoring():
    """05, per picture, without reading."""
    encoder = make_encoder()
    decoder = make_decoder(encoder.channels).eval().requires_grad_(False)
    for shape in SCORED:
        image, truth = next(scenes(shape, 1))
        way = partial(score, encoder, decoder, Image.fromarray(image), truth)
        row_per_precision(f"05, {shape[0]} x {shape[1]}", encoder, way, 1)


def score(encoder, decoder, image, truth):
    pixels = np.array(evaluation.network_input(image, evaluation.SHORT_SIDE))
    label = evaluation.segment(encoder, decoder, pixels, truth.shape)
    evaluation.confusion(truth, label, len(common.CLASSES))


def reading():
    """Crops of PNGs of GTA5's size, per picture, through the DataLoader of 03."""
    data, n = data_set("read", PICTURE, 8), source.BATCH
    weight = Path(WORK.name, "read/images/0.png").stat().st_size / 1e6
    with redirect_stdout(io.StringIO()):
        crops = source.SourceCrops((data,), (0, 3), source.CROP, source.SCALE)
    for workers in WORKERS:
        with guarded(f"reading, {workers} workers"):
            check_time()
            for number, _ in enumerate(source.batches(crops, n, 0, 6 * workers, workers), 1):
                if number == 2 * workers:                       # what was read ahead is used up
                    since = time.perf_counter()
            row(f"reading, {workers} workers", "-", time.perf_counter() - since, np.nan,
                4 * workers * n, f"PNGs of {weight:.1f} MB")


def encoders():
    """Forward, as they are frozen; per picture."""
    images = torch.randint(256, (source.BATCH, 3, *source.CROP), dtype=torch.uint8, device=DEVICE)
    for title, name in {"ConvNeXt-L": source.ENCODER, "RN50": "open_clip:RN50-quickgelu/"}.items():
        encoder = make_encoder(name)
        row_per_precision(f"encoder {title}", encoder, partial(encoder, images), len(images))


def decoders():
    """Ours and Mask2Former's, forward and back; per picture."""
    channels, classes = make_encoder().channels, len(common.CLASSES)
    maps = random_maps(channels, source.BATCH, source.CROP)
    made = {"our decoder": make_decoder(channels),
            "Mask2Former's head": Mask2FormerHead(channels, classes, *MASK2FORMER).to(DEVICE)}
    for title, decoder in made.items():
        row_per_precision(title, decoder, partial(forward_and_back, decoder, maps), len(maps[0]))


def hours():
    """What the rows above make of the gta preset; 05 with two checkpoints, on three data sets."""
    small, large = [f"05, {shape[0]} x {shape[1]}" for shape in SCORED]
    table = {"02: 5,000 pictures": (f"02, 50 steps, {GROUPS[0]} at once", 5_000),
             "04: 5,000 embeddings": ("SAM's encoder, 8 at once", 5_000),
             "03: 40,000 steps": ("step of 03", 40_000),
             "04: 40,000 steps": ("step of 04", 40_000),
             "05: Cityscapes, BDD": (small, 3_000), "05: Mapillary": (large, 4_000)}
    precisions = (*PRECISIONS, "float16 channels_last")
    head("hours of PRESET=gta", *precisions)
    for title, (what, times) in table.items():
        line(title, *[times / 3600 * SECONDS.get((what, precision), np.nan)
                      for precision in precisions])
    reading = source.BATCH * SECONDS.get(("reading, 1 workers", "-"), np.nan)
    line("workers that 03 needs", *[reading / SECONDS.get(("step of 03", precision), np.nan)
                                    for precision in precisions])


PARTS = {part.__name__: part for part in (card, steps, sam, painting, scoring, reading, encoders,
                                          decoders, hours)}


def main(wanted):
    for name in wanted:
        if name not in PARTS:
            sys.exit(f"bench.py: no part {name}; there are {', '.join(PARTS)}")
    if MODE == "gpu" and not CUDA:
        sys.exit("bench.py: no CUDA GPU; `python tests/bench.py tiny` tries the code without")
    for stage, constants in CONSTANTS.items():
        configure(stage, **constants)
    gc.freeze()                                 # collecting is quick without the libraries
    name = torch.cuda.get_device_name() if CUDA else platform.machine()
    print(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, {MODE}")
    head("what", "precision", "s", "per s", "TFLOP", "floor, s", "times floor", "GB", "notes")
    for name in wanted or PARTS:
        with guarded(name):
            PARTS[name]()
    print(f"\n{time.perf_counter() - STARTED:.0f} s, {len(FAILED)} failed: {', '.join(FAILED)}")
    sys.exit(bool(FAILED))
