"""What nobody would notice on a CPU, counted on a CPU: how often a training step waits for the GPU,
and what a trainable encoder keeps."""
import pytest
import torch
from references import Waits, write_convnext
from torch.autograd.graph import saved_tensors_hooks

from conftest import SMALL, fresh

adam = torch.optim.AdamW.step


@pytest.fixture
def waits(monkeypatch, start, finished, tmp_path):
    """waits(stage, *arguments) -> Counter: waits of one step, without log, preview, checkpoint"""
    def call(stage, *arguments):
        every = [f"--{name}_EVERY=1000" for name in ("LOG", "SAVE", "PREVIEW")]
        counts = []
        for steps in (2, 3):
            mode = Waits()

            def cpu(tensor, mode=mode):
                mode.count["cpu()"] += 1
                return tensor.clone()

            def step(optimizer, mode=mode):
                before = mode.count.copy()
                adam(optimizer)                 # its step counters lie on the CPU on a GPU, too
                mode.count = before
            monkeypatch.setattr(torch.Tensor, "cpu", cpu)
            monkeypatch.setattr(torch.optim.AdamW, "step", step)
            out = f"--OUT={tmp_path}/{stage}{steps}{len(arguments)}"
            with mode:
                assert start(stage, *SMALL[stage], f"--ITERATIONS={steps}", *every, *arguments, out,
                             run=finished[0]) is None
            counts.append(mode.count)
        return counts[1] - counts[0]
    return call


@pytest.mark.slow
def test_a_step_waits_once_and_once_more_per_painted_picture(waits):
    assert waits("03_train_source") == waits("04_selftrain", "--REFINE=off") == {"cpu()": 1}
    with_sam = waits("04_selftrain")            # on two painted pictures
    assert with_sam.pop("cpu()") == 3           # the teacher's label, for its components
    # segment_anything picks points by masks, seven times per pass of its prompt encoder
    assert sum(with_sam.values()) <= 2 * 7


# ---------------------------------------------------------------------------- trainable encoder
@pytest.fixture
def convnext(tmp_path):
    """A ConvNeXt CLIP with DropPath that trains, and pictures."""
    write_convnext(tmp_path)
    encoder = fresh("03_train_source").Encoder(f"open_clip:local-dir:{tmp_path}", frozen=False)
    return encoder, torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


def kept(encoder, images):
    """-> gradients of all weights; bytes that the forward pass kept for them, but for the weights.
    DropPath drops other blocks each time, unless the recomputation repeats its draws."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    torch.manual_seed(0)
    encoder.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum((maps ** 2).sum() for maps in encoder(images))
    loss.backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    return gradients, sum(size for place, size in found.items() if place not in weights)


def test_gradient_checkpoints_keep_a_fraction_and_change_no_gradient(convnext):
    encoder, images = convnext
    ours, few = kept(encoder, images)
    encoder.body.set_grad_checkpointing(False)
    wanted, many = kept(encoder, images)
    assert few < many / 3 and len(ours) > 20
    torch.testing.assert_close(ours, wanted)
