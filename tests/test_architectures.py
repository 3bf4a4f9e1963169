"""The paper's real architectures, with random weights because there is no hub here: one training step and one prediction each, at a small size."""
import numpy as np
import pytest
import torch

import common
from conftest import fresh

ENCODERS = {"convnext_large_d_320/laion2b_s29b_b131k_ft_soup": ([192, 384, 768, 1536], 199.8), "RN50-quickgelu/openai": ([256, 512, 1024, 2048], 38.3), "RN101-quickgelu/openai": ([256, 512, 1024, 2048], 56.3),
            "timm:resnet50.tv_in1k": ([256, 512, 1024, 2048], 23.5), "transformers:nvidia/mit-b5": ([64, 128, 320, 512], 81.4), "timm:vit_base_patch14_dinov2.lvd142m": ([768] * 4, 86.6)}


@pytest.fixture
def random_weights(monkeypatch):
    import open_clip
    import timm
    import transformers
    clip, made = open_clip.create_model, timm.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, require_pretrained: clip(name))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: made(name, pretrained=False, **more))
    monkeypatch.setattr(transformers.SegformerModel, "from_pretrained", lambda name: transformers.SegformerModel(transformers.SegformerConfig(depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512])))


@pytest.mark.parametrize("name", ENCODERS)
def test_one_step_and_one_prediction(random_weights, monkeypatch, name):
    channels, millions = ENCODERS[name]
    torch.manual_seed(0)
    encoder = common.Encoder(name)
    assert encoder.channels == channels and abs(sum(p.numel() for p in encoder.parameters()) / 1e6 - millions) < .1
    decoder = common.Decoder(channels, 19, 256, 100, 6, 512, 3)                       # the paper presets' size
    assert 7e6 < sum(p.numel() for p in decoder.parameters()) < 10e6
    images, labels = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8), torch.arange(96).div(6, rounding_mode="floor").expand(1, 64, -1).clone()
    features = encoder(images)
    assert [tuple(f.shape[-2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    *predictions, finish = common.in_parts(encoder, decoder, images)
    assert predictions[0].shape == (7, 1, 100, 20) and predictions[1].shape == (7, 1, 100, 16, 24)
    loss, _ = common.mask_loss(*predictions, labels, 128, common.seeded(0))
    loss.backward(), finish()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None) and not any(p.requires_grad for p in encoder.parameters())
    common.make_optimizer(decoder, .05).step()
    scores = common.predict(encoder, decoder.eval(), torch.randint(0, 255, (1, 3, 50, 70), dtype=torch.uint8))
    assert scores.shape == (1, 19, 50, 70) and torch.isfinite(scores).all()


def test_sam_vit_b_refines_through_the_function_of_the_miniature(monkeypatch, tmp_path):
    from segment_anything import sam_model_registry
    stage = fresh("04_selftrain")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    torch.save(sam_model_registry["vit_b"]().state_dict(), tmp_path / "weights" / stage.SAM_FILES["vit_b"])
    sam = stage.load_sam("vit_b")
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    embedding = stage.sam_encode(sam, image)
    assert embedding.shape == (1, 256, 64, 64)
    stage.SAM_MIN_AREA = 50
    label = np.zeros((96, 128), np.uint8)
    label[:, 64:] = 7
    redrawn, prompts = stage.refine(sam, embedding, label[None], [common.randomness(0)])
    assert redrawn.shape == (1, 96, 128) and [(image, cls, points.shape) for image, cls, points in prompts] == [(0, 0, (5, 2)), (0, 7, (5, 2))]
    assert set(redrawn.unique().tolist()) <= {0, 7, common.IGNORE}
