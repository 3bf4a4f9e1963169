"""What several tests share and what is no test: official ids of the data sets, labels in all forms,
deep PNGs, small diffusion models in the official format, stand-ins for an LLM and a pipeline."""
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import common
from conftest import fresh

# ---------------------------------------------------------------------------- ids
# train ids of the data sets' ids, as the official code has them; what is not listed is IGNORE
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
              25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12,
           8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18}
MAPILLARY = {13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8,
             29: 9, 27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17,
             52: 18}
MAPILLARY_2 = (21, 24, 27, 12, 5, 85, 93, 100, 64, 63, 61, 30, 32, 108, 114, 107, 111, 110, 105)


# ---------------------------------------------------------------------------- labels
def palette_picture(ids):
    picture = Image.fromarray(np.asarray(ids, np.uint8), "P")
    picture.putpalette(list(range(256)) * 3)
    return picture


def reordered(ids, colours):
    """A lossless palette picture, its numbers in an order of their own. colours: (256, 3)"""
    used, numbers = np.unique(ids, return_inverse=True)
    order = np.random.default_rng(1).permutation(len(used))
    picture = Image.fromarray(np.argsort(order)[numbers].reshape(ids.shape).astype(np.uint8), "P")
    picture.putpalette(colours[used[order]].ravel().tolist())
    return picture


# forms in which ids uint8 (H, W) may come: functions of the ids and the colour of every id
GREY = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
FORMS = {"grey": lambda ids, _: Image.fromarray(ids),
         "palette": lambda ids, _: palette_picture(ids),
         "grey palette": lambda ids, _: reordered(ids, GREY),
         "palette of colours": reordered,
         "RGB of colours": lambda ids, colours: Image.fromarray(colours[ids]),
         "RGB of ids": lambda ids, _: Image.fromarray(GREY[ids]),
         "LA": lambda ids, _: Image.fromarray(ids).convert("LA"),
         "16 bits": lambda ids, _: Image.fromarray(ids.astype(np.uint16)),
         "32 bits": lambda ids, _: Image.fromarray(ids.astype(np.int32))}


def png16(path, numbers, bits=16, kind=2):
    """Write a PNG with 1 to 16 bits per channel, which PIL cannot: kind 0 is grey, 2 is RGB. The
    rows after the first are stored as differences to the left where pixels are whole bytes."""
    def chunk(name, body):
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    numbers = np.asarray(numbers)
    step = max(1, bits * (3 if kind else 1) // 8)
    every_bit = numbers.reshape(len(numbers), -1, 1) >> np.arange(bits)[::-1] & 1
    rows = np.packbits(every_bit.reshape(len(numbers), -1).astype(np.uint8), 1)
    raw = b"\0" + rows[0].tobytes()
    for row in rows[1:]:
        raw += b"\1" + np.concatenate((row[:step], row[step:] - row[:-step])).tobytes()
    head = struct.pack(">IIBBBBB", numbers.shape[1], len(numbers), bits, kind, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return path


# ---------------------------------------------------------------------------- models
def scheduler(name, **more):
    import diffusers
    return getattr(diffusers, name)(**more)


DIFFUSION = Path(common.MINIATURES, "diffusion")
BETAS = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear"}


def parts(text_model):
    """What the models share: tokenizer, text encoder, VAE of two times two pixels per latent
    one"""
    import transformers
    from diffusers import AutoencoderKL
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=down, up_block_types=up,
                        latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=.1)
    config = transformers.CLIPTextConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=16)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(DIFFUSION / "tokenizer")
    return tokenizer, getattr(transformers, text_model)(config).eval(), vae.eval()


def tiny_sd(folder, prediction):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    torch.manual_seed(0)
    tokenizer, encoder, vae = parts("CLIPTextModel")
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16).eval()
    own = scheduler("DDIMScheduler", prediction_type=prediction, steps_offset=1, clip_sample=False,
                    **BETAS)
    StableDiffusionPipeline(vae, encoder, tokenizer, unet, own, None, None,
                            requires_safety_checker=False).save_pretrained(folder)
    return folder


def tiny_sd3(folder):
    """A transformer that matches a flow, as Stable Diffusion 3"""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel
    torch.manual_seed(0)
    tokenizer, clip, vae = parts("CLIPTextModelWithProjection")
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32).eval()
    t5 = T5Config(vocab_size=2048, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    own = scheduler("FlowMatchEulerDiscreteScheduler")
    StableDiffusion3Pipeline(transformer, own, vae, clip, tokenizer, clip, tokenizer,
                             T5EncoderModel(t5).eval(), tokenizer).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------- stand-ins
def run_main(module, **constants):
    """main() of a stage with these constants, and what launch() does after it."""
    vars(module).update(constants)
    try:
        module.main()
    finally:
        while common.locks:
            common.locks.pop().release()


class FakeLLM:
    """Answers with one line per class, another place for every seed; stops after `most` answers."""
    def __init__(self, most=999):
        self.most, self.seeds, self.requests = most, [], []

    def __call__(self, request, seed):
        if len(self.seeds) == self.most:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        self.requests.append(request)
        classes = ("car", "bus", "sky", "road") if seed % 3 else common.CLASSES
        lines = [f"{k + 1}. a photo of a {c} in town {seed}" for k, c in enumerate(classes)]
        return {"answer": "\n".join(lines) + "\n6. a photo of", "cut": True}


class Network(torch.nn.Conv2d):
    dtype, config = property(lambda self: self.weight.dtype), {}


class FakePipeline:
    """Stands for a pipeline of diffusers: paints a colour that depends on seed and batch."""
    def __init__(self, sampler=None, dtype=torch.float32):
        self.scheduler = sampler or scheduler("EulerDiscreteScheduler")
        self.unet, self.batches = Network(2, 2, 3, dtype=dtype), []

    def to(self, device):
        self.device = torch.device(device)

    def set_progress_bar_config(self, disable):
        assert disable

    def __call__(self, prompt, generator, num_inference_steps, height, width, guidance_scale=1):
        self.batches.append(prompt)
        shade, images = len("".join(prompt)) % 256, []
        for g in generator:
            images.append(Image.new("RGB", (width, height), (shade, g.initial_seed() % 256, 9)))
            images[-1].putpixel((0, 0), (255, 255, 255))
        return SimpleNamespace(images=images)


class WithoutGuidance(FakePipeline):
    def __call__(self, prompt, generator, num_inference_steps, height, width):
        return super().__call__(prompt, generator, num_inference_steps, height, width)


PROMPTS = ["a photo of a car in rain", "a photo of a bus in the snow", "a photo of a tram in €"]


class Job:
    """Runs of 02 in one folder with a fake pipeline, groups of two, five images if not told so"""
    def __init__(self, folder):
        self.out, self.prompts, self.pipeline = folder / "out", folder / "prompts.txt", None
        folder.mkdir(exist_ok=True)
        self.prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    def run(self, preview=False, **constants):
        """-> the batches that were painted"""
        stage = fresh("02_generate")
        if not preview:
            stage.contact_sheet = lambda *_: None
        self.pipeline = constants.pop("pipeline", FakePipeline())
        vars(stage).update({"OUT": str(self.out), "PROMPTS": str(self.prompts), "GROUP": 2,
                            "N_IMAGES": 5, "SIZE": (16, 16)} | constants)
        stage.load_pipeline = lambda name: (self.pipeline, {
            "num_inference_steps": 1, "height": 16, "width": 16})
        stage.check()
        run_main(stage)
        return self.pipeline.batches

    def index(self):
        return [json.loads(line) for line in (self.out / "index.jsonl").read_text().splitlines()]

    def pictures(self):
        return {path.name: path.read_bytes() for path in sorted(self.out.glob("0*.png"))}
