"""Matching, loss and decoder of 03: against transformers' Mask2Former at the same points, and on
cases small enough to count by hand."""
import numpy as np
import pytest
import torch
from references import centres, library, mask2former_loss, pieces

from common import IGNORE
from conftest import fresh

stage = fresh("03_train_source")
WEIGHTS, NO_OBJECT = (2., 5., 5.), .1
LAYERS, QUERIES, CLASSES, N = 3, 10, 6, 64
SHAPE, COARSE = (32, 48), (8, 12)               # of labels, and of mask logits


# ------------------------------------------------------------ the library, at pixels of our choice
def official(monkeypatch, *arguments):
    return mask2former_loss(monkeypatch, *arguments, N, WEIGHTS, NO_OBJECT)


def draw_from(monkeypatch, pools):
    """torch.randint gives the pixels of the pool that has as many."""
    def randint(high, size, device):
        assert high == SHAPE[0] * SHAPE[1]
        return torch.stack(pools[size[1]])
    monkeypatch.setattr(torch, "randint", randint)


def ours(monkeypatch, classes, masks, labels, pools, **options):
    draw_from(monkeypatch, pools)
    found = stage.mask_loss(classes, masks, labels, N, WEIGHTS, NO_OBJECT, **options)
    monkeypatch.undo()
    return found


def predictions(images):
    generator = torch.Generator().manual_seed(3)
    classes = torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=generator)
    return classes, 3 * torch.randn(LAYERS, images, QUERIES, *COARSE, generator=generator)


FOUR = [0, 1, 2, 3, 4, 5], [2], [5, 1, 3], [0, 4]


def random_pools(images):
    """Pixels for matching, candidates, and the random quarter, for each image."""
    generator = torch.Generator().manual_seed(5)
    return {n: list(torch.randint(SHAPE[0] * SHAPE[1], (images, n), generator=generator))
            for n in (N, 3 * N, N // 4)}


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def assert_equal(theirs, mine, loss, terms):
    """Both losses to 1e-5, and their gradients with respect to all logits to 1e-4, relative."""
    wanted, _, wanted_terms = theirs
    assert abs(loss - wanted) < 1e-5 * wanted
    assert np.allclose([term.item() for term in terms.values()], wanted_terms, rtol=1e-5)
    for found, other in zip(gradients(loss, *mine), gradients(wanted, *mine)):
        assert (found - other).norm() < 1e-4 * other.norm() and other.norm() > 0


@pytest.mark.parametrize("unlabelled", ["ignore", "negative"])
def test_loss_and_gradients_equal_mask2formers(monkeypatch, unlabelled):
    labels = pieces(*FOUR)
    if unlabelled == "negative":                        # IGNORE belongs to no mask
        labels[0, 20:], labels[2, :, 10:30] = IGNORE, IGNORE
    mine, pools = [part.requires_grad_() for part in predictions(4)], random_pools(4)
    theirs = official(monkeypatch, *mine, labels, pools)
    loss, terms = ours(monkeypatch, *mine, labels, pools, unlabelled=unlabelled)
    assert_equal(theirs, mine, loss, terms)


def assert_same_matches(found, matches):
    """found: of match(). matches: of the library, which begins with the last layer."""
    last, *others = matches
    wanted = {(layer - 1, *rest) for layer, *rest in sum(others, [])}
    wanted |= {(LAYERS - 1, *rest) for _, *rest in last}
    assert set(map(tuple, found.T.tolist())) == wanted and found.shape[1] == len(wanted)


def test_matches_equal_the_hungarian_matchers(monkeypatch):
    labels, mine, pools = pieces(*FOUR), predictions(4), random_pools(4)
    _, matches, _ = official(monkeypatch, *mine, labels, pools)
    found = stage.match(*mine, labels, torch.stack(pools[N]), WEIGHTS)
    assert_same_matches(found, matches)
    assert found.shape[1] == LAYERS * 12


def with_unknown_stripe():
    """Labels whose last 8 rows are IGNORE, and masks of which the last two lie there alone. Pools
    for us, and for the library without pixels of IGNORE."""
    labels, (classes, masks), pools = pieces(*FOUR[::2]), predictions(2), random_pools(2)
    labels[:, 24:] = IGNORE
    masks[:, :, -2:] = -60                  # too wrong on labelled pixels to be matched
    masks[:, :, -2:, 6:] = 9
    masks[..., 0, 0] = 40                   # the mask is sure here: never among the uncertain
    known = labels.flatten(1) != IGNORE
    pools[N // 4] = [torch.where(torch.arange(N // 4) < 5, 24 * 48 + drawn % 300, drawn % (24 * 48))
                     for drawn in pools[N // 4]]        # five of IGNORE in each image
    theirs = {n: [drawn[k[drawn]] for drawn, k in zip(pools[n], known)] for n in (N, N // 4)}
    theirs[3 * N] = [drawn.where(k[drawn], 0) for drawn, k in zip(pools[3 * N], known)]
    return labels, classes, masks, pools, theirs


def test_with_ignore_the_loss_is_mask2formers_on_the_labelled_pixels(monkeypatch):
    labels, classes, masks, pools, theirs = with_unknown_stripe()
    mine = [classes.requires_grad_(), masks.requires_grad_()]
    # the queries that lie on IGNORE are not taught: the library does not see them
    wanted = official(monkeypatch, classes[:, :, :-2], masks[:, :, :-2], labels, theirs)
    loss, terms = ours(monkeypatch, *mine, labels, pools)
    assert_equal(wanted, mine, loss, terms)
    found = stage.match(*mine, labels, torch.stack(pools[N]), WEIGHTS)
    assert_same_matches(found, wanted[1])
    of_class, of_mask = gradients(ours(monkeypatch, *mine, labels, pools)[0], *mine)
    assert of_class[:, :, -2:].abs().max() == 0
    # the last row of the masks is seen by pixels of IGNORE alone, the one before by others too
    assert of_mask[..., 7, :].abs().max() == 0 and of_mask[..., 6, :].abs().max() > 0
    negative = ours(monkeypatch, *mine, labels, pools, unlabelled="negative")[0]
    assert gradients(negative, masks)[0][..., 7, :].abs().max() > 0


def test_an_image_of_ignore_alone_changes_nothing_for_the_others(monkeypatch):
    labels, (classes, masks), pools = pieces(*FOUR[::2]), predictions(3), random_pools(3)
    wanted, _, _ = official(monkeypatch, classes[:, :2], masks[:, :2], labels, pools)
    nothing = torch.full((1, *SHAPE), IGNORE)
    loss, _ = ours(monkeypatch, classes, masks, torch.cat((labels, nothing)), pools)
    assert abs(loss - wanted) < 1e-5 * wanted


def test_uncertain_points_are_the_least_sure_of_the_candidates_and_never_ignored(monkeypatch):
    labels, masks, pools = pieces([0, 1], [2]), predictions(2)[1][0, :, 0], random_pools(2)
    labels[0, 16:] = IGNORE
    draw_from(monkeypatch, pools)
    points = stage.uncertain_points(masks, labels, torch.tensor([0, 1]), N)
    assert points.shape == (2, N)
    grid = centres(torch.arange(SHAPE[0] * SHAPE[1]), SHAPE)
    for k in range(2):
        large = library.sample_point(masks[k][None, None], grid[None], align_corners=False)[0, 0]
        candidates = pools[3 * N][k]
        candidates = candidates[labels[k].flatten()[candidates] != IGNORE]
        doubt = large[candidates].abs().sort().values[:48]
        chosen, rest = points[k, :48], points[k, 48:]
        assert torch.allclose(large[chosen].abs().sort().values, doubt, atol=1e-5)
        assert set(chosen.tolist()) <= set(candidates.tolist())
        assert rest.tolist() == pools[N // 4][k].tolist()


# ------------------------------------------------------------ by hand
@pytest.mark.parametrize("unlabelled", ["ignore", "negative"])
def test_nothing_but_ignore_teaches_nothing(monkeypatch, unlabelled):
    mine = [part.requires_grad_() for part in predictions(1)]
    nothing = torch.full((1, *SHAPE), IGNORE)
    loss, _ = ours(monkeypatch, *mine, nothing, random_pools(1), unlabelled=unlabelled)
    assert loss == 0
    assert all(found.abs().max() == 0 for found in gradients(loss, *mine))


def test_a_broken_network_shows_in_the_loss_not_in_the_matching():
    classes, masks = torch.zeros(2, 1, 3, 4), torch.full((2, 1, 3, 4, 4), torch.nan)
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    loss, _ = stage.mask_loss(classes, masks, labels, 32, WEIGHTS, NO_OBJECT)
    assert torch.isnan(loss)


@torch.no_grad()
def test_a_pixel_layer_adds_the_neighbours_in_scale():
    layer = stage.PixelLayer(4, 8)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)                 # the feed-forward adds nothing,
    layer.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    layer.mix.weight[:, 0, 2, 2] = 1.                   # 5 x 5 pixels are the one in the middle
    values = ((1, 1.), (2, 10.), (4, 100.))
    maps = layer([torch.full((1, 4, 8 // s, 16 // s), value) for s, value in values])
    for found, wanted in zip(maps, (1 + 1 + 10, 10 + 10 + 1 + 100, 100 + 100 + 10)):
        assert (found == wanted).all()


def test_norms_and_embeddings_do_not_decay():
    decoder = stage.Decoder([8, 8, 8, 8], 3, 32, queries=4, layers=1, width=16, pixel_layers=1)
    optimizer, trained = stage.make_optimizer([(decoder, 1)], .05)
    decay = {id(p): group["weight_decay"]
             for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(map(id, trained)) == set(map(id, decoder.parameters()))
    still = [decoder.query.weight, decoder.query_position.weight, decoder.level.weight,
             decoder.norm.weight, decoder.layers[0].norms[0].bias, decoder.smooth[0][1].weight]
    moving = [decoder.class_head.bias, decoder.layers[0].cross_attention.in_proj_weight,
              decoder.layers[0].feed[0].weight, decoder.lateral[0][0].weight]
    assert {decay[id(p)] for p in still} == {0} and {decay[id(p)] for p in moving} == {.05}


def test_the_rate_warms_up_falls_and_is_lower_for_the_encoder():
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    optimizer, _ = stage.make_optimizer([(one, 1), (other, .1)], .05)
    stage.set_learning_rate(optimizer, 1., 49, 100, 10, "constant")
    assert np.allclose([group["lr"] for group in optimizer.param_groups], [1, .1])
    stage.set_learning_rate(optimizer, 1., 4, 100, 10, "poly")
    assert abs(optimizer.param_groups[0]["lr"] - .5 * .96 ** .9) < 1e-9
