"""
scores: how good the miniature foundation models are, measured on scenes that none has seen.

    score_sam         five points in a true piece: how much of it does SAM give back?
    score_labels      pseudo-labels of rendered scenes against the truth
    score_clip        zero-shot: which weather, which classes
    score_diffusion   does the weather follow the prompt; are painted scenes like rendered ones
    score_llm         how many of its lines are usable

Each returns a dict for results.json. They need the rows "source" of seed 0, and what prepare() of
rows.py makes.
"""
import json
from importlib import import_module

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import world
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import spearmanr
from segment_anything import SamPredictor

import common
import rows
from rows import HERE, STYLES


def to_batch(images):
    """uint8 arrays (H, W, 3) -> uint8 tensor (N, 3, H, W)"""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def scenes(split, style, n):
    return np.stack([world.draw(seed, style)[0] for seed in world.seeds(split, style, n)])


# ------------------------------------------------------------------- SAM
def sam_on_scene(sam, image, label, random):
    """Five points in each true piece of 30 pixels and more -> class, area (M,), the predicted IoU
    of SAM's three masks, and the true one (M, 3)"""
    stage = import_module("04_selftrain")
    piece, cls, area = stage.components(label)
    chosen = np.flatnonzero((area >= 30) & (cls != common.IGNORE))
    points = torch.from_numpy(stage.random_points(piece, area, chosen, 5, random))
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points = predictor.transform.apply_coords_torch(points, label.shape)
    masks, ratings, _ = predictor.predict_torch(points, torch.ones(points.shape[:2]))
    truth = torch.from_numpy(piece == chosen[:, None, None])[:, None]
    both = (masks & truth).sum((2, 3))
    either = (masks | truth).sum((2, 3))
    return cls[chosen], area[chosen], ratings.numpy(), (both / either).numpy()


def score_sam(n=20):
    """IoU of the mask that SAM rates highest, by size, style and class; rank correlation of its
    ratings with the true IoU. n: test scenes per style."""
    stage = import_module("04_selftrain")
    sam, random = stage.load_sam(stage.SAM), np.random.default_rng(0)
    small, large, of_class = [], {}, {}
    rated, true = [], []
    for style in world.STYLES:
        large[style] = []
        for seed in world.seeds("test", style, n):
            image, label, *_ = world.draw(seed, style)
            classes, areas, ratings, ious = sam_on_scene(sam, image, label, random)
            rated += ratings.ravel().tolist()
            true += ious.ravel().tolist()
            best = ious[np.arange(len(ious)), ratings.argmax(1)]
            for cls, area, iou in zip(classes, areas, best):
                if area < 100:
                    small.append(iou)
                else:
                    large[style].append(iou)
                    of_class.setdefault(common.CLASSES[cls], []).append(iou)
    every = sum(large.values(), [])
    return {"iou_100_px_and_more": np.mean(every), "iou_under_100_px": np.mean(small),
            "pieces": len(every), "rank_correlation": spearmanr(rated, true)[0],
            "by_style": {style: np.mean(ious) for style, ious in large.items()},
            "by_class": {name: np.mean(of_class[name]) for name in common.CLASSES
                         if name in of_class}}


# ------------------------------------------------------------------- pseudo-labels
#  a pseudo-label                REFINE     oracle
LABELS = {
    "the teacher's, raw":         ("off",    ""),
    "raw, where SAM kept a label": ("points", "raw where SAM kept"),
    "redrawn by SAM":             ("points", ""),
    "SAM, majority vote":         ("vote",   ""),
    "redrawn with true masks":    ("points", "true masks")}


# what ideas.py changes about the labels; the others change prompts, losses, teachers or decoders
IDEA_LABELS = {
    "as shipped": ("points", ""),
    "SAM, majority vote": ("vote", ""),
    "(c) a grid of points": ("points", "grid"),
    "(d) the surest half": ("points", "surest half"),
    "(d) the surest half, raw": ("off", "surest half"),
    "where SAM leaves none, the teacher's of over 0.9": ("points", "sure besides SAM"),
    "(e) the mask most like its piece": ("points", "by IoU"),
    "(e) masks unlike their piece dropped": ("points", "like its piece"),
    "(e) points deep inside": ("points", "deep points"),
    "(f) times CLIP's text scores": ("points", "CLIP's text scores"),
    "(f) the same, raw": ("off", "CLIP's text scores"),
    "(g) with the mirror image": ("points", "mirror"),
    "the teacher's, raw": ("off", "")}


@torch.no_grad()
def label_scenes(stage, kinds, scenes):
    """Pseudo-labels of scenes {style: [(image, truth)]} by theta_0 of seed 0 against the truth ->
    {kind: {style: the share of pixels with a label, of right ones among those, mIoU on them}}"""
    evaluate = import_module("05_eval")
    encoder, teacher = rows.load_network(rows.source_of("sam", 0))
    originals, found, embeddings = dict(vars(stage)), {}, {}
    for kind, (rule, oracle) in kinds.items():
        stage.REFINE = rule
        rows.with_oracle(oracle, stage)
        sam = stage.load_sam(stage.SAM)
        found[kind] = {}
        for style, pairs in scenes.items():
            matrix = np.zeros((len(common.CLASSES), len(common.CLASSES)), np.int64)
            for number, (image, truth) in enumerate(pairs):
                pixels = to_batch([image])
                if (style, number) not in embeddings:
                    embeddings[style, number] = sam.image_encoder(sam.preprocess(pixels.float()))
                seen = embeddings[style, number]
                if oracle == "true masks":
                    seen = torch.from_numpy(truth).long()[None]
                rough = stage.predict(encoder, teacher, pixels).argmax(1)
                pseudo, _ = stage.redraw(sam if rule != "off" else None, seen, rough, [number])
                label = pseudo[0].byte().numpy()
                matrix += evaluate.confusion(truth, label, len(common.CLASSES))
            pixels = sum(truth.size for _, truth in pairs)
            found[kind][style] = {"labelled": matrix.sum() / pixels,
                                  "right": np.trace(matrix) / matrix.sum(),
                                  "miou": evaluate.mean_iou(matrix)[0]}
        vars(stage).update(originals)
    return found


def score_labels(n=40):
    """What the student is taught of the rendered scenes, n of each style."""
    files, scenes = sorted((rows.RENDERED / "images").glob("*.png")), {}
    for k, style in enumerate(STYLES):                      # the scenes lie style by style
        scenes[style] = []
        for path in files[k * n:(k + 1) * n]:
            with Image.open(rows.RENDERED / "labels" / path.name) as label:
                scenes[style].append((np.array(common.read_image(path)), np.array(label)))
    return label_scenes(import_module("04_selftrain"), LABELS, scenes)


def score_idea_labels(n=6):
    """What the ideas would teach of n validation scenes of each style."""
    scenes = {}
    for style in STYLES:
        scenes[style] = []
        for seed in world.seeds("validation", style, n):
            image, label, *_ = world.draw(seed, style)
            scenes[style].append((image, label))
    return label_scenes(import_module("04_selftrain"), IDEA_LABELS, scenes)


# ------------------------------------------------------------------- CLIP
AIR = {"game": "daylight", "day": "daylight", "night": "the dark", "snow": "the snow",
       "fog": "the fog", "rain": "the rain"}
THINGS = {"sky": "the sky", "sign": "a traffic sign", "vegetation": "a tree"}      # others: a NAME


def sentence(thing, style):
    kind = "video game picture" if style == "game" else "photo"
    return f"a {kind} of {thing} in {AIR[style]}"


class Clip:
    """The miniature CLIP, whole: codes of pictures and of words, of length 1."""

    def __init__(self):
        folder = f"local-dir:{HERE}/weights/clip"
        self.model = open_clip.create_model(folder).eval()
        self.words = open_clip.get_tokenizer(folder)
        config = self.model.visual.preprocess_cfg
        self.mean = torch.tensor(config["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(config["std"]).view(1, 3, 1, 1)

    @torch.no_grad()
    def images(self, images):
        """uint8 (N, 128, 256, 3) -> the mean code of the left and the right half (N, 64)"""
        codes = []
        for part in to_batch(images).split(50):
            x = (part.float() / 255 - self.mean) / self.std
            left = F.normalize(self.model.encode_image(x[..., :128]), dim=-1)
            right = F.normalize(self.model.encode_image(x[..., 128:]), dim=-1)
            codes.append((left + right) / 2)
        return torch.cat(codes)

    @torch.no_grad()
    def texts(self, texts):
        return F.normalize(self.model.encode_text(self.words(texts)), dim=-1)


def average_precision(scores, there):
    """Of a ranking by scores (N,): the mean of the precisions at those that are there, bool (N,)"""
    ranked = there[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return precision[ranked].mean()


def score_clip(n=60):
    """Zero-shot on n test scenes per style: the style by the nearest of six sentences; mean average
    precision of "is this class in the picture", with one sentence per class and weather."""
    clip = Clip()
    styles = clip.texts([sentence("a street", style) for style in world.STYLES])
    right, precisions, chances = {}, {}, {}
    for k, style in enumerate(world.STYLES):
        drawn = [world.draw(seed, style) for seed in world.seeds("test", style, n)]
        codes = clip.images([image for image, *_ in drawn])
        right[style] = ((codes @ styles.T).argmax(1) == k).float().mean().item()
        things = [THINGS.get(name, f"a {name}") for name in common.CLASSES]
        scores = codes @ clip.texts([sentence(thing, style) for thing in things]).T
        for c, name in enumerate(common.CLASSES):
            there = np.array([(label == c).sum() >= 60 for _, label, *_ in drawn])
            if 0 < there.sum() < n:
                precision = average_precision(scores[:, c].numpy(), there)
                precisions.setdefault(name, []).append(precision)
                chances.setdefault(name, []).append(there.mean())
    of_class = {name: np.mean(found) for name, found in precisions.items()}
    chance = np.mean([np.mean(found) for found in chances.values()])
    return {"style": right, "style_mean": np.mean(list(right.values())),
            "mAP": np.mean(list(of_class.values())), "mAP_of_chance": chance, "AP": of_class}


# ------------------------------------------------------------------- diffusion
def frechet(a, b):
    """Frechet distance of two clouds of codes (N, D), (M, D), as Gaussians."""
    a, b = a.double().numpy(), b.double().numpy()
    cross = sqrtm(np.cov(a.T) @ np.cov(b.T))
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(distance + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(cross)))


WEATHER = {"night": ("dark", "night"), "snow": ("snow", "winter"), "fog": ("fog", "mist"),
           "rain": ("rain", "wet")}


def style_of(place):
    """The weather that a prompt's place asks for."""
    for style, words in WEATHER.items():
        if any(word in place for word in words):
            return style
    return "day"


@torch.no_grad()
def encode(encoder, images):
    """Colour and texture at all scales: means of the encoder's maps -> (N, C)"""
    codes = []
    for part in to_batch(images).split(50):
        maps = encoder(part.to(common.device()))
        codes.append(torch.cat([features.mean((2, 3)) for features in maps], 1).cpu())
    return torch.cat(codes)


def train_classifier(x, y):
    """A linear classifier of codes (N, C) -> function: codes -> numbers of classes"""
    mean, std = x.mean(0), x.std(0) + 1e-6
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=.1)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(layer((x - mean) / std), y).backward()
        optimizer.step()
    return lambda codes: layer((codes - mean) / std).argmax(1).numpy()


@torch.no_grad()
def confidence(network, images):
    """Mean of the highest score over the pixels of uint8 (N, H, W, 3)."""
    predict = import_module("03_train_source").predict
    highest = []
    for part in to_batch(images).split(20):
        highest.append(predict(*network, part.to(common.device())).amax(1).mean((1, 2)).cpu())
    return torch.cat(highest).mean().item()


def score_diffusion():
    """The pictures of runs/report/02_generate against rendered ones: does the weather follow the
    prompt, how far are their codes, how sure is the teacher."""
    folder = rows.ROOT / "02_generate"
    painted, asked = [], []
    for row in common.read_lines(folder / "index.jsonl", "file", "prompt"):
        painted.append(np.asarray(common.read_image(folder / row["file"])))
        asked.append(STYLES.index(style_of(row["prompt"].partition(" in ")[2])))
    painted, asked = np.stack(painted), np.array(asked)
    clip, network = Clip(), rows.load_network(rows.source_of("sam", 0))
    web = {style: scenes("web", style, 200) for style in STYLES}
    test = {style: scenes("test", style, 60) for style in STYLES}
    numbers = torch.arange(len(STYLES))
    codes = encode(network[0], np.concatenate(list(web.values())))
    classify = train_classifier(codes, numbers.repeat_interleave(200))
    held_out = classify(encode(network[0], np.concatenate(list(test.values()))))
    follows = classify(encode(network[0], painted)) == asked
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 256, 3), dtype=np.uint8)
    found = {"classifier_on_held_out_scenes": np.mean(held_out == np.arange(5).repeat(60)),
             "follows_the_prompt": follows.mean(), "by_style": {}}
    for k, style in enumerate(STYLES):
        own = painted[asked == k]
        n = min(60, len(own))
        if n < 2:
            continue
        real = clip.images(test[style][:n])
        found["by_style"][style] = {
            "n": n, "follows": follows[asked == k].mean(),
            "frechet": frechet(clip.images(own[:n]), real),
            "frechet_real_to_real": frechet(clip.images(web[style][:n]), real),
            "frechet_noise": frechet(clip.images(noise[:n]), real),
            "sure_painted": confidence(network, own),
            "sure_rendered": confidence(network, test[style])}
    return found


# ------------------------------------------------------------------- LLM
def score_llm():
    """What 01 kept and dropped."""
    info = json.loads((rows.ROOT / "01_prompts/run.json").read_text())
    lines = info["kept"] + sum(info["dropped"].values())
    usable = ("repeated", "enough of these")
    unparsed = sum(n for why, n in info["dropped"].items() if why not in usable)
    return {"kept": info["kept"], "lines": lines, "parse": 1 - unparsed / lines,
            "dropped": info["dropped"], "named": info["named"]}


SCORES = {"sam": score_sam, "labels": score_labels, "idea_labels": score_idea_labels,
          "clip": score_clip, "diffusion": score_diffusion, "llm": score_llm}
