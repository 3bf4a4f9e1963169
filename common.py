"""
common: what two or more stages call, and what would be a bug if it drifted apart.

    the run      presets, constants from the shell, run folders that resume, files that are whole or not there
    the labels   class names, colours and synonyms; the id maps of the data sets
    the data     pairs of image and label, the paper's augmentation, batches addressed by (seed, step, item)
    the model    frozen encoder, mask decoder, matching and losses, the semantic map, checkpoints
"""
import difflib
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

HERE = Path(__file__).resolve().parent

# ============================================================================ the run
PRESETS = ("toy", "gta", "synthia", "cityscapes")
PRESET = os.environ.get("PRESET", "toy")
RUN = os.environ.get("RUN", f"runs/{PRESET}")
DATA = os.environ.get("DATA", "data")
if PRESET not in PRESETS:
    sys.exit(f"PRESET={PRESET} is not a preset; there are: {', '.join(PRESETS)}")


def preset(toy, paper=None, **named):
    """This preset's value of a constant. `paper` stands for gta, synthia and cityscapes where they are not named."""
    return toy if PRESET == "toy" else named.get(PRESET, paper)


class Stop(Exception):
    """What the user must hear: one message, no traceback. Nothing that was made is lost."""


def constants(stage):
    """The constants of a stage: its upper-case names with plain values, in the order of the file."""
    return {name: value for name, value in stage.items()
            if name.isupper() and isinstance(value, (bool, int, float, str, tuple)) and (name == "OUT" or name not in globals())}


def parse(name, text, default):
    """The text after --NAME= as a value of the default's type. A tuple is written a,b,c. Raises Stop."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}[text.lower()]
        if kind is tuple:
            of = type(default[0]) if default else str
            return tuple(of(part.strip()) for part in text.split(",") if part.strip())
        return kind(text)
    except (ValueError, KeyError):
        raise Stop(f"--{name}={text}: {name} is {kind.__name__} (now {default!r}), got {text!r}") from None


def override(stage, arguments):
    """Set constants of a stage from --NAME=value. Unknown names and wrong types stop with the nearest name. --help prints them all."""
    known = constants(stage)
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(stage["__doc__"].strip() + f"\n\nPRESET={PRESET} RUN={RUN} DATA={DATA} (from the environment). Constants, set with --NAME=value:")
            for name, value in known.items():
                print(f"  --{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
            raise SystemExit(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise Stop(f"{argument}: expected --NAME=value; --help lists the names")
        if name not in known:
            near = difflib.get_close_matches(name.upper(), known, 1)
            raise Stop(f"--{name}: not a constant of this stage" + (f"; did you mean --{near[0]}={text}?" if near else "; --help lists them"))
        stage[name] = parse(name, text, known[name])
        if stage[name] != known[name]:
            print(f"{name}: {known[name]!r} -> {stage[name]!r}")


def launch(stage):
    """Run main() of a stage with the constants of the command line. Expected failures end in one line on stderr and status 1."""
    script = Path(stage["__file__"]).name
    try:
        override(stage, sys.argv[1:])
        steady_cpu()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and script[:2] not in ("03", "04"):
            raise Stop("torchrun is for 03 and 04; 02 shares its work by --SHARD=k/n, 01 and 05 need one process")
        if processes()[0]:
            sys.stdout = open(os.devnull, "w")                          # one process talks
        stage["main"]()
    except Stop as problem:
        sys.exit(f"{script}: {problem}")
    except KeyboardInterrupt:
        sys.exit(f"\n{script}: stopped by Ctrl-C. The same command goes on where this one was.")
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"{script}: the disk is full ({problem.filename or 'while writing'}). What is written is whole: make room and run the same command again.")
    finally:
        if processes.cache_info().currsize and processes()[1] > 1:
            torch.distributed.destroy_process_group()


def steady_cpu():
    """Keep freed memory in the process: glibc otherwise hands every large tensor back and faults it in again at each step (up to 8x slower training)."""
    if not torch.cuda.is_available() and platform.libc_ver()[0] == "glibc":
        import ctypes
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):          # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    torch.utils.deterministic.fill_uninitialized_memory = False           # a tenth of the time, for memory that nothing reads
    torch.use_deterministic_algorithms(not torch.cuda.is_available())      # on a GPU grid_sample's and interpolate's gradients have no such version


@lru_cache(1)
def device():
    """The GPU (of several processes each has its own), or the CPU. A paper preset without a GPU is allowed and warned about."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if PRESET != "toy":
        print(f"warning: no GPU found; PRESET={PRESET} on a CPU takes minutes a step. The miniature world is for CPUs: PRESET=toy")
    return torch.device("cpu")


@lru_cache(1)
def processes():
    """-> (rank, count). One, unless `torchrun --nproc_per_node=N` started several: they share every batch."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank, count


def share(n):
    """The items of a batch of n that this process makes. Raises Stop if they can't be dealt out evenly."""
    rank, count = processes()
    if n % count:
        raise Stop(f"{count} processes cannot share {n} images a step evenly: take another --nproc_per_node, or another BATCH, N_SOURCE or N_GENERATED")
    return range(rank, n, count)


def dealt(*sizes):
    """The order for gather, of batches of these sizes behind one another: [where item i of one process's batch lies among those of all processes]."""
    starts, count = np.cumsum([0, *sizes]), processes()[1]
    return np.argsort([start + i for rank in range(count) for start, n in zip(starts, sizes) for i in range(rank, n, count)])


def gather(tensor, order, dim=0):
    """The tensors of all processes side by side along `dim`, in the order that one process would have had: see dealt."""
    if processes()[1] == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(processes()[1])]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim).index_select(dim, torch.as_tensor(order, device=tensor.device))


def need(*wanted):
    """Ask for everything before anything is touched. wanted: (path, what gives it). One message names all that is missing."""
    missing = [f"no {path}\n  {how}" for path, how in wanted if not Path(path).exists()]
    if missing:
        raise Stop("\n".join(missing))


@contextmanager
def whole(path, each=False):
    """`with whole(path) as part:` write to `part`; at the end it is renamed to `path`. So `path` is complete or not there.

    Of several processes only the first one's file is kept, unless each writes its own."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        yield part
        if processes()[0] and not each:
            return
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as problem:            # torch, numpy and safetensors each have their own error for a full disk
        if shutil.disk_usage(part.parent).free < 2 ** 16 or "No space left" in str(problem):
            raise OSError(errno.ENOSPC, "no space left", str(path)) from problem
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def save_checkpoint(path, state):
    with whole(path) as part:
        torch.save(state, part)


def load_checkpoint(path):
    """The state that save_checkpoint wrote, or None if there is none. A damaged file is named, put aside and not used."""
    if not Path(path).exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        os.replace(path, f"{path}.damaged")
        print(f"{path} cannot be read ({type(problem).__name__}): kept as {path}.damaged; starting again without it")
        return None


def resume(path, saved):
    """Load {name: module or optimiser} from a checkpoint, if there is one -> the step to go on from."""
    state = load_checkpoint(path)
    if state is None:
        return 0
    for name, thing in saved.items():
        thing.load_state_dict(state[name])
    print(f"goes on from step {state['step']}")
    return state["step"]


class Run:
    """The folder of one stage: its result, run.json, log.jsonl, pictures. Its use, in this order:

        run = Run(globals(), "prompts.txt")     if run.finished(): return
        need(...)                               run.start()   ...   run.log(...)   ...   run.finish()

    The result is the file whose presence means finished; it is written last. `free` constants may change in a resumed run."""

    def __init__(self, stage, result, lock="lock", free=("LOG_EVERY", "SAVE_EVERY", "KEEP_EVERY", "PREVIEW_EVERY", "WORKERS")):
        self.out, self.result, self.stage = Path(stage["OUT"]), Path(stage["OUT"]) / result, Path(stage["__file__"]).stem
        self.constants = {k: list(v) if isinstance(v, tuple) else v for k, v in constants(stage).items() if k != "OUT"}
        self.free, self.lock_name, self.started, self.info = free, lock, time.time(), {}
        before = self.out / "run.json"
        if before.exists():
            try:
                self.info = json.loads(before.read_text())
            except ValueError:
                self.info = {}
            for name, value in self.info.get("constants", {}).items():
                if name in self.constants and name not in free and self.constants[name] != value:
                    raise Stop(f"{self.out} was made with {name}={value} (now {self.constants[name]}). "
                               f"Another experiment is another folder: --OUT={self.out}_{name.lower()}")

    def finished(self):
        if self.result.exists():
            print(f"{self.stage}: finished before, see {self.result}. To do it again, remove the folder or name another --OUT")
        return self.result.exists()

    def start(self):
        self.leads = processes()[0] == 0                                # of several processes one keeps the folder
        if not self.leads:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise Stop(f"{self.out} cannot be made ({problem.strerror}): name another --OUT") from None
        self.lock = open(self.out / f".{self.lock_name}", "w")
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass                                                        # no advisory locks on this system: one job a folder is up to the user
        except OSError:
            raise Stop(f"{self.out} is in use by another job: wait for it, or name another --OUT") from None
        self.info = {**self.info, "stage": self.stage, "preset": PRESET, "argv": sys.argv, "constants": self.constants, "device": str(device()),
                     "versions": versions(), "commit": commit(), "started": self.info.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))}
        write_json(self.out / "run.json", self.info)

    def rewind(self, step):
        """Begin to train at this step: forget what was logged after it."""
        self.since, self.sums = time.time(), []
        log = self.out / "log.jsonl"
        if log.exists() and self.leads:
            lines = [line for line in log.read_text().splitlines() if line.endswith("}") and json.loads(line).get("step", 0) <= step]
            with whole(log) as part:
                part.write_text("".join(line + "\n" for line in lines))

    def log(self, **numbers):
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(rounded) + "\n")
        print(" | ".join(f"{k} {v}" for k, v in rounded.items()), flush=True)

    def progress(self, done, total, every, numbers, images):
        """Take the numbers of a step; every so many steps log their means, the pace and the time left."""
        self.sums.append(numbers)
        if (done % every == 0 or done == total) and self.leads:
            pace = (time.time() - self.since) / len(self.sums)
            self.log(step=done, **{k: float(np.mean([s[k] for s in self.sums])) for k in numbers}, seconds=pace, images_per_second=images / pace,
                     minutes_left=round(pace * (total - done) / 60, 1), gb=peak_memory())
        if done % every == 0:
            self.since, self.sums = time.time(), []

    def finish(self, **numbers):
        self.info.update(wall_seconds=round(self.info.get("wall_seconds", 0) + time.time() - self.started, 1), peak_memory_gb=peak_memory(), **numbers)
        write_json(self.out / "run.json", self.info)
        print(f"{self.stage}: {self.result} | {self.info['wall_seconds']:.0f} s | {self.info['peak_memory_gb']} GB")


def peak_memory():
    """Gigabytes: of the GPU if there is one, otherwise of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    try:                                                                # resource's number is inherited from whoever started this process
        with open("/proc/self/status") as status:
            return round(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2 ** 20, 2)
    except (OSError, StopIteration):
        pass
    try:
        import resource
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20), 2)
    except ImportError:
        return 0.


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = {"python": platform.python_version()}
    for package in ("torch", "open_clip_torch", "timm", "transformers", "diffusers", "segment-anything", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def commit():
    try:
        return subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def local(path):
    """A path as given, or, if there is nothing, the same path beside this file: shipped weights are found from any working folder."""
    return str(path) if Path(path).exists() or not (HERE / path).exists() else str(HERE / path)


def model_folder(name):
    """A hub id, or a local folder if `name` is one. Something that looks like a path and is not there stops here, not after the hub's retries."""
    path = local(name)
    if Path(path).is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Stop(f"no model folder {name}: give a folder that exists, or a hub id like owner/name")
    return name


@contextmanager
def from_hub(what, instead):
    """Loading `what` may need the hub: its many errors become one line, with what to do `instead`."""
    import logging
    logging.disable(logging.ERROR)                                      # libraries log the same failure before they raise it
    try:
        yield
    except (OSError, RuntimeError, ValueError, ImportError) as problem:
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        raise Stop(f"{what} could not be loaded ({type(problem).__name__}: {line})\n  {instead}") from problem
    finally:
        logging.disable(logging.NOTSET)


def reachable(host):
    """Whether somebody answers there within a second."""
    import socket
    try:
        socket.create_connection((host, 443), 1.).close()
    except OSError:
        return False
    return True


def hub_or_offline():
    """Without a network the hub's client tries for 46 s before it says so. Ask once, for a second, before the libraries are imported."""
    if not {"HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"} & set(os.environ):
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0].split(":")[0]
        if not reachable(host):
            os.environ["HF_HUB_OFFLINE"] = "1"


# ============================================================================ the labels
IGNORE = 255                                         # the train id of a pixel that must not teach and is not scored
#                name            colour            other words for it in a prompt
TOY_CLASSES = {"road":          ((128, 64, 128),  ("street",)),
               "sidewalk":      ((244, 35, 232),  ("pavement",)),
               "building":      ((70, 70, 70),    ("house",)),
               "fence":         ((190, 153, 153), ("railing",)),
               "pole":          ((153, 153, 153), ("lamp post",)),
               "sign":          ((220, 220, 0),   ("traffic sign", "traffic light")),
               "vegetation":    ((107, 142, 35),  ("tree", "bush")),
               "sky":           ((70, 130, 180),  ("clouds",)),
               "person":        ((220, 20, 60),   ("people", "pedestrian")),
               "car":           ((0, 0, 142),     ("automobile",)),
               "bus":           ((0, 60, 100),    ("coach",)),
               "bicycle":       ((119, 11, 32),   ("bike", "cyclist"))}
CITYSCAPES_CLASSES = {
               "road":          ((128, 64, 128),  ("street", "avenue", "highway", "lane", "intersection", "crossing")),
               "sidewalk":      ((244, 35, 232),  ("pavement", "footpath")),
               "building":      ((70, 70, 70),    ("house", "skyscraper", "tower", "shop", "skyline")),
               "wall":          ((102, 102, 156), ("brick wall", "stone wall")),
               "fence":         ((190, 153, 153), ("railing",)),
               "pole":          ((153, 153, 153), ("lamp post", "street lamp")),
               "traffic light": ((250, 170, 30),  ("traffic signal", "stoplight")),
               "traffic sign":  ((220, 220, 0),   ("stop sign", "street sign", "road sign")),
               "vegetation":    ((107, 142, 35),  ("tree", "bush", "hedge", "plants")),
               "terrain":       ((152, 251, 152), ("grass", "lawn", "field", "dirt")),
               "sky":           ((70, 130, 180),  ("clouds",)),
               "person":        ((220, 20, 60),   ("people", "pedestrian", "man", "woman", "child")),
               "rider":         ((255, 0, 0),     ("cyclist", "motorcyclist", "biker")),
               "car":           ((0, 0, 142),     ("automobile", "taxi", "vehicle")),
               "truck":         ((0, 0, 70),      ("lorry", "van")),
               "bus":           ((0, 60, 100),    ("coach",)),
               "train":         ((0, 80, 100),    ("tram", "locomotive", "streetcar")),
               "motorcycle":    ((0, 0, 230),     ("motorbike", "scooter")),
               "bicycle":       ((119, 11, 32),   ("bike",))}
_TABLE = preset(toy=TOY_CLASSES, paper=CITYSCAPES_CLASSES)         # your own classes: a table like these, and what the pictures show:
SCENES, PLACE = "urban street scenes", "a street"                  # for the LLM's prompts and synonyms
CLASSES = list(_TABLE)
COLOURS = np.array([colour for colour, _ in _TABLE.values()], np.uint8)
SYNONYMS = {name: words for name, (_, words) in _TABLE.items()}

#              id of the data set -> train id; every id that is not here is IGNORE
CITYSCAPES_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18}
MAPILLARY_IDS = {13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10, 19: 11, 20: 12, 21: 12, 22: 12,
                 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18}                    # v1.2, the paper's choice
MAPILLARY_V2_IDS = {21: 0, **{i: 0 for i in range(35, 56) if i != 45}, 57: 0, 74: 0, 4: 1, 24: 1, 27: 2, 12: 3, 5: 4, 85: 5, 86: 5, 88: 5, **{i: 6 for i in range(90, 96)},
                    **{i: 7 for i in (99, 100, 101, 103)}, 64: 8, 63: 9, 61: 10, 30: 11, 32: 12, 33: 12, 34: 12, 108: 13, 114: 14, 107: 15, 111: 16, 110: 17, 105: 18}     # ours: v1.2's choice by name


def colourise(label):
    """uint8 (H, W) train ids -> uint8 (H, W, 3) in the classes' colours; IGNORE is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(COLOURS)] = COLOURS
    return table[label]


# ============================================================================ the data
# as downloaded:  ids, then one or more (images under DATA, what to replace in an image's path to get its label's); {split} is train or val, {Split} Mapillary's word for it
LAYOUTS = {
    "gta":          (CITYSCAPES_IDS, ("gta/images/*.png", {"/images/": "/labels/"})),
    "synthia":      (SYNTHIA_IDS, ("synthia/RGB/*.png", {"/RGB/": "/GT/LABELS/"})),
    "cityscapes":   (CITYSCAPES_IDS, ("cityscapes/leftImg8bit/{split}/*/*_leftImg8bit.png", {"/leftImg8bit/": "/gtFine/", "_leftImg8bit.png": "_gtFine_labelIds.png"})),
    "bdd":          (None, ("bdd100k/images/10k/{split}/*.jpg", {"/images/10k/": "/labels/sem_seg/masks/", ".jpg": ".png"}),
                           ("bdd100k/seg/images/{split}/*.jpg", {"/images/": "/labels/", ".jpg": "_train_id.png"})),                 # the first release
    "mapillary":    (MAPILLARY_IDS, ("mapillary/{Split}/images/*.jpg", {"/images/": "/labels/", ".jpg": ".png"}),                    # the archive of v1.2
                                    ("mapillary/{Split}/images/*.jpg", {"/images/": "/v1.2/labels/", ".jpg": ".png"})),              # the archive of v2.0 holds both
    "mapillary_v2": (MAPILLARY_V2_IDS, ("mapillary/{Split}/images/*.jpg", {"/images/": "/v2.0/labels/", ".jpg": ".png"})),
    **{f"acdc{condition and '_'}{condition}": (None, (f"acdc/rgb_anon/{condition or '*'}/{{split}}/**/*_rgb_anon.png", {"/rgb_anon/": "/gt/", "_rgb_anon.png": "_gt_labelTrainIds.png"}))
       for condition in ("", "fog", "night", "rain", "snow")}}

GTA_MISMATCHED = {15188, 17705, *range(20801, 20861)}      # 62 of 24,966: label and image differ in size; the official list leaves the same ones out
COUNTS = {"gta": (24_904, 24_904), "synthia": (9_400, 9_400), "cityscapes": (2_975, 500), "bdd": (7_000, 1_000), "mapillary": (18_000, 2_000), "mapillary_v2": (18_000, 2_000),
          "acdc": (1_600, 406), "acdc_fog": (400, 100), "acdc_night": (400, 106), "acdc_rain": (400, 100), "acdc_snow": (400, 100)}                     # pairs of train, val


def pairs(name, split):
    """All (image path, label path) of a data set, sorted. `folder:PATH` is PATH/images/* with PATH/labels/STEM.png of train ids.

    split: "train" or "val"; a folder, GTA5 and SYNTHIA have none. Of several layouts the first one with a label counts. Raises Stop with what is missing."""
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:"))
        if not (root / "images").is_dir():
            raise Stop(f"no {root}/images\n  {name} means images in {root}/images and PNGs of train ids with the same stem in {root}/labels")
        where = root / "images"
        found = [(image, root / "labels" / f"{image.stem}.png") for image in sorted(where.iterdir()) if image.suffix.lower() in (".png", ".jpg", ".jpeg")]
    elif name in LAYOUTS:
        found, layouts = [], _layouts(name, split)
        where = " or ".join(f"{DATA}/{pattern}" for pattern, _ in layouts)
        for pattern, replaced in layouts:
            images = [p for p in sorted(Path(DATA).glob(pattern)) if name != "gta" or not p.stem.isdigit() or int(p.stem) not in GTA_MISMATCHED]
            if not any(label.exists() for _, label in found):
                found = [(image, _label_path(image, replaced)) for image in images] or found
    else:
        near = difflib.get_close_matches(name, LAYOUTS, 1)
        raise Stop(f"{name} is not a data set" + (f"; did you mean {near[0]}?" if near else "") + f" There are: {', '.join(LAYOUTS)}, folder:PATH")
    if not found:
        raise Stop(f"no images at {where}\n  README, 'Data', says where {name} comes from. To try the code without it: PRESET=toy")
    lonely = [(image, label) for image, label in found if not label.exists()]
    if lonely:
        raise Stop(f"{len(lonely)} of {len(found)} images of {name} have no label, the first is {lonely[0][0]}\n  expected it at {lonely[0][1]}")
    return found


def _layouts(name, split):
    return [(pattern.format(split=split, Split={"train": "training", "val": "validation"}[split]), replaced) for pattern, replaced in LAYOUTS[name][1:]]


def _label_path(image, replaced):
    path = str(image.relative_to(DATA))
    for old, new in replaced.items():
        path = path.replace(old, new)
    return Path(DATA) / path


def toy_data(*names):
    """The miniature's `folder:` sets are drawn once, by tests/toy/world.py, when they are named and missing."""
    root = Path(DATA) / "toy"
    wanted = [n for n in names if n.startswith(f"folder:{root}/") and not Path(n.removeprefix("folder:")).exists()]
    if wanted:
        print(f"drawing the miniature world into {root} (about a minute, once)")
        subprocess.run([sys.executable, HERE / "tests/toy/world.py", str(root)], check=True)


def read_image(path):
    """-> PIL image, RGB, turned upright as its EXIF says. Raises Stop."""
    from PIL import ImageOps
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) if image.getexif().get(274, 1) != 1 else image        # without a turn it would only copy
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise Stop(f"{path} cannot be read as an image ({problem}): copy or make it again") from None


def read_label(path, name, size):
    """-> uint8 (H, W) train ids. `name` is the data set (its ids are mapped), `size` the image's (width, height). Raises Stop."""
    ids = LAYOUTS[name][0] if name in LAYOUTS else None
    try:
        with Image.open(path) as file:
            if name == "synthia":                   # three channels of 16 bits, the class is the first. PIL keeps the high byte of each: let it take the low one for it
                file.tile = [(*tile[:3], "RGB;16L") if tile[3] == "RGB;16B" else tile for tile in file.tile]
            label = np.asarray(file)                # of a palette PNG these are the indices, which are the ids
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise Stop(f"{path} cannot be read as a label ({str(problem).splitlines()[0]}): copy or make it again") from None
    if name == "synthia" and label.ndim == 3:
        label = label[..., 0]
    if label.ndim != 2:
        raise Stop(f"{path} has {label.shape[-1]} channels: expected one channel of ids, not colours")
    if label.shape != size[::-1]:
        raise Stop(f"{path} is {label.shape[1]} x {label.shape[0]}, its image {size[0]} x {size[1]}: label and image must have one size")
    if ids is not None:
        table = np.full(256, IGNORE, np.uint8)
        table[list(ids)] = list(ids.values())
        return table[label if label.dtype == np.uint8 else np.where((label >= 0) & (label < 256), label, 255).astype(np.uint8)]
    unknown = label[(label >= len(CLASSES)) & (label != IGNORE)]
    if unknown.size:
        raise Stop(f"{path} holds the id {unknown[0]}: expected train ids 0 to {len(CLASSES) - 1}, or {IGNORE} for none")
    return label.astype(np.uint8)


def legend(width, names=None, row=20):
    """The classes' names and colours as a strip, uint8 (rows, width, 3), as many rows as they need."""
    from PIL import ImageDraw
    entries = [(name, tuple(COLOURS[CLASSES.index(name)].tolist())) for name in names or CLASSES] + [("no label", (0, 0, 0))]
    step = max(len(name) for name, _ in entries) * 7 + row + 6
    columns = max(1, width // step)
    strip = Image.new("RGB", (width, -(-len(entries) // columns) * row), "white")
    draw = ImageDraw.Draw(strip)
    for i, (name, colour) in enumerate(entries):
        y, x = i // columns * row, i % columns * step
        draw.rectangle((x + 3, y + 3, x + row - 4, y + row - 4), fill=colour, outline="black")
        draw.text((x + row, y + 4), name, fill="black")
    return np.asarray(strip)


def check(name, looked_at=100):
    """Look through a data set before hours are spent on it: counts, the size of every pair, the ids of some labels, and a sheet to look at with one's own eyes.

    Writes RUN/check/NAME_SPLIT.png. Raises Stop at the first thing that is wrong."""
    splits = ["train"] if name.startswith("folder:") or name in ("gta", "synthia") else ["train", "val"]
    if name in LAYOUTS and len(splits) == 2:                            # a target needs no training split
        splits = [s for s in splits if any(next(Path(DATA).glob(pattern), None) for pattern, _ in _layouts(name, s))] or ["val"]
    for split in splits:
        found, shares, sheet = pairs(name, split), np.zeros(256), []
        wanted = COUNTS[name][split == "val"] if name in COUNTS else len(found)
        for image, label in found:                                      # the headers only
            try:
                with Image.open(image) as a, Image.open(label) as b:
                    if a.size != b.size:
                        raise Stop(f"{label} is {b.size[0]} x {b.size[1]}, {image} is {a.size[0]} x {a.size[1]}: label and image must have one size")
            except (OSError, SyntaxError) as problem:
                raise Stop(f"{image} or its label {label} cannot be read ({problem}): copy it again") from None
        some = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, looked_at).astype(int))]
        for i, (path, label_path) in enumerate(some):
            image = read_image(path)
            label = read_label(label_path, name, image.size)
            shares += np.bincount(label.ravel(), minlength=256) / label.size / len(some)
            if i % -(-len(some) // 6) == 0:
                small = (384, round(384 * image.height / image.width))
                sheet.append([np.asarray(image.resize(small)), np.asarray(Image.fromarray(colourise(label)).resize(small, Image.NEAREST))])
        low = min(a.shape[0] for a, _ in sheet)
        sheet = [np.concatenate([x[:low] for x in row], 1) for row in sheet]
        picture = np.concatenate([np.concatenate(sheet[i:i + 2], 1) for i in range(0, len(sheet) - 1, 2)] or sheet)
        out = Path(RUN) / "check" / f"{Path(name.removeprefix('folder:')).name}_{split}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as part:
            Image.fromarray(np.concatenate([picture, legend(picture.shape[1])])).save(part, "PNG")
        print(f"{name} {split}: {len(found)} pairs, every size agrees; look at {out}\n  share of pixels in {len(some)} of them: "
              + ", ".join(f"{c} {100 * shares[i]:.1f} %" for i, c in enumerate(CLASSES)) + f"; no label {100 * shares[IGNORE]:.1f} %")
        never = [c for i, c in enumerate(CLASSES) if not shares[i]]
        if never:
            print(f"  not seen in them: {', '.join(never)}")
        if len(found) != wanted:
            raise Stop(f"{name} {split} has {len(found)} pairs, officially {wanted}: an archive is missing or was not unpacked whole")


def randomness(*address):
    """A generator for the address (seed, step, item, ...): the same numbers whatever was drawn before, so a resumed run repeats."""
    return np.random.default_rng([int(a) for a in address])


@lru_cache(4)
def _permutation(n, seed, epoch):
    return randomness(seed, epoch, 1).permutation(n)


def shuffled(n, seed, position):
    """The position-th draw of an endless stream over range(n) that shows everything once per epoch."""
    epoch, offset = divmod(position, n)
    return int(_permutation(n, seed, epoch)[offset])


def colour_jitter(image, random):
    """Brightness, contrast, saturation and hue, each with probability 1/2, as SSD and the official code. uint8 (3, H, W) -> the same."""
    from torchvision.transforms.v2 import functional as T
    if random.random() < .5:
        image = (image.float() + random.uniform(-32, 32)).clamp(0, 255).to(torch.uint8)
    steps = [lambda x: T.adjust_contrast(x, random.uniform(.5, 1.5)), lambda x: T.adjust_saturation(x, random.uniform(.5, 1.5)),
             lambda x: T.adjust_hue(x, random.uniform(-.1, .1))]
    for step in steps if random.random() < .5 else steps[1:] + steps[:1]:
        image = step(image) if random.random() < .5 else image
    return image


def scale_and_crop(image, label, random, crop, scale, fill):
    """Random scale, random crop, colour jitter, flip (paper 4.1). One grid for image and label; offsets of y and x drawn apart.

    image PIL RGB, label uint8 (H, W) -> uint8 (3, h, w), int64 (h, w). What lies outside is `fill` (RGB) and IGNORE."""
    height, width = crop
    factor = random.uniform(*scale)
    seen_w, seen_h = min(width, round(image.width * factor)), min(height, round(image.height * factor))
    x, y = random.uniform(0, max(0., image.width - seen_w / factor)), random.uniform(0, max(0., image.height - seen_h / factor))
    box = (x, y, min(x + seen_w / factor, image.width), min(y + seen_h / factor, image.height))
    pixels = np.asarray(image.resize((seen_w, seen_h), Image.BILINEAR, box=box))
    ids = np.asarray(Image.fromarray(label).resize((seen_w, seen_h), Image.NEAREST, box=box))
    out = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
    out[:, :seen_h, :seen_w] = colour_jitter(torch.from_numpy(pixels.copy()).permute(2, 0, 1), random)      # colour before padding
    target = torch.full((height, width), IGNORE, dtype=torch.int64)
    target[:seen_h, :seen_w] = torch.from_numpy(ids.astype(np.int64))
    return (out.flip(2), target.flip(1)) if random.random() < .5 else (out, target)


def sampler(found, name, seed, rare, cache):
    """-> pick(position): which image comes at a position of the endless stream. All once an epoch, or, if rare > 0, by DAFormer's rare class sampling:
    a class c with probability ~ exp((1 - its share of pixels) / rare), then any image that holds it. The labels are counted once, into `cache`."""
    if not rare:
        return lambda position: shuffled(len(found), seed, position)
    if not Path(cache).exists():
        print(f"counting the classes of {len(found)} labels, once")
        with ThreadPoolExecutor() as pool:
            counts = list(pool.map(lambda pair: np.bincount(read_label(pair[1], name, Image.open(pair[0]).size).ravel(), minlength=256)[:len(CLASSES)], found))
        with whole(cache, each=True) as part, open(part, "wb") as file:
            np.save(file, np.stack(counts))
    counts = np.load(cache)
    if len(counts) != len(found):
        raise Stop(f"{cache} counts {len(counts)} labels, there are {len(found)}: remove it, it is made again")
    holders = [np.flatnonzero(counts[:, c] > 0) for c in range(len(CLASSES))]
    wanted = np.exp((1 - counts.sum(0) / counts.sum()) / rare) * [len(h) > 0 for h in holders]

    def pick(position):
        random = randomness(seed, position, 6)
        holder = holders[random.choice(len(CLASSES), p=wanted / wanted.sum())]
        return int(holder[random.integers(len(holder))])
    return pick


def source_batch(found, name, step, n, seed, crop, scale, fill, pick=None):
    """n source crops of a step -> uint8 (n, 3, h, w), int64 (n, h, w). A pure function of (seed, step). Of several processes each makes its share. pick: see sampler."""
    samples = []
    for item in share(n):
        position = step * n + item
        image_path, label_path = found[pick(position) if pick else shuffled(len(found), seed, position)]
        image = read_image(image_path)
        samples.append(scale_and_crop(image, read_label(label_path, name, image.size), randomness(seed, step, item, 2), crop, scale, fill))
    images, labels = zip(*samples)
    return torch.stack(images), torch.stack(labels)


def pinned(batch):
    """The tensors of a batch in page-locked memory: from there they go to the GPU while it computes (`to(device, non_blocking=True)`)."""
    if isinstance(batch, tuple):
        return tuple(pinned(part) for part in batch)
    return batch.pin_memory() if isinstance(batch, torch.Tensor) else batch


def ahead(make, steps, workers):
    """Yield make(step) for every step, in order, made ahead of time by threads; workers = 0 makes each when it is wanted."""
    if torch.cuda.is_available():
        make = lambda step, made=make: pinned(made(step))
    if not workers:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        try:
            for step in steps:
                queue.append(pool.submit(make, step))
                if len(queue) > workers + 1:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


# ============================================================================ the model: encoder
class Encoder(nn.Module):
    """E of paper 3.1: four feature maps, at strides 4, 8, 16, 32, feed the decoder. Frozen and in eval mode unless told otherwise.

    name    "MODEL/TAG"         a CNN tower of open_clip, as RN50-quickgelu/openai or convnext_large_d_320/laion2b_s29b_b131k_ft_soup
            "timm:NAME"         a CNN of timm, as timm:resnet50.tv_in1k; beyond the paper, a plain ViT, as timm:vit_large_patch14_dinov2.lvd142m
                                or timm:eva02_large_patch14_clip_336.merged2b: four of its blocks, resized to the four strides
            "transformers:ID"   a SegFormer encoder, as transformers:nvidia/mit-b5
            "local-dir:PATH"    a folder of any of the three in its library's own format
    Raises Stop if the weights are not to be had."""

    def __init__(self, name, frozen=True):
        super().__init__()
        self.name, self.frozen = name, frozen
        kind, _, rest = name.rpartition(":")
        folder = local(rest) if kind == "local-dir" else None
        config = {}
        if folder:
            if not Path(folder).is_dir():
                raise Stop(f"no encoder folder {rest} (ENCODER={name})")
            for file in ("open_clip_config.json", "config.json"):
                if (Path(folder) / file).exists():
                    config = json.loads((Path(folder) / file).read_text())
                    break
        else:
            hub_or_offline()
        with from_hub(f"the encoder {name}", "put the weights in a folder and name it: --ENCODER=local-dir:PATH, or connect to the hub once"):
            if kind == "timm" or "architecture" in config:
                self.body = timm_features(f"local-dir:{folder}" if folder else rest)
                self.library, self.channels = "timm", list(self.body.feature_info.channels())
                self.patch = max(self.body.feature_info.reduction()) if len(set(self.body.feature_info.reduction())) == 1 else 0
                mean, std = self.body.pretrained_cfg["mean"], self.body.pretrained_cfg["std"]
            elif kind == "transformers" or config.get("model_type") == "segformer":
                from transformers import SegformerModel
                self.body = SegformerModel.from_pretrained(folder or rest)
                self.library, self.channels = "transformers", list(self.body.config.hidden_sizes)
                mean, std = (.485, .456, .406), (.229, .224, .225)
            else:
                import open_clip
                model, _, tag = name.rpartition("/")
                clip = open_clip.create_model(f"local-dir:{folder}" if folder else model, pretrained=None if folder else tag, require_pretrained=True)
                self.library, self.body = "open_clip", clip.visual.eval()      # open_clip creates in training mode: a pass before eval() moves BatchNorm's statistics
                mean, std = self.body.preprocess_cfg["mean"], self.body.preprocess_cfg["std"]
                with torch.no_grad():
                    self.channels = [f.shape[1] for f in self.maps(torch.zeros(1, 3, 64, 64))]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if not torch.cuda.is_available() and self.library != "transformers":
            self.body.to(memory_format=torch.channels_last)             # a quarter faster on a CPU
        self.requires_grad_(not frozen).train(not frozen)

    def maps(self, x):
        if self.library == "timm" and self.patch:                       # a ViT: one grid of patches, brought to H/16; a parameter-free feature pyramid
            grid = [n // 16 for n in x.shape[-2:]]
            blocks = self.body(F.interpolate(x, [n * self.patch for n in grid], mode="bicubic", align_corners=False, antialias=True) if self.patch != 16 else x)
            return [F.interpolate(block, [int(n * factor) for n in grid], mode="bilinear", align_corners=False) for block, factor in zip(blocks, (4, 2, 1, .5))]
        if self.library == "timm":
            return self.body(x)
        if self.library == "transformers":
            return self.body(x, output_hidden_states=True).hidden_states
        return self.body.forward_intermediates(x, indices=4, intermediates_only=True)["image_intermediates"]

    @property
    def fill(self):
        """The mean colour as RGB in 0..255: what padding looks like after normalisation is 0."""
        return tuple(int(round(255 * m)) for m in self.mean.flatten().tolist())

    def train(self, mode=True):
        return super().train(mode and not self.frozen)                  # BatchNorm statistics and DropPath must not move when frozen

    def forward(self, images):
        """uint8 (B, 3, H, W), H and W multiples of 32 -> [(B, C, H/4, W/4), ... /8, /16, /32]"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return list(self.maps((images.float() / 255 - self.mean) / self.std))


def timm_features(name):
    """Four feature maps of a timm model: the last four stages of a CNN, the ends of the four quarters of a plain ViT's blocks."""
    import timm
    ask = dict(pretrained=True, features_only=True, out_indices=(-4, -3, -2, -1))
    try:
        body = timm.create_model(name, dynamic_img_size=True, **ask)    # only ViTs know this argument
    except TypeError:
        return timm.create_model(name, **ask)
    depth = len(body.feature_info.info)
    body.out_indices = [depth * k // 4 - 1 for k in (1, 2, 3, 4)]
    return body


# ============================================================================ the model: decoder
class Attention(nn.Module):
    """Multi-head attention with a boolean mask: True = may look."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        """(B, Q, D), (B, N, D), (B, N, D), mask (B, Q, N) or None -> (B, Q, D)"""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, x in ((self.query, query), (self.key, key), (self.value, value)))
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None])
        return self.out(out.transpose(1, 2).flatten(2))


def position(height, width, dim, like):
    """Sine position code of a grid, (1, H * W, dim): half of it for y, half for x (Mask2Former's, normalised to 2 pi)."""
    frequency = 10_000 ** (torch.arange(dim // 4, device=like.device, dtype=torch.float32) / (dim // 4))
    code = []
    for n in (height, width):
        angle = (torch.arange(1, n + 1, device=like.device, dtype=torch.float32) / n * 2 * torch.pi)[:, None] / frequency
        code.append(torch.cat((angle.sin(), angle.cos()), 1))
    y, x = code[0][:, None].expand(-1, width, -1), code[1][None].expand(height, -1, -1)
    return torch.cat((y, x), 2).flatten(0, 1)[None].to(like.dtype)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward: Mask2Former's order, each with a residual and a norm behind it."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.cross, self.self_ = Attention(dim, heads), Attention(dim, heads)
        self.feed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries, embed, memory, code, mask):
        queries = self.norms[0](queries + self.cross(queries + embed, memory + code, memory, mask))
        q = queries + embed
        queries = self.norms[1](queries + self.self_(q, q, queries))
        return self.norms[2](queries + self.feed(queries))


class PixelLayer(nn.Module):
    """A layer of the pixel decoder: 5 x 5 pixels of a map and its neighbours in scale are mixed, then a feed-forward at every pixel; both with a residual and a norm.

    It stands where Mask2Former has deformable attention over the same three strides, and like there one set of weights serves them all."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.feed = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, dim // 4), dim) for _ in range(2))

    def forward(self, maps):
        """Maps (B, D, h, w) at strides 8, 16, 32 -> the same"""
        out = []
        for i, x in enumerate(maps):
            near = x
            if i > 0:
                near = near + F.avg_pool2d(maps[i - 1], 2)
            if i + 1 < len(maps):
                near = near + F.interpolate(maps[i + 1], x.shape[-2:], mode="bilinear", align_corners=False)
            x = self.norms[0](x + self.mix(near))
            out.append(self.norms[1](x + self.feed(x)))
        return out


class Decoder(nn.Module):
    """D of paper 3.1: mask classification as Mask2Former, with PixelLayers and an FPN in place of its deformable attention.

    channels: of the encoder's four maps. classes: C, without no-object. dim: width d. queries: Q. layers: L. hidden: of every feed-forward. pixel_layers: of the pixel decoder."""

    def __init__(self, channels, classes, dim, queries, layers, hidden, pixel_layers, heads=8):
        super().__init__()
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries, layers=layers, hidden=hidden, pixel_layers=pixel_layers, heads=heads)
        groups = min(32, dim // 4)
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(groups, dim)) for c in channels)
        self.pixel_layers = nn.ModuleList(PixelLayer(dim, hidden) for _ in range(pixel_layers))
        self.smooth = nn.ModuleList(nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU()) for _ in channels)
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.query, self.query_embed, self.level_embed = nn.Embedding(queries, dim), nn.Embedding(queries, dim), nn.Embedding(3, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(layers))
        self.norm, self.class_head = nn.LayerNorm(dim), nn.Linear(dim, classes + 1)
        self.mask_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def pixels(self, features):
        """Four maps -> the d-channel maps at strides 32, 16, 8 that the queries look at, and the mask features at stride 4."""
        fine, *maps = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for layer in self.pixel_layers:
            maps = layer(maps)
        out, above = [], None
        for smooth, x in zip(self.smooth, [*maps[::-1], fine]):         # an FPN: from coarse to fine
            if above is not None:
                x = x + F.interpolate(above, x.shape[-2:], mode="bilinear", align_corners=False)
            above = smooth(x)
            out.append(above)
        return out[:3], self.mask_features(out[3])

    def forward(self, features):
        """-> class logits (L+1, B, Q, C+1), mask logits (L+1, B, Q, H/4, W/4): one prediction before the first layer and one after each."""
        levels, pixels = self.pixels(features)
        batch = len(pixels)
        memory = [level.flatten(2).transpose(1, 2) + self.level_embed.weight[i] for i, level in enumerate(levels)]
        codes = [position(*level.shape[-2:], level.shape[1], level) for level in levels]
        queries, embed = (e.weight[None].expand(batch, -1, -1) for e in (self.query, self.query_embed))
        classes, masks = [], []
        for i in range(len(self.layers) + 1):
            normed = self.norm(queries)
            classes.append(self.class_head(normed))
            masks.append(torch.einsum("bqd,bdhw->bqhw", self.mask_head(normed), pixels))
            if i < len(self.layers):
                level = i % 3
                with torch.no_grad():                                   # a query looks where its own mask is; an empty mask looks everywhere
                    look = F.interpolate(masks[-1].float(), levels[level].shape[-2:], mode="bilinear", align_corners=False).flatten(2) > 0
                    look = look | ~look.any(-1, keepdim=True)
                queries = self.layers[i](queries, embed, memory[level], codes[level], look)
        return torch.stack(classes), torch.stack(masks)


def semantic(class_logits, mask_logits, size):
    """Sum over queries of softmax(class) x sigmoid(mask): (B, Q, C+1), (B, Q, h, w) -> (B, C, *size), the score of every class at every pixel.

    Masks are up-sampled as logits, a few queries at a time, so that Q full-size masks never exist together."""
    scores = 0
    probabilities = class_logits.float().softmax(-1)[..., :-1]
    for p, m in zip(probabilities.split(8, 1), mask_logits.float().split(8, 1)):
        scores = scores + torch.einsum("bqc,bqhw->bchw", p, F.interpolate(m, size, mode="bilinear", align_corners=False).sigmoid())
    return scores


@torch.no_grad()
def predict(encoder, decoder, images):
    """uint8 (B, 3, H, W) of any size -> class scores (B, C, H, W). Padded right and below to a multiple of 32 with the mean colour."""
    height, width = images.shape[-2:]
    padded = torch.tensor(encoder.fill, dtype=torch.uint8, device=images.device).view(1, 3, 1, 1).repeat(len(images), 1, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[..., :height, :width] = images
    classes, masks = decoder(encoder(padded))
    return semantic(classes[-1], masks[-1], padded.shape[-2:])[..., :height, :width]


# ============================================================================ the model: matching and losses
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, NO_OBJECT = 2., 5., 5., .1       # Mask2Former; paper eq. 1: L = L_mask + lambda_cls L_cls
OVERSAMPLE, IMPORTANT = 3, .75                                           # candidates per mask point; share of points where the mask is least sure


def sample(maps, points, shape):
    """Bilinear values of maps (N, M, h, w) at the centres of the pixels `points` (N, P) of an image of `shape` (H, W) -> (N, M, P)"""
    height, width = shape
    x, y = (points % width + .5) / width, (points // width + .5) / height
    grid = torch.stack((x, y), -1)[:, :, None] * 2 - 1
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[..., 0]


@torch.no_grad()
def match(class_logits, mask_logits, labels, present, points):
    """Hungarian matching of every layer and image at once, on points that all masks of an image share.

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels (B, H, W), present: list of B class lists, points (B, P)
    -> list of (layer, image, query, class). A point on IGNORE has no say in the cost."""
    from scipy.optimize import linear_sum_assignment
    layers, batch, queries = class_logits.shape[:3]
    most = max(1, max(map(len, present)))
    ids = torch.full((batch, most), IGNORE + 1, dtype=torch.int64)       # padded with a class that no pixel has
    for b, classes in enumerate(present):
        ids[b, :len(classes)] = torch.tensor(classes, dtype=torch.int64)
    ids = ids.to(labels.device)
    at = labels.flatten(1).gather(1, points)
    valid = (at != IGNORE).float()                                                                          # (B, P)
    target = (at[:, None] == ids[:, :, None]).float()                                                       # (B, K, P)
    logits = sample(mask_logits.float().flatten(0, 1), points.repeat(layers, 1), labels.shape[-2:]).unflatten(0, (layers, batch))
    count = valid.sum(-1).clamp(min=1).view(1, batch, 1, 1)
    # BCE of a mask x against a target t is softplus(x) - x t: one product per pair instead of a P-vector per pair
    bce = ((F.softplus(logits) * valid[:, None]).sum(-1, keepdim=True) - torch.einsum("lbqp,bkp->lbqk", logits, target)) / count
    p = logits.sigmoid() * valid[:, None]
    dice = 1 - (2 * torch.einsum("lbqp,bkp->lbqk", p, target) + 1) / (p.sum(-1, keepdim=True) + target.sum(-1)[None, :, None] + 1)
    known = ids.clamp(max=class_logits.shape[-1] - 1)
    likely = class_logits.float().softmax(-1).gather(3, known[None, :, None].expand(layers, -1, queries, -1))
    cost = (MASK_WEIGHT * bce + DICE_WEIGHT * dice - CLASS_WEIGHT * likely).cpu().numpy()                    # one transfer for all layers
    cost = np.nan_to_num(cost)                                           # a network that broke is noticed by its loss, not here
    matched = []
    for layer in range(layers):
        for b, classes in enumerate(present):
            for q, k in zip(*linear_sum_assignment(cost[layer, b, :, :len(classes)])):
                matched.append((layer, b, int(q), classes[k]))
    return matched


def mask_loss(class_logits, mask_logits, labels, n_points, generator, ignore=True):
    """The loss of paper eq. 1, for source labels and pseudo-labels alike (3.3: "the same as the source loss").

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels int64 (B, H, W) with IGNORE; one mask per class that is present
    ignore=True: a pixel of IGNORE takes no part in matching and mask losses, an image of nothing else teaches nothing, and an unmatched
    query that lies mostly on IGNORE is not taught "no object": nobody knows what is there.
    ignore=False, as the official code: it is background of every mask, and such an image teaches "no object".
    -> scalar loss, {"class", "mask", "dice"}: each summed over the L layers, as floats"""
    layers, batch, queries, n_classes = class_logits.shape
    height, width = labels.shape[-2:]
    area = torch.zeros(batch, IGNORE + 1, dtype=torch.int64, device=labels.device).scatter_add_(1, labels.flatten(1), torch.ones_like(labels).flatten(1)).cpu()
    present = [[c for c in range(n_classes - 1) if counts[c]] for counts in area.tolist()]
    teaches = torch.tensor([bool(p) or not ignore for p in present], device=labels.device)
    if not ignore:
        labels = torch.where(labels == IGNORE, IGNORE + 2, labels)       # a class of its own that nothing asks for: a negative everywhere

    def random_points(*shape):
        return torch.randint(height * width, shape, generator=generator).to(labels.device)
    matched = match(class_logits, mask_logits, labels, present, random_points(batch, n_points))

    wanted = torch.full((layers, batch, queries), n_classes - 1, dtype=torch.int64)
    index = torch.tensor(matched, dtype=torch.int64).reshape(-1, 4).T
    wanted[index[0], index[1], index[2]] = index[3]
    wanted, index = wanted.to(labels.device), index.to(labels.device)
    weight = torch.ones(n_classes, device=labels.device)
    weight[-1] = NO_OBJECT
    weights = weight[wanted] * teaches[None, :, None]
    if ignore and area[:, IGNORE].any():
        with torch.no_grad():
            unknown = F.interpolate((labels == IGNORE).float()[:, None], mask_logits.shape[-2:], mode="nearest")[:, 0]
            inside = (mask_logits > 0).float()
            hidden = torch.einsum("lbqhw,bhw->lbq", inside, unknown) > .5 * inside.sum((3, 4))
            weights = weights * ~(hidden & (wanted == n_classes - 1))
    log_p = class_logits.float().log_softmax(-1).gather(3, wanted[..., None])[..., 0]
    class_loss = -((log_p * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)).sum()
    if not matched:
        return CLASS_WEIGHT * class_loss + 0 * mask_logits.sum(), dict.fromkeys(("mask", "dice"), 0.) | {"class": class_loss.item()}

    layer, image, query, cls = index
    masks = mask_logits[layer, image, query].float()[:, None]                                                # (M, 1, h, w)
    truth = labels.flatten(1)
    with torch.no_grad():                                                # importance sampling: most points where the mask is least sure
        candidates = random_points(len(cls), OVERSAMPLE * n_points)
        doubt = -sample(masks, candidates, (height, width))[:, 0].abs()
        doubt[truth[image[:, None], candidates] == IGNORE] = -torch.inf
        n_important = int(IMPORTANT * n_points)
        best = doubt.topk(n_important, 1, sorted=False).indices
        flat = torch.cat((candidates.gather(1, best), random_points(len(cls), n_points - n_important)), 1)
        at = truth[image[:, None], flat]
        valid, target = (at != IGNORE).float(), (at == cls[:, None]).float()
    logits = sample(masks, flat, (height, width))[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (bce * valid).sum(1) / valid.sum(1).clamp(min=1)
    p = logits.sigmoid() * valid
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    n_masks = len(matched) / layers                                      # of source and generated images together, as the official code
    bce, dice = bce.sum() / n_masks, dice.sum() / n_masks
    loss = CLASS_WEIGHT * class_loss + MASK_WEIGHT * bce + DICE_WEIGHT * dice
    return loss, {"class": class_loss.item(), "mask": bce.item(), "dice": dice.item()}


# ============================================================================ the model: optimiser and checkpoints
def in_parts(encoder, decoder, images, parts=1, half=False, order=None):
    """D(E(x)) of a batch -> class logits, mask logits, and what to call after loss.backward().

    One part, one process: the plain thing, and nothing is left to call. Otherwise the predictions of all parts and processes are made first
    without keeping what a backward pass needs; the loss of the whole batch gives the gradient of each prediction; then each part runs
    again, with gradients, for a second forward pass of the decoder. So the loss always sees the whole batch, and 2 x 4 images are 8.
    half: bfloat16 where torch thinks it safe. order: of several processes, see gather."""
    rank, count = processes()

    def look(x):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            return encoder(x)

    def say(features):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            return decoder(features)
    if parts == count == 1:
        return *say(look(images)), lambda: None
    pieces = images.chunk(parts)
    with torch.no_grad():
        seen = [look(x) for x in pieces] if encoder.frozen else [None] * len(pieces)         # a frozen encoder looks once
        local = [torch.cat(t, 1).float() for t in zip(*(say(f or look(x)) for f, x in zip(seen, pieces)))]
        all_of = [gather(t, order, 1).requires_grad_() for t in local]

    def finish():
        first = rank * len(images)
        own = torch.as_tensor(np.argsort(order)[first:first + len(images)] if count > 1 else np.arange(len(images)), device=images.device)
        gradients = zip(*(t.grad.index_select(1, own).split([len(x) for x in pieces], 1) for t in all_of))
        for x, f, gradient in zip(pieces, seen, gradients):
            predictions = say(f or look(x))
            torch.autograd.backward(predictions, [g.to(p.dtype) for g, p in zip(gradient, predictions)])
        if count > 1:
            for parameter in [p for module in (decoder, encoder) for p in module.parameters() if p.grad is not None]:
                torch.distributed.all_reduce(parameter.grad)
    return *all_of, finish


def make_optimizer(decoder, weight_decay, encoder=None, encoder_lr=1.):
    """AdamW over everything that trains: the decoder, and the encoder if it is given, at `encoder_lr` times the rate. Norms and embeddings do not decay (Mask2Former)."""
    groups, still = [], (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding)
    for top, factor in ((decoder, 1.), (encoder, encoder_lr)):
        for decays in (True, False):
            found = [p for module in (top.modules() if top else ()) if isinstance(module, still) != decays for p in module.parameters(recurse=False) if p.requires_grad]
            if found:
                groups.append({"params": found, "weight_decay": weight_decay if decays else 0., "factor": factor})
    wanted, got = sum(p.requires_grad for top in (decoder, encoder) if top for p in top.parameters()), sum(len(g["params"]) for g in groups)
    assert wanted == got, f"expected {wanted} parameters in the optimiser, got {got}"
    return torch.optim.AdamW(groups)


def set_learning_rate(optimizer, lr, step, total, warmup, schedule):
    """Linear warm-up, then "constant" or "poly" (power 0.9 to zero)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"] * min(1., (step + 1) / max(1, warmup)) * ((1 - step / total) ** .9 if schedule == "poly" else 1.)


def stop_unless_finite(step, loss, norm, checkpoint, files):
    """Before a loss, or a gradient's norm, that is no number reaches the weights: stop, and name the images, which files() lists. Raises Stop."""
    if not torch.isfinite(loss + norm):
        kept = f"the last good checkpoint is {checkpoint}" if Path(checkpoint).exists() else "no checkpoint was written before"
        raise Stop(f"step {step}: the loss is {loss.item():.3g}, the norm of its gradient {norm.item():.3g}; {kept}. A smaller LR, HALF=False or other images may help. "
                   "Files of the batch:\n  " + "\n  ".join(map(str, files())))


def seeded(*address):
    """A torch generator for the address (seed, step, ...), on the CPU: the same points on every device."""
    return torch.Generator().manual_seed(int(randomness(*address).integers(2 ** 62)))


def save_model(path, encoder, decoder, **about):
    """A finished network in one safetensors file that explains itself: encoder name, decoder sizes, classes, `about` (constants, iteration, ...)."""
    from safetensors.torch import save_file
    tensors = {f"decoder.{k}": v.detach().cpu().contiguous() for k, v in decoder.state_dict().items()}
    if not encoder.frozen:
        tensors |= {f"encoder.{k}": v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    about = {"encoder": encoder.name, "decoder": decoder.sizes, "classes": CLASSES, "preset": PRESET, **about}
    with whole(path) as part:
        save_file(tensors, part, metadata={"about": json.dumps(about)})


def load_model(path, encoder=None):
    """-> encoder, decoder (both in eval mode), about. An encoder that is already loaded is used again if the file was trained on it. Raises Stop."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise Stop(f"{path} cannot be read as a checkpoint of this repo ({type(problem).__name__}: {problem}): make it again, or name another") from None
    if about["classes"] != CLASSES:
        raise Stop(f"{path} was trained on {len(about['classes'])} other classes ({', '.join(about['classes'][:4])}, ...), this preset has "
                   f"{len(CLASSES)} ({', '.join(CLASSES[:4])}, ...): set PRESET={about['preset']}")
    own = {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}
    if own or encoder is None or encoder.name != about["encoder"] or not encoder.frozen:
        encoder = Encoder(about["encoder"], frozen=not own)
        if own:
            encoder.load_state_dict(own)
    try:
        decoder = Decoder(**about["decoder"])
        decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.")})
    except (TypeError, RuntimeError):
        raise Stop(f"{path} holds a decoder of another version of this repo: train it again into another --OUT, or check out the commit that its run.json names") from None
    return encoder.eval(), decoder.eval(), about


if __name__ == "__main__":                                               # python common.py gta cityscapes ...: check data before use
    try:
        for data_set in sys.argv[1:] or sys.exit(f"python common.py NAME ...   checks data sets under {DATA}/: {', '.join(LAYOUTS)}, folder:PATH"):
            check(data_set)
    except Stop as stop:
        sys.exit(f"common.py: {stop}")
