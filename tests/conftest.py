"""Every test runs on a bare CPU: no GPU, no hub, no data set but small ones drawn here. One thread, so that runs repeat bit for bit."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PRESET="toy")
sys.path[:0] = [str(ROOT), str(ROOT / "tests/toy")]

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)

import common
import world

SMALL = {"01_prompts": ["--N_PROMPTS=14"], "02_generate": ["--N_IMAGES=6", "--STEPS=2", "--GROUP=2"],
         "03_train_source": ["--ITERATIONS=8", "--BATCH=2", "--POINTS=128", "--SAVE_EVERY=2", "--LOG_EVERY=1"],
         "04_selftrain": ["--ITERATIONS=6", "--N_SOURCE=1", "--N_GENERATED=2", "--POINTS=128", "--SAVE_EVERY=2", "--LOG_EVERY=1", "--PREVIEW_EVERY=3", "--KEEP_EVERY=3"], "05_eval": []}


def script(name, *arguments, run, data, **more):
    """The real script in a process of its own -> CompletedProcess. more: environment variables, None = not set."""
    environment = {k: v for k, v in {**os.environ, "RUN": str(run), "DATA": str(data), **more}.items() if v is not None}
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def fresh(name):
    """A stage as a new module, so that overridden constants do not leak from test to test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few pictures of the miniature world under the names of the toy preset."""
    root = tmp_path_factory.mktemp("data")
    for style, n in (("game_train", 6), ("day", 2), ("night", 2), ("snow", 2), ("fog", 2), ("rain", 2)):
        world.write_folder(root / "toy" / style, "train" if style == "game_train" else "test", style.split("_")[0], n)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """All five scripts run once, in order, with few steps -> (run folder, {stage: what it printed})."""
    run, said = tmp_path_factory.mktemp("run"), {}
    for name, arguments in SMALL.items():
        done = script(name, *arguments, run=run, data=data)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    return run, said


@pytest.fixture
def say(monkeypatch, tmp_path, data):
    """say(stage, *arguments, run=...) -> the one line with which the stage stops."""
    def call(name, *arguments, run=tmp_path / "run"):
        monkeypatch.setattr(common, "RUN", str(run))
        monkeypatch.setattr(common, "DATA", str(data))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            common.launch(vars(fresh(name)))
        assert isinstance(stopped.value.code, str), "expected a message"
        return stopped.value.code
    return call


@pytest.fixture
def folder(tmp_path):
    """folder(images={stem: array}, labels={stem: array}) -> the name of a `folder:` data set."""
    def make(images, labels, name="own"):
        for kind, arrays in (("images", images), ("labels", labels)):
            (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            for stem, array in arrays.items():
                Image.fromarray(np.asarray(array, np.uint8)).save(tmp_path / name / kind / f"{stem}.png")
        return f"folder:{tmp_path / name}"
    return make
