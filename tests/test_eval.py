"""Scores counted by hand."""
import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import fresh

IGNORE = 255


@pytest.fixture
def stage(monkeypatch):
    module = fresh("05_eval")
    module.CLASSES, module.SCORED = ["a", "b", "c"], ("a", "b", "c")
    return module


TRUTH = np.array([[0, 0, 1], [0, 1, 1], [IGNORE, IGNORE, 0]])
GUESS = np.array([[0, 1, 1], [0, 1, 2], [2, 0, 0]])


def test_the_confusion_matrix_counts_labelled_pixels_only(stage):
    assert stage.confusion(TRUTH, GUESS, 3).tolist() == [[3, 1, 0], [0, 2, 1], [0, 0, 0]]


def test_native_counts_a_class_that_is_only_predicted_as_zero(stage):
    matrix = stage.confusion(TRUTH, GUESS, 3)
    assert np.allclose(stage.iou(matrix), [3 / 4, 2 / 4, 0])                       # a: 3 of 3 + 1; b: 2 of 2 + 1 + 1; c: 0 of 1
    assert abs(stage.mean_iou(matrix)[0] - 100 * (3 / 4 + 2 / 4) / 3) < 1e-9


def test_clouds_leaves_such_a_class_out(stage):
    stage.PROTOCOL = "clouds"
    mean, each = stage.mean_iou(stage.confusion(TRUTH, GUESS, 3))
    assert each == {"a": 75., "b": 50., "c": None} and abs(mean - 62.5) < 1e-9


def test_a_class_in_neither_is_left_out_by_both(stage):
    matrix = stage.confusion(TRUTH % 254 % 2, np.zeros((3, 3), int), 3)
    assert np.isnan(stage.iou(matrix)[2]) and np.isnan(stage.iou(matrix, absent_counts=False)[2])


def test_sixteen_classes_are_the_mean_of_their_own_ious(stage):
    stage.SCORED = ("a", "c")
    mean, each = stage.mean_iou(stage.confusion(TRUTH, GUESS, 3))                  # what was taken for b still counts as an error of a
    assert list(each) == ["a", "c"] and abs(mean - 37.5) < 1e-9


def test_the_matrix_of_two_images_is_their_sum_not_a_mean_of_means(stage):
    a, b = stage.confusion(np.zeros(9, int), np.zeros(9, int), 3), stage.confusion(np.ones(1, int), np.zeros(1, int), 3)
    assert np.allclose(stage.iou(a + b)[:2], [9 / 10, 0])


# ---------------------------------------------------------------------------- against cityscapesScripts
def official(tmp_path, pairs_of_ids):
    """cityscapesScripts' own mean and class scores of [(prediction, truth)] in label ids."""
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = scripts.args
    args.evalInstLevelScore = args.evalPixelAccuracy = args.JSONOutput = False
    args.quiet = True
    files = []
    for i, arrays in enumerate(pairs_of_ids):
        files.append([str(tmp_path / f"{kind}_{i}.png") for kind in ("prediction", "truth")])
        for file, array in zip(files[-1], arrays):
            Image.fromarray(array.astype(np.uint8)).save(file)
    found = scripts.evaluateImgLists(*map(list, zip(*files)), args)
    return found["averageScoreClasses"], found["classScores"]


def made_maps(classes, n=3):
    """n pairs (prediction, truth) of label ids with nothing random in them: an eighth has no label, and with few classes most are absent from the truth."""
    ids, (y, x) = np.array(list(common.CITYSCAPES_IDS)), np.indices((40, 60))
    for i in range(n):
        truth = ids[np.array(classes)[(y * 7 + x * x + i * 13) // 5 % len(classes)]] * ((y + 3 * x + i) % 8 > 0)
        yield np.where((y * x + i) % 5 < 3, np.maximum(truth, 7), ids[(3 * y + x * y + 5 * i) % 19]), truth


def ours(stage, monkeypatch, pairs_of_ids):
    """The same by 05_eval: mean, {class: IoU}, both in 0..1."""
    names, train_id = list(common.CITYSCAPES_CLASSES), np.full(256, IGNORE)
    train_id[list(common.CITYSCAPES_IDS)] = np.arange(19)
    monkeypatch.setattr(stage, "CLASSES", names)
    monkeypatch.setattr(stage, "SCORED", tuple(names))
    matrix = sum(stage.confusion(train_id[truth], train_id[guess], 19) for guess, truth in pairs_of_ids)
    return stage.mean_iou(matrix)[0] / 100, dict(zip(names, stage.iou(matrix)))


@pytest.mark.parametrize("classes, said, car", [(list(range(19)), 0.5332332634687246, 0.541371158392435), ([0, 2, 10, 13], 0.13932932389618402, 0.6664691943127962)])
def test_native_is_what_cityscapesscripts_said_of_the_same_maps(classes, said, car, stage, monkeypatch):
    mean, each = ours(stage, monkeypatch, made_maps(classes))                     # recorded from cityscapesScripts 2.3.0
    assert abs(mean - said) < 1e-9 and abs(each["car"] - car) < 1e-9


@pytest.mark.parametrize("classes", [list(range(19)), [0, 2, 10, 13]])
def test_native_equals_cityscapesscripts_if_it_is_installed(classes, stage, monkeypatch, tmp_path):
    mean, each = official(tmp_path, made_maps(classes))
    our_mean, our_each = ours(stage, monkeypatch, made_maps(classes))
    assert abs(our_mean - mean) < 1e-9
    assert all(np.isnan(each[name]) and np.isnan(own) or abs(each[name] - own) < 1e-9 for name, own in our_each.items())


# ---------------------------------------------------------------------------- from class scores to a label
def test_classes_taken_a_few_at_a_time_win_where_all_at_once_would(stage):
    scores = torch.rand(1, 11, 7, 9, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(scores, (20, 31), mode="bilinear", align_corners=False)
    assert (stage.class_map(scores, (20, 31)) == large.argmax(1)[0].numpy()).all()
    scores[:, 9] = scores[:, 2] = 2.                                               # of two equals the first wins, as in argmax
    assert (stage.class_map(scores, (7, 9)) == 2).all()


@pytest.mark.parametrize("length, window, expected", [(10, 10, [0]), (8, 10, [0]), (16, 10, [0, 6]), (17, 10, [0, 4, 7]), (30, 12, [0, 6, 12, 18])])
def test_windows_cover_a_length_and_overlap_by_a_third(stage, length, window, expected):
    assert stage.starts(length, window) == expected


def test_windows_and_the_mirrored_picture_average_the_scores(stage, monkeypatch):
    pixels = torch.arange(5 * 7).reshape(1, 1, 5, 7).repeat(1, 3, 1, 1).to(torch.uint8)
    pointwise = lambda encoder, decoder, x: x.float()                              # a network that sees one pixel: windows must change nothing
    monkeypatch.setattr(common, "predict", pointwise)
    for stage.WINDOW in (0, 3):
        assert torch.allclose(stage.class_scores(None, None, pixels), pixels.float())
        stage.FLIP = True
        assert torch.allclose(stage.class_scores(None, None, pixels), 2 * pixels.float())
        stage.FLIP = False
    monkeypatch.setattr(common, "predict", lambda encoder, decoder, x: torch.arange(x.shape[-1]).float().expand(1, 3, *x.shape[-2:]))
    stage.WINDOW, stage.FLIP = 0, True
    assert (stage.class_scores(None, None, pixels) == 6).all()                     # column x and its mirror 6 - x


def test_conditions_of_acdc_are_also_one_matrix(stage):
    row = {"name": "a", "mean_miou": 50., "targets": {t: {"miou": 50., "iou": {"a": 40., "b": None, "c": 60.}} for t in ("acdc_fog", "acdc_rain", "bdd")}}
    assert stage.together(row) == {"acdc, one matrix": ["acdc_fog", "acdc_rain"]} and stage.together({"targets": {"acdc_fog": {}}}) == {}
    text = stage.table({"classes": ["a", "b", "c"], "rows": [{**row, "together": {"acdc, one matrix": {"miou": 45.}}}]})
    assert "| a | 50.0 | 50.0 | 50.0 | **50.0** | 45.0 |" in text and "| a | 40 | - | 60 |" in text


def test_where_classes_are_left_out_the_mean_of_all_is_given_too(stage):
    row = {"name": "a", "mean_miou": 50., "targets": {"x": {"miou": 50., "miou_all": 42.1, "iou": {"a": 50.}}}}
    assert "mean of all 3 classes, not of 1 | x | mean |\n|---|---:|---:|\n| a | 42.1 | **42.1** |" in stage.table({"classes": ["a"], "rows": [row]})


def test_the_interval_is_students(stage):
    mean, half = stage.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.3027 / 3 ** .5, abs=1e-3) and np.isnan(stage.interval([1.])[1])        # t(2 degrees, 97.5 %) times the standard error of 1 / sqrt 3


def test_runs_that_differ_only_in_the_seed_share_a_line_and_differences_are_paired(stage):
    row = lambda name, group, seed, miou: {"name": name, "group": group, "seed": seed, "mean_miou": miou, "targets": {"x": {"miou": miou, "iou": {"a": miou}}}}
    rows = [row("base", "g", 0, 30.), row("base_1", "g", 1, 40.), row("sam", "h", 1, 43.), row("sam_0", "h", 0, 32.), row("other", "i", 7, 50.)]
    text = stage.table({"classes": ["a"], "rows": rows})
    assert "| base | 0, 1 | 35.0 ± 63.5 |  |" in text                             # t(1 degree, 97.5 %) = 12.706, times 7.071 / sqrt 2
    assert "| sam | 0, 1 | 37.5 ± 69.9 | +2.5 ± 6.4 |" in text                    # 3 and 2: paired by seed, whatever the order of the rows
    assert "| other | 7 | 50.0 | +20.0 (other seeds) |" in text


def test_checkpoints_of_a_folder_of_runs_are_found_and_told_apart(stage, tmp_path):
    for folder in ("seed0/sam", "seed1/sam", "seed0/raw"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / "seed0/raw/step_000010.safetensors").touch()
    stage.CHECKPOINTS, stage.STEPS = (str(tmp_path),), True
    assert [name for name, _ in stage.checkpoints()] == ["raw/step_000010", "raw", "seed0/sam", "seed1/sam"]
    stage.CHECKPOINTS = (str(tmp_path / "seed0/sam"), str(tmp_path / "seed0/raw/model.safetensors"))
    assert [name for name, _ in stage.checkpoints()] == ["sam", "raw/step_000010", "raw"]


def test_two_folders_of_one_name_are_kept_apart(stage):
    assert stage.show("folder:a/val") == stage.show("folder:b/val") == "val" and stage.file_name("folder:a/val") != stage.file_name("folder:b/val")


def test_bars_are_as_long_as_the_iou(stage, tmp_path):
    row = {"name": "run", "mean_miou": 50., "targets": {"x": {"iou": {"a": 50., "b": None}}}}
    stage.draw_classes(tmp_path / "c.png", {"rows": [row], "classes": ["a", "b"]})
    blue = (np.asarray(Image.open(tmp_path / "c.png")) == (31, 119, 180)).all(-1)[30:]
    assert blue.sum(1).max() == 211                                                # half of 420, both ends painted
