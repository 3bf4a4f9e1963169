"""The miniature's report: its statistics on numbers worked out by hand, and its oracles on a map drawn by hand."""
import numpy as np
import pretrain
import pytest
import report
import torch
import world

import common
from common import IGNORE
from conftest import fresh


def test_differences_are_paired_by_seed():
    row = lambda *values: {str(seed): {s: {"miou": v, "iou": [v] * 12} for s in report.STYLES} for seed, v in enumerate(values)}
    text = report.table({"rows": {"source_only": row(10., 20., 30.), "sam": row(12., 22., 32.)}}, {"source_only": "a", "sam": "b"}, "source_only")
    assert "| b | 12.0 | " not in text and "**22.0** ± 24.8 | 3 | +2.0 ± 0.0 |" in text


def test_the_table_of_labels_says_right_per_cent_and_labelled_per_cent():
    found = {"redrawn by SAM": {s: {"right": .5 if s == "fog" else .75, "labelled": .4, "miou": 30.} for s in report.STYLES}}
    assert report.labels_table(found).splitlines()[-1] == "| redrawn by SAM | 75 (40) | 75 (40) | 75 (40) | 50 (40) | 75 (40) | 70 (40) | 30.0 |"


def test_frechet_distance_of_a_shift_is_its_square():
    cloud = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert report.frechet(cloud, cloud) == pytest.approx(0, abs=1e-4) and report.frechet(cloud, cloud + torch.tensor([3., 0., 4.])) == pytest.approx(25, abs=1e-3)


@pytest.mark.parametrize("place, style", [("the dark", "night"), ("a village in winter", "snow"), ("a town on a misty morning", "fog"), ("a wet wide avenue on a rainy day", "rain"), ("a sunny town", "day")])
def test_the_weather_that_a_prompt_asks_for(place, style):
    assert report.style_of(place) == style


def test_the_control_keeps_raw_labels_where_sam_kept_one():
    stage = vars(fresh("04_selftrain"))
    stage["refine"] = lambda sam, embeddings, labels, random: (torch.tensor([[[5, IGNORE], [IGNORE, 7]]]), [])
    report.with_oracle(stage, "raw where SAM kept")
    assert stage["refine"](None, None, np.array([[[1, 2], [3, 4]]], np.uint8), None)[0].tolist() == [[[1, IGNORE], [IGNORE, 4]]]


def test_a_perfect_sam_answers_with_the_true_piece_of_most_points():
    stage = vars(fresh("04_selftrain"))
    report.with_oracle(stage, "true masks")
    truth = torch.tensor([[[0, 0, 3, 0], [0, 0, 3, 0]]])                           # two pieces of class 0, one of class 3
    mask = stage["sam_masks"](None, truth, torch.tensor([0]), torch.tensor([[[0., 0.], [1., 1.], [2., 0.]]]), (2, 4))
    assert mask.tolist() == [[[True, True, False, False]] * 2]


@pytest.mark.parametrize("oracle, masks", [("masks at 1/8", (8, 16)), ("Mask2Former's head", (16, 32))])
def test_another_decoder_takes_the_place_of_ours_also_when_it_is_loaded(monkeypatch, oracle, masks):
    monkeypatch.setattr(common, "Decoder", common.Decoder)                         # put back afterwards
    report.with_oracle({}, oracle)
    decoder = common.Decoder([3] * 4, 2, 64, 4, 3, 16, 2)
    classes, logits = decoder([torch.zeros(2, 3, 64 // 4 // 2 ** i, 128 // 4 // 2 ** i) for i in range(4)])
    assert classes.shape == (4, 2, 4, 3) and logits.shape == (4, 2, 4, *masks) and decoder.sizes["layers"] == 3


def test_the_random_tower_is_clip_with_other_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.draw_random_tower()
    ours, shipped = common.Encoder(f"local-dir:{tmp_path}/random_clip"), common.Encoder(f"local-dir:{report.HERE}/weights/clip")
    pairs = list(zip(ours.parameters(), shipped.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs) and not any(torch.equal(a, b) for a, b in pairs if a.dim() == 4)


def test_a_row_of_stage_04_waits_for_its_source_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="seed3/source/model.safetensors: run its source row first"):
        report.work([(("sam", 3), tmp_path / "seed3/sam", "test.json")])


def test_a_figure_is_drawn_of_rows_that_have_all_seeds_only(tmp_path):
    row = lambda *values: {str(seed): {s: {"miou": v, "iou": [v] * 12} for s in report.STYLES} for seed, v in enumerate(values)}
    results = {"rows": {"source_only": row(30., 31., 32.), "sam": row(34., 35., 36.), "points_1": row(33., 33., 34.), "points_10": row(40.)}}
    title, rows = report.FIGURES["figure6_points"]
    assert report.figure(tmp_path / "f.png", results, title, rows)
    blue = (np.asarray(world.Image.open(tmp_path / "f.png")) == (31, 119, 180)).all(-1)
    assert blue[:, 60:80].any() and blue[:, 480:500].any() and not blue[:, :60].any()     # two points, the first and the last place
    assert not report.figure(tmp_path / "g.png", {"rows": {"sam": row(34.)}}, title, rows) and not (tmp_path / "g.png").exists()


def test_every_row_of_every_table_can_be_run():
    named = {*report.TABLE4, *report.TABLE5, *report.ORACLES, *report.UNLIKE, *report.MORE, *(row for _, rows in report.FIGURES.values() for row in rows.values()),
             *(row for row, _ in (*report.TRIED.values(), *report.SIZES.values()))}
    assert named <= set(report.ROWS)


def test_codes_that_tell_pieces_apart_cost_little_and_equal_codes_cost_two_for_the_others():
    piece = np.repeat([[0] * 4 + [1] * 4], 8, 0)
    apart = torch.from_numpy(piece[None, None] * 10.).expand(1, 2, -1, -1)
    low = pretrain.same_piece(apart, [piece], np.random.default_rng(0))
    none = pretrain.same_piece(torch.zeros(1, 2, 8, 8), [piece], np.random.default_rng(0))
    assert low == pytest.approx(np.log1p(np.exp(-2.)), abs=1e-3) and none == pytest.approx(np.log1p(np.exp(-2.)) + np.log1p(np.exp(2.)), abs=1e-4)
