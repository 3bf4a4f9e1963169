"""The miniature SAM is a plain one of segment_anything that sees no padding; its broken files."""
import json
import shutil

import numpy as np
import pytest
import torch
import world
from PIL import Image
from references import plain_sam
from segment_anything import SamPredictor

import common
from tests.toy import sam as miniature

SAM = common.HERE / "tests/toy/weights/sam"


@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (256, 128), (200, 256), (719, 1281)])
def test_the_miniature_is_a_plain_sam_that_sees_no_padding(shape):
    image = np.asarray(Image.fromarray(world.draw(2, "day")[0]).resize(shape[::-1]))
    points = np.random.default_rng(2).integers(0, shape[::-1], (5, 2))
    small = miniature.load(SAM)
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in small.parameters())
    predictor = SamPredictor(small)
    predictor.set_image(image)
    masks, ratings, low = predictor.predict(points, np.ones(5), return_logits=True)
    at = torch.from_numpy(predictor.transform.apply_coords(points, shape)).float()[None]
    wanted, rated, large = plain_sam(small, predictor.transform.apply_image(image), at, shape)
    assert np.array_equal(low, wanted) and np.array_equal(ratings, rated)
    assert masks.shape == (3, *shape) and np.array_equal(masks, large)
    # and low masks are prompts again
    masks, _, again = predictor.predict(points, np.ones(5), mask_input=low[None, ratings.argmax()])
    assert low.shape == again.shape and masks.shape == (3, *shape)


CONFIG = (SAM / "config.json").read_bytes()
CHANGES = [{"blocks": [0, 2, 2, 10 ** 9]}, {"width": 10 ** 9}, {"width": "128"},
           {"image_size": 250}, {"image_size": -256}, {"encoder": [32, 64, 80]}, {"encoder": 32},
           {"heads": 3}, {"heads": 0}, {"stride": 16}]
BROKEN = [("config.json", json.dumps(json.loads(CONFIG) | change).encode(), next(iter(change)))
          for change in CHANGES]
BROKEN += [("config.json", content, "config.json") for content in (None, b"{", b"[]", b"\xff")]
BROKEN += [("model.safetensors", content, "restore it") for content in (None, b"not weights")]
BROKEN += [("config.json", CONFIG.replace(b"128", b"64"), "does not hold the weights")]


@pytest.mark.parametrize("name, content, answer", BROKEN)
def test_a_miniature_that_is_broken_stops_with_one_line(tmp_path, name, content, answer):
    shutil.copytree(SAM, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(common.Stop, match=str(tmp_path)) as stopped:
        miniature.load(tmp_path)
    assert answer in str(stopped.value) and "\n" not in str(stopped.value)
