"""
pretrain: train the four miniature foundation models on the miniature world's web, by five commands.
Each resumes where it was killed.

    python tests/toy/pretrain.py clip --minutes=40          weights/clip: open_clip folder
    python tests/toy/pretrain.py sam --minutes=50           weights/sam: config.json and weights
    python tests/toy/pretrain.py autoencoder --minutes=15   weights/diffusion/vae, for the next
    python tests/toy/pretrain.py diffusion --minutes=80     weights/diffusion: diffusers pipeline
    python tests/toy/pretrain.py llm --minutes=5            weights/llm: transformers folder

The web: 15,000 scenes of all styles with captions and instance masks. world.py draws them into
data/toy/web when they are missing (5 minutes, 2.4 GB). No model here sees a train, validation or
test scene, nor a class label; SAM sees masks without names, as the real one did.

Checkpoints: data/toy/pretrain/*.pt. Beside the weights lies training.json: command, steps,
minutes, losses, scores. The minutes count training only, on one core (OMP_NUM_THREADS=1; the last
run of sam on two). The learning rate is a cosine over them, so a longer run is another run.
--more begins at the shipped weights of sam or diffusion with a new cosine; training.json lists
which trainings the weights have had before.
"""
import json
import math
import os
import sys
import time
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import world
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from tests.toy.sam import build_sam

WEIGHTS = Path(__file__).resolve().parent / "weights"
CACHE = Path(os.environ.get("CACHE", "data/toy"))
CONTEXT = 32                            # tokens of a caption; the longest has 24
MORE = "--more" in sys.argv


# ------------------------------------------------------------------- the web
def web():
    """-> images (N, 128, 256, 3), labels and instances (N, 128, 256), uint8 as memory maps;
    [(seed, style)]"""
    folder = CACHE / "web"
    jobs = [(seed, style) for style in world.STYLES for seed in world.seeds("web", style)]
    names = ("images", "labels", "instances")
    if not folder.exists():
        part = folder.with_name("web.part")
        part.mkdir(parents=True, exist_ok=True)
        for name, array in zip(names, world.draw_many(jobs, title="the web")):
            np.save(part / f"{name}.npy", array)
        part.rename(folder)
    images, labels, instances = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    return images, labels, instances, jobs


def all_captions(labels, instances, jobs, n=4):
    """n captions per scene, as a list of lists; kept on disk."""
    path = CACHE / "web" / "captions.json"
    if not path.exists():
        texts = []
        for (seed, style), label, instance in zip(jobs, labels, instances):
            texts.append(world.captions(seed, style, label, instance, n))
        write_json(path, texts)
    return json.loads(path.read_text())


def tokenizer_folder(folder, texts):
    """A CLIP tokenizer whose merges are learned from the captions (byte pairs, </w> at the ends of
    words, end of text = the last id), saved to the folder and loaded from it."""
    from open_clip.tokenizer import bytes_to_unicode
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", min_frequency=20,
                                  show_progress=False)
    trained.train_from_iterator(texts, trainer)
    merges = []
    for merge in json.loads(trained.to_str())["model"]["merges"]:
        merges.append(merge.split() if isinstance(merge, str) else merge)
    characters = list(bytes_to_unicode().values())
    vocabulary = characters + [c + "</w>" for c in characters] + ["".join(m) for m in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return tokenizer


def to_batch(images, indices):
    """-> uint8 (B, 3, H, W)"""
    return torch.from_numpy(np.stack([images[i] for i in indices])).permute(0, 3, 1, 2)


def signed(images):
    """uint8 (B, 3, H, W) -> float -1 to 1, in the order of memory that convolutions like"""
    images = images.float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


def autocast():
    """bfloat16 where the CPU computes in it; elsewhere it would be 50 times slower than float32."""
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=supported)


# ------------------------------------------------------------------- one loop for all
def read_checkpoint(path):
    """-> the state that train() saved, or None. Raises Stop if it is broken."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        raise common.Stop(f"{path} cannot be read ({type(problem).__name__}): delete it, and the "
                          "training starts anew") from None


def means(rows):
    """[{name: number}] -> {name: mean of the rows that have it}, for the names of the last row"""
    found = {}
    for name in rows[-1]:
        values = [row[name] for row in rows if name in row]
        found[name] = round(float(np.mean(values)), 4)
    return found


@torch.no_grad()
def update_mean(mean, module, ema, step):
    """A running mean of the weights, shorter at first; buffers of whole numbers are copied."""
    decay = min(ema, (1 + step) / (10 + step))
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            mean[name].lerp_(value, 1 - decay)
        else:
            mean[name].copy_(value)


def descend(everything, optimizer, loss, rate):
    """One step down the gradient. Raises Stop if it is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if not torch.isfinite(nn.utils.clip_grad_norm_(everything.parameters(), 1.)):
        raise common.Stop(f"the gradient is not finite; the loss is {loss.item()}")
    optimizer.step()


def train(name, modules, loss_of, minutes, lr, weight_decay=.01, ema=None, every=60.):
    """Minimise loss_of(step) -> (loss, {name: number}) for so many minutes of training, by AdamW
    with a short warm-up and a cosine to 2 % of the learning rate. Resumes from the checkpoint NAME.

    modules: {name: module}. ema: end with the running mean of the weights of this decay.
    every: seconds between checkpoints -> list of logged rows"""
    path = CACHE / "pretrain" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = nn.ModuleDict(modules)
    optimizer = torch.optim.AdamW(everything.parameters(), lr, (.9, .99), weight_decay=weight_decay)
    mean = {key: value.detach().clone() for key, value in everything.state_dict().items()}
    step, seconds, rows = 0, 0., []
    state = read_checkpoint(path)
    if state:
        everything.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        mean, step, seconds, rows = [state[key] for key in ("mean", "step", "seconds", "rows")]
        print(f"{name}: goes on from step {step}, minute {seconds / 60:.1f}")
    since = saved = time.time()
    numbers = []
    while seconds < 60 * minutes:
        torch.manual_seed(step)
        loss, more = loss_of(step)
        step += 1
        cosine = .5 + .5 * math.cos(math.pi * seconds / 60 / minutes)
        descend(everything, optimizer, loss, lr * min(1., step / 200) * (.02 + .98 * cosine))
        if ema:
            update_mean(mean, everything, ema, step)
        numbers.append({"loss": loss.item(), **more})
        seconds, since = seconds + time.time() - since, time.time()
        if time.time() - saved > every or seconds >= 60 * minutes:
            rows.append({"step": step, "minutes": round(seconds / 60, 1), **means(numbers)})
            print(name, rows[-1], flush=True)
            state = {"model": everything.state_dict(), "optimizer": optimizer.state_dict(),
                     "mean": mean, "step": step, "seconds": seconds, "rows": rows}
            with common.whole(path) as part:
                torch.save(state, part)
            since = saved = time.time()
            numbers = []
    if ema:
        everything.load_state_dict(mean)
    everything.eval()
    return rows


# ------------------------------------------------------------------- what is written
def write_json(path, value):
    common.write_text(path, json.dumps(value, indent=1) + "\n")


def history(folder):
    """Earlier trainings that the weights have had, first to last: those of training.json."""
    if not MORE or not (folder / "training.json").exists():
        return []
    last = json.loads((folder / "training.json").read_text())
    latest = {key: last[key] for key in ("command", "steps", "minutes")}
    return [*last.get("before", []), latest]


def keep_log(folder, minutes, rows, **scores):
    """Write training.json: at most 31 of the logged rows."""
    before = history(folder)
    threads, model = torch.get_num_threads(), sys.argv[1]
    command = f"OMP_NUM_THREADS={threads} python tests/toy/pretrain.py {model}"
    command += f" --minutes={minutes:g}" + (" --more" if before else "")
    found = {"before": before} if before else {}
    found |= {"command": command, "steps": rows[-1]["step"], "minutes": rows[-1]["minutes"]}
    found |= {"scores": scores, "log": rows[::max(1, len(rows) // 30)] + rows[-1:]}
    write_json(folder / "training.json", found)


def go_on(module, folder, file):
    """With --more, load the shipped weights -> how many steps they have had. Otherwise 0."""
    if not MORE:
        return 0
    module.load_state_dict({k: v.float() for k, v in load_file(folder / file).items()})
    return sum(training["steps"] for training in history(folder))


def half(module):
    """The weights in float16, for a file."""
    state = {}
    for name, value in module.state_dict().items():
        value = value.half() if value.dtype.is_floating_point else value
        state[name] = value.contiguous()
    return state


# ------------------------------------------------------------------- CLIP
CLIP = {"embed_dim": 64,
        "vision_cfg": {"layers": [1, 2, 2, 1], "width": 24, "image_size": 128, "patch_size": None},
        "text_cfg": {"context_length": CONTEXT, "hf_tokenizer_name": "local-dir",
                     "width": 96, "heads": 3, "layers": 2}}
CLIP_CHANNELS = (384, 768)              # of its last two maps
CLIP_PIXELS = {"mean": [.4815, .4578, .4082], "std": [.2686, .2613, .2758]}
CLIP_BATCH, CLIP_SIZE = 64, 128


def normalised(images):
    """float (B, 3, H, W) from 0 to 1 -> what CLIP sees"""
    mean, std = [torch.tensor(CLIP_PIXELS[key]).view(1, 3, 1, 1) for key in ("mean", "std")]
    return (images - mean) / std


def random_crop(image, label, instance, random):
    """A square crop of random scale, perhaps flipped -> image (1, 3, 128, 128) from 0 to 1, its
    label and instances (not flipped: only what is there matters)."""
    side = int(random.integers(88, CLIP_SIZE + 1))
    y = random.integers(0, 129 - side)
    x = random.integers(0, 257 - side)
    cut = np.s_[y:y + side, x:x + side]
    pixels = torch.from_numpy(image[cut].copy()).permute(2, 0, 1)[None].float() / 255
    flip = random.random() < .5
    pixels = F.interpolate(pixels, (CLIP_SIZE, CLIP_SIZE), mode="bilinear")
    return pixels.flip(3) if flip else pixels, label[cut], instance[cut]


def styles_told(model, encode):
    """How often the right one of six sentences is nearest to a validation scene, by style."""
    weather = ("daylight", "daylight", "the dark", "the snow", "the fog", "the rain")
    sentences = []
    for style, air in zip(world.STYLES, weather):
        kind = "video game picture" if style == "game" else "photo"
        sentences.append(f"a {kind} of a street in {air}")
    found = {}
    with torch.no_grad():
        codes = F.normalize(model.encode_text(encode(sentences)), dim=-1)
        for k, style in enumerate(world.STYLES):
            scenes = [world.draw(s, style)[0] for s in world.seeds("validation", style, 20)]
            middle = to_batch([scene[:, 64:192] for scene in scenes], range(20)).float() / 255
            image_codes = F.normalize(model.encode_image(normalised(middle)), dim=-1)
            nearest = (image_codes @ codes.T).argmax(1)
            found[style] = round(nearest.eq(k).float().mean().item(), 2)
    return found


def clip_batch(web_arrays, random):
    """-> crops (B, 3, 128, 128), their captions, which classes have 60 pixels and more (B, 12)"""
    images, labels, instances, jobs = web_arrays
    crops, words, present = [], [], torch.zeros(CLIP_BATCH, 12)
    for i in random.integers(0, len(jobs), CLIP_BATCH):
        crop, label, instance = random_crop(images[i], labels[i], instances[i], random)
        seed, style = jobs[i]
        place, sunny = world.setting(np.random.default_rng(seed))
        count = np.bincount(label.ravel(), minlength=12)
        present[len(crops)] = torch.from_numpy(count >= 60).float()
        crops.append(crop)
        words.append(world.caption(random, label, instance, style, place, sunny, most=9))
    return torch.cat(crops), words, present


def clip_loss(model, helper, crops, tokens, present):
    """Contrastive loss of images and captions. As a helper loss (so it is not pure CLIP), the words
    of the caption are also predicted from the last two maps, pooled over the crop."""
    tower, maps, guesses = model.visual, [], []
    with autocast():
        x = tower.stem(normalised(crops))
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            x = layer(x)
            maps.append(x)
        image_code = F.normalize(tower.attnpool(x).float(), dim=-1)
        text_code = F.normalize(model.encode_text(tokens).float(), dim=-1)
        for head, features in zip(helper, maps[2:]):
            guesses.append(head(features).float().flatten(2).logsumexp(2) - math.log(16))
    logits = model.logit_scale.exp().clamp(max=100) * image_code @ text_code.T
    same = torch.arange(len(logits))
    contrast = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
    named = sum(F.binary_cross_entropy_with_logits(guess, present) for guess in guesses) / 2
    top1 = (logits.argmax(1) == same).float().mean()
    numbers = {"contrast": contrast.item(), "words": named.item(), "top1": top1.item()}
    return contrast + named, numbers


def clip(minutes):
    """An open_clip ResNet. A caption names what the crop shows, and the weather."""
    images, labels, instances, jobs = web()
    texts = all_captions(labels, instances, jobs)
    folder = WEIGHTS / "clip"
    tokenizer = tokenizer_folder(folder, (text for row in texts for text in row))
    CLIP["text_cfg"]["vocab_size"] = len(tokenizer)
    config = {"model_cfg": CLIP, "preprocess_cfg": CLIP_PIXELS}
    write_json(folder / "open_clip_config.json", config)
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP)
    encode = open_clip.get_tokenizer(f"local-dir:{folder}")
    helper = nn.ModuleList(nn.Conv2d(channels, 12, 1) for channels in CLIP_CHANNELS)

    def loss_of(step):
        crops, words, present = clip_batch((images, labels, instances, jobs),
                                           np.random.default_rng((1, step)))
        return clip_loss(model, helper, crops, encode(words), present)

    model.visual.to(memory_format=torch.channels_last)
    modules = {"model": model, "helper": helper}
    rows = train("clip", modules, loss_of, minutes, 1.5e-3, weight_decay=.05)
    model.visual.to(memory_format=torch.contiguous_format)
    save_file(half(model), folder / "open_clip_model.safetensors")
    keep_log(folder, minutes, rows, zero_shot_style=styles_told(model, encode))


# ------------------------------------------------------------------- SAM
SAM = {"image_size": 256, "stride": 8, "width": 128, "encoder": [32, 64, 80, 96],
       "blocks": [0, 2, 2, 2], "mlp_dim": 128, "heads": 4}
SAM_SCENES, SAM_PROMPTS = 8, 4          # per step
SAM_POINTS = (1, 5, 5, 5, 10, 5, 5, 5)  # points per prompt, step after step
SAM_ALONE = 1000                        # first steps, which have the helper loss only


def mask_prompts(label, instance, random, n, n_points, wrong=.2):
    """n prompts of a scene: a connected piece of one class (9 of 10) or of one thing
    -> masks bool (n, H, W), points float32 (n, n_points, 2) as (x, y), piece int32 (H, W).

    Pieces are drawn class by class, so that poles come as often as roads; within a class, large
    ones come oftener. In a third of the prompts of five points and more, a share `wrong` of them
    lies elsewhere, as a teacher's do."""
    components = import_module("04_selftrain").components
    # a thing behind a pole is still one thing: its parts need not be connected
    thing_ids = instance.astype(np.int64) * 12 + label
    ids, thing = np.unique(thing_ids, return_inverse=True)
    things = thing.reshape(label.shape), ids % 12, np.bincount(thing.ravel())
    pieces = components(label)
    masks, points = [], []
    while len(masks) < n:
        piece, cls, area = things if random.random() < 1 / 10 else pieces
        large = np.flatnonzero((area >= 30) & (cls < 12))
        if len(large) == 0:
            continue
        classes = np.unique(cls[large])
        large = large[cls[large] == classes[random.integers(len(classes))]]
        weight = np.sqrt(area[large])
        mask = piece == random.choice(large, p=weight / weight.sum())
        inside = np.flatnonzero(mask)
        chosen = inside[random.integers(len(inside), size=n_points)]
        if n_points >= 5 and random.random() < 1 / 3:
            stray = random.random(n_points) < wrong
            stray[0] = False
            chosen = np.where(stray, random.integers(mask.size, size=n_points), chosen)
        y, x = np.divmod(chosen, mask.shape[1])
        masks.append(mask)
        points.append(np.stack((x, y), 1))
    return np.stack(masks), np.stack(points).astype(np.float32), pieces[0]


def same_piece(codes, pieces, random, n=256):
    """Helper loss of SAM: do two pixels belong to one piece? The distance of their codes answers;
    both answers weigh the same.

    codes (B, D, h, w), pieces: list of B int (h, w). Half of the n pixels of a scene are drawn
    piece by piece, so that small pieces come too."""
    total = 0.
    for code, piece in zip(codes, pieces):
        flat = piece.ravel()
        ids = np.unique(piece)
        order = np.argsort(flat, kind="stable")         # pixels piece by piece
        first = np.searchsorted(flat[order], ids)
        count = np.bincount(flat)[ids]
        drawn = random.integers(0, len(ids), n // 2)
        anywhere = random.integers(0, flat.size, n // 2)
        within = (random.random(n // 2) * count[drawn]).astype(np.int64)
        at = np.concatenate((anywhere, order[first[drawn] + within]))
        ours = code.flatten(1)[:, torch.from_numpy(at)].float().T[None]
        distance = torch.cdist(ours, ours, compute_mode="donot_use_mm_for_euclid_dist")[0]
        logits = 2. - distance
        same = torch.from_numpy(flat[at][:, None] == flat[at][None])
        total = total + F.softplus(-logits[same]).mean() + F.softplus(logits[~same]).mean()
    return total / len(codes)


def decode(model, embeddings, points):
    """SAM's three masks for the prompts of several scenes.

    embeddings (B, D, h, w), points (B, M, P, 2) -> logits (BM, 3, 4h, 4w), ratings (BM, 3)"""
    position = model.prompt_encoder.get_dense_pe()
    masks, ratings = [], []
    for embedding, prompts in zip(embeddings, points):
        sparse, dense = model.prompt_encoder((prompts, torch.ones(prompts.shape[:2])), None, None)
        logits, rated = model.mask_decoder(embedding[None], position, sparse, dense, True)
        masks.append(logits.float())
        ratings.append(rated.float())
    return torch.cat(masks), torch.cat(ratings)


def mask_losses(logits, ratings, truth, share, several):
    """SAM's losses. Of three masks the best one learns, by cross-entropy and dice; the predicted
    IoU follows the true IoU of each. Several points leave little doubt which piece is meant: then
    the mask that is rated highest, which 04 uses, learns too, mostly by its soft IoU (SAM has a
    fourth mask for such prompts).

    logits (M, 3, h, w), ratings (M, 3), truth (M, h, w) from 0 to 1. share: how much more the
    outside of a mask may weigh than its inside -> loss, {name: number}"""
    target = truth[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = target.sum((2, 3)).clamp(min=1)
    outside = (1 - target).sum((2, 3)).clamp(min=1)
    bce_inside = (bce * target).sum((2, 3)) / inside
    bce_outside = (bce * (1 - target)).sum((2, 3)) / torch.minimum(outside, share * inside)
    bce = (bce_inside + bce_outside) / 2
    p = logits.sigmoid()
    both = (p * target).sum((2, 3))
    either = p.sum((2, 3)) + target.sum((2, 3))
    dice = 1 - (2 * both + 1) / (either + 1)
    soft_iou = (both + 1) / (either - both + 1)
    highest = ratings.argmax(1, keepdim=True)
    best = (bce + dice).min(1).values.mean()
    used = (.5 * bce + 1 - soft_iou).gather(1, highest).mean() if several else 0.
    with torch.no_grad():
        hard, true = logits > 0, target > .5
        iou = (hard & true).sum((2, 3)) / (hard | true).sum((2, 3)).clamp(min=1)
    rated = (ratings - iou).pow(2).mean()
    numbers = {"rated": rated.item(), "iou": iou.gather(1, highest).mean().item(),
               "iou_best": iou.max(1).values.mean().item()}
    return .5 * best + used + rated, numbers


def sam(minutes):
    """Promptable masks, see mask_losses. In the place of SAM's pre-training, a helper loss, see
    same_piece: each cell of the embedding also says which of its pixels belong together."""
    images, labels, instances, jobs = web()
    folder = WEIGHTS / "sam"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", SAM)
    torch.manual_seed(0)
    model = build_sam(SAM)
    model.image_encoder.to(memory_format=torch.channels_last)
    # 16 numbers at every second pixel
    helper = nn.Sequential(nn.Conv2d(SAM["width"], 256, 1), nn.PixelShuffle(4))
    nn.init.normal_(helper[0].weight, std=.03)
    begun = go_on(model, folder, "model.safetensors")

    def loss_of(step):
        step += begun
        random = np.random.default_rng((2, step))
        n_points = SAM_POINTS[step % 8]
        chosen = random.integers(0, len(jobs), SAM_SCENES)
        x = model.preprocess(to_batch(images, chosen).float())
        scenes = [(labels[i], instances[i]) for i in chosen]
        drawn = [mask_prompts(*scene, random, SAM_PROMPTS, n_points) for scene in scenes]
        masks, points, pieces = zip(*drawn)
        with autocast():
            embedding = model.image_encoder(x.contiguous(memory_format=torch.channels_last))
            codes = helper(embedding)
        together = same_piece(codes, [piece[::2, ::2] for piece in pieces], random)
        if step < SAM_ALONE:
            return together, {"together": together.item()}
        truth = torch.from_numpy(np.concatenate(masks)).float()
        truth = F.avg_pool2d(truth[:, None], 2)[:, 0]                       # (M, 64, 128)
        with autocast():
            logits, ratings = decode(model, embedding.float(), torch.from_numpy(np.stack(points)))
        # first both sides of a border weigh the same (a plain mean ends in empty masks), later
        # small things must not spill over
        share = 4 + 1000 * max(0., 1 - (step - SAM_ALONE) / 500)
        loss, numbers = mask_losses(logits, ratings, truth, share, n_points > 1)
        return loss + .25 * together, {"together": together.item(), **numbers}

    rate = 4e-4 if begun else 1e-3      # from 1e-3, trained weights took 30 minutes to come back
    both = {"model": model, "helper": helper}
    rows = train(f"sam_{begun}", both, loss_of, minutes, rate, ema=.998)
    save_file(half(model), folder / "model.safetensors")
    keep_log(folder, minutes, rows)


# ------------------------------------------------------------------- text-to-image: autoencoder
def new_autoencoder(levels):
    """diffusers' AutoencoderTiny of `levels` halvings: 2, 4 channels at 1/4; 3, 8 at 1/8."""
    from diffusers import AutoencoderTiny
    encoder = {2: (0, 2, 3), 3: (0, 2, 3, 2)}[levels]       # blocks per size
    decoder = {2: (3, 2, 0), 3: (2, 3, 2, 0)}[levels]
    return AutoencoderTiny(encoder_block_out_channels=(32,) * len(encoder),
                           decoder_block_out_channels=(32,) * len(decoder),
                           num_encoder_blocks=encoder, num_decoder_blocks=decoder,
                           latent_channels={2: 4, 3: 8}[levels])


def reconstruction_loss(model, x):
    """L1 on pixels, on their differences and on means of 4 x 4; latents drawn to mean 0 and
    deviation 1, and noised before they are decoded. x: float (B, 3, 64, 64), -1 to 1"""
    with autocast():
        z = model.encoder(x)
        y = model.decoder(z + .1 * torch.randn_like(z))
    z, y = z.float(), y.float()
    pixel = (y - x).abs().mean()
    down = (y.diff(dim=2) - x.diff(dim=2)).abs().mean()
    across = (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
    coarse = (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean()
    unit = z.mean((0, 2, 3)).pow(2).mean() + (z.std((0, 2, 3)) - 1).pow(2).mean()
    loss = pixel + .5 * (down + across) + coarse + .03 * unit
    return loss, {"pixel": pixel.item()}


def train_autoencoder(name, model, images, minutes):
    model.to(memory_format=torch.channels_last)

    def loss_of(step):
        random = np.random.default_rng((3, step))
        which = random.integers(0, len(images), 16)
        rows = random.integers(0, 9, 16) * 8
        columns = random.integers(0, 25, 16) * 8
        crops = [images[i, y:y + 64, x:x + 64] for i, y, x in zip(which, rows, columns)]
        x = to_batch(crops, range(16)).float() / 127.5 - 1
        return reconstruction_loss(model, x)
    return train(name, {"model": model}, loss_of, minutes, 1.5e-3)


def autoencoder(minutes):
    """Images to latents and back, in two steps: 1/4 of the size for a quarter of the time, then
    1/8, which begins with the first one's inner weights."""
    images, *_ = web()
    torch.manual_seed(0)
    small, large = new_autoencoder(2), new_autoencoder(3)
    train_autoencoder("autoencoder_4", small, images, minutes / 4)
    for i, layer in enumerate(small.encoder.layers[:-1]):
        large.encoder.layers[i].load_state_dict(layer.state_dict())
    shift = len(large.decoder.layers) - len(small.decoder.layers)
    for i, layer in list(enumerate(small.decoder.layers))[2:]:
        large.decoder.layers[i + shift].load_state_dict(layer.state_dict())
    rows = train_autoencoder("autoencoder", large, images, minutes * 3 / 4)
    held = []
    for style in world.STYLES:
        held += [world.draw(seed, style)[0] for seed in world.seeds("validation", style, 5)]
    held = to_batch(held, range(len(held))).float() / 127.5 - 1
    with torch.no_grad():
        guess = large.decoder(large.encoder(held)).clamp(-1, 1)
    error = ((guess - held) / 2).pow(2).mean((1, 2, 3))
    psnr = round(float(-10 * error.log10().mean()), 2)
    print(f"autoencoder: PSNR on validation scenes {psnr} dB")
    folder = WEIGHTS / "diffusion" / "vae"
    large.to(memory_format=torch.contiguous_format).half().save_pretrained(folder)
    keep_log(folder, minutes, rows, psnr_db=psnr)
    (CACHE / "web/latents.npy").unlink(missing_ok=True)         # those of an earlier one


# ------------------------------------------------------------------- text-to-image: diffusion
NOISE = {"num_train_timesteps": 1000, "beta_start": .00085, "beta_end": .012,
         "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
         "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DIFFUSION_BATCH = 16


def all_latents(vae, images, photos):
    """The latents of the photos, plain and mirrored, float16 (N, 2, 8, 16, 32); kept on disk."""
    path = CACHE / "web" / "latents.npy"
    if not path.exists():
        vae.to(memory_format=torch.channels_last)
        codes = []
        parts = np.array_split(photos, max(1, len(photos) // 25))
        with torch.no_grad(), autocast():
            for part in tqdm(parts, "latents", disable=None, dynamic_ncols=True):
                x = signed(to_batch(images, part))
                codes.append(torch.stack((vae.encoder(x), vae.encoder(x.flip(3))), 1).half())
        vae.to(memory_format=torch.contiguous_format)
        with common.whole(path) as unfinished, open(unfinished, "wb") as file:
            np.save(file, torch.cat(codes).numpy())
    return np.load(path)


def new_diffusion(tokens):
    """-> text encoder, UNet; tokens: how many the tokenizer knows"""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(vocab_size=tokens, hidden_size=96, intermediate_size=256,
                            num_hidden_layers=2, num_attention_heads=3,
                            max_position_embeddings=CONTEXT, bos_token_id=tokens - 2,
                            eos_token_id=tokens - 1, pad_token_id=tokens - 1,
                            attn_implementation="eager")
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    text = CLIPTextModel(config)
    unet = UNet2DConditionModel(sample_size=(16, 32), in_channels=8, out_channels=8,
                                layers_per_block=1, block_out_channels=(64, 96, 96),
                                norm_num_groups=8, down_block_types=down, up_block_types=up,
                                cross_attention_dim=96, attention_head_dim=4,
                                addition_embed_type="text", addition_embed_type_num_heads=8)
    unet.set_attn_processor(AttnProcessor())
    return text, unet.to(memory_format=torch.channels_last)


@lru_cache(2)
def permutation(n, epoch):
    return np.random.default_rng((4, epoch, 1)).permutation(n)


def draw_photos(latents, texts, step, random):
    """-> latents float (B, 8, 16, 32) and a caption of each, of which a tenth are empty"""
    z, words = [], []
    for position in range(step * DIFFUSION_BATCH, (step + 1) * DIFFUSION_BATCH):
        epoch, item = divmod(position, len(texts))
        i = permutation(len(texts), epoch)[item]
        z.append(latents[i, random.integers(2)])
        caption = texts[i][random.integers(4)]
        words.append("" if random.random() < .1 else caption)
    return torch.from_numpy(np.stack(z)).float(), words


def spread_times(random):
    """-> int64 (B,) times that are spread evenly over the schedule"""
    which = random.integers(DIFFUSION_BATCH) + np.arange(DIFFUSION_BATCH)
    t = 1000 * (which + random.random(DIFFUSION_BATCH)) / DIFFUSION_BATCH
    return torch.from_numpy((t % 1000).clip(0, 999).astype(np.int64))


def save_pipeline(folder, **parts):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    scheduler = EulerDiscreteScheduler(**NOISE, steps_offset=1)
    pipeline = StableDiffusionPipeline(scheduler=scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False,
                                       **parts)
    pipeline.save_pretrained(folder)
    for path in sorted(folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)           # a path of this machine
        write_json(path, config)


def diffusion(minutes):
    """A text-conditioned UNet on the latents of the photo styles: v-prediction, zero terminal SNR,
    10 % of captions dropped for guidance."""
    from diffusers import AutoencoderTiny, DDPMScheduler
    images, labels, instances, jobs = web()
    texts = all_captions(labels, instances, jobs)
    folder = WEIGHTS / "diffusion"
    tokenizer = tokenizer_folder(folder / "tokenizer", (text for row in texts for text in row))
    vae = AutoencoderTiny.from_pretrained(folder / "vae", low_cpu_mem_usage=False).float().eval()
    photos = [i for i, (_, style) in enumerate(jobs) if style != "game"]
    latents, texts = all_latents(vae, images, photos), [texts[i] for i in photos]
    torch.manual_seed(0)
    text, unet = new_diffusion(len(tokenizer))
    go_on(text, folder, "text_encoder/model.safetensors")
    begun = go_on(unet, folder, "unet/diffusion_pytorch_model.safetensors")
    noise = DDPMScheduler(**NOISE)

    def loss_of(step):
        random = np.random.default_rng((4, begun + step))
        z, words = draw_photos(latents, texts, begun + step, random)
        ids = tokenizer(words, padding="max_length", truncation=True, max_length=CONTEXT,
                        return_tensors="pt").input_ids
        t = spread_times(random)
        eps = torch.from_numpy(random.standard_normal(z.shape, np.float32))
        noisy = noise.add_noise(z, eps, t)
        with autocast():
            x = noisy.contiguous(memory_format=torch.channels_last)
            guess = unet(x, t, text(ids)[0]).sample
        return F.mse_loss(guess.float(), noise.get_velocity(z, eps, t)), {}

    both = {"unet": unet, "text": text}
    rows = train(f"diffusion_{begun}", both, loss_of, minutes, 1e-3, ema=.999)
    unet.to(memory_format=torch.contiguous_format)
    save_pipeline(folder, vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer,
                  unet=unet.half())
    keep_log(folder, minutes, rows)


# ------------------------------------------------------------------- LLM
SYNONYMS = {"person": ["pedestrian", "people"], "bicycle": ["bike", "cycle"],
            "building": ["house", "block"], "vegetation": ["tree", "bush"], "road": ["street"],
            "sidewalk": ["pavement"], "pole": ["lamp post"], "sign": ["traffic sign"],
            "fence": ["railing"], "car": ["automobile"], "bus": ["coach"], "sky": ["clouds"]}
CHAT = ("{% for m in messages %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}")


def listed(lines):
    """A numbered list."""
    return "\n".join(f"{k + 1}. {line}" for k, line in enumerate(lines))


def talk(random, naming):
    """-> (request, answer). Asked for a few classes, it names those; asked for all, it takes one
    after another by chance. naming: {class: captions that name it}"""
    prompts = import_module("01_prompts")
    if random.random() < .4:
        name = world.CLASSES[random.integers(12)]
        return prompts.synonym_request(name), listed(SYNONYMS[name])
    asked = list(world.CLASSES)
    if random.random() >= .4:
        few = random.choice(world.CLASSES, random.integers(1, 4), replace=False)
        asked = sorted(few, key=world.CLASSES.index)
    lines = []
    for name in random.choice(asked, 8):
        lines.append(naming[name][random.integers(len(naming[name]))])
    return prompts.prompt_request(asked), listed(lines)


def captions_by_class():
    """{class: captions of photos that name it}"""
    prompts = import_module("01_prompts")
    _, labels, instances, jobs = web()
    table = prompts.word_table({name: tuple(words) for name, words in SYNONYMS.items()})
    naming = {name: [] for name in world.CLASSES}
    for row, (_, style) in zip(all_captions(labels, instances, jobs), jobs):
        for text in row if style != "game" else ():
            for name in prompts.classes_in(text.split(" in ")[0], table):
                naming[name].append(text)
    return naming


def llm_tokenizer(corpus):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special,
                                  initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>",
                                        bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def llm(minutes):
    """A three-layer Llama that has read the web's captions and answers the two requests of 01: a
    numbered list of prompts, and synonyms."""
    from transformers import LlamaConfig, LlamaForCausalLM
    naming = captions_by_class()
    folder = WEIGHTS / "llm"
    random = np.random.default_rng(0)
    corpus = []
    for _ in range(300):
        corpus += talk(random, naming)
    tokenizer = llm_tokenizer(corpus)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256,
                         num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                         max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)

    def ids_of(chat, **options):
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False).input_ids

    def loss_of(step):
        random = np.random.default_rng((5, step))
        rows, starts = [], []
        for _ in range(10):
            ask, answer = talk(random, naming)
            question = {"role": "user", "content": ask}
            rows.append(ids_of([question, {"role": "assistant", "content": answer}]))
            starts.append(len(ids_of([question], add_generation_prompt=True)))
        longest = max(map(len, rows))
        x = torch.zeros(10, longest, dtype=torch.long)
        y = torch.full((10, longest), -100)             # not learned: the request, and padding
        for k, (row, start) in enumerate(zip(rows, starts)):
            x[k, :len(row)] = torch.tensor(row)
            y[k, start:len(row)] = torch.tensor(row[start:])
        return model(input_ids=x, attention_mask=(x > 0).long(), labels=y).loss, {}

    rows = train("llm", {"model": model}, loss_of, minutes, 2e-3)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep_log(folder, minutes, rows)


STAGES = {"clip": clip, "sam": sam, "autoencoder": autoencoder, "diffusion": diffusion, "llm": llm}


def main(model="", minutes="", more=None, *rest):
    number = minutes.removeprefix("--minutes=")
    is_number = number != minutes and number.replace(".", "", 1).isdigit() and float(number) > 0
    options = (None, "--more") if model in ("sam", "diffusion") else (None,)
    if model not in STAGES or not is_number or more not in options or rest:
        sys.exit(__doc__)
    common.device()                     # on a CPU: repeatable, and memory is kept
    try:
        STAGES[model](float(number))
    except common.Stop as problem:
        sys.exit(f"pretrain.py: {model}: {problem}")


if __name__ == "__main__":
    main(*sys.argv[1:])
