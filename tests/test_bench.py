"""The bench for GPUs, at tiny sizes on a CPU: every part prints its rows, and none fails."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

THREE = {"float32", "TF32", "bfloat16"}
FOUR = THREE | {"bfloat16 channels_last"}
HALF = {"float16", "float16 channels_last"}
WANTED = {"matrix product": THREE | {"float16"}, "step of 03": THREE, "step of 04": THREE}
for what in ("SAM's encoder, 1 at once", "SAM's encoder, 8 at once", "05, 64 x 128", "05, 96 x 128",
             "encoder ConvNeXt-L", "encoder RN50", "our decoder", "Mask2Former's head"):
    WANTED[what] = FOUR
for what in ("step of 03, trainable encoder", "step of 04, trainable encoder"):
    WANTED[what] = {"TF32", "bfloat16"}
for steps in ("02, 4 steps", "02, 50 steps"):
    WANTED |= {f"{steps}, 1 at once": FOUR | HALF, f"{steps}, 2 at once": {"float16 channels_last"}}
WANTED |= {"reading, 1 workers": {"-"}, "reading, 2 workers": {"-"}}


@pytest.mark.slow
def test_every_row_has_a_time_in_every_precision_and_the_hours_follow():
    done = subprocess.run([sys.executable, ROOT / "tests/bench.py", "tiny"], capture_output=True,
                          text=True, cwd=ROOT, timeout=1800)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr
    tiny = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            first, *others = line.strip("| ").split(" | ")
            tiny.setdefault(first, []).append(others)
    for what, precisions in WANTED.items():
        assert {cells[0] for cells in tiny[what]} == precisions
        for cells in tiny[what]:                # so little work may be extrapolated to below zero
            assert float(cells[1]) > 0 or cells[7] == "extrapolated"
            assert not what.startswith("step") or "syncs need CUDA" in cells[7]
        if not what.startswith("reading"):      # a floor, and all precisions the same work
            flops, floor = [[float(cells[k]) for cells in tiny[what]] for k in (3, 4)]
            assert min(flops) == max(flops) > 0 and min(floor) > 0
    seconds = {cells[0]: float(cells[1]) for cells in tiny["step of 04"]}
    hours = [float(cell) for cell in tiny["04: 40,000 steps"][0][:3]]
    expected = [40_000 / 3600 * seconds[name] for name in ("float32", "TF32", "bfloat16")]
    assert hours == pytest.approx(expected, rel=.01)


# ------------------------------------------------------------ memory of a card
def test_a_steps_bytes_are_those_by_hand():
    import bench_memory as memory               # it loads all stages
    network = torch.nn.Sequential(torch.nn.Linear(100, 50, bias=False), torch.nn.LayerNorm(50))
    before = network[0].weight
    with memory.counted(network) as held:
        weights = 4 * (100 * 50 + 50 + 50)
        assert held.now == weights
        x = torch.zeros(8, 100)
        with memory.autocast():
            y = network(x)
        # x, its copy in bfloat16 for the weight's gradient; for the norm's gradient the product in
        # float32, and mean and deviation of every row; y
        kept = (4 + 2) * 8 * 100 + 4 * 8 * 50 + 2 * 4 * 8 + 4 * 8 * 50
        assert y.dtype == torch.float32 and held.now == weights + kept
        y.sum().backward()
        assert held.now == 2 * weights + 4 * 8 * 100 + 4 * 8 * 50       # gradients; x and y
    assert before.abs().sum() > 0 and network[0].weight is not before


# ------------------------------------------------------------ what only shows elsewhere
