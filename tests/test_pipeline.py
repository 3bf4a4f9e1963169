"""The five real scripts, in order, on the real miniatures: what they leave behind, that they do
nothing twice, and that a kill does not change the result."""
import json
import re
import shutil
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from references import RESULT, SmallRun, equal, same
from safetensors.torch import load_file

import common
from common import read_lines
from conftest import SMALL, here, stop_at_the_checkpoint


# ---------------------------------------------------------------------------- what they leave
def test_every_stage_leaves_its_result_and_a_record(finished):
    run, _ = finished
    for stage, result in RESULT.items():
        assert (run / stage / result).exists()
        record, = read_lines(run / stage / "run.json")
        assert record["stage"] == stage and record["preset"] == "toy"
        assert record["wall_seconds"] > 0 and record["gpu_memory_gb"] >= 0
        assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert f"--{SMALL[stage][0].strip('-')}" in record["argv"] if SMALL[stage] else True
    assert not list(run.rglob("*.part")) and not list(run.rglob("checkpoint.pt"))


@pytest.mark.parametrize("stage, steps, columns", [
    ("03_train_source", 8, {"loss", "class", "mask", "dice", "norm", "seconds", "wait"}),
    ("04_selftrain", 6, {"loss", "labelled", "changed", "prompts", "seconds", "wait"})])
def test_the_log_has_every_step_once(finished, stage, steps, columns):
    folder = finished[0] / stage
    rows = read_lines(folder / "log.jsonl", *columns)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    for name in (f"preview_{steps // 2:06d}.png", f"preview_{steps:06d}.png", "loss.png"):
        assert Image.open(folder / name).width > 500


def test_the_table_has_a_row_per_checkpoint_and_a_column_per_style(finished):
    run, output = finished
    rows = json.loads((run / "05_eval/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["03_train_source", "04_selftrain"]
    for row in rows:
        styles = [target.split("/")[-1] for target in row["targets"]]
        assert styles == ["day", "night", "snow", "fog", "rain"]
        mean = np.mean([target["miou"] for target in row["targets"].values()])
        assert abs(row["mean_miou"] - mean) < .01
    assert "| 04_selftrain |" in output["05_eval"]
    assert (run / "05_eval/results.md").read_text() in output["05_eval"]


# ---------------------------------------------------------------------------- nothing twice
@pytest.mark.parametrize("stage", RESULT)
def test_a_finished_stage_says_so(finished, stage, start, capsys):
    run, more = finished[0], ["--SAM_CHUNK=8"] * (stage == "04_selftrain")      # may change
    before = (run / stage / RESULT[stage]).stat().st_mtime_ns
    assert start(stage, *SMALL[stage], *more, run=run) is None
    output = capsys.readouterr().out
    if stage == "05_eval":          # looks for new checkpoints and prints the table again
        assert " images\n" not in output and "| 04_selftrain |" in output
    else:
        assert f"{stage}: finished before" in output
        assert (run / stage / RESULT[stage]).stat().st_mtime_ns == before


def test_source_only_is_the_control_with_as_many_steps(finished, tmp_path, start):
    arguments = *SMALL["04_selftrain"], "--N_GENERATED=0", f"--OUT={tmp_path}/control"
    assert start("04_selftrain", *arguments, run=finished[0]) is None
    last = read_lines(tmp_path / "control/log.jsonl")[-1]
    assert last["step"] == 6 and "labelled" not in last
    assert (tmp_path / "control/model.safetensors").exists()


# ---------------------------------------------------------------------------- stopped runs
@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run folder of 03 that was stopped at its first checkpoint"""
    run = tmp_path_factory.mktemp("stopped")
    stop_at_the_checkpoint("03_train_source", *SMALL["03_train_source"], run=run, data=data)
    return run


def test_03_resumes_to_the_same_result(stopped, finished, start, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    small = *SMALL["03_train_source"], "--PREVIEW_EVERY=100"        # previews do not change it
    assert start("03_train_source", *small, run=run) is None
    assert same("03_train_source", finished[0], run) and "resuming at" in capsys.readouterr().out
    assert len(read_lines(run / "03_train_source/log.jsonl")) == 8


def test_a_checkpoint_is_not_taken_for_a_network(stopped, say):
    path = stopped / "03_train_source/checkpoint.pt"
    assert f"{path} is no network: take a run's model" in say("05_eval", f"--CHECKPOINTS={path}")
    assert "when they are finished" in say("05_eval", f"--CHECKPOINTS={path.parent}")


def test_a_flipped_bit_in_a_checkpoint_is_noticed(stopped, say, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    path = run / "03_train_source/checkpoint.pt"
    largest = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1        # amid a tensor
    path.write_bytes(content)
    message = say("03_train_source", *SMALL["03_train_source"], run=run)
    assert f"{path} is damaged" in message and "remove it" in message
    assert path.read_bytes() == content


def test_a_checkpoint_of_other_constants_is_refused(stopped, say, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    record = run / "03_train_source/run.json"
    record.write_text(record.read_text().replace('"LR": 0.0015', '"LR": 0.0001'))
    message = say("03_train_source", *SMALL["03_train_source"], "--LR=1e-4", run=run)
    assert "was made with LR=0.0015 (now 0.0001)" in message and "\n" not in message


def resumed(folder, module):
    return import_module("03_train_source").Progress(SmallRun(folder), {"module": module}, 8)


NAN = {"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)}


@pytest.mark.parametrize("write", [
    {"step": 8}, {"step": 0}, {"step": "3"}, {"step": None}, {"module": {}}, {"module": NAN},
    {"path": Path("a")},
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"half way"),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"step": 3}, path),
    lambda path: path.mkdir()])
def test_a_checkpoint_that_is_something_else_is_refused(tmp_path, write):
    path, module = tmp_path / "checkpoint.pt", torch.nn.Linear(2, 2)
    resumed(tmp_path, module).save(3)
    state = torch.load(path)
    path.unlink()
    if callable(write):
        write(path)
    else:
        torch.save(state | write, path)
    with pytest.raises(common.Stop, match="checkpoint.pt") as stopped:
        resumed(tmp_path, module)
    assert "remove it to begin again" in str(stopped.value) and path.exists()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_a_number_keeps_an_earlier_checkpoint(say, tmp_path, log_every):
    small = ("--BATCH=1", "--POINTS=16", "--CROP=32,32", "--LAYERS=1", "--PREVIEW_EVERY=1000")
    explode = ("--LR=1", "--WEIGHT_DECAY=10", "--LOSS_WEIGHTS=1000,1000,1000", "--WARMUP=0")
    every = "--SAVE_EVERY=1", f"--LOG_EVERY={log_every}", "--ITERATIONS=100"
    message = say("03_train_source", *small, *explode, *every)
    assert "\n" not in message and "not a number" in message
    out = tmp_path / "run/03_train_source"
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < int(re.search(r"step (\d+)", message)[1])
    assert all(tensor.isfinite().all() for tensor in state["network"].values())
    assert not (out / "model.safetensors").exists()


def test_an_error_in_a_worker_is_a_message_that_names_the_file(folder, say, tmp_path, capfd):
    name = folder({"a": np.zeros((64, 64, 3))}, {"a": np.zeros((64, 64))})
    path = tmp_path / "own/images/a.png"
    path.write_bytes(path.read_bytes()[:-20])
    message = say("03_train_source", f"--SOURCE={name}", "--WORKERS=2", "--BATCH=2")
    problem, remedy = message.splitlines()
    assert problem.startswith(f"03_train_source.py: {path} cannot be read as a picture")
    assert remedy.startswith("  it is damaged or no picture")
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------- trainable encoder
TRAIN_04 = ("--FREEZE_ENCODER=False", "--ITERATIONS=2", "--N_SOURCE=1", "--N_GENERATED=1",
            "--SAVE_EVERY=1", "--EMA=0.5", "--LR=1e-3", "--WARMUP=0")


@pytest.fixture(scope="module")
def trained(finished, data, tmp_path_factory):
    """03 with a trainable encoder, then 04 as it comes, on the pictures of `finished` -> folder"""
    run = tmp_path_factory.mktemp("trained")
    (run / "02_generate").symlink_to(finished[0] / "02_generate")
    arguments = "--ITERATIONS=2", "--BATCH=2", "--FREEZE_ENCODER=False", "--WARMUP=0"
    assert here("03_train_source", *arguments, run=run, data=data) is None
    assert here("04_selftrain", *TRAIN_04, run=run, data=data) is None
    return run


def encoder_of(path):
    named = load_file(path).items()
    return {k.removeprefix("encoder."): v for k, v in named if k.startswith("encoder.")}


def original():
    """The encoder of the toy preset, as it is shipped"""
    return import_module("03_train_source").Encoder(f"open_clip:local-dir:{common.MINIATURES}/clip")


def distance(one, other):
    return sum((one[k].double() - other[k]).abs().sum().item() for k in one if "num_" not in k)


def test_04_goes_on_training_the_encoder_that_03_trained(trained):
    first = encoder_of(trained / "03_train_source/model.safetensors")
    student = encoder_of(trained / "04_selftrain/model.safetensors")
    teacher = encoder_of(trained / "04_selftrain/teacher.safetensors")
    assert first.keys() == student.keys() == teacher.keys() == original().state_dict().keys()
    assert not equal(first, original().state_dict())
    record, = read_lines(trained / "04_selftrain/run.json")
    assert record["constants"]["FREEZE_ENCODER"] is False
    # the teacher lies between theta_0 and the student
    assert 0 < distance(teacher, first) < distance(student, first)


def test_04_goes_on_with_both_encoders_where_it_was_stopped(trained, data, tmp_path):
    arguments = *TRAIN_04, f"--OUT={tmp_path}/04_selftrain"
    stop_at_the_checkpoint("04_selftrain", *arguments, run=trained, data=data)
    assert here("04_selftrain", *arguments, run=trained, data=data) is None
    assert same("04_selftrain", trained, tmp_path)


def test_04_can_freeze_an_encoder_that_03_trained(trained, tmp_path, start):
    arguments = *TRAIN_04, "--FREEZE_ENCODER=True", f"--OUT={tmp_path}/out"
    assert start("04_selftrain", *arguments, run=trained) is None
    first = encoder_of(trained / "03_train_source/model.safetensors")
    for name in ("model", "teacher"):
        assert equal(encoder_of(tmp_path / f"out/{name}.safetensors"), first)


def test_05_loads_the_encoder_that_was_trained(trained):
    file = trained / "04_selftrain/model.safetensors"
    encoder, _, _ = import_module("03_train_source").load_model(file)
    assert equal(encoder.state_dict(), encoder_of(file))
