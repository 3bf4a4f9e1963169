"""The hand that edits: a constant or a line of a script is changed, and it is run again. An edit is
obeyed, or refused in one line; it is recorded; a mistake keeps its traceback."""
import json
import os
import shutil
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import ROOT, SMALL, fresh, here, module_of

source_stage = import_module("03_train_source")
SMALL = {**SMALL, "03_train_source": ["--BATCH=2", "--POINTS=128", "--ITERATIONS=1"],
         "04_selftrain": ["--ITERATIONS=1", "--N_SOURCE=1", "--PREVIEW_EVERY=1"]}


@pytest.fixture
def edited(tmp_path):
    """edited(stage, line) -> the stage as a module of a file with one line more."""
    def load(name, line, before="SEED = 0"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert text.count(f"\n{before}\n") == 1
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace(f"\n{before}\n", f"\n{line}\n{before}\n"), encoding="utf-8")
        return module_of(path)
    return load


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of 03 and of 04 on two painted pictures -> its folder."""
    run = tmp_path_factory.mktemp("trained") / "run"
    painted = shutil.copytree(data / "toy/day/images", run / "painted")
    assert here("03_train_source", *SMALL["03_train_source"], run=run, data=data) is None
    arguments = [*SMALL["04_selftrain"], f"--GENERATED=folder:{painted}"]
    assert here("04_selftrain", *arguments, run=run, data=data) is None
    return run


@pytest.fixture
def again(trained, tmp_path, data):
    """again(stage) starts it again in a copy of the trained run -> the message where it stops."""
    def call(stage, *more, data=data, prepare=lambda run: None):
        run = shutil.copytree(trained, tmp_path / "copy")
        prepare(run)
        if stage == "04_selftrain":
            more = f"--GENERATED=folder:{run}/painted", *more
        return here(stage, *SMALL[stage], *more, run=run, data=data)
    return call


# ---------------------------------------------------------------------------- constants
KIND = "a constant is a bool, int, float, str or tuple"


@pytest.mark.parametrize("line, answer", [
    ("LR = None", KIND), ("CROP = [128, 256]", KIND), ("SOURCE = ['gta']", KIND),
    ("LR = torch.tensor(1.)", KIND), ("A = 1; B = [2]", KIND), ("A = {'ce': len}", KIND),
    ("A = torch.float16, 1", KIND), ("A = 1, None", KIND),
    ("LOSS_WEIGHTS = (0., 0., 0.)", "one of them must be more than 0")])
def test_a_constant_of_another_kind_or_type_is_refused_in_one_line(edited, launched, line, answer):
    message = launched(edited("03_train_source", line))
    assert answer in message and message.count("\n") == 0


WRONG = {bool: ("False", 1), str: (7, ("a",), True), int: ("1", 1.5, True, (1,)),
         float: ("fast", True, (.5,)), tuple: ("gta", 128, ((1, 2),) * 3)}


@pytest.mark.parametrize("stage", sorted(path.stem for path in ROOT.glob("0*.py")))
def test_every_constant_of_another_type_is_named(stage):
    for name, value in common.constants(vars(fresh(stage))).items():
        for wrong in WRONG.get(type(value), ()):
            module = fresh(stage)
            setattr(module, name, wrong)
            with pytest.raises(common.Stop, match=f"^{name}=.*expected") as stopped:
                module.check()
            assert "\n" not in str(stopped.value)


def test_a_home_in_an_edited_path_is_expanded(edited, launched):
    module = edited("03_train_source", 'A = "~/a", "folder:~/b"')
    message = launched(module, main=lambda: sys.exit(str(module.A)))
    assert message == str((os.path.expanduser("~/a"), f"folder:{os.path.expanduser('~/b')}"))


@pytest.mark.parametrize("name", ["FREE", "TOY", "FOLDER", "AGAIN", "RANK", "PROCESSES", "HERE"])
def test_a_constant_may_have_any_name(edited, launched, name):
    module = edited("03_train_source", f"{name} = 0")
    assert common.constants(vars(module))[name] == 0
    message = launched(module, f"--{name}=3", main=lambda: sys.exit(f"now {vars(module)[name]}"))
    assert message == "now 3"


def test_names_that_are_imported_or_local_are_no_constants(edited):
    module = edited("04_selftrain", "A, B = (N + 1 for N in (0, 1))")
    found = common.constants(vars(module))
    assert (found["A"], found["B"]) == (1, 2)
    assert not {"CLASSES", "IGNORE", "DATA", "RUN", "MINIATURES", "E", "D", "N"} & set(found)


@pytest.mark.parametrize("name", ["POINTS", "CROP", "LOSS_WEIGHTS", "GRAD_CLIP", "SCHEDULE"])
def test_what_04_takes_from_03_is_no_constant_of_04(edited, launched, say, name):
    assert f"--{name}=1: expected --" in say("04_selftrain", f"--{name}=1")
    message = launched(edited("04_selftrain", f"{name} = 64"))
    assert f"{name} is that of the run of INIT" in message


def test_04_says_what_it_takes_from_the_run_of_03_and_varies_the_rest(again, tmp_path, capsys):
    more = "--UNLABELLED=negative", f"--OUT={tmp_path}/negative"
    assert again("04_selftrain", *more) is None
    assert "POINTS=128 as in the run of INIT; the file of 03 has 512" in capsys.readouterr().out
    record = json.loads((tmp_path / "negative/run.json").read_text())
    assert record["constants"]["UNLABELLED"] == "negative"


# ---------------------------------------------------------------------------- what a run is made of
def test_a_constant_that_is_new_is_another_experiment(edited, launched, monkeypatch, trained, data):
    monkeypatch.setattr(common, "RUN", str(trained))
    monkeypatch.setattr(common, "DATA", str(data))
    message = launched(edited("03_train_source", "MY_TRICK = True"), *SMALL["03_train_source"])
    assert "was made with MY_TRICK=nothing (now True)" in message


@pytest.mark.parametrize("row, answer", [
    ([(128, 64, 128), (7, 9), (3,), (13, 24, 41)], "was made with other classes and ids"),
    ([(1, 2, 3), *common.TABLE["road"][1:]], "None")])
def test_an_id_in_the_table_is_another_labelling_a_colour_is_not(again, monkeypatch, row, answer):
    monkeypatch.setitem(common.TABLE, "road", row)
    assert answer in str(again("03_train_source"))


def test_classes_in_another_order_are_other_classes(again, monkeypatch):
    monkeypatch.setattr(common, "TABLE", dict(reversed(common.TABLE.items())))
    assert "was made with other classes and ids" in again("03_train_source")


@pytest.mark.parametrize("line, same", [("A = 1", True), ("# why", True), ("def f(): ...", False)])
def test_the_digest_of_code_is_that_of_functions(edited, line, same):
    module = edited("05_eval", line, before="PROTOCOL = \"native\"             # | \"clouds\"")
    assert same == (common.code_digest(module.__file__) == common.code_digest(ROOT / "05_eval.py"))


def test_a_notebooks_next_run_reads_the_files_anew(edited, launched, monkeypatch):
    for name in ("ipykernel", "common", "03_train_source"):
        monkeypatch.setitem(sys.modules, name, common)
    launched(edited("03_train_source", "A = 1"), main=lambda: sys.exit("end"))
    assert "ipykernel" in sys.modules and not {"common", "03_train_source"} & set(sys.modules)


def test_a_source_image_that_is_added_is_named(again, tmp_path, data):
    more = shutil.copytree(data / "toy/game_train", tmp_path / "toy/game_train")
    for kind in ("images", "labels"):
        first = sorted((more / kind).iterdir())[0]
        shutil.copy(first, more / kind / "added.png")
    message = again("03_train_source", data=tmp_path)
    assert "was made with source pairs=12 files" in message and "(now 14 files" in message


def test_an_init_that_was_trained_again_is_named(again, tmp_path, data, capsys):
    def train_again(run):
        shutil.rmtree(run / "03_train_source")
        arguments = *SMALL["03_train_source"], "--SEED=1"
        assert here("03_train_source", *arguments, run=run, data=data) is None
    message = again("04_selftrain", prepare=train_again)
    assert "was made with weights of INIT=" in message
    assert here("05_eval", "--PANELS=0", run=tmp_path / "copy", data=data) is None
    output = capsys.readouterr().out
    assert "04_selftrain/model.safetensors began from an earlier" in output
    assert "03_train_source/model.safetensors began" not in output


def test_pictures_that_were_replaced_are_named(again):
    def replace(run):
        first = sorted((run / "painted").iterdir())[0]
        Image.fromarray(np.zeros((128, 256, 3), np.uint8)).save(first)
    message = again("04_selftrain", prepare=replace)
    assert "was made with painted pictures=2 files" in message


def test_a_run_that_was_moved_is_the_same_run(trained, tmp_path, data, capsys):
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    arguments = f"--GENERATED=folder:{moved}/painted", *SMALL["04_selftrain"]
    assert here("04_selftrain", *arguments, run=moved, data=data) is None
    assert "finished before" in capsys.readouterr().out


def test_the_folder_of_a_run_stands_for_its_network(again, trained):
    assert again("04_selftrain", f"--INIT={trained}/03_train_source") is None


def test_a_script_that_was_edited_under_way_is_said(again, monkeypatch, capsys):
    monkeypatch.setattr(common, "code_digest", lambda *files: "edited")
    assert again("03_train_source") is None
    assert "was begun by other code: the scripts were edited since" in capsys.readouterr().out


def test_a_decoder_that_shares_weights_or_computes_a_buffer_is_saved_and_loaded(
        monkeypatch, tmp_path):
    class Edited(source_stage.Decoder):
        def __init__(self, *sizes, **named):
            super().__init__(*sizes, **named)
            self.query_position = self.query
            self.register_buffer("axis", torch.arange(3.), persistent=False)
    monkeypatch.setattr(source_stage, "Decoder", Edited)
    encoder = source_stage.Encoder(f"open_clip:local-dir:{common.MINIATURES}/clip")
    decoder = Edited(encoder.channels, len(common.CLASSES), 32, 12, 1, 32, 1)
    run = SimpleNamespace(stage="03", inherited={}, constants={})
    source_stage.save_model(tmp_path / "model.safetensors", encoder, decoder, run)
    _, loaded, _ = source_stage.load_model(tmp_path)
    assert loaded.axis.tolist() == [0, 1, 2] and loaded.query.weight.equal(decoder.query.weight)


def test_a_network_from_before_an_edit_is_not_called_damaged(trained, data):
    def edit(stage):
        stage.source_stage.network = lambda encoder, decoder: torch.nn.ModuleDict({"D": decoder})
    message = here("05_eval", run=trained, data=data, change=edit)
    assert "does not fit the network that 03 now defines (RuntimeError: Error(s) in" in message


# ---------------------------------------------------------------------------- mistakes in the code
MISTAKES = {NameError: lambda: undefined_name, AttributeError: lambda: "".no_such_thing,
            TypeError: lambda: len(3), ImportError: lambda: exec("from common import nothing"),
            KeyError: lambda: {}["key"], ValueError: lambda: int("x")}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_while_writing_keeps_its_traceback(tmp_path, kind):
    with pytest.raises(kind), common.whole(tmp_path / "a") as part:
        part.write_text("half")
        MISTAKES[kind]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, line", [
    (NameError, "undefined_name"), (AttributeError, "torch.no_such_thing"), (TypeError, "len(3)")])
def test_a_mistake_beside_a_library_keeps_its_traceback(edited, monkeypatch, kind, line):
    library = "            self.body, mean, std = load_library(name)"
    module = edited("03_train_source", f"            {line}", before=library)
    monkeypatch.setattr(common, "HERE", common.Path(module.__file__).parent)
    with pytest.raises(kind):
        module.Encoder(f"open_clip:local-dir:{common.MINIATURES}/clip")


def test_the_same_error_inside_a_library_is_explained():
    with pytest.raises(common.Stop, match="no weights.*TypeError"):
        with common.explain("no weights", "get them"):
            json.loads(3)                               # raises in json's own file


def test_debug_shows_the_traceback_behind_a_line(launched, monkeypatch, capsys):
    monkeypatch.setenv("DEBUG", "1")
    message = launched(fresh("03_train_source"), "--SEED=-1")
    assert "SEED=-1: expected a whole number" in message
    error = capsys.readouterr().err
    assert "Traceback" in error and "SEED=SEED" in error
