"""
bench_memory: GB of card memory that PRESET=gta takes, counted without a card.

    python tests/bench.py memory            three minutes on one core

A step of every stage runs in full size on tensors that have a shape and no content (torch's
FakeTensorMode), while a table is kept of all that are alive: weights, AdamW's two means, gradients,
what forward passes keep for the backward pass, and everything in between. The most that was alive
at once is what a card must hold.

Every picture has all classes, and a pass of SAM's decoder as many prompts as there may be. Not
counted, and added as CONTEXT: what CUDA itself takes, kernels' workspaces, and what the allocator
rounds up. GB are 2 ** 30 bytes.
"""
import copy
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock
from weakref import finalize

import numpy as np
import torch
import torch.nn.functional as F
from bench import evaluation, head, line, selftrain, source
from bench_gpu import SCORED, make_decoder, make_encoder
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONTEXT = 1.0                               # GB: CUDA's own, kernels' workspaces, rounding
CARDS = {12: 11.5, 16: 14.5, 24: 22.0}      # and what a program gets of it (of a T4, an L4)


# ---------------------------------------------------------------------------- counting
class Memory(TorchDispatchMode):
    """Bytes of all tensors that were made in it and are alive, and the most there was."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata not in self.sizes:            # a view has the storage of another
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            finalize(storage, self.forget, storage._cdata)

    def forget(self, place):
        self.now -= self.sizes.pop(place)


# autocast of CUDA computes these in float32, that of a CPU, under which the count runs, in bfloat16
EXACT = ((F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (torch.Tensor, "softmax"),
         (torch.Tensor, "pow"))


def in_float32(function):
    def exact(x, *args, **kwargs):
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)
    return exact


def all_finite(cost):
    """For Tensor.cpu: costs by which match() gives every picture all classes."""
    return SimpleNamespace(numpy=lambda: np.zeros(cost.shape))


def hollow(network):
    """Put tensors without content in place of a network's own."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(weight), weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer))


@contextmanager
def counted(*networks):
    """Within it tensors, those of the networks too, have no content -> the Memory that they would
    take."""
    memory = Memory()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "cpu", all_finite))
        stack.enter_context(mock.patch.object(    # its deepcopy would read what is not there
            ResizeLongestSide, "apply_coords_torch", lambda self, points, shape: points))
        for owner, name in EXACT:
            exact = in_float32(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, exact))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(memory)
        for network in networks:
            hollow(network)
        yield memory


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def pictures(n, shape):
    return torch.zeros(n, 3, *shape, dtype=torch.uint8)


# ---------------------------------------------------------------------------- the stages
@lru_cache
def made():
    encoder = make_encoder()
    return encoder, make_decoder(encoder.channels)


def networks():
    """-> encoder and decoder, still with content"""
    return copy.deepcopy(made())


def prepare(encoder, decoder, frozen):
    """As in the middle of training -> AdamW's two means of all weights that train, which have
    gradients of the step before."""
    encoder.freeze(frozen)
    encoder.train()
    trained = [p for p in [*encoder.parameters(), *decoder.parameters()] if p.requires_grad]
    for weight in trained:
        weight.grad = torch.empty_like(weight)
    return [torch.empty_like(weight) for weight in trained for _ in range(2)]


def hollow_sam():
    """SAM; which point is what kind, its prompt encoder asks their content."""
    sam = sam_model_registry["vit_h"]().eval().requires_grad_(False)
    width = sam.prompt_encoder.embed_dim
    sam.prompt_encoder._embed_points = lambda points, *_, **__: torch.zeros(
        len(points), points.shape[1] + 1, width)
    return sam


def learn(encoder, decoder, batch):
    """The lines of a step of 03, and of 04, in which a network learns."""
    images = torch.zeros(batch, 3, *source.CROP, dtype=torch.uint8)
    labels = torch.zeros(batch, *source.CROP, dtype=torch.int64)
    with autocast():
        classes, masks = decoder(encoder(images))
    loss, _ = source.mask_loss(classes, masks, labels, source.POINTS, source.LOSS_WEIGHTS,
                               source.NO_OBJECT)
    encoder.zero_grad()
    decoder.zero_grad()
    loss.backward()


def source_step(batch, frozen):
    """A step of 03 -> bytes"""
    encoder, decoder = networks()
    with counted(encoder, decoder) as memory:
        means = prepare(encoder, decoder, frozen)
        learn(encoder, decoder, batch)
        del means
    return memory.most


def selftrain_step(batch, frozen):
    """A step of 04 with a quarter of painted pictures, at least one -> bytes"""
    encoder, student = networks()
    teacher_encoder, teacher = networks()
    if frozen:
        teacher_encoder = encoder
    with counted(encoder, student, teacher, teacher_encoder) as memory:
        means = prepare(encoder, student, frozen)
        sam = hollow_sam()
        clean = torch.zeros(max(1, batch // 4), 3, *source.CROP, dtype=torch.uint8)
        source.predict(teacher_encoder, teacher, clean, True).argmax(1)
        prompts = torch.zeros(selftrain.SAM_CHUNK, selftrain.SAM_POINTS, 2)
        with torch.no_grad(), autocast():
            selftrain.sam_masks(sam, torch.zeros(256, 64, 64), prompts, source.CROP)
        learn(encoder, student, batch)
        del means
    return memory.most


def sam_pass(batch):
    """SAM's encoder on `batch` pictures, before the loop of 04, beside what the loop holds when it
    goes on from a checkpoint -> bytes"""
    encoder, student = networks()
    _, teacher = networks()
    with counted(encoder, student, teacher) as memory:
        means = prepare(encoder, student, True)
        sam = hollow_sam()
        side = sam.image_encoder.img_size
        with torch.no_grad(), autocast():
            sam.image_encoder(sam.preprocess(torch.zeros(batch, 3, side, side)))
        del means
    return memory.most


def scored(shape):
    """05 on a picture of `shape` -> bytes"""
    encoder, decoder = networks()
    scale = evaluation.SHORT_SIDE / min(shape)
    image = np.zeros((*[round(side * scale) for side in shape], 3), np.uint8)
    with counted(encoder, decoder) as memory:
        evaluation.segment(encoder, decoder, image, shape)
    return memory.most


def cell(count):
    """Bytes -> a text: GB with CONTEXT, and the smallest card that holds them"""
    needed = count / 2 ** 30 + CONTEXT
    holds = [f"{size} GB" for size, usable in CARDS.items() if needed <= usable]
    return f"{needed:.1f} ({(holds or ['none of these'])[0]})"


def main():
    batches = 8, 4, 2
    head("GB (card)", *[f"{n} pictures" for n in batches])
    for title, frozen in (("frozen", True), ("trainable", False)):
        line(f"03, {title} encoder", *[cell(source_step(n, frozen)) for n in batches])
        line(f"04, {title} encoder", *[cell(selftrain_step(n, frozen)) for n in batches])
    line("04, SAM_BATCH", *[cell(sam_pass(n)) for n in batches])
    head("GB (card)", *[f"{shape[0]} x {shape[1]}" for shape in SCORED])
    line("05", *[cell(scored(shape)) for shape in SCORED])
