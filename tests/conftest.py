"""What the tests share. Every test runs on a bare CPU: no GPU, no hub, no data set but small ones
drawn here. One thread (THREADS=2: two), so that runs repeat bit for bit.

    python -m pytest tests -q -n 2      what is not marked slow, in two processes
    python -m pytest tests -q -m slow   the rest, alone: what takes long, or measures time"""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS = os.environ.get("THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=THREADS, PRESET="toy")
for name in ("RUN", "DATA"):
    os.environ.pop(name, None)
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/toy")]
sys.modules["conftest"] = sys.modules[__name__]         # `from conftest import ...` is this module

import numpy as np
import pytest
import torch
import world
from filelock import FileLock
from PIL import Image

import common

torch.set_num_threads(int(THREADS))

SMALL = {
    "01_prompts": ["--N_PROMPTS=14"],
    "02_generate": ["--N_IMAGES=6", "--STEPS=2", "--GROUP=2"],
    "03_train_source": ["--ITERATIONS=8", "--BATCH=2", "--POINTS=128", "--SAVE_EVERY=2",
                        "--LOG_EVERY=1", "--PREVIEW_EVERY=4"],
    "04_selftrain": ["--ITERATIONS=6", "--N_SOURCE=1", "--N_GENERATED=2", "--SAVE_EVERY=2",
                     "--LOG_EVERY=1", "--PREVIEW_EVERY=3"],         # POINTS are those of 03
    "05_eval": []}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with -m slow, not without")
    config.option.markexpr = config.option.markexpr or "not slow"
    if config.getoption("dist", "no") == "load":        # -n: the tests of a file share their runs
        config.option.dist = "loadfile"


def environment(run, data, **more):
    """The environment of a script. more: further variables, None = not set."""
    wanted = os.environ | {"RUN": str(run), "DATA": str(data)} | more
    return {name: value for name, value in wanted.items() if value is not None}


def script(name, *arguments, run, data, **more):
    """The real script in a process of its own -> CompletedProcess. more: see environment()."""
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *arguments], capture_output=True,
                          text=True, cwd=ROOT, env=environment(run, data, **more), timeout=1200)


def module_of(path):
    """A file as a new module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh(name):
    """A stage as a new module, so that overridden constants do not leak from test to test."""
    return module_of(ROOT / f"{name}.py")


def once(factory, name, make):
    """A folder for all tests, filled by make(folder) in the first of pytest's processes that needs
    it -> the folder, what make() returned (JSON)"""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.json"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            made.write_text(json.dumps(make(folder)))
    return folder, json.loads(made.read_text())


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few pictures of the miniature world under the names of the toy preset."""
    def draw(root):
        world.write_folder(root / "toy/game_train", "train", "game", 6)
        for style in ("day", "night", "snow", "fog", "rain"):
            world.write_folder(root / "toy" / style, "test", style, 2)
    return once(tmp_path_factory, "data", draw)[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """All five scripts, run once in order with few steps -> (run folder, {stage: its output})."""
    def run_all(run):
        output = {}

        def chain(*names):
            for name in names:
                done = script(name, *SMALL[name], run=run, data=data)
                assert done.returncode == 0, done.stderr
                output[name] = done.stdout

        with ThreadPoolExecutor() as pool:
            painting = pool.submit(chain, "01_prompts", "02_generate")
            pool.submit(chain, "03_train_source").result()
            painting.result()
        chain("04_selftrain", "05_eval")
        return output
    return once(tmp_path_factory, "run", run_all)


def here(name, *arguments, run, data, change=None):
    """The stage in this process, which is faster -> how it ended: None, 0 after --help, or the
    message with which it stopped. change(module) may replace functions of it before."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "RUN", str(run))
        patch.setattr(common, "DATA", str(data))
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        patch.delitem(sys.modules, "03_train_source", raising=False)        # it too reads RUN, DATA
        try:
            stage = fresh(name)
            if change:
                change(stage)
            common.launch(vars(stage))
        except SystemExit as stopped:
            return stopped.code
        finally:
            signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def start(tmp_path, data):
    """start(stage, *arguments, run=...): see here()."""
    def call(name, *arguments, run=tmp_path / "run", change=None):
        return here(name, *arguments, run=run, data=data, change=change)
    return call


@pytest.fixture
def say(start):
    """say(stage, *arguments, run=...) -> the message with which the stage stops."""
    def call(*arguments, **options):
        message = start(*arguments, **options)
        assert isinstance(message, str), "expected a message"
        return message
    return call


@pytest.fixture
def folder(tmp_path):
    """folder(images={stem: array}, labels={stem: array}) -> the name of a `folder:` data set."""
    def make(images, labels, name="own"):
        for kind, arrays in (("images", images), ("labels", labels)):
            (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            for stem, array in arrays.items():
                picture = Image.fromarray(np.asarray(array, np.uint8))
                picture.save(tmp_path / name / kind / f"{stem}.png")
        return f"folder:{tmp_path / name}"
    return make


@pytest.fixture
def launched(monkeypatch):
    """launched(module, *arguments, main=...) -> the message with which it, or this main(), ends."""
    def call(module, *arguments, **changed):
        monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
        vars(module).update(changed)
        with pytest.raises(SystemExit) as stopped:
            common.launch(vars(module))
        return stopped.value.code
    return call


def stop_at_the_checkpoint(stage, *arguments, run, data):
    """The stage in this process, interrupted as soon as its first checkpoint is there."""
    replace = common.os.replace

    def interrupt(part, path):
        replace(part, path)
        if Path(path).name == "checkpoint.pt":
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.os, "replace", interrupt)
        assert "stopped" in here(stage, *arguments, run=run, data=data)
