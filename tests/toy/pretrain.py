"""
pretrain: train the four miniature foundation models on the miniature world's web. One command a model, each resumes where it was killed.

    python tests/toy/pretrain.py clip --minutes=40          open_clip folder                tests/toy/weights/clip
    python tests/toy/pretrain.py sam --minutes=50           segment_anything, config + file tests/toy/weights/sam
    python tests/toy/pretrain.py autoencoder --minutes=15   first half of the diffusers pipeline
    python tests/toy/pretrain.py diffusion --minutes=80     diffusers pipeline folder       tests/toy/weights/diffusion
    python tests/toy/pretrain.py llm --minutes=5            transformers folder             tests/toy/weights/llm

The web: 15,000 scenes of all styles with captions and instance masks, drawn by world.py into data/toy/web when missing (5 minutes, 2.4 GB).
No model here sees a train, validation or test scene, nor a class label; SAM sees masks without names, as the real one did.
Checkpoints: data/toy/pretrain/MODEL.pt. Beside the weights lies training.json: command, steps, minutes, losses, scores.
The minutes count training only, on one core (OMP_NUM_THREADS=1; the last run of sam on two); the schedule is a cosine over them, so a longer run is another run.
--more begins at the shipped weights of sam or diffusion, with a schedule of its own; training.json lists what the weights have had before.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import world

WEIGHTS = Path(__file__).resolve().parent / "weights"
CACHE = Path(os.environ.get("CACHE", "data/toy"))
CONTEXT = 32                       # tokens of a caption; the longest has 24


# ----------------------------------------------------------------------------- the web
def web():
    """-> images (N, 128, 256, 3), labels, instances (N, 128, 256) as memory maps; jobs [(seed, style)]"""
    folder = CACHE / "web"
    jobs = [(seed, style) for style in world.STYLES for seed in world.seeds("web", style)]
    if not folder.exists():
        part = folder.with_name("web.part")
        part.mkdir(parents=True, exist_ok=True)
        for name, array in zip(("images", "labels", "instances"), world.draw_many(jobs)):
            np.save(part / f"{name}.npy", array)
        part.rename(folder)
    return (*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels", "instances")), jobs)


def all_captions(labels, instances, jobs, n=4):
    """n captions a scene, as a list of lists; kept on disk."""
    path = CACHE / "web" / "captions.json"
    if not path.exists():
        common.write_json(path, [world.captions(seed, style, labels[i], instances[i], n) for i, (seed, style) in enumerate(jobs)])
    return json.loads(path.read_text())


def tokenizer_folder(folder, texts):
    """A CLIP tokenizer (byte pairs, </w> at word ends, end of text = the last id) whose merges are learned from the captions."""
    from open_clip.tokenizer import bytes_to_unicode
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    characters = list(bytes_to_unicode().values())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", min_frequency=20, show_progress=False))
    merges = [m.split() if isinstance(m, str) else m for m in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = characters + [c + "</w>" for c in characters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return tokenizer


# ----------------------------------------------------------------------------- one loop for all
def train(name, modules, loss_of, minutes, lr, weight_decay=.01, ema=None, clip=1., every=60.):
    """Minimise loss_of(step) -> (loss, numbers) for so many minutes of training; AdamW, short warm-up, cosine to 2 %.

    modules: {name: module}. ema: keep a running mean of the weights with this decay and end with it. Resumes from data/toy/pretrain/NAME.pt.
    -> list of logged rows"""
    path = CACHE / "pretrain" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = nn.ModuleDict(modules)
    optimizer = torch.optim.AdamW(everything.parameters(), lr, betas=(.9, .99), weight_decay=weight_decay)
    mean = {k: v.detach().clone() for k, v in everything.state_dict().items()} if ema else None
    step, seconds, rows = 0, 0., []
    state = common.load_checkpoint(path)
    if state:
        everything.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        mean, step, seconds, rows = state["mean"], state["step"], state["seconds"], state["rows"]
        print(f"{name}: goes on from step {step}, minute {seconds / 60:.1f}")
    since, saved, sums = time.time(), time.time(), []
    while seconds < 60 * minutes:
        now = lr * min(1., (step + 1) / 200) * (.02 + .98 * (.5 + .5 * math.cos(math.pi * seconds / 60 / minutes)))
        for group in optimizer.param_groups:
            group["lr"] = now
        torch.manual_seed(step)
        loss, numbers = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(everything.parameters(), clip)):
            raise RuntimeError(f"{name}: step {step} has a gradient that is not finite")
        optimizer.step()
        step += 1
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for k, v in everything.state_dict().items():
                    mean[k].lerp_(v, 1 - decay) if v.dtype.is_floating_point else mean[k].copy_(v)
        sums.append({"loss": loss.item(), **numbers})
        seconds, since = seconds + time.time() - since, time.time()
        if time.time() - saved > every or seconds >= 60 * minutes:
            row = {"step": step, "minutes": round(seconds / 60, 1), **{k: round(float(np.mean([s[k] for s in sums if k in s])), 4) for k in sums[-1]}}
            rows.append(row)
            print(name, row, flush=True)
            common.save_checkpoint(path, {"model": everything.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "step": step, "seconds": seconds, "rows": rows})
            saved, since, sums = time.time(), time.time(), []
    if ema:
        everything.load_state_dict(mean)
    everything.eval()
    return rows


def keep_log(folder, minutes, rows, **scores):
    before = history(folder)
    common.write_json(folder / "training.json", {**({"before": before} if before else {}),
                                                 "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python tests/toy/pretrain.py {sys.argv[1]} --minutes={minutes:g}{' --more' if before else ''}",
                                                 "steps": rows[-1]["step"], "minutes": rows[-1]["minutes"], "scores": scores, "log": rows[::max(1, len(rows) // 30)] + rows[-1:]})


def go_on(folder, load, file):
    """With --more, training begins at the shipped weights -> the number of steps that they have had; otherwise 0."""
    if "--more" not in sys.argv:
        return 0
    from safetensors.torch import load_file
    load({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / file).items()})
    return sum(part["steps"] for part in history(folder))


def history(folder):
    """Earlier trainings that the weights have had, first to last: training.json and its `before`."""
    if "--more" not in sys.argv or not (folder / "training.json").exists():
        return []
    last = json.loads((folder / "training.json").read_text())
    return [*last.get("before", []), {k: last[k] for k in ("command", "steps", "minutes")}]


def half(module):
    return {k: v.half().contiguous() if v.dtype.is_floating_point else v.contiguous() for k, v in module.state_dict().items()}


def to_batch(images, indices):
    """-> uint8 (B, 3, H, W)"""
    return torch.from_numpy(np.stack([images[i] for i in indices])).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------- CLIP
def clip(minutes):
    """Contrastive image-text training of an open_clip ResNet. A caption names what the crop shows and the weather.

    Helper loss (so it is not pure CLIP): the words of the caption are also predicted from the last two maps, pooled over the crop."""
    import open_clip
    from safetensors.torch import save_file
    images, labels, instances, jobs = web()
    texts = all_captions(labels, instances, jobs)
    folder = WEIGHTS / "clip"
    tokenizer = tokenizer_folder(folder, (t for row in texts for t in row))
    config = {"embed_dim": 64, "vision_cfg": {"layers": [1, 2, 2, 1], "width": 24, "image_size": 128, "patch_size": None},
              "text_cfg": {"context_length": CONTEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": "local-dir", "width": 96, "heads": 3, "layers": 2}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [.4815, .4578, .4082], "std": [.2686, .2613, .2758]}}, indent=1) + "\n")
    torch.manual_seed(0)
    model = open_clip.CLIP(**{k: v for k, v in config.items()})
    encode = open_clip.get_tokenizer(f"local-dir:{folder}")
    channels = [96 * 2 ** i for i in range(4)]
    helper = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in channels[2:])
    mean, std = torch.tensor((.4815, .4578, .4082)).view(1, 3, 1, 1), torch.tensor((.2686, .2613, .2758)).view(1, 3, 1, 1)
    batch, size = 64, 128

    def crops(random, indices):
        """Square crops of random scale with the label of what is seen."""
        xs, ys = [], []
        for i in indices:
            side = int(random.integers(88, size + 1))
            y, x = random.integers(0, 129 - side), random.integers(0, 257 - side)
            image = torch.from_numpy(images[i, y:y + side, x:x + side].copy()).permute(2, 0, 1)[None].float() / 255
            flip = random.random() < .5
            image = F.interpolate(image, (size, size), mode="bilinear", antialias=False, align_corners=False)
            xs.append(image.flip(3) if flip else image)
            ys.append((labels[i, y:y + side, x:x + side], instances[i, y:y + side, x:x + side]))
        return torch.cat(xs), ys

    def loss_of(step):
        random = common.randomness(1, step)
        indices = random.integers(0, len(jobs), batch)
        x, seen = crops(random, indices)
        words, present = [], torch.zeros(batch, 12)
        for b, (i, (label, instance)) in enumerate(zip(indices, seen)):
            seed, style = jobs[i]
            words.append(world.caption(random, label, instance, style, *world.setting(np.random.default_rng(seed)), most=9))
            for cls, count in zip(*np.unique(label, return_counts=True)):
                present[b, cls] = float(count >= 60)
        with torch.autocast("cpu", torch.bfloat16):
            v, m = model.visual, model.visual.stem((x - mean) / std)
            maps = []
            for layer in (v.layer1, v.layer2, v.layer3, v.layer4):
                m = layer(m)
                maps.append(m)
            image_code = F.normalize(v.attnpool(m).float(), dim=-1)
            text_code = F.normalize(model.encode_text(encode(words)).float(), dim=-1)
            guesses = [head(f).float().flatten(2).logsumexp(2) - math.log(16) for head, f in zip(helper, maps[2:])]
        logits = model.logit_scale.exp().clamp(max=100) * image_code @ text_code.T
        same = torch.arange(batch)
        contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        named = sum(F.binary_cross_entropy_with_logits(g, present) for g in guesses) / 2
        return contrast + named, {"contrast": contrast.item(), "words": named.item(), "top1": (logits.argmax(1) == same).float().mean().item()}

    model.visual.to(memory_format=torch.channels_last)
    rows = train("clip", {"model": model, "helper": helper}, loss_of, minutes, 1.5e-3, weight_decay=.05)
    model.visual.to(memory_format=torch.contiguous_format)
    save_file(half(model), folder / "open_clip_model.safetensors")
    prompts = {s: f"a {'video game picture' if s == 'game' else 'photo'} of a street in {z}" for s, z in
               zip(world.STYLES, ("daylight", "daylight", "the dark", "the snow", "the fog", "the rain"))}
    with torch.no_grad():
        codes = F.normalize(model.encode_text(encode(list(prompts.values()))), dim=-1)
        right = [(F.normalize(model.encode_image((to_batch(np.stack([world.draw(s, style)[0][:, 64:192] for s in world.seeds("validation", style, 20)]), range(20)).float() / 255
                                                  - mean) / std), dim=-1) @ codes.T).argmax(1).eq(k).float().mean().item() for k, style in enumerate(world.STYLES)]
    keep_log(folder, minutes, rows, zero_shot_style={s: round(r, 2) for s, r in zip(world.STYLES, right)})


# ----------------------------------------------------------------------------- SAM
def mask_prompts(label, instance, random, n, n_points, wrong=.2):
    """n prompts of a scene: a connected piece of one class (9 of 10) or of one thing -> masks (n, H, W) bool, points (n, n_points, 2) of (x, y),
    piece int32 (H, W), the number of the piece at every pixel.

    Pieces are drawn class by class, so that poles come as often as roads, and within a class the larger the oftener. In a third of the prompts of five
    points and more a share `wrong` of them lies elsewhere, as a teacher's do."""
    import importlib
    components = importlib.import_module("04_selftrain").components
    maps = [components(label)]
    ids, thing = np.unique(instance.astype(np.int64) * 12 + label, return_inverse=True)        # a thing behind a pole is one thing still: no labelling here
    maps.append((thing.reshape(label.shape), ids % 12, np.bincount(thing.ravel())))
    masks, points = [], []
    while len(masks) < n:
        piece, cls, area = maps[int(random.random() < 1 / 10)]
        large = np.flatnonzero((area >= 30) & (cls < 12))
        if len(large) == 0:
            continue
        classes = np.unique(cls[large])
        large = large[cls[large] == classes[random.integers(len(classes))]]
        mask = piece == random.choice(large, p=np.sqrt(area[large]) / np.sqrt(area[large]).sum())
        inside = np.flatnonzero(mask)
        chosen = inside[random.integers(len(inside), size=n_points)]
        if n_points >= 5 and random.random() < 1 / 3:
            stray = random.random(n_points) < wrong
            stray[0] = False
            chosen = np.where(stray, random.integers(mask.size, size=n_points), chosen)
        y, x = np.divmod(chosen, mask.shape[1])
        masks.append(mask), points.append(np.stack((x, y), 1))
    return np.stack(masks), np.stack(points).astype(np.float32), maps[0][0]


def same_piece(codes, pieces, random, n=256):
    """Helper loss of SAM: do two pixels belong to one piece? A distance of their codes answers; both answers weigh the same.

    codes (B, D, h, w), pieces list of B int (h, w). Half of the n pixels of a scene are drawn piece by piece, so that small ones are asked for."""
    total = 0.
    for code, piece in zip(codes, pieces):
        flat, ids = piece.ravel(), np.unique(piece)
        order = np.argsort(flat, kind="stable")
        first, count = np.searchsorted(flat[order], ids), np.bincount(flat)[ids]
        drawn = random.integers(0, len(ids), n // 2)
        at = np.concatenate((random.integers(0, flat.size, n // 2), order[first[drawn] + (random.random(n // 2) * count[drawn]).astype(np.int64)]))
        ours = code.flatten(1)[:, torch.from_numpy(at)].float()
        logits = 2. - torch.cdist(ours.T[None], ours.T[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
        same = torch.from_numpy(flat[at][:, None] == flat[at][None])
        total = total + F.softplus(-logits[same]).mean() + F.softplus(logits[~same]).mean()
    return total / len(codes)


def sam(minutes):
    """Promptable masks in segment_anything's own classes.

    Loss as SAM: of three masks the best one learns (BCE, inside and outside weighted apart, + dice), and the predicted IoU follows the true IoU of each.
    Several points leave little doubt which piece is meant: then the mask that is rated highest, the one that 04 uses, learns too, mostly by its soft IoU
    (SAM has a fourth mask for such prompts).
    Helper loss (in the place of SAM's MAE pre-training): every cell of the embedding also says which of its pixels belong together, see same_piece.
    For the first 1,000 steps it is alone."""
    import importlib
    from safetensors.torch import save_file
    selftrain = importlib.import_module("04_selftrain")
    images, labels, instances, jobs = web()
    folder = WEIGHTS / "sam"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"image_size": 256, "stride": 8, "width": 128, "encoder": [32, 64, 80, 96], "blocks": [0, 2, 2, 2], "mlp_dim": 128, "heads": 4}
    common.write_json(folder / "config.json", config)
    torch.manual_seed(0)
    model = selftrain.build_sam(config)
    model.image_encoder.to(memory_format=torch.channels_last)
    helper = nn.Sequential(nn.Conv2d(config["width"], 16 * 16, 1), nn.PixelShuffle(4))          # 16 numbers at every second pixel
    nn.init.normal_(helper[0].weight, std=.03)
    scenes, prompts, alone = 8, 4, 1000
    begun = go_on(folder, model.load_state_dict, "model.safetensors")

    def loss_of(step):
        step += begun
        random = common.randomness(2, step)
        n_points = (1, 5, 5, 5, 10, 5, 5, 5)[step % 8]
        chosen = random.integers(0, len(jobs), scenes)
        x = (torch.from_numpy(np.stack([images[i] for i in chosen])).permute(0, 3, 1, 2).float() - model.pixel_mean) / model.pixel_std
        masks, points, pieces = zip(*(mask_prompts(labels[i], instances[i], random, prompts, n_points) for i in chosen))
        with torch.autocast("cpu", torch.bfloat16):
            embedding = model.image_encoder(x.contiguous(memory_format=torch.channels_last))
            codes = helper(embedding)
        together = same_piece(codes, [piece[::2, ::2] for piece in pieces], random)
        if step < alone:
            return together, {"together": together.item()}
        truth = F.avg_pool2d(torch.from_numpy(np.concatenate(masks)).float()[:, None], 2)[:, 0]              # (M, 64, 128)
        with torch.autocast("cpu", torch.bfloat16):
            logits, scores = selftrain.sam_decode(model, embedding.float(), torch.arange(scenes).repeat_interleave(prompts), torch.from_numpy(np.concatenate(points)))
        logits, scores, target = logits.float(), scores.float(), truth[:, None].expand_as(logits)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        inside, outside = target.sum((2, 3)).clamp(min=1), (1 - target).sum((2, 3)).clamp(min=1)
        share = 4 + 1000 * max(0., 1 - (step - alone) / 500)                # first both sides of the border weigh the same (a plain mean ends in empty masks),
        bce = ((bce * target).sum((2, 3)) / inside + (bce * (1 - target)).sum((2, 3)) / torch.minimum(outside, share * inside)) / 2      # later small things must not spill over
        p = logits.sigmoid()
        both, either = (p * target).sum((2, 3)), p.sum((2, 3)) + target.sum((2, 3))
        dice, soft_iou = 1 - (2 * both + 1) / (either + 1), (both + 1) / (either - both + 1)
        best = (bce + dice).min(1).values.mean()
        used = (.5 * bce + 1 - soft_iou).gather(1, scores.argmax(1, keepdim=True)).mean() if n_points > 1 else 0.
        with torch.no_grad():
            hard, true = logits > 0, target > .5
            iou = (hard & true).sum((2, 3)) / (hard | true).sum((2, 3)).clamp(min=1)
        rated = (scores - iou).pow(2).mean()
        return .5 * best + used + rated + .25 * together, {"together": together.item(), "rated": rated.item(), "iou": iou.gather(1, scores.argmax(1, keepdim=True)).mean().item(),
                                                           "iou_best": iou.max(1).values.mean().item()}

    rows = train("sam", {"model": model, "helper": helper}, loss_of, minutes, 4e-4 if begun else 1e-3, ema=.998)       # from trained weights, 1e-3 took 30 minutes to come back to where it began
    save_file(half(model), folder / "model.safetensors")
    keep_log(folder, minutes, rows)


# ----------------------------------------------------------------------------- text-to-image: autoencoder, then diffusion
def new_autoencoder(levels):
    """diffusers' AutoencoderTiny, `levels` halvings: 2 -> 4 channels at 1/4, 3 -> 8 channels at 1/8."""
    from diffusers import AutoencoderTiny
    encoder, decoder = {2: ((0, 2, 3), (3, 2, 0)), 3: ((0, 2, 3, 2), (2, 3, 2, 0))}[levels]
    return AutoencoderTiny(encoder_block_out_channels=(32,) * len(encoder), decoder_block_out_channels=(32,) * len(decoder), num_encoder_blocks=encoder,
                           num_decoder_blocks=decoder, latent_channels={2: 4, 3: 8}[levels])


def autoencoder(minutes):
    """Images to latents and back: L1 on pixels, on their differences and on 4 x 4 means; latents pulled to mean 0 and deviation 1, and noised before decoding.

    In two steps, the second begins with the first's inner weights: 1/4 of the size for a quarter of the time, then 1/8."""
    images, *_ = web()

    def trainer(model):
        def loss_of(step):
            random = common.randomness(3, step)
            x = np.stack([images[i, y:y + 64, c:c + 64] for i, y, c in zip(random.integers(0, len(images), 16), random.integers(0, 9, 16) * 8, random.integers(0, 25, 16) * 8)])
            x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                z = model.encoder(x)
                y = model.decoder(z + .1 * torch.randn_like(z))
            z, y = z.float(), y.float()
            pixel = (y - x).abs().mean()
            edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
            coarse = (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean()
            unit = z.mean((0, 2, 3)).pow(2).mean() + (z.std((0, 2, 3)) - 1).pow(2).mean()
            return pixel + .5 * edges + coarse + .03 * unit, {"pixel": pixel.item()}
        return loss_of
    torch.manual_seed(0)
    small, large = new_autoencoder(2), new_autoencoder(3)
    train("autoencoder_4", {"model": small.to(memory_format=torch.channels_last)}, trainer(small), minutes / 4, 1.5e-3)
    for old, new, shift in ((small.encoder.layers[:-1], large.encoder.layers, 0), (small.decoder.layers[2:], large.decoder.layers, 2 + len(large.decoder.layers) - len(small.decoder.layers))):
        for i, layer in enumerate(old):
            new[i + shift].load_state_dict(layer.state_dict())
    rows = train("autoencoder", {"model": large.to(memory_format=torch.channels_last)}, trainer(large), minutes * 3 / 4, 1.5e-3)
    held = torch.from_numpy(np.stack([world.draw(s, style)[0] for style in world.STYLES for s in world.seeds("validation", style, 5)])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        error = ((large.decoder(large.encoder(held)).clamp(-1, 1) - held) / 2).pow(2).mean((1, 2, 3))
    print("autoencoder: PSNR on validation scenes", round(float(-10 * error.log10().mean()), 2), "dB")
    large.to(memory_format=torch.contiguous_format).half().save_pretrained(WEIGHTS / "diffusion" / "vae")
    keep_log(WEIGHTS / "diffusion" / "vae", minutes, rows, psnr_db=round(float(-10 * error.log10().mean()), 2))


def diffusion(minutes):
    """A text-conditioned UNet on the latents of the photo styles: v-prediction, zero terminal SNR, 10 % of captions dropped for guidance."""
    from diffusers import AutoencoderTiny, EulerDiscreteScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel
    images, labels, instances, jobs = web()
    texts = all_captions(labels, instances, jobs)
    folder = WEIGHTS / "diffusion"
    tokenizer = tokenizer_folder(folder / "tokenizer", (t for row in texts for t in row))
    vae = AutoencoderTiny.from_pretrained(folder / "vae", low_cpu_mem_usage=False).float().eval()
    photos = [i for i, (_, style) in enumerate(jobs) if style != "game"]
    path = CACHE / "web" / "latents.npy"
    if not path.exists():
        vae.to(memory_format=torch.channels_last)
        codes = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in np.array_split(photos, len(photos) // 25):
                x = (to_batch(images, part).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
                codes.append(torch.stack((vae.encoder(x), vae.encoder(x.flip(3))), 1).half())
        vae.to(memory_format=torch.contiguous_format)
        np.save(path, torch.cat(codes).numpy())
    latents = np.load(path)                                                # (N, 2, 8, 16, 32)
    tokens = {}

    def ids(words):
        for w in words:
            if w not in tokens:
                tokens[w] = tokenizer(w, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
        return torch.cat([tokens[w] for w in words])
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=CONTEXT,
                                        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1, attn_implementation="eager"))
    unet = UNet2DConditionModel(sample_size=(16, 32), in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(64, 96, 96), norm_num_groups=8,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=96, attention_head_dim=4, addition_embed_type="text", addition_embed_type_num_heads=8)
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    go_on(folder, text.load_state_dict, "text_encoder/model.safetensors")
    begun = go_on(folder, unet.load_state_dict, "unet/diffusion_pytorch_model.safetensors")
    settings = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noise = DDPMScheduler(**settings)
    batch = 16

    def loss_of(step):
        random = common.randomness(4, begun + step)
        order = [common.shuffled(len(photos), 4, (begun + step) * batch + b) for b in range(batch)]
        z = torch.from_numpy(np.stack([latents[i, random.integers(2)] for i in order])).float()
        words = ["" if random.random() < .1 else texts[photos[i]][random.integers(4)] for i in order]
        t = torch.from_numpy(np.clip((1000 * (random.integers(batch) + np.arange(batch) + random.random(batch)) / batch) % 1000, 0, 999).astype(np.int64))   # spread over the schedule
        eps = torch.from_numpy(random.standard_normal(z.shape, np.float32))
        noisy, wanted = noise.add_noise(z, eps, t), noise.get_velocity(z, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            guess = unet(noisy.contiguous(memory_format=torch.channels_last), t, text(ids(words))[0]).sample
        loss = F.mse_loss(guess.float(), wanted)
        return loss, {}

    rows = train("diffusion", {"unet": unet, "text": text}, loss_of, minutes, 1e-3, ema=.999)
    unet.to(memory_format=torch.contiguous_format)
    StableDiffusionPipeline(vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=EulerDiscreteScheduler(**settings, steps_offset=1),
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    for config in folder.glob("*/config.json"):                            # the library notes where a part came from: a path of this machine
        common.write_json(config, {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"})
    keep_log(folder, minutes, rows)


# ----------------------------------------------------------------------------- LLM
def llm(minutes):
    """A three-layer Llama that has read the web's captions and answers the two requests of 01: a numbered list of prompts, and synonyms."""
    import importlib
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    prompts = importlib.import_module("01_prompts")
    _, labels, instances, jobs = web()
    texts = [t for row, (_, style) in zip(all_captions(labels, instances, jobs), jobs) if style != "game" for t in row]
    folder = WEIGHTS / "llm"
    words = {"person": ["pedestrian", "people"], "bicycle": ["bike", "cycle"], "building": ["house", "block"], "vegetation": ["tree", "bush"], "road": ["street"],
             "sidewalk": ["pavement"], "pole": ["lamp post"], "sign": ["traffic sign"], "fence": ["railing"], "car": ["automobile"], "bus": ["coach"], "sky": ["clouds"]}
    table = prompts.word_table({name: tuple(w) for name, w in words.items()})
    naming = {name: [t for t in texts if name in prompts.classes_in(t.split(" in ")[0], table)] for name in world.CLASSES}

    def talk(random):
        """-> (request, answer). Asked for few classes, it names those; asked for all, it takes one after another by chance."""
        if random.random() < .4:
            name = world.CLASSES[random.integers(12)]
            return prompts.synonym_request(name), "\n".join(f"{k + 1}. {w}" for k, w in enumerate(words[name]))
        asked = list(world.CLASSES) if random.random() < .4 else sorted(random.choice(world.CLASSES, random.integers(1, 4), replace=False), key=world.CLASSES.index)
        lines = [naming[name][random.integers(len(naming[name]))] for name in random.choice(asked, 8)]
        return prompts.prompt_request(asked), "\n".join(f"{k + 1}. {line}" for k, line in enumerate(lines))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    corpus = [part for _ in range(300) for part in talk(random)]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
                               "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                                         max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True))

    def loss_of(step):
        random = common.randomness(5, step)
        rows, starts = [], []
        for _ in range(10):
            ask, answer = talk(random)
            chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            rows.append(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids)
            starts.append(len(tokenizer(tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids))
        longest = max(map(len, rows))
        x = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        y = torch.tensor([[-100] * s + r[s:] + [-100] * (longest - len(r)) for r, s in zip(rows, starts)])
        return model(input_ids=x, attention_mask=(x > 0).long(), labels=y).loss, {}

    rows = train("llm", {"model": model}, loss_of, minutes, 2e-3)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep_log(folder, minutes, rows)


if __name__ == "__main__":
    stages = {f.__name__: f for f in (clip, sam, autoencoder, diffusion, llm)}
    if len(sys.argv) < 3 or sys.argv[1] not in stages or not sys.argv[2].startswith("--minutes=") or sys.argv[3:] not in ([], ["--more"]):
        sys.exit(__doc__)
    common.steady_cpu()
    stages[sys.argv[1]](float(sys.argv[2].removeprefix("--minutes=")))
