"""Several processes under torchrun are one: loss and gradients, the stages' files, work that is
shared and not repeated, several nodes. Gloo, on the loopback address."""
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from common import read_lines
from conftest import ROOT, environment, fresh, here

SOURCE = ["--POINTS=128", "--ITERATIONS=2", "--LOG_EVERY=1", "--SAVE_EVERY=1", "--WARMUP=0"]
SELF = ["--ITERATIONS=2", "--LOG_EVERY=1", "--SAVE_EVERY=1"]
TRAINING = "03_train_source", "04_selftrain"


def command(processes, script, *arguments, meet=("--standalone",)):
    """They meet on the loopback address and not under the machine's name, which may be known
    nowhere."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *meet,
            "--local-addr=127.0.0.1", ROOT / script, *map(str, arguments)]


def torchrun(processes, script, *arguments, run, data, rc=0):
    """The real script in some processes, which ends with this code."""
    done = subprocess.run(command(processes, script, *arguments), capture_output=True, text=True,
                          cwd=ROOT, env=environment(run, data), timeout=600)
    assert done.returncode == rc, done.stderr


def two_nodes(script, *arguments, run, data):
    """The real script on two nodes of two processes each"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in range(2):
        meet = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1",
                f"--master_port={port}"]
        line = command(2, script, *arguments, meet=meet)
        nodes.append(subprocess.Popen(line, cwd=ROOT, env=environment(run, data),
                                      stderr=subprocess.PIPE, text=True))
    try:
        errors = [node.communicate(timeout=600)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors


# ---------------------------------------------------------------------------- one step
@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """-> {"ignore" or "negative": what tests/processes.py saves of one process}"""
    out = tmp_path_factory.mktemp("one")

    def compute(unlabelled):
        arguments = sys.executable, ROOT / "tests/processes.py", out / unlabelled, unlabelled
        subprocess.run(arguments, check=True, env=environment(out, data), timeout=600)
        return torch.load(f"{out / unlabelled}.1.pt")
    return {name: compute(name) for name in ("ignore", "negative")}


@pytest.mark.parametrize("processes, unlabelled", [
    (2, "ignore"), pytest.param(4, "ignore", marks=pytest.mark.slow),
    pytest.param(8, "ignore", marks=pytest.mark.slow),
    pytest.param(8, "negative", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_one_process(one, tmp_path, data, processes, unlabelled):
    torchrun(processes, "tests/processes.py", tmp_path / "found", unlabelled, run=tmp_path,
             data=data)
    found, wanted = torch.load(tmp_path / f"found.{processes}.pt"), one[unlabelled]
    assert found["numbers"].allclose(wanted["numbers"], rtol=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


def test_every_item_of_a_step_is_dealt_once(monkeypatch):
    stage, dealt = fresh("03_train_source"), []
    monkeypatch.setattr(common, "PROCESSES", 4)
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        source = stage.batches(range(1000), 6, 5, 7, 0)
        painted = stage.batches(range(1000), 2, 5, 7, 0, offset=6)
        dealt.append([(a.tolist(), b if b is None else b.tolist())
                      for a, b in zip(source, painted)])
    first, second = zip(*dealt)
    # step 5 has source items 30 to 35 and painted items 10, 11: eight pictures in turn
    assert first == (([30, 34], None), ([31, 35], None), ([32], [10]), ([33], [11]))
    assert second == (([36, 40], None), ([37, 41], None), ([38], [12]), ([39], [13]))


def test_processes_that_begin_at_different_steps_stop(monkeypatch):
    monkeypatch.setattr(common, "PROCESSES", 2)
    monkeypatch.setattr(common, "device", lambda: "cpu")
    monkeypatch.setattr(common, "sum_of_processes", lambda number: number + 1)
    with pytest.raises(common.Stop, match="not all processes begin at step 3: a shared folder"):
        common.agree("begin at step 3")


@pytest.mark.parametrize("stage, number", [("03_train_source", 8), ("04_selftrain", 6)])
def test_a_number_that_does_not_divide_is_refused(monkeypatch, say, stage, number):
    monkeypatch.setattr(common, "PROCESSES", 5)
    assert f"5 processes cannot share {number} pictures per step evenly" in say(stage)


def test_bfloat16_only_where_the_card_has_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        assert common.bfloat16.__wrapped__(True) == has and not common.bfloat16(False)
    assert capsys.readouterr().out == "HALF: Tesla T4 has no bfloat16, float32 is used\n"


# ---------------------------------------------------------------------------- whole stages
@pytest.fixture(scope="module")
def chains(tmp_path_factory, data):
    """02 to 05 in one process, in four, and on two nodes of two -> the three run folders.
    04 has four pictures per step: of four processes two have painted ones alone."""
    root = tmp_path_factory.mktemp("chains")
    stages = {"02_generate": [f"--PROMPTS={ROOT}/tests/prompts.txt", "--N_IMAGES=6", "--GROUP=1",
                              "--STEPS=2"],
              "03_train_source": ["--BATCH=4", *SOURCE],
              "04_selftrain": ["--N_SOURCE=2", "--N_GENERATED=2", *SELF,
                               f"--GENERATED=folder:{data}/toy/day/images",
                               f"--INIT={root}/one/03_train_source"],
              "05_eval": ["--PANELS=0"]}
    for stage, arguments in stages.items():
        assert here(stage, *arguments, run=root / "one", data=data) is None
        torchrun(4, f"{stage}.py", *arguments, run=root / "four", data=data)
        two_nodes(f"{stage}.py", *arguments, run=root / "nodes", data=data)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("many", ["four", "nodes"])
def test_the_stages_of_many_processes_write_what_one_writes_once(chains, many):
    one, many = chains / "one", chains / many
    for path in sorted(one.rglob("[!.]*")):
        if path.is_file() and path.parent.name != "confusion":      # its names hold digests
            assert (many / path.relative_to(one)).exists(), path
    assert not list(many.rglob("*.part")) and not list(many.rglob("checkpoint.pt"))
    assert len(list(many.glob("sam_embeddings/**/*.npy"))) == 2     # each in one process
    for picture in sorted(one.glob("02_generate/*_p*.png")):        # the same bits
        assert picture.read_bytes() == (many / "02_generate" / picture.name).read_bytes()
    for stage in TRAINING:
        a, b = (load_file(run / stage / "model.safetensors") for run in (one, many))
        assert a.keys() == b.keys() and len(a) > 20
        a, b = (read_lines(run / stage / "log.jsonl") for run in (one, many))
        assert [row["step"] for row in b] == [1, 2]
        for ours, theirs in zip(a, b):
            assert ours.keys() == theirs.keys()
            assert abs(ours["loss"] - theirs["loss"]) < .05 * ours["loss"]  # random points differ
    for name in ("labelled", "changed", "prompts"):     # one teacher, and each picture's own points
        assert abs(a[0][name] - b[0][name]) < 1e-3
    assert a[0]["prompts"] > 0


@pytest.mark.slow
def test_05_of_many_processes_counts_what_one_counts(chains, data, tmp_path):
    arguments = f"--CHECKPOINTS={chains}/one/03_train_source/model.safetensors", "--PANELS=0"
    assert here("05_eval", *arguments, run=tmp_path / "one", data=data) is None
    torchrun(4, "05_eval.py", *arguments, run=tmp_path / "four", data=data)
    one, four = (sorted((tmp_path / run / "05_eval/confusion").iterdir())
                 for run in ("one", "four"))
    assert len(one) == len(four) == 5
    for a, b in zip(one, four):
        assert a.name == b.name and np.array_equal(np.load(a), np.load(b))


STOP_AT = """
import sys
sys.path.insert(0, {root!r})
from importlib import import_module
import common
stage = import_module("03_train_source")
save = stage.Progress.save

def save_and_stop(progress, done):
    save(progress, done)
    common.wait_for_others()
    if done == {step}:
        raise common.Stop("enough")
stage.Progress.save = save_and_stop
common.launch(vars(stage))
"""


@pytest.mark.slow
def test_another_number_of_processes_resumes(data, tmp_path):
    arguments = "--BATCH=4", *SOURCE, "--ITERATIONS=4"
    for processes, step in ((2, 1), (1, 2)):            # 03 ends itself after these checkpoints
        script = tmp_path / f"stop_{step}.py"
        script.write_text(STOP_AT.format(root=str(ROOT), step=step))
        torchrun(processes, script, *arguments, run=tmp_path, data=data, rc=1)
    torchrun(4, "03_train_source.py", *arguments, run=tmp_path, data=data)
    log = read_lines(tmp_path / "03_train_source/log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert len(load_file(tmp_path / "03_train_source/model.safetensors")) > 20
