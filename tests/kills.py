"""
kills: end every stage with SIGKILL at random moments, start it again, and compare what it ends in with an uninterrupted run.

    python tests/kills.py 100            so many kills over the five stages (about 20 minutes on two cores); seed 0
    python tests/kills.py 100 7          another seed

Half of the kills come at a random time, the other half as soon as a half-written file (*.part) is seen, which is when it hurts most.
Same means: weights, teacher, prompts, pictures, scores bit for bit; log lines once each, in order; no *.part file of ours is read again.
The test suite kills each stage once (test_pipeline.py)."""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, SMALL, script, world
from test_pipeline import RESULT, same


def draw_data(root):
    for style, n in (("game_train", 6), ("day", 2), ("night", 2), ("snow", 2), ("fog", 2), ("rain", 2)):
        world.write_folder(root / "toy" / style, "train" if style == "game_train" else "test", style.split("_")[0], n)


def run_and_kill(stage, run, data, moment, after):
    """Start a stage; kill it `after` seconds, or when it writes. -> "ended" if it was faster, else what killed it"""
    command = [sys.executable, ROOT / f"{stage}.py", *SMALL[stage]]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RUN": str(run), "DATA": str(data)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    since = time.time()
    while process.poll() is None:
        writing = moment == "writing" and any((run / stage).glob("**/*.part"))
        if writing or moment == "random" and time.time() - since > after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return moment
        time.sleep(.0005)
    assert process.returncode == 0, process.stderr.read().decode()
    return "ended"


def main(kills, seed):
    random.seed(seed)
    work = Path(tempfile.mkdtemp(prefix="kills_"))
    data, whole, seconds = work / "data", work / "whole", {}
    draw_data(data)
    for stage in RESULT:
        since = time.time()
        done = script(stage, *SMALL[stage], run=whole, data=data)
        assert done.returncode == 0, done.stderr
        seconds[stage] = time.time() - since
    print("uninterrupted:", {stage: f"{s:.1f} s" for stage, s in seconds.items()}, flush=True)
    counts, rounds, left = {stage: {"random": 0, "writing": 0} for stage in RESULT}, 0, kills
    while left > 0:
        for stage in RESULT:
            run = work / f"round_{rounds}_{stage}"
            run.mkdir()
            for other in RESULT:
                if other != stage:
                    (run / other).symlink_to(whole / other)
            struck = 0
            while left > 0 and struck < 5:                              # five kills of one run, then it may end
                how = run_and_kill(stage, run, data, random.choice(("random", "writing")), random.uniform(0, seconds[stage]))
                if how == "ended":
                    break
                counts[stage][how] += 1
                struck, left = struck + 1, left - 1
            done = script(stage, *SMALL[stage], run=run, data=data)
            assert done.returncode == 0, f"{stage} after {struck} kills in {run}: {done.stderr}"
            assert same(stage, whole, run), f"{stage} after {struck} kills: {run} differs from {whole}"
            log = run / stage / "log.jsonl"
            if log.exists():
                steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
                assert steps == list(range(1, len(steps) + 1)), f"{log}: steps {steps}"
            print(f"{kills - left:4d} of {kills} kills | {stage}: {struck} in this run, ended the same", flush=True)
        rounds += 1
    print("\n| stage | killed at a random moment | killed while writing | result |\n|---|---:|---:|---|")
    for stage, count in counts.items():
        print(f"| {stage} | {count['random']} | {count['writing']} | the same |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
