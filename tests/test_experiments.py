"""Every command of the README runs: its constants exist and are in range under its preset, and the
experiments start in miniature, with few steps and the toy's models in place of the paper's."""
import importlib.util
import json
import re
import sys

import pytest

import common
from conftest import ROOT, fresh, here

README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGE = r"(0[1-5]_\w+)\.py((?: +--[A-Z_0-9]+=[^\s`;|&]*)*)"


def commands():
    """[(preset, stage, arguments)] of README's shell blocks and of commands in its text, in order.
    A block's `export PRESET=...` holds until its end, PRESET=... before a command for that; what
    names runs/gta/ is of gta."""
    found = []
    parts = re.findall(r"```(?:bash|sh)\n(.*?)```|`([^`\n]*python 0[^`\n]*)`", README, re.DOTALL)
    for block, inline in parts:
        text = re.sub(r"\\\n\s*", " ", block or inline)
        preset = "gta" if "runs/gta/" in text else "toy"
        for line in text.splitlines():
            line = line.partition(" #")[0]
            named = re.findall(r"\bPRESET=(\w+)", line)
            if named and re.match(r"\s*export ", line):
                preset = named[0]
            for stage, arguments in re.findall(STAGE, line):
                found.append((named[0] if named else preset, stage, tuple(arguments.split())))
    return list(dict.fromkeys(found))


COMMANDS = commands()
STAGES = sorted(path.stem for path in ROOT.glob("0*_*.py"))


def value_of(arguments, name):
    for argument in arguments:
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]


def test_the_readme_has_the_pipeline_and_experiments():
    assert {stage for preset, stage, arguments in COMMANDS if not arguments} >= set(STAGES)
    assert len(COMMANDS) >= 20


def test_04_is_told_what_its_03_was_told():
    """Of 03's run it takes crop and loss by itself, but not these."""
    told = {}
    for preset, stage, arguments in COMMANDS:
        own = {name: value_of(arguments, name) for name in ("SOURCE", "FREEZE_ENCODER")}
        if stage == "03_train_source":
            told[value_of(arguments, "OUT")] = own
        if stage == "04_selftrain":
            begins = (value_of(arguments, "INIT") or "").removesuffix("/model.safetensors")
            assert told.get(begins or None, own) == own, arguments


@pytest.fixture
def under(monkeypatch):
    """under(preset) makes `common` what it is under that preset."""
    def switch(preset):
        monkeypatch.setenv("PRESET", preset)
        spec = importlib.util.spec_from_file_location("common", ROOT / "common.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "common", module)
        monkeypatch.delitem(sys.modules, "03_train_source", raising=False)
        return module
    return switch


@pytest.mark.parametrize("preset, stage, arguments", COMMANDS)
def test_the_constants_of_every_command_exist_and_are_in_range(under, preset, stage, arguments):
    under(preset).override(vars(fresh(stage)), arguments)       # raises Stop if not


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", common.PRESETS)
def test_every_preset_is_in_range(under, preset, stage):
    under(preset).override(vars(fresh(stage)), [])


TOO_LARGE = ("ENCODER", "SOURCE", "BATCH", "ITERATIONS", "POINTS", "CROP", "N_SOURCE",
             "N_GENERATED", "SAM", "TARGETS", "SHORT_SIDE", "LLM", "DIFFUSION", "N_IMAGES", "SIZE",
             "DTYPE", "N_PICTURES")
FEW = {"01_prompts": ["--N_PROMPTS=4"], "02_generate": ["--N_IMAGES=2", "--STEPS=1"],
       "03_train_source": ["--ITERATIONS=1", "--BATCH=2", "--POINTS=64"],
       "04_selftrain": ["--ITERATIONS=1", "--N_SOURCE=1"], "05_eval": ["--PANELS=0"]}


def in_miniature(stage, arguments, run, data):
    """The arguments of a command with few steps, toy models and the toy's folders."""
    small = []
    for argument in arguments:
        if argument.removeprefix("--").partition("=")[0] not in TOO_LARGE:
            argument = re.sub(r"runs/\w+/", f"{run}/", argument)
            small.append(re.sub("=folder:.*", f"=folder:{run}/02_generate", argument))
    if stage == "04_selftrain":
        small.append(f"--N_GENERATED={min(1, int(value_of(arguments, 'N_GENERATED') or 1))}")
    if stage == "05_eval":
        small.append(f"--TARGETS=folder:{data}/toy/day")
    return small + FEW[stage]


# what writes into a folder of its own; then the table that compares them
EXPERIMENTS = [row[1:] for row in COMMANDS if value_of(row[2], "OUT")]
EXPERIMENTS += [row[1:] for row in COMMANDS if row[1] == "05_eval" and row[2]][-1:]


@pytest.mark.slow
def test_every_experiment_runs_and_the_table_compares_them(finished, data, tmp_path, monkeypatch):
    for stage in ("01_prompts", "02_generate", "03_train_source"):
        (tmp_path / stage).symlink_to(finished[0] / stage)
    monkeypatch.setattr(common, "save_sheet", lambda path, rows: None)      # drawing takes longest
    for stage, arguments in EXPERIMENTS:
        small = in_miniature(stage, arguments, tmp_path, data)
        assert here(stage, *small, run=tmp_path, data=data) is None, (stage, arguments)
    rows = json.loads((tmp_path / "05_eval/results.json").read_text())["rows"]
    wanted = {value_of(arguments, "OUT").split("/")[-1] for stage, arguments in EXPERIMENTS
              if stage in ("03_train_source", "04_selftrain")}
    assert len(wanted) >= 10 and wanted <= {row["name"] for row in rows}
