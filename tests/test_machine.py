"""Nothing of the machine is taken for granted: the real scripts without git, home, fcntl or a
writable checkout, from another folder, under every start method, with every kind of output."""
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import common
from conftest import ROOT, SMALL, environment, here

LINUX = sys.platform == "linux"
SOURCE = ["--BATCH=2", "--POINTS=128", "--ITERATIONS=2", "--LOG_EVERY=1", "--PREVIEW_EVERY=2"]
STAGE = "03_train_source"


def started(run, data, *arguments, code=None, before=(), cwd=ROOT, **more):
    """03 in a process of its own, or Python code that runs it -> CompletedProcess."""
    script = ["-c", code] if code else [ROOT / f"{STAGE}.py", *SOURCE, *arguments]
    variables = environment(run, data, PYTHONDONTWRITEBYTECODE="1", **more)
    return subprocess.run([*before, sys.executable, *script], capture_output=True, text=True,
                          cwd=cwd, env=variables, timeout=300)


def run_path(lines, *arguments):
    """Python code: some lines, then 03 as the main script."""
    argv = [f"{STAGE}.py", *SOURCE, *arguments]
    return (f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv = {argv!r}\n{lines}\n"
            f"runpy.run_path({str(ROOT / STAGE)!r} + '.py', run_name='__main__')")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, data):
    """The weights of the run that the others are compared with: in this process, WORKERS=0."""
    run = tmp_path_factory.mktemp("wanted")
    assert here(STAGE, *SOURCE, run=run, data=data) is None
    return load_file(run / STAGE / "model.safetensors")


def assert_same(done, run, wanted):
    assert done.returncode == 0, done.stderr
    found = load_file(run / STAGE / "model.safetensors")
    assert found.keys() == wanted.keys() and all(found[k].equal(wanted[k]) for k in wanted)


# ---------------------------------------------------------------------------- what may be missing
METHODS = multiprocessing.get_all_start_methods()
WINDOWS = """
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None            # its import fails
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines, workers", [
    (WINDOWS, 0), *[(f"import multiprocessing\nmultiprocessing.set_start_method({method!r})", 2)
                    for method in METHODS]], ids=["without modules", *METHODS])
def test_windows_and_all_start_methods_give_one_result(tmp_path, data, wanted, lines, workers):
    done = started(tmp_path, data, code=run_path(lines, f"--WORKERS={workers}"))
    assert_same(done, tmp_path, wanted)


@pytest.mark.slow
@pytest.mark.skipif(not LINUX or os.getuid(), reason="needs root, to become somebody else")
def test_a_stranger_without_git_home_or_name_trains_from_others_checkout(tmp_path, data, wanted):
    tmp_path.chmod(0o777)
    for folder in [*tmp_path.parents, *data.parents]:       # pytest's folders are their owner's
        if "pytest-of" in str(folder):
            folder.chmod(0o755)
    become = shutil.which("setpriv"), "--reuid=12345", "--regid=12345", "--clear-groups"
    # an environment or a checkout below a private folder (/root, mktemp -d) is closed to others
    if subprocess.run([*become, sys.executable, "-c", "import common"], cwd=ROOT).returncode:
        pytest.skip("somebody else can read neither this checkout nor its packages")
    run = tmp_path / "run"
    done = started(run, data, before=become, cwd=tmp_path, HOME=None, PATH="/nowhere")
    assert_same(done, run, wanted)


# ---------------------------------------------------------------------------- readers
@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="paths of sockets")
def test_a_long_tmpdir_does_not_hang_the_readers(tmp_path, data, wanted):
    long = tmp_path / ("t" * 100)
    long.mkdir()
    done = started(tmp_path, data, "--WORKERS=2", TMPDIR=str(long))
    assert_same(done, tmp_path, wanted)


def test_a_reader_that_was_ended_is_one_line():
    killed = RuntimeError("DataLoader worker (pid(s) 123) exited unexpectedly")
    assert "a data-loading process was killed" in common.one_line(killed)
    assert "WORKERS" in common.one_line(killed)
    for mistake in ("shapes do not fit", "Caught KeyError in DataLoader worker process 0.\nTrace"):
        assert common.one_line(RuntimeError(mistake)) is None


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="kills a process group")
def test_the_same_command_works_at_once_after_a_kill(tmp_path, data):
    arguments = [sys.executable, ROOT / f"{STAGE}.py", *SOURCE, "--ITERATIONS=400", "--WORKERS=2"]
    log = tmp_path / STAGE / "log.jsonl"

    def run_until_it_logs():
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment(tmp_path, data), text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not log.exists() and process.poll() is None:
            time.sleep(.1)
        return process
    first = run_until_it_logs()
    first.kill()
    first.wait()
    log.unlink()
    second = run_until_it_logs()
    second.terminate()
    assert "in use by another job" not in second.communicate()[1]
    assert log.exists()


# ---------------------------------------------------------------------------- outputs
NOTEBOOK = """
import io
class OutStream(io.TextIOBase):
    def write(self, text):
        return sys.__stdout__.write(text)
sys.stdout = OutStream()
"""


@pytest.mark.slow
def test_a_notebooks_output_will_do(tmp_path, data):
    done = started(tmp_path, data, code=run_path(NOTEBOOK))
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="a Bourne shell")
@pytest.mark.parametrize("output, code, words", [
    (">&-", 0, ""), ("> /dev/full", 1, "the output: No space left on device"),
    ("| true", 1, "the program that read the output has ended")])
def test_an_output_that_is_closed_full_or_ended(tmp_path, data, output, code, words):
    command = f'set -o pipefail; "$@" {output}'
    done = started(tmp_path, data, before=("bash", "-c", command, "-"))
    assert done.returncode == code and words in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(not LINUX, reason="looks into /proc")
def test_ctrl_c_while_the_libraries_are_imported_is_one_line(tmp_path, data):
    process = subprocess.Popen([sys.executable, ROOT / f"{STAGE}.py"], stderr=subprocess.PIPE,
                               cwd=ROOT, env=environment(tmp_path, data), text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    while "_multiarray_umath" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(.02)                                 # until numpy is being imported
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error and "stopped" in error
    assert not tmp_path.joinpath(STAGE).exists()


# ---------------------------------------------------------------------------- files
@pytest.mark.skipif(not LINUX, reason="modes of files")
def test_files_have_the_mode_of_the_umask(tmp_path, data):
    before = os.umask(0o027)
    try:
        assert here(STAGE, *SOURCE, run=tmp_path, data=data) is None
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / STAGE).iterdir() if path.name != ".lock"]
    assert {path.name for path in files} >= {"model.safetensors", "run.json", "log.jsonl"}
    assert {stat.filemode(path.stat().st_mode) for path in files} == {"-rw-r-----"}


def test_a_network_that_may_not_be_opened_is_not_called_damaged(tmp_path, monkeypatch, say):
    path = tmp_path / "model.safetensors"
    path.write_text("")

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)
    real = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    message = say("05_eval", f"--CHECKPOINTS={path}")
    assert f"{path}: Permission denied" in message and "damaged" not in message


@pytest.mark.parametrize("stage, name", [
    ("01_prompts", "prompts.txt"), ("02_generate", "index.jsonl"), (STAGE, "model.safetensors"),
    ("04_selftrain", "model.safetensors"), ("05_eval", "results.json")])
def test_a_folder_of_somebody_else_is_refused(tmp_path, finished, data, stage, name):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("a stranger's\n")
    message = here(stage, *SMALL[stage], f"--OUT={out}", run=finished[0], data=data)
    assert f"{out} holds files, and no run.json" in message and "--OUT" in message
    assert (out / name).read_text() == "a stranger's\n"


def test_a_file_that_ends_in_part_stays(tmp_path, data):
    mine = tmp_path / STAGE / "gta_images.zip.part"
    arguments = *SOURCE, "--ITERATIONS=1"
    assert here(STAGE, *arguments, run=tmp_path, data=data) is None
    (tmp_path / STAGE / "model.safetensors").unlink()
    mine.write_text("half a download")
    os.utime(mine, (0, 0))
    assert here(STAGE, *arguments, run=tmp_path, data=data) is None
    assert mine.read_text() == "half a download"


@pytest.mark.skipif(not LINUX, reason="other systems allow no such names")
def test_names_of_files_may_be_of_another_encoding(start, folder):
    stem = os.fsdecode("Straße".encode("latin-1"))
    name = folder({stem: np.zeros((64, 64, 3))}, {stem: np.eye(64)}, stem)
    short = "--ITERATIONS=1", "--BATCH=1", "--POINTS=64"
    assert start(STAGE, *short, f"--SOURCE={name}") is None
    assert start("05_eval", f"--TARGETS={name}") is None
    assert start("05_eval", f"--IMAGES={name.removeprefix('folder:')}/images") is None


# ---------------------------------------------------------------------------- source
def test_no_check_is_an_assert_statement_and_no_import_is_missing_on_windows():
    for path in sorted(ROOT.glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith("assert "), f"{path.name}: {line}"   # python -O
            assert line.split() not in (["import", "fcntl"], ["import", "pwd"],
                                        ["import", "resource"]), path.name
