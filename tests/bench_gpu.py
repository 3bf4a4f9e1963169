"""
bench_gpu: full-size models with random weights, the gta preset, each row beside its floor.

    python tests/bench.py gpu                   one CUDA GPU, at most 8 minutes, no network
    python tests/bench.py gpu card steps        some parts: PARTS, below; floors need `card`
    python tests/bench.py tiny                  the same functions with tiny sizes on a CPU: a test

s          seconds per step, pass or picture; the median of some, after a first one
floor      FLOPs, counted by torch, over the card's own rate in large matrix products
GB         the most that torch held at once, of whatever is loaded for the row
precision  float32 without TensorFloat-32; TF32, which the scripts allow; bfloat16: HALF=True;
           channels_last: also the encoder's (02: the UNet's) weights in that order

A step is one of the real main() of 03 or 04, on one batch of real crops again and again: reading
them is a part of its own. The teacher's labels are replaced by drawn ones, because those of a
random network have no components for SAM; "prompts" says how many there are. "syncs" counts how
often the CPU waits for the GPU in a step. 02 is its own load_pipeline() on a StableDiffusionPipeline
with a random text encoder. A row or a part that fails is named with its error, and the rest goes on.
"""
import gc
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from bench import (DEVICE, MODE, WORK, Mask2FormerHead, data_set, evaluation, forward_and_back,
                   generate, head, line, configure, random_maps, run_main, scenes, selftrain,
                   source)
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import common
from tests.toy.sam import build_sam

MINUTES = 8
PRECISIONS = ("float32", "TF32", "bfloat16", "bfloat16 channels_last")
CUDA = DEVICE.type == "cuda"


# ---------------------------------------------------------------------------- sizes
def vit_h():
    from segment_anything import sam_model_registry
    return sam_model_registry["vit_h"]()


def tiny_sam():
    return build_sam(dict(image_size=64, stride=8, width=16, mlp_dim=16, heads=1,
                          encoder=(8, 8, 8, 8), blocks=(0, 0, 0, 0)))


FULL = SimpleNamespace(
    matmul=8192,
    steps=14,                                   # the second half of them is timed
    constants={source: {}, selftrain: {}, evaluation: {}, generate: {}},    # those of PRESET=gta
    towers={},                                  # as open_clip's own configurations
    sam=vit_h,
    mask2former=(256, 100, 9, 2048, 6),         # width, queries, layers, feed-forward, pixel layers
    gta=(1052, 1914),
    scored=((1024, 2048), (3024, 4032)),        # Cityscapes; 12 megapixels, as in Mapillary
    workers=(1, 2, 4, 8, 16),
    groups=(4, 8, 16),
    few=(2, 12),                                # steps of 02
    # Stable Diffusion 2: 866 M parameters, and 84 M of its autoencoder
    unet=dict(sample_size=96, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
              attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    autoencoder=(128, 256, 512, 512),
    text=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
              num_attention_heads=16))
TINY = SimpleNamespace(
    matmul=64,
    steps=2,
    constants={source: dict(CROP="64,64", DIM=32, QUERIES=19, LAYERS=1, HIDDEN=32, POINTS=16,
                            PIXEL_LAYERS=1, BATCH=2),
               selftrain: dict(SAM_MIN_AREA=200, N_SOURCE=1, N_GENERATED=1),
               evaluation: dict(SHORT_SIDE=64), generate: dict(SIZE="16,16")},
    towers={"convnext_large_d_320": dict(timm_model_name="test_convnext", image_size=64),
            "RN50-quickgelu": dict(layers=(1, 1, 1, 1), width=8)},
    sam=tiny_sam,
    mask2former=(32, 19, 1, 32, 1),
    gta=(96, 160),
    scored=((64, 128), (96, 128)),
    workers=(1, 2),
    groups=(1, 2),
    few=(1, 2),
    unet=dict(sample_size=8, block_out_channels=(32, 32), cross_attention_dim=32,
              attention_head_dim=4, layers_per_block=1,
              down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    autoencoder=(32, 32),
    text=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
SIZES = FULL if MODE == "gpu" else TINY


# ---------------------------------------------------------------------------- measuring
STARTED = time.perf_counter()
RATE = {}                                       # {precision: FLOPs per second}
SECONDS = {}                                    # {(what, precision): seconds}
FAILED = []


@contextmanager
def guarded(what, precision="-"):
    """An error ends this row or part only, and is a row of the table. Frees memory first."""
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
        raise TimeoutError(f"left out, {MINUTES} minutes are over")


def synchronise():
    if CUDA:
        torch.cuda.synchronize()


def measure(way, times=3):
    """-> median seconds of a call, and its FLOPs, which are counted in a first call."""
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


def row(what, precision, seconds, flops, n=1, note=""):
    """Print a row; seconds and FLOPs are those of n steps or pictures together."""
    seconds = SECONDS[what, precision] = seconds / n
    floor = flops / n / RATE.get(precision.split()[0], np.nan)
    line(what, precision, seconds, 1 / seconds, flops / n / 1e12, floor, seconds / floor,
         common.peak_memory(), note)


def set_precision(precision, *networks):
    """Allow TensorFloat-32 or not, and set the order of the weights in memory."""
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    for network in networks:
        network.to(memory_format=memory_format(precision))


def memory_format(precision):
    last = precision.endswith("channels_last")
    return torch.channels_last if last else torch.contiguous_format


def row_per_precision(what, network, way, n):
    """Rows of `way`, a pass of a network over n pictures, in every precision."""
    for precision in PRECISIONS:
        with guarded(what, precision):
            set_precision(precision, network)
            evaluation.HALF = half = precision.startswith("bfloat16")

            def cast():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                    way()
            row(what, precision, *measure(cast), n)


# ---------------------------------------------------------------------------- stand-ins
def random_tower(order, name, **_):
    """For open_clip.create_model: the visual tower with random weights, in an order of memory."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | SIZES.towers.get(name, {})
    with DEVICE:
        clip = open_clip.CLIP(config["embed_dim"], vision, {"width": 32, "heads": 2, "layers": 1})
    tower = clip.visual.to(memory_format=order)
    tower.image_mean, tower.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return SimpleNamespace(visual=tower)


def one_batch(dataset, size, first, last, workers):
    """For source.batches: the same batch again and again, so that reading takes no time."""
    batch = default_collate([dataset[i] for i in range(size)])
    if CUDA:
        batch = [part.pin_memory() for part in batch]
    return [batch] * (last - first)


@lru_cache
def drawn_label(shape):
    return torch.from_numpy(next(scenes(shape, 1))[1])[None, None].long().to(DEVICE)


def predict_drawn(encoder, decoder, images, half=False):
    """For source.predict: the same work, and then a drawn scene's classes win."""
    scores = real_predict(encoder, decoder, images, half)
    label = drawn_label(images.shape[-2:]).expand(len(scores), -1, -1, -1)
    return scores.scatter_(1, label, 1000.)


real_predict, real_batches = source.predict, source.batches


def make_sam():
    with DEVICE:
        return SIZES.sam().to(DEVICE).eval().requires_grad_(False)


def make_decoder(channels):
    sizes = source.DIM, source.QUERIES, source.LAYERS, source.HIDDEN, source.PIXEL_LAYERS
    return source.Decoder(channels, len(common.CLASSES), *sizes).to(DEVICE)


def make_pipeline():
    """Stable Diffusion 2's networks with random weights, and the miniature's tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    depth = len(SIZES.autoencoder)
    with DEVICE:
        unet = diffusers.UNet2DConditionModel(**SIZES.unet)
        text_encoder = CLIPTextModel(CLIPTextConfig(**SIZES.text))
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=SIZES.autoencoder, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth)
    tokenizer = CLIPTokenizer.from_pretrained(f"{common.MINIATURES}/diffusion/tokenizer",
                                              model_max_length=77)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1,
        prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


# ---------------------------------------------------------------------------- parts
def card():
    """The rates by which floors are computed."""
    for precision, dtype in (("float32", torch.float32), ("TF32", torch.float32),
                             ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        with guarded("matrix product", precision):
            set_precision(precision)
            a, b = torch.randn(2, SIZES.matmul, SIZES.matmul, device=DEVICE).to(dtype)
            seconds, flops = measure(partial(torch.mm, a, b), 10)
            RATE[precision] = flops / seconds
            row("matrix product", precision, seconds, flops)


def steps():
    """03 and 04, with the frozen encoder and with the trainable one of Table 5."""
    data, painted = data_set("source", SIZES.gta, 8), data_set("painted", source.CROP, 4)
    runs = {}
    for trainable, precision in (*[(False, precision) for precision in PRECISIONS],
                                 (True, "TF32"), (True, "bfloat16")):
        what = "step of 03, trainable encoder" if trainable else "step of 03"
        runs[what, precision] = {"OUT": f"{WORK.name}/{what}, {precision}",
                                 "HALF": precision.startswith("bfloat16"),
                                 "FREEZE_ENCODER": not trainable}
    for (what, precision), constants in runs.items():
        with guarded(what, precision):
            step_row(what, precision, source, SOURCE=data, **constants)
    # SAM's embeddings of the painted pictures are made once, by 04's own function
    sam, selftrain.CROP = make_sam(), source.CROP
    files = sorted(Path(painted.removeprefix("folder:"), "images").iterdir())
    embeddings = selftrain.embed_pictures(sam, files)
    selftrain.embed_pictures = lambda sam, files: embeddings
    selftrain.load_sam = lambda name: sam
    drawn_label(source.CROP)
    for (what, precision), constants in runs.items():
        init, out = constants["OUT"], constants["OUT"].replace("of 03", "of 04")
        what = what.replace("of 03", "of 04")
        with guarded(what, precision):
            step_row(what, precision, selftrain, INIT=f"{init}/model.safetensors",
                     GENERATED=f"{painted}/images", **constants | {"OUT": out})


def step_row(what, precision, stage, OUT, **constants):
    """A row of a stage's main(): FLOPs from a run of one step, the time from a longer one, the
    CPU's waits for the GPU from the difference of both."""
    def run(total, out):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count_waits("warn")
            run_main(stage, OUT=out, ITERATIONS=total, LOG_EVERY=max(1, total // 2), **constants)
            count_waits("default")
        log = common.read_lines(f"{out}/log.jsonl", "seconds")[-1]
        return log, sum("synchronizing" in str(warning.message) for warning in caught)

    check_time()
    set_precision(precision)
    open_clip.create_model = partial(random_tower, memory_format(precision))
    with FlopCounterMode(display=False) as counter:
        _, first = run(1, f"{OUT}, one step")
    log, waits = run(SIZES.steps, OUT)
    syncs = f"{(waits - first) / (SIZES.steps - 1):.1f} syncs" if CUDA else "syncs need CUDA"
    prompts = f", {log['prompts']:.0f} prompts per picture" if "prompts" in log else ""
    row(what, precision, log["seconds"], counter.get_total_flops(), note=syncs + prompts)


def count_waits(mode):
    if CUDA:
        torch.cuda.set_sync_debug_mode(mode)


def encoders():
    """Forward, as they stay frozen."""
    open_clip.create_model = partial(random_tower, torch.contiguous_format)
    images = torch.randint(256, (source.BATCH, 3, *source.CROP), dtype=torch.uint8, device=DEVICE)
    for name in (source.ENCODER, "open_clip:RN50-quickgelu/openai"):
        encoder = source.Encoder(name).to(DEVICE)
        model = name.split(":")[1].split("/")[0]
        row_per_precision(f"encoder {model}", encoder, partial(encoder, images), len(images))


def decoders():
    """Ours and Mask2Former's, forward and back, on maps of the encoder's sizes."""
    open_clip.create_model = partial(random_tower, torch.contiguous_format)
    channels = source.Encoder(source.ENCODER).channels
    maps = random_maps(channels, source.BATCH, source.CROP)
    head_of_mask2former = Mask2FormerHead(channels, len(common.CLASSES), *SIZES.mask2former)
    for what, decoder in {"our decoder": make_decoder(channels),
                          "Mask2Former's head": head_of_mask2former.to(DEVICE)}.items():
        way = partial(forward_and_back, decoder, maps)
        row_per_precision(f"{what}, forward and back", decoder, way, source.BATCH)


def sam():
    """SAM's encoder, per picture."""
    model = make_sam()
    side = model.image_encoder.img_size
    for n in (1, 8):
        pixels = 255 * torch.rand(n, 3, side, side, device=DEVICE)
        way = partial(embed, model, pixels)
        row_per_precision(f"SAM's encoder, {n} at once", model.image_encoder, way, n)


def embed(model, pixels):
    return model.image_encoder(model.preprocess(pixels))


def painting():
    """02, per picture: a few steps, from which 50 are extrapolated."""
    import diffusers
    pipeline = make_pipeline()
    diffusers.AutoPipelineForText2Image.from_pretrained = lambda *_, dtype, **__: pipeline.to(dtype)
    first, *larger = SIZES.groups
    best = "float16 channels_last"
    for group, precision in (*[(first, precision) for precision in (*PRECISIONS, "float16", best)],
                             *[(group, best) for group in larger]):
        dtype = "float32" if precision == "TF32" else precision.split()[0]
        costs = []
        for few in SIZES.few:
            with guarded(f"02, {few} steps, {group} at once", precision):
                configure(generate, STEPS=few, DTYPE=dtype)
                way = partial(paint, *generate.load_pipeline("random"), group)
                set_precision(precision, pipeline.unet)
                costs.append(np.array(measure(way, 1)))
                row(f"02, {few} steps, {group} at once", precision, *costs[-1], group)
        if len(costs) == 2:
            fewer, few = SIZES.few
            cost = costs[1] + (50 - few) / (few - fewer) * (costs[1] - costs[0])
            row(f"02, 50 steps, {group} at once", precision, *cost, group, "extrapolated")


def paint(pipeline, options, n):
    noise = [torch.Generator().manual_seed(seed) for seed in range(n)]
    pipeline(prompt=["a photo of a street in the rain"] * n, generator=noise, **options)


def scoring():
    """05, per picture, without reading."""
    open_clip.create_model = partial(random_tower, torch.contiguous_format)
    encoder = source.Encoder(source.ENCODER).to(DEVICE)
    decoder = make_decoder(encoder.channels).eval().requires_grad_(False)
    for shape in SIZES.scored:
        image, truth = next(scenes(shape, 1))
        way = partial(score, encoder, decoder, Image.fromarray(image), truth)
        row_per_precision(f"05, {shape[0]} x {shape[1]}", encoder, way, 1)


def score(encoder, decoder, image, truth):
    pixels = np.array(evaluation.network_input(image, evaluation.SHORT_SIDE))
    label = evaluation.segment(encoder, decoder, pixels, truth.shape)
    evaluation.confusion(truth, label, len(common.CLASSES))


def reading():
    """Crops of a PNG of GTA5's size, per picture, through the real DataLoader."""
    data = data_set("read", SIZES.gta, 8)
    megabytes = Path(WORK.name, "read/images/0.png").stat().st_size / 1e6
    crops = source.SourceCrops((data,), 0, source.CROP, source.SCALE, (0, 0, 0))
    for workers in SIZES.workers:
        with guarded(f"reading, {workers} workers"):
            check_time()
            n = source.BATCH
            for number, _ in enumerate(real_batches(crops, n, 0, 6 * workers, workers), 1):
                if number == 2 * workers:                       # what was read ahead is gone
                    since = time.perf_counter()
            seconds = time.perf_counter() - since
            row(f"reading, {workers} workers", "-", seconds, np.nan, 4 * workers * n,
                f"PNGs of {megabytes:.1f} MB")


def hours():
    """What the rows above make of the gta preset; 05: two checkpoints, three data sets."""
    small, large = [" x ".join(map(str, shape)) for shape in SIZES.scored]
    table = {"02: 5,000 pictures": (f"02, 50 steps, {SIZES.groups[0]} at once", 5_000),
             "04: 5,000 embeddings": ("SAM's encoder, 8 at once", 5_000),
             "03: 40,000 steps": ("step of 03", 40_000),
             "04: 40,000 steps": ("step of 04", 40_000),
             "05: 2 x 1,500 pictures": (f"05, {small}", 2 * 1_500),
             "05: 2 x 2,000 of Mapillary": (f"05, {large}", 2 * 2_000)}
    precisions = ("float32", "TF32", "bfloat16", "bfloat16 channels_last", "float16 channels_last")
    head("hours of PRESET=gta", *precisions)
    for title, (what, times) in table.items():
        seconds = [SECONDS.get((what, precision), np.nan) for precision in precisions]
        line(title, *[times * each / 3600 for each in seconds])
    picture = SECONDS.get(("reading, 1 workers", "-"), np.nan)
    steps = [SECONDS.get(("step of 03", precision), np.nan) for precision in precisions]
    line("workers that 03 needs", *[source.BATCH * picture / step for step in steps])


PARTS = {part.__name__: part for part in (card, steps, sam, painting, scoring, reading, encoders,
                                          decoders, hours)}


def main(wanted):
    for name in wanted:
        if name not in PARTS:
            sys.exit(f"bench.py: no part {name}; there are {', '.join(PARTS)}")
    if MODE == "gpu" and not CUDA:
        sys.exit("bench.py: no CUDA GPU; `python tests/bench.py tiny` tries the code without")
    name = torch.cuda.get_device_name() if CUDA else platform.machine()
    print(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, {MODE}")
    for stage, constants in SIZES.constants.items():
        configure(stage, **constants)
    source.batches, source.predict = one_batch, predict_drawn
    source.preview = selftrain.preview = lambda *_: None
    Figure.savefig = lambda figure, file, **_: Path(file).touch()      # loss.png
    gc.freeze()                                 # collecting is quick without the libraries
    head("what", "precision", "s", "per s", "TFLOP", "floor, s", "times floor", "GB", "notes")
    for name in wanted or PARTS:
        with guarded(name):
            PARTS[name]()
    print(f"\n{time.perf_counter() - STARTED:.0f} s, {len(FAILED)} failed: {', '.join(FAILED)}")
    sys.exit(bool(FAILED))
