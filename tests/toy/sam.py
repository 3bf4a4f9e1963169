"""
sam: the miniature SAM. segment_anything's own model with a small CNN in the place of the ViT.

    one call   sam = load("tests/toy/weights/sam")      then as with any Sam: SamPredictor(sam), ...
    folder     config.json (sizes), model.safetensors (weights)
    time       40 ms per picture and 9 ms per prompt of five points, on one core

Sam pads every picture to a square. Half of the square would be padding here (128 x 256 pixels in
256 x 256), so SmallSam pads to multiples of 16 only. Its decoder cuts what belongs to the whole
square (position codes, dense prompts) to the size of the embedding; what lies outside the picture
is added back as "no mask" before masks are enlarged. All of this is behind Sam's own methods.
"""
import json
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from common import Stop

SIZES = {"image_size": (64, 1024), "stride": (8, 8), "width": (16, 512), "mlp_dim": (16, 4096),
         "heads": (1, 32), "encoder": (1, 1024), "blocks": (0, 16)}     # least and most
LISTS = ("encoder", "blocks")                   # one number per stage of the encoder, of four
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)          # as every SAM


def unit(channels_in, channels_out, stride=1):
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def residual(width):
    convolution = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    return nn.Sequential(unit(width, width), convolution, nn.BatchNorm2d(width))


class ConvEncoder(nn.Module):
    """Four stages of residual blocks, strides 2, 4, 8 and 16; the last three are summed at 8.

    widths, blocks: channels and number of residual blocks of each stage; out: of the embedding.
    (B, 3, H, W), H and W multiples of 16 -> (B, out, H/8, W/8)."""

    def __init__(self, widths, blocks, out, img_size):
        super().__init__()
        self.img_size = img_size
        self.down = nn.ModuleList()
        self.blocks = nn.ModuleList()
        before = 3
        for width, depth in zip(widths, blocks, strict=True):
            self.down.append(unit(before, width, 2))
            self.blocks.append(nn.ModuleList(residual(width) for _ in range(depth)))
            before = width
        self.fine = nn.Conv2d(widths[1], out, 2, 2)
        self.middle = nn.Conv2d(widths[2], out, 1)
        self.coarse = nn.Conv2d(widths[3], out, 1)
        self.smooth = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x):
        maps = []
        for down, blocks in zip(self.down, self.blocks):
            x = down(x)
            for block in blocks:
                x = F.relu(x + block(x))
            maps.append(x)
        _, fine, middle, coarse = maps
        coarse = F.interpolate(self.coarse(coarse), scale_factor=2, mode="bilinear")
        return self.smooth(F.relu(self.fine(fine) + self.middle(middle) + coarse))


class SmallDecoder(MaskDecoder):
    """SAM's decoder for an embedding that covers only the upper left of the square.

    image_embeddings (1, D, h, w) -> mask logits (M, 3 or 1, 4h, 4w), predicted IoU (M, 3 or 1)"""

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings,
                dense_prompt_embeddings, multimask_output):
        height, width = image_embeddings.shape[-2:]
        position = image_pe[..., :height, :width]
        dense = dense_prompt_embeddings[..., :height, :width]
        return super().forward(image_embeddings, position, sparse_prompt_embeddings, dense,
                               multimask_output)


class SmallSam(Sam):
    """A Sam that neither encodes nor decodes the padding of its square."""

    def preprocess(self, x):
        """(..., 3, H, W), 0 to 255 -> normalised, padded with zeros to multiples of 16."""
        height, width = x.shape[-2:]
        return F.pad((x - self.pixel_mean) / self.pixel_std, (0, -width % 16, 0, -height % 16))

    def postprocess_masks(self, masks, input_size, original_size):
        """Mask logits (M, n, 4h, 4w) -> (M, n, *original_size)."""
        side = 4 * self.prompt_encoder.image_embedding_size[0]
        height, width = masks.shape[-2:]
        square = F.pad(masks, (0, side - width, 0, side - height))
        return super().postprocess_masks(square, input_size, original_size)


def build_sam(config):
    """-> SmallSam with random weights, of the sizes in a folder's config.json (a dict)."""
    size, width = config["image_size"], config["width"]
    grid = (size // config["stride"], size // config["stride"])
    encoder = ConvEncoder(config["encoder"], config["blocks"], width, size)
    prompts = PromptEncoder(embed_dim=width, image_embedding_size=grid,
                            input_image_size=(size, size), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=config["mlp_dim"],
                                    num_heads=config["heads"])
    decoder = SmallDecoder(transformer_dim=width, transformer=transformer, num_multimask_outputs=3,
                           iou_head_depth=3, iou_head_hidden_dim=width)
    return SmallSam(encoder, prompts, decoder, MEAN, STD)


def read_config(path):
    """config.json -> dict. Raises Stop unless it holds every size, within its range."""
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise Stop(f"{path} cannot be read ({problem}): restore it, or name "
                   "another folder") from None
    for name, (least, most) in SIZES.items():
        value = config.get(name)
        numbers = value if name in LISTS else [value]
        one_per_stage = name not in LISTS or isinstance(value, list) and len(value) == 4
        if not one_per_stage or not all(type(n) is int and least <= n <= most for n in numbers):
            expected = "four whole numbers" if name in LISTS else "a whole number"
            raise Stop(f"{path}: {name} is {value}: expected {expected} from {least} to {most}")
    if config["image_size"] % 16 or config["width"] % (2 * config["heads"]):
        raise Stop(f"{path}: expected an image_size that is a multiple of 16, and a width that is "
                   "a multiple of twice the heads")
    return config


def load(folder):
    """A folder of config.json and model.safetensors -> SmallSam in eval mode, without gradients.

    Raises Stop if one of the two is missing, broken, or does not fit the other."""
    config, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
    sam = build_sam(read_config(config))
    try:
        state = {name: value.float() for name, value in load_file(weights).items()}
        sam.load_state_dict(state)
    except Exception as problem:        # safetensors and torch raise errors of their own
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise Stop(f"{weights} does not hold the weights of {config} ({reason}): restore it, or "
                   "name another folder") from None
    return sam.eval().requires_grad_(False)     # in train mode BatchNorm would use one picture's
