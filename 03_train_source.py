"""
03_train_source: train a mask decoder on frozen CLIP features, with labelled source images only
(paper 3.1).

    in    SOURCE                                   labelled images of one domain (or of several)
    out   RUN/03_train_source/model.safetensors    theta_0, with which 04 begins
          log.jsonl, loss.png, preview_*.png       image | prediction | truth of the same four crops
    time  toy: see README; paper: 40,000 steps on one GPU

The encoder E is a CNN tower of CLIP. It stays frozen: that is cheaper, and features which have seen
the whole web are not bent towards one video game. Only the decoder D learns. It is a Mask2Former:
a set of queries, each of which predicts one mask and the class of that mask. In every image, each
class that is there is matched to one query, which learns that class and its mask; all other queries
learn "no object" (eq. 1).

It worked if the loss falls within the first hundred steps, and if the second column of the previews
begins to look like the third."""
import json
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import adjust_hue
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
BATCH = preset(toy=16, paper=8)                     # paper 4.1
CROP = preset(toy=(128, 256), paper=(768, 768))     # rows, columns; paper 4.1
SCALE = preset(toy=(0.75, 1.5), paper=(0.5, 2.0))   # paper 4.1
LR = preset(toy=1.5e-3, paper=1e-5, cityscapes=1e-4)                                # paper 4.1
ENCODER_LR = 0.1                                    # times LR, if the encoder trains (official)
SCHEDULE = preset(toy="poly", paper="constant", synthia="poly")     # official; not in the paper
WARMUP = preset(toy=50, paper=0)                    # steps
WEIGHT_DECAY = 0.05                                 # paper 4.1
GRAD_CLIP = preset(toy=1.0, paper=0.01)             # global norm; 0.01 as Mask2Former
HALF = False                                        # bfloat16 in forward passes; official: float32
SEED = 0
# running
WORKERS = preset(toy=0, paper=8)                    # processes that read; 0 is best on two cores
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
PREVIEW_EVERY = preset(toy=300, paper=2_000)

TRAINING_RULES = """
len(OUT.strip()) > 0
len(set(SOURCE)) == len(SOURCE) > 0
len(LOSS_WEIGHTS) == 3 and all(0 <= weight <= 1000 for weight in LOSS_WEIGHTS)
0 <= NO_OBJECT <= 1
4 <= POINTS <= 10 ** 6
UNLABELLED in ("ignore", "negative")
1 <= ITERATIONS <= 10 ** 8
len(CROP) == 2 and all(32 <= side <= 8192 and side % 32 == 0 for side in CROP)
len(SCALE) == 2 and 0.01 <= SCALE[0] <= SCALE[1] <= 100
0 < LR <= 1 and 0 <= ENCODER_LR <= 100
SCHEDULE in ("constant", "poly")
0 <= WARMUP <= 10 ** 8
0 <= WEIGHT_DECAY <= 10 and 0 < GRAD_CLIP <= 10 ** 6
0 <= SEED <= 10 ** 9
0 <= WORKERS <= 256
min(LOG_EVERY, SAVE_EVERY, PREVIEW_EVERY) >= 1
"""
RULES = TRAINING_RULES + """
32 <= DIM <= 4096 and DIM % 32 == 0
len(CLASSES) <= QUERIES <= 10_000
0 <= LAYERS <= 100 and 0 <= PIXEL_LAYERS <= 100 and 1 <= HIDDEN <= 100_000
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
    height, width = np.minimum(crop, np.round(np.array(label.shape) * factor)).astype(int)
    seen = np.minimum((height / factor, width / factor), label.shape)
    top, left = random.uniform(0, label.shape - seen)
    box = (left, top, left + seen[1], top + seen[0])
    pixels = np.array(image.resize((width, height), Image.BILINEAR, box=box))
    ids = np.array(Image.fromarray(label).resize((width, height), Image.NEAREST, box=box))

    out = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, *crop)
    pixels = colour_jitter(torch.from_numpy(pixels).permute(2, 0, 1), random)
    out[:, :height, :width] = pixels                            # the padding keeps its colour
    target = torch.full(crop, IGNORE)
    target[:height, :width] = torch.from_numpy(ids)
    return (out.flip(2), target.flip(1)) if random.random() < .5 else (out, target)


def shuffled(n, seed, i):
    """The i-th of an endless stream that has each of n numbers once per epoch."""
    epoch, position = divmod(i, n)
    return common.random(seed, epoch, 1).permutation(n)[position]


class SourceCrops(Dataset):
    """An endless stream of augmented crops of some data sets. Item i depends on (seed, i) alone, so
    a run that goes on sees what an uninterrupted one sees."""

    def __init__(self, names, seed, crop, scale, fill=(0, 0, 0)):
        self.found = [(*pair, name) for name in names for pair in common.pairs(name, "train")]
        self.seed, self.crop, self.scale, self.fill = seed, tuple(crop), scale, fill

    def __getitem__(self, i):
        image_path, label_path, name = self.found[shuffled(len(self.found), self.seed, i)]
        image = common.read_image(image_path)
        label = common.read_label(label_path, name, image.size)
        random = common.random(self.seed, i, 2)
        return scale_and_crop(image, label, random, self.crop, self.scale, self.fill)


def batches(dataset, size, first, last, workers):
    """Batches number first to last - 1 of an endless dataset; every process has its share."""
    if size % common.PROCESSES:
        raise Stop(f"{common.PROCESSES} processes cannot share {size} images per step evenly")
    items = range(first * size + common.RANK, last * size, common.PROCESSES)
    return DataLoader(dataset, size // common.PROCESSES, sampler=items, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


# ---------------------------------------------------------------------------- encoder
def load_open_clip(model):
    """A CNN tower of open_clip, NAME/TAG or local-dir:PATH -> (module, channels, mean, std)."""
    import open_clip
    local = model.startswith("local-dir:")
    name, tag = (model, None) if local else model.rsplit("/", 1)
    # open_clip creates in training mode, where a pass would move BatchNorm's statistics
    tower = open_clip.create_model(name, pretrained=tag, require_pretrained=True).visual.eval()
    if hasattr(tower, "trunk"):
        channels = [stage["num_chs"] for stage in tower.trunk.feature_info]
    else:
        stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
        channels = [stage[-1].bn3.num_features for stage in stages]
    return tower, channels, tower.image_mean, tower.image_std


def load_timm(model):
    """A CNN or a plain ViT of timm -> (module, channels, mean, std)."""
    import timm
    options = dict(pretrained=True, features_only=True)
    body = timm.create_model(model, out_indices=(-4, -3, -2, -1), **options)
    strides, channels = body.feature_info.reduction(), body.feature_info.channels()
    if strides[0] == strides[3]:
        body = PlainViT(timm.create_model(model, dynamic_img_size=True, **options), strides[0])
    return body, channels, body.pretrained_cfg["mean"], body.pretrained_cfg["std"]


class PlainViT(nn.Module):
    """A ViT of timm as a pyramid: the ends of its blocks' four quarters, resized to the strides."""

    def __init__(self, body, patch):
        super().__init__()
        self.body, self.scale, self.pretrained_cfg = body, patch / 16, body.pretrained_cfg
        depth = len(body.feature_info.info)
        body.out_indices = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]

    def forward(self, x):
        blocks = self.body(F.interpolate(x, scale_factor=self.scale, mode="bicubic"))
        return [F.interpolate(block, scale_factor=factor, mode="bilinear")
                for block, factor in zip(blocks, (4, 2, 1, .5))]


def load_transformers(model):
    """A SegFormer encoder of transformers -> (module, channels, mean, std)."""
    from transformers import SegformerModel
    body = SegformerModel.from_pretrained(model.removeprefix("local-dir:"))
    return body, body.config.hidden_sizes, (.485, .456, .406), (.229, .224, .225)


class Encoder(nn.Module):
    """E of paper 3.1: four feature maps, at strides 4, 8, 16 and 32.

    name: LIBRARY:MODEL, see ENCODER. frozen: no gradients, and always in eval mode.
    Raises Stop if the weights cannot be had."""

    def __init__(self, name, frozen=True):
        super().__init__()
        self.name, self.is_pretrained = name, True          # the weights are still the library's
        self.library, _, model = name.partition(":")
        load = {"open_clip": load_open_clip, "timm": load_timm,
                "transformers": load_transformers}.get(self.library)
        if load is None:
            raise Stop(f"ENCODER={name}: expected open_clip:, timm: or transformers: and a model")
        with common.from_hub(f"the encoder {name}", "connect to the hub once, or name a folder: "
                             f"--ENCODER={self.library}:local-dir:PATH"):
            self.body, self.channels, mean, std = load(model)
        self.body.to(memory_format=torch.channels_last)     # a fifth faster on a CPU
        self.fill = tuple(round(255 * m) for m in mean)     # a padding that is 0 once normalised
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.freeze(frozen)

    def freeze(self, frozen):
        self.frozen, self.is_pretrained = frozen, self.is_pretrained and frozen
        self.requires_grad_(not frozen).train()

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
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def position(height, width, dim, device):
    """Mask2Former's sine code of a grid, (1, H * W, dim): half of it for y, half for x."""
    y, x = (torch.arange(1, n + 1, device=device) / n * 2 * torch.pi for n in (height, width))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)[..., None]
    angle = grid / 10_000 ** (torch.arange(dim // 4, device=device) / (dim // 4))
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
        out = []
        for i, x in enumerate(maps):
            near = x
            if i > 0:
                near = near + F.avg_pool2d(maps[i - 1], 2)
            if i + 1 < len(maps):
                near = near + resize(maps[i + 1], x.shape[-2:])
            x = self.norms[0](x + self.mix(near))
            out.append(self.norms[1](x + self.feed(x)))
        return out


class QueryLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each with a residual, then a norm."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_ = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, queries, embed, memory, code, hidden):
        """hidden bool (B, Q, N): where a query must not attend"""
        hidden = hidden.repeat_interleave(self.heads, 0)
        attended, _ = self.cross(queries + embed, memory + code, memory, attn_mask=hidden,
                                 need_weights=False)
        queries = self.norms[0](queries + attended)
        q = queries + embed
        attended, _ = self.self_(q, q, queries, need_weights=False)
        queries = self.norms[1](queries + attended)
        return self.norms[2](queries + self.feed(queries))


class Decoder(nn.Module):
    """D of paper 3.1: Mask2Former's, with PixelLayers in place of deformable attention.

    channels: of the encoder's four maps; classes: C, without "no object"."""

    def __init__(self, channels, classes, dim, queries, layers, hidden, pixel_layers, heads=8):
        super().__init__()
        self.sizes = dict(channels=list(channels), classes=classes, dim=dim, queries=queries,
                          layers=layers, hidden=hidden, pixel_layers=pixel_layers, heads=heads)

        def normed(*layers):
            return nn.Sequential(*layers, nn.GroupNorm(min(32, dim // 4), dim))
        self.lateral = nn.ModuleList(normed(convolution(c, dim, 1)) for c in channels)
        self.pixel_layers = nn.ModuleList(PixelLayer(dim, hidden) for _ in range(pixel_layers))
        self.smooth = nn.ModuleList(normed(convolution(dim, dim, 3)) for _ in channels)
        self.mask_features = convolution(dim, dim, 1)
        self.layers = nn.ModuleList(QueryLayer(dim, heads, hidden) for _ in range(layers))
        # Xavier as in Mask2Former; PixelLayer.mix, which it does not have, begins small with it
        for part in (*self.lateral[1:], *self.pixel_layers, *self.layers):
            for weight in part.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
        self.query, self.query_embed = nn.Embedding(queries, dim), nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(3, dim)
        self.norm, self.class_head = nn.LayerNorm(dim), nn.Linear(dim, classes + 1)
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
        """-> class logits (L+1, B, Q, C+1), mask logits (L+1, B, Q, H/4, W/4): one prediction
        before the first layer and one after each."""
        levels, pixels = self.pixels(features)
        queries = self.query.weight[None].expand(len(pixels), -1, -1)
        classes, masks = [], []
        for i in range(len(self.layers) + 1):
            normed = self.norm(queries)
            classes.append(self.class_head(normed))
            masks.append(torch.einsum("bqd,bdhw->bqhw", self.mask_head(normed), pixels))
            if i == len(self.layers):
                return torch.stack(classes), torch.stack(masks)
            level = levels[i % 3]
            # a query attends where its own mask is; where that is empty, everywhere
            hidden = resize(masks[-1].detach().float(), level.shape[-2:]).flatten(2) <= 0
            hidden &= ~hidden.all(-1, keepdim=True)
            memory = level.flatten(2).transpose(1, 2) + self.level_embed.weight[i % 3]
            code = position(*level.shape[-2:], level.shape[1], level.device)
            queries = self.layers[i](queries, self.query_embed.weight, memory, code, hidden)


def semantic(class_logits, mask_logits, size):
    """Class scores of every pixel: the sum over queries of softmax(class) x sigmoid(mask).

    (B, Q, C+1), (B, Q, h, w) -> (B, C, *size)"""
    likely = class_logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", likely, resize(mask_logits.float(), size).sigmoid())


@torch.no_grad()
def predict(encoder, decoder, images, half=False):
    """uint8 (B, 3, H, W) of any size -> class scores (B, C, H, W). half: bfloat16."""
    height, width = images.shape[-2:]
    fill = torch.tensor(encoder.fill, dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    padded = fill.repeat(len(images), 1, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[..., :height, :width] = images
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


@torch.no_grad()
def match(class_logits, mask_logits, labels, points, weights):
    """Hungarian matching of the classes that an image holds to queries, in every layer.

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels (B, H, W), points (B, P):
    the pixels at which masks are compared; IGNORE among them takes no part. weights: of class,
    mask and dice -> int64 (4, M): layer, image, query and class of every match"""
    layers, batch, _, classes = class_logits.shape
    there = torch.zeros(batch, 256, dtype=torch.bool, device=labels.device)
    there = there.scatter_(1, labels.flatten(1), True)[:, None, :classes - 1]
    ids = labels.flatten(1).gather(1, points)[..., None]                        # (B, P, 1)
    target = (ids == torch.arange(classes - 1, device=ids.device)).float()      # (B, P, C)
    valid = (ids != IGNORE).float().transpose(1, 2)                             # (B, 1, P)
    logits = sample(mask_logits.flatten(0, 1), points.repeat(layers, 1), labels.shape[-2:])
    logits = logits.unflatten(0, (layers, batch))                               # (L, B, Q, P)
    # the cross-entropy of a logit x with a target t is softplus(x) - x t
    entropy = (F.softplus(logits) * valid).sum(-1, keepdim=True) - logits @ target
    entropy = entropy / valid.sum(-1, keepdim=True).clamp(min=1)
    p = logits.sigmoid() * valid
    dice = 1 - (2 * p @ target + 1) / (p.sum(-1, keepdim=True) + target.sum(1)[:, None] + 1)
    likely = class_logits.softmax(-1)[..., :-1]
    cost = weights[1] * entropy + weights[2] * dice - weights[0] * likely
    cost = torch.where(there, cost.nan_to_num(), torch.inf).cpu()       # waits for the GPU, once
    found = []
    for layer, image in np.ndindex(layers, batch):
        table = cost[layer, image]
        present = table[0].isfinite().nonzero()[:, 0]
        for query, k in zip(*linear_sum_assignment(table[:, present])):
            found.append((layer, image, query, present[k]))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T.to(labels.device)


@torch.no_grad()
def uncertain_points(masks, labels, image, n):
    """Pixels (M, n) at which masks (M, h, w) of images number `image` (M,) are taught: of three
    times as many random ones those where the mask is least sure, and a quarter at random, as
    Mask2Former. The masks of one image share the random pixels: that saves most of the drawing.
    None of the uncertain ones is of IGNORE while others are left."""
    pixels = labels.flatten(1)
    drawn = torch.randint(pixels.shape[1], (len(labels), 3 * n), device=labels.device)
    others = torch.randint(pixels.shape[1], (len(labels), n - 3 * n // 4), device=labels.device)
    doubt = -sample(masks[:, None], drawn[image], labels.shape[-2:])[:, 0].abs()
    doubt[(pixels.gather(1, drawn) == IGNORE)[image]] = -torch.inf
    best = doubt.topk(3 * n // 4, 1, sorted=False).indices
    return torch.cat((drawn[image].gather(1, best), others[image]), 1)


@torch.no_grad()
def taught_queries(mask_logits, labels):
    """Which queries may be taught "no object" -> float (L, B, Q): not in an image without any
    label, nor where the mask lies mostly on IGNORE, for nobody knows what is there."""
    unknown = (labels == IGNORE).float()
    small = F.interpolate(unknown[:, None], mask_logits.shape[-2:], mode="nearest")[:, 0]
    taught = []
    for layer in mask_logits:
        inside = (layer > 0).float()
        hidden = torch.einsum("bqhw,bhw->bq", inside, small) > .5 * inside.sum((2, 3))
        taught.append(~hidden & (unknown.mean((1, 2)) < 1)[:, None])
    return torch.stack(taught).float()


def mask_loss(class_logits, mask_logits, labels, n_points, weights, no_object, unlabelled="ignore"):
    """Paper eq. 1, for source labels and for pseudo-labels alike (3.3).

    class_logits (L, B, Q, C+1), mask_logits (L, B, Q, h, w), labels int64 (B, H, W).
    unlabelled="ignore": pixels of IGNORE take no part. "negative", officially: they belong to no
    mask -> loss, {"class", "mask", "dice"}: scalars, each summed over the layers. Random points
    come from torch's default generator."""
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    if unlabelled == "negative":
        labels = labels.masked_fill(labels == IGNORE, IGNORE - 1)       # an id that no class has
    batch, height, width = labels.shape
    points = torch.randint(height * width, (batch, n_points), device=labels.device)
    matched = match(class_logits, mask_logits, labels, points, weights)
    layer, image, query, cls = matched
    # the class of every query: matched ones learn theirs, the others "no object"
    wanted = torch.full(class_logits.shape[:3], class_logits.shape[-1] - 1, device=labels.device)
    wanted[layer, image, query] = cls
    weight = no_object * taught_queries(mask_logits, labels)
    weight[layer, image, query] = 1
    entropy = F.cross_entropy(class_logits.movedim(-1, 1), wanted, reduction="none")
    of_class = ((entropy * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)).sum()
    # the mask of every matched query: cross-entropy and dice at some of its pixels
    masks = mask_logits[layer, image, query]
    points = uncertain_points(masks, labels, image, n_points)
    ids = labels.flatten(1)[image[:, None], points]
    valid, target = (ids != IGNORE).float(), (ids == cls[:, None]).float()
    logits = sample(masks[:, None], points, (height, width))[:, 0]
    entropy = F.binary_cross_entropy_with_logits(logits, target, valid, reduction="none").sum(1)
    entropy = entropy / valid.sum(1).clamp(min=1)
    p = logits.sigmoid() * valid
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    n_masks = mean_of_processes(max(1, len(cls) / len(class_logits)))
    terms = {"class": of_class, "mask": entropy.sum() / n_masks, "dice": dice.sum() / n_masks}
    loss = sum(weight * term for weight, term in zip(weights, terms.values()))
    return loss, {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------- optimiser
def make_optimizer(modules, weight_decay):
    """AdamW over what trains, and those parameters. modules: [(module, factor of the learning
    rate)]. Norms and embeddings do not decay, as Mask2Former."""
    groups = []
    for top, factor in modules:
        for module in top.modules():
            still = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
            found = [p for p in module.parameters(recurse=False) if p.requires_grad]
            decay = 0. if still else weight_decay
            groups.append({"params": found, "weight_decay": decay, "factor": factor})
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    trained = [p for group in groups for p in group["params"]]
    print(f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters train")
    return optimizer, trained


def set_learning_rate(optimizer, lr, step, total, warmup, schedule):
    """Linear warm-up, then "constant" or "poly" (power 0.9, to zero)."""
    rate = lr * min(1, (step + 1) / max(1, warmup))
    if schedule == "poly":
        rate *= (1 - step / total) ** .9
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def distributed(*modules):
    """The modules; under torchrun each that trains behind torch's DistributedDataParallel."""
    if common.PROCESSES == 1:
        return modules
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    shared = []
    for module in modules:
        if any(p.requires_grad for p in module.parameters()):
            module = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        shared.append(module)
    return shared


def mean_of_processes(number):
    """A number's mean over the processes: Mask2Former normalises its losses by it."""
    if common.PROCESSES == 1:
        return number
    total = torch.tensor(float(number), device=common.device())
    torch.distributed.all_reduce(total)
    return total / common.PROCESSES


# ---------------------------------------------------------------------------- saving and loading
def save_model(path, encoder, decoder, run):
    """A finished network as one safetensors file that explains itself. The encoder's weights travel
    with it if they are not the library's."""
    tensors = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    if not encoder.is_pretrained:
        tensors |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    about = {"stage": run.stage, "preset": common.PRESET, "constants": run.constants,
             "classes": CLASSES, "encoder": encoder.name, "decoder": decoder.sizes}
    with common.whole(path) as part:
        save_file(tensors, part, metadata={"about": json.dumps(about)})


def load_model(path):
    """-> encoder, decoder (on the CPU, in eval mode), about: {"stage", "preset", "constants",
    "classes", "encoder", "decoder"} of the run that saved them. Raises Stop."""
    weights = {"encoder": {}, "decoder": {}}
    with common.explain(f"{path} is damaged, or no network of this version of the repo",
                        "train it again into another --OUT"), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        if about["classes"] != CLASSES:
            raise Stop(f"{path} knows other classes: it was made with PRESET={about['preset']}")
        for name in file.keys():
            module, _, key = name.partition(".")
            weights[module][key] = file.get_tensor(name)
            assert weights[module][key].isfinite().all(), f"{name} is not finite"
        encoder, decoder = Encoder(about["encoder"]), Decoder(**about["decoder"])
        if weights["encoder"]:
            encoder.is_pretrained = False
            encoder.load_state_dict(weights["encoder"])
        decoder.load_state_dict(weights["decoder"])
    return encoder.eval(), decoder.eval(), about


class Bookkeeping:
    """What a training stage keeps besides the method: checkpoint.pt, log.jsonl, a progress bar.

    parts: {name: module or optimiser}, which go on from checkpoint.pt if there is one.
    Raises Stop if that is damaged or of another run."""

    def __init__(self, run, parts, total):
        self.run, self.parts, self.total = run, parts, total
        self.first, self.lines, self.rows = 0, [], []
        self.checkpoint = run.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.resume()
        self.bar = tqdm(total=total, initial=self.first, disable=True if common.RANK else None)

    def resume(self):
        with common.explain(f"{self.checkpoint} is damaged", "remove it to begin again"):
            assert zipfile.ZipFile(self.checkpoint).testzip() is None    # torch.load checks no sums
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.first, self.lines = state["step"], state["lines"]
            assert 0 < self.first < self.total, f"step {self.first}"
            self.run.compare(state["constants"])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        print(f"goes on from step {self.first}")

    def steps(self, loader):
        """(step, batch) of a loader's batches; the time that they take counts as waiting."""
        self.since, self.waited = time.time(), 0
        before = time.time()
        for step, batch in enumerate(loader, self.first):
            self.waited += time.time() - before
            yield step, batch
            self.bar.update()
            before = time.time()

    def record(self, done, numbers, every):
        """Log the means of {name: scalar tensor} every so many steps: only then do they leave the
        GPU. Raises Stop if one is not a number."""
        self.rows.append(torch.stack(list(numbers.values())))
        if done % every and done < self.total:
            return
        self.stop_if_broken(done)
        means = dict(zip(numbers, torch.stack(self.rows).mean(0).tolist()))
        means["seconds"] = (time.time() - self.since) / len(self.rows)
        means["wait"] = self.waited / len(self.rows)
        line = {"step": done, **{k: float(f"{v:.5g}") for k, v in means.items()}}
        self.lines.append(line)
        common.write_text(self.run.out / "log.jsonl", "\n".join(map(json.dumps, self.lines)) + "\n")
        self.bar.set_postfix(means, refresh=False)
        if self.bar.disable:
            print(" | ".join(f"{k} {v}" for k, v in line.items()), flush=True)
        self.rows, self.waited, self.since = [], 0, time.time()

    def stop_if_broken(self, done):
        if self.rows and not torch.stack(self.rows).isfinite().all():
            raise Stop(f"not a number before step {done}. {self.checkpoint}, if there is one, is "
                       "from before. Try a smaller LR, or HALF=False")

    def save(self, done):
        self.stop_if_broken(done)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": done, "lines": self.lines, "constants": self.run.constants}
        with common.whole(self.checkpoint) as part:
            torch.save(state, part)

    def finish(self, encoder, decoder):
        """Draw the losses, save the network, and forget the checkpoint."""
        figure = Figure((8, 4), layout="constrained")
        axes = figure.subplots()
        for name in ("loss", "class", "mask", "dice"):
            axes.semilogy([line["step"] for line in self.lines],
                          [line[name] for line in self.lines], label=name)
        axes.set_xlabel("step")
        axes.legend()
        with common.whole(self.run.out / "loss.png") as part:
            figure.savefig(part, format="png")
        self.run.finish()
        save_model(self.run.result, encoder, decoder, self.run)     # last: it means finished
        if common.RANK == 0:
            self.checkpoint.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the source stage
def preview(path, encoder, decoder, crops, half):
    """image | prediction | truth of some source crops."""
    rows = []
    encoder.eval(), decoder.eval()
    for image, label in crops:
        scores = predict(encoder, decoder, image[None].to(encoder.mean.device), half)
        rows.append([("image", image.permute(1, 2, 0).numpy()), ("truth", label.byte().numpy()),
                     ("prediction", scores[0].argmax(0).byte().cpu().numpy())])
    encoder.train(), decoder.train()
    common.save_sheet(path, rows)


def main():
    run = common.Run(globals(), "model.safetensors")
    if run.finished():
        return
    device = common.device()
    crops = SourceCrops(SOURCE, SEED, CROP, SCALE)
    encoder = Encoder(ENCODER, FREEZE_ENCODER).to(device)
    crops.fill = encoder.fill
    torch.manual_seed(SEED)
    decoder = Decoder(encoder.channels, len(CLASSES), DIM, QUERIES, LAYERS, HIDDEN, PIXEL_LAYERS)
    decoder.to(device)
    optimizer, trained = make_optimizer([(decoder, 1), (encoder, ENCODER_LR)], WEIGHT_DECAY)
    parts = {"decoder": decoder, "optimizer": optimizer}
    if not FREEZE_ENCODER:
        parts["encoder"] = encoder

    run.start()
    book = Bookkeeping(run, parts, ITERATIONS)
    E, D = distributed(encoder, decoder)
    loader = batches(crops, BATCH, book.first, ITERATIONS, WORKERS)
    for step, (images, labels) in book.steps(loader):
        torch.manual_seed(SEED * 10 ** 9 + step)            # a step repeats when a run goes on
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
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
        book.record(done, {"loss": loss.detach(), **terms, "norm": norm}, LOG_EVERY)
        if done % PREVIEW_EVERY == 0 or done == ITERATIONS:
            shown = [crops[ITERATIONS * BATCH + i] for i in range(4)]
            preview(run.out / f"preview_{done:06d}.png", encoder, decoder, shown, HALF)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            book.save(done)
    book.finish(encoder, decoder)


if __name__ == "__main__":
    common.launch(globals())
