"""The decoder, the matching and the losses: shapes, hand-made cases, and that IGNORE really is ignored."""
import numpy as np
import torch
import torch.nn.functional as F

import common
from common import IGNORE


def logits_for(label, classes, queries, sure=10.):
    """Class and mask logits (1, 1, Q, C + 1), (1, 1, Q, h, w) that draw a label exactly: query q of class classes[q], the others empty."""
    c = torch.full((1, 1, queries, 4), -sure)
    m = torch.full((1, 1, queries, *label.shape), -sure)
    c[..., 3] = sure
    for q, cls in enumerate(classes):
        c[0, 0, q] = -sure
        c[0, 0, q, cls] = sure
        m[0, 0, q] = torch.where(label == cls, sure, -sure)
    return c, m


LABEL = torch.zeros(16, 16, dtype=torch.int64)
LABEL[:, 8:], LABEL[:4] = 1, 2


def loss_of(c, m, label, ignore=True, seed=0):
    return common.mask_loss(c, m, label[None], 64, common.seeded(seed), ignore)


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much():
    right, _ = loss_of(*logits_for(LABEL, [2, 0, 1], 5), LABEL)
    wrong, _ = loss_of(*logits_for(LABEL.flip(0), [2, 0, 1], 5), LABEL)
    assert right < .05 and wrong > 1


def test_each_class_is_matched_to_the_query_that_draws_it():
    c, m = logits_for(LABEL, [2, 0, 1], 5)
    points = torch.arange(256)[None]
    matched = common.match(c, m, LABEL[None], [[0, 1, 2]], points)
    assert sorted(matched) == [(0, 0, 0, 2), (0, 0, 1, 0), (0, 0, 2, 1)]


def test_matching_cost_equals_the_formula_written_out():
    generator = torch.Generator().manual_seed(0)
    c, m = torch.randn(1, 1, 3, 4, generator=generator), torch.randn(1, 1, 3, 16, 16, generator=generator)
    points = torch.arange(256)[None]
    costs = []
    for q in range(3):
        x, p = m[0, 0, q].flatten(), m[0, 0, q].flatten().sigmoid()
        t = (LABEL.flatten() == 2).float()
        costs.append(5 * F.binary_cross_entropy(p, t) + 5 * (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) - 2 * c[0, 0, q].softmax(0)[2])
    assert common.match(c, m, LABEL[None], [[2]], points) == [(0, 0, int(np.argmin(costs)), 2)]


def test_ignored_pixels_change_neither_matching_nor_loss():
    label = LABEL.clone()
    label[8:] = IGNORE
    c, m = (t.requires_grad_() for t in logits_for(LABEL, [2, 0, 1], 5, 2.))
    other = m.detach().clone()
    other[..., 9:, :] += torch.randn(1, 1, 5, 7, 16) * 5                           # differs only where the label is IGNORE (one row of slack for bilinear)
    other.requires_grad_()
    points = torch.arange(256)[None]
    assert common.match(c, m, label[None], [[0, 1, 2]], points) == common.match(c, other, label[None], [[0, 1, 2]], points)
    loss_of(c, other, label)[0].backward()
    assert other.grad[..., 9:, :].abs().max() == 0 and other.grad[..., :8, :].abs().max() > 0
    other.grad = None
    loss_of(c, other, label, ignore=False)[0].backward()                           # official: background of every mask
    assert other.grad[..., 9:, :].abs().max() > 0


def test_an_image_of_nothing_but_ignore_teaches_nothing():
    c, m = (t.requires_grad_() for t in logits_for(LABEL, [2, 0, 1], 5, 2.))
    nothing = torch.full_like(LABEL, IGNORE)
    loss, _ = loss_of(c, m, nothing)
    loss.backward()
    assert loss == 0 and c.grad.abs().max() == 0 and m.grad.abs().max() == 0
    loss, terms = loss_of(c, m, nothing, ignore=False)
    assert terms["class"] > 0                                                      # official: teaches "no object"


def test_a_query_that_lies_on_ignored_pixels_is_not_taught_no_object():
    label = LABEL.clone()
    label[8:] = IGNORE
    c, m = logits_for(LABEL, [2, 0, 1], 5, 2.)
    m[0, 0, 3, :8] = 2.                                                            # query 3 draws known pixels, query 4 unknown ones
    m[0, 0, 4, 8:] = 2.
    c.requires_grad_()
    loss_of(c, m, label)[0].backward()
    assert c.grad[0, 0, 3].abs().max() > 0 and c.grad[0, 0, 4].abs().max() == 0
    c.grad = None
    loss_of(c, m, label, ignore=False)[0].backward()                               # official: whatever nobody claims is no object
    assert c.grad[0, 0, 4].abs().max() > 0


def test_an_ignored_image_beside_a_labelled_one_leaves_its_loss_alone():
    c, m = logits_for(LABEL, [2, 0, 1], 5, 2.)
    alone = common.mask_loss(c, m, LABEL[None], 4096, common.seeded(0))[1]
    both = common.mask_loss(c.expand(-1, 2, -1, -1), m.expand(-1, 2, -1, -1, -1), torch.stack((LABEL, torch.full_like(LABEL, IGNORE))), 4096, common.seeded(0))[1]
    assert abs(alone["class"] - both["class"]) < 1e-5 and abs(alone["dice"] - both["dice"]) < .01 and abs(alone["mask"] - both["mask"]) < .01


def test_unmatched_queries_learn_no_object_with_a_tenth_of_the_weight():
    c = torch.zeros(1, 1, 3, 4)                                                    # uniform: every query costs log 4
    m = torch.zeros(1, 1, 3, 16, 16)
    _, terms = loss_of(c, m, torch.zeros_like(LABEL))
    assert abs(terms["class"] - np.log(4)) < 1e-6                                  # a weighted mean of equal costs
    c[0, 0, :, 0] = 5.                                                             # all three sure of class 0: right for one, wrong for two
    _, terms = loss_of(c, m, torch.zeros_like(LABEL))
    right, wrong = -torch.log_softmax(c[0, 0, 0], 0)[0], -torch.log_softmax(c[0, 0, 0], 0)[3]
    assert abs(terms["class"] - float((right + .2 * wrong) / 1.2)) < 1e-5


def test_every_layer_is_supervised():
    c, m = logits_for(LABEL, [2, 0, 1], 5, 2.)
    one, three = loss_of(c, m, LABEL)[1], loss_of(c.repeat(3, 1, 1, 1), m.repeat(3, 1, 1, 1, 1), LABEL)[1]
    assert abs(three["class"] - 3 * one["class"]) < 1e-4


def test_points_are_read_at_pixel_centres():
    image = torch.arange(12.).reshape(1, 1, 3, 4)
    assert torch.allclose(common.sample(image, torch.tensor([[0, 5, 11]]), (3, 4)), torch.tensor([[[0., 5., 11.]]]), atol=1e-4)


def test_the_semantic_map_is_the_sum_of_class_times_mask():
    c, m = torch.zeros(1, 2, 3), torch.zeros(1, 2, 2, 2)
    c[0, 0] = torch.tensor([2., 0., 0.]).log_softmax(0)
    m[0, 0], m[0, 1] = 100., -100.
    scores = common.semantic(c, m, (4, 6))
    assert scores.shape == (1, 2, 4, 6) and torch.allclose(scores[0, :, 0, 0], torch.tensor([2., 0., 0.]).softmax(0)[:2])


def test_decoder_shapes_for_any_input_size():
    torch.manual_seed(0)
    decoder = common.Decoder([8, 16, 24, 32], classes=5, dim=32, queries=7, layers=3, hidden=48, pixel_layers=2)
    for h, w in ((64, 96), (32, 160)):
        classes, masks = decoder([torch.randn(2, c, h // s, w // s) for c, s in zip((8, 16, 24, 32), (4, 8, 16, 32))])
        assert classes.shape == (4, 2, 7, 6) and masks.shape == (4, 2, 7, h // 4, w // 4)


def test_a_pixel_layer_adds_the_neighbours_in_scale():
    layer = common.PixelLayer(4, 8)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)                                            # the feed-forward adds nothing,
    layer.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    with torch.no_grad():
        layer.mix.weight[:, 0, 2, 2] = 1.                                          # and 5 x 5 pixels are the one in the middle: x + (x + finer + coarser)
    out = layer([torch.full((1, 4, 8 // s, 16 // s), value) for s, value in ((1, 1.), (2, 10.), (4, 100.))])
    assert [(x == v).all().item() for x, v in zip(out, (1 + 1 + 10, 10 + 10 + 1 + 100, 100 + 100 + 10))] == [True] * 3 and out[0].shape == (1, 4, 8, 16)


def test_attention_equals_torchs_own_and_obeys_the_mask():
    torch.manual_seed(0)
    ours, theirs = common.Attention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([x.weight for x in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([x.bias for x in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    q, k, look = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.rand(2, 3, 5) > .4
    look[..., 0] = True
    assert torch.allclose(ours(q, k, k, look), theirs(q, k, k, attn_mask=~look.repeat_interleave(4, 0))[0], atol=1e-5)


def test_norms_and_embeddings_do_not_decay():
    decoder = common.Decoder([8, 8, 8, 8], 3, 16, 4, 1, 16, 1)
    decayed, free = common.make_optimizer(decoder, .05).param_groups
    assert decayed["weight_decay"] == .05 and free["weight_decay"] == 0
    assert any(p is decoder.query.weight for p in free["params"]) and any(p is decoder.norm.weight for p in free["params"])
    assert any(p is decoder.class_head.bias for p in decayed["params"])


def test_a_saved_network_explains_itself(finished):
    run, _ = finished
    encoder, decoder, about = common.load_model(run / "03_train_source/model.safetensors")
    assert about["encoder"] == "local-dir:tests/toy/weights/clip" and about["classes"] == common.CLASSES and about["constants"]["BATCH"] == 2
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    encoder.train()
    assert not any(module.training for module in encoder.modules())               # frozen stays in eval mode
    odd = torch.randint(0, 255, (1, 3, 45, 71), dtype=torch.uint8)
    assert common.predict(encoder, decoder, odd).shape == (1, 12, 45, 71)


def test_a_trainable_encoder_learns_at_its_share_of_the_rate():
    optimizer = common.make_optimizer(torch.nn.Linear(1, 1), .05, torch.nn.Linear(1, 1), .1)
    common.set_learning_rate(optimizer, 1., 49, 100, 10, "constant")
    assert [g["lr"] for g in optimizer.param_groups] == [1., .1]
    common.set_learning_rate(optimizer, 1., 4, 100, 10, "poly")
    assert abs(optimizer.param_groups[0]["lr"] - .5 * .96 ** .9) < 1e-9


def test_a_broken_network_shows_in_the_loss_not_in_the_matching():
    classes, masks = torch.zeros(2, 1, 3, 4), torch.full((2, 1, 3, 4, 4), float("nan"))
    loss, _ = common.mask_loss(classes, masks, torch.zeros(1, 16, 16, dtype=torch.int64), 32, common.seeded(0))
    assert torch.isnan(loss)
