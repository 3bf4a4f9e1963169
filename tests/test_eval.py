"""Scores counted by hand, and by cityscapesScripts where it is installed."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from references import IDS, cityscapesscripts_iou, made_maps

import common
from common import IGNORE
from conftest import fresh
from standins import run_main

TRUTH = np.array([[0, 0, 1], [0, 1, 1], [IGNORE, IGNORE, 0]], np.uint8)
GUESS = np.array([[0, 1, 1], [0, 1, 2], [2, 0, 0]], np.uint8)


@pytest.fixture
def stage():
    """05 with three classes."""
    module = fresh("05_eval")
    module.CLASSES, module.SCORED = ["a", "b", "c"], ("a", "b", "c")
    return module


# ---------------------------------------------------------------------------- one matrix
COUNTS = [[3, 1, 0], [0, 2, 1], [0, 0, 0]]              # of TRUTH and GUESS; c is only predicted
ABSENT = [[3, 1, 0], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("protocol, scored, matrix, mean, each", [
    ("native", "abc", COUNTS, 125 / 3, [75, 50, 0]),        # 3 of 3 + 1; 2 of 2 + 1 + 1; 0 of 1
    ("clouds", "abc", COUNTS, 62.5, [75, 50, None]),
    ("native", "abc", ABSENT, 425 / 6, [75, 66.67, None]),
    ("clouds", "abc", ABSENT, 425 / 6, [75, 66.67, None]),
    ("native", "abc", np.zeros((3, 3), int), 0, [None] * 3),
    ("native", "ac", COUNTS, 37.5, [75, 0])])       # a pixel of a that was taken for b is an error
def test_a_class_in_neither_is_left_out_and_one_only_predicted_counts_zero_or_is_left_out(
        stage, protocol, scored, matrix, mean, each):
    stage.PROTOCOL, stage.SCORED = protocol, tuple(scored)
    found, of_class = stage.mean_iou(np.array(matrix))
    assert of_class == dict(zip(scored, each)) and abs(found - mean) < 1e-9


# ---------------------------------------------------------------------------- cityscapesScripts
def ours(stage, maps):
    """05's mean and IoU of every class, in 0..1."""
    stage.CLASSES = stage.SCORED = [str(label_id) for label_id in IDS]
    train_id = np.full(256, IGNORE)
    train_id[IDS] = np.arange(19)
    matrix = sum(stage.confusion(train_id[truth], train_id[guess], 19) for guess, truth in maps)
    return stage.mean_iou(matrix)[0] / 100, stage.iou(matrix).filled(np.nan) / 100


FEW = [0, 2, 10, 13]


@pytest.mark.parametrize("classes, mean, car", [                    # recorded with version 2.3.0
    (range(19), 0.5332332634687246, 0.541371158392435),
    (FEW, 0.13932932389618402, 0.6664691943127962)])
def test_native_is_what_cityscapesscripts_gave_and_gives(stage, classes, mean, car, tmp_path):
    found, each = ours(stage, made_maps(classes))
    assert abs(found - mean) < 1e-9 and abs(each[13] - car) < 1e-9
    pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    wanted, theirs = cityscapesscripts_iou(made_maps(list(classes)), tmp_path, IDS)
    assert abs(found - wanted) < 1e-9
    np.testing.assert_allclose(each, theirs, atol=1e-9, rtol=0)     # nan equals nan here


# ---------------------------------------------------------------------------- from scores to labels
def test_scores_are_resized_before_the_best_is_taken(stage, monkeypatch):
    scores = torch.tensor([[[[1., 0.]], [[0., .2]]]])   # four wide: 1 .75 .25 0, 0 .05 .15 .2
    monkeypatch.setattr(stage.source_stage, "predict", lambda *arguments: scores)
    label = stage.segment(None, None, np.zeros((1, 2, 3), np.uint8), (2, 4))
    assert label.tolist() == [[0, 0, 0, 1]] * 2 and label.dtype == np.uint8


# ---------------------------------------------------------------------------- names and tables
def row(name, *targets):
    """A row of results.json; targets: (name, mIoU, IoU of the classes)"""
    found = {target: {"miou": miou, "iou": iou} for target, miou, iou in targets}
    mean = np.mean([miou for _, miou, _ in targets])
    return {"name": name, "targets": found, "mean_miou": mean}


def test_the_tables_of_two_targets(stage):
    a = ("bdd", 40., {"a": 40., "b": None, "c": None})
    b = ("folder:some/where/x", 50., {"a": 60., "b": None, "c": 10.})
    text = stage.tables([row("run", a, b)])
    for line in ("mIoU | bdd | x | mean", "run | 40.0 | 50.0 | 45.0", "run | 50.0 | - | 10.0"):
        assert f"| {line} |\n" in text and "seeds" not in text


def test_seeds_share_a_line_with_mean_spread_and_difference(stage):
    scores = {"04_raw": 30., "04_raw_seed1": 40., "04_sam_seed2": 43., "04_sam": 32.,
              "04_x_seeds": 5., "04_sam_seed1 (teacher)": 6.}
    text = stage.comparison([row(name, ("x", miou, {})) for name, miou in scores.items()])
    assert "| 04_raw | 2 | 35.0 | 7.1 |  |\n" in text               # 10 / sqrt 2
    assert "| 04_sam | 2 | 37.5 | 7.8 | +2.5 |\n" in text           # 11 / sqrt 2
    assert "| 04_x_seeds | 1 | 5.0 | - | -30.0 |\n" in text
    assert "| 04_sam (teacher) | 1 | 6.0 |" in text


def test_a_name_is_the_folders_path_in_the_run_or_as_given(stage, tmp_path):
    stage.RUN = str(tmp_path / "one")
    for name in ("one/04_sam/model", "one/04_sam/teacher", "two/04_sam/model",
                 "two/x/04_raw/model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    assert list(stage.checkpoints()) == ["04_sam"]
    stage.CHECKPOINTS = (stage.RUN, str(tmp_path / "one/04_sam/teacher.safetensors"),
                         str(tmp_path / "two"), str(tmp_path / "two/x"))
    assert list(stage.checkpoints()) == ["04_sam", "04_sam (teacher)", f"{tmp_path}/two/04_sam",
                                         f"{tmp_path}/two/x/04_raw"]
    stage.CHECKPOINTS = (str(tmp_path / "two"), str(tmp_path / "three"))
    with pytest.raises(common.Stop, match="three"):
        stage.checkpoints()


# ---------------------------------------------------------------------------- whole runs
@pytest.fixture
def scored(stage, monkeypatch, tmp_path):
    """scored(**constants) runs 05 with a network that reads the class off the red channel -> rows.
    scored.seen: how often it looked. The checkpoints are tmp_path/run/04*/model.safetensors."""
    def predict(encoder, decoder, pixels, half):
        call.seen, call.half, call.size = call.seen + 1, half, tuple(pixels.shape[2:])
        if call.seen == call.kill_at:
            raise KeyboardInterrupt
        return torch.nn.functional.one_hot(pixels[:, 0].long(), 3).permute(0, 3, 1, 2).float()

    def call(**constants):
        call.seen = 0
        options = {"OUT": str(tmp_path / "out"), "RUN": str(tmp_path / "run")}
        run_main(stage, **options | constants)
        path = tmp_path / "out/results.json"
        return json.loads(path.read_text())["rows"] if path.exists() else None
    call.kill_at = 0
    for name in ("04", "04_seed1"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "model.safetensors").write_text(name)
    network = torch.nn.Identity(), torch.nn.Identity(), {"constants": {}}
    monkeypatch.setattr(stage.source_stage, "predict", predict)
    monkeypatch.setattr(stage.source_stage, "load_model", lambda path: network)
    monkeypatch.setattr(stage, "PANELS", 0)
    return call


@pytest.fixture
def two(folder):
    """Two data sets of two images with TRUTH, in which the network sees GUESS."""
    images, labels = dict.fromkeys("xy", np.stack([GUESS] * 3, 2)), dict.fromkeys("xy", TRUTH)
    return folder(images, labels, "val/a"), folder(images, labels, "val/b")


def test_results_hold_what_was_counted(scored, two, tmp_path, capsys):
    first, second = scored(TARGETS=two)
    assert (first["name"], second["name"]) == ("04", "04_seed1") and first["mean_miou"] == 125 / 3
    for target in two:
        found = first["targets"][target]
        assert found["iou"] == {"a": 75, "b": 50, "c": 0} and found["images"] == 2
        assert found["miou"] == 125 / 3
        counts = np.load(tmp_path / "out" / found["confusion"])
        assert counts.tolist() == [[6, 2, 0], [0, 4, 2], [0, 0, 0]]
    printed = capsys.readouterr().out
    assert "04_seed1 on b: mIoU 41.7, 2 images\n" in printed
    assert "| 04 | 41.7 | 41.7 | 41.7 |" in printed and "| 04 | 2 | 41.7 | 0.0 |" in printed
    assert (tmp_path / "out/results.md").read_text() in printed


SAME = [[3, 0, 0], [0, 0, 0], [3, 1, 0]]


@pytest.mark.parametrize("protocol, side, size, matrix, miou", [
    ("native", 0, (2, 4), SAME, 50 / 3), ("native", 4, (4, 8), SAME, 50 / 3),
    ("clouds", 0, (2, 4), SAME, 25), ("clouds", 1, (1, 2), [[1, 0, 0], [0, 0, 0], [1, 0, 0]], 25),
    ("clouds", 4, (4, 8), [[12, 0, 0], [0, 0, 0], [12, 4, 0]], 25)])
def test_the_truth_keeps_its_size_or_takes_that_of_the_networks_input(
        scored, folder, tmp_path, protocol, side, size, matrix, miou):
    """a is half right, c is missed. b, which is between a and c, is nowhere in the truth. Of 2 x 2
    pixels the lower right one is kept."""
    truth = np.array([[0, 2, 2, IGNORE], [0, 0, 2, 2]])
    image = np.array([[0, 0, 0, 1]] * 2)[..., None].repeat(3, 2)
    target = folder({"x": image}, {"x": truth})
    row, _ = scored(TARGETS=(target,), PROTOCOL=protocol, SHORT_SIDE=side)
    found = row["targets"][target]
    assert scored.size == size and np.load(tmp_path / "out" / found["confusion"]).tolist() == matrix
    assert abs(found["miou"] - miou) < 1e-9 and found["iou"]["a"] == 50


def test_what_is_equal_is_not_scored_again(scored, two, tmp_path, monkeypatch):
    before = scored(TARGETS=two)
    assert scored.seen == 8 and scored(TARGETS=two) == before and scored.seen == 0
    Image.fromarray(GUESS).save(tmp_path / "val/a/labels/y.png")        # corrected
    rows = scored(TARGETS=two)
    assert scored.seen == 4 and rows[0]["targets"][two[0]]["miou"] > 125 / 3
    (tmp_path / "run/04/model.safetensors").write_text("trained again")
    scored(TARGETS=two[:1])
    assert scored.seen == 2
    monkeypatch.setattr(common, "code_digest", lambda *files: "edited")
    scored(TARGETS=two[:1])
    assert scored.seen == 4
    os.truncate(tmp_path / "out" / rows[1]["targets"][two[1]]["confusion"], 90)
    assert scored(TARGETS=two[1:])[1]["mean_miou"] == 125 / 3 and scored.seen == 4


@pytest.mark.parametrize("change", [{"PROTOCOL": "clouds"}, {"SHORT_SIDE": 3}, {"HALF": True}])
def test_other_constants_are_other_matrices(scored, two, monkeypatch, change):
    scored(TARGETS=two[:1])
    monkeypatch.setattr(common.Run, "compare", lambda *_: None)     # it would refuse to mix them
    scored(TARGETS=two[:1], **change)
    assert scored.seen == 4 and scored.half == change.get("HALF", False)


def test_a_killed_run_keeps_what_it_scored(scored, two):
    scored.kill_at = 6
    with pytest.raises(KeyboardInterrupt):
        scored(TARGETS=two)
    scored.kill_at = 0
    assert len(scored(TARGETS=two)) == 2 and scored.seen == 4


def test_the_panel_shows_image_predictions_truth_and_errors(scored, two, stage, monkeypatch):
    sheets = {}
    monkeypatch.setattr(common, "save_sheet", lambda path, rows: sheets.update({path: rows}))
    scored(TARGETS=two, PANELS=1)
    assert sorted(path.name for path in sheets) == ["a.png", "b.png"]
    cells, = next(iter(sheets.values()))
    titles, (_, truth, label, errors, *_) = zip(*cells)
    assert titles == ("x.png", "truth", "04", "errors", "04_seed1", "errors")
    assert (truth == TRUTH).all() and (label == GUESS).all()
    assert (errors[0, 1] == common.COLOURS[GUESS[0, 1]]).all()
    assert (errors[TRUTH == IGNORE] == 0).all() and (errors[0, 0] == 225).all()


# ---------------------------------------------------------------------------- own pictures
@pytest.fixture
def photos(tmp_path):
    """Pictures of all kinds whose names are easily mixed up, and one that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    made = {"a.png": ("RGBA", (9, 7)), "a.jpg": ("L", (30, 3)), "a.jpg.png": ("P", (6, 4)),
            "more/a.PNG": ("RGB", (4, 5))}
    for name, (mode, size) in made.items():
        Image.new(mode, size).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").touch()
    return folder, {name: size for name, (_, size) in made.items()}


def test_every_picture_is_labelled_and_the_failed_one_is_named(scored, photos, tmp_path):
    folder, sizes = photos
    with pytest.raises(common.Stop, match=r"1 of 5 pictures failed:\n\S+bad.jpg cannot be read"):
        scored(IMAGES=str(folder))
    for kind in ("train_ids", "overlay"):
        for name, size in sizes.items():
            picture = Image.open(tmp_path / "out/images" / kind / f"{name}.png")
            assert picture.size == size and (kind == "overlay" or not np.asarray(picture).any())
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 2 * 4


@pytest.mark.parametrize("images, out, message", [
    ("photos", "photos/out", "name another --OUT"), (".", "out", "name another --OUT"),
    ("photos", "photos", "name another --OUT"),
    ("nowhere", "out", "expected a folder with pictures")])
def test_results_never_land_among_the_pictures_of_which_there_must_be_some(
        scored, photos, tmp_path, images, out, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(common.Stop, match=message):
        scored(IMAGES=str(tmp_path / images), OUT=str(tmp_path / out))
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------- the command line
def test_a_real_network_is_scored_alike_by_any_number_of_workers(start, tmp_path, data):
    assert start("03_train_source", "--ITERATIONS=1", "--BATCH=2", "--POINTS=64") is None
    target, matrices = f"folder:{data}/toy/day", []
    for workers in (0, 2):
        out, run = tmp_path / f"run/05_{workers}", (f"--TARGETS={target}", f"--WORKERS={workers}")
        assert start("05_eval", f"--OUT={out}", "--PANELS=2", *run) is None
        found, = json.loads((out / "results.json").read_text())["rows"]
        matrices.append(np.load(out / found["targets"][target]["confusion"]))
        width, height = Image.open(out / "panels/day.png").size
        assert width > 1000 and height > 300
    assert (matrices[0] == matrices[1]).all() and matrices[0].sum() == 2 * 128 * 256
