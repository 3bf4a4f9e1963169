"""Each real library path on a tiny model in the library's own format: what loads here loads the paper's models by the same lines."""
import json

import numpy as np
import pytest
import torch

import common
from conftest import fresh


def open_clip_folder(folder):
    import open_clip
    from safetensors.torch import save_file
    config = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "mlp", "timm_drop_path": .1, "image_size": 64},
              "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [.1, .2, .4], "std": [.4, .5, .6]}}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


def timm_folder(folder, architecture="resnet18"):
    import timm
    from safetensors.torch import save_file
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": architecture, "num_classes": 5, "pretrained_cfg": {"num_classes": 5, "mean": [.1, .2, .4], "std": [.4, .5, .6]}}))
    save_file(timm.create_model(architecture, num_classes=5).state_dict(), folder / "model.safetensors")


def vit_folder(folder):
    timm_folder(folder, "test_vit")


def segformer_folder(folder):
    from transformers import SegformerConfig, SegformerModel
    SegformerModel(SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16)).save_pretrained(folder)


@pytest.mark.parametrize("make, channels", [(open_clip_folder, [40, 80, 160, 320]), (timm_folder, [64, 128, 256, 512]), (vit_folder, [64] * 4), (segformer_folder, [8, 16, 24, 32])])
def test_an_encoder_of_each_library_gives_four_maps_and_stays_frozen(tmp_path, make, channels):
    torch.manual_seed(0)
    make(tmp_path / "encoder")
    encoder = common.Encoder(f"local-dir:{tmp_path}/encoder").train()
    images = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
    features = encoder(images)
    assert encoder.channels == channels and [tuple(f.shape[1:]) for f in features] == [(c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32))]
    assert not any(m.training for m in encoder.modules()) and not any(f.requires_grad for f in features)
    assert all(torch.equal(a, b) for a, b in zip(features, encoder(images)))        # no DropPath, no moving statistics
    if make is not segformer_folder:
        assert encoder.fill == (26, 51, 102)


@pytest.mark.parametrize("name, patch", [("vit_tiny_patch16_224", 16), ("vit_small_patch14_dinov2", 14), ("eva02_tiny_patch14_224", 14)])
def test_a_plain_vit_gives_the_ends_of_its_quarters_at_four_strides(monkeypatch, name, patch):
    import timm
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: make(name, pretrained=False, **more))      # no hub here: random weights
    encoder = common.Encoder(f"timm:{name}")
    seen = []
    encoder.body.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[-2:])))
    features = encoder(torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8))
    assert encoder.patch == patch and seen == [(4 * patch, 6 * patch)]             # the patches lie on the grid of stride 16, whatever their size
    assert [tuple(f.shape[-2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)] and encoder.body.out_indices == [2, 5, 8, 11]


def test_the_trainable_encoder_gets_gradients():
    encoder = common.Encoder("local-dir:tests/toy/weights/clip", frozen=False)
    sum(f.mean() for f in encoder(torch.randint(0, 255, (2, 3, 32, 64), dtype=torch.uint8))).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_a_copied_encoder_is_its_own(tmp_path):
    import copy
    student = common.Encoder("local-dir:tests/toy/weights/clip", frozen=False).eval()
    teacher, images = copy.deepcopy(student), torch.randint(0, 255, (1, 3, 32, 64), dtype=torch.uint8)
    before = teacher(images)[0]
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert torch.equal(teacher(images)[0], before) and not torch.equal(student(images)[0], before)


def test_prompts_of_several_images_in_one_pass_equal_segment_anythings_own_decoder():
    stage = fresh("04_selftrain")
    sam = stage.load_sam("tests/toy/weights/sam")
    torch.manual_seed(0)
    embeddings, points = torch.randn(2, *sam.prompt_encoder.get_dense_pe().shape[1:]), torch.rand(5, 3, 2) * 256
    which = torch.tensor([1, 0, 0, 1, 1])
    masks, scores = stage.sam_decode(sam, embeddings, which, points)
    for k in range(5):
        sparse, dense = sam.prompt_encoder(points=(points[k:k + 1], torch.ones(1, 3)), boxes=None, masks=None)
        own, rated = sam.mask_decoder(image_embeddings=embeddings[which[k]][None], image_pe=sam.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True)
        assert torch.allclose(masks[k], own[0], atol=1e-3) and torch.allclose(scores[k], rated[0], atol=1e-4)


def test_sam_is_in_eval_mode_without_gradients_and_its_embedding_equals_the_predictors():
    from segment_anything import SamPredictor
    sam = fresh("04_selftrain").load_sam("tests/toy/weights/sam")
    assert not any(m.training for m in sam.modules()) and not any(p.requires_grad for p in sam.parameters())
    image = np.random.default_rng(0).integers(0, 255, (128, 256, 3), np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    assert torch.equal(fresh("04_selftrain").sam_encode(sam, torch.from_numpy(image).permute(2, 0, 1)), predictor.features)


def test_sams_official_weights_are_fetched_once_and_checked(monkeypatch, tmp_path):
    import hashlib
    stage = fresh("04_selftrain")
    (tmp_path / "page").mkdir()
    body = bytes(range(256)) * 10
    name = f"sam_vit_b_{hashlib.md5(body).hexdigest()[:6]}.pth"
    (tmp_path / "page" / name).write_bytes(body)
    stage.SAM_FILES, stage.SAM_PAGE = {"vit_b": name}, f"file://{tmp_path}/page/"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "reachable", lambda host: True)
    assert not stage.to_fetch("vit_b")                                             # HF_HUB_OFFLINE=1 in these tests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert stage.to_fetch("vit_b") and not stage.to_fetch("tests/toy/weights/sam")
    stage.fetch_sam("vit_b")
    assert (tmp_path / "weights" / name).read_bytes() == body and not stage.to_fetch("vit_b")
    (tmp_path / "weights" / name).unlink()
    (tmp_path / "page" / name).write_bytes(body[:-1])
    with pytest.raises(common.Stop, match="did not arrive whole .2559 bytes"):
        stage.fetch_sam("vit_b")
    assert not list((tmp_path / "weights").iterdir())
    (tmp_path / "page" / name).unlink()
    with pytest.raises(common.Stop, match="could not be fetched"):
        stage.fetch_sam("vit_b")


def test_the_same_functions_take_the_registrys_vit(monkeypatch):
    from segment_anything.build_sam import _build_sam
    stage = fresh("04_selftrain")
    sam = _build_sam(encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=[1]).eval()       # vit_b's class and decoder with a thin trunk
    embedding = stage.sam_encode(sam, torch.randint(0, 255, (3, 60, 90), dtype=torch.uint8))
    masks, scores = stage.sam_decode(sam, embedding, torch.zeros(2, dtype=torch.int64), torch.rand(2, 5, 2) * 600)
    assert embedding.shape == (1, 256, 64, 64) and masks.shape == (2, 3, 256, 256) and scores.shape == (2, 3)


def test_the_llm_answers_and_the_painter_paints_the_same_picture_for_the_same_seed():
    pipe = fresh("02_generate")
    pipe.STEPS = 2
    paint = pipe.load_pipeline("tests/toy/weights/diffusion")
    a, b = (paint(["a photo of a car in the rain", "a photo of a bus in the snow"], [3, 4]) for _ in range(2))
    assert a[0].size == (256, 128) and all(np.array_equal(x, y) for x, y in zip(a, b)) and not np.array_equal(a[0], a[1])
