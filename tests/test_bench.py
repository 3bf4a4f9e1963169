"""The bench for GPUs, at tiny sizes on a CPU: every part prints its rows, and none fails."""
import subprocess
import sys

import pytest
from conftest import ROOT

FOUR = {"float32", "TF32", "bfloat16", "bfloat16 channels_last"}
HALF = {"float16", "float16 channels_last"}
WANTED = {"matrix product": {"float32", "TF32", "bfloat16", "float16"},
          "step of 03": FOUR, "step of 03, trainable encoder": {"TF32", "bfloat16"},
          "step of 04": FOUR, "step of 04, trainable encoder": {"TF32", "bfloat16"},
          "SAM's encoder, 1 at once": FOUR, "SAM's encoder, 8 at once": FOUR,
          "02, 50 steps, 1 at once": FOUR | HALF,
          "02, 50 steps, 2 at once": {"float16 channels_last"},
          "05, 64 x 128": FOUR, "05, 96 x 128": FOUR,
          "reading, 1 workers": {"-"}, "reading, 2 workers": {"-"},
          "encoder ConvNeXt-L": FOUR, "encoder RN50": FOUR,
          "our decoder": FOUR, "Mask2Former's head": FOUR}


@pytest.fixture(scope="module")
def tiny():
    """-> the tables of `bench.py tiny`: {first cell: [list of the other cells]}."""
    done = subprocess.run([sys.executable, ROOT / "tests/bench.py", "tiny"], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            first, *others = line.strip("| ").split(" | ")
            rows.setdefault(first, []).append(others)
    return rows


@pytest.mark.parametrize("what", WANTED)
def test_every_row_has_a_time_in_every_precision(tiny, what):
    assert {cells[0] for cells in tiny[what]} == WANTED[what]
    assert all(float(cells[1].replace(",", "")) > 0 for cells in tiny[what])


@pytest.mark.parametrize("what", [what for what in WANTED if not what.startswith("reading")])
def test_no_row_is_faster_than_its_floor_is_defined(tiny, what):
    flops, floor = [[float(cells[k].replace(",", "")) for cells in tiny[what]] for k in (3, 4)]
    assert min(flops) > 0 and min(floor) > 0
    assert max(flops) == min(flops)             # precision changes the rate, not the work


def test_steps_say_what_their_number_of_waits_needs(tiny):
    notes = [cells[7] for what in WANTED if what.startswith("step") for cells in tiny[what]]
    assert len(notes) == 12 and all("syncs need CUDA" in note for note in notes)


def test_the_hours_follow_from_the_rows(tiny):
    seconds = {cells[0]: float(cells[1]) for cells in tiny["step of 04"]}
    hours = [float(cell) for cell in tiny["04: 40,000 steps"][0][:3]]
    expected = [40_000 / 3600 * seconds[name] for name in ("float32", "TF32", "bfloat16")]
    assert hours == pytest.approx(expected, rel=.01)
