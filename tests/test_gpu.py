"""The GPU against the CPU, on the toy preset's miniatures. Skipped without CUDA.

    python -m pytest tests/test_gpu.py                  on a machine with a GPU
    REHEARSE=cpu python -m pytest tests/test_gpu.py     the test code itself: CPU against CPU"""
import os
import warnings

import numpy as np
import pytest
import torch
import world
from conftest import SMALL, fresh, here, stop_at_the_checkpoint

import common
from common import IGNORE

DEVICE = os.environ.get("REHEARSE", "cuda")
CUDA = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no CUDA")
SHAPE = 128, 256                        # rows, columns of the miniature world
LAYERS, BATCH, QUERIES, CLASSES, WEIGHTS = 3, 2, 24, len(common.CLASSES), (2., 5., 5.)
source, selftrain = fresh("03_train_source"), fresh("04_selftrain")


@pytest.fixture
def exact():
    """float32 on the GPU, too: no TensorFloat-32"""
    common.device()                     # it allows TensorFloat-32, once
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def network(finished):
    """network(device) -> encoder and decoder that 03 trained for some steps"""
    def load(device):
        parts = source.load_model(finished[0] / "03_train_source/model.safetensors")
        return [part.to(device) for part in parts[:2]]
    return load


def scenes(n):
    """Drawn scenes: images uint8 (n, 3, H, W), labels int64 (n, H, W)"""
    drawn = [world.draw(seed, "day")[:2] for seed in world.seeds("validation", "day", n)]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*drawn))
    return images.permute(0, 3, 1, 2).contiguous(), labels.long()


def close(one, other, tolerance):
    """Equal but for `tolerance`, in units of the largest value"""
    one, other = one.float().cpu(), other.float().cpu()
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def share(one, other):
    return (one.cpu() == other.cpu()).float().mean()


# ---------------------------------------------------------------------------- the parts
@torch.no_grad()
def test_encoder_and_decoder_are_those_of_the_cpu(exact, network):
    (encoder, decoder), (cpu_encoder, cpu_decoder) = network(DEVICE), network("cpu")
    images, _ = scenes(4)
    maps, wanted = encoder(images.to(DEVICE)), cpu_encoder(images)
    for one, other in zip(maps, wanted, strict=True):
        close(one, other, 1e-3)
    for one, other in zip(decoder([one.to(DEVICE) for one in wanted]), cpu_decoder(wanted)):
        close(one, other, 1e-3)
    label = source.predict(encoder, decoder, images.to(DEVICE)).argmax(1)
    assert share(label, source.predict(cpu_encoder, cpu_decoder, images).argmax(1)) >= .999


def test_half_precision_changes_few_pixels(network):
    network, images = network(DEVICE), scenes(8)[0].to(DEVICE)
    exact, half = (source.predict(*network, images, half).argmax(1) for half in (False, True))
    assert share(exact, half) >= .97


def test_the_loss_is_that_of_the_cpu(exact, monkeypatch):
    torch.manual_seed(0)
    _, labels = scenes(BATCH)
    labels[:, :20] = IGNORE
    classes = torch.randn(LAYERS, BATCH, QUERIES, CLASSES + 1)
    masks = 3 * torch.randn(LAYERS, BATCH, QUERIES, SHAPE[0] // 4, SHAPE[1] // 4)
    draw, found = torch.randint, []
    monkeypatch.setattr(torch, "randint", lambda *arguments, device: draw(*arguments).to(device))
    for device in (DEVICE, "cpu"):
        torch.manual_seed(1)
        inputs = [part.to(device).requires_grad_() for part in (classes, masks)]
        points = torch.randint(labels[0].numel(), (BATCH, 512), device=device)
        matched = source.match(*inputs, labels.to(device), points, WEIGHTS)
        loss, _ = source.mask_loss(*inputs, labels.to(device), 512, WEIGHTS, .1)
        found.append([matched, loss, *torch.autograd.grad(loss, inputs)])
    one, other = found
    assert torch.equal(one[0].cpu(), other[0])
    for ours, wanted in zip(one[1:], other[1:]):
        close(ours, wanted, 1e-4)


@torch.no_grad()
def test_refinement_is_that_of_the_cpu(exact):
    (images, labels), refined, embeddings = scenes(2), [], []
    for device in (DEVICE, "cpu"):
        sam = selftrain.load_sam(selftrain.SAM).to(device)
        embeddings.append(sam.image_encoder(sam.preprocess(images.float().to(device))))
        for k in range(2):
            random, label = np.random.default_rng(k), labels[k].to(device)
            redrawn, prompts = selftrain.refine(sam, embeddings[-1][k], label, random)
            assert len(prompts)
            refined.append(redrawn)
    close(*embeddings, 1e-3)
    for one, other in zip(refined[:2], refined[2:]):
        assert share(one, other) >= .999 and len(one.unique()) > 3


def test_half_precision_paints_pictures():
    stage = fresh("02_generate")
    stage.STEPS, stage.DTYPE = 8, "float16"
    pipe, options = stage.load_pipeline(stage.DIFFUSION)
    assert pipe.device.type == DEVICE
    assert pipe.unet.dtype == (torch.float16 if CUDA else torch.float32)
    rows = [{"prompt": f"a photo of a {name} in a street", "seed": 5} for name in ("car", "bus")]
    one, other = (np.asarray(image, float) for image in stage.paint(pipe, options, rows))
    assert one.std() > 10 and np.abs(one - other).max() > 10


# ---------------------------------------------------------------------------- the scripts
@pytest.mark.parametrize("stage", ["03_train_source", "04_selftrain"])
def test_a_run_goes_on_with_nearly_the_same_losses(finished, data, tmp_path, stage):
    arguments = stage, *SMALL[stage], f"--OUT={tmp_path}/out"
    stop_at_the_checkpoint(*arguments, run=finished[0], data=data)
    assert here(*arguments, run=finished[0], data=data) is None
    folders = tmp_path / "out", finished[0] / stage
    one, other = ([line["loss"] for line in common.read_lines(folder / "log.jsonl", "step", "loss")]
                  for folder in folders)
    assert one == pytest.approx(other, rel=.02)


@pytest.mark.skipif(not CUDA, reason="only a GPU is waited for")
@pytest.mark.parametrize("stage, most", [
    # the matching: costs to the CPU, matches back
    ("03_train_source", 2),
    # and two small tensors to the GPU: the padding's colour, the number of prompts; for each of two
    # pictures the label to the CPU, its prompts back, six masked sums in SAM's prompt encoder
    ("04_selftrain", 4 + 2 * 8)])
def test_a_step_rarely_waits_for_the_gpu(finished, start, tmp_path, stage, most):
    every = [f"--{name}_EVERY=1000" for name in ("LOG", "SAVE", "PREVIEW")]
    waits = []
    for steps in (2, 6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                assert start(stage, *SMALL[stage], *every, f"--ITERATIONS={steps}",
                             f"--OUT={tmp_path}/{steps}", run=finished[0]) is None
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert 4 <= waits[1] - waits[0] <= 4 * most
