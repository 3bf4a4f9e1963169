"""Several processes under torchrun are one: loss and gradients, the stages' files, work that is
shared and not repeated, several nodes. Gloo, on the loopback address."""
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from conftest import ROOT, environment, fresh, here

SOURCE = ["--POINTS=128", "--ITERATIONS=2", "--LOG_EVERY=1", "--SAVE_EVERY=1", "--WARMUP=0"]
SELF = ["--ITERATIONS=2", "--LOG_EVERY=1", "--SAVE_EVERY=1"]


def command(processes, script, *arguments, nodes=1, node=0, port=None):
    meet = ["--standalone"] if nodes == 1 else [
        f"--nnodes={nodes}", f"--node_rank={node}", "--master_addr=127.0.0.1",
        f"--master_port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *meet,
            "--local-addr=127.0.0.1", ROOT / script, *map(str, arguments)]


def torchrun(processes, script, *arguments, run, data):
    """The real script in some processes -> CompletedProcess"""
    return subprocess.run(command(processes, script, *arguments), capture_output=True, text=True,
                          cwd=ROOT, env=environment(run, data), timeout=600)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------- one step
@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """-> function: "ignore" or "negative" -> what tests/processes.py saves of one process"""
    out = tmp_path_factory.mktemp("one")

    def compute(unlabelled):
        arguments = sys.executable, ROOT / "tests/processes.py", out / unlabelled, unlabelled
        subprocess.run(arguments, check=True, env=environment(out, data))
        return torch.load(f"{out / unlabelled}.1.pt")
    return {name: compute(name) for name in ("ignore", "negative")}


@pytest.mark.parametrize("processes, unlabelled", [
    (2, "ignore"), pytest.param(4, "ignore", marks=pytest.mark.slow),
    pytest.param(8, "ignore", marks=pytest.mark.slow),
    pytest.param(8, "negative", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_one_process(one, tmp_path, data, processes, unlabelled):
    done = torchrun(processes, "tests/processes.py", tmp_path / "found", unlabelled,
                    run=tmp_path, data=data)
    assert done.returncode == 0, done.stderr
    found, wanted = torch.load(tmp_path / f"found.{processes}.pt"), one[unlabelled]
    assert found["numbers"].allclose(wanted["numbers"], rtol=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


def test_every_item_of_a_step_is_dealt_once(monkeypatch):
    stage = fresh("03_train_source")
    dealt = []
    monkeypatch.setattr(common, "PROCESSES", 4)
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        source = stage.batches(range(1000), 6, 5, 7, 0)
        painted = stage.batches(range(1000), 2, 5, 7, 0, offset=6)
        dealt.append([(a.tolist(), b if b is None else b.tolist())
                      for a, b in zip(source, painted)])
    # step 5 has source items 30 to 35 and painted items 10, 11: eight pictures in turn
    assert [steps[0] for steps in dealt] == [([30, 34], None), ([31, 35], None), ([32], [10]),
                                             ([33], [11])]
    assert [steps[1] for steps in dealt] == [([36, 40], None), ([37, 41], None), ([38], [12]),
                                             ([39], [13])]


@pytest.mark.parametrize("stage, number", [("03_train_source", 8), ("04_selftrain", 6)])
def test_a_number_that_does_not_divide_is_refused(monkeypatch, say, stage, number):
    monkeypatch.setattr(common, "PROCESSES", 5)
    message = say(stage)
    assert f"5 processes cannot share {number} pictures per step evenly" in message


def test_bfloat16_only_where_the_card_has_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        assert common.bfloat16(True) == has and not common.bfloat16(False)
    assert capsys.readouterr().out == "HALF: Tesla T4 has no bfloat16, float32 is used\n"


# ---------------------------------------------------------------------------- whole stages
@pytest.fixture(scope="module")
def chains(tmp_path_factory, data):
    """03, 04 and 05 in one process, in four, and on two nodes of two -> the three run folders.
    04 has four pictures per step: of four processes two have painted ones alone."""
    root = tmp_path_factory.mktemp("chains")
    painted = f"--GENERATED=folder:{data}/toy/day/images"
    stages = {"03_train_source": ["--BATCH=4", *SOURCE],
              "04_selftrain": ["--N_SOURCE=2", "--N_GENERATED=2", *SELF, painted,
                               f"--INIT={root}/one/03_train_source"],
              "05_eval": ["--PANELS=0"]}
    for stage, arguments in stages.items():
        assert here(stage, *arguments, run=root / "one", data=data) is None
        done = torchrun(4, f"{stage}.py", *arguments, run=root / "four", data=data)
        assert done.returncode == 0, done.stderr
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = []
        for node in range(2):
            line = command(2, f"{stage}.py", *arguments, nodes=2, node=node, port=port)
            nodes.append(subprocess.Popen(line, cwd=ROOT, env=environment(root / "nodes", data),
                                          stderr=subprocess.PIPE, text=True))
        for node in nodes:
            error = node.communicate(timeout=600)[1]
            assert node.returncode == 0, error
    return root


@pytest.mark.slow
@pytest.mark.parametrize("many", ["four", "nodes"])
def test_the_stages_of_many_processes_write_what_one_writes(chains, many):
    for path in sorted((chains / "one").rglob("[!.]*")):
        if path.is_file() and path.parent.name != "confusion":      # its names hold digests
            assert (chains / many / path.relative_to(chains / "one")).exists(), path
    assert not list((chains / many).rglob("*.part"))
    for stage in ("03_train_source", "04_selftrain"):
        logs = [rows(chains / run / stage / "log.jsonl") for run in ("one", many)]
        assert [row["step"] for row in logs[1]] == [1, 2]
        assert [row.keys() for row in logs[1]] == [row.keys() for row in logs[0]]
        for a, b in zip(*logs):
            assert abs(a["loss"] - b["loss"]) < .05 * a["loss"]     # random points differ
    first = [rows(chains / run / "04_selftrain/log.jsonl")[0] for run in ("one", many)]
    for name in ("labelled", "changed", "prompts"):     # one teacher, and each picture's own points
        assert abs(first[0][name] - first[1][name]) < 1e-3
    assert first[0]["prompts"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("many", ["four", "nodes"])
def test_sams_embeddings_are_computed_once_in_total(chains, many):
    names = [sorted(path.name for path in (chains / run / "sam_embeddings").rglob("*.npy"))
             for run in ("one", many)]
    assert names[0] == names[1] and len(names[0]) == 2


@pytest.mark.slow
def test_05_of_many_processes_counts_what_one_counts(chains, data, tmp_path):
    checkpoint = chains / "one/03_train_source/model.safetensors"
    assert here("05_eval", f"--CHECKPOINTS={checkpoint}", "--PANELS=0", run=tmp_path / "one",
                data=data) is None
    done = torchrun(4, "05_eval.py", f"--CHECKPOINTS={checkpoint}", "--PANELS=0",
                    run=tmp_path / "four", data=data)
    assert done.returncode == 0, done.stderr
    one, four = (sorted((tmp_path / run / "05_eval/confusion").iterdir())
                 for run in ("one", "four"))
    assert len(one) == len(four) == 5
    for a, b in zip(one, four):
        assert a.name == b.name and np.array_equal(np.load(a), np.load(b))


@pytest.mark.slow
def test_another_number_of_processes_resumes(data, tmp_path):
    arguments = "--BATCH=4", *SOURCE
    for processes, steps in ((2, 1), (1, 2), (4, 3)):
        done = torchrun(processes, "03_train_source.py", *arguments, "--ITERATIONS=4",
                        run=tmp_path, data=data) if steps == 3 else stopped(
            processes, steps, arguments, tmp_path, data)
        assert done.returncode == (0 if steps == 3 else 1), done.stderr
    log = rows(tmp_path / "03_train_source/log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert len(load_file(tmp_path / "03_train_source/model.safetensors")) > 20


def stopped(processes, step, arguments, run, data):
    """03 that ends itself after a checkpoint at `step`."""
    script = run / f"stop_{step}.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
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
""")
    return torchrun(processes, script, *arguments, "--ITERATIONS=4", run=run, data=data)
