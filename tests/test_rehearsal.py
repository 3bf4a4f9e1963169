"""A rehearsal of the paper presets on a CPU: PRESET=gta, synthia, cityscapes, all five scripts as a
user starts them, on drawn pictures in every data set's official layout, names and label format
and on small models in every library's official format. Only sizes and numbers of things change."""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image
from segment_anything import sam_model_registry
from test_data import png16
from test_painting import tiny_sd
from test_parity import write_clip

import common

pytestmark = pytest.mark.slow
SIZE = 64, 128                          # rows, columns of every picture
# ids that the labels hold: some of the 19 classes, some that are not scored
CITYSCAPES = (0, 3, 7, 8, 11, 19, 21, 23, 26, 33)
SYNTHIA = (0, 1, 2, 3, 8, 15, 22)
MAPILLARY = (0, 13, 17, 24, 27, 30, 41, 55, 65)
TRAIN_IDS = (0, 1, 2, 7, 10, 13, 18, 255)


# ---------------------------------------------------------------------------- data
def picture(path, seed):
    """A picture of soft colours, as PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(SIZE[::-1], Image.BICUBIC).save(path)


def scene(ids, seed):
    """uint8 (H, W): 32 squares, each of one of the ids"""
    coarse = np.random.default_rng((seed, 1)).choice(ids, (4, 8))
    return np.kron(coarse, np.ones((16, 16))).astype(np.uint8)


def grey(path, label, colours=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if colours:
        image.putpalette(colours)
    image.save(path)


def palette(path, label):
    """The pixels are ids, the file knows a colour for each."""
    grey(path, label, np.random.default_rng(0).integers(0, 256, 768).tolist())


def instances(path, label):
    """SYNTHIA: three channels of 16 bits, the id in red and an instance's number in green."""
    png16(path, np.stack((label, label * 7, label * 0), -1).astype(np.uint16))


def write_data(root):
    """Two pictures of every data set that the presets name, three for training."""
    def pair(image, label, write, ids, seed):
        picture(root / image, seed)
        write(root / label, scene(ids, seed))
    for i in range(3):
        pair(f"gta/images/{i + 1:05}.png", f"gta/labels/{i + 1:05}.png", palette, CITYSCAPES, i)
        pair(f"synthia/RGB/{i:07}.png", f"synthia/GT/LABELS/{i:07}.png", instances, SYNTHIA, i)
    for split, city, n in (("train", "aachen", 3), ("val", "frankfurt", 2)):
        for i in range(n):
            name = f"{split}/{city}/{city}_000000_{i:06}"
            pair(f"cityscapes/leftImg8bit/{name}_leftImg8bit.png",
                 f"cityscapes/gtFine/{name}_gtFine_labelIds.png", grey, CITYSCAPES, i)
            grey(root / f"cityscapes/gtFine/{name}_gtFine_instanceIds.png", scene((0, 7), i))
    for i in range(2):
        name = f"val/7d06fefd-f7be05a{i}"
        pair(f"bdd100k/images/10k/{name}.jpg", f"bdd100k/labels/sem_seg/masks/{name}.png", grey,
             TRAIN_IDS, i)
        name = f"{i}AFqPoXNmdqnDmqHXjVMmg"
        pair(f"mapillary/validation/images/{name}.jpg", f"mapillary/validation/labels/{name}.png",
             palette, MAPILLARY, i)
        for weather in ("fog", "night", "rain", "snow"):
            name = f"{weather}/val/GOPR0476/GOPR0476_frame_00085{i}"
            pair(f"acdc/rgb_anon/{name}_rgb_anon.png", f"acdc/gt/{name}_gt_labelTrainIds.png", grey,
                 TRAIN_IDS, i)


# ---------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the models that all presets share: CLIP, and Stable Diffusion with its two files
    per network, in float32 and in float16, as on the hub."""
    root = tmp_path_factory.mktemp("rehearsal")
    write_data(root / "data")
    (root / "clip").mkdir()
    torch.manual_seed(0)
    write_clip(root / "clip", {"timm_model_name": "test_convnext", "timm_model_pretrained": False,
                               "timm_pool": "", "timm_proj": "mlp", "timm_drop_path": .1})
    tiny_sd(root / "diffusion", "v_prediction")
    from diffusers import StableDiffusionPipeline
    half = StableDiffusionPipeline.from_pretrained(root / "diffusion", dtype=torch.float16)
    half.save_pretrained(root / "diffusion", variant="fp16")
    assert (root / "diffusion/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    return root


@pytest.fixture
def vit_b(tmp_path):
    """SAM's own ViT-B under its official name, with random weights."""
    path = tmp_path / "weights/sam_vit_b_01ec64.pth"
    path.parent.mkdir()
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    yield
    path.unlink()


# ---------------------------------------------------------------------------- the rehearsal
def arguments(root, sam, pictures=1):
    """{script: what is smaller than in the preset}. SAM's own ViT takes half a minute per picture
    in float32, and in bfloat16 minutes where the CPU has no instructions for it."""
    crop = ["--CROP=64,64", "--POINTS=64", "--WORKERS=1", "--ITERATIONS=2", "--LOG_EVERY=1",
            "--SAVE_EVERY=1"]
    return {
        "01_prompts": [f"--LLM={ROOT}/tests/toy/weights/llm", "--N_PROMPTS=2", "--NEW_TOKENS=99"],
        "02_generate": [f"--DIFFUSION={root}/diffusion", "--SIZE=64,64", "--STEPS=2",
                        f"--N_IMAGES={pictures}"],
        "03_train_source": [f"--ENCODER=open_clip:local-dir:{root}/clip", "--DIM=32",
                            "--QUERIES=19", "--HIDDEN=32", "--BATCH=2", "--HALF=true", *crop],
        "04_selftrain": [f"--SAM={sam}", "--SAM_MIN_AREA=20", "--N_SOURCE=1", "--N_GENERATED=2",
                         f"--HALF={sam != 'vit_b'}", *crop],
        "05_eval": ["--SHORT_SIDE=64", "--WORKERS=1", "--HALF=true", "--PANELS=1"]}


def rehearse(preset, sam, pictures, folder, work, targets):
    """All five scripts in `work`, then what they left there."""
    settings = environment(work / "run", folder / "data", PRESET=preset)
    options = arguments(folder, sam, pictures)

    def chain(*names):
        for name in names:
            command = [sys.executable, ROOT / f"{name}.py", *options[name]]
            done = subprocess.run(command, cwd=work, env=settings, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            assert "Traceback" not in done.stderr

    with ThreadPoolExecutor() as pool:
        painting = pool.submit(chain, "01_prompts", "02_generate")
        pool.submit(chain, "03_train_source").result()
        painting.result()
    chain("04_selftrain", "05_eval")
    for stage in ("03_train_source", "04_selftrain"):
        log = common.read_lines(work / "run" / stage / "log.jsonl", "step", "loss", "wait")
        assert [line["step"] for line in log] == [1, 2]
        assert all(np.isfinite(line["loss"]) for line in log)
        record = json.loads((work / "run" / stage / "run.json").read_text())
        assert record["preset"] == preset
        assert record["constants"]["HALF"] == (stage < "04" or sam != "vit_b")
    assert 0 <= log[-1]["labelled"] <= 1 and log[-1]["prompts"] > 0
    results = json.loads((work / "run/05_eval/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["03_train_source", "04_selftrain"]
    for row in results["rows"]:
        assert {name: target["images"] for name, target in row["targets"].items()} == targets


def test_gta_with_sams_own_vit(folder, tmp_path, vit_b):
    rehearse("gta", "vit_b", 1, folder, tmp_path, {"cityscapes": 2, "bdd": 2, "mapillary": 2})


@pytest.mark.parametrize("preset, targets", [
    ("synthia", ("cityscapes", "bdd", "mapillary")),
    ("cityscapes", ("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))])
def test_another_preset_with_the_miniature_sam(folder, tmp_path, preset, targets):
    sam = ROOT / "tests/toy/weights/sam"
    rehearse(preset, sam, 3, folder, tmp_path, dict.fromkeys(targets, 2))
