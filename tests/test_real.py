"""Real data, for those who have it: REAL=FOLDER with cityscapes/ in it as downloaded, whole or in part. Skipped otherwise."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from test_eval import official, ours, stage  # noqa: F401

REAL = Path(os.environ.get("REAL", ""))
pytestmark = pytest.mark.skipif(not (REAL / "cityscapes").is_dir(), reason="set REAL to a data folder with cityscapes/ in it")


def test_cityscapes_labels_are_read_and_scored_as_cityscapesscripts_does(stage, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(common, "DATA", str(REAL))
    found, ids = common.pairs("cityscapes", "val")[:3], np.array(list(common.CITYSCAPES_IDS))
    truths = [np.asarray(Image.open(label)) for _, label in found]
    for (image, label), truth in zip(found, truths):
        read = common.read_label(label, "cityscapes", common.read_image(image).size)
        assert (read[truth == 26] == 13).all() and (read[truth == 7] == 0).all() and (read[truth < 7] == common.IGNORE).all()
    random = np.random.default_rng(0)
    guesses = [np.where(random.random(t.shape) < .7, np.roll(np.maximum(t, 7), 9, 1), 26) for t in truths]
    guesses = [np.where(np.isin(g, ids), g, 7) for g in guesses]
    mean, each = official(tmp_path, zip(guesses, truths))
    our_mean, our_each = ours(stage, monkeypatch, zip(guesses, truths))
    assert abs(our_mean - mean) < 1e-9 and all(np.isnan(v) and np.isnan(each[k]) or abs(v - each[k]) < 1e-9 for k, v in our_each.items())
