"""The miniature's report: its statistics on numbers worked out by hand, its oracles on maps drawn
by hand, and that a row is trained, scored, and not trained again."""
import json
import re
import subprocess
import sys

import ideas
import numpy as np
import pretrain
import pytest
import report
import rows
import scores
import torch
import world
from PIL import Image

import common
from common import IGNORE
from conftest import ROOT, environment, fresh


def row_of(*values):
    """A row of results.json whose seeds 0, 1, ... have these values for every style and class."""
    return {str(seed): dict.fromkeys(report.STYLES, {"miou": value, "iou": [value] * 12})
            for seed, value in enumerate(values)}


@pytest.fixture
def selftrain():
    """A new module of stage 04 with a new module of stage 03 in it."""
    stage = fresh("04_selftrain")
    stage.source_stage = fresh("03_train_source")
    return stage


def write_log(folder, losses):
    folder.mkdir(parents=True)
    rows = [json.dumps({"step": 20 * i, "loss": loss}) for i, loss in enumerate(losses, 1)]
    (folder / "log.jsonl").write_text("\n".join(rows))


# ------------------------------------------------------------------- tables and figures
def test_differences_are_paired_by_seed():
    found = {"source_only": row_of(10., 20., 30.), "sam": row_of(12., 22., 35.)}
    lines = report.table(found, {"source_only": "a", "sam": "b"}, "source_only").splitlines()
    assert lines[2].endswith("| 20.0 | 20.0 | **20.0** ± 10.0 | 3 |  |  |")
    # 2, 2 and 5: mean 3, deviation the root of 3; 4.303 of its errors are 4.303 * 1
    assert lines[3].endswith("| 23.0 | **23.0** ± 11.5 | 3 | +3.0 ± 1.7 | -1.3 to +7.3 |")


def test_one_seed_has_no_spread_and_a_row_that_was_not_run_is_left_out():
    found = {"source_only": row_of(10.), "sam": row_of(13., 99.)}
    titles = {"source_only": "a", "sam": "b", "raw": "c"}
    lines = report.table(found, titles, "source_only").splitlines()
    assert len(lines) == 4
    assert "**10.0** | 1 |" in lines[2] and lines[3].endswith("| 2 | +3.0 |  |")
    assert report.table_of_classes(found, titles).splitlines()[2] == "| a |" + " 10 |" * 12


def test_a_table_names_the_commits_of_its_numbers():
    results = {"rows": {"a": row_of(1.), "b": row_of(2.), "c": row_of(9.)},
               "code": {"a": {"0": "old", "1": "new"}, "b": {"0": "new"}, "c": {"0": "other"}}}
    text = report.with_commits(results, report.table, {"a": "title", "b": "title"}, "a")
    assert text.startswith("Of commit new and old:\n\n|") and "9.0" not in text


def test_every_row_of_every_table_can_be_run_and_has_constants_of_its_stage():
    named = {*report.TABLE4, *report.TABLE5, *report.ORACLES, *report.ABLATIONS,
             *report.SETTINGS, *report.IDEAS, *rows.SOURCES, *rows.SOURCES.values()}
    named = named.union(*(wanted.values() for _, wanted in report.FIGURES.values()))
    changes = [*report.TRIED.values(), *report.SIZES.values()]
    assert named | {row for row, _ in changes} <= set(report.ROWS)
    changes += [(stage, constants) for stage, constants, _ in report.ROWS.values()]
    for row, constants in changes:
        stage = report.ROWS[row][0] if row in report.ROWS else row
        known = common.constants(vars(fresh(stage)))
        assert {text[2:].partition("=")[0] for text in constants} <= set(known), row


def test_results_of_rows_that_are_no_more_are_dropped_and_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    old = {"rows": {"purity": row_of(1.), "raw": row_of(2.), "sam": row_of(3., 4.)},
           "code": {"sam": {"0": "old", "1": "old"}}, "no part of it": {}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    of_style = {"miou": 5., "iou": dict.fromkeys(common.CLASSES, 5.)}
    new = {"row": "sam", "seed": 1, "code": "new", "mean": 5.,
           "styles": dict.fromkeys(report.STYLES, of_style)}
    write_log(rows.folder_of("sam", 1), range(1, 11))
    (rows.folder_of("sam", 1) / "test.json").write_text(json.dumps(new))
    results = report.gather()
    assert set(results["rows"]) == {"raw", "sam"} and results["validation"] == {}
    assert [report.mean_of(results["rows"]["sam"], seed) for seed in "01"] == [3., 5.]
    assert results["loss"] == {"sam": {"1": 8.}}        # the mean of 6 to 10
    assert results["code"] == {"sam": {"0": "old", "1": "new"}} and "no part of it" not in results
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_readmes_hold_the_numbers_of_results_json():
    results = json.loads(report.RESULTS.read_text())
    text = (report.HERE / "README.md").read_text()
    for part in report.tables(results).values():
        assert part in text
    readme = (ROOT / "README.md").read_text()
    for stage, found in results["toy"].items():
        line = re.search(rf"\| `python {stage}.py` \|.*", readme)[0]
        assert line.endswith(f"| {found['seconds']:.0f} s |")
    for stage in ("03_train_source", "04_selftrain"):
        scores = results["toy"][stage]["miou"]
        line = [stage, *(f"{score:.1f}" for score in scores), f"**{np.mean(scores):.1f}**"]
        assert f"| {' | '.join(line)} |" in readme
    for name in ("source", "source_only", "sam"):
        row = results["rows"][name]
        mean, spread = report.mean_and_spread([report.mean_of(row, seed) for seed in row])
        assert f"{mean:.1f} ± {spread:.1f}" in readme


# ------------------------------------------------------------------- oracles
def test_the_control_keeps_raw_labels_where_sam_kept_one(selftrain):
    redrawn = torch.tensor([[5, IGNORE], [IGNORE, 7]])
    selftrain.refine = lambda sam, embedding, label, random: (redrawn, "points")
    rows.with_oracle("raw where SAM kept", selftrain)
    label, points = selftrain.refine(None, None, torch.tensor([[1, 2], [3, 4]]), None)
    assert label.tolist() == [[1, IGNORE], [IGNORE, 4]] and points == "points"


def test_a_perfect_sam_answers_with_the_true_piece_of_most_points(selftrain):
    rows.with_oracle("true masks", selftrain)
    truth = torch.tensor([[0, 0, 3, 0], [0, 0, 3, 0]])      # two pieces of class 0, one of class 3
    points = torch.tensor([[[0., 0.], [1., 1.], [2., 0.]]])
    masks = selftrain.sam_masks(None, truth, points, (2, 4))
    assert masks.tolist() == [[[True, True, False, False]] * 2]


@pytest.mark.parametrize("oracle", ["true labels", "true masks"])
def test_the_truth_takes_the_place_of_embedding_and_label(selftrain, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RENDERED", tmp_path)
    label = np.zeros((128, 256), np.uint8)
    label[:, 100:] = 3
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        Image.fromarray(label).save(tmp_path / kind / "000000.png")
    rows.with_oracle(oracle, selftrain)
    files = [tmp_path / "images/000000.png"]
    embeddings = selftrain.embed_pictures(None, files, (128, 256), False)
    pictures = selftrain.PaintedPictures(files, embeddings, (0, 4), (128, 256))
    *_, truth, _ = pictures[0]
    rough = torch.zeros(128, 256, dtype=torch.long)
    refined, _ = selftrain.refine(None, truth, rough, np.random.default_rng(0))
    if oracle == "true labels":
        assert np.array_equal(refined, label)
    else:       # a teacher that sees class 0 everywhere prompts with one piece: cut to the truth
        assert set(refined.unique().tolist()) == {0, IGNORE}
        assert any(np.array_equal(refined == 0, label == c) for c in (0, 3))


@pytest.mark.parametrize("oracle, masks", [("masks at 1/8", (8, 16)),
                                           ("Mask2Former's head", (16, 32))])
def test_another_decoder_takes_the_place_of_ours(selftrain, oracle, masks):
    rows.with_oracle(oracle, selftrain)
    decoder = selftrain.source_stage.Decoder([3] * 4, 2, 64, 4, 3, 16, 2)
    maps = [torch.zeros(2, 3, 16 // 2 ** i, 32 // 2 ** i) for i in range(4)]
    classes, logits = decoder(maps)
    assert classes.shape == (4, 2, 4, 3) and logits.shape == (4, 2, 4, *masks)
    # as load_model builds it
    selftrain.source_stage.Decoder(**decoder.sizes).load_state_dict(decoder.state_dict())


# ------------------------------------------------------------------- ideas
def with_idea(stage, name, scores, redrawn):
    """Pseudo-labels under an idea, for pictures with these teacher's scores (B, C, H, W), of which
    SAM made `redrawn` int64 (B, H, W)."""
    stage.predict = lambda *arguments: scores
    stage.redraw = lambda sam, embeddings, rough, items: (redrawn, ["points"])
    ideas.IDEAS[name](stage)
    rough = stage.predict(None, None, None).argmax(1)
    return stage.redraw(None, torch.zeros(1, 1), rough, [0])[0].tolist()


@pytest.mark.parametrize("idea, high, redrawn, wanted", [
    # the surest half of the pixels keeps its label
    ("surest half", [[.5, .95], [.7, .2]], [[3, 4], [5, IGNORE]], [[IGNORE, 4], [5, IGNORE]]),
    # where SAM left none, a sure teacher's label is taken
    ("sure besides SAM", [[.5, .95], [.91, .2]], [[IGNORE, IGNORE], [5, IGNORE]],
     [[IGNORE, 0], [5, IGNORE]])])
def test_ideas_that_ask_how_sure_the_teacher_is(selftrain, idea, high, redrawn, wanted):
    scores = torch.tensor([[high, [[.1, 0], [.1, .6]]]])
    assert with_idea(selftrain, idea, scores, torch.tensor([redrawn])) == [wanted]


def test_a_grids_masks_take_the_majority_of_the_sure_pixels(selftrain):
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, 2:], masks[1], masks[2, 0, 3] = True, True, True
    selftrain.sam_masks = lambda sam, embedding, points, shape: masks
    high = torch.tensor([[.95, .95, .95, .5], [.95, .95, .95, .5]])
    scores = torch.stack((high, 1 - high, torch.zeros(2, 4)))[None]
    scores[0, :, :, 2] = torch.tensor([0, 0, .99])[:, None]
    # below: class 0, of 4 of the 6 sure pixels; on it class 2; on that a pixel that is not sure
    assert with_idea(selftrain, "grid", scores, None) == [[[0, 0, 2, 2]] * 2]


def test_the_mirrored_teacher_is_the_mean_of_both_views(selftrain):
    selftrain.predict = lambda encoder, decoder, images, half: images * torch.tensor([1., 0.])
    ideas.mirror(selftrain)
    found = selftrain.predict(None, None, torch.tensor([[[[2., 4.]]]]), False)
    assert found.tolist() == [[[[1., 2.]]]]         # [2, 0] and [4, 0] mirrored: [0, 4]


def test_the_ramp_begins_at_a_half(selftrain):
    seen = []
    selftrain.update_teacher = lambda teacher, student, alpha: seen.append(alpha)
    ideas.ramp(selftrain)
    for _ in range(60):
        selftrain.update_teacher(None, None, .98)
    assert seen[:3] == pytest.approx([1 / 2, 2 / 3, 3 / 4]) and seen[48] == seen[59] == .98


def test_only_painted_pictures_lose_their_dice(selftrain):
    selftrain.N_SOURCE = 2
    selftrain.mask_loss = lambda c, m, labels, n, weights, *rest: (labels.sum() * weights[2], {})
    ideas.no_dice(selftrain)
    logits = torch.zeros(1, 3, 1)
    loss, _ = selftrain.mask_loss(logits, logits, torch.tensor([1., 2., 4.]), 9, (2., 5., 3.))
    assert loss == pytest.approx((1 + 2) * 3 * 2 / 3)


def test_soft_labels_of_a_teacher_without_doubt_are_its_labels(selftrain):
    labels = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    scores = torch.nn.functional.one_hot(labels[1:].flip(2), 12).permute(0, 3, 1, 2).float()
    logits = torch.randn(2, 2, 12, 13), torch.randn(2, 2, 12, 8, 8)
    settings = 64, (2., 5., 5.), .1, "ignore"
    mask_loss = selftrain.mask_loss = selftrain.source_stage.mask_loss
    torch.manual_seed(0)
    each = [mask_loss(*(part[:, k:k + 1] for part in logits), labels[k:k + 1], *settings)[0]
            for k in (0, 1)]
    selftrain.N_SOURCE = 1
    selftrain.predict = lambda: scores              # of the clean picture, which is mirrored then
    selftrain.redraw = lambda: (labels[1:].flip(2), [])
    ideas.soft_labels(selftrain)
    selftrain.predict(), selftrain.redraw()
    torch.manual_seed(0)
    assert selftrain.mask_loss(*logits, labels, *settings)[0] == pytest.approx(sum(each) / 2)
    scores *= .5
    selftrain.predict(), selftrain.redraw()
    torch.manual_seed(0)
    assert selftrain.mask_loss(*logits, labels, *settings)[0] > sum(each) / 2 + .1


def test_masks_unlike_their_piece_are_dropped_and_points_are_deep(selftrain):
    label = np.zeros((8, 16), np.uint8)
    label[:, 8:] = 1
    piece, _, area = selftrain.components(label)
    masks = torch.zeros(2, 8, 16, dtype=torch.bool)
    masks[0, :, :8], masks[1, :, :12] = True, True          # IoU 1, and 4 of 16 columns
    selftrain.sam_masks = lambda *arguments: masks
    for idea in ("deep points", "like its piece"):
        ideas.IDEAS[idea](selftrain)
    random = np.random.default_rng(0)
    points = selftrain.random_points(piece, area, np.array([1, 2]), 20, random)
    assert points[0, :, 0].max() < 7 and points[1, :, 0].min() > 8
    found = selftrain.sam_masks(None, None, points, (8, 16))
    assert torch.equal(found[0], masks[0]) and not found[1].any()


def test_prompts_keep_their_place_and_name_as_many_classes_as_asked():
    prompts = ["a photo of a car in the dark", "a photo of two cars and a bus in a town in winter"]
    for count in (1, 4):
        lines = ideas.prompts_naming(count, prompts)
        for line, place in zip(lines, ("the dark", "a town in winter"), strict=True):
            things, found = re.fullmatch(r"a photo of (.+?) in (.+)", line).groups()
            assert found == place and len(re.split(", | and ", things)) == count


# ------------------------------------------------------------------- running
def test_a_row_of_stage_04_waits_for_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    with pytest.raises(common.Stop, match="seed3/source/model.safetensors: run its source row"):
        rows.work([rows.Job("sam", 3, rows.folder_of("sam", 3))])


def test_a_failed_row_names_its_log(tmp_path, monkeypatch, capsys):
    def start(job):
        with open(f"{job.out}.log", "w") as log:
            return subprocess.Popen([sys.executable, "-c", "exit('a reason')"], stderr=log)

    monkeypatch.setattr(rows.Job, "start", start)
    with pytest.raises(common.Stop, match=f"see {tmp_path}/bad.log"):
        rows.work([rows.Job("source", 0, tmp_path / "bad")])
    assert f"{tmp_path}/bad: a reason" in capsys.readouterr().out


def test_a_row_is_trained_and_scored_once(tmp_path, data):
    command = [sys.executable, ROOT / "tests/toy/rows.py", "source", "1", "", "test",
               "--ITERATIONS=2", "--BATCH=2", "--POINTS=64"]
    variables = environment(tmp_path, data, REPORT=str(tmp_path / "report"))
    world.write_folder(data / "toy/game", "test", "game", 2)
    options = dict(cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    first = subprocess.run(command, **options)
    assert first.returncode == 0, first.stderr
    kept = tmp_path / "report/seed1/source/test.json"
    found, time = json.loads(kept.read_text()), kept.stat().st_mtime_ns
    assert set(found["styles"]) == {"game", *report.STYLES} and found["seed"] == 1
    assert found["code"] == rows.code()
    mean = np.mean([found["styles"][style]["miou"] for style in report.STYLES])
    assert found["mean"] == pytest.approx(mean, abs=.001)
    again = subprocess.run(command, **options)
    assert "finished before" in again.stdout and kept.stat().st_mtime_ns == time


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["run", "no_row"], ["write", "sam"]])
def test_a_wrong_command_prints_the_help(arguments):
    with pytest.raises(SystemExit, match="report.py all"):
        report.main(*arguments)


# ------------------------------------------------------------------- a run of your own
def write_run(folder, *scores):
    """What compare() reads of a run of 03 and 04 with this mIoU of every style"""
    lines = []
    for stage, score in zip(("03_train_source", "04_selftrain"), scores):
        targets = {f"folder:data/toy/{style}": {"miou": score} for style in report.STYLES}
        lines.append({"name": stage, "targets": targets})
        write_log(folder / stage, [20., 10.5])
    (folder / "05_eval").mkdir()
    (folder / "05_eval/results.json").write_text(json.dumps({"rows": lines}))


def test_a_run_is_compared_with_the_spread_of_the_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    seeds = {"source": row_of(30., 32., 34.), "sam": row_of(36., 38., 40.)}
    losses = {"source": {"0": 14., "1": 15., "2": 16.}, "sam": {"0": 15., "1": 16., "2": 17.}}
    report.RESULTS.write_text(json.dumps({"rows": seeds, "loss": losses}))
    for log in ("log_03.jsonl", "log_04.jsonl"):
        (tmp_path / log).write_text('{"step": 20, "loss": 20}\n{"step": 40, "loss": 10}\n')
    # of 30, 32 and 34 a further one lies within 32 plus or minus 4.303 * 2 * sqrt(4 / 3) = 9.94
    write_run(tmp_path / "good", 41.9, 38.)
    assert report.compare(tmp_path / "good") == 0
    said = capsys.readouterr().out
    assert "within 5.0 % of the shipped log of seed 0, from step 40 on" in said
    assert "a further one 22.1 to 41.9" in said and "all numbers lie" in said
    write_run(tmp_path / "bad", 42., 38.)
    assert report.compare(tmp_path / "bad") == 6        # five styles and their mean
    with pytest.raises(common.Stop, match="05_eval.py writes it"):
        report.compare(tmp_path / "none")


# ------------------------------------------------------------------- scores of the models
def test_frechet_distance_of_a_shift_is_its_square():
    cloud = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    shifted = cloud + torch.tensor([3., 0., 4.])
    assert scores.frechet(cloud, cloud) == pytest.approx(0, abs=1e-4)
    assert scores.frechet(cloud, shifted) == pytest.approx(25, abs=1e-3)


def test_average_precision_by_hand():
    there = np.array([True, False, True])
    assert scores.average_precision(np.array([.9, .5, .1]), there) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("place, style", [
    ("the dark", "night"), ("a village in winter", "snow"), ("a town on a misty morning", "fog"),
    ("a wet wide avenue on a rainy day", "rain"), ("a sunny town", "day")])
def test_the_weather_that_a_prompt_asks_for(place, style):
    assert scores.style_of(place) == style


# ------------------------------------------------------------------- pretraining
def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(pretrain.time, "time", lambda: next(clock))        # a second per call

    def trained(name, *minutes):
        for until in minutes:
            torch.manual_seed(0)
            model = torch.nn.Linear(2, 1)
            monkeypatch.setattr(pretrain.math, "cos", lambda x: 1.)        # rates of one schedule
            def loss_of(step):
                return model(torch.ones(1, 2) + torch.randn(1, 2)).pow(2).sum(), {}
            pretrain.train(name, {"model": model}, loss_of, until, .1, ema=.9, every=1)
        return model.weight
    assert torch.equal(trained("once", 1), trained("twice", .5, 1))
