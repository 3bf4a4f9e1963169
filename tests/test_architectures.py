"""The paper's real architectures, with random weights because there is no hub here: one training
step and one prediction each, at a small size. SAM's own is in test_rehearsal.py."""
import hashlib
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from references import load_nothing

import common
from conftest import fresh

stage = import_module("03_train_source")

RESNET = [256, 512, 1024, 2048]
ENCODERS = {        # channels at strides 4, 8, 16 and 32; millions of parameters
    "open_clip:convnext_large_d_320/laion2b_s29b_b131k_ft_soup": ([192, 384, 768, 1536], 199.8),
    "open_clip:RN50-quickgelu/openai": (RESNET, 38.3),
    "open_clip:RN101-quickgelu/openai": (RESNET, 56.3),
    "timm:resnet101.tv_in1k": (RESNET, 42.5),
    "timm:convnext_tiny.dinov3_lvd1689m": ([96, 192, 384, 768], 27.8),
    "timm:vit_base_patch14_dinov2.lvd142m": ([768] * 4, 86.6),
    "timm:vit_small_patch16_dinov3.lvd1689m": ([384] * 4, 21.6),
    "transformers:nvidia/mit-b5": ([64, 128, 320, 512], 81.4)}


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name, channels, size", [
    pytest.param(name, *about, marks=[pytest.mark.slow] if about[1] > 40 else [])
    for name, about in ENCODERS.items()])
def test_one_step_and_one_prediction(monkeypatch, name, channels, size):
    load_nothing(monkeypatch)
    torch.manual_seed(0)
    encoder = stage.Encoder(name)
    assert list(encoder.channels) == channels and abs(millions(encoder) - size) < .1
    decoder = stage.Decoder(encoder.channels, 19, 256, 100, 6, 512, 3)      # as the paper's presets
    assert 7 < millions(decoder) < 10
    images = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
    labels = torch.arange(96).div(6, rounding_mode="floor").expand(1, 64, -1).clone()

    features = encoder(images)
    for found, c, stride in zip(features, channels, (4, 8, 16, 32), strict=True):
        assert found.shape == (1, c, 64 // stride, 96 // stride) and not found.requires_grad
    classes, masks = decoder(features)
    assert classes.shape == (7, 1, 100, 20) and masks.shape == (7, 1, 100, 16, 24)

    loss, _ = stage.mask_loss(classes, masks, labels, 128, (2, 5, 5), .1)
    loss.backward()
    before = decoder.class_head.weight.clone()
    optimizer, trained = stage.make_optimizer([(decoder, 1), (encoder, .1)], .05)
    assert sum(p.numel() for p in trained) / 1e6 == millions(decoder)
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    optimizer.step()
    assert not torch.equal(before, decoder.class_head.weight)

    images = torch.randint(0, 255, (1, 3, 50, 70), dtype=torch.uint8)
    scores = stage.predict(encoder, decoder.eval(), images)
    assert scores.shape == (1, 19, 50, 70) and scores.isfinite().all()


def test_sams_official_weights_are_fetched_once_and_checked(monkeypatch, tmp_path):
    selftrain, content = fresh("04_selftrain"), bytes(range(256)) * 10
    name = f"sam_vit_b_{hashlib.md5(content).hexdigest()[:6]}.pth"
    there, here = tmp_path / "page" / name, tmp_path / "weights" / name
    there.parent.mkdir()
    there.write_bytes(content)
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(selftrain, "sam_files", {"vit_b": name})
    monkeypatch.setattr(selftrain, "sam_page", f"file://{tmp_path}/page/")
    read = []

    def build(weights):
        read.append(weights.read_bytes())
        return torch.nn.Linear(1, 1)
    monkeypatch.setattr(selftrain, "sam_model_registry", {"vit_b": build})

    with pytest.raises(common.Stop, match="SAM=vit_x: no such folder, and none of vit_b"):
        selftrain.load_sam("vit_x")
    sam = selftrain.load_sam("vit_b")
    assert not sam.training and not sam.weight.requires_grad
    there.write_bytes(content[:-1])
    selftrain.load_sam("vit_b")                     # from the file that is there by now
    assert read == [content, content]
    here.unlink()
    for _ in range(2):                              # damaged on its way; then not there at all
        with pytest.raises(common.Stop, match="weights by hand") as stopped:
            selftrain.load_sam("vit_b")
        assert "--REFINE=off" in str(stopped.value) and not list(here.parent.glob("[!.]*"))
        there.unlink(missing_ok=True)
    assert len(read) == 2

    def lock(path):                                 # another process downloads it meanwhile
        return nullcontext(here.write_bytes(b"fetched"))
    monkeypatch.setattr(selftrain, "FileLock", lock)
    selftrain.load_sam("vit_b")
    assert read[2:] == [b"fetched"]
