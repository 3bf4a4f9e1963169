"""Every command of README's "Experiments" parses and starts: one step of each in miniature, the paper's data, models and folders swapped for the toy's."""
import contextlib
import io
import re
import sys

import pytest

import common
from conftest import ROOT, fresh

TEXT = (ROOT / "README.md").read_text().split("## Experiments")[1].split("\n## ")[0]
COMMANDS = list(dict.fromkeys(re.findall(r"`(python 0[1-5]_\w+\.py[^`]*)`", TEXT)))


def in_miniature(command, run):
    """The argument list of a command with few steps, toy models and the toy's folders."""
    words = command.replace("runs/gta/", f"{run}/").split()
    words = [w for w in words[1:] if not w.startswith("--ENCODER=")]
    words = [f"--N_IMAGES={max(2, int(w.split('=')[1]) // 1000)}" if w.startswith("--N_IMAGES") else w for w in words]
    words = [f"--SAM_MIN_AREA={int(w.split('=')[1]) // 50}" if w.startswith("--SAM_MIN_AREA") else w for w in words]
    few = {"02": ["--STEPS=1", "--GROUP=2"], "03": ["--ITERATIONS=1", "--BATCH=2", "--POINTS=64"], "04": ["--ITERATIONS=1", "--N_SOURCE=1", "--POINTS=64", "--PREVIEW_EVERY=9"], "05": ["--PANELS=0"]}[words[0][:2]]
    few += ["--N_GENERATED=1"] if words[0].startswith("04") and not any(w.startswith("--N_GENERATED") for w in words) else []
    return [words[0].removesuffix(".py"), *words[1:], *few]


def test_the_section_has_the_commands():
    assert len(COMMANDS) >= 30 and {c.split()[1] for c in COMMANDS} == {"02_generate.py", "03_train_source.py", "04_selftrain.py", "05_eval.py"}


@pytest.fixture(scope="module")
def started(finished, data, tmp_path_factory):
    """All commands, in README's order, in one run folder and one process -> [(command, why it stopped or None, what it printed)]"""
    whole, _ = finished
    run, results = tmp_path_factory.mktemp("experiments"), []
    for stage in ("01_prompts", "02_generate"):
        (run / stage).symlink_to(whole / stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "RUN", str(run))
        patch.setattr(common, "DATA", str(data))
        for command in COMMANDS:
            name, *arguments = in_miniature(command, run)
            patch.setattr(sys, "argv", [f"{name}.py", *arguments])
            said, stopped = io.StringIO(), None
            with contextlib.redirect_stdout(said):
                try:
                    common.launch(vars(fresh(name)))
                except SystemExit as problem:
                    stopped = problem.code
            results.append((command, stopped, said.getvalue()))
    return results


def test_every_command_starts_and_ends(started):
    assert [(command, stopped) for command, stopped, _ in started if stopped] == []


def test_evaluation_compares_them(started):
    said, = [said for command, _, said in started if "05_eval" in command]
    assert "| comparison | seeds | mean | difference to the first |" in said and "04_mitb5" in said
