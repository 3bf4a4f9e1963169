"""
04_selftrain: teach the source model on painted scenes that its own teacher labels, with SAM drawing
the borders (paper 3.1 eq. 2, and 3.3).

    in    RUN/03_train_source/model.safetensors   theta_0: the decoder, and which encoder it sits on
          RUN/02_generate/index.jsonl             unlabelled painted scenes
          the labelled images of 03
    out   RUN/04_selftrain/model.safetensors      the student theta; teacher.safetensors: theta_T
          log.jsonl, loss.png, preview_*.png      image | teacher | SAM | student, of four scenes
          RUN/sam_embeddings/                     2 MiB per picture; made again if it is missing
    time  toy: see README; paper: 40,000 steps on one GPU

theta_T <- theta <- theta_0. Each step, on N_SOURCE labelled and N_GENERATED painted images:
  1. the teacher labels the clean painted image: argmax of D_T(E(x))
  2. SAM redraws that label: components, size threshold, random points, best mask, union    refine()
  3. the student learns source labels and redrawn labels with one loss; it sees the painted image
     flipped and jittered
  4. theta_T <- EMA theta_T + (1 - EMA) theta                                               (eq. 2)

Check: `labelled` rises, `changed` (labelled pixels to which SAM gave another class) falls (toy: 52
to 77 % and 20 to 9 %), and the third column of the previews looks better than the second.

Crop, loss weights, points and optimiser are those of the run of INIT: init.CROP, init.POINTS ..."""
import copy
import hashlib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np
import torch
from common import (CLASSES, DATA, IGNORE, MINIATURES, RUN, expect, expect_kind,
                    expect_numbers, preset)
from filelock import FileLock
from PIL import Image, ImageOps
from scipy import ndimage
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

source_stage = import_module("03_train_source")     # digits keep `import` from working
predict = source_stage.predict                      # the network and its loss (paper 3.1)
mask_loss = source_stage.mask_loss
set_learning_rate = source_stage.set_learning_rate

# ---------------------------------------------------------------------------- constants
# in and out
INIT = f"{RUN}/03_train_source/model.safetensors"
SOURCE = preset(toy=(f"folder:{DATA}/toy/game_train",), gta=("gta",), synthia=("synthia",),
                cityscapes=("cityscapes",))
GENERATED = f"{RUN}/02_generate/index.jsonl"        # or folder:PATH, any pictures of your own
N_PICTURES = 0                                      # only the first so many (Figure 5); 0: all
OUT = f"{RUN}/04_selftrain"
# SAM and the pseudo-labels
REFINE = "points"                                   # "off": raw labels (Table 4) | "vote": a mask
                                                    # takes the teacher's majority inside it
SAM = preset(toy=f"{MINIATURES}/sam", paper="vit_h")    # vit_b, vit_l; official: MobileSAM
SAM_POINTS = 5                                      # random points per component (Figure 6)
SAM_MIN_AREA = preset(toy=100, paper=5_000)         # pixels of a component (Figure 6), at CROP
SAM_CHUNK = 64                                      # prompts per pass of SAM's decoder
SAM_BATCH = preset(toy=1, paper=2)                  # pictures per pass of SAM's encoder: 10 GB
UNLABELLED = "ignore"                               # "negative": background of all masks (official)
# teacher
EMA = preset(toy=0.98, paper=0.999)                 # alpha of eq. 2; 1: a teacher that never moves
EMA_EVERY = 1                                       # steps; official: 100: gta ends at 67 % theta_0
# training
ITERATIONS = preset(toy=200, gta=40_000, synthia=30_000, cityscapes=10_000)         # paper 4.1
N_SOURCE = preset(toy=4, paper=6)                   # labelled images per step
N_GENERATED = 2                                     # painted ones; official: random, 2.3 on average
LR = preset(toy=5e-4, paper=1e-5, cityscapes=1e-4)  # paper 4.1
WARMUP = preset(toy=20, paper=0)                    # steps
FREEZE_ENCODER = True                               # False: Table 5's trainable encoder
HALF = preset(toy=False, paper=True)                # bfloat16 in forward passes; official: float32
SEED = 0
# running
WORKERS = preset(toy=0, paper=8)                    # processes that read, as many for each kind
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
PREVIEW_EVERY = preset(toy=200, paper=2_000)


# as in the run of INIT, and no constants of this file
of_init = ("CROP", "SCALE", "LOSS_WEIGHTS", "NO_OBJECT", "POINTS", "ENCODER_LR", "SCHEDULE",
           "WEIGHT_DECAY", "GRAD_CLIP")


def check():
    """Refuse what would fail late, hang, or train nonsense in silence. Raises Stop."""
    for name in common.constants(globals()):
        expect(name not in of_init, f"{name} is that of the run of INIT: set it in 03, train again")
    source_stage.check_source(SOURCE)
    expect_kind(str, INIT=INIT, GENERATED=GENERATED, OUT=OUT, SAM=SAM)
    expect_kind(bool, FREEZE_ENCODER=FREEZE_ENCODER, HALF=HALF)
    expect(GENERATED != "folder:", f"{GENERATED=}: expected folder:PATH")
    expect(REFINE in ("points", "off", "vote"), f"{REFINE=}: expected points, off or vote")
    expect(UNLABELLED in ("ignore", "negative"), f"{UNLABELLED=}: expected ignore or negative")
    expect_numbers(int, 1, 10_000, SAM_POINTS=SAM_POINTS, SAM_CHUNK=SAM_CHUNK, SAM_BATCH=SAM_BATCH,
                   EMA_EVERY=EMA_EVERY)
    expect_numbers(int, 0, 10 ** 9, SAM_MIN_AREA=SAM_MIN_AREA, SEED=SEED, WARMUP=WARMUP,
                   N_PICTURES=N_PICTURES)
    expect_numbers(float, 0, 1, EMA=EMA)
    expect_numbers(int, 1, 10 ** 8, ITERATIONS=ITERATIONS, LOG_EVERY=LOG_EVERY,
                   SAVE_EVERY=SAVE_EVERY, PREVIEW_EVERY=PREVIEW_EVERY)
    expect_numbers(int, 0, 10_000, N_SOURCE=N_SOURCE, N_GENERATED=N_GENERATED)
    expect(N_SOURCE > 0, f"{N_SOURCE=}: without labelled images the classes drift")
    expect_numbers(float, 1e-12, 1, LR=LR)
    expect_numbers(int, 0, 256, WORKERS=WORKERS)
    source_stage.check_processes(N_SOURCE + N_GENERATED)


def inherited(about):
    """What holds here as in the run of INIT -> its constants as attributes: init.CROP ... Says
    where the file of 03, or this one, has another value. Raises Stop."""
    init = SimpleNamespace()
    own = {"SOURCE": common.portable(SOURCE), "UNLABELLED": UNLABELLED,
           "FREEZE_ENCODER": FREEZE_ENCODER}
    for name, value in own.items():
        other = about["constants"].get(name, value)
        if other != value:
            print(f"{name}={value} here; the run of INIT had {other}")
    for name in of_init:
        expect(name in about["constants"], f"{INIT} records no {name}: train it again")
        value, other = about["constants"][name], getattr(source_stage, name)
        value = tuple(value) if isinstance(value, list) else value
        setattr(init, name, value)
        if other != value:
            print(f"{name}={value} as in the run of INIT; the file of 03 has {other}")
    return init


# ---------------------------------------------------------------------------- SAM
sam_page = "https://dl.fbaipublicfiles.com/segment_anything/"
sam_files = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth",
             "vit_h": "sam_vit_h_4b8939.pth"}               # 0.4, 1.2 and 2.6 GB, into weights/


def fetch(page, file, problem, remedy):
    """Download a file whose name ends in the first digits of its MD5; one process does. Raises
    Stop."""
    with common.explain(f"{file.parent} cannot be written", remedy):
        file.parent.mkdir(exist_ok=True)
        lock = FileLock(file.parent / f".{file.name}.lock")
    with lock:
        if file.exists():               # another process was here
            return
        with common.whole(file) as part:
            with common.explain(problem, remedy):
                torch.hub.download_url_to_file(page, str(part))
            with part.open("rb") as content:
                md5 = hashlib.file_digest(content, "md5").hexdigest()
            expect(md5.startswith(file.stem[-6:]), f"{page} arrived damaged: {remedy}")


def load_sam(name):
    """-> Sam in eval mode, without gradients. name: vit_b, vit_l or vit_h, which are downloaded
    once, or a folder like the miniature's. Raises Stop."""
    if Path(name).is_dir():
        return import_module("tests.toy.sam").load(name)
    expect(name in sam_files, f"SAM={name}: no such folder, and none of {', '.join(sam_files)}")
    weights = common.HERE / "weights" / sam_files[name]
    page = sam_page + weights.name
    remedy = f"get {page} into {weights.parent} by hand, or do without: --REFINE=off"
    if not weights.exists():
        fetch(page, weights, f"SAM {name}: no download", remedy)
    weights.open("rb").close()                      # what may not be opened is not damaged
    with common.explain(f"{weights} is damaged", f"remove it, then {remedy}"):
        sam = sam_model_registry[name](weights).eval().requires_grad_(False)
    expect(all(value.isfinite().all() for value in sam.parameters()),
           f"{weights} holds what is not a number: remove it, then {remedy}")
    return sam


@torch.no_grad()
def embed_pictures(sam, files, size, half):
    """SAM's embedding of every picture at `size` (rows, columns), computed once and kept on disk as
    float16, named by the contents of picture and SAM -> paths of .npy files"""
    weights = common.digest(v.cpu().numpy().tobytes() for v in sam.state_dict().values())
    folder = Path(RUN, "sam_embeddings", f"{weights}_{size[0]}x{size[1]}_half={half}")
    paths = [folder / f"{common.digest([file.read_bytes()])}.npy" for file in files]
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    seen = torch.zeros(3, *resize.get_preprocess_shape(*size, resize.target_length))
    patch = resize.target_length // sam.prompt_encoder.image_embedding_size[0]
    rows, columns = (side // patch for side in sam.preprocess(seen.to(sam.device)).shape[1:])
    shape = sam.prompt_encoder.embed_dim, rows, columns
    mine = list(zip(paths, files))[common.RANK::common.PROCESSES]
    mine = dict(mine).items()                           # pictures of one content share a file
    missing = [(path, file) for path, file in mine if not is_embedding(path, shape)]
    for start in tqdm(range(0, len(missing), SAM_BATCH), "SAM's embeddings", disable=None):
        part = missing[start:start + SAM_BATCH]
        pixels = np.stack([resize.apply_image(np.asarray(fit(file, size))) for _, file in part])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(sam.device)
        with torch.autocast(sam.device.type, torch.bfloat16, enabled=half):
            embeddings = sam.image_encoder(sam.preprocess(pixels)).half().cpu().numpy()
        for (path, file), embedding in zip(part, embeddings):
            expect(np.isfinite(embedding).all(),
                   f"SAM's embedding of {file} is not a number: try HALF=False")
            with common.whole(path) as unfinished, unfinished.open("wb") as out:
                np.save(out, embedding)
    common.wait_for_others()
    return paths


def is_embedding(path, shape):
    """Whether a file holds an embedding; one that is damaged is made again."""
    try:
        embedding = np.load(path)
    except (FileNotFoundError, ValueError, EOFError):
        return False
    right = embedding.shape == shape and embedding.dtype == np.float16
    return right and bool(np.isfinite(embedding).all() and embedding.any())


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
    # "for every class i segmented in the image, we obtain M_i distinct binary masks"
    piece, cls, area = components(label.byte().cpu().numpy())
    # "remove regions falling below a set size threshold"
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
    # "the intersecting pixels are categorized as an 'unlabeled' class", and so is what no mask
    # reached
    refined = claimed.byte().argmax(0)
    refined[claimed.sum(0) != 1] = IGNORE
    return refined, points


def redraw(sam, embeddings, rough, items, half=False):
    """refine() for some pictures; without a `sam` (REFINE="off") their labels as they are.

    embeddings (B, D, g, g), rough int64 (B, H, W), items: the number of each picture in the stream,
    on which its random points depend, half: bfloat16 -> int64 (B, H, W), the prompts of each"""
    pseudo, prompts = rough.clone(), [np.zeros((0, 1, 2), np.float32)] * len(rough)
    with torch.autocast(rough.device.type, torch.bfloat16, enabled=half):
        for k in range(len(rough) if sam else 0):
            random = np.random.default_rng((SEED, 4, 5, items[k]))
            pseudo[k], prompts[k] = refine(sam, embeddings[k], rough[k], random)
    return pseudo, prompts


# ---------------------------------------------------------------------------- teacher (eq. 2)
@torch.no_grad()
def update_teacher(teacher, student, alpha):
    """Paper eq. 2: theta_T <- alpha theta_T + (1 - alpha) theta. Buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
    for mine, its in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(its)


# ---------------------------------------------------------------------------- painted pictures
def painted_files(generated):
    """The pictures of an index.jsonl of 02, or of folder:PATH -> sorted paths. Raises Stop."""
    if generated.startswith("folder:"):
        files = common.pictures(generated[7:])
    else:
        folder, names = Path(generated).parent, set()
        for row in common.read_lines(generated, "file"):
            name = row["file"]
            expect(name == Path(str(name)).name, f"{generated}: {name!r} is not the name of a file")
            names.add(name)
        files = [folder / name for name in sorted(names)]
        common.need([(f, "run 02_generate.py again: it paints what is missing") for f in files])
    expect(files, f"GENERATED={generated} holds no picture. To train without: --N_GENERATED=0")
    expect(N_PICTURES <= len(files), f"{N_PICTURES=}: {generated} holds {len(files)}; 0 takes all")
    return files[:N_PICTURES or None]


def fit(path, size):
    """A picture as PIL RGB, scaled to cover `size` (rows, columns) and cropped at the centre."""
    return ImageOps.fit(common.read_image(path), size[::-1], Image.BICUBIC)


class PaintedPictures(Dataset):
    """An endless stream of painted pictures; item i depends on i and the key alone: the clean
    picture uint8 (3, H, W), the student's view of it, jittered and perhaps flipped, whether it is
    flipped, SAM's embedding, and i. embeddings: paths, or () without SAM."""

    def __init__(self, files, embeddings, key, size):
        self.files, self.embeddings, self.key, self.size = files, embeddings, key, size

    def __getitem__(self, i):
        k = source_stage.shuffled(len(self.files), (*self.key, 3), i)
        random = np.random.default_rng((*self.key, 4, i))
        clean = self.clean(k)
        seen = source_stage.colour_jitter(clean, random)
        flipped = random.random() < .5
        return clean, seen.flip(2) if flipped else seen, flipped, self.embedding(k), i

    def clean(self, k):
        return pil_to_tensor(fit(self.files[k], self.size))

    def embedding(self, k):
        if not self.embeddings:
            return torch.zeros(0)
        with common.explain(f"{self.embeddings[k]} is damaged", "start again: it is made again"):
            return torch.from_numpy(np.load(self.embeddings[k])).float()


def vital_signs(rough, pseudo, prompts):
    """What SAM did to the teacher's labels, the mean over the painted pictures of a step and over
    the processes -> {name: scalar tensor}, see README."""
    known = (pseudo != IGNORE).flatten(1)
    changed = (rough != pseudo).flatten(1) & known
    signs = {"labelled": known.float().mean(1), "changed": changed.sum(1) / known.sum(1).clamp(1),
             "prompts": torch.tensor([float(len(points)) for points in prompts])}
    return {name: each.sum() * common.PROCESSES / N_GENERATED for name, each in signs.items()}


def preview(path, pictures, teacher, student, sam, half):
    """image | teacher | SAM | student, of four pictures. teacher, student: (encoder, decoder)"""
    shown = range(min(4, len(pictures.files)))
    clean = torch.stack([pictures.clean(k) for k in shown]).to(student[0].mean.device)
    embeddings = torch.stack([pictures.embedding(k) for k in shown]).to(clean.device)
    rough = predict(*teacher, clean, half).argmax(1)
    pseudo, prompts = redraw(sam, embeddings, rough, shown, half)
    student[0].eval()
    guess = predict(*student, clean, half).argmax(1)
    student[0].train()
    rows = []
    for k in shown:
        image, drawn = clean[k].cpu().numpy().transpose(1, 2, 0), common.COLOURS[pseudo[k].cpu()]
        for x, y in prompts[k].reshape(-1, 2).astype(int):
            drawn[max(0, y - 1):y + 2, max(0, x - 1):x + 2] = 255
        rows.append([("image", image), ("teacher", rough[k].cpu().numpy()),
                     ("SAM and its prompts", drawn), ("student", guess[k].cpu().numpy())])
    common.save_sheet(path, rows)


# ---------------------------------------------------------------------------- the joint loop
def main():
    init_file = source_stage.model_file(INIT)
    wanted = [(init_file, "03_train_source.py writes it when it is finished: run that first, or "
               "name a network: --INIT=PATH")]
    if N_GENERATED and not GENERATED.startswith("folder:"):
        wanted += [(GENERATED, "02_generate.py writes it when it is finished: run that first. A "
                    "folder of your own: folder:PATH. None: --N_GENERATED=0")]
    common.need(wanted)
    encoder, student, about = source_stage.load_model(INIT)
    init = inherited(about)
    files = painted_files(GENERATED) if N_GENERATED else []
    source = source_stage.SourceCrops(SOURCE, (SEED, 4), init.CROP, init.SCALE, encoder.fill)
    facts = {"classes and ids": common.class_ids(), "source pairs": source.digest(),
             "painted pictures": common.files_digest(files),
             "weights of INIT": common.digest([init_file.read_bytes()])}
    free = ("INIT", "GENERATED", "SAM_CHUNK", "SAM_BATCH")
    run = common.Run(globals(), "model.safetensors", free, facts)
    run.inherited = about["constants"]
    if run.finished():
        return
    device = common.device()
    half = common.bfloat16(HALF)
    sam = load_sam(SAM).to(device) if N_GENERATED and REFINE != "off" else None
    encoder.freeze(FREEZE_ENCODER)
    encoder.to(device).train(), student.to(device).train()
    optimizer, trained = source_stage.make_optimizer([(student, 1), (encoder, init.ENCODER_LR)],
                                                     init.WEIGHT_DECAY)
    # theta_T <- theta <- theta_0
    teacher, teacher_encoder = copy.deepcopy(student).eval().requires_grad_(False), encoder
    if source_stage.trains(encoder):
        teacher_encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        teacher_encoder.is_pretrained = False       # it follows the student's
    parts = {"student": source_stage.network(encoder, student),
             "teacher": source_stage.network(teacher_encoder, teacher), "optimizer": optimizer}

    run.start(bfloat16=half)
    progress = source_stage.Progress(run, parts, ITERATIONS)
    embeddings = embed_pictures(sam, files, init.CROP, half) if sam else ()
    pictures = PaintedPictures(files, embeddings, (SEED, 4), init.CROP)
    span = progress.first, ITERATIONS, WORKERS
    loaders = zip(source_stage.batches(source, N_SOURCE, *span),
                  source_stage.batches(pictures, N_GENERATED, *span, offset=N_SOURCE))
    E = source_stage.distributed(encoder, partly_used=True)
    D = source_stage.distributed(student, partly_used=not len(student.layers))

    no_signs = dict.fromkeys(("labelled", "changed", "prompts"), torch.zeros(()))
    for step, (labelled, painted) in progress.steps(loaders):
        torch.manual_seed((10 * SEED + 4) * 10 ** 9 + step)     # a step repeats after a resume
        images, labels = [], []
        signs = no_signs if N_GENERATED else {}
        if labelled:                # under torchrun a process may have one kind of pictures alone
            crops, truth = labelled
            images.append(crops.to(device, non_blocking=True))
            labels.append(truth.to(device, non_blocking=True).long())
        if painted:
            *tensors, items = painted
            clean, seen, flipped, embedding = (t.to(device, non_blocking=True) for t in tensors)
            # 1. the teacher labels the clean painted images: p = D_T(E(x))
            rough = predict(teacher_encoder, teacher, clean, half).argmax(1)
            # 2. SAM redraws those labels (3.3)
            pseudo, prompts = redraw(sam, embedding, rough, items.tolist(), half)
            signs = vital_signs(rough, pseudo, prompts)
            # the student sees them jittered and some of them flipped, and their labels with them
            images.append(seen)
            labels.append(torch.where(flipped[:, None, None], pseudo.flip(2), pseudo))
        # 3. one loss for source labels and pseudo-labels, "the same as the source loss" (eq. 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            classes, masks = D(E(torch.cat(images)))
        loss, terms = mask_loss(classes, masks, torch.cat(labels), init.POINTS, init.LOSS_WEIGHTS,
                                init.NO_OBJECT, UNLABELLED)
        set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, init.SCHEDULE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, init.GRAD_CLIP)
        optimizer.step()
        # 4. theta_T <- EMA theta_T + (1 - EMA) theta (eq. 2)
        done = step + 1
        if done % EMA_EVERY == 0:
            update_teacher(parts["teacher"], parts["student"], EMA)

        progress.record(done, {"loss": loss, **terms, "norm": norm, **signs}, LOG_EVERY)
        if common.RANK == 0 and files and (done % PREVIEW_EVERY == 0 or done == ITERATIONS):
            preview(run.out / f"preview_{done:06d}.png", pictures, (teacher_encoder, teacher),
                    (encoder, student), sam, half)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            progress.save(done)
    if common.RANK == 0:
        source_stage.save_model(run.out / "teacher.safetensors", teacher_encoder, teacher, run)
        source_stage.finish(run, progress, encoder, student)


if __name__ == "__main__":
    common.launch(globals())
