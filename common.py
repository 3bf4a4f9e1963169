"""
common: what the five stages share, and nothing of the method itself: the run (presets, constants
from the shell, folders, whole files), the labels (classes, colours, ids) and the data sets.

To read the stages, read the docstrings of preset, expect, explain, whole, Run, pairs and read_pair;
the rest is furniture.
"""
import ast
import ctypes
import difflib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import glob
from importlib.metadata import version
from pathlib import Path


def show_error(kind, error, trace):
    """For Ctrl-C while the libraries below are still being imported: one line in place of forty."""
    if kind is KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show_error

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps

# ============================================================================ the run
HERE = Path(__file__).resolve().parent
MINIATURES = f"{HERE.as_posix()}/tests/toy/weights"                 # the toy preset's four models
FREE = ("OUT", "WORKERS", "LOG_EVERY", "SAVE_EVERY", "PREVIEW_EVERY")
PRESETS = ("toy", "gta", "synthia", "cityscapes")
PRESET = os.environ.get("PRESET") or "toy"
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ            # other launchers leave stray variables
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
AGAIN = ("Put this right and run the same command again: finished files are intact, partial ones "
         "were removed")
FULL = f"Is the disk full? {AGAIN}"
if PRESET not in PRESETS:
    sys.exit(f"PRESET={PRESET} is not a preset; there are: {', '.join(PRESETS)}")


def preset(toy, paper=None, **named):
    """This preset's value of a constant; `paper` is that of every preset that is not named."""
    return toy if PRESET == "toy" else named.get(PRESET, paper)


def absolute(folder):
    return Path(os.path.abspath(os.path.expanduser(folder))).as_posix()


RUN = absolute(os.environ.get("RUN") or HERE / "runs" / PRESET)
DATA = absolute(os.environ.get("DATA") or HERE / "data")


def portable(value):
    """A text, or a tuple of texts, as it is recorded: RUN, DATA and the repo may be moved later."""
    if isinstance(value, tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{RUN}/", "$RUN/").replace(f"{DATA}/", "$DATA/")
    return value.replace(f"{HERE.as_posix()}/", "$REPO/")


def located(text):
    """The inverse of portable(), for a text."""
    text = text.replace("$RUN/", f"{RUN}/").replace("$DATA/", f"{DATA}/")
    return text.replace("$REPO/", f"{HERE.as_posix()}/")


class Stop(Exception):
    """An error that the user can fix. launch() prints its message without a traceback."""


def expect(condition, text):
    """Raise Stop(text) unless the condition holds."""
    if not condition:
        raise Stop(text)


def expect_numbers(kind, low, high, count=None, **named):
    """Raise Stop unless every constant NAME=value is a number of this kind (int, or float, which
    takes both) from low to high; with a count, a tuple of `count` of them."""
    for name, value in named.items():
        numbers = value if count else (value,)
        right = isinstance(numbers, tuple) and len(numbers) == (count or 1)
        right = right and all(type(n) in (int, kind) and low <= n <= high for n in numbers)
        what = "whole number" if kind is int else "number"
        what = f"a tuple of {count} {what}s" if count else f"a {what}"
        expect(right, f"{name}={value!r}: expected {what} from {low:,} to {high:,}")


def expect_kind(kind, **named):
    """Raise Stop unless every constant NAME=value is a bool, a str, or a tuple of str."""
    what = {bool: "True or False", str: "a text in quotes", tuple: "a tuple of texts, as ('a',)"}
    for name, value in named.items():
        items = value if isinstance(value, tuple) else ()
        right = type(value) is kind and all(isinstance(item, str) for item in items)
        expect(right, f"{name}={value!r}: expected {what[kind]}")


def is_constant(value):
    """Whether a run can record a value: numbers, texts, and tuples, lists and dicts of these."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return all(map(is_constant, value))
    return isinstance(value, (bool, int, float, str))


def constants(stage):
    """The constants of a stage: the upper-case names that its file sets at its left margin, in the
    file's order -> {name: value}. A dict is recorded as well. Raises Stop for other kinds."""
    found = {}
    for statement in ast.parse(Path(stage["__file__"]).read_text(encoding="utf-8")).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        for node in ast.walk(statement):
            is_set = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            if is_set and node.id.isupper() and node.id in stage:       # not a comprehension's
                found[node.id] = stage[node.id]
    for name, value in found.items():
        expect(is_constant(value) and not isinstance(value, list),
               f"{name} = {value!r}: a constant is a bool, int, float, str or tuple, (1, 2) for "
               "[1, 2]; what is computed, or no constant, has a lower-case name")
    return found


def at_home(value):
    """A text, or a tuple of texts, with each ~ that begins a path expanded."""
    if isinstance(value, tuple):
        return tuple(at_home(item) for item in value)
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|[:,])~(?=/|$)", lambda m: m[1] + os.path.expanduser("~"), value)


def parse(name, text, default):
    """The text after --NAME= as a value of the default's type; a tuple is written a,b,c, and a
    comma within an item as \\, -> the value. Raises Stop."""
    kind = type(default)
    text = at_home(text)
    expect(text or not default, f"--{name}= is empty: expected a value as {default!r}")
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            item = type(default[0]) if default else str
            parts = re.split(r"(?<!\\),", text)
            return tuple(item(part.replace("\\,", ",")) for part in parts if part)
        return kind(text)
    except (ValueError, KeyError):
        raise Stop(f"--{name}={text}: {name} is {kind.__name__}, as {default!r}") from None


def override(stage, arguments):
    """Set constants of a stage from --NAME=value, and expand ~ in all. Raises Stop."""
    known = {name: v for name, v in constants(stage).items() if not isinstance(v, dict)}
    for name, value in known.items():
        stage[name] = known[name] = at_home(value)
    if {"-h", "--help"} & set(arguments):
        print(stage["__doc__"] + f"\nPRESET={PRESET} RUN={RUN} DATA={DATA} (environment)")
        for name, value in known.items():
            print(f"  --{name}={','.join(map(str, value)) if type(value) is tuple else value}")
        raise SystemExit(0)
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in known:
            near = difflib.get_close_matches(name.upper(), known, 1) or ["NAME"]
            raise Stop(f"{argument}: expected --{near[0]}=value; --help lists the constants")
        stage[name] = parse(name, text, known[name])
        print(f"{name}: {known[name]!r} -> {stage[name]!r}")


def one_line(problem):
    """What a user can do about an error -> a text, or None: it is a mistake in the code."""
    words = str(problem)
    if isinstance(problem, Stop):       # a DataLoader's worker puts its traceback before it
        return words.rpartition("common.Stop: ")[2].strip()
    if isinstance(problem, KeyboardInterrupt):
        return "stopped. The same command resumes from what was saved"
    if isinstance(problem, torch.OutOfMemoryError):
        return ("the GPU's memory is full. Lower SAM_BATCH or SAM_CHUNK; or, in another --OUT, "
                "lower BATCH, N_SOURCE or GROUP, or set HALF=True")
    # not "Caught KeyError in DataLoader worker process 0", which is a mistake in the code
    if re.search(r"DataLoader worker \(pid|torch_shm|</torch_|shared memory object", words):
        return ("a data-loading process was killed: memory or /dev/shm is full. Fewer "
                "--WORKERS (0: none); in a container: --ipc=host or --shm-size=8g")
    if memory_is_full(problem):
        return "the machine's memory is full: fewer --WORKERS, a smaller batch or a smaller model"
    if isinstance(problem, BrokenPipeError):
        return "the program that read the output has ended. The same command resumes"
    if isinstance(problem, OSError) and problem.errno:
        return f"{problem.filename or 'the output'}: {problem.strerror}. {AGAIN}"


def memory_is_full(error):
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def launch(stage):
    """Run main() of a stage with the constants of the shell. What files, disks, models and the
    shell do wrong ends in a short message on stderr and status 1 (DEBUG=1: with the traceback); a
    mistake in the code keeps its traceback."""
    script = Path(stage["__file__"]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # ended from outside: as Ctrl-C
    if RANK or sys.stdout is None:
        sys.stdout = open(os.devnull, "w")                          # one process prints
    if hasattr(sys.stdout, "reconfigure"):                          # a notebook's has not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if len(tempfile.gettempdir()) > 70 and os.path.isdir("/tmp"):   # a socket's path: 107 at most
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    try:
        override(stage, sys.argv[1:])
        stage["check"]()
        stage["main"]()
    except (Exception, KeyboardInterrupt) as problem:
        line = one_line(problem)
        if not line:
            raise
        if os.environ.get("DEBUG"):
            traceback.print_exc()
        if isinstance(problem, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)            # or Python's end complains too
        sys.exit(f"{script}: {line}")
    finally:
        while locks:                                                # a notebook's process lives on
            locks.pop().release()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if "ipykernel" in sys.modules:                              # its next %run reads them anew
            sys.modules.pop("common", None)
            sys.modules.pop("03_train_source", None)


@lru_cache(1)
def device():
    """The GPU (of several processes each has its own), or the CPU, where a run repeats exactly.
    Under torchrun this joins the process group."""
    torch.set_float32_matmul_precision("high")                      # TensorFloat-32
    torch.utils.deterministic.fill_uninitialized_memory = False
    chosen = torch.device("cpu")
    if torch.cuda.is_available():
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)   # or what pins memory would take room on the first one too
    else:
        torch.use_deterministic_algorithms(True)
        keep_memory()
        if PRESET != "toy":
            print(f"warning: no GPU: PRESET={PRESET} takes minutes per step. For CPUs: PRESET=toy")
    if PROCESSES > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def keep_memory():
    """glibc keeps what it has freed. On torch 2.14 every second start took ten times as long per
    step without this, measured on an AMD EPYC."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4                  # the numbers of mallopt(3)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2 ** 31 - 1)
        mallopt(top_pad, 2 ** 26)


@lru_cache
def bfloat16(wanted):
    """Whether bfloat16 is used: if HALF asks for it and a GPU, if there is one, has it natively."""
    if wanted and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            print(f"HALF: {torch.cuda.get_device_name()} has no bfloat16, float32 is used")
            return False
    return wanted


def wait_for_others():
    """Under torchrun: wait until every process has reached this point."""
    if PROCESSES > 1:
        torch.distributed.barrier()


def sum_of_processes(tensor):
    """A tensor's sum over the processes of torchrun, all of which must call this."""
    if PROCESSES > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def agree(text):
    """Raise Stop unless all processes have the same text: slow shared folders show files late."""
    number = torch.tensor(int(digest([text])[:10], 16), device=device())
    expect(sum_of_processes(number) == number * PROCESSES, f"not all processes {text}: a shared "
           "folder shows some of them old files. Wait a minute and run the same command again")


def need(wanted):
    """Stop with a message that names at most ten missing files. wanted: [(path, what gives it)]."""
    missing = [f"no {path}\n  {how}" for path, how in wanted if not Path(path).exists()]
    if len(missing) > 10:
        missing[10:] = [f"... {len(missing)} files are missing"]
    expect(not missing, "\n".join(missing))


@contextmanager
def whole(path):
    """`with whole(path) as part:` write to `part`, which is renamed to `path` at the end: `path`
    is complete or not there. Raises Stop if it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise Stop(f"{path} cannot be written ({error}). {FULL}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path, text):
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def explain(what, remedy):
    """An error of the library that is called in the block becomes two lines: what failed and the
    error's words; the remedy. Full memory and mistakes in our own code are raised unchanged."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = Path([frame.filename for frame in frames if frame.name != "__getattr__"][-1])
        mistake = isinstance(error, (NameError, AttributeError, TypeError, ImportError))
        memory = isinstance(error, torch.OutOfMemoryError) or memory_is_full(error)
        if isinstance(error, Stop) or memory or mistake and file.parent == HERE:
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Stop(f"{what} ({words})\n  {remedy}") from error


def write_lines(path, rows):
    """A file of one JSON object per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path, *keys, remedy="remove the file, and the stage makes it again, or name another "
               "folder"):
    """A file of one JSON object per line, each with these keys -> list of dicts. Raises Stop."""
    with explain(f"{path}: expected lines of JSON", remedy):
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        right = isinstance(row, dict) and set(keys) <= set(row)
        expect(right, f"{path}, line {number}: expected {', '.join(keys)}; {remedy}")
    expect(rows, f"{path} is empty; {remedy}")
    return rows


def digest(contents):
    """The first 16 hexadecimal digits of the SHA-256 of texts or bytes, one after another."""
    total = hashlib.sha256()
    for content in contents:
        total.update(os.fsencode(content))              # names of files may be of any encoding
    return total.hexdigest()[:16]


def code_digest(*files):
    """A digest of the functions and classes of Python files, without comments and docstrings."""
    kinds, code = (ast.FunctionDef, ast.ClassDef), []
    for file in files:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, kinds) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        code += [ast.unparse(node) for node in tree.body if isinstance(node, kinds)]
    return digest(code)


def files_digest(files):
    """Number, names and sizes of files as a text: what a run was made of."""
    rows = [f"{Path(file).name} {os.path.getsize(file)}" for file in files]
    return f"{len(rows)} files, {digest(rows)}"


locks = []      # of the run folders that this process works in


class Run:
    """The folder of one stage: run.json, and the result, whose presence means finished.

    free: constants that may change when a run is resumed, besides FREE. facts: {text: value}, what
    else it is made of, compared like a constant. Raises Stop if it was made with others."""

    def __init__(self, stage, result, free=(), facts=None):
        self.out, self.stage = Path(stage["OUT"]), Path(stage["__file__"]).stem
        self.result, self.record = self.out / result, self.out / "run.json"
        self.free, self.started = FREE + free, time.time()
        recorded = {name: portable(value) for name, value in constants(stage).items()}
        self.constants = json.loads(json.dumps(recorded | (facts or {})))
        self.inherited = {}     # constants of an earlier run that hold in this one too
        self.finished_before = self.result.exists()
        self.info = {"stage": self.stage, "constants": {}}
        made = {path.name for path in self.out.glob("[!.]*")}
        if self.record.exists():
            remedy = "put it back from a copy, or name another --OUT"
            self.info = read_lines(self.record, "stage", "constants", remedy=remedy)[0]
            expect(isinstance(self.info["constants"], dict),
                   f"{self.record} holds no constants: {remedy}")
        expect(self.record.exists() or not made, f"{self.out} holds files, and no run.json of "
               "these scripts: name another --OUT, or move them away")
        expect(self.info["stage"] == self.stage,
               f"{self.out} belongs to {self.info['stage']}: name another --OUT")
        scripts = [stage["__file__"], __file__]
        if "source_stage" in stage:
            scripts.append(stage["source_stage"].__file__)
        self.code = [code_digest(*scripts)]
        if made > {"run.json"}:
            self.compare(self.info["constants"])
            self.code = list(dict.fromkeys(self.info.get("code", []) + self.code))

    def compare(self, earlier):
        """Raise Stop if constants {name: value} of an earlier start differ from today's."""
        for name in {**self.constants, **earlier}:
            before, now = earlier.get(name, "nothing"), self.constants.get(name, "nothing")
            made = f"{name}={before} (now {now})"
            made = made if len(made) <= 200 else f"other {name}"
            expect(before == now or name in self.free, f"{self.out} was made with {made}. Another "
                   f"experiment is another folder: --OUT={self.out}_{name.split()[0].lower()}")

    def finished(self):
        if len(self.code) > 1:
            print(f"warning: {self.out} was begun by other code: the scripts were edited since")
        if self.finished_before:
            print(f"{self.stage}: finished before, see {self.result}; another --OUT starts anew")
        return self.finished_before

    def start(self, lock=".lock", **facts):
        """Make and lock the folder, and write run.json. Raises Stop if another job is in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            try:
                locks.append(FileLock(self.out / lock))
                locks[-1].acquire(timeout=10)       # a killed job's workers hold it for 5 seconds
            except Timeout:
                raise Stop(f"{self.out} is in use by another job: wait for it") from None
        expect(self.finished_before or not self.result.exists(),
               f"{self.out} has just been finished by another job")
        libraries = "torch", "open_clip_torch", "timm", "transformers", "diffusers"
        self.save(constants=self.constants, preset=PRESET, argv=sys.argv, commit=git_commit(),
                  code=self.code, processes=PROCESSES, **facts,
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else
                  platform.machine(), versions={name: version(name) for name in libraries})

    def save(self, **facts):
        self.info.update(facts)
        if RANK == 0:
            write_lines(self.record, [self.info])

    def finish(self, **facts):
        """Add time and memory to run.json. The stage's result is saved after this."""
        seconds = round(self.info.get("wall_seconds", 0) + time.time() - self.started, 1)
        gigabytes = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
        self.save(wall_seconds=seconds, gpu_memory_gb=gigabytes, **facts)
        print(f"{self.stage}: {self.result} | {seconds} s")


def git_commit():
    """What git calls this version; an empty text without git or outside a checkout."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


# ============================================================================ the labels
IGNORE = 255            # the train id of a pixel that must not teach and is not scored


def read_table(text):
    """Lines `class | colour | ids | ids ...` -> {class: [colour, ids, ids ...]}, of tuples"""
    table = {}
    for line in text.strip().splitlines():
        name, *columns = line.split("|")
        if name.strip() in table:
            sys.exit(f"common.py: TABLE names {name.strip()} twice")
        table[name.strip()] = [tuple(map(int, column.split())) for column in columns]
    return table


# class, colour, its ids in: Cityscapes and GTA5 (column 1), SYNTHIA (2), Mapillary v1.2 (3)
TABLE = read_table("""
road          | 128  64 128 |  7 |  3 | 13 24 41
sidewalk      | 244  35 232 |  8 |  4 | 2 15
building      |  70  70  70 | 11 |  2 | 17
wall          | 102 102 156 | 12 | 21 | 6
fence         | 190 153 153 | 13 |  5 | 3
pole          | 153 153 153 | 17 |  7 | 45 47
traffic light | 250 170  30 | 19 | 15 | 48
traffic sign  | 220 220   0 | 20 |  9 | 50
vegetation    | 107 142  35 | 21 |  6 | 30
terrain       | 152 251 152 | 22 | 16 | 29
sky           |  70 130 180 | 23 |  1 | 27
person        | 220  20  60 | 24 | 10 | 19
rider         | 255   0   0 | 25 | 17 | 20 21 22
car           |   0   0 142 | 26 |  8 | 55
truck         |   0   0  70 | 27 | 18 | 61
bus           |   0  60 100 | 28 | 19 | 54
train         |   0  80 100 | 31 | 20 | 58
motorcycle    |   0   0 230 | 32 | 12 | 57
bicycle       | 119  11  32 | 33 | 11 | 52
""")
TOY = ("road, sidewalk, building, fence, pole, traffic sign, vegetation, sky, person, car, bus, "
       "bicycle").split(", ")
TABLE = preset(toy={name.split()[-1]: TABLE[name] for name in TOY}, paper=TABLE)
# for classes of your own, here: TABLE = read_table("wall | 120 120 120 \n floor | 80 50 50")
CLASSES = list(TABLE)


def class_ids():
    """The classes with their ids, in order, as a run records them."""
    return [(name, *row[1:]) for name, row in TABLE.items()]


COLOURS = np.zeros((256, 3), np.uint8)      # COLOURS[label] is a picture; IGNORE is black
COLOURS[:len(CLASSES)] = [row[0] for row in TABLE.values()]

# ============================================================================ the data
# one row per data set: the column of its ids in TABLE (0: its labels hold train ids); the folder of
# its images under DATA, **, the end of their stems; what turns an image's path into its label's;
# the official numbers of train and val
LAYOUTS = {
    "gta": (1, "gta/images/**", {"/images/": "/labels/"}, (24_904, 24_904)),
    "synthia": (2, "synthia/RGB/**", {"/RGB/": "/GT/LABELS/"}, (9_400, 9_400)),
    "urbansyn": (0, "urbansyn/rgb/**", {"/rgb/rgb_": "/ss/ss_"}, (7_539, 7_539)),
    "cityscapes": (1, "cityscapes/leftImg8bit/{split}/**_leftImg8bit",
                   {"/leftImg8bit/": "/gtFine/", "_leftImg8bit": "_gtFine_labelIds"}, (2_975, 500)),
    "bdd": (0, "bdd100k/images/10k/{split}/**",
            {"/images/10k/": "/labels/sem_seg/masks/"}, (7_000, 1_000)),
    "mapillary": (3, "mapillary/{split}*/images/**", {"/images/": "/labels/"}, (18_000, 2_000)),
    "acdc": (0, "acdc/rgb_anon/*/{split}/**_rgb_anon",
             {"/rgb_anon/": "/gt/", "_rgb_anon": "_gt_labelTrainIds"}, (1_600, 406))}
for weather, val in {"fog": 100, "night": 106, "rain": 100, "snow": 100}.items():
    ids, pattern, changes, _ = LAYOUTS["acdc"]
    LAYOUTS[f"acdc_{weather}"] = ids, pattern.replace("*", weather, 1), changes, (400, val)
FOLDER = (0, "images/**", {"/images/": "/labels/"}, None)
# pairs whose label and image differ in size; the official list omits them too
GTA_LEFT_OUT = {f"{i:05d}" for i in (15188, 17705, *range(20801, 20861))}
# the last id of a column, or of a data set; further colours of Cityscapes' labels, none of a class
LAST_ID = {0: len(CLASSES) - 1, 1: 34, 2: 22, 3: 65, "urbansyn": 19}
VOID = ((0, 0, 0), (20, 20, 20), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140),
        (180, 165, 180), (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110))
OTHERS = ("Train ids are read as folder:PATH, Cityscapes' labelIds by a row with column 1 in "
          "LAYOUTS (common.py); of Mapillary take v1.2; resize labels with nearest neighbour")
KINDS = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"
Image.MAX_IMAGE_PIXELS = 150_000_000        # PIL refuses a picture with more than twice as many
SAID = set()


def say_once(name, what, path):
    if (name, what) not in SAID:
        print(f"{name}: {what}, first {path}")
    SAID.add((name, what))


def pictures(folder):
    """Sorted paths of the pictures in a folder and below it. Links are followed, a folder that is
    reached twice counts once. Prints what was passed over."""
    found, passed, seen, waiting = [], Counter(), set(), [Path(folder)]
    for place in waiting:                               # which grows
        if place.resolve() in seen or not place.is_dir():
            continue
        seen.add(place.resolve())
        for entry in sorted(os.scandir(place), key=lambda entry: (entry.is_symlink(), entry.name)):
            path = place / entry.name
            if entry.name.startswith("."):
                passed["hidden"] += 1
            elif entry.is_dir():
                waiting.append(path)
            elif entry.is_file() and path.suffix.lower() in KINDS:
                found.append(path)
            else:
                passed[path.suffix or path.name] += 1
    if passed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed.items()))
        print(f"{folder}: {len(found)} pictures; passed over: {kinds}")
    return sorted(found)


def pairs(name, split):
    """All (image, label) paths of a data set, sorted. `folder:PATH` means PATH/images, and PNGs
    of train ids with the same stems in PATH/labels. split: "train" or "val". Raises Stop, also
    where the labels cannot be those of this data set."""
    is_folder = name.startswith("folder:")
    expect(is_folder or name in LAYOUTS,
           f"{name} is not a data set: there are {', '.join(LAYOUTS)}, folder:PATH")
    root = Path(name[7:] if is_folder else DATA).expanduser()
    toy = root.parent == Path(DATA, "toy")
    if toy and RANK == 0 and not root.exists():
        print(f"drawing the miniature world into {root.parent} (about a minute, once)")
        with explain(f"{root.parent} cannot be written", "name another folder: DATA=PATH"):
            os.makedirs(root.parent, exist_ok=True)
        drawn = subprocess.run([sys.executable, HERE / "tests/toy/world.py", root.parent])
        expect(not drawn.returncode, "no miniature world, see above. Another folder: DATA=PATH")
    while toy and RANK and not root.exists():           # the first process draws
        time.sleep(1)
    _, pattern, changes, official = LAYOUTS.get(name, FOLDER)
    places, ending = pattern.format(split=split).split("**")
    left_out = GTA_LEFT_OUT if name == "gta" else ()
    found = {}
    for place in sorted(glob(places, root_dir=root)):
        for image in pictures(root / place):
            if image.stem in left_out or not image.stem.endswith(ending):
                continue
            label = f"/{image.relative_to(root).with_suffix('.png').as_posix()}"
            for old, new in changes.items():
                label = label.replace(old, new, 1)
            other = found.setdefault(root / label[1:], image)
            expect(other == image, f"{other} and {image} have one label: take one of them away")
    expect(found, f"no images at {root}/{places}\n  README, 'Data', says where they belong. "
                  "To try the code without: PRESET=toy")
    need([(label, f"it is the label of {image}") for label, image in found.items()])
    numbers = f" (official numbers of train, val: {official})" if official else ""
    print(f"{name}, {split}: {len(found)} pairs{numbers}")
    judge(name, list(found))
    return sorted((image, label) for label, image in found.items())


def judge(name, labels):
    """Raise Stop if some dozens of a set's labels, seen together, cannot be those of data set
    `name`: ids blended by resizing, ids of another system, no pixel with a label."""
    seen, train_ids, edges, thin, between = np.zeros(256, bool), numbering(name)[0], 0, 0, 0
    for path in labels[::max(1, len(labels) // 24)]:
        ids = read_label(path, name, raw=True)
        seen[ids] = True
        left, middle, right = ids[::4, :-2], ids[::4, 1:-1], ids[::4, 2:]
        inside = (np.minimum(left, right) < middle) & (middle < np.maximum(left, right))
        edges += (left != middle).sum()
        thin += ((left != middle) & (middle != right)).sum()
        between += inside.sum()
    # blending puts ids between two others on their border: in Cityscapes and CamVid resized so, at
    # 28 to 65 % of all edges and 40 to 99 % of what is one pixel thin (true labels 0 to 5 %, noise
    # 33 % of what is thin)
    expect(between <= max(100, .2 * edges, .37 * thin), f"{name}: its labels were resized with "
           f"blending, which made borders of ids of other classes.\n  {OTHERS}")
    column = LAYOUTS.get(name, FOLDER)[0]
    above_18 = (train_ids[19:IGNORE] < 254).any()       # whether classes have such ids
    expect(column == 0 or not above_18 or seen[19:IGNORE].any(),
           f"{name}: no label has an id above 18: they look like train ids.\n  {OTHERS}")
    classes = np.setdiff1d(train_ids[seen], IGNORE)
    expect(len(classes), f"{name}: no pixel has a label.\n  {OTHERS}")
    if len(classes) == 1:
        print(f"warning: {name}: {CLASSES[classes[0]]} is the only class")


def load(path, kind):
    """A picture file -> PIL image as stored; uint8 or deeper (H, W) or (H, W, n), the file's own
    numbers, where PIL changes them (few bits per pixel, 16 of RGB), else None. Raises Stop."""
    if not Path(path).is_file():                        # opening a pipe would block
        raise Stop(f"{path} cannot be read as a {kind}: it is not a file")
    with explain(f"{path} cannot be read as a {kind}",
                 "it is damaged or no picture: unpack it once more, or take it away"):
        image = Image.open(path)
        image.load()
    with open(path, "rb") as file:
        bits = file.read(25)[24] if image.format == "PNG" else 8        # per channel
    if bits < 8 and image.mode == "L":
        return image, np.asarray(image) // (255 // (2 ** bits - 1))
    if bits == 16 and image.mode in ("RGB", "RGBA"):    # PIL reads the high bytes
        low = Image.open(path)
        low.tile = [(*tile[:3], f"{image.mode};16L") for tile in low.tile]
        return image, 256 * np.asarray(image).astype(np.uint16) + np.asarray(low)
    return image, np.asarray(image) if image.mode.startswith(("I", "F")) else None


def turned(image):
    """A PIL image turned as its EXIF says."""
    image.getexif()                     # which Pillow remembers,
    image.info.pop("exif", None)        # and does not write anew: that fails where a tag is odd
    return ImageOps.exif_transpose(image)


def read_image(path, upright=True):
    """-> PIL image, RGB, without transparency; upright: turned as its EXIF says. The value of
    white is the smallest of 1 (floats), 255, 4095, 65535 that no pixel exceeds. Raises Stop."""
    image, pixels = load(path, "picture")
    info = image.info
    if pixels is not None and image.mode != "L":
        tops = (1, 255, 65535) if image.mode == "F" else (255, 4095, 65535)
        top = next((top for top in tops if pixels.max() <= top), None)
        if top is None or not pixels.min() >= 0:
            raise Stop(f"{path} cannot be read as a picture: its values go from {pixels.min()} to "
                       f"{pixels.max()}. Save it with 8 bits per channel")
        image = Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGBA" if "transparency" in info else image.mode).convert("RGB")
        if not any(most for _, most in image.getextrema()):
            say_once("warning", "pictures that are black", path)
    image.info = info
    return turned(image) if upright else image


def numbering(name):
    """What a data set's ids and colours mean -> uint8 (256,), train ids, 254 where its labels
    never hold the id; {colour: id}."""
    column = LAYOUTS.get(name, FOLDER)[0]
    train_ids, id_of = np.full(256, 254, np.uint8), dict.fromkeys(VOID, IGNORE)
    train_ids[[*range(LAST_ID.get(name, LAST_ID.get(column, 254)) + 1), IGNORE]] = IGNORE
    for train_id, row in enumerate(TABLE.values()):
        expect(column < len(row),
               f"{name}: the classes in TABLE (common.py) have no ids in column {column}")
        ids = row[column] if column else (train_id,)
        train_ids[list(ids)], id_of[row[0]] = train_id, ids[0]
    return train_ids, id_of


def ids_of_colours(path, name, image):
    """The ids uint8 (H, W) of a label with a palette or in RGB: grey means its value, a class's
    colour the class; otherwise a palette's numbers are ids. Raises Stop."""
    pixels, (train_ids, id_of) = np.asarray(image), numbering(name)
    numbers = colours = [value for _, value in image.getcolors(256) or []]
    if image.mode == "P":
        palette = np.reshape((image.getpalette() + 768 * [0])[:768], (256, 3)).tolist()
        colours = [tuple(palette[number]) for number in numbers]
        same = [train_ids[number] == train_ids[id_of[colour]] for number, colour
                in zip(numbers, colours) if colour in id_of and train_ids[number] < 254]
        if same and all(same):          # as in GTA5's, where plates have the colour of cars
            return pixels
    else:
        pixels = pixels @ np.array((65536, 256, 1), np.int32)
        numbers = [65536 * red + 256 * green + blue for red, green, blue in colours]
    ids = [red for red, green, blue in colours if red == green == blue and train_ids[red] != 254]
    if len(ids) < len(colours) or set(colours) <= {row[0] for row in TABLE.values()}:
        ids = [id_of[colour] for colour in colours if colour in id_of]
    if ids and len(ids) == len(colours):
        of_number = np.zeros(max(numbers) + 1, np.uint8)
        of_number[numbers] = ids
        return of_number[pixels]
    if image.mode == "P" and 2 * sum(i != IGNORE for i in ids) <= len(colours):
        say_once(name, "labels with a palette, whose numbers are taken as ids", path)
        return pixels
    strange = [colour for colour in colours if colour not in id_of][:3] or "more than 256"
    raise Stop(f"{path} cannot be read as a label: it has colours of no class (TABLE in "
               f"common.py): {strange}. Take labels that hold ids")


def read_label(path, name, *sizes, raw=False):
    """-> uint8 (H, W): the train ids of a label of data set `name`, raw: its own ids. sizes: what
    (width, height) may be. Raises Stop."""
    image, pixels = load(path, "label")
    what = f"{path} cannot be read as a label: expected"
    if image.format not in ("PNG", "TIFF", "BMP") or image.mode in ("F", "CMYK"):
        raise Stop(f"{what} integer ids in a PNG, not {image.format} of mode {image.mode}")
    if sizes and image.size not in sizes:
        raise Stop(f"{what} the size of its image, {sizes[0]}, not {image.size}")
    if pixels is None and image.mode in ("P", "RGB", "RGBA"):
        pixels = ids_of_colours(path, name, image.convert("RGB") if image.mode == "RGBA" else image)
    pixels = np.asarray(image) if pixels is None else pixels
    if pixels.ndim == 3:            # SYNTHIA's: class, object, 0; or grey with transparency
        pixels = pixels[..., 0]
    train_ids, _ = numbering(name)
    ids = pixels.astype(np.uint8)
    label = train_ids.take(ids)
    strange = np.unique(pixels[(label == 254) | (ids != pixels)])[:9]
    if len(strange):
        last = np.flatnonzero(train_ids[:255] != 254)[-1]
        raise Stop(f"{what} ids 0 to {last} (PRESET={PRESET}), or {IGNORE}, not ids {strange}.\n"
                   f"  {OTHERS}")
    return ids if raw else label


def read_pair(image_path, label_path, name):
    """-> (PIL image RGB, uint8 (H, W) of train ids). EXIF turns the image only where it does not
    fit its label as it is stored, for most annotation tools ignore EXIF. Raises Stop."""
    image = upright = read_image(image_path, upright=False)
    if image.getexif().get(0x0112) in range(2, 9):
        upright = turned(image)
    label = read_label(label_path, name, image.size, upright.size)
    if label.shape[::-1] != image.size:
        return upright, label
    if upright is not image and upright.size == image.size:
        say_once(name, "warning: labels fit their images with and without EXIF's turn: none is "
                 "turned. tests/check_data.py draws them", image_path)
    return image, label


def save_sheet(path, rows):
    """A PNG of rows of (title, array): images uint8 (H, W, 3) or label maps uint8 (H, W)."""
    height, width = rows[0][0][1].shape[:2]
    columns = len(rows[0])
    tall = len(rows) * (3 * height / width + .25) + 1
    figure = Figure((3 * columns, tall), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, array) in zip(grid.flat, sum(rows, [])):
        axes.imshow(COLOURS[array] if array.ndim == 2 else array)
        axes.set_title(title.encode(errors="replace").decode(), fontsize=7, parse_math=False)
    if any(array.ndim == 2 for _, array in rows[0]):
        patches = [Patch(color=row[0] / np.array(255)) for row in TABLE.values()]
        figure.legend([*patches, Patch(color="black")], [*CLASSES, "no label"], fontsize=7,
                      loc="outside lower center", ncols=3 * columns)
    with whole(path) as part:
        figure.savefig(part, format="png")
