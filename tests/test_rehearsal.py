"""A rehearsal of the paper presets on a CPU: PRESET=gta, synthia, cityscapes, all five scripts as a
user starts them, on drawn pictures in every data set's official layout, names and label format
and on small models in every library's official format. Only sizes and numbers of things change."""
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from references import write_convnext, write_official_data
from segment_anything import sam_model_registry
from standins import tiny_sd

import common

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the models that all presets share: CLIP, and Stable Diffusion with its two files
    per network, in float32 and in float16, as on the hub."""
    root = tmp_path_factory.mktemp("rehearsal")
    write_official_data(root / "data")
    (root / "clip").mkdir()
    torch.manual_seed(0)
    write_convnext(root / "clip", "test_convnext")
    tiny_sd(root / "diffusion", "v_prediction")
    from diffusers import StableDiffusionPipeline
    half = StableDiffusionPipeline.from_pretrained(root / "diffusion", dtype=torch.float16)
    half.save_pretrained(root / "diffusion", variant="fp16")
    assert (root / "diffusion/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    return root


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, beside which SAM's weights belong."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


@pytest.fixture
def vit_b(checkout):
    """SAM's own ViT-B under its official name, with random weights."""
    path = checkout / "weights/sam_vit_b_01ec64.pth"
    path.parent.mkdir()
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    yield
    path.unlink()


# ---------------------------------------------------------------------------- the rehearsal
def arguments(root, sam, pictures=1):
    """{script: what is smaller than in the preset}. SAM's own ViT takes half a minute per picture
    in float32, and in bfloat16 minutes where the CPU has no instructions for it."""
    few = ["--WORKERS=1", "--ITERATIONS=2", "--LOG_EVERY=1", "--SAVE_EVERY=1"]
    return {
        "01_prompts": [f"--LLM={ROOT}/tests/toy/weights/llm", "--N_PROMPTS=2", "--NEW_TOKENS=99"],
        "02_generate": [f"--DIFFUSION={root}/diffusion", "--SIZE=64,64", "--STEPS=2",
                        f"--N_IMAGES={pictures}"],
        "03_train_source": [f"--ENCODER=open_clip:local-dir:{root}/clip", "--DIM=32",
                            "--QUERIES=19", "--HIDDEN=32", "--BATCH=2", "--CROP=64,64",
                            "--POINTS=64", "--HALF=true", *few],
        "04_selftrain": [f"--SAM={sam}", "--SAM_MIN_AREA=20", "--N_SOURCE=1", "--N_GENERATED=2",
                         f"--HALF={sam != 'vit_b'}", *few],
        "05_eval": ["--SHORT_SIDE=64", "--WORKERS=1", "--HALF=true", "--PANELS=1"]}


def rehearse(preset, sam, pictures, folder, work, targets):
    """All five scripts, copies of which lie in `work`, then what they left there."""
    settings = environment(work / "run", folder / "data", PRESET=preset)
    options = arguments(folder, sam, pictures)

    def chain(*names):
        for name in names:
            command = [sys.executable, f"{name}.py", *options[name]]
            done = subprocess.run(command, cwd=work, env=settings, capture_output=True, text=True,
                                  timeout=1200)
            assert done.returncode == 0 and "Traceback" not in done.stderr, f"{name}: {done.stderr}"

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


def test_gta_with_sams_own_vit(folder, checkout, vit_b):
    rehearse("gta", "vit_b", 1, folder, checkout, {"cityscapes": 2, "bdd": 2, "mapillary": 2})


@pytest.mark.parametrize("preset, targets", [
    ("synthia", ("cityscapes", "bdd", "mapillary")),
    ("cityscapes", ("acdc_night", "acdc_snow", "acdc_rain", "acdc_fog"))])
def test_another_preset_with_the_miniature_sam(folder, checkout, preset, targets):
    sam = ROOT / "tests/toy/weights/sam"
    rehearse(preset, sam, 3, folder, checkout, dict.fromkeys(targets, 2))
