"""Refinement and teacher of 04: SAM is replaced by masks that the test chooses, what is tested are
the rules around it; pieces are compared with a plain union-find, and the whole with the paper's
rule (3.3) written out."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from references import papers_rule, random_label, union_find

import common
from common import IGNORE
from conftest import fresh

SAM = common.HERE / "tests/toy/weights/sam"


@pytest.fixture
def stage(tmp_path):
    module = fresh("04_selftrain")
    module.REFINE, module.SAM_MIN_AREA, module.SAM_POINTS = "points", 2, 5
    module.RUN = str(tmp_path)
    return module


def redraw(stage, label, masks, seed=0):
    """refine() where the k-th prompt gets the k-th mask -> the new label, the prompts."""
    def sam_masks(sam, embedding, points, shape):
        assert len(points) == len(masks) and tuple(shape) == tuple(label.shape)
        return torch.stack([torch.as_tensor(np.asarray(mask) > 0) for mask in masks])
    stage.sam_masks = sam_masks
    label = torch.as_tensor(np.asarray(label)).long()
    refined, prompts = stage.refine(None, torch.zeros(1, 1, 1), label, np.random.default_rng(seed))
    assert refined.shape == label.shape
    return refined.numpy(), np.asarray(prompts)


# ------------------------------------------------------------ pieces and points
@pytest.mark.parametrize("seed", range(36))
def test_components_are_those_of_union_find(stage, seed):
    label = random_label(seed)
    piece, cls, area = stage.components(label)
    wanted = union_find(label)
    assert (piece == 0).sum() == (label == IGNORE).sum() and cls[0] == IGNORE
    assert len(cls) == len(area) == len(wanted) + 1
    for first, pixels in wanted.items():
        k = piece[first]
        assert set(map(tuple, np.argwhere(piece == k).tolist())) == pixels
        assert area[k] == len(pixels) and cls[k] == label[first]


@pytest.mark.parametrize("seed", range(12))
def test_points_lie_in_their_piece_and_differ_where_it_has_enough_pixels(stage, seed):
    piece, _, area = stage.components(random_label(seed))
    chosen = np.arange(1, len(area))
    points = stage.random_points(piece, area, chosen, 4, np.random.default_rng(seed))
    assert points.shape == (len(chosen), 4, 2) and points.dtype == np.float32
    for k, prompts in zip(chosen, points.astype(int)):
        assert all(piece[y, x] == k for x, y in prompts)
        assert area[k] < 4 or len(set(map(tuple, prompts.tolist()))) == 4


def test_every_pixel_of_a_piece_is_drawn_equally_often(stage):
    piece, _, area = stage.components(np.array([[0, 0, 0, 1], [1, 1, 0, 1]], np.uint8))
    k, counts = piece[0, 0], np.zeros(piece.shape)
    for seed in range(2_000):
        points = stage.random_points(piece, area, [k], 2, np.random.default_rng(seed))
        for x, y in points[0].astype(int):
            counts[y, x] += 1
    inside = counts[piece == k]
    assert inside.sum() == 4_000 and np.abs(inside - 1_000).max() < 90  # 4 standard deviations


# ------------------------------------------------------------ refine
@pytest.mark.parametrize("seed", range(24))
def test_refine_is_the_papers_rule(stage, seed):
    label = random_label(seed)
    label[label == IGNORE] = 0                                  # a teacher labels every pixel
    stage.SAM_MIN_AREA = min_area = (0, 1, 4, 9)[seed // 6]
    large = [pixels for pixels in union_find(label).values() if len(pixels) >= min_area]
    random = np.random.default_rng(seed)
    drawn = random.random((len(large), *label.shape)) < 1 / max(2, len(large))
    refined, prompts = redraw(stage, label, drawn, seed)
    # the piece that each prompt lies in tells its class; every large piece has one prompt
    at = [tuple(points[0].astype(int)[::-1].tolist()) for points in prompts]
    found = sorted([pixel in piece for pixel in at].index(True) for piece in large)
    assert found == list(range(len(large)))
    assert (refined == papers_rule(label, drawn, [label[pixel] for pixel in at])).all()


def test_an_image_without_a_large_piece_is_not_labelled(stage):
    refined, prompts = redraw(stage, np.indices((8, 8)).sum(0) % 2, [])     # a chessboard
    assert prompts.shape == (0, 5, 2) and (refined == IGNORE).all()


def test_vote_gives_a_mask_the_teachers_majority_below_it(stage):
    stage.REFINE = "vote"
    label, masks = np.zeros((8, 8), int), np.zeros((2, 8, 8), bool)
    label[:, 6:] = 3
    masks[0, :, :6] = masks[1, :, 2:] = True
    refined, _ = redraw(stage, label, masks)    # the second, of class 3, lies on 32 of 0, 16 of 3
    assert (refined == 0).all()


# ------------------------------------------------------------ teacher, pictures
@torch.no_grad()
def test_the_teacher_is_the_running_mean_of_the_student(stage):
    student = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    teacher = copy.deepcopy(student)
    for network, value in ((teacher, 1.), (student, 3.)):
        for p in network.parameters():
            p.fill_(value)
    student[1].running_mean.fill_(7.)
    student[1].num_batches_tracked.fill_(5)
    for alpha in (.75, 1):                                              # at 1 it never moves
        stage.update_teacher(teacher, student, alpha)
        assert all((p == 1.5).all() for p in teacher.parameters())      # .75 * 1 + .25 * 3
        assert all((p == 3.).all() for p in student.parameters())
        assert teacher[1].running_mean == 7 and teacher[1].num_batches_tracked == 5


@pytest.fixture
def painted(tmp_path):
    files, random = [tmp_path / f"{k}.png" for k in range(3)], np.random.default_rng(0)
    for file in files:
        Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8)).save(file)
    return files


def test_a_painted_picture_repeats_and_each_comes_once_per_epoch(stage, painted, tmp_path):
    paths = [tmp_path / f"{k}.npy" for k in range(3)]
    for k, path in enumerate(paths):
        np.save(path, np.full((2, 4, 4), k, np.float16))
    pictures, order = stage.PaintedPictures(painted, paths, (0, 4), (64, 96)), []
    for i in range(12):
        for ours, again in zip(pictures[i], pictures[i]):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(again))
        clean, embedding = pictures[i][0], pictures[i][3]
        order.append(int(embedding[0, 0, 0]))
        original = np.asarray(Image.open(painted[order[-1]]))
        assert np.array_equal(clean.permute(1, 2, 0).numpy(), original)
    assert all(set(order[i:i + 3]) == {0, 1, 2} for i in (0, 3, 6, 9))


def test_embeddings_are_made_once_and_belong_to_a_pictures_content(stage, painted):
    sam, calls = stage.load_sam(str(SAM)), []
    sam.image_encoder.register_forward_hook(lambda *a: calls.append(1))
    embed = partial(stage.embed_pictures, sam, size=(64, 96), half=False)
    paths = embed(painted)
    assert len(calls) == 3 and embed(painted) == paths and len(calls) == 3
    paths[1].unlink()
    np.save(paths[0], np.load(paths[0]) * np.nan)               # and all other kinds of damage:
    embed(painted)                                              # test_messages.py
    assert len(calls) == 5 and np.isfinite(np.load(paths[0])).all()     # the third is not made
    Image.new("RGB", (96, 64)).save(painted[2])                 # another picture, the old name
    assert embed(painted)[2] != paths[2] and len(calls) == 6
    assert embed([painted[0]] * 2) == [paths[0]] * 2 and len(calls) == 6


@pytest.mark.parametrize("part", ["down.0.0.weight", "down.0.1.running_mean"])
def test_another_sam_has_other_embeddings(stage, painted, part):
    sam = stage.load_sam(str(SAM))
    paths = stage.embed_pictures(sam, painted, (64, 96), False)
    sam.image_encoder.state_dict()[part].add_(1)
    assert not set(stage.embed_pictures(sam, painted, (64, 96), False)) & set(paths)
