"""
ideas: what the paper could try next, measured in miniature before anyone builds it. Each idea is a
function that changes some names of the module of stage 04; rows.py trains it like any other row, so
none of them has a line in the scripts.

A run of an idea that is stopped and resumed may differ from one that is not: ideas keep what they
count or find in memory. The rows of the report were not stopped.
"""
import itertools
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

import common
from common import IGNORE

SURE = .9                   # a teacher's score from which on a pixel counts as known
TEXT_WEIGHT = .4            # of CLIP's text scores, against the teacher's (as FC-CLIP)


# ------------------------------------------------------------------- what several ideas use
def with_scores(stage, change):
    """Let change(pseudo, rough, highest) -> pseudo see, besides the labels after SAM and those of
    the teacher, int64 (B, H, W), the teacher's highest score at every pixel, float (B, H, W)."""
    predict, redraw, last = stage.predict, stage.redraw, {}

    def noted(*arguments):
        last["scores"] = predict(*arguments)
        return last["scores"]

    def changed(sam, embeddings, rough, *rest):
        highest = last["scores"].amax(1)
        pseudo, prompts = redraw(sam, embeddings, rough, *rest)
        return change(pseudo, rough, highest), prompts
    stage.predict, stage.redraw = noted, changed


def noted_pieces(stage):
    """-> a dict whose "pieces" are the components of the latest prompts, bool (M, H, W)."""
    random_points, last = stage.random_points, {}

    def noted(piece, area, chosen, n, random):
        last["pieces"] = torch.from_numpy(piece == chosen[:, None, None])
        return random_points(piece, area, chosen, n, random)
    stage.random_points = noted
    return last


def iou(a, b):
    """IoU of masks, bool (..., H, W) -> float (...)"""
    both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return both / either.clamp(min=1)


# ------------------------------------------------------------------- the teacher
def mirror(stage):
    """The teacher sees the picture and its mirror image."""
    predict = stage.predict

    def both(encoder, decoder, images, half=False):
        mirrored = predict(encoder, decoder, images.flip(3), half).flip(3)
        return (predict(encoder, decoder, images, half) + mirrored) / 2
    stage.predict = both


def ramp(stage):
    """HRDA's ramp: the teacher is the mean of the student's first steps, then as before."""
    update, steps = stage.update_teacher, itertools.count(1)

    def update_teacher(teacher, student, alpha):
        update(teacher, student, min(alpha, 1 - 1 / (next(steps) + 1)))
    stage.update_teacher = update_teacher


def text_scores(stage):
    """The classes of a query are the teacher's times CLIP's own: how like a class's name the
    picture is under the query's mask. CLIP's code of a place is MaskCLIP's: the attention pool
    without its attention."""
    text = text_codes()

    @torch.no_grad()
    def predict(encoder, decoder, images, half=False):
        """Sides are multiples of 32 here."""
        maps = encoder(images)
        classes, masks = decoder(maps)
        pool, inside = encoder.body.attnpool, masks[-1].sigmoid()
        codes = F.normalize(pool.c_proj(pool.v_proj(maps[-1].movedim(1, -1))), dim=-1)
        of_text = (codes @ text.T).softmax(-1).movedim(-1, 1)
        of_text = F.interpolate(of_text, inside.shape[-2:], mode="bilinear")
        of_text = torch.einsum("bqhw,bchw->bqc", inside, of_text)
        of_text = of_text / of_text.sum(-1, keepdim=True)
        likely = classes[-1].softmax(-1)[..., :-1]
        both = likely ** (1 - TEXT_WEIGHT) * of_text ** TEXT_WEIGHT
        both = both / both.sum(-1, keepdim=True) * likely.sum(-1, keepdim=True)
        masks = F.interpolate(masks[-1], images.shape[-2:], mode="bilinear").sigmoid()
        return torch.einsum("bqc,bqhw->bchw", both, masks)
    stage.predict = predict


def text_codes():
    """CLIP's codes of the classes, each the mean over five weathers, times CLIP's own scale of
    cosines -> float (C, 64)"""
    from scores import AIR, THINGS, Clip
    clip, codes = Clip(), 0
    for style in ("day", "night", "snow", "fog", "rain"):
        things = [THINGS.get(name, f"a {name}") for name in common.CLASSES]
        codes = codes + clip.texts([f"a photo of {thing} in {AIR[style]}" for thing in things])
    return clip.model.logit_scale.exp().detach() * F.normalize(codes, dim=-1)


# ------------------------------------------------------------------- which labels are taught
def sure_half(stage):
    """Only the half of each picture's pixels of which the teacher is surest."""
    def change(pseudo, rough, highest):
        middle = highest.flatten(1).median(1).values
        return pseudo.masked_fill(highest < middle[:, None, None], IGNORE)
    with_scores(stage, change)


def sure_besides(stage):
    """Where SAM leaves no label, the teacher's if it is sure."""
    def change(pseudo, rough, highest):
        return torch.where((pseudo == IGNORE) & (highest > SURE), rough, pseudo)
    with_scores(stage, change)


def no_dice(stage):
    """Painted pictures without dice: the two kinds have a loss each, weighted by their number."""
    mask_loss = stage.mask_loss

    def of_each_kind(classes, masks, labels, points, weights, *rest):
        n, no_dice = stage.N_SOURCE, (*weights[:2], 0.)
        source, terms = mask_loss(classes[:, :n], masks[:, :n], labels[:n], points, weights, *rest)
        painted, _ = mask_loss(classes[:, n:], masks[:, n:], labels[n:], points, no_dice, *rest)
        share = n / len(labels)
        return share * source + (1 - share) * painted, terms
    stage.mask_loss = of_each_kind


def soft_labels(stage):
    """The masks of painted pictures learn how sure the teacher is of their class, in place of 0 and
    1, wherever SAM left a label."""
    parts, last = stage.source_stage, {}
    predict, redraw, mask_loss = stage.predict, stage.redraw, stage.mask_loss
    mask_costs = parts.mask_costs

    def noted(name, function):
        def wrapped(*arguments):
            last[name] = function(*arguments)
            return last[name]
        return wrapped

    def soft_costs(logits, target, valid):
        if logits.shape[1] == 1:        # of the masks that are taught, not of the matching
            _, image, _, classes = last["match"]
            scores = last["scores"][image, classes].flatten(1)
            target = scores.gather(1, last["points"])[..., None] * valid
        return mask_costs(logits, target, valid)

    def of_each_kind(classes, masks, labels, *rest):
        n = stage.N_SOURCE
        source, terms = mask_loss(classes[:, :n], masks[:, :n], labels[:n], *rest)
        scores, (pseudo, _) = last["predict"].clamp(max=1), last["redraw"]
        same = (labels[n:] == pseudo).flatten(1).all(1)         # or the student's view is flipped
        last["scores"] = torch.where(same[:, None, None, None], scores, scores.flip(3))
        with mock.patch.multiple(parts, match=noted("match", parts.match), mask_costs=soft_costs,
                                 uncertain_points=noted("points", parts.uncertain_points)):
            painted, _ = mask_loss(classes[:, n:], masks[:, n:], labels[n:], *rest)
        share = n / len(labels)
        return share * source + (1 - share) * painted, terms
    stage.predict, stage.redraw = noted("predict", predict), noted("redraw", redraw)
    stage.mask_loss = of_each_kind


# ------------------------------------------------------------------- SAM's masks
def grid(stage, spacing=16, least=.25):
    """SAM draws each picture once, from a grid of points. Large masks lie below small ones; each
    takes the majority of the teacher's sure pixels in it, if a quarter of its pixels are sure."""
    sam_masks, found = stage.sam_masks, {}

    def masks_of(sam, embedding, shape):
        key = embedding.double().sum().item()           # a picture is told by its embedding
        if key not in found:
            x, y = np.meshgrid(np.arange(spacing // 2, shape[1], spacing),
                               np.arange(spacing // 2, shape[0], spacing))
            points = np.stack((x, y), -1).reshape(-1, 1, 2).astype(np.float32)
            masks = sam_masks(sam, embedding, torch.from_numpy(points), shape)
            found[key] = masks[masks.sum((1, 2)).argsort(descending=True)]
        return found[key]

    def change(pseudo, rough, highest):
        labelled = torch.full_like(rough, IGNORE)
        for k, embedding in enumerate(last["embeddings"]):
            for mask in masks_of(last["sam"], embedding, rough.shape[1:]):
                sure = rough[k][mask & (highest[k] > SURE)]
                if len(sure) and len(sure) >= least * mask.sum():
                    labelled[k][mask] = sure.bincount().argmax()
        return labelled

    def noted(sam, embeddings, rough, *rest):
        last.update(sam=sam, embeddings=embeddings)
        return rough, [torch.zeros(0, 1, 2).numpy()] * len(rough)
    last = {}
    stage.redraw = noted
    with_scores(stage, change)


def by_iou(stage):
    """Of SAM's three masks the one that is most like the piece it was asked about."""
    last, load_sam = noted_pieces(stage), stage.load_sam
    stage.SAM_CHUNK = 10_000                            # all pieces of a picture in one pass

    def load(name):
        sam = load_sam(name)
        decode = sam.mask_decoder.forward

        def rated(**arguments):
            logits, _ = decode(**arguments)
            pieces = F.interpolate(last["pieces"][:, None].float(), logits.shape[-2:]) > .5
            return logits, iou(logits > 0, pieces)
        sam.mask_decoder.forward = rated
        return sam
    stage.load_sam = load


def like_its_piece(stage):
    """SAM's masks of an IoU under 0.5 with the piece they were asked about are dropped."""
    last, sam_masks = noted_pieces(stage), stage.sam_masks

    def kept(*arguments):
        masks = sam_masks(*arguments)
        return masks & (iou(masks, last["pieces"]) >= .5)[:, None, None]
    stage.sam_masks = kept


def deep_points(stage):
    """Points from the half of a piece that lies furthest from its border."""
    random_points = stage.random_points

    def deep(piece, area, chosen, n, random):
        inner = piece * 0
        for k in chosen:
            depth = ndimage.distance_transform_edt(piece == k)
            inner[depth >= max(1, np.median(depth[piece == k]))] = k
        area = np.bincount(inner.ravel(), minlength=len(area))
        return random_points(inner, area, chosen, n, random)
    stage.random_points = deep


IDEAS = {"mirror": mirror, "ramp": ramp, "CLIP's text scores": text_scores,
         "surest half": sure_half, "sure besides SAM": sure_besides, "no dice": no_dice,
         "soft labels": soft_labels, "grid": grid, "by IoU": by_iou,
         "like its piece": like_its_piece, "deep points": deep_points}


# ------------------------------------------------------------------- prompts of so many classes
def prompts_naming(count, prompts):
    """The places of some prompts, each with so many other classes, drawn by chance."""
    from scores import THINGS
    lines = []
    for i, prompt in enumerate(prompts):
        place = prompt.partition(" in ")[2]
        random = np.random.default_rng((0, i))
        names = random.permutation(common.CLASSES)[:count]
        words = [THINGS.get(name, f"a {name}") for name in names]
        things = words[0]
        if count > 1:
            things = ", ".join(words[:-1]) + " and " + words[-1]
        lines.append(f"a photo of {things} in {place}")
    return lines
