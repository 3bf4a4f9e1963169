"""The miniature SAM against segment_anything's own model, and what its folder may not be."""
import copy
import json
import shutil

import numpy as np
import pytest
import torch
import world
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, Sam

import common
from tests.toy import sam as miniature

FOLDER = common.HERE / "tests/toy/weights/sam"
SQUARE = (256, 256)


@pytest.fixture(scope="module")
def small():
    return miniature.load(FOLDER)


@pytest.fixture(scope="module")
def plain(small):
    """The same weights in segment_anything's own classes, which do work on the padding."""
    sam = copy.deepcopy(small)
    sam.__class__, sam.mask_decoder.__class__ = Sam, MaskDecoder
    return sam


def predict(sam, image, points):
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    return predictor.predict(points, np.ones(len(points)), return_logits=True)


def picture(seed, shape):
    image = Image.fromarray(world.draw(seed, "day")[0])
    return np.asarray(image.resize(shape[::-1]))


def points_in(shape, seed):
    return np.random.default_rng(seed).integers(0, shape[::-1], (5, 2))


def test_a_square_picture_gives_the_masks_of_a_plain_sam(small, plain):
    image, points = picture(1, SQUARE), points_in(SQUARE, 1)
    for ours, theirs in zip(predict(small, image, points), predict(plain, image, points)):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (200, 256), (719, 1281)])
def test_other_shapes_give_the_masks_of_a_plain_sam_that_sees_no_padding(small, plain, shape):
    image, points = picture(2, shape), points_in(shape, 2)
    masks, ratings, low = predict(small, image, points)
    # by hand: normalise, encode the picture's multiples of 16, cut every code to the embedding
    predictor = SamPredictor(plain)
    pixels = predictor.transform.apply_image(image)
    height, width = pixels.shape[:2]
    rows, columns = -(-height // 16) * 16, -(-width // 16) * 16
    with torch.no_grad():
        square = plain.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
        embedding = plain.image_encoder(square[..., :rows, :columns])
        at = torch.from_numpy(predictor.transform.apply_coords(points, shape)).float()[None]
        sparse, dense = plain.prompt_encoder((at, torch.ones(1, 5)), None, None)
        position = plain.prompt_encoder.get_dense_pe()[..., :rows // 8, :columns // 8]
        dense = dense[..., :rows // 8, :columns // 8]
        wanted, rated = plain.mask_decoder(embedding, position, sparse, dense, True)
        padded = torch.zeros(1, 3, 128, 128)
        padded[..., :rows // 2, :columns // 2] = wanted
        enlarged = plain.postprocess_masks(padded, (height, width), shape)
    assert np.array_equal(low, wanted[0]) and np.array_equal(ratings, rated[0])
    assert masks.shape == (3, *shape) and np.array_equal(masks, enlarged[0])


def test_low_resolution_masks_are_prompts_again(small):
    predictor = SamPredictor(small)
    predictor.set_image(picture(3, (128, 256)))
    _, ratings, low = predictor.predict(np.array([[100, 90]]), np.ones(1))
    best = low[None, ratings.argmax()]
    masks, _, again = predictor.predict(np.array([[100, 90]]), np.ones(1), mask_input=best)
    assert low.shape == again.shape == (3, 64, 128) and masks.shape == (3, 128, 256)


def test_five_points_in_a_true_piece_give_back_most_of_it(small):
    found = []
    for seed in world.seeds("validation", "day", 4):
        image, label, *_ = world.draw(seed, "day")
        y, x = np.nonzero(label == world.ROAD)
        chosen = np.random.default_rng(seed).integers(0, len(x), 5)
        masks, ratings, _ = predict(small, image, np.stack((x[chosen], y[chosen]), 1))
        mask, road = masks[ratings.argmax()] > 0, label == world.ROAD
        found.append((mask & road).sum() / (mask | road).sum())
    assert np.mean(found) > .8


def test_it_is_in_eval_mode_without_gradients_and_on_float32(small):
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in small.parameters())


@pytest.mark.parametrize("change", [
    {"blocks": [0, 2, 2, 10 ** 9]}, {"width": 10 ** 9}, {"width": "128"}, {"image_size": 250},
    {"image_size": -256}, {"encoder": [32, 64, 80]}, {"encoder": 32}, {"heads": 3}, {"heads": 0},
    {"stride": 16}])
def test_sizes_out_of_range_stop_with_one_line(tmp_path, change):
    config = json.loads((FOLDER / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.Stop, match=f"config.json: .*{next(iter(change))}") as stopped:
        miniature.load(tmp_path)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name, content", [
    ("config.json", None), ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"),
    ("model.safetensors", None), ("model.safetensors", b"not weights"),
    ("config.json", (FOLDER / "config.json").read_bytes().replace(b"128", b"64"))])
def test_a_missing_or_broken_file_stops_with_one_line(tmp_path, name, content):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(common.Stop, match=str(tmp_path)) as stopped:
        miniature.load(tmp_path)
    assert "\n" not in str(stopped.value)
