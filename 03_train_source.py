"""
03_train_source: train a mask decoder on frozen CLIP features, with labelled source images only
(paper 3.1).

    in    SOURCE                                   labelled images of one domain (or of several)
    out   RUN/03_train_source/model.safetensors    theta_0, with which 04 begins
          log.jsonl, loss.png, preview_*.png       image | prediction | truth of the same four crops
    time  toy: see README; paper: 40,000 steps on one GPU

The encoder E is a CNN tower of CLIP. It stays frozen: that is cheaper, and features which have seen
the whole web are not bent towards one video game. Only the decoder D learns, a Mask2Former: a set
of queries, each of which predicts one mask and its class. Each class of an image is matched to one
query, which learns that class and its mask; all other queries learn "no object" (eq. 1).

It worked if the loss falls within the first hundred steps, and if the second column of the previews
begins to look like the third."""
import json
import time
import zipfile
from collections import Counter

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2.functional import adjust_hue, pad, pil_to_tensor
from tqdm import tqdm

import common
from common import CLASSES, DATA, IGNORE, MINIATURES, RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
# in and out
SOURCE = preset(toy=(f"folder:{DATA}/toy/game_train",), gta=("gta",), synthia=("synthia",),
                cityscapes=("cityscapes",))         # several are mixed: gta,synthia
OUT = f"{RUN}/03_train_source"
# network; LIBRARY:MODEL, library open_clip, timm or transformers; MODEL may be local-dir:PATH
ENCODER = preset(toy=f"open_clip:local-dir:{MINIATURES}/clip",
                 paper="open_clip:convnext_large_d_320/laion2b_s29b_b131k_ft_soup")
FREEZE_ENCODER = True                               # False: Table 5's trainable encoder
DIM = preset(toy=64, paper=256)                     # width of the decoder
QUERIES = preset(toy=24, paper=100)
LAYERS = preset(toy=3, paper=6)                     # Mask2Former: 9
HIDDEN = preset(toy=128, paper=512)                 # width of feed-forwards; Mask2Former: 2,048
PIXEL_LAYERS = 3                                    # Mask2Former: 6 of deformable attention
# loss
LOSS_WEIGHTS = (2.0, 5.0, 5.0)                      # of class, mask and dice, as Mask2Former
NO_OBJECT = 0.1                                     # weight of "no object" in the class loss
POINTS = preset(toy=512, paper=12_544)              # points per mask; Mask2Former: 112 x 112
UNLABELLED = "ignore"                               # "negative": background of all masks (official)
# training
ITERATIONS = preset(toy=600, gta=40_000, synthia=30_000, cityscapes=10_000)         # paper 4.1
BATCH = 8                                           # paper 4.1
CROP = preset(toy=(128, 256), paper=(768, 768))     # rows, columns; paper 4.1
SCALE = preset(toy=(0.75, 1.5), paper=(0.5, 2.0))   # paper 4.1
LR = preset(toy=1.5e-3, paper=1e-5, cityscapes=1e-4)                                # paper 4.1
ENCODER_LR = 0.1                                    # times LR, if the encoder trains (official)
SCHEDULE = preset(toy="poly", paper="constant", synthia="poly")     # official; not in the paper
WARMUP = preset(toy=50, paper=0)                    # steps
WEIGHT_DECAY = 0.05                                 # paper 4.1
GRAD_CLIP = preset(toy=1.0, paper=0.01)             # global norm; 0.01 as Mask2Former
HALF = preset(toy=False, paper=True)                # bfloat16 in forward passes; official: float32
SEED = 0
# running
WORKERS = preset(toy=0, paper=8)                    # processes that read; 0 is best on two cores
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
PREVIEW_EVERY = preset(toy=300, paper=2_000)

TRAINING_RULES = """
len(OUT.strip()) > 0 and len(set(SOURCE)) == len(SOURCE) > 0
len(LOSS_WEIGHTS) == 3 and all(0 <= weight <= 1000 for weight in LOSS_WEIGHTS)
0 <= NO_OBJECT <= 1 and 4 <= POINTS <= 10 ** 6 and UNLABELLED in ("ignore", "negative")
len(CROP) == 2 and all(32 <= side <= 8192 and side % 32 == 0 for side in CROP)
len(SCALE) == 2 and 0.01 <= SCALE[0] <= SCALE[1] <= 100
0 < LR <= 1 and 0 <= ENCODER_LR <= 100 and SCHEDULE in ("constant", "poly")
0 <= WARMUP <= 10 ** 8 and 0 <= WEIGHT_DECAY <= 10 and 0 < GRAD_CLIP <= 10 ** 6
1 <= ITERATIONS <= 10 ** 8 and 0 <= SEED <= 10 ** 9 and 0 <= WORKERS <= 256
min(LOG_EVERY, SAVE_EVERY, PREVIEW_EVERY) >= 1
"""
RULES = TRAINING_RULES + """
32 <= DIM <= 4096 and DIM % 32 == 0 and 1 <= HIDDEN <= 100_000
len(CLASSES) <= QUERIES <= 10_000 and 0 <= LAYERS <= 100 and 0 <= PIXEL_LAYERS <= 100
1 <= BATCH <= 10_000
"""


# ---------------------------------------------------------------------------- augmentation (4.1)
def colour_jitter(image, random):
    """SSD's colour jitter, as the official code: brightness, contrast, saturation and hue, each
    with probability 1/2, contrast before or after the last two.

    image uint8 (3, H, W) RGB, random: a numpy generator -> the same shape"""
    def clip(x):
        return x.clamp(0, 255).to(torch.uint8)
    brightness, contrast, saturation, hue, contrast_first = random.random(5) < .5
    factor = random.uniform(.5, 1.5) if contrast else 1
    if brightness:
        image = clip(image + random.uniform(-32, 32))
    if contrast_first:
        image = clip(image * factor)
    if saturation:              # scale HSV's S; V, the highest channel, and the hue stay
        value, low = image.amax(0).float(), image.amin(0)
        scale = (value / (value - low)).clamp(max=random.uniform(.5, 1.5)).nan_to_num()
        image = clip(value - (value - image) * scale)
    if hue:                     # in OpenCV's 180 steps
        image = adjust_hue(image, random.integers(-18, 19) / 180)
    return image if contrast_first else clip(image * factor)


def scale_and_crop(image, label, random, crop, scale, fill):
    """Random scale, random crop, colour jitter, flip. Image and label are sampled on one grid.

    image PIL RGB, label uint8 (H, W), crop (h, w), scale (lowest, highest), fill: RGB of what lies
    outside, where the label is IGNORE -> uint8 (3, h, w), int64 (h, w)"""
    factor = random.uniform(*scale)
    inside = np.minimum(crop[::-1], np.round(np.multiply(image.size, factor)))  # width and height
    seen = np.minimum(inside / factor, image.size)          # what is inside, in the image's pixels
    top, left = random.uniform(0, (image.size - seen)[::-1])
    right, bottom = (left, top) + seen
    box = (left, top, right, bottom)
    size = inside.astype(int)
    pixels = pil_to_tensor(image.resize(size, Image.BILINEAR, box=box))
    ids = pil_to_tensor(Image.fromarray(label).resize(size, Image.NEAREST, box=box))
    outside = [0, 0, *(crop[::-1] - size)]                  # left, top, right, bottom
    pixels = pad(colour_jitter(pixels, random), outside, fill)
    ids = pad(ids, outside, IGNORE)[0].long()
    flipped = [-1] if random.random() < .5 else []
    return pixels.flip(flipped), ids.flip(flipped)


def shuffled(n, seed, i):
    """The i-th of an endless stream that has each of n numbers once per epoch."""
    return np.random.default_rng((seed, i // n, 1)).permutation(n)[i % n]


class SourceCrops(Dataset):
    """An endless stream of augmented crops of some data sets. Item i depends on (seed, i) alone, so
    a run that goes on sees what an uninterrupted one sees."""

    def __init__(self, names, seed, crop, scale, fill=(0, 0, 0)):
        self.found = [(*pair, name) for name in names for pair in common.pairs(name, "train")]
        self.seed, self.crop, self.scale, self.fill = seed, crop, scale, fill

    def __getitem__(self, i):
        image_path, label_path, name = self.found[shuffled(len(self.found), self.seed, i)]
        image = common.read_image(image_path)
        label = common.read_label(label_path, name, image.size)
        random = np.random.default_rng((self.seed, i, 2))
        return scale_and_crop(image, label, random, self.crop, self.scale, self.fill)


def batches(dataset, size, first, last, workers):
    """Batches number first to last - 1 of an endless dataset; every process has its share."""
    if size % common.PROCESSES:
        raise Stop(f"{common.PROCESSES} processes cannot share {size} images per step evenly")
    items = range(first * size + common.RANK, last * size, common.PROCESSES)
    return DataLoader(dataset, size // common.PROCESSES, sampler=items, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


# ---------------------------------------------------------------------------- encoder
def load_library(name):
    """The encoder that LIBRARY:MODEL names -> (module, mean, std of its pictures). Raises Stop."""
    library, _, model = name.partition(":")
    if library == "open_clip":                          # a CNN tower, NAME/TAG
        import open_clip
        local = model.startswith("local-dir:")
        model, tag = (model, None) if local else model.rsplit("/", 1)
        tower = open_clip.create_model(model, pretrained=tag, require_pretrained=True).visual
        return tower, tower.image_mean, tower.image_std
    if library == "timm":                               # a CNN, or a plain ViT
        import timm
        options = {"pretrained": True, "features_only": True, "out_indices": (-4, -3, -2, -1)}
        body = timm.create_model(model, **options)
        about, strides = body.pretrained_cfg, body.feature_info.reduction()
        if strides[0] == strides[3]:
            body = PlainViT(timm.create_model(model, dynamic_img_size=True, **options), strides[0])
        return body, about["mean"], about["std"]
    if library == "transformers":                       # a SegFormer
        from transformers import SegformerModel
        body = SegformerModel.from_pretrained(model.removeprefix("local-dir:"))
        return body, (.485, .456, .406), (.229, .224, .225)
    raise Stop(f"ENCODER={name}: expected open_clip:, timm: or transformers: and a model")


class PlainViT(nn.Module):
    """A ViT of timm as a pyramid: the ends of its blocks' four quarters, resized to the strides."""

    def __init__(self, body, patch):
        super().__init__()
        self.body, self.scale = body, patch / 16
        depth = len(body.feature_info.info)
        body.out_indices = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]

    def forward(self, x):
        blocks = self.body(F.interpolate(x, scale_factor=self.scale, mode="bicubic"))
        return [F.interpolate(block, scale_factor=factor, mode="bilinear")
                for block, factor in zip(blocks, (4, 2, 1, .5))]


class Encoder(nn.Module):
    """E of paper 3.1: four feature maps, at strides 4, 8, 16 and 32. name: LIBRARY:MODEL. frozen:
    no gradients, and always in eval mode. Raises Stop if the weights cannot be had."""

    def __init__(self, name, frozen=True):
        super().__init__()
        self.name, self.is_pretrained = name, True          # the weights are still the library's
        self.library = name.partition(":")[0]
        with common.explain(f"the encoder {name} could not be loaded", "connect to the hub once, "
                            f"or name a folder: --ENCODER={self.library}:local-dir:PATH"):
            self.body, mean, std = load_library(name)
        self.body.to(memory_format=torch.channels_last)     # a fifth faster on a CPU
        self.fill = tuple(round(255 * m) for m in mean)     # a padding that is 0 once normalised
        mean, std = torch.tensor((mean, std)).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.freeze(True)
        self.channels = [maps.shape[1] for maps in self(torch.zeros(1, 3, 64, 64))]
        self.freeze(frozen)

    def freeze(self, frozen):
        self.frozen = frozen
        self.is_pretrained = self.is_pretrained and frozen
        self.requires_grad_(not frozen).train()
        if not frozen and hasattr(self.body, "set_grad_checkpointing"):
            self.body.set_grad_checkpointing()      # ConvNeXt-L: 27 GB less

    def train(self, mode=True):
        # frozen: neither BatchNorm's statistics nor DropPath may move
        return super().train(mode and not self.frozen)

    def forward(self, images):
        """uint8 (B, 3, H, W), H and W multiples of 32 -> 4 maps (B, C, H / stride, W / stride)"""
        x = (images / 255 - self.mean) / self.std
        if self.library == "open_clip":
            maps = self.body.forward_intermediates(x, indices=4, intermediates_only=True)
            return maps["image_intermediates"]
        if self.library == "transformers":
            return self.body(x, output_hidden_states=True).hidden_states
        return self.body(x)


# ---------------------------------------------------------------------------- decoder
def convolution(channels, dim, size, **options):
    """A convolution that begins as Mask2Former's (c2_xavier_fill)."""
    layer = nn.Conv2d(channels, dim, size, padding=size // 2, **options)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def resize(maps, size):
    return F.interpolate(maps, size, mode="bilinear")


def position(maps):
    """Mask2Former's sine code of maps (B, D, h, w): half for y, half for x -> (1, h * w, D)."""
    dim, height, width = maps.shape[1:]
    y = torch.arange(1, height + 1, device=maps.device) / height
    x = torch.arange(1, width + 1, device=maps.device) / width
    grid = 2 * torch.pi * torch.cartesian_prod(y, x)[..., None]
    angle = grid / 10_000 ** (torch.arange(dim // 4, device=maps.device) / (dim // 4))
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(1)[None]


class PixelLayer(nn.Module):
    """A layer of the pixel decoder: a depthwise convolution mixes each map with its neighbours in
    scale, then a feed-forward at every pixel; each with a residual, then a norm. It stands where
    Mask2Former has deformable attention over the same three strides."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.mix = convolution(dim, dim, 5, groups=dim)
        self.feed = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, dim // 4), dim) for _ in range(2))

    def forward(self, maps):
        """Maps (B, D, h, w) at strides 8, 16, 32 -> the same"""
        finer = [0, *(F.avg_pool2d(x, 2) for x in maps[:-1])]
        coarser = [*(F.interpolate(x, scale_factor=2, mode="bilinear") for x in maps[1:]), 0]
        out = []
        for x, fine, coarse in zip(maps, finer, coarser):
            x = self.norms[0](x + self.mix(x + fine + coarse))
            out.append(self.norms[1](x + self.feed(x)))
        return out


class QueryLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each with a residual, then a norm."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_ = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries, embed, memory, code, hidden):
        """hidden bool (B, Q, N): where a query must not attend"""
        hidden = hidden.repeat_interleave(self.cross.num_heads, 0)
        attended, _ = self.cross(queries + embed, memory + code, memory, attn_mask=hidden,
                                 need_weights=False)
        queries = self.norms[0](queries + attended)
        q = queries + embed
        attended, _ = self.self_(q, q, queries, need_weights=False)
        queries = self.norms[1](queries + attended)
        return self.norms[2](queries + self.feed(queries))


class Decoder(nn.Module):
    """D of paper 3.1: Mask2Former's, with PixelLayers in place of deformable attention. channels:
    of the encoder's four maps; classes: C, without "no object"."""

    def __init__(self, channels, classes, dim, queries, layers, hidden, pixel_layers, heads=8):
        super().__init__()
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries,
                          layers=layers, hidden=hidden, pixel_layers=pixel_layers, heads=heads)

        def normed(channels, size):
            layer = convolution(channels, dim, size)
            return nn.Sequential(layer, nn.GroupNorm(min(32, dim // 4), dim))
        self.lateral = nn.ModuleList(normed(c, 1) for c in channels)
        self.pixel_layers = nn.ModuleList(PixelLayer(dim, hidden) for _ in range(pixel_layers))
        self.smooth = nn.ModuleList(normed(dim, 3) for _ in channels)
        self.mask_features = convolution(dim, dim, 1)
        self.layers = nn.ModuleList(QueryLayer(dim, heads, hidden) for _ in range(layers))
        # Xavier as in Mask2Former; PixelLayer.mix, which it does not have, begins small with it
        for part in (*self.lateral[1:], *self.pixel_layers, *self.layers):
            for weight in part.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
        self.query = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(3, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, classes + 1)
        self.mask_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim),
                                       nn.ReLU(), nn.Linear(dim, dim))

    def pixels(self, features):
        """Four maps -> D-channel maps at strides 32, 16, 8, and the mask features at stride 4."""
        fine, *maps = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for layer in self.pixel_layers:
            maps = layer(maps)
        out = []
        for smooth, x in zip(self.smooth, [*reversed(maps), fine]):     # an FPN, coarse to fine
            if out:
                x = x + resize(out[-1], x.shape[-2:])
            out.append(smooth(x).relu())
        return out[:3], self.mask_features(out[3])

    def forward(self, features):
        """-> class logits (L, B, Q, C+1), mask logits (L, B, Q, H/4, W/4): L predictions, one
        before the first layer and one after each."""
        levels, pixels = self.pixels(features)
        codes = [position(level) for level in levels]
        queries = self.query.weight.expand(len(pixels), -1, -1)
        states, masks = [], []
        for i in range(len(self.layers) + 1):
            states.append(self.norm(queries))
            masks.append(torch.einsum("bqd,bdhw->bqhw", self.mask_head(states[-1]), pixels))
            if i == len(self.layers):
                return self.class_head(torch.stack(states)), torch.stack(masks)
            level = levels[i % 3]
            # a query attends where its own mask is; where that is empty, everywhere
            hidden = resize(masks[-1].detach().float(), level.shape[-2:]).flatten(2) <= 0
            hidden &= ~hidden.all(-1, keepdim=True)
            memory = level.flatten(2).mT + self.level_embed.weight[i % 3]
            queries = self.layers[i](queries, self.query_embed.weight, memory, codes[i % 3], hidden)


def semantic(class_logits, mask_logits, size):
    """Class scores of every pixel: the sum over queries of softmax(class) x sigmoid(mask).
    Logits (B, Q, C+1), (B, Q, h, w) -> (B, C, *size)"""
    likely = class_logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", likely, resize(mask_logits.float(), size).sigmoid())


@torch.no_grad()
def predict(encoder, decoder, images, half=False):
    """uint8 (B, 3, H, W) of any size -> class scores (B, C, H, W). half: bfloat16."""
    height, width = images.shape[-2:]
    padded = pad(images, [0, 0, -width % 32, -height % 32], encoder.fill)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        classes, masks = decoder(encoder(padded))
    return semantic(classes[-1], masks[-1], padded.shape[-2:])[..., :height, :width]


# ---------------------------------------------------------------------------- loss (eq. 1)
def sample(maps, points, shape):
    """Bilinear values of maps (N, M, h, w) at the pixels `points` (N, P) of images of `shape`
    (H, W) -> (N, M, P)"""
    x = (points % shape[1] + .5) / shape[1]
    y = (points // shape[1] + .5) / shape[0]
    grid = torch.stack((x, y), -1)[:, :, None] * 2 - 1
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def mask_costs(masks, labels, image, points, classes):
    """Cross-entropy and dice between masks and the regions of classes, each with each.

    masks (N, Q, h, w) of the images number `image` (N,), labels (B, H, W), points (N, P): the
    pixels that are compared; IGNORE among them takes no part. classes (C,), or (N, 1, C) if they
    differ -> two tensors (N, Q, C)"""
    ids = labels.flatten(1)[image[:, None], points][..., None]
    target, valid = (ids == classes).float(), (ids != IGNORE).float()           # (N, P, C or 1)
    logits = sample(masks, points, labels.shape[1:])                            # (N, Q, P)
    # the cross-entropy of a logit x with a target t is softplus(x) - x t
    entropy = F.softplus(logits) @ valid - logits @ target
    entropy = entropy / valid.sum(1, keepdim=True).clamp(min=1)
    p = logits.sigmoid()
    dice = 1 - (2 * p @ target + 1) / (p @ valid + target.sum(1, keepdim=True) + 1)
    return entropy, dice


@torch.no_grad()
def match(class_logits, mask_logits, labels, points, weights):
    """Hungarian matching of the classes that an image holds to queries, in every layer.

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels (B, H, W), points (B, P).
    weights: of class, mask and dice -> int64 (4, M): layer, image, query, class of every match"""
    layers, batch = class_logits.shape[:2]
    likely = class_logits.flatten(0, 1).softmax(-1)[..., :-1]
    classes = torch.arange(likely.shape[-1], device=labels.device)
    image = torch.arange(batch, device=labels.device).repeat(layers)
    entropy, dice = mask_costs(mask_logits.flatten(0, 1), labels, image, points[image], classes)
    cost = weights[1] * entropy + weights[2] * dice - weights[0] * likely       # (L * B, Q, C)
    present = torch.zeros(batch, 256, dtype=torch.bool, device=labels.device)
    present = present.scatter(1, labels.flatten(1), True)[image][:, None, :len(classes)]
    cost = torch.where(present, cost.nan_to_num(), torch.inf)
    found = []
    for i, table in enumerate(cost.cpu().numpy()):              # waits for the GPU, once
        columns = np.flatnonzero(np.isfinite(table[0]))
        for query, k in zip(*linear_sum_assignment(table[:, columns])):
            found.append((*divmod(i, batch), query, columns[k]))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T.to(labels.device)


@torch.no_grad()
def uncertain_points(masks, labels, image, n):
    """Pixels (M, n) at which masks (M, h, w) of images number `image` (M,) are taught: of three
    times as many random ones those where the mask is least sure, and a quarter at random, as
    Mask2Former. The masks of one image share the random pixels: that saves most of the drawing.
    None of the uncertain ones is of IGNORE while others are left."""
    def draw(count):
        return torch.randint(labels[0].numel(), (len(labels), count), device=labels.device)[image]
    candidates, uncertain = draw(3 * n), 3 * n // 4
    others = draw(n - uncertain)
    sure = sample(masks[:, None], candidates, labels.shape[1:])[:, 0].abs()
    sure[labels.flatten(1)[image[:, None], candidates] == IGNORE] = torch.inf
    least = sure.topk(uncertain, largest=False, sorted=False).indices
    return torch.cat((candidates.gather(1, least), others), 1)


@torch.no_grad()
def taught_queries(mask_logits, labels):
    """Which queries may be taught "no object" -> bool (L, B, Q): not in an image without any
    label, nor where the mask lies mostly on IGNORE, for nobody knows what is there."""
    small = F.interpolate(labels[:, None].float(), mask_logits.shape[-2:])[:, 0]
    balance = torch.where(small == IGNORE, 1., -1.)
    taught = [torch.einsum("bqhw,bhw->bq", (layer > 0).float(), balance) <= 0
              for layer in mask_logits]
    return torch.stack(taught) & (labels != IGNORE).flatten(1).any(1, keepdim=True)


def mask_loss(class_logits, mask_logits, labels, n_points, weights, no_object, unlabelled="ignore"):
    """Paper eq. 1, for source labels and for pseudo-labels alike (3.3).

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels int64 (B, H, W).
    unlabelled="ignore": pixels of IGNORE take no part. "negative", officially: they belong to no
    mask -> loss, {"class", "mask", "dice"}: scalars, each summed over the layers. Random points
    come from torch's default generator."""
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    if unlabelled == "negative":
        labels = labels.masked_fill(labels == IGNORE, IGNORE - 1)       # an id that no class has
    points = torch.randint(labels[0].numel(), (len(labels), n_points), device=labels.device)
    layer, image, query, cls = match(class_logits, mask_logits, labels, points, weights)
    # the class of every query: matched ones learn theirs, the others "no object"
    wanted = torch.full(class_logits.shape[:3], class_logits.shape[-1] - 1, device=labels.device)
    wanted[layer, image, query] = cls
    weight = no_object * taught_queries(mask_logits, labels)
    weight[layer, image, query] = 1
    entropy = F.cross_entropy(class_logits.movedim(-1, 1), wanted, reduction="none")
    of_class = (entropy * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)
    # the mask of every matched query: cross-entropy and dice at some of its pixels
    masks = mask_logits[layer, image, query]
    points = uncertain_points(masks, labels, image, n_points)
    entropy, dice = mask_costs(masks[:, None], labels, image, points, cls[:, None, None])
    n = mean_of_processes(max(1, len(cls) / len(class_logits)))
    terms = {"class": of_class.sum(), "mask": entropy.sum() / n, "dice": dice.sum() / n}
    return sum(w * term for w, term in zip(weights, terms.values())), terms


# ---------------------------------------------------------------------------- optimiser
def make_optimizer(modules, weight_decay):
    """AdamW over what trains, and those parameters. modules: [(module, factor of the learning
    rate)]. Norms and embeddings do not decay, as Mask2Former."""
    groups = []
    for top, factor in modules:
        for module in top.modules():
            still = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
            decay = 0. if still else weight_decay
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                groups.append({"params": own, "weight_decay": decay, "factor": factor})
    trained = [p for group in groups for p in group["params"]]
    print(f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters train")
    return torch.optim.AdamW(groups), trained


def set_learning_rate(optimizer, lr, step, total, warmup, schedule):
    """Linear warm-up, then "constant" or "poly" (power 0.9, to zero)."""
    rate = lr * min(1, (step + 1) / max(1, warmup))
    if schedule == "poly":
        rate *= (1 - step / total) ** .9
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def distributed(module):
    """The module; under torchrun, if it trains, behind torch's DistributedDataParallel."""
    if common.PROCESSES == 1 or not next(module.parameters()).requires_grad:
        return module
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def mean_of_processes(number):
    """A number's mean over the processes: Mask2Former normalises its losses by it."""
    if common.PROCESSES == 1:
        return number
    total = torch.tensor(float(number), device=common.device())
    torch.distributed.all_reduce(total)
    return total / common.PROCESSES


# ---------------------------------------------------------------------------- saving and loading
def network(encoder, decoder):
    """What is saved: the decoder, and the encoder if its weights are no longer the library's."""
    parts = {"decoder": decoder}
    if not encoder.is_pretrained:
        parts["encoder"] = encoder
    return nn.ModuleDict(parts)


def save_model(path, encoder, decoder, run):
    """A finished network as one safetensors file that explains itself."""
    about = {"stage": run.stage, "preset": common.PRESET, "constants": run.constants,
             "classes": CLASSES, "encoder": encoder.name, "decoder": decoder.sizes}
    with common.whole(path) as part:
        safetensors.torch.save_model(network(encoder, decoder), part, {"about": json.dumps(about)})


def load_model(path):
    """-> encoder, decoder (on the CPU, in eval mode), about: {"stage", "preset", "constants",
    "classes", "encoder", "decoder"} of the run that saved them. Raises Stop."""
    with common.explain(f"{path} is damaged, or no network of this version of the repo",
                        "train it again into another --OUT"):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        if about["classes"] != CLASSES:
            raise Stop(f"{path} knows other classes (PRESET={about['preset']}): "
                       + ", ".join(about["classes"]))
        weights = safetensors.torch.load_file(path)
        assert all(value.isfinite().all() for value in weights.values()), "not a number in it"
        encoder, decoder = Encoder(about["encoder"]), Decoder(**about["decoder"])
        encoder.is_pretrained = not any(name.startswith("encoder.") for name in weights)
        network(encoder, decoder).load_state_dict(weights)
    return encoder.eval(), decoder.eval(), about


class Bookkeeping:
    """What a training stage keeps besides the method: checkpoint.pt, log.jsonl, a progress bar.
    parts: {name: module or optimiser}: they go on from checkpoint.pt if there is one. Raises Stop
    if that is damaged or of another run."""

    def __init__(self, run, parts, total):
        self.run, self.parts, self.total = run, parts, total
        self.first, self.lines, self.sums = 0, [], Counter()
        self.checkpoint = run.out / "checkpoint.pt"
        if not self.checkpoint.exists():
            return
        with common.explain(f"{self.checkpoint} is damaged", "remove it to begin again"):
            assert zipfile.ZipFile(self.checkpoint).testzip() is None    # torch.load checks no sums
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.first, self.lines = state["step"], state["lines"]
            assert 0 < self.first < total, f"step {self.first}"
            run.compare(state["constants"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        print(f"goes on from step {self.first}")

    def steps(self, loader):
        """(step, batch) of a loader's batches; the time that they take counts as waiting."""
        bar = tqdm(loader, initial=self.first, total=self.total, disable=common.RANK > 0 or None)
        self.logged, self.since = self.first, time.time()
        before = self.since
        for step, batch in enumerate(bar, self.first):
            self.sums["wait"] += time.time() - before
            yield step, batch
            before = time.time()

    def record(self, done, numbers, every):
        """Add up {name: scalar tensor} of a step on the GPU; log the means every so many steps."""
        for name, value in numbers.items():
            self.sums[name] += value.detach()
        if done % every == 0 or done == self.total:
            self.log(done)

    def log(self, done):
        """Write the means since the last line. Raises Stop if one is not a number."""
        self.sums["seconds"] = time.time() - self.since
        line = {"step": done}
        for name, total in self.sums.items():                   # waits for the GPU
            line[name] = round(float(total) / (done - self.logged), 5)
            if not np.isfinite(line[name]):
                raise Stop(f"not a number before step {done}. {self.checkpoint}, if there is one, "
                           "is from before. Try a smaller LR, or HALF=False")
        if line.get("loss") == 0:
            raise Stop("the loss is 0: no pixel has a label. tests/check_data.py shows a data set")
        self.lines.append(line)
        common.write_text(self.run.out / "log.jsonl", "\n".join(map(json.dumps, self.lines)) + "\n")
        tqdm.write(json.dumps(line))
        self.sums.clear()
        self.logged, self.since = done, time.time()

    def save(self, done):
        if self.sums:
            self.log(done)              # what is not a number is not saved
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": done, "lines": self.lines, "constants": self.run.constants}
        with common.whole(self.checkpoint) as part:
            torch.save(state, part)

    def finish(self, encoder, decoder):
        """Draw the losses, save the network, and forget the checkpoint."""
        axes = Figure((8, 4), layout="constrained").subplots()
        steps = [line["step"] for line in self.lines]
        for name in ("loss", "class", "mask", "dice"):
            axes.semilogy(steps, [line[name] for line in self.lines], label=name)
        axes.set_xlabel("step")
        axes.legend()
        with common.whole(self.run.out / "loss.png") as part:
            axes.figure.savefig(part, format="png")
        self.run.finish()
        save_model(self.run.result, encoder, decoder, self.run)     # last: it means finished
        if common.RANK == 0:
            self.checkpoint.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the source stage
def preview(path, encoder, decoder, crops, half):
    """image | prediction | truth of some source crops."""
    images, labels = default_collate(crops)
    encoder.eval()              # the decoder has nothing that differs between the modes
    guess = predict(encoder, decoder, images.to(encoder.mean.device), half).argmax(1)
    encoder.train()
    columns = images.permute(0, 2, 3, 1), guess.byte().cpu(), labels.byte()
    titles = "image", "prediction", "truth"
    rows = [list(zip(titles, arrays)) for arrays in zip(*map(np.asarray, columns))]
    common.save_sheet(path, rows)


def main():
    run = common.Run(globals(), "model.safetensors", classes=CLASSES)
    if run.finished():
        return
    device = common.device()
    crops = SourceCrops(SOURCE, SEED, CROP, SCALE)
    encoder = Encoder(ENCODER, FREEZE_ENCODER).to(device)
    crops.fill = encoder.fill
    torch.manual_seed(SEED)
    sizes = DIM, QUERIES, LAYERS, HIDDEN, PIXEL_LAYERS
    decoder = Decoder(encoder.channels, len(CLASSES), *sizes).to(device)
    optimizer, trained = make_optimizer([(decoder, 1), (encoder, ENCODER_LR)], WEIGHT_DECAY)
    parts = {"decoder": decoder, "optimizer": optimizer}
    if not FREEZE_ENCODER:
        parts["encoder"] = encoder

    run.start()
    book = Bookkeeping(run, parts, ITERATIONS)
    E = distributed(encoder)
    D = distributed(decoder)
    loader = batches(crops, BATCH, book.first, ITERATIONS, WORKERS)
    for step, batch in book.steps(loader):
        torch.manual_seed(SEED * 10 ** 9 + step)            # a step repeats when a run goes on
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        # the decoder predicts masks and their classes from the frozen features
        with torch.autocast(device.type, torch.bfloat16, enabled=HALF):
            classes, masks = D(E(images))
        # eq. 1
        loss, terms = mask_loss(classes, masks, labels, POINTS, LOSS_WEIGHTS, NO_OBJECT, UNLABELLED)
        set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, SCHEDULE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()

        done = step + 1
        book.record(done, {"loss": loss, **terms, "norm": norm}, LOG_EVERY)
        if done % PREVIEW_EVERY == 0 or done == ITERATIONS:
            shown = [crops[ITERATIONS * BATCH + i] for i in range(4)]
            preview(run.out / f"preview_{done:06d}.png", encoder, decoder, shown, HALF)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            book.save(done)
    book.finish(encoder, decoder)


if __name__ == "__main__":
    common.launch(globals())
