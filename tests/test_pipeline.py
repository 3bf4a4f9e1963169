"""The five real scripts, in order, on the real miniatures: what they leave behind, that they redo nothing, and that a kill changes nothing."""
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, SMALL, script

RESULT = {"01_prompts": "prompts.txt", "02_generate": "index.jsonl", "03_train_source": "model.safetensors", "04_selftrain": "model.safetensors", "05_eval": "results.json"}


def same(stage, a, b):
    """Whether two run folders hold the same result of a stage."""
    a, b = a / stage, b / stage
    if stage == "01_prompts":
        return (a / "prompts.txt").read_text() == (b / "prompts.txt").read_text()
    if stage == "02_generate":
        names = [json.loads(line)["file"] for line in (a / "index.jsonl").read_text().splitlines()]
        return (a / "index.jsonl").read_text() == (b / "index.jsonl").read_text() and all(np.array_equal(Image.open(a / n), Image.open(b / n)) for n in names)
    if stage == "05_eval":
        rows = [json.loads((f / "results.json").read_text())["rows"] for f in (a, b)]
        return [[t["iou"] for t in row["targets"].values()] for row in rows[0]] == [[t["iou"] for t in row["targets"].values()] for row in rows[1]]
    files = ["model.safetensors"] + (["teacher.safetensors"] if stage == "04_selftrain" else [])
    return all((x[k] == y[k]).all() for f in files for x, y in [(load_file(a / f), load_file(b / f))] for k in x)


def test_every_stage_leaves_its_result_and_a_record(finished):
    run, _ = finished
    for stage, result in RESULT.items():
        assert (run / stage / result).exists()
        record = json.loads((run / stage / "run.json").read_text())
        assert record["constants"]["SEED"] == 0 if "SEED" in record["constants"] else stage == "05_eval"
        assert record["wall_seconds"] > 0 and 0 < record["peak_memory_gb"] < 3
    index = [json.loads(line) for line in (run / "02_generate/index.jsonl").read_text().splitlines()]
    prompts = (run / "01_prompts/prompts.txt").read_text().splitlines()
    assert [row["seed"] for row in index] == list(range(6)) and [row["prompt"] for row in index] == prompts[:6]
    assert Image.open(run / "02_generate" / index[3]["file"]).text["prompt"] == prompts[3]


def test_prompts_name_every_class_and_keep_the_template(finished):
    run, said = finished
    prompts = (run / "01_prompts/prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == 14 and all(re.fullmatch(r"a photo of .+ in .+", p) for p in prompts)
    assert re.search(r"named: road [1-9]\d*, .*bicycle [1-9]\d*", said["01_prompts"])


def test_the_table_has_a_row_for_each_checkpoint_over_five_styles(finished):
    run, said = finished
    results = json.loads((run / "05_eval/results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["03_train_source", "04_selftrain"]
    for row in results["rows"]:
        assert [t.split("/")[-1] for t in row["targets"]] == ["day", "night", "snow", "fog", "rain"]
        assert abs(row["mean_miou"] - np.mean([t["miou"] for t in row["targets"].values()])) < .01
        for target in row["targets"].values():
            assert np.load(target["confusion"]).sum() == 2 * 128 * 256
    assert "| 04_selftrain |" in said["05_eval"] and (run / "05_eval/results.md").read_text() in said["05_eval"]


def test_the_log_has_every_step_once_and_the_vital_signs(finished):
    run, _ = finished
    rows = [json.loads(line) for line in (run / "04_selftrain/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "class", "mask", "dice", "labelled", "changed", "prompts"} <= set(row) for row in rows)


@pytest.mark.parametrize("stage", RESULT)
def test_a_finished_stage_is_not_done_again(finished, data, stage):
    run, _ = finished
    before = (run / stage / RESULT[stage]).stat().st_mtime_ns
    again = script(stage, *SMALL[stage], run=run, data=data)
    assert again.returncode == 0, again.stderr
    if stage == "05_eval":                       # looks for new checkpoints, finds none to score, prints the table again
        assert " a second" not in again.stdout and "| 04_selftrain |" in again.stdout
    else:
        assert "finished before" in again.stdout and (run / stage / RESULT[stage]).stat().st_mtime_ns == before


@pytest.mark.parametrize("stage, sign", [("01_prompts", "raw.jsonl"), ("02_generate", "00001_*.png"), ("03_train_source", "checkpoint.pt"), ("04_selftrain", "checkpoint.pt"),
                                         ("05_eval", "confusion/03*/day_*_2.npz")])
def test_a_killed_stage_ends_in_the_same_result(finished, data, tmp_path, stage, sign):
    whole, _ = finished
    run = tmp_path / "run"
    run.mkdir()
    for other in RESULT:
        if other != stage:
            (run / other).symlink_to(whole / other)
    command = [sys.executable, ROOT / f"{stage}.py", *SMALL[stage]]
    import os
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RUN": str(run), "DATA": str(data)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((run / stage).glob(sign)) and process.poll() is None:
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"expected to kill {stage} while it works, it had ended"
    done = script(stage, *SMALL[stage], run=run, data=data)
    assert done.returncode == 0, done.stderr
    if stage in ("03_train_source", "04_selftrain"):
        assert "goes on from step" in done.stdout
        steps = [json.loads(line)["step"] for line in (run / stage / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
    assert same(stage, whole, run)


def test_source_only_is_the_control_with_as_many_steps(finished, data, tmp_path):
    whole, _ = finished
    done = script("04_selftrain", *SMALL["04_selftrain"], "--N_GENERATED=0", f"--OUT={tmp_path}/control", run=whole, data=data)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "control/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and "labelled" not in rows[-1]


def test_shards_paint_what_one_job_paints(finished, data, tmp_path):
    whole, _ = finished
    for shard in ("1/2", "0/2"):
        done = script("02_generate", *SMALL["02_generate"], f"--SHARD={shard}", f"--OUT={tmp_path}/02_generate", run=whole, data=data)
        assert done.returncode == 0, done.stderr
    assert same("02_generate", whole, tmp_path)


def test_checkpoints_kept_on_the_way_are_scored_if_asked(finished, data, tmp_path):
    run, _ = finished
    done = script("05_eval", "--STEPS=True", f"--CHECKPOINTS={run}/04_selftrain", f"--TARGETS=folder:{data}/toy/day", f"--OUT={tmp_path}/out", run=run, data=data)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["name"], row["iteration"]) for row in rows] == [("04_selftrain/step_000003", 3), ("04_selftrain", 6)]
    assert (tmp_path / "out/classes.png").exists() and Image.open(tmp_path / "out/panels/day.png").width == 256 * 6      # image, two predictions, truth, two errors


def test_pictures_of_any_kind_are_labelled_and_a_broken_one_is_named(finished, data, tmp_path):
    whole, _ = finished
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGBA", (90, 70)).save(photos / "a.png"), Image.new("L", (301, 33)).save(photos / "b.png"), Image.new("P", (64, 64)).save(photos / "c.png")
    (photos / "more").mkdir()
    Image.new("RGB", (40, 50)).save(photos / "more/e.png"), Image.new("RGB", (50, 40)).save(photos / "more/e.jpg")
    (photos / "d.jpg").write_bytes(b"not a picture")
    done = script("05_eval", f"--IMAGES={photos}", f"--OUT={tmp_path}/out", run=whole, data=data)
    assert "d.jpg" in done.stderr and done.returncode == 1
    for stem, size in (("a", (90, 70)), ("b", (301, 33)), ("c", (64, 64)), ("more/e.png", (40, 50)), ("more/e.jpg", (50, 40))):
        ids = Image.open(tmp_path / "out/images/train_ids" / f"{stem}.png")
        assert ids.size == size and np.asarray(ids).max() < 12
