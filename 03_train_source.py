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

Check: the loss falls within the first hundred steps, and the second column of the previews begins
to look like the third."""
import itertools
import json
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import common
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from common import (CLASSES, DATA, IGNORE, MINIATURES, RUN, Stop, expect, expect_kind,
                    expect_numbers, preset)
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2.functional import adjust_hue, pad, pil_to_tensor
from tqdm import tqdm

# ---------------------------------------------------------------------------- constants
# functions take them as arguments and never read them: in 04 and 05 they are not those of the run
# paper: of gta, synthia and cityscapes, unless one of them is named; official: the authors' code
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
LR = preset(toy=1.5e-3, paper=1e-5, cityscapes=1e-4)                              # paper 4.1
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


def check():
    """Refuse what would fail late, hang, or train nonsense in silence. Raises Stop."""
    check_source(SOURCE)
    expect_kind(str, OUT=OUT, ENCODER=ENCODER)
    expect_kind(bool, FREEZE_ENCODER=FREEZE_ENCODER, HALF=HALF)
    expect_numbers(int, 32, 4096, DIM=DIM)
    expect(DIM % 32 == 0, f"{DIM=}: expected a multiple of 32")
    expect_numbers(int, len(CLASSES), 10_000, QUERIES=QUERIES)
    expect_numbers(int, 0, 256, LAYERS=LAYERS, PIXEL_LAYERS=PIXEL_LAYERS, WORKERS=WORKERS)
    expect_numbers(int, 1, 100_000, HIDDEN=HIDDEN, BATCH=BATCH)
    expect_numbers(float, 0, 1000, 3, LOSS_WEIGHTS=LOSS_WEIGHTS)
    expect(any(LOSS_WEIGHTS), f"{LOSS_WEIGHTS=}: one of them must be more than 0")
    expect_numbers(float, 0, 1, NO_OBJECT=NO_OBJECT)
    expect_numbers(int, 4, 10 ** 6, POINTS=POINTS)
    expect(UNLABELLED in ("ignore", "negative"), f"{UNLABELLED=}: expected ignore or negative")
    expect_numbers(int, 1, 10 ** 8, ITERATIONS=ITERATIONS, LOG_EVERY=LOG_EVERY,
                   SAVE_EVERY=SAVE_EVERY, PREVIEW_EVERY=PREVIEW_EVERY)
    expect_numbers(int, 32, 8192, 2, CROP=CROP)
    expect(not any(side % 32 for side in CROP), f"{CROP=}: rows, columns, multiples of 32")
    expect_numbers(float, .01, 100, 2, SCALE=SCALE)
    expect(SCALE[0] <= SCALE[1], f"{SCALE=}: expected the lowest, then the highest")
    expect_numbers(float, 1e-12, 1, LR=LR)
    expect_numbers(float, 0, 100, ENCODER_LR=ENCODER_LR, WEIGHT_DECAY=WEIGHT_DECAY)
    expect(SCHEDULE in ("constant", "poly"), f"{SCHEDULE=}: expected constant or poly")
    expect_numbers(int, 0, 10 ** 9, SEED=SEED, WARMUP=WARMUP)
    expect_numbers(float, 1e-9, 10 ** 6, GRAD_CLIP=GRAD_CLIP)
    check_processes(BATCH)


def check_source(names):
    """SOURCE: a tuple of data sets, each named once, whatever its spelling. Raises Stop."""
    expect_kind(tuple, SOURCE=names)
    expect(names and "folder:" not in names, f"SOURCE={names!r}: expected data sets, as ('gta',)")
    folders = [Path(name.removeprefix("folder:")).resolve() for name in names]
    expect(len(set(folders)) == len(names), f"SOURCE={','.join(names)}: a data set is named twice")


def check_processes(pictures):
    """torchrun's processes deal the pictures of a step among them. Raises Stop."""
    expect(pictures % common.PROCESSES == 0, f"{common.PROCESSES} processes cannot share "
           f"{pictures} pictures per step evenly: torchrun with a number that divides {pictures}")


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
    outside, where the label is IGNORE -> uint8 (3, h, w), uint8 (h, w)"""
    width, height = image.size
    crop_height, crop_width = crop
    factor = random.uniform(*scale)
    # how much of the scaled image the crop holds, and how much of the image itself that is
    inside_width = max(1, min(crop_width, round(width * factor)))
    inside_height = max(1, min(crop_height, round(height * factor)))
    seen_width, seen_height = min(inside_width / factor, width), min(inside_height / factor, height)
    top = random.uniform(0, height - seen_height)
    left = random.uniform(0, width - seen_width)
    box = left, top, left + seen_width, top + seen_height
    size = inside_width, inside_height
    pixels = pil_to_tensor(image.resize(size, Image.BILINEAR, box=box))
    ids = pil_to_tensor(Image.fromarray(label).resize(size, Image.NEAREST, box=box))
    outside = [0, 0, crop_width - inside_width, crop_height - inside_height]    # right, below
    pixels = pad(colour_jitter(pixels, random), outside, fill)
    ids = pad(ids, outside, IGNORE)[0]
    if random.random() < .5:
        pixels, ids = pixels.flip(-1), ids.flip(-1)
    return pixels, ids


def shuffled(n, key, i):
    """The i-th of an endless stream that has each of n numbers once per epoch. key: a tuple of
    whole numbers; another key gives another order."""
    return np.random.default_rng((*key, i // n)).permutation(n)[i % n]


class SourceCrops(Dataset):
    """An endless stream of augmented crops of some data sets. Item i depends on i and on the key,
    a tuple (seed, stage), alone, so that a resumed run sees what an uninterrupted one sees."""

    def __init__(self, names, key, crop, scale, fill=(0, 0, 0)):
        self.found = []
        for name in names:
            self.found += [(*pair, name) for pair in common.pairs(name, "train")]
        self.key, self.crop, self.scale, self.fill = key, crop, scale, fill

    def __getitem__(self, i):
        which = shuffled(len(self.found), (*self.key, 1), i)
        image, label = common.read_pair(*self.found[which])
        random = np.random.default_rng((*self.key, 2, i))
        return scale_and_crop(image, label, random, self.crop, self.scale, self.fill)

    def digest(self):
        """What the stream is made of, as a text: see common.files_digest."""
        columns = sorted({common.LAYOUTS.get(name, common.FOLDER)[0] for *_, name in self.found})
        files = common.files_digest(path for *paths, _ in self.found for path in paths)
        return f"{files}, ids of columns {columns}"


def batches(dataset, size, first, last, workers, offset=0):
    """Batches number first to last - 1 of an endless dataset, of `size` items. Several processes
    deal them one by one, from process `offset` on; one that gets no item has None as its batch."""
    mine = [k for k in range(size) if (offset + k) % common.PROCESSES == common.RANK]
    if not mine:
        return itertools.repeat(None, last - first)
    items = [i for i in range(first * size, last * size) if i % size in mine]
    return DataLoader(dataset, len(mine), sampler=items, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


# ---------------------------------------------------------------------------- encoder
fits = "What fits: CNNs of open_clip and timm, plain ViTs of timm, SegFormers of transformers"


def load_library(name):
    """The encoder that LIBRARY:MODEL names -> (module, mean, std of its pictures). Raises Stop."""
    library, _, model = name.partition(":")
    if library == "open_clip":                          # a CNN tower, NAME/TAG
        import open_clip
        tag = None
        if not model.startswith(("local-dir:", "hf-hub:")):
            model, _, tag = model.rpartition("/")
            expect(model, f"ENCODER={name}: expected open_clip:NAME/TAG, as "
                          "open_clip:RN50-quickgelu/openai")
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
        from transformers import AutoModel, SegformerModel
        from transformers.utils import logging
        logging.disable_progress_bar()
        body = AutoModel.from_pretrained(model.removeprefix("local-dir:"), dtype=torch.float32)
        expect(isinstance(body, SegformerModel), f"ENCODER={name} is no SegFormer. {fits}")
        return body, (.485, .456, .406), (.229, .224, .225)
    raise Stop(f"ENCODER={name}: expected open_clip:, timm: or transformers: and a model")


class PlainViT(nn.Module):
    """A ViT of timm as a pyramid: its features after each quarter of the blocks, resized."""

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
        with common.explain(f"the encoder {name} gives no feature maps", fits):
            maps = self(torch.zeros(1, 3, 64, 64))
        sizes = [tuple(one.shape[2:]) for one in maps]
        expect(sizes == [(16, 16), (8, 8), (4, 4), (2, 2)],
               f"the encoder {name} has no maps at strides 4, 8, 16 and 32. {fits}")
        self.channels = [one.shape[1] for one in maps]
        self.freeze(frozen)

    def freeze(self, frozen):
        self.frozen = frozen
        self.is_pretrained = self.is_pretrained and frozen
        self.requires_grad_(not frozen).train()
        has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in self.modules())
        if not frozen and hasattr(self.body, "set_grad_checkpointing") and not has_batch_norm:
            self.body.set_grad_checkpointing()      # ConvNeXt-L: 27 GB less. It computes twice,
            #                                         and BatchNorm's statistics would move twice

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


def position_code(maps):
    """Mask2Former's sines and cosines of a pixel's place in maps (B, D, h, w): one half of the
    channels for y, the other for x -> (1, h * w, D)."""
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

    def __init__(self, dim, width):
        super().__init__()
        self.mix = convolution(dim, dim, 5, groups=dim)
        self.feed = nn.Sequential(nn.Conv2d(dim, width, 1), nn.ReLU(), nn.Conv2d(width, dim, 1))
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

    def __init__(self, dim, heads, width):
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries, query_position, pixels, position, blocked):
        """queries (B, Q, D), pixels (B, N, D), their positions, blocked bool (B, Q, N): where a
        query must not attend -> queries"""
        blocked = blocked.repeat_interleave(self.cross_attention.num_heads, 0)
        attended, _ = self.cross_attention(queries + query_position, pixels + position, pixels,
                                           attn_mask=blocked, need_weights=False)
        queries = self.norms[0](queries + attended)
        q = queries + query_position
        attended, _ = self.self_attention(q, q, queries, need_weights=False)
        queries = self.norms[1](queries + attended)
        return self.norms[2](queries + self.feed(queries))


class Decoder(nn.Module):
    """D of paper 3.1: Mask2Former's, with PixelLayers in place of deformable attention. channels:
    of the encoder's four maps; classes: C, without "no object"."""

    def __init__(self, channels, classes, dim, queries, layers, width, pixel_layers, heads=8):
        super().__init__()
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries,
                          layers=layers, width=width, pixel_layers=pixel_layers, heads=heads)

        def normed(channels, size):
            layer = convolution(channels, dim, size)
            return nn.Sequential(layer, nn.GroupNorm(min(32, dim // 4), dim))
        self.lateral = nn.ModuleList(normed(c, 1) for c in channels)
        self.pixel_layers = nn.ModuleList(PixelLayer(dim, width) for _ in range(pixel_layers))
        self.smooth = nn.ModuleList(normed(dim, 3) for _ in channels)
        self.mask_features = convolution(dim, dim, 1)
        self.layers = nn.ModuleList(QueryLayer(dim, heads, width) for _ in range(layers))
        # Xavier as in Mask2Former; PixelLayer.mix, which it has not, gets small weights from it
        for part in (*self.lateral[1:], *self.pixel_layers, *self.layers):
            for weight in part.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
        self.query = nn.Embedding(queries, dim)
        self.query_position = nn.Embedding(queries, dim)
        self.level = nn.Embedding(3, dim)
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
        maps, mask_features = self.pixels(features)
        positions = [position_code(level) for level in maps]
        queries = self.query.weight.expand(len(mask_features), -1, -1)
        states, masks = [], []
        for i in range(len(self.layers) + 1):
            states.append(self.norm(queries))
            embedding = self.mask_head(states[-1])
            masks.append(torch.einsum("bqd,bdhw->bqhw", embedding, mask_features))
            if i == len(self.layers):
                return self.class_head(torch.stack(states)), torch.stack(masks)
            level = maps[i % 3]
            # a query attends where its own mask is; where that is empty, everywhere
            blocked = resize(masks[-1].detach().float(), level.shape[-2:]).flatten(2) <= 0
            blocked &= ~blocked.all(-1, keepdim=True)
            pixels = level.flatten(2).mT + self.level.weight[i % 3]
            queries = self.layers[i](queries, self.query_position.weight, pixels,
                                     positions[i % 3], blocked)


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


def mask_costs(logits, target, valid):
    """Cross-entropy and dice between masks and regions, each with each, at some points.

    logits (N, Q, P) of masks; target float (N, P, C), 1 where a point belongs to a region; valid
    float (N, P, 1), 0 where a point takes no part -> two tensors (N, Q, C)"""
    # the cross-entropy of a logit x with a target t is softplus(x) - x t
    mask_ce = F.softplus(logits) @ valid - logits @ target
    mask_ce = mask_ce / valid.sum(1, keepdim=True).clamp(min=1)
    p = logits.sigmoid()
    dice = 1 - (2 * p @ target + 1) / (p @ valid + target.sum(1, keepdim=True) + 1)
    return mask_ce, dice


@torch.no_grad()
def match(class_logits, mask_logits, labels, points, weights):
    """Hungarian matching of the classes that an image holds to queries, in every layer.

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels (B, H, W), points (B, P).
    weights: of class, mask and dice -> int64 (4, M): layer, image, query, class of every match"""
    layers, batch = class_logits.shape[:2]
    likely = class_logits.flatten(0, 1).softmax(-1)[..., :-1]
    classes = torch.arange(likely.shape[-1], device=labels.device)
    image_index = torch.arange(batch, device=labels.device).repeat(layers)
    ids = labels.flatten(1).gather(1, points)[image_index, :, None]             # (L * B, P, 1)
    logits = sample(mask_logits.flatten(0, 1), points[image_index], labels.shape[1:])
    mask_ce, dice = mask_costs(logits, (ids == classes).float(), (ids != IGNORE).float())
    cost = weights[1] * mask_ce + weights[2] * dice - weights[0] * likely       # (L * B, Q, C)
    present = torch.zeros(batch, 256, dtype=torch.bool, device=labels.device)
    present = present.scatter(1, labels.flatten(1), True)[image_index][:, None, :len(classes)]
    # a class that the image lacks costs infinity: its column is left out, with one transfer for all
    cost = torch.where(present, cost.nan_to_num(), torch.inf)
    found = []
    for i, table in enumerate(cost.cpu().numpy()):              # waits for the GPU, once
        columns = np.flatnonzero(np.isfinite(table[0]))
        for query, k in zip(*linear_sum_assignment(table[:, columns])):
            found.append((*divmod(i, batch), query, columns[k]))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T.to(labels.device)


@torch.no_grad()
def uncertain_points(masks, labels, image_index, n):
    """Pixels (M, n) at which masks (M, h, w) of images number image_index (M,) are taught, as in
    Mask2Former: three quarters are those of 3 n random pixels where the mask is least sure, IGNORE
    last; one quarter is random. The masks of one image share the random pixels, which saves most
    of the drawing."""
    def draw(count):
        shape = len(labels), count
        return torch.randint(labels[0].numel(), shape, device=labels.device)[image_index]
    candidates, uncertain = draw(3 * n), 3 * n // 4
    others = draw(n - uncertain)
    sure = sample(masks[:, None], candidates, labels.shape[1:])[:, 0].abs()
    sure[labels.flatten(1)[image_index[:, None], candidates] == IGNORE] = torch.inf
    least = sure.topk(uncertain, largest=False, sorted=False).indices
    return torch.cat((candidates.gather(1, least), others), 1)


@torch.no_grad()
def taught_queries(mask_logits, labels):
    """Which queries may be taught "no object" -> bool (L, B, Q): not those whose mask lies mostly
    on IGNORE, for nobody knows what is there."""
    small = F.interpolate(labels[:, None].float(), mask_logits.shape[-2:])[:, 0]
    balance = torch.where(small == IGNORE, 1., -1.)
    taught = [torch.einsum("bqhw,bhw->bq", (layer > 0).float(), balance) <= 0
              for layer in mask_logits]
    return torch.stack(taught)


def mask_loss(class_logits, mask_logits, labels, n_points, weights, no_object, unlabelled="ignore"):
    """Paper eq. 1, for source labels and for pseudo-labels alike (3.3).

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels int64 (B, H, W).
    unlabelled="ignore": pixels of IGNORE take no part. "negative", officially: they belong to no
    mask -> loss, {"class", "mask", "dice"}: scalars, each summed over the layers. Random points
    come from torch's default generator."""
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    has_label = (labels != IGNORE).flatten(1).any(1, keepdim=True)          # of the image
    if unlabelled == "negative":
        labels = labels.masked_fill(labels == IGNORE, IGNORE - 1)       # an id that no class has
    points = torch.randint(labels[0].numel(), (len(labels), n_points), device=labels.device)
    layer, image, query, cls = match(class_logits, mask_logits, labels, points, weights)
    # the class of every query: matched ones learn theirs, the others "no object"
    wanted = torch.full(class_logits.shape[:3], class_logits.shape[-1] - 1, device=labels.device)
    wanted[layer, image, query] = cls
    weight = no_object * (taught_queries(mask_logits, labels) & has_label)
    weight[layer, image, query] = 1
    class_ce = F.cross_entropy(class_logits.movedim(-1, 1), wanted, reduction="none")
    class_ce = (class_ce * weight).sum((1, 2)) / over_processes(weight.sum((1, 2)), 1e-6)
    # the mask of every matched query: cross-entropy and dice at some of its pixels
    masks = mask_logits[layer, image, query]
    points = uncertain_points(masks, labels, image, n_points)
    ids = labels.flatten(1)[image[:, None], points][..., None]
    target = (ids == cls[:, None, None]).float()
    logits = sample(masks[:, None], points, labels.shape[1:])
    mask_ce, dice = mask_costs(logits, target, (ids != IGNORE).float())
    n = over_processes(masks.new_full((), len(cls) / len(class_logits)), 1)
    terms = {"class": class_ce.sum(), "mask": mask_ce.sum() / n, "dice": dice.sum() / n}
    return sum(w * term for w, term in zip(weights, terms.values(), strict=True)), terms


def over_processes(total, least):
    """What a loss is divided by: a total over all processes, at least `least`, per process. The
    gradients' mean over the processes is then what one process would have for the whole batch."""
    return common.sum_of_processes(total).clamp(min=least) / common.PROCESSES


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


def trains(module):
    return any(p.requires_grad for p in module.parameters())


def distributed(module, partly_used=False):
    """The module; under torchrun, if it trains, behind torch's DistributedDataParallel."""
    if common.PROCESSES == 1 or not trains(module):
        return module
    warnings.filterwarnings("ignore", "Grad strides do not match")     # of channels-last maps
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=partly_used)


# ---------------------------------------------------------------------------- saving and loading
def network(encoder, decoder):
    """What is saved: the decoder, and the encoder if its weights are no longer the library's."""
    parts = {"decoder": decoder}
    if trains(encoder) or not encoder.is_pretrained:
        parts["encoder"] = encoder
    return nn.ModuleDict(parts)


def save_model(path, encoder, decoder, run):
    """A finished network as one safetensors file that explains itself."""
    about = {"format": 2, "stage": run.stage, "preset": common.PRESET,
             "constants": run.inherited | run.constants, "classes": CLASSES,
             "encoder": common.portable(encoder.name), "decoder": decoder.sizes}
    weights = network(encoder, decoder).state_dict()
    weights = {name: value.contiguous().clone() for name, value in weights.items()}    # none shared
    with common.whole(path) as part:
        part.write_bytes(safetensors.torch.save(weights, {"about": json.dumps(about)}))


def model_file(path):
    """The file of a network; of a run's folder its model.safetensors."""
    return Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)


def load_model(path):
    """-> encoder, decoder (on the CPU, in eval mode), about: {"stage", "preset", "constants",
    "classes", "encoder", "decoder"} of the run that saved them. Raises Stop."""
    path = model_file(path)
    expect(path.suffix == ".safetensors", f"{path} is no network: take a run's model.safetensors, "
           "which is there when the run is finished")
    path.open("rb").close()                 # what may not be opened is not damaged
    damaged, remedy = f"{path} is damaged", "train it again into another --OUT"
    with common.explain(damaged, remedy), safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        weights = safetensors.torch.load_file(path)
    expect(about.get("format") == 2, f"{path} is no network of this version of the repo: {remedy}")
    expect(about["classes"] == CLASSES, f"{path} knows other classes (PRESET={about['preset']}): "
           + ", ".join(about["classes"]))
    expect(all(value.isfinite().all() for value in weights.values()),
           f"{path} holds what is not a number: {remedy}")
    sizes = about["decoder"]
    expect(sizes["layers"] + sizes["pixel_layers"] <= len(weights), f"{damaged}: {remedy}")
    encoder = Encoder(common.located(about["encoder"]))
    encoder.is_pretrained = not any(name.startswith("encoder.") for name in weights)
    decoder = Decoder(**sizes)
    made = f"{path}, of {about['stage']},"
    with common.explain(f"{made} does not fit the network that 03 now defines", remedy):
        network(encoder, decoder).load_state_dict(weights)
    return encoder.eval(), decoder.eval(), about


class Progress:
    """Where a training stage stands: its step, log.jsonl, and checkpoint.pt, from which it resumes.
    parts: {name: module or optimiser}, what a checkpoint holds. Raises Stop."""

    def __init__(self, run, parts, total):
        self.run, self.parts, self.total = run, parts, total
        self.first, self.lines, self.sums = 0, [], Counter()
        self.checkpoint = run.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.resume()
        common.agree(f"begin at step {self.first}")

    def resume(self):
        damaged, remedy = f"{self.checkpoint} is damaged", "remove it to begin again"
        with common.explain(damaged, remedy):
            bad_file = zipfile.ZipFile(self.checkpoint).testzip()       # torch.load does not
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        expect(not bad_file and isinstance(state, dict) and {"lines", "constants"} <= set(state)
               and state.get("step") in range(1, self.total), f"{damaged}: {remedy}")
        self.run.compare(state["constants"])
        self.first, self.lines = state["step"], state["lines"]
        for name, part in self.parts.items():
            with common.explain(f"{self.checkpoint} does not fit today's scripts", remedy):
                part.load_state_dict(state[name])
            numbers = part.parameters() if isinstance(part, nn.Module) else ()
            expect(all(value.isfinite().all() for value in numbers),
                   f"{self.checkpoint} holds what is not a number: {remedy}")
        print(f"resuming at step {self.first}")

    def steps(self, loader):
        """(step, batch) of a loader's batches; the time that they take counts as waiting."""
        self.bar = tqdm(loader, initial=self.first, total=self.total, dynamic_ncols=True,
                        disable=common.RANK > 0 or None)
        self.logged, self.since = self.first, time.time()
        before = self.since
        for step, batch in enumerate(self.bar, self.first):
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
        """A line of the means since the last one. Raises Stop if one of them is not a number."""
        self.sums["seconds"] = time.time() - self.since
        sums = torch.stack([torch.as_tensor(value, dtype=torch.double, device=common.device())
                            for value in self.sums.values()])
        means = common.sum_of_processes(sums) / common.PROCESSES / (done - self.logged)
        means = means.tolist()                                      # waits for the GPU
        expect(np.isfinite(means).all(), f"not a number before step {done}. {self.checkpoint}, if "
               "there is one, is from before. Try a smaller LR, or HALF=False")
        line = {"step": done, **{name: round(mean, 5) for name, mean in zip(self.sums, means)}}
        self.lines.append(line)
        if common.RANK == 0:
            common.write_lines(self.run.out / "log.jsonl", self.lines)
        signs = "loss {loss:.2f} (class {class:.2f}, mask {mask:.2f}, dice {dice:.2f})"
        if "labelled" in line:
            signs += " | labelled {labelled:.2f}, changed {changed:.2f}"
        self.bar.set_postfix_str(signs.format(**line), refresh=False)
        tqdm.write(f"step {done}/{self.total} | {signs.format(**line)} | {line['seconds']:.2f} s")
        self.sums.clear()
        self.logged, self.since = done, time.time()

    def save(self, done):
        """Write checkpoint.pt; what is not a number is not saved."""
        if self.sums:
            self.log(done)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": done, "lines": self.lines, "constants": self.run.constants}
        if common.RANK == 0:
            with common.whole(self.checkpoint) as part:
                with common.explain(f"{self.checkpoint} cannot be written", common.FULL):
                    torch.save(state, part)


def finish(run, progress, encoder, decoder):
    """Draw the losses, save the network, and forget the checkpoint."""
    axes = Figure((8, 4), layout="constrained").subplots()
    steps = [line["step"] for line in progress.lines]
    for name in ("loss", "class", "mask", "dice"):
        axes.semilogy(steps, [line[name] for line in progress.lines], label=name)
    axes.set_xlabel("step")
    axes.legend()
    with common.whole(run.out / "loss.png") as part:
        axes.figure.savefig(part, format="png")
    run.finish()
    save_model(run.result, encoder, decoder, run)           # last: its presence means finished
    progress.checkpoint.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the source stage
def preview(path, encoder, decoder, crops, half):
    """image | prediction | truth of some source crops."""
    images, labels = default_collate(crops)
    encoder.eval()              # the decoder is alike in both modes
    guesses = predict(encoder, decoder, images.to(encoder.mean.device), half).argmax(1)
    encoder.train()
    rows = []
    for image, guess, label in zip(images.numpy(), guesses.byte().cpu().numpy(), labels.numpy()):
        rows.append([("image", image.transpose(1, 2, 0)), ("prediction", guess), ("truth", label)])
    common.save_sheet(path, rows)


def main():
    crops = SourceCrops(SOURCE, (SEED, 3), CROP, SCALE)
    facts = {"classes and ids": common.class_ids(), "source pairs": crops.digest()}
    run = common.Run(globals(), "model.safetensors", facts=facts)
    if run.finished():
        return
    device = common.device()
    half = common.bfloat16(HALF)
    encoder = Encoder(ENCODER, FREEZE_ENCODER).to(device)
    crops.fill = encoder.fill
    torch.manual_seed(SEED)
    sizes = DIM, QUERIES, LAYERS, HIDDEN, PIXEL_LAYERS
    decoder = Decoder(encoder.channels, len(CLASSES), *sizes).to(device)
    optimizer, trained = make_optimizer([(decoder, 1), (encoder, ENCODER_LR)], WEIGHT_DECAY)
    parts = {"network": network(encoder, decoder), "optimizer": optimizer}

    run.start(bfloat16=half)
    progress = Progress(run, parts, ITERATIONS)
    E = distributed(encoder, partly_used=True)          # open_clip's towers have an unused head
    D = distributed(decoder, partly_used=LAYERS == 0)
    loader = batches(crops, BATCH, progress.first, ITERATIONS, WORKERS)
    for step, (images, labels) in progress.steps(loader):
        torch.manual_seed((10 * SEED + 3) * 10 ** 9 + step)     # a step repeats after a resume
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True).long()
        # the decoder predicts masks and their classes from the frozen features
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            classes, masks = D(E(images))
        # eq. 1
        loss, terms = mask_loss(classes, masks, labels, POINTS, LOSS_WEIGHTS, NO_OBJECT, UNLABELLED)
        set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, SCHEDULE)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()

        done = step + 1
        progress.record(done, {"loss": loss, **terms, "norm": norm}, LOG_EVERY)
        if common.RANK == 0 and (done % PREVIEW_EVERY == 0 or done == ITERATIONS):
            shown = [crops[ITERATIONS * BATCH + i] for i in range(4)]
            preview(run.out / f"preview_{done:06d}.png", encoder, decoder, shown, half)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            progress.save(done)
    if common.RANK == 0:
        finish(run, progress, encoder, decoder)


if __name__ == "__main__":
    common.launch(globals())
