"""
kills: end every stage with SIGKILL at random moments, start it again, and compare its result with
that of an uninterrupted run.

    python tests/kills.py 100           this many kills over the five stages; seed 0
    python tests/kills.py 100 7         another seed
    time                                about 20 minutes per 100 kills on two cores

Half of the kills come at a random time. The other half come as soon as a half-written file
(*.part) is seen, which is when they do most harm. The same result means: weights, teacher, prompts,
pictures, previews and scores bit for bit, and every step once in log.jsonl, in order. The test
suite kills each stage once (test_pipeline.py).
"""
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, SMALL, environment, script, world
from test_pipeline import RESULT, same

MOMENTS = ("random", "writing")
KILLS_PER_RUN = 5                       # then it may end


def draw_data(root):
    world.write_folder(root / "toy/game_train", "train", "game", 6)
    for style in world.STYLES[1:]:
        world.write_folder(root / "toy" / style, "test", style, 2)


def run_to_the_end(stage, run, data, before):
    """before: what happened to this run, for the message"""
    done = script(stage, *SMALL[stage], run=run, data=data)
    assert done.returncode == 0, f"{stage} {before} in {run}: {done.stderr}"


def run_and_kill(stage, run, data, moment, after):
    """Start a stage; kill it `after` seconds, or when it writes -> whether it was still running"""
    command = [sys.executable, ROOT / f"{stage}.py", *SMALL[stage]]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(run, data),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    started = time.time()
    while process.poll() is None:
        if moment == "writing":
            due = any((run / stage).glob("**/*.part"))
        else:
            due = time.time() - started > after
        if due:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(.0005)
    assert process.returncode == 0, process.stderr.read().decode()
    return False


def kill_one_run(stage, run, whole, data, kills, seconds):
    """At most `kills` kills of one run of a stage, then let it end; compare it with `whole`
    -> {moment: kills}"""
    run.mkdir()
    for other in RESULT:
        if other != stage:
            (run / other).symlink_to(whole / other)
    counts = dict.fromkeys(MOMENTS, 0)
    for _ in range(kills):
        moment = random.choice(MOMENTS)
        if not run_and_kill(stage, run, data, moment, random.uniform(0, seconds)):
            break
        counts[moment] += 1
    before = f"after {sum(counts.values())} kills"
    run_to_the_end(stage, run, data, before)
    assert same(stage, whole, run), f"{stage} {before}: {run} differs from {whole}"
    for picture in sorted((whole / stage).glob("preview*.png")):
        again = run / stage / picture.name
        assert picture.read_bytes() == again.read_bytes(), f"{again} is another picture"
    log = run / stage / "log.jsonl"
    if log.exists():
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), f"{log}: steps {steps}"
    return counts


def main(kills, seed):
    random.seed(seed)
    work = Path(tempfile.mkdtemp(prefix="kills_"))
    data, whole = work / "data", work / "whole"
    draw_data(data)
    seconds, total = {}, {}
    for stage in RESULT:
        started = time.time()
        run_to_the_end(stage, whole, data, "uninterrupted")
        seconds[stage] = time.time() - started
        total[stage] = dict.fromkeys(MOMENTS, 0)
        print(f"{stage}: {seconds[stage]:.1f} s uninterrupted", flush=True)
    left, rounds = kills, 0
    while left > 0:
        for stage in RESULT:
            run = work / f"round_{rounds}_{stage}"
            at_most = min(left, KILLS_PER_RUN)
            if not at_most:
                break
            counts = kill_one_run(stage, run, whole, data, at_most, seconds[stage])
            for moment, n in counts.items():
                total[stage][moment] += n
                left -= n
            print(f"{kills - left:4d} of {kills} kills | {stage}: {sum(counts.values())} in this "
                  "run, the same result", flush=True)
        rounds += 1
    print("\n| stage | killed at a random moment | killed while writing | result |")
    print("|---|---:|---:|---|")
    for stage, count in total.items():
        print(f"| {stage} | {count['random']} | {count['writing']} | the same |")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    if len(numbers) > 2:
        sys.exit(__doc__)
    main(*numbers, *(100, 0)[len(numbers):])
