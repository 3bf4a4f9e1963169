"""Bad input gets one clear message that names the file or the constant, and the remedy; before
anything is written."""
import json
import os
import re
import runpy
import signal
import time
from importlib import import_module

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

import common
from conftest import ROOT, SMALL, fresh

STAGES = ("01_prompts", "02_generate", "03_train_source", "04_selftrain", "05_eval")


def brief(message):
    """What is wrong, and the remedy"""
    return "Traceback" not in message and len(message.splitlines()) <= 2


# ---------------------------------------------------------------------------- constants
def common_under(preset, monkeypatch):
    monkeypatch.setenv("PRESET", preset)
    return runpy.run_path(str(ROOT / "common.py"))


def test_unknown_preset_lists_the_presets(monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        common_under("gta6", monkeypatch)
    expected = "PRESET=gta6 is not a preset; there are: toy, gta, synthia, cityscapes"
    assert stopped.value.code == expected


@pytest.mark.parametrize("argument, answer", [
    ("--ITERATION=5", "--ITERATION=5: expected --ITERATIONS=value; --help lists the constants"),
    ("--iterations=5", "expected --ITERATIONS=value"), ("BATCH=2", "expected --BATCH=value"),
    ("--BATCH", "expected --BATCH=value"), ("-BATCH=2", "expected --BATCH=value"),
    ("--CLASSES=1", "expected --"), ("--RUN=x", "expected --"), ("", "expected --"),
    ("--LR=fast", "--LR=fast: LR is float, as 0.0015"), ("--LR=", "--LR= is empty"),
    ("--BATCH=2.5", "BATCH is int"), ("--FREEZE_ENCODER=maybe", "FREEZE_ENCODER is bool"),
    ("--CROP=a,b", "CROP is tuple, as (128, 256)"), ("--CROP=1.5,2", "CROP is tuple"),
    ("--LR=x --LR=1e-3", "LR is float"),
    ("--BATCH=2 --BATCH=0", "BATCH=0: expected a whole number from 1 to 100,000")])
def test_a_constant_given_wrongly_is_explained(refused, argument, answer):
    assert answer in refused("03_train_source", *argument.split(" "))


@pytest.mark.parametrize("text, default, value", [
    ("1", .5, 1.), ("1e-3", 1., .001), ("64,128", (1, 2), (64, 128)), ("2,1", (.5, 1.), (2., 1.)),
    ("a=b,c", ("x",), ("a=b", "c")), ("a", (), ("a",)), ("", (), ()), ("FALSE", True, False),
    ("true", False, True), ("7", "text", "7"), ("a\\,b,c", ("x",), ("a,b", "c")),
    ("~/a", "x", os.path.expanduser("~/a")),
    ("folder:~/a,b", ("x",), (f"folder:{os.path.expanduser('~/a')}", "b"))])
def test_values_take_the_type_of_the_constant(text, default, value):
    parsed = common.parse("NAME", text, default)
    assert parsed == value and type(parsed) is type(value)


@pytest.fixture
def refused(monkeypatch, tmp_path, say):
    """refused(stage, *arguments) -> the one line with which it stops before it writes anything."""
    def begin(run, *_):
        raise AssertionError("not refused")

    def call(stage, *arguments, run=tmp_path / "run"):
        monkeypatch.setattr(common.Run, "start", begin)
        before = sorted(run.rglob("*"))
        message = say(stage, *arguments, run=run)
        assert message.startswith(f"{stage}.py: ") and brief(message)
        assert sorted(run.rglob("*")) == before
        return message
    return call


BAD = {
    "01_prompts": """LLM= SOURCE_CLASSES= SOURCE_CLASSES=dog SOURCE_CLASSES=car,car N_PROMPTS=0
        TEMPERATURE=0 TEMPERATURE=nan TEMPERATURE=inf TOP_P=0 TOP_P=1.1 NEW_TOKENS=0 TRIES=0
        SEED=-1 OUT=""",
    "02_generate": """N_IMAGES=0 N_IMAGES=1000000 GROUP=0 STEPS=0 GUIDANCE=-1 GUIDANCE=nan
        SIZE=100,100 SIZE=64 SIZE=0,64 SIZE=64,64,64 SIZE=-64,64 SHARD=2/2 SHARD=0/0 SHARD=-1/2
        SHARD=1 SHARD= SHARD=a/b DTYPE=int8 DIFFUSION= SEED=-1 OUT=""",
    "03_train_source": """SOURCE= SOURCE=gta,gta ENCODER= ENCODER=convnext_large
        ENCODER=keras:resnet50 DIM=100 DIM=0 QUERIES=0 QUERIES=3 LAYERS=-1 HIDDEN=0
        PIXEL_LAYERS=-1 LOSS_WEIGHTS=1,2 LOSS_WEIGHTS=1,2,-3 LOSS_WEIGHTS=1,2,nan LOSS_WEIGHTS=
        NO_OBJECT=-1 NO_OBJECT=nan POINTS=0 UNLABELLED=maybe ITERATIONS=0 BATCH=0 CROP=0,0
        CROP=64 CROP= CROP=32,32,32 CROP=100,100 CROP=-32,32 CROP=32,100000 SCALE=2,1 SCALE=1
        SCALE=0,1 SCALE=-1,1 SCALE=nan,1 SCALE=1,inf LR=0 LR=-1 LR=nan LR=inf ENCODER_LR=-1
        SCHEDULE=cosine WARMUP=-1 WEIGHT_DECAY=-1 WEIGHT_DECAY=nan GRAD_CLIP=0 GRAD_CLIP=nan
        SEED=-1 SEED=1000000000000000000 WORKERS=-1 LOG_EVERY=0 SAVE_EVERY=0 PREVIEW_EVERY=0
        OUT=""",
    "04_selftrain": """REFINE=purity SAM_POINTS=0 SAM_MIN_AREA=-1 SAM_CHUNK=0 SAM_BATCH=0 EMA=2
        EMA=-1 EMA=nan EMA_EVERY=0 N_SOURCE=0 N_GENERATED=-1 N_PICTURES=-1 ITERATIONS=0
        SOURCE=gta,gta SEED=-1 LR=nan SAVE_EVERY=0 UNLABELLED=maybe OUT=""",
    "05_eval": """TARGETS= TARGETS=bdd,bdd TARGETS=folder:a/day/,folder:b/day SHORT_SIDE=100000
        PROTOCOL=other SHORT_SIDE=1 SCORED= SCORED=dog SCORED=car,car PANELS=-1 WORKERS=-1 OUT="""}


@pytest.mark.parametrize("stage, value", [
    (stage, value) for stage, values in BAD.items() for value in values.split()])
def test_a_value_out_of_range_is_refused(refused, stage, value):
    assert f"{value.partition('=')[0]}=" in refused(stage, f"--{value}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--SEED=x", "--help"]])
def test_help_has_the_docstring_and_every_constant(start, stage, arguments, capsys, tmp_path):
    assert start(stage, *arguments) == 0
    output, module = capsys.readouterr().out, fresh(stage)
    assert module.__doc__ in output
    for name, value in common.constants(vars(module)).items():
        assert isinstance(value, dict) or f"  --{name}=" in output
    assert stage != "03_train_source" or "\n  --CROP=128,256\n" in output     # as it is given
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_paper_preset_without_a_gpu_says_what_to_expect(monkeypatch, capsys):
    common_under("gta", monkeypatch)["device"]()
    output = capsys.readouterr().out
    assert "no GPU" in output and "minutes per step" in output and "PRESET=toy" in output


# ---------------------------------------------------------------------------- what is missing
@pytest.mark.parametrize("stage, more, named, others", [
    ("02_generate", [], ["01_prompts.py"], []), ("05_eval", [], ["03_train_source.py"], []),
    ("04_selftrain", [], ["03_train_source.py", "02_generate.py", "--N_GENERATED=0"], []),
    ("04_selftrain", ["--N_GENERATED=0"], ["03_train_source.py"], ["02_generate"])])
def test_all_missing_stages_are_named_at_once(say, tmp_path, stage, more, named, others):
    message = say(stage, *more)
    assert "run " in message and all(name in message for name in named)
    assert not any(name in message for name in others)
    assert not (tmp_path / "run" / stage).exists()


def test_a_data_set_that_is_not_there(refused, say, tmp_path):
    message = refused("03_train_source", "--SOURCE=cityscape")
    assert "cityscape is not a data set: there are gta, synthia, urbansyn, cityscapes" in message
    (tmp_path / "empty/images").mkdir(parents=True)
    for source in ("gta", f"folder:{tmp_path}/none", f"folder:{tmp_path}/empty"):
        message = say("03_train_source", f"--SOURCE={source}")
        assert "no images at" in message and "PRESET=toy" in message
    assert not (tmp_path / "run").exists()


def test_missing_labels_are_named_before_training_and_do_not_fill_the_screen(say, folder, tmp_path):
    images = {f"{i:03d}": np.zeros((4, 4, 3)) for i in range(100)}
    message = say("03_train_source", f"--SOURCE={folder(images, {'000': np.zeros((4, 4))})}")
    assert re.search(r"no \S+labels/001.png\n  it is the label of \S+images/001.png\n", message)
    assert "000.png" not in message and "99" in message and len(message.splitlines()) < 30
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("generated, answer", [
    ("", "GENERATED"), ("{tmp}/a.png", "expected lines of JSON"), ("{tmp}/none.jsonl", "no "),
    ("{tmp}/empty.jsonl", "is empty"), ("{tmp}", "expected lines of JSON"),
    ("folder:{tmp}/none", "holds no picture"), ("folder:", "GENERATED"),
    ("{tmp}/lost.jsonl", "no {tmp}/lost.png"), ("{tmp}/other.jsonl", "line 1: expected file"),
    ("{tmp}/foreign.jsonl", "'../../../etc/passwd' is not the name of a file"),
    ("folder:{tmp} --N_PICTURES=2", "N_PICTURES=2: folder:{tmp} holds 1; 0 takes all")])
def test_generated_is_an_index_or_a_folder_of_pictures(say, finished, tmp_path, generated, answer):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, content in (("empty", ""), ("lost", '{"file": "lost.png"}'), ("other", '{"a": 1}'),
                          ("foreign", '{"file": "../../../etc/passwd"}')):
        (tmp_path / f"{name}.jsonl").write_text(content)
    generated, answer = (text.format(tmp=tmp_path) for text in (generated, answer))
    message = say("04_selftrain", *f"--GENERATED={generated}".split(),
                  f"--INIT={finished[0]}/03_train_source/model.safetensors")
    assert answer in message and brief(message) and not (tmp_path / "run").exists()


def test_an_embedding_that_is_damaged_is_made_again(tmp_path):
    path, good = tmp_path / "a.npy", np.ones((4, 2, 2), np.float16)
    is_embedding = fresh("04_selftrain").is_embedding
    np.save(path, good)
    assert is_embedding(path, (4, 2, 2))
    content = path.read_bytes()
    for damaged in (good + np.nan, 0 * good, good[:, :1]):
        np.save(path, damaged)
        assert not is_embedding(path, (4, 2, 2))
    for damaged in (content[:-5], b"something else", b""):
        path.write_bytes(damaged)
        assert not is_embedding(path, (4, 2, 2))


# ---------------------------------------------------------------------------- models
def save_network(path, weight=0., **more):
    about = {"format": 2, "encoder": "x", "decoder": {}, "classes": common.CLASSES, "constants": {}}
    metadata = {"about": json.dumps(about | {"preset": "pets"} | more)}
    save_file({"decoder.x": torch.full((1,), weight)}, path, metadata=metadata)


NETWORKS = {
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "text": (lambda path: path.write_bytes(b"nothing"), "is damaged"),
    "weights alone": (lambda path: save_file({"x": torch.zeros(1)}, path), "no network of this"),
    "before formats": (lambda path: save_network(path, format=None),
                       "no network of this version of the repo: train it again"),
    "endless": (lambda path: save_network(path, decoder={"layers": 10 ** 9, "pixel_layers": 1}),
                "is damaged"),
    "not a number": (lambda path: save_network(path, torch.nan), "not a number"),
    "pets": (lambda path: save_network(path, classes=["dog", "cat"]), "classes (PRESET=pets)")}


@pytest.mark.parametrize("stage, option", [("05_eval", "CHECKPOINTS"), ("04_selftrain", "INIT")])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_is_none_or_of_other_classes(say, tmp_path, stage, option, kind):
    write, answer = NETWORKS[kind]
    write(tmp_path / "bad.safetensors")
    more = ["--N_GENERATED=0"] * (stage == "04_selftrain")
    message = say(stage, f"--{option}={tmp_path}/bad.safetensors", *more)
    assert f"{tmp_path}/bad.safetensors" in message and answer in message and brief(message)


@pytest.mark.parametrize("name", [
    "open_clip:RN50-quickgelu/openai", "timm:resnet50.tv_in1k", "transformers:nvidia/mit-b5",
    "open_clip:convnext_large_d_320/laion2b_s29b_b131k_ft_soup", "open_clip:local-dir:nowhere",
    "timm:local-dir:nowhere", "transformers:local-dir:nowhere"])
def test_an_encoder_that_is_not_there_is_reported_within_seconds(name, capfd):
    encoder = import_module("03_train_source").Encoder
    with pytest.raises(common.Stop, match="could not be loaded"):
        encoder(name)                           # the first time imports the library
    since = time.process_time()
    with pytest.raises(common.Stop, match="could not be loaded") as stopped:
        encoder(name)
    assert time.process_time() - since < 2
    library = name.partition(":")[0]
    assert f"{library}:local-dir:PATH" in str(stopped.value) and brief(str(stopped.value))
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------- run folders
REMOVE = "03_train_source/run.json.*put it back from a copy, or name another --OUT"


@pytest.mark.parametrize("content, answer", [
    ("", REMOVE), ("no JSON", REMOVE), ("[]", REMOVE), ("3", REMOVE),
    ('{"stage": "03_train_source"}', REMOVE),
    ('{"stage": "03_train_source", "constants": [1]}', REMOVE),
    ('{"stage": "01_prompts", "constants": {}}',
     "run/03_train_source belongs to 01_prompts: name another --OUT")])
def test_a_record_that_is_something_else_is_named(say, tmp_path, content, answer):
    out = tmp_path / "run/03_train_source"
    out.mkdir(parents=True)
    (out / "run.json").write_text(content)
    (out / "log.jsonl").write_text("")          # something is made
    message = say("03_train_source")
    assert re.search(answer, message, re.DOTALL) and brief(message)


def test_two_jobs_do_not_share_a_folder(say, tmp_path):
    out = tmp_path / "run/03_train_source"
    out.mkdir(parents=True)
    with FileLock(out / ".lock"):
        assert "in use by another job" in say("03_train_source")
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("write", [
    lambda part: part.write_text("new " * 10_000),
    lambda part: torch.save({"a": torch.zeros(10_000)}, part),
    lambda part: np.save(open(part, "wb"), np.zeros(10 ** 6)),
    lambda part: Image.effect_noise((99, 99), 50).save(part, "PNG")],
    ids=["text", "torch", "numpy", "PNG"])
def test_a_full_disk_is_named_and_leaves_whole_files_only(launched, tmp_path, write):
    path = tmp_path / "a.file"
    path.write_text("old")
    (tmp_path / f".a.file.{os.getpid()}.part").symlink_to("/dev/full")

    def main():
        with common.whole(path) as part:
            with common.explain(f"{path} cannot be written", common.FULL):
                write(part)
    message = launched(fresh("04_selftrain"), main=main)
    assert message.startswith(f"04_selftrain.py: {path} cannot be written") and "full?" in message
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.file"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_in_one_line(launched, number):
    def main():
        os.kill(os.getpid(), number)
        time.sleep(5)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's & ignores it
    assert "same command resumes" in launched(fresh("04_selftrain"), main=main)


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"WORLD_SIZE": "1", "RANK": "3"},
                                         {"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": ""}])
def test_a_stray_rank_does_not_silence_a_run(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert common_under("toy", monkeypatch)["RANK"] == 0


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.device.__wrapped__() == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


def test_a_folder_with_nothing_made_does_not_lock_constants(start, say, tmp_path, monkeypatch):
    out = tmp_path / "run/03_train_source"
    small = *SMALL["03_train_source"], "--ITERATIONS=1"
    begin = common.Run.start

    def begin_and_stop(run, *lock, **facts):
        begin(run, *lock, **facts)
        raise common.Stop("before anything is made")
    monkeypatch.setattr(common.Run, "start", begin_and_stop)
    say("03_train_source", *small, "--LR=1")
    monkeypatch.setattr(common.Run, "start", begin)
    assert [path.name for path in out.glob("[!.]*")] == ["run.json"]
    assert start("03_train_source", *small) is None
    message = say("03_train_source", *small, "--LR=1")
    assert "was made with LR=0.0015 (now 1.0)" in message and "--OUT=" in message


def test_a_stage_that_another_job_finished_meanwhile_does_not_begin(say, tmp_path, monkeypatch):
    begin, result = common.Run.start, tmp_path / "run/03_train_source/model.safetensors"

    def late(run, *lock, **facts):
        result.parent.mkdir(parents=True)
        result.write_text("by the other job")
        begin(run, *lock, **facts)
    monkeypatch.setattr(common.Run, "start", late)
    assert "finished by another job" in say("03_train_source", *SMALL["03_train_source"])
    assert result.read_text() == "by the other job"
