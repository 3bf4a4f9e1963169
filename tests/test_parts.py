"""One large batch, the same batch in parts, and shared by two processes: one result."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from conftest import ROOT, SMALL


def gradients(parts, half=False, frozen=True):
    """Loss and gradients of the toy's network on 8 images of noise."""
    torch.manual_seed(0)
    encoder = common.Encoder("local-dir:tests/toy/weights/clip", frozen).eval()     # eval: BatchNorm in train mode sees its part only
    decoder = common.Decoder(encoder.channels, 12, 32, 16, 2, 32, 1)
    random = torch.Generator().manual_seed(1)
    images, labels = torch.randint(0, 255, (8, 3, 64, 96), dtype=torch.uint8, generator=random), torch.randint(0, 12, (8, 1, 1), generator=random).expand(-1, 64, 96).clone()
    labels[:, :, 50:] = torch.randint(0, 12, (8, 64, 46), generator=random)
    labels[3:5, :30] = common.IGNORE
    *predictions, finish = common.in_parts(encoder, decoder, images, parts, half)
    loss, terms = common.mask_loss(*predictions, labels, 256, common.seeded(0, 0, 5))
    loss.backward(), finish()
    return loss.item(), torch.cat([p.grad.flatten() for module in (decoder, encoder) for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts, frozen", [(2, True), (3, True), (2, False)])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts, frozen):
    loss, whole = gradients(1, frozen=frozen)
    again, summed = gradients(parts, frozen=frozen)
    assert abs(loss - again) < 1e-4 * abs(loss) and (whole - summed).norm() < 1e-4 * whole.norm()


def test_bfloat16_stays_near_float32():
    loss, whole = gradients(1)
    half_loss, half = gradients(1, half=True)
    assert abs(loss - half_loss) < .02 * abs(loss) and torch.nn.functional.cosine_similarity(whole, half, 0) > .9


@pytest.mark.parametrize("stage", ["03_train_source", "04_selftrain"])
def test_two_processes_are_one(finished, data, tmp_path, stage):
    run, _ = finished
    arguments = [*SMALL[stage], "--BATCH=2" if stage.startswith("03") else "--N_SOURCE=2", "--ITERATIONS=3"] + ([] if stage.startswith("03") else [f"--INIT={run}/03_train_source/model.safetensors"])
    outs = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [sys.executable, *(("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517") if count == 2 else ()), ROOT / f"{stage}.py", *arguments, f"--OUT={out}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "RUN": str(run), "DATA": str(data)})
        assert done.returncode == 0, done.stderr
        outs.append((load_file(out / "model.safetensors"), [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]))
    (one, log), (two, other) = outs
    assert [row["step"] for row in log] == [row["step"] for row in other] == [1, 2, 3]
    assert all(abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"] for a, b in zip(log, other))
    moved = [(one[k] - two[k]).abs().max().item() for k in one]
    assert max(moved) < 2e-4                                                      # rounding, through three steps of AdamW


def test_items_are_dealt_out_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: (1, 2))
    assert list(common.share(4)) == [1, 3]
    order = common.dealt(4, 2)                                                    # the first has s0 s2 p0, the second s1 s3 p1
    assert np.array(["s0", "s2", "p0", "s1", "s3", "p1"])[order].tolist() == ["s0", "s1", "s2", "s3", "p0", "p1"]
    with pytest.raises(common.Stop, match="2 processes cannot share 3 images"):
        common.share(3)
