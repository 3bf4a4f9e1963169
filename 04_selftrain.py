"""
04_selftrain: teach the source model on painted scenes that its own teacher labels, with SAM drawing
the borders (paper 3.1 eq. 2, and 3.3).

    in    RUN/03_train_source/model.safetensors   theta_0: the decoder, and which encoder it sits on
          RUN/02_generate/index.jsonl             unlabelled painted scenes
          the labelled images of 03
    out   RUN/04_selftrain/model.safetensors      the student theta; teacher.safetensors: theta_T
          log.jsonl, loss.png, preview_*.png      image | teacher | SAM | student, of four scenes
    time  toy: see README; paper: 40,000 steps on one GPU

theta_T <- theta <- theta_0. Each step, on N_SOURCE labelled and N_GENERATED painted images:
  1. the teacher labels the clean painted image: argmax of D_T(E(x))
  2. SAM redraws that label: components, size threshold, random points, best mask, union    refine()
  3. the student learns source labels and redrawn labels with one loss; it sees the painted image
     flipped and jittered
  4. theta_T <- EMA theta_T + (1 - EMA) theta                                               (eq. 2)

It worked if `labelled` stays high, if `changed` (labelled pixels to which SAM gave another class)
is some percent and falls, and if the third column of the previews looks better than the second."""
import copy
import hashlib
import time
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import common
from common import CLASSES, IGNORE, MINIATURES, RUN, Stop, preset

source_stage = import_module("03_train_source")     # the network and its loss (paper 3.1)

# ---------------------------------------------------------------------------- constants
# in and out
INIT = f"{RUN}/03_train_source/model.safetensors"
GENERATED = f"{RUN}/02_generate/index.jsonl"        # or folder:PATH, any pictures of your own
N_PICTURES = 0                                      # only the first so many (Figure 5); 0: all
OUT = f"{RUN}/04_selftrain"
# SAM and the pseudo-labels
REFINE = "points"                                   # "off": raw labels (Table 4) | "vote": a mask
                                                    # takes the teacher's majority below it
SAM = preset(toy=f"{MINIATURES}/sam", paper="vit_h")    # vit_b, vit_l; official: MobileSAM
SAM_POINTS = 5                                      # random points per component (Figure 6)
SAM_MIN_AREA = preset(toy=100, paper=5_000)         # pixels of a component (Figure 6), at CROP
SAM_CHUNK = 64                                      # prompts per pass of SAM's decoder
SAM_BATCH = preset(toy=1, paper=8)                  # pictures per pass of SAM's encoder
# teacher
EMA = preset(toy=0.98, paper=0.999)                 # alpha of eq. 2; 1: a teacher that never moves
EMA_EVERY = 1                                       # steps; official: 100: 67 % theta_0 at the end
# training
ITERATIONS = preset(toy=200, gta=40_000, synthia=30_000, cityscapes=10_000)         # paper 4.1
N_SOURCE = preset(toy=4, paper=6)                   # labelled images per step
N_GENERATED = 2                                     # painted ones; official: random, 2.3 on average
LR = preset(toy=5e-4, paper=1e-5, cityscapes=1e-4)  # paper 4.1
WARMUP = preset(toy=20, paper=0)                    # steps
SEED = 0
# as in the run of INIT, unless they are set here
shared = ("SOURCE", "CROP", "SCALE", "LOSS_WEIGHTS", "NO_OBJECT", "POINTS", "UNLABELLED",
          "FREEZE_ENCODER", "ENCODER_LR", "SCHEDULE", "WEIGHT_DECAY", "GRAD_CLIP", "HALF")
globals().update({name: getattr(source_stage, name) for name in shared})
# running
WORKERS = preset(toy=0, paper=8)                    # processes that read, as many for each kind
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
PREVIEW_EVERY = preset(toy=200, paper=2_000)

RULES = source_stage.TRAINING_RULES + """
REFINE in ("points", "off", "vote")
len(GENERATED.strip()) > 0
1 <= SAM_POINTS <= 10_000 and 1 <= SAM_CHUNK <= 10_000 and 1 <= SAM_BATCH <= 1000
0 <= SAM_MIN_AREA <= 10 ** 8
0 <= EMA <= 1 and EMA_EVERY >= 1
1 <= N_SOURCE <= 10_000 and 0 <= N_GENERATED <= 10_000 and N_PICTURES >= 0
"""


# ---------------------------------------------------------------------------- SAM
sam_page = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth",
             "vit_h": "sam_vit_h_4b8939.pth"}               # 0.4, 1.2 and 2.6 GB, into weights/


def load_sam(name):
    """-> Sam in eval mode, without gradients. name: vit_b, vit_l or vit_h, which are downloaded
    once, or a folder like the miniature's. Raises Stop."""
    if Path(name).is_dir():
        return import_module("tests.toy.sam").load(name)
    if name not in SAM_FILES:
        raise Stop(f"SAM={name}: no such folder, and none of {', '.join(SAM_FILES)}")
    weights = Path("weights", SAM_FILES[name])
    while common.RANK and not weights.exists():     # of several processes the first downloads
        time.sleep(1)
    page = sam_page + weights.name
    remedy = f"get {page} into weights/ by hand, or do without: --REFINE=off"
    if not weights.exists():
        with common.whole(weights) as part, common.explain(f"SAM {name}: no download", remedy):
            torch.hub.download_url_to_file(page, str(part))
            md5 = hashlib.md5(part.read_bytes()).hexdigest()
            assert md5.startswith(weights.stem[-6:]), f"damaged on the way, MD5 {md5}"
    with common.explain(f"{weights} is damaged", remedy):
        return sam_model_registry[name](weights).eval().requires_grad_(False)


@torch.no_grad()
def embed_pictures(sam, files):
    """SAM's embedding of every picture at CROP, computed once and kept on disk as float16, named by
    the contents of picture and SAM -> paths of .npy files."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in sam.state_dict().values())
    folder = Path(RUN, "sam_embeddings", f"{sha256(weights)}_{CROP[0]}x{CROP[1]}_half={HALF}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {file: folder / f"{sha256(file.read_bytes())}.npy" for file in files}
    missing = [file for file in files if not paths[file].exists()]
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    for start in tqdm(range(0, len(missing), SAM_BATCH), "SAM's embeddings", disable=None):
        part = missing[start:start + SAM_BATCH]
        pixels = np.stack([resize.apply_image(np.asarray(fit(file, CROP))) for file in part])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(sam.device)
        with torch.autocast(sam.device.type, torch.bfloat16, enabled=HALF):
            embeddings = sam.image_encoder(sam.preprocess(pixels)).half().cpu().numpy()
        for file, embedding in zip(part, embeddings):
            with common.whole(paths[file]) as unfinished, open(unfinished, "wb") as out:
                np.save(out, embedding)
    return list(paths.values())


def sha256(content):
    return hashlib.sha256(content).hexdigest()[:16]


def sam_masks(sam, embedding, points, shape):
    """The mask that SAM rates highest of its three, for every prompt.

    embedding (D, g, g), points float32 (M, P, 2) as (x, y) in pixels of a picture of `shape` (H, W)
    -> bool (M, H, W)"""
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    points = resize.apply_coords_torch(points, shape)
    inside = resize.get_preprocess_shape(*shape, resize.target_length)
    masks = []
    for prompts in points.split(SAM_CHUNK):
        positive = torch.ones(prompts.shape[:2], device=prompts.device)
        sparse, dense = sam.prompt_encoder(points=(prompts, positive), boxes=None, masks=None)
        logits, ratings = sam.mask_decoder(
            image_embeddings=embedding[None], image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True)
        best = logits.take_along_dim(ratings.argmax(1)[:, None, None, None], 1)
        masks.append(sam.postprocess_masks(best.float(), inside, shape)[:, 0] > 0)
    return torch.cat(masks)


# ---------------------------------------------------------------------------- refinement (3.3)
def components(label):
    """Connected pieces of one class (4-connectivity), which the paper finds by Hoshen-Kopelman.

    All classes in one pass: on a grid with a cell between any two neighbours, that cell is solid
    only if both have the same class. label uint8 (H, W) -> piece int32 (H, W) in 0..n, 0 = IGNORE;
    class uint8 (n + 1,) and area int64 (n + 1,) of each piece"""
    height, width = label.shape
    known = label != IGNORE
    solid = np.zeros((2 * height - 1, 2 * width - 1), bool)
    solid[::2, ::2] = known
    solid[1::2, ::2] = (label[1:] == label[:-1]) & known[1:]
    solid[::2, 1::2] = (label[:, 1:] == label[:, :-1]) & known[:, 1:]
    piece, n = ndimage.label(solid)
    piece = piece[::2, ::2]
    cls = np.full(n + 1, IGNORE, np.uint8)
    cls[piece] = label
    return piece, cls, np.bincount(piece.ravel(), minlength=n + 1)


def random_points(piece, area, chosen, n, random):
    """n different points (where a piece has as many) of each chosen piece
    -> float32 (len(chosen), n, 2) as (x, y)"""
    pixels = np.argsort(piece.ravel(), kind="stable")       # piece by piece
    first = np.cumsum(area) - area
    points = np.zeros((len(chosen), n, 2), np.float32)
    for prompt, k in zip(points, chosen):
        drawn = random.choice(area[k], n, replace=area[k] < n)
        prompt[:, 1], prompt[:, 0] = np.divmod(pixels[first[k] + drawn], piece.shape[1])
    return points


@torch.no_grad()
def refine(sam, embedding, label, random):
    """Redraw the teacher's label of one picture with SAM (3.3).

    embedding (D, g, g), label int64 (H, W), random: a numpy generator -> int64 (H, W), IGNORE where
    no mask is or two classes meet; the prompts, float32 (M, SAM_POINTS, 2) as (x, y)"""
    # "for every class i, we obtain M_i distinct binary masks"
    piece, cls, area = components(label.byte().cpu().numpy())
    # "filtering out regions below a set size threshold"
    chosen = np.flatnonzero((area >= SAM_MIN_AREA) & (cls != IGNORE))
    # "we randomly select points within each binary mask"
    points = random_points(piece, area, chosen, SAM_POINTS, random)
    claimed = torch.zeros(len(CLASSES), *label.shape, dtype=torch.bool, device=label.device)
    if len(chosen):
        # "for each set of points, SAM provides an enhanced binary mask"
        prompts = torch.from_numpy(points).to(label.device)
        for c, mask in zip(cls[chosen].tolist(), sam_masks(sam, embedding, prompts, label.shape)):
            if REFINE == "vote":
                c = label[mask].bincount(minlength=len(CLASSES)).argmax()
            # "aggregating all the predicted objects across all classes"
            claimed[c] |= mask
    # "overlapping masks of different classes are unlabeled", and so is what no mask reached
    refined = claimed.byte().argmax(0)
    refined[claimed.sum(0) != 1] = IGNORE
    return refined, points


# ---------------------------------------------------------------------------- teacher, pictures
@torch.no_grad()
def update_teacher(teacher, student, alpha):
    """Paper eq. 2: theta_T <- alpha theta_T + (1 - alpha) theta. Buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
    for mine, its in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(its)


def painted_files(generated):
    """The pictures of an index.jsonl of 02, or of folder:PATH -> sorted paths. Raises Stop."""
    if generated.startswith("folder:"):
        files = sorted(p for p in Path(generated[7:]).glob("*") if p.suffix.lower() in
                       (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    else:
        folder = Path(generated).parent
        rows = common.read_lines(generated, "file")
        files = sorted(folder / Path(row["file"]).name for row in rows)
        common.need([(f, "run 02_generate.py again: it paints what is missing") for f in files])
    if not files:
        raise Stop(f"GENERATED={generated} holds no picture. To train without: --N_GENERATED=0")
    return files[:N_PICTURES or None]


def fit(path, size):
    """A picture as PIL RGB of `size` (rows, columns): resized to cover it and cut evenly."""
    return ImageOps.fit(common.read_image(path), size[::-1], Image.BICUBIC)


class PaintedPictures(Dataset):
    """An endless stream of painted pictures; item i depends on (seed, i) alone: the clean picture
    uint8 (3, H, W), the student's view of it, jittered and perhaps flipped, whether it is flipped,
    and SAM's embedding. embeddings: paths, or () without SAM."""

    def __init__(self, files, embeddings, seed, size):
        self.files, self.embeddings, self.seed, self.size = files, embeddings, seed, size

    def __getitem__(self, i):
        k = source_stage.shuffled(len(self.files), self.seed + 1, i)
        random = np.random.default_rng((self.seed, i, 3))
        clean = self.clean(k)
        seen = source_stage.colour_jitter(clean, random)
        flipped = random.random() < .5
        return clean, seen.flip(2) if flipped else seen, flipped, self.embedding(k)

    def clean(self, k):
        return torch.from_numpy(np.array(fit(self.files[k], self.size))).permute(2, 0, 1)

    def embedding(self, k):
        if not self.embeddings:
            return torch.zeros(0)
        with common.explain(f"{self.embeddings[k]} is damaged", "remove it: it is made again"):
            embedding = torch.from_numpy(np.load(self.embeddings[k])).float()
            assert embedding.isfinite().all(), "not a number"
        return embedding


def pseudo_labels(encoder, teacher, sam, clean, embeddings, *seed):
    """The teacher's labels of clean pictures uint8 (n, 3, H, W), int64 (n, H, W); the same
    redrawn, if there is a `sam`; each picture's prompts."""
    # 1. the teacher labels the clean painted images: p = D_T(E(x))
    rough = source_stage.predict(encoder, teacher, clean, HALF).argmax(1)
    # 2. SAM redraws those labels (3.3)
    pseudo, prompts = rough.clone(), [np.zeros((0, 1, 2))] * len(rough)
    for k in range(len(rough) if sam else 0):
        random = np.random.default_rng((*seed, k))
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=HALF):
            pseudo[k], prompts[k] = refine(sam, embeddings[k], rough[k], random)
    return rough, pseudo, prompts


def vital_signs(rough, pseudo, prompts):
    """What SAM did to the teacher's labels -> {name: scalar tensor}, see README."""
    known = pseudo != IGNORE
    changed = (rough != pseudo) & known
    return {"labelled": known.float().mean(), "changed": changed.sum() / known.sum().clamp(min=1),
            "prompts": known.new_tensor(sum(map(len, prompts)) / len(rough), dtype=torch.float)}


def preview(path, pictures, encoder, student, label):
    """image | teacher | SAM with its prompts | student, of the first four painted pictures.
    label: (clean, embeddings, seed) -> the teacher's labels, SAM's, prompts."""
    shown = range(min(4, len(pictures.files)))
    clean = torch.stack([pictures.clean(k) for k in shown]).to(encoder.mean.device)
    embeddings = torch.stack([pictures.embedding(k) for k in shown]).to(clean.device)
    rough, pseudo, prompts = label(clean, embeddings, SEED)
    encoder.eval()
    guess = source_stage.predict(encoder, student, clean, HALF).argmax(1)
    encoder.train()
    rows = []
    for k in shown:
        image, teacher, sam, learnt = (
            part[k].byte().cpu().numpy() for part in (clean, rough, pseudo, guess))
        drawn = common.COLOURS[sam]
        for x, y in prompts[k].reshape(-1, 2).astype(int):
            drawn[max(0, y - 1):y + 2, max(0, x - 1):x + 2] = 255
        rows.append([("image", image.transpose(1, 2, 0)), ("teacher", teacher),
                     ("SAM and its prompts", drawn), ("student", learnt)])
    common.save_sheet(path, rows)


def take_over(constants):
    """Constants of the run of INIT hold here too, unless the shell set them."""
    for name in shared:
        if name not in GIVEN:
            value = constants[name]
            globals()[name] = tuple(value) if isinstance(value, list) else value
    common.check_rules(globals())
    print(f"as {INIT}: " + ", ".join(f"{name}={globals()[name]}" for name in shared))


def need_earlier_stages():
    wanted = {INIT: "03_train_source.py writes it when it is finished: run that first, or name a "
                    "network: --INIT=PATH"}
    if N_GENERATED and not GENERATED.startswith("folder:"):
        wanted[GENERATED] = ("02_generate.py writes it when it is finished: run that first. A "
                             "folder of your own: folder:PATH. None: --N_GENERATED=0")
    common.need(wanted.items())


def main():
    need_earlier_stages()
    encoder, student, about = source_stage.load_model(INIT)
    take_over(about["constants"])
    files = painted_files(GENERATED) if N_GENERATED else []
    free = ("SAM_CHUNK", "SAM_BATCH")
    run = common.Run(globals(), "model.safetensors", free, pictures=len(files))
    if run.finished():
        return
    device = common.device()
    sam = load_sam(SAM).to(device) if N_GENERATED and REFINE != "off" else None
    crops = source_stage.SourceCrops(SOURCE, SEED, CROP, SCALE, encoder.fill)
    encoder.freeze(FREEZE_ENCODER)
    encoder.to(device).train(), student.to(device).train()
    optimizer, trained = source_stage.make_optimizer([(student, 1), (encoder, ENCODER_LR)],
                                                     WEIGHT_DECAY)
    # theta_T <- theta <- theta_0
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    teacher_encoder = encoder
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer}
    if not FREEZE_ENCODER:
        teacher_encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        parts |= {"encoder": encoder, "teacher_encoder": teacher_encoder}

    run.start()
    book = source_stage.Bookkeeping(run, parts, ITERATIONS)
    pictures = PaintedPictures(files, embed_pictures(sam, files) if sam else (), SEED, CROP)
    span = (book.first, ITERATIONS, WORKERS)
    labelled = source_stage.batches(crops, N_SOURCE, *span)
    painted = source_stage.batches(pictures, N_GENERATED, *span) if N_GENERATED else repeat(None)
    E = source_stage.distributed(encoder)
    D = source_stage.distributed(student)

    label = partial(pseudo_labels, teacher_encoder, teacher, sam)
    for step, (source, drawn) in book.steps(zip(labelled, painted)):
        torch.manual_seed(SEED * 10 ** 9 + step)            # a step repeats when a run goes on
        images, labels = (part.to(device, non_blocking=True) for part in source)
        numbers = {}
        if N_GENERATED:
            # 1. the teacher labels the clean painted images, and 2. SAM redraws those labels
            clean, seen, flipped, embeddings = (p.to(device, non_blocking=True) for p in drawn)
            rough, pseudo, prompts = label(clean, embeddings, SEED, step, common.RANK)
            numbers = vital_signs(rough, pseudo, prompts)
            pseudo = torch.where(flipped[:, None, None], pseudo.flip(2), pseudo)
            images, labels = torch.cat((images, seen)), torch.cat((labels, pseudo))
        # 3. one loss for source labels and pseudo-labels, "the same as the source loss" (eq. 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=HALF):
            classes, masks = D(E(images))
        loss, terms = source_stage.mask_loss(classes, masks, labels, POINTS, LOSS_WEIGHTS,
                                             NO_OBJECT, UNLABELLED)
        source_stage.set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, SCHEDULE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()
        # 4. theta_T <- EMA theta_T + (1 - EMA) theta (eq. 2)
        done = step + 1
        if done % EMA_EVERY == 0:
            update_teacher(teacher, student, EMA)
            if not FREEZE_ENCODER:
                update_teacher(teacher_encoder, encoder, EMA)

        book.record(done, {"loss": loss, **terms, "norm": norm, **numbers}, LOG_EVERY)
        if files and (done % PREVIEW_EVERY == 0 or done == ITERATIONS):
            preview(run.out / f"preview_{done:06d}.png", pictures, encoder, student, label)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            book.save(done)
    source_stage.save_model(run.out / "teacher.safetensors", teacher_encoder, teacher, run)
    book.finish(encoder, student)


if __name__ == "__main__":
    common.launch(globals())
