"""
04_selftrain: teach the source model on painted scenes that its own teacher labels, with SAM drawing the borders (paper 3.1 eq. 2, and 3.3).

    in    RUN/03_train_source/model.safetensors    theta_0: the decoder, and which encoder it sits on
          RUN/02_generate/index.jsonl              unlabelled painted scenes
          SOURCE                                   labelled images, as in 03
    out   RUN/04_selftrain/model.safetensors       the student theta; teacher.safetensors: the teacher theta_T
          previews: image | teacher | SAM with its prompt points | student, always of the same four scenes
    time  toy: see README; paper: 40,000 steps on one GPU (not run here)

theta_T <- theta <- theta_0. Each step, on N_SOURCE labelled and N_GENERATED painted images:
  1. the teacher theta_T labels the clean painted image: argmax of D_T(E(x))
  2. SAM redraws that label: components, size threshold, random points, best mask, union per class      refine()
  3. the student learns source labels and redrawn labels with one loss; it sees the painted image flipped and jittered
  4. every EMA_EVERY steps: theta_T <- EMA theta_T + (1 - EMA) theta                                    eq. 2

Healthy if `labelled` stays high, `changed` (labelled pixels that SAM moved to another class) is some percent and falls, and the
third column of the previews looks better than the second.
"""
import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import nn

import common
from common import DATA, IGNORE, RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
INIT = f"{RUN}/03_train_source/model.safetensors"
GENERATED = f"{RUN}/02_generate/index.jsonl"
SOURCE = preset(toy=f"folder:{DATA}/toy/game_train", gta="gta", synthia="synthia", cityscapes="cityscapes")
OUT = f"{RUN}/04_selftrain"
ENCODER = ""                                       # "" = the one that INIT was trained on; any other name must be the same one
FREEZE_ENCODER = True                              # False: Table 5's trainable encoder
ENCODER_LR = 0.1                                   # times LR, if the encoder trains (official)
ITERATIONS = preset(toy=200, gta=40_000, synthia=30_000, cityscapes=10_000)         # paper 4.1
N_SOURCE = preset(toy=8, paper=6)                  # labelled images a step
N_GENERATED = preset(toy=4, paper=2)               # painted images a step (official: random, 2.3 of 8 on average). 0 = source only, same steps
LR = preset(toy=5e-4, paper=1e-5, cityscapes=1e-4) # paper 4.1
SCHEDULE = preset(toy="poly", paper="constant", synthia="poly")                     # official; the paper does not say
WARMUP = preset(toy=20, paper=0)                   # steps
WEIGHT_DECAY = 0.05                                # paper 4.1
GRAD_CLIP = preset(toy=1.0, paper=0.01)            # global norm; 0.01 is Mask2Former's
EMA = preset(toy=0.98, paper=0.999)                # alpha of eq. 2. 1 = a teacher that never moves
EMA_EVERY = preset(toy=1, paper=1)                 # paper: each step. Official: 100, which leaves the teacher 67 % theta_0 at the end
REFINE = "points"                                  # paper | "off": raw teacher labels (Table 4) | "vote": a mask takes the teacher's majority | "purity": drop a mask with under half of its class
SAM = preset(toy="tests/toy/weights/sam", paper="vit_h")                            # vit_b, vit_l, vit_h or a folder. Official: MobileSAM
SAM_POINTS = 5                                     # random points a component (Figure 6)
SAM_MIN_AREA = preset(toy=100, paper=5_000)        # pixels, at CROP: 0.3 %, chosen on validation scenes, and 0.85 %. Smaller components get no label (Figure 6)
SAM_CHUNK = 64                                     # prompts a decoder pass: memory against speed
UNLABELLED = "ignore"                              # paper: must not teach | "negative": background of every mask, as the official code has it
CROP = preset(toy=(128, 256), paper=(768, 768))    # rows, columns; painted images are brought to it whole
SCALE = preset(toy=(0.75, 1.5), paper=(0.5, 2.0))  # source images only
RARE = 0.0                                        # temperature of rare class sampling of source images (DAFormer: 0.01); 0 = all alike, as the paper
POINTS = preset(toy=512, paper=12_544)            # points a mask in the losses: Mask2Former's 112 x 112
SEED = 0
PARTS = 1                                         # a batch in so many parts, to the same result: less memory, a second forward pass of the decoder
HALF = False                                      # bfloat16 autocast; the official code trains in float32
WORKERS = preset(toy=0, paper=8)
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
KEEP_EVERY = 0                                    # keep a model to score every so many steps, OUT/step_NNNNNN.safetensors; 0 = only the last
PREVIEW_EVERY = preset(toy=200, paper=2_000)


# ---------------------------------------------------------------------------- SAM
class ConvEncoder(nn.Module):
    """A small residual CNN in the place of SAM's ViT, as MobileSAM has a small one: what the miniature's folder asks for.

    (B, 3, H, W), multiples of 16 -> (B, out, H/8, W/8). It sees the picture without the padding to a square."""

    def __init__(self, widths, blocks, out, img_size):
        super().__init__()
        self.img_size = img_size

        def unit(a, b, stride=1):
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.down = nn.ModuleList(unit(a, b, 2) for a, b in zip([3] + widths[:-1], widths))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Sequential(unit(w, w), nn.Conv2d(w, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)) for _ in range(n)) for w, n in zip(widths, blocks))
        self.fine, self.middle, self.coarse = nn.Conv2d(widths[1], out, 2, 2), nn.Conv2d(widths[2], out, 1), nn.Conv2d(widths[3], out, 1)
        self.smooth = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x):
        maps = []
        for down, blocks in zip(self.down, self.blocks):
            x = down(x)
            for block in blocks:
                x = F.relu(x + block(x))
            maps.append(x)
        coarse = F.interpolate(self.coarse(maps[3]), scale_factor=2, mode="bilinear", align_corners=False)
        return self.smooth(F.relu(self.fine(maps[1]) + self.middle(maps[2]) + coarse))


def build_sam(config):
    """A small Sam from segment_anything's own parts, as the config.json of a folder describes it."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    size, width = config["image_size"], config["width"]
    grid = size // config["stride"]
    return Sam(image_encoder=ConvEncoder(config["encoder"], config["blocks"], width, size),
               prompt_encoder=PromptEncoder(embed_dim=width, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=8),
               mask_decoder=MaskDecoder(num_multimask_outputs=3, transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=config["mlp_dim"], num_heads=config["heads"]),
                                        transformer_dim=width, iou_head_depth=3, iou_head_hidden_dim=width),
               pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375])


SAM_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}       # 0.4, 1.2, 2.6 GB
SAM_PAGE = "https://dl.fbaipublicfiles.com/segment_anything/"


def sam_file(name):
    """Where the weights of a SAM lie: the official file of a registry name, or model.safetensors of a folder."""
    return f"weights/{SAM_FILES[name]}" if name in SAM_FILES else f"{common.local(name)}/model.safetensors"


def to_fetch(name):
    """Whether these are official weights that are not there and whose page answers."""
    return name in SAM_FILES and not Path(sam_file(name)).exists() and os.environ.get("HF_HUB_OFFLINE") != "1" and common.reachable(SAM_PAGE.split("/")[2])


def fetch_sam(name):
    """Download official weights. Their file names end in the start of their MD5: what broke on the way is not kept. Raises Stop."""
    import hashlib
    file = Path(sam_file(name))
    part = file.with_suffix(f".{os.getpid()}.part")
    print(f"fetching {SAM_PAGE}{file.name}, once")
    file.parent.mkdir(exist_ok=True)
    try:
        torch.hub.download_url_to_file(SAM_PAGE + file.name, str(part))
        digest = hashlib.md5(part.read_bytes()).hexdigest()
        if not digest.startswith(file.stem[-6:]):
            raise Stop(f"{file.name} did not arrive whole ({part.stat().st_size} bytes, MD5 {digest}): try again, or get it by hand from {SAM_PAGE}")
        os.replace(part, file)
    except OSError as problem:
        raise Stop(f"{file.name} could not be fetched ({problem}): try again, or get it by hand from {SAM_PAGE}") from None
    finally:
        part.unlink(missing_ok=True)


def load_sam(name):
    """-> Sam in eval mode without gradients: official weights through segment_anything's registry, or a folder of config.json and model.safetensors."""
    try:
        if name in SAM_FILES:
            from segment_anything import sam_model_registry
            sam, state = sam_model_registry[name](), torch.load(sam_file(name), map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file
            sam, state = build_sam(json.loads(Path(common.local(name), "config.json").read_text())), load_file(sam_file(name))
        sam.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except Exception as problem:
        raise Stop(f"{sam_file(name)} cannot be read as weights of SAM={name} ({type(problem).__name__}): fetch it again") from problem
    return sam.eval().requires_grad_(False)                  # eval matters: in train mode BatchNorm would take statistics of a batch of one


@torch.no_grad()
def sam_encode(sam, image):
    """uint8 (3, H, W) RGB, clean -> embedding (1, D, g, g), the miniature's without the padding's rows. It never changes for an image: it is kept on disk."""
    from segment_anything.utils.transforms import ResizeLongestSide
    pixels = ResizeLongestSide(sam.image_encoder.img_size).apply_image(image.permute(1, 2, 0).numpy())
    square = sam.preprocess(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().to(sam.device))
    if isinstance(sam.image_encoder, ConvEncoder):
        square = square[..., :-(-pixels.shape[0] // 16) * 16, :-(-pixels.shape[1] // 16) * 16]
    return sam.image_encoder(square)


def sam_decode(sam, embeddings, which, points):
    """Prompts of several images in one pass (segment_anything's own decoder takes one image at a time).

    embeddings (n, D, h, w), which (M,) image of each prompt, points (M, P, 2) as (x, y) in the resized image, all positive
    -> mask logits (M, 3, 4h, 4w), predicted IoU (M, 3)"""
    height, width = embeddings.shape[-2:]
    sparse, dense = sam.prompt_encoder(points=(points, torch.ones(points.shape[:2], device=points.device)), boxes=None, masks=None)
    decoder = sam.mask_decoder
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))[None].expand(len(points), -1, -1)
    source = embeddings[which] + dense[..., :height, :width]
    code = sam.prompt_encoder.get_dense_pe()[..., :height, :width].expand(len(points), -1, -1, -1)
    tokens, pixels = decoder.transformer(source, code, torch.cat((own, sparse), 1))
    pixels = decoder.output_upscaling(pixels.transpose(1, 2).reshape(source.shape))
    weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    masks = torch.einsum("mkd,mdhw->mkhw", weights, pixels)
    return masks[:, 1:], decoder.iou_prediction_head(tokens[:, 0])[:, 1:]           # the first mask is SAM's single-mask output


class Embeddings:
    """SAM's image embeddings on disk (float16), beside the painted images: every image is encoded once, for this run and the next.

    A folder for every SAM and CROP; an image that is newer than its embedding is encoded again."""

    def __init__(self, sam, name, folder):
        import hashlib
        digest = hashlib.sha256(Path(sam_file(name)).read_bytes()).hexdigest()[:10]
        self.sam, self.folder = sam, Path(folder) / f"sam_{digest}_{CROP[0]}x{CROP[1]}"
        self.folder.mkdir(exist_ok=True)

    def __call__(self, name, image):
        path = self.folder / f"{Path(name).stem}.npy"
        try:
            if path.stat().st_mtime < (self.folder.parent / name).stat().st_mtime:
                raise OSError("older than its image")
            return torch.from_numpy(np.load(path)).float().to(self.sam.device)
        except (OSError, ValueError, EOFError):              # not there yet, old, or not whole: make it
            embedding = sam_encode(self.sam, image)[0].half().cpu()
            with common.whole(path, each=True) as part, open(part, "wb") as file:
                np.save(file, embedding.numpy())
            return embedding.float().to(self.sam.device)


# ---------------------------------------------------------------------------- pseudo-label refinement (paper 3.3)
def components(label):
    """Connected pieces of one class (4-connectivity), all classes in one pass.

    The paper names Hoshen-Kopelman; any labelling gives the same pieces. One pass does for all classes because the map is laid out on a grid
    with a cell between each two neighbours, and that cell is solid only if both have the same class.
    label uint8 (H, W) -> piece int32 (H, W) in 0..n, 0 = IGNORE; class uint8 (n + 1,), area int64 (n + 1,) of each piece"""
    height, width = label.shape
    solid = np.zeros((2 * height - 1, 2 * width - 1), bool)
    solid[::2, ::2] = label != IGNORE
    solid[1::2, ::2] = (label[1:] == label[:-1]) & (label[1:] != IGNORE)
    solid[::2, 1::2] = (label[:, 1:] == label[:, :-1]) & (label[:, 1:] != IGNORE)
    piece, n = ndimage.label(solid)
    piece = piece[::2, ::2]
    area = np.bincount(piece.ravel(), minlength=n + 1)
    cls = np.full(n + 1, IGNORE, np.uint8)
    cls[piece.ravel()] = label.ravel()
    return piece, cls, area


def random_points(piece, area, keep, n, random):
    """n points (with replacement) in each of the pieces `keep`, all drawn at once -> float32 (len(keep), n, 2) as (x, y)"""
    order = np.argsort(piece.ravel(), kind="stable")         # pixels piece by piece: a piece is a slice of it
    first = np.cumsum(area) - area
    chosen = order[first[keep, None] + (random.random((len(keep), n)) * area[keep, None]).astype(np.int64)]
    y, x = np.divmod(chosen, piece.shape[1])
    return np.stack((x, y), -1).astype(np.float32)


def sam_masks(sam, embeddings, which, points, shape):
    """The mask that SAM rates highest for every prompt, at the size of the picture.

    embeddings (n, D, g, g), which int64 (M,) image of each prompt, points float32 (M, P, 2) as (x, y) in pixels of `shape` (H, W) -> bool (M, H, W)"""
    size = sam.image_encoder.img_size
    scale = size / max(shape)
    logits, scores = sam_decode(sam, embeddings, which, points * scale)
    best = logits[torch.arange(len(which)), scores.argmax(1)][:, None]                      # of three masks one, and up-sampled only now
    side = 4 * sam.prompt_encoder.image_embedding_size[0]
    best = F.pad(best, (0, side - best.shape[-1], 0, side - best.shape[-2]))                # postprocess_masks expects the whole square
    return sam.postprocess_masks(best, (int(shape[0] * scale + .5), int(shape[1] * scale + .5)), shape)[:, 0] > 0


@torch.no_grad()
def refine(sam, embeddings, labels, random):
    """Redraw the teacher's labels with SAM.

    embeddings (n, D, g, g), labels uint8 (n, H, W) numpy, random: one generator an image
    -> int64 (n, H, W): IGNORE where no mask reached or two different classes met; the prompts [(image, class, points (P, 2))]"""
    shape = labels.shape[-2:]
    which, classes, points = [], [], []
    for i, label in enumerate(labels):
        piece, cls, area = components(label)                                                # "for every class i ... we obtain M_i distinct binary masks"
        keep = np.flatnonzero((area >= SAM_MIN_AREA) & (np.arange(len(area)) > 0))          # "filtering ... regions below a set size threshold"
        which += [i] * len(keep)
        classes += cls[keep].tolist()                        # the class travels with its component: it is never counted back from the masks
        points.append(random_points(piece, area, keep, SAM_POINTS, random[i]))              # "randomly select points within each binary mask"
    points = np.concatenate(points) if points else np.zeros((0, SAM_POINTS, 2), np.float32)
    claimed = torch.zeros(len(labels), len(common.CLASSES), *shape, dtype=torch.bool, device=sam.device)
    teacher = torch.from_numpy(labels.astype(np.int64)).to(sam.device)
    for start in range(0, len(which), SAM_CHUNK):
        part = slice(start, start + SAM_CHUNK)
        image, cls = torch.tensor(which[part], device=sam.device), torch.tensor(classes[part], device=sam.device)
        masks = sam_masks(sam, embeddings, image, torch.from_numpy(points[part]).to(sam.device), shape)      # "for each set of points, SAM provides an enhanced binary mask"
        if REFINE in ("vote", "purity"):
            inside = torch.stack([(masks & (teacher[image] == c)).sum((1, 2)) for c in range(len(common.CLASSES))], 1)
            if REFINE == "vote":
                cls = inside.argmax(1)
            else:
                masks &= (inside.gather(1, cls[:, None])[:, 0] * 2 >= masks.sum((1, 2)))[:, None, None]
        for i, c, mask in zip(image, cls, masks):
            claimed[i, c] |= mask                            # "aggregating all the predicted objects across all classes"
    refined = claimed.float().argmax(1)
    refined[claimed.sum(1) != 1] = IGNORE                    # "overlapping masks ... categorized as unlabeled"; so is what no mask reached
    return refined, list(zip(which, classes, points))


# ---------------------------------------------------------------------------- student and teacher
@torch.no_grad()
def ema_update(teacher, student, alpha):
    """Paper eq. 2: theta_T <- alpha theta_T + (1 - alpha) theta. Buffers are copied."""
    for (name, target), (other, value) in zip(teacher.named_parameters(), student.named_parameters(), strict=True):
        assert name == other, f"teacher and student differ: {name}, {other}"
        target.lerp_(value, 1 - alpha)
    for target, value in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(value)


def read_generated(index):
    """index.jsonl of 02 -> sorted image paths. Raises Stop if a file of the list is not there."""
    folder = Path(index).parent
    try:
        files = sorted(json.loads(line)["file"] for line in Path(index).read_text().splitlines())
    except (ValueError, KeyError):
        raise Stop(f"{index} is not an index of 02_generate.py: a line each of file, prompt, seed") from None
    for file in files:
        if Path(file).name != file or not (folder / file).exists():
            raise Stop(f"{index} names {file}, which is not in {folder}: run 02_generate.py again, it paints what is missing")
    if not files:
        raise Stop(f"{index} lists no image: run 02_generate.py with --N_IMAGES above 0, or train with --N_GENERATED=0")
    return [folder / file for file in files]


def to_crop(path):
    """A painted image as uint8 (3, *CROP), whole: resized to cover CROP, what stands over cut off evenly."""
    from PIL import ImageOps
    image = common.read_image(path)
    image = image if image.size == CROP[::-1] else ImageOps.fit(image, CROP[::-1], Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def painted_at(files, step, item):
    """Which painted image is item 0..N_GENERATED - 1 of a step: every one once an epoch."""
    return files[common.shuffled(len(files), SEED + 1, step * N_GENERATED + item)]


def generated_batch(files, step):
    """The painted images of a step -> clean uint8 (n, 3, H, W), as the student sees them (jittered, flipped), which are flipped (n,), file names."""
    clean, seen, flips, names = [], [], [], []
    for item in common.share(N_GENERATED):
        path = painted_at(files, step, item)
        image, random = to_crop(path), common.randomness(SEED, step, item, 3)
        flip = random.random() < .5
        jittered = common.colour_jitter(image, random)
        clean.append(image), seen.append(jittered.flip(2) if flip else jittered), flips.append(flip), names.append(path.name)
    return torch.stack(clean), torch.stack(seen), torch.tensor(flips), names


def preview(path, images, rows):
    """Rows of images: each painted scene beside its label maps; prompt points drawn on SAM's."""
    sheet = []
    for image, (teacher, refined, prompts, student) in zip(images, rows):
        marked = Image.fromarray(common.colourise(refined))
        draw = ImageDraw.Draw(marked)
        for _, _, points in prompts:
            for x, y in points:
                draw.rectangle([x - 1, y - 1, x + 1, y + 1], fill=(255, 255, 255), outline=(0, 0, 0))
        sheet.append(np.concatenate([image.permute(1, 2, 0).numpy(), common.colourise(teacher), np.asarray(marked), common.colourise(student)], 1))
    with common.whole(path) as part:
        Image.fromarray(np.concatenate(sheet)).save(part, "PNG")


def main():
    run = common.Run(globals(), "model.safetensors")
    if run.finished():
        return
    if REFINE not in ("points", "off", "vote", "purity") or UNLABELLED not in ("ignore", "negative"):
        raise Stop(f"REFINE={REFINE}, UNLABELLED={UNLABELLED}: REFINE is points, off, vote or purity; UNLABELLED is ignore or negative")
    if N_SOURCE < 1 or N_GENERATED < 0 or ITERATIONS < 1 or SAM_POINTS < 1:
        raise Stop(f"N_SOURCE={N_SOURCE}, N_GENERATED={N_GENERATED}, ITERATIONS={ITERATIONS}, SAM_POINTS={SAM_POINTS}: only N_GENERATED may be 0")
    use_sam = REFINE != "off" and N_GENERATED > 0
    fetch = use_sam and to_fetch(SAM)
    common.need((INIT, "03_train_source.py writes it when it is finished: run that first, or name a checkpoint: --INIT=PATH"),
                *([(GENERATED, "02_generate.py writes it when it is finished: run that first. To train without painted images: --N_GENERATED=0")] if N_GENERATED else []),
                *([(sam_file(SAM), (f"get {SAM_PAGE}{SAM_FILES[SAM]}" if SAM in SAM_FILES else "give a folder of config.json and model.safetensors, or vit_b, vit_l, vit_h")
                   + ". To do without it: --REFINE=off")] if use_sam and not fetch else []))
    if fetch:
        fetch_sam(SAM)
    common.toy_data(SOURCE)
    source = common.pairs(SOURCE, "train")
    painted = read_generated(GENERATED) if N_GENERATED else []

    device = common.device()
    encoder, student, about = common.load_model(INIT)
    if ENCODER not in ("", about["encoder"]):
        raise Stop(f"--ENCODER={ENCODER}: {INIT} was trained on {about['encoder']}")
    encoder.frozen = FREEZE_ENCODER
    encoder.requires_grad_(not FREEZE_ENCODER).to(device).train()
    student.to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)                           # theta_T <- theta <- theta_0
    teacher_encoder = encoder if FREEZE_ENCODER else copy.deepcopy(encoder).eval().requires_grad_(False)
    trained = [student] if FREEZE_ENCODER else [student, encoder]
    optimizer = common.make_optimizer(student, WEIGHT_DECAY, None if FREEZE_ENCODER else encoder, ENCODER_LR)
    run.start()
    sam = load_sam(SAM).to(device) if use_sam else None
    embedding_of = Embeddings(sam, SAM, Path(GENERATED).parent) if use_sam else None
    assert not FREEZE_ENCODER or not any(p.requires_grad for p in encoder.parameters()), "expected a frozen encoder (paper 3.1), got gradients"

    facts = {"seed": SEED, "stage": "04_selftrain", "constants": run.constants}
    saved = {"student": student, "teacher": teacher, "optimizer": optimizer, **({} if FREEZE_ENCODER else {"encoder": encoder, "teacher_encoder": teacher_encoder})}
    checkpoint = Path(OUT) / "checkpoint.pt"
    first = common.resume(checkpoint, saved)
    run.rewind(first)
    print(f"{len(source)} labelled, {len(painted)} painted images; {N_SOURCE} + {N_GENERATED} a step; "
          f"{sum(p.numel() for m in trained for p in m.parameters()) / 1e6:.2f} M parameters train; on {device}")

    order, pick = common.dealt(N_SOURCE, N_GENERATED), common.sampler(source, SOURCE, SEED, RARE, Path(OUT) / "classes.npy")

    def batch(step):
        return common.source_batch(source, SOURCE, step, N_SOURCE, SEED, CROP, SCALE, encoder.fill, pick), generated_batch(painted, step) if N_GENERATED else None

    def pseudo_label(clean, names, items, *address):
        """Steps 1 and 2: the teacher's label of clean painted images ("the teacher branch receives the original images"), and SAM's redrawing
        -> uint8, int64 (n, H, W), prompts"""
        rough = common.predict(teacher_encoder, teacher, clean.to(device)).argmax(1).to(torch.uint8).cpu().numpy()     # 1. p = D_T(E(x))
        if not use_sam:
            return rough, torch.from_numpy(rough.astype(np.int64)).to(device), []
        embeddings = torch.stack([embedding_of(name, image) for name, image in zip(names, clean)])
        return rough, *refine(sam, embeddings, rough, [common.randomness(SEED, *address, i, 4) for i in items])   # 2.

    shown = torch.stack([to_crop(path) for path in painted[:4]]) if painted else None
    for step, ((images, labels), drawn) in zip(range(first, ITERATIONS), common.ahead(batch, range(first, ITERATIONS), WORKERS)):
        numbers, images, labels = {}, images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if drawn:
            clean, seen, flips, names = drawn
            rough, redrawn, prompts = pseudo_label(clean, names, common.share(N_GENERATED), step)
            known, rough = redrawn != IGNORE, torch.from_numpy(rough.astype(np.int64)).to(device)
            numbers = {"labelled": known.float().mean().item(), "changed": ((rough != redrawn) & known).sum().item() / max(1, known.sum().item()), "prompts": len(prompts) / len(clean)}
            flips = flips.to(device)
            redrawn = torch.where(flips[:, None, None], redrawn.flip(2), redrawn)           # image and label share the geometry
            images, labels = torch.cat((images, seen.to(device, non_blocking=True))), torch.cat((labels, redrawn))
        common.set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, SCHEDULE)
        *predictions, finish = common.in_parts(encoder, student, images, PARTS, HALF, order)        # 3. "the same as the source loss": eq. 1
        loss, terms = common.mask_loss(*predictions, common.gather(labels, order), POINTS, common.seeded(SEED, step, 5), UNLABELLED == "ignore")
        optimizer.zero_grad(set_to_none=True)
        loss.backward(), finish()
        norm = nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters()], GRAD_CLIP)
        common.stop_unless_finite(step, loss, norm, checkpoint, lambda: [source[pick(step * N_SOURCE + i)][0] for i in range(N_SOURCE)] + [painted_at(painted, step, i) for i in range(N_GENERATED)])
        optimizer.step()
        if (step + 1) % EMA_EVERY == 0:                                                     # 4. eq. 2
            ema_update(teacher, student, EMA)
            if not FREEZE_ENCODER:
                ema_update(teacher_encoder, encoder, EMA)

        done = step + 1
        run.progress(done, ITERATIONS, LOG_EVERY, {"loss": loss.item(), **terms, **numbers}, N_SOURCE + N_GENERATED)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            common.save_checkpoint(checkpoint, {"step": done, **{name: thing.state_dict() for name, thing in saved.items()}})
        if KEEP_EVERY and done % KEEP_EVERY == 0 and done < ITERATIONS:
            common.save_model(Path(OUT) / f"step_{done:06d}.safetensors", encoder, student, iteration=done, **facts)
        if painted and run.leads and (done % PREVIEW_EVERY == 0 or done == ITERATIONS):
            rough, redrawn, prompts = pseudo_label(shown, [p.name for p in painted[:4]], range(len(shown)), 0)
            guess = common.predict(encoder.eval(), student.eval(), shown.to(device)).argmax(1).to(torch.uint8).cpu().numpy()
            encoder.train(), student.train()
            preview(Path(OUT) / f"preview_{done:06d}.png", shown,
                    [(rough[i], redrawn[i].to(torch.uint8).cpu().numpy(), [p for p in prompts if p[0] == i], guess[i]) for i in range(len(shown))])

    common.save_model(Path(OUT) / "teacher.safetensors", teacher_encoder, teacher, iteration=ITERATIONS, **facts)
    run.finish()
    common.save_model(run.result, encoder, student, iteration=ITERATIONS, **facts)          # last: its presence means finished
    if run.leads:
        checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    common.launch(globals())
