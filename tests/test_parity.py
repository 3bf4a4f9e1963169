"""Every part that has a library behind it, against that library itself: encoders, decoder, first
weights, class scores, SAM, colour jitter, half precision."""
import inspect
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import world
from PIL import Image
from references import (Recorder, copy_decoder, copy_layer, filled, mask2former, projection,
                        ssd_jitter, stages_of, their_position, tiny_sam, write_convnext,
                        write_resnet, write_timm, xavier)
from safetensors.torch import load_file
from segment_anything import SamPredictor
from torch import nn
from torchvision.transforms.functional import normalize
from transformers import SegformerConfig, SegformerModel
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

import common
from conftest import fresh
from tests.toy import sam as miniature

stage = fresh("03_train_source")
CLIP = common.HERE / "tests/toy/weights/clip"
SAM = common.HERE / "tests/toy/weights/sam"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------ encoders
OWN = (.1, .2, .4), (.4, .5, .6)
IMAGENET = (.485, .456, .406), (.229, .224, .225)


def assert_equal(encoder, features, mean, std, channels):
    """Four maps, equal bit for bit to the library's of a picture normalised by torchvision, in
    train mode too, and after that nothing has moved."""
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    encoder.body.to(memory_format=torch.contiguous_format)      # another order of adding rounds
    before = {name: value.clone() for name, value in encoder.body.state_dict().items()}
    with torch.no_grad():
        wanted = features(normalize(images / 255, mean, std))
    assert len(wanted) == 4 and list(encoder.channels) == channels
    for stride, c, found, other in zip((4, 8, 16, 32), channels, encoder.train()(images), wanted):
        assert found.shape == (2, c, 64 // stride, 96 // stride) and not found.requires_grad
        assert torch.equal(found, other)
    after = encoder.body.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert encoder.fill == tuple(round(255 * m) for m in mean)


def assert_loaded(encoder, path, prefix=""):
    """What the library loaded is what the file holds: loading has moved no statistics."""
    stored = load_file(path)
    for name, value in encoder.body.state_dict().items():
        assert torch.equal(value, stored[prefix + name]), name


@pytest.mark.parametrize("write, channels", [
    (None, [96, 192, 384, 768]),                        # the miniature
    (write_convnext, [40, 80, 160, 320]), (write_resnet, [32, 64, 128, 256])])
def test_cnn_towers_equal_open_clips(tmp_path, write, channels):
    folder = tmp_path if write else CLIP
    if write:
        write(folder)
    encoder = stage.Encoder(f"open_clip:local-dir:{folder}")
    tower = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).visual.eval()
    assert_loaded(encoder, folder / "open_clip_model.safetensors", "visual.")
    if hasattr(tower, "trunk"):
        features = stages_of(tower.trunk.stem, tower.trunk.stages)
    else:
        layers = tower.layer1, tower.layer2, tower.layer3, tower.layer4
        features = stages_of(tower.stem, layers)
    mean = OWN if write else (tower.image_mean, tower.image_std)
    assert_equal(encoder, features, *mean, channels)


def test_timm_cnns_equal_timms(tmp_path):
    write_timm(tmp_path)
    encoder = stage.Encoder(f"timm:local-dir:{tmp_path}")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_loaded(encoder, tmp_path / "model.safetensors")
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    features = stages_of(stem, (model.layer1, model.layer2, model.layer3, model.layer4))
    assert_equal(encoder, features, *OWN, [64, 128, 256, 512])


@pytest.mark.parametrize("patch", [16, 14])
def test_plain_vits_are_the_ends_of_four_quarters_resized(tmp_path, patch):
    write_timm(tmp_path, "vit_tiny_patch16_224", patch_size=patch, img_size=4 * patch, depth=8,
               embed_dim=32, num_heads=2)
    encoder = stage.Encoder(f"timm:local-dir:{tmp_path}")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dynamic_img_size=True)
    ends = []
    for k in (1, 3, 5, 7):
        model.blocks[k].register_forward_hook(lambda block, x, tokens: ends.append(tokens))

    def features(x):
        height, width = (side // 16 for side in x.shape[-2:])
        model.eval()(F.interpolate(x, (height * patch, width * patch), mode="bicubic"))
        maps = [tokens[:, 1:].mT.unflatten(2, (height, width)) for tokens in ends]
        sizes = [(height * 4 // k, width * 4 // k) for k in (1, 2, 4, 8)]
        return [F.interpolate(m, size, mode="bilinear") for m, size in zip(maps, sizes)]
    assert_equal(encoder, features, *OWN, [32] * 4)


def test_segformers_equal_transformers(tmp_path):
    config = SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], drop_path_rate=.5,
                             num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16)
    SegformerModel(config).save_pretrained(tmp_path)
    encoder = stage.Encoder(f"transformers:local-dir:{tmp_path}")
    model = SegformerModel.from_pretrained(tmp_path).eval()

    def features(x):
        outputs = model(x, output_hidden_states=True)
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        return outputs.hidden_states
    assert_equal(encoder, features, *IMAGENET, [8, 16, 24, 32])


def test_a_trainable_encoder_gets_gradients_and_a_frozen_one_none():
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    encoder = stage.Encoder(f"open_clip:local-dir:{CLIP}", frozen=False)
    sum(f.mean() for f in encoder(images)).backward()
    assert encoder.body.conv1.weight.grad.abs().max() > 0 and encoder.body.training
    encoder.freeze(True)
    assert set(stage.network(encoder, encoder)) == {"decoder", "encoder"}       # it once trained
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.train().modules())
    encoder = stage.Encoder(f"open_clip:local-dir:{CLIP}")
    assert set(stage.network(encoder, encoder)) == {"decoder"}
    encoder.body.conv1.weight.requires_grad_(True)              # an edit: a part of it trains
    assert set(stage.network(encoder, encoder)) == {"decoder", "encoder"}


# ------------------------------------------------------------ decoder
def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_a_query_layer_equals_mask2formers():
    theirs = mask2former().decoder.layers[0]
    ours = stage.QueryLayer(64, 8, 48).double().requires_grad_(False)
    copy_layer(ours, theirs)
    queries, embed = double(2, 7, 64), double(2, 7, 64)
    memory, code = double(2, 24, 64), double(1, 24, 64)
    hidden = torch.rand(2, 7, 24) < .5
    seen = hidden[:, None].expand(-1, 8, -1, -1).flatten(0, 1)
    wanted, = theirs(queries.mT.movedim(2, 0), 0, None, [code.transpose(0, 1)],
                     embed.transpose(0, 1), [memory.transpose(0, 1)], seen)
    found = ours(queries, embed, memory, code, hidden)
    assert torch.allclose(found, wanted.transpose(0, 1), atol=1e-9)


@torch.no_grad()
def test_the_decoders_queries_equal_mask2formers(monkeypatch):
    theirs = mask2former()
    ours = stage.Decoder([8] * 4, 5, 64, queries=7, layers=4, width=48, pixel_layers=0).double()
    copy_decoder(ours, theirs)
    levels = [double(2, 64, 2 * k, 3 * k) for k in (1, 2, 4)]
    pixels = double(2, 64, 16, 24)
    pixels[:, 0] = 15                  # some masks are empty: their queries attend everywhere
    wanted = theirs([level.clone() for level in levels], pixels)
    monkeypatch.setattr(ours, "pixels", lambda features: (levels, pixels))
    monkeypatch.setattr(stage, "position_code", their_position)      # ours has other channels first
    classes, masks = ours(None)
    empty = (masks[:-1] <= 0).flatten(3).all(-1)
    assert empty.any() and not empty.all()
    for found, its in zip(masks, wanted.masks_queries_logits, strict=True):
        assert torch.allclose(found, its, atol=1e-9)
    for found, its in zip(classes, wanted.intermediate_hidden_states, strict=True):
        assert torch.allclose(found, ours.class_head(its.transpose(0, 1)), atol=1e-9)


@pytest.mark.parametrize("height, width, dim", [(5, 7, 64), (24, 24, 256)])
def test_the_position_code_is_mask2formers(height, width, dim):
    # theirs has sine and cosine in turn, ours all sines of an axis and then all cosines
    order = torch.arange(dim).view(2, dim // 4, 2).mT.flatten()
    maps = torch.zeros(1, dim, height, width)
    assert torch.allclose(stage.position_code(maps), their_position(maps)[..., order], atol=1e-5)


@pytest.mark.skipif("return_segmentation_scores" not in inspect.signature(
    Mask2FormerImageProcessor.post_process_semantic_segmentation).parameters,
    reason="needs a newer transformers")
def test_class_scores_are_mask2formers():
    classes, masks = 2 * torch.randn(2, 20, 13), 4 * torch.randn(2, 20, 96, 96)
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    theirs = Mask2FormerImageProcessor().post_process_semantic_segmentation(
        outputs, [(384, 384)] * 2, return_segmentation_scores=True)
    for ours, its in zip(stage.semantic(classes, masks, (384, 384)), theirs):
        assert torch.allclose(ours, its["segmentation_scores"], atol=1e-5)


def test_predict_pads_with_the_mean_colour_and_cuts():
    encoder = stage.Encoder(f"open_clip:local-dir:{CLIP}")
    decoder = stage.Decoder(encoder.channels, 5, 32, 7, 2, 32, 1).eval()
    images = torch.randint(0, 256, (1, 3, 45, 71), dtype=torch.uint8)
    padded = torch.tensor(encoder.fill).byte().view(1, 3, 1, 1).repeat(1, 1, 64, 96)
    padded[..., :45, :71] = images
    with torch.no_grad():
        classes, masks = decoder(encoder(padded))
    masks = F.interpolate(masks[-1], (64, 96), mode="bilinear").sigmoid()[..., :45, :71]
    wanted = torch.einsum("bqc,bqhw->bchw", classes[-1].softmax(-1)[..., :-1], masks)
    assert torch.allclose(stage.predict(encoder, decoder, images), wanted, atol=1e-5)


# ------------------------------------------------------------ first weights
def same_spread(ours, theirs):
    """Standard deviations within 2 %, of a bias's few values within 20 % (of 20 values: 60 %)."""
    for (name, value), (other, wanted) in zip(ours.named_parameters(), theirs.named_parameters(),
                                              strict=True):
        n = value.numel()
        tolerance = .02 if n > 3_000 else .2 if n > 100 else .6
        assert name == other and abs(value.std() - wanted.std()) <= tolerance * wanted.std(), name


def test_all_layers_begin_as_mask2formers():
    wide = stage.Decoder([192, 384, 768, 1536], 19, 256, 100, 1, 512, 1)
    layer, feed = wide.layers[0], wide.pixel_layers[0].feed
    for attention in (layer.cross_attention, layer.self_attention):
        same_spread(attention, xavier(nn.MultiheadAttention(256, 8)))
    same_spread(layer.feed[0], xavier(nn.Linear(256, 512)))
    same_spread(layer.feed[2], xavier(nn.Linear(512, 256)))
    same_spread(feed[0], xavier(nn.Conv2d(256, 512, 1)))
    same_spread(feed[2], xavier(nn.Conv2d(512, 256, 1)))
    same_spread(wide.class_head, nn.Linear(256, 20))
    for k in (0, 2, 4):
        same_spread(wide.mask_head[k], nn.Linear(256, 256))
    for embedding, tolerance in (wide.query, .02), (wide.query_position, .02), (wide.level, .1):
        assert abs(embedding.weight.std() - 1) < tolerance and embedding.weight.mean().abs() < .2
    same_spread(wide.mask_features, filled(256, 1))
    same_spread(wide.smooth[3][0], filled(256, 3))
    same_spread(wide.lateral[0][0], filled(192, 1))
    for lateral, channels in zip(wide.lateral[1:], (384, 768, 1536)):
        same_spread(lateral[0], projection(channels))


# ------------------------------------------------------------ SAM
@pytest.fixture
def selftrain(tmp_path):
    module = fresh("04_selftrain")
    module.RUN = str(tmp_path)
    return module


def miniature_sam():
    return miniature.load(SAM)


def scene(shape, seed=3):
    image = torch.from_numpy(np.array(world.draw(seed, "day")[0])).permute(2, 0, 1)[None].float()
    return F.interpolate(image, shape, mode="bilinear")[0].byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("make", [tiny_sam, miniature_sam])
@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (200, 256), (96, 96), (719, 1281)])
def test_masks_are_sam_predictors_best(selftrain, make, shape):
    sam = make()
    predictor = SamPredictor(sam)
    predictor.set_image(scene(shape))
    points = torch.rand(7, 5, 2) * torch.tensor(shape[::-1])
    scaled = predictor.transform.apply_coords_torch(points, shape)
    masks, ratings, _ = predictor.predict_torch(scaled, torch.ones(7, 5), return_logits=True)
    first, second = ratings.topk(2).values.T
    assert (first - second).min() > 1e-5                # no tie that rounding could decide
    wanted = masks[torch.arange(7), ratings.argmax(1)]
    selftrain.SAM_CHUNK = 3
    found = selftrain.sam_masks(sam, predictor.features[0], points, shape)
    assert found.dtype == torch.bool and found.shape == (7, *shape)
    sure = wanted.abs() > 1e-3 * wanted.std()           # the others may fall to either side
    assert sure.float().mean() > .998 and .02 < (wanted > 0).float().mean() < .98
    assert torch.equal(found[sure], wanted[sure] > 0)


@pytest.mark.parametrize("make", [tiny_sam, miniature_sam])
@pytest.mark.parametrize("batch", [1, 2])
def test_embeddings_are_sam_predictors_in_half_precision(selftrain, tmp_path, make, batch):
    sam, files = make(), [tmp_path / f"{k}.png" for k in range(3)]
    for k, file in enumerate(files):
        Image.fromarray(scene((128, 256), k)).save(file)
    selftrain.SAM_BATCH = batch
    paths = selftrain.embed_pictures(sam, files, (128, 256), False)
    predictor = SamPredictor(sam)
    for file, path in zip(files, paths):
        predictor.set_image(np.asarray(common.read_image(file)))
        stored, wanted = np.load(path), predictor.features[0].half().numpy()
        assert stored.dtype == np.float16
        assert np.allclose(stored, wanted, rtol=1e-3, atol=1e-4)        # one step of float16


# ------------------------------------------------------------ colour jitter
BRIGHTNESS, FACTOR, HUE = (-32, 32), (.5, 1.5), (-18, 19)


def difference(found, image, *steps):
    return (found.int() - ssd_jitter(image, *steps)).abs().max().item()


@pytest.fixture(scope="module")
def jittered():
    """An image, and 600 draws of it -> [(amounts that were drawn, result)]"""
    image = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    image[:, 0], image[:, 1] = 128, 0                                   # grey and black
    draws = []
    for seed in range(600):
        random = Recorder(seed)
        draws.append((random.amounts, stage.colour_jitter(image, random)))
    return image, draws


def test_each_step_of_the_colour_jitter_alone_is_ssds(jittered):
    image, draws = jittered
    single = [(*amounts[0], found) for amounts, found in draws if len(amounts) == 1]
    of_factor = [(amount, found) for between, amount, found in single if between == FACTOR]
    for between, name in ((BRIGHTNESS, "brightness"), (HUE, "hue")):
        chosen = [(amount, found) for other, amount, found in single if other == between]
        assert len(chosen) > 15
        assert max(difference(found, image, (name, amount)) for amount, found in chosen) <= 2
    # contrast and saturation draw from one range: each result is one of the two
    fits = [[difference(found, image, (name, amount)) <= 2 for name in ("contrast", "saturation")]
            for amount, found in of_factor]
    assert all(contrast or saturation for contrast, saturation in fits)
    alone = [sum(fit == wanted for fit in fits) for wanted in ([True, False], [False, True])]
    assert min(alone) > 15


def test_contrast_comes_before_or_after_the_colours_with_equal_chances(jittered):
    image, draws = jittered
    first = last = 0
    for amounts, found in draws:
        if sorted(between for between, _ in amounts) != [FACTOR, FACTOR]:
            continue
        orders = []
        for (_, contrast), (_, saturation) in (amounts, amounts[::-1]):
            steps = [("contrast", contrast), ("saturation", saturation)]
            orders.append([difference(found, image, *order) for order in (steps, steps[::-1])])
        one, other = np.min(orders, 0)
        assert min(one, other) <= 3                 # two roundings
        first, last = first + (one < other), last + (other < one)
    assert first > 8 and last > 8


def test_each_step_comes_in_half_of_the_draws(jittered):
    drawn = [[between for between, _ in amounts] for amounts, _ in jittered[1]]
    counts = [np.mean([names.count(k) for names in drawn]) for k in (BRIGHTNESS, FACTOR, HUE)]
    assert np.abs(np.array(counts) - (.5, 1, .5)).max() < .1            # 3.5 standard deviations


# ------------------------------------------------------------ half precision
def test_half_precision_keeps_the_scores():
    encoder = stage.Encoder(f"open_clip:local-dir:{CLIP}")
    decoder = stage.Decoder(encoder.channels, 12, 64, 24, 3, 128, 3).eval()
    images = torch.stack([torch.from_numpy(scene((128, 256), k)).permute(2, 0, 1) for k in (3, 4)])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    for maps, other in zip(encoder(images), rounded):
        assert (maps - other).norm() < .02 * maps.norm()
    full, half = (stage.predict(encoder, decoder, images, half) for half in (False, True))
    assert half.dtype == torch.float32 and 0 < (full - half).norm() < .01 * full.norm()


def test_half_precision_keeps_sams_masks(selftrain):
    sam, shape = miniature_sam(), (128, 256)
    predictor = SamPredictor(sam)
    predictor.set_image(scene(shape))
    points = torch.rand(7, 1, 2) * torch.tensor(shape[::-1]) + torch.zeros(7, 5, 2)
    full = selftrain.sam_masks(sam, predictor.features[0], points, shape)
    with torch.autocast("cpu", torch.bfloat16):
        half = selftrain.sam_masks(sam, predictor.features[0], points, shape)
    assert 0 < (full != half).float().mean() < .002
