"""04's refinement on maps drawn by hand. SAM is replaced by masks that the test chooses: the rules around it are what is tested here."""
import os

import numpy as np
import pytest
import torch
from scipy import ndimage

from conftest import fresh

IGNORE = 255


class FakeSam:
    """Answers the k-th prompt with the k-th mask, rated highest; the other two masks are full and rated lower."""
    device = torch.device("cpu")
    image_encoder = type("E", (), {"img_size": 8})()
    prompt_encoder = type("P", (), {"image_embedding_size": (2, 2)})()

    def __init__(self, masks):
        self.masks = [torch.as_tensor(np.asarray(m), dtype=torch.float32) for m in masks]

    def postprocess_masks(self, masks, resized, shape):
        assert resized == shape == tuple(masks.shape[-2:])
        return masks


@pytest.fixture
def stage(monkeypatch):
    module = fresh("04_selftrain")
    module.SAM_MIN_AREA, module.SAM_POINTS, module.SAM_CHUNK = 2, 5, 2

    def decode(sam, embeddings, which, points):
        start, sam.at = getattr(sam, "at", 0), getattr(sam, "at", 0) + len(points)
        logits = torch.ones(len(points), 3, 8, 8)
        for k in range(len(points)):
            logits[k, 1] = sam.masks[start + k] * 2 - 1
        return logits, torch.tensor([[.1, .9, .2]]).expand(len(points), 3)
    module.sam_decode = decode
    return module


def redraw(stage, label, masks):
    refined, prompts = stage.refine(FakeSam(masks), torch.zeros(1, 1, 1, 1), np.asarray(label, np.uint8)[None], [np.random.default_rng(0)])
    return refined[0].numpy(), prompts


def box(rows, columns):
    mask = np.zeros((8, 8))
    mask[rows, columns] = 1
    return mask


def test_components_are_the_pieces_of_each_class_by_four_connectivity():
    label = np.array([[0, 0, 1, IGNORE], [1, 0, 1, 1], [0, 1, 0, 0]], np.uint8)
    piece, cls, area = fresh("04_selftrain").components(label)
    assert (piece == 0).sum() == 1 and area[1:].sum() == 11
    pieces = sorted((int(c), int(a)) for c, a in zip(cls[1:], area[1:]))
    assert pieces == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 1), (1, 3)]             # diagonals do not touch
    assert (cls[piece][label != IGNORE] == label[label != IGNORE]).all()


def test_one_pass_labelling_equals_a_labelling_class_by_class():
    label = np.random.default_rng(0).integers(0, 4, (40, 60)).astype(np.uint8)
    piece, _, _ = fresh("04_selftrain").components(label)
    for c in range(4):
        theirs, n = ndimage.label(label == c)
        pairs = set(zip(piece[label == c].tolist(), theirs[label == c].tolist()))
        assert len(pairs) == n == len({p for p, _ in pairs})


def test_points_lie_inside_their_own_component_as_x_y():
    label = np.zeros((6, 9), np.uint8)
    label[2, 7] = 3
    label[4:, :4] = 5
    stage = fresh("04_selftrain")
    piece, cls, area = stage.components(label)
    keep = np.arange(1, len(area))
    points = stage.random_points(piece, area, keep, 7, np.random.default_rng(1)).astype(int)
    assert points.shape == (len(keep), 7, 2)
    for k, prompts in zip(keep, points):
        assert all(piece[y, x] == k for x, y in prompts)
    assert (points[list(cls[keep]).index(3)] == (7, 2)).all()                      # the one-pixel piece: always that pixel


def test_small_components_get_no_prompt_and_classes_are_not_mixed_up(stage):
    label = np.zeros((8, 8), np.uint8)
    label[0, 0] = 2                                                                # one pixel: under the threshold
    label[5:, 5:] = 7
    refined, prompts = redraw(stage, label, [box(slice(0, 4), slice(None)), box(slice(5, 8), slice(5, 8))])
    assert [cls for _, cls, _ in prompts] == [0, 7]                                # the dropped class 2 shifts nobody's mask
    assert (refined[:4] == 0).all() and (refined[5:, 5:] == 7).all() and (refined[4] == IGNORE).all()


def test_a_pixel_of_two_classes_is_ignored_and_of_two_components_of_one_class_is_kept(stage):
    label = np.full((8, 8), IGNORE, np.uint8)
    label[:2, :2], label[:2, 6:], label[6:] = 1, 1, 4
    masks = {1: [box(slice(0, 4), slice(0, 5)), box(slice(0, 4), slice(3, 8))], 4: [box(slice(3, 8), slice(0, 8))]}
    refined, prompts = redraw(stage, label, masks[1] + masks[4])
    assert [cls for _, cls, _ in prompts] == [1, 1, 4]
    assert (refined[:3] == 1).all()                                                # columns 3 and 4 belong to both components of class 1
    assert (refined[3] == IGNORE).all()                                            # row 3 is claimed by classes 1 and 4
    assert (refined[4:] == 4).all()


def test_an_image_without_a_component_is_all_ignored(stage):
    label = np.indices((8, 8)).sum(0) % 2                                          # a chess board: every piece has one pixel
    refined, prompts = redraw(stage, label, [])
    assert prompts == [] and (refined == IGNORE).all()


def test_vote_gives_a_mask_the_teachers_majority_class(stage):
    stage.REFINE = "vote"
    label = np.zeros((8, 8), np.uint8)
    label[:, 6:] = 3
    refined, _ = redraw(stage, label, [box(slice(None), slice(0, 6)), box(slice(None), slice(2, 8))])     # the second mask: 32 pixels of 0, 16 of 3
    assert (refined == 0).all()


def test_purity_drops_a_mask_with_under_half_of_its_class(stage):
    stage.REFINE = "purity"
    label = np.zeros((8, 8), np.uint8)
    label[:, 6:] = 3
    refined, _ = redraw(stage, label, [box(slice(None), slice(0, 6)), box(slice(None), slice(2, 8))])
    assert (refined[:, :6] == 0).all() and (refined[:, 6:] == IGNORE).all()


def test_the_best_of_three_masks_is_the_one_rated_highest(stage):
    refined, _ = redraw(stage, np.zeros((8, 8), np.uint8), [box(slice(0, 1), slice(0, 1))])               # masks 0 and 2 are full, and rated lower
    assert (refined == 0).sum() == 1


def test_the_teacher_is_the_running_mean_of_the_student():
    stage = fresh("04_selftrain")
    student, teacher = (torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)) for _ in range(2))
    with torch.no_grad():
        for p in teacher.parameters():
            p.fill_(1.)
        for p in student.parameters():
            p.fill_(3.)
        student[1].running_mean.fill_(7.)
    stage.ema_update(teacher, student, .75)
    assert all((p == 1.5).all() for p in teacher.parameters())                     # .75 * 1 + .25 * 3
    assert teacher[1].running_mean == 7 and all((p == 3.).all() for p in student.parameters())


def test_the_painted_batch_shares_its_flip_and_repeats_by_address(finished):
    stage = fresh("04_selftrain")
    run, _ = finished
    stage.N_GENERATED = 3
    files = stage.read_generated(run / "02_generate/index.jsonl")
    a, b = (stage.generated_batch(files, 5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == b[3]
    stage.common.colour_jitter = lambda image, random: image                       # without colour only the flip is left
    clean, seen, flips, _ = stage.generated_batch(files, 5)
    for x, y, flip in zip(clean, seen, flips):
        assert torch.equal(y, x.flip(2) if flip else x)
    assert len({bool(f) for step in range(8) for f in stage.generated_batch(files, step)[2]}) == 2


def test_embeddings_are_made_once_and_made_again_when_damaged(tmp_path, monkeypatch):
    stage, calls = fresh("04_selftrain"), []
    sam = stage.load_sam("tests/toy/weights/sam")
    original = stage.sam_encode
    monkeypatch.setattr(stage, "sam_encode", lambda *a: calls.append(1) or original(*a))
    cache = stage.Embeddings(sam, "tests/toy/weights/sam", tmp_path)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 128, 256), np.uint8))
    (tmp_path / "a.png").touch()
    first = cache("a.png", image)
    assert torch.equal(cache("a.png", image), first) and len(calls) == 1
    path = next(cache.folder.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(cache("a.png", image), first) and len(calls) == 2
    os.utime(tmp_path / "a.png", (2e9, 2e9))                                       # another picture under the old name
    assert not torch.equal(cache("a.png", 255 - image), first) and len(calls) == 3
