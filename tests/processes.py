"""What test_processes.py runs under torchrun: loss and gradients of one batch of eight pictures,
dealt over the processes, at the points that one process takes for the whole batch.

    torchrun ... tests/processes.py OUT STAGE(3 or 4) -> OUT.WORLD_SIZE.pt"""
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

PICTURES, H, W = 8, 64, 64


draw = torch.randint


def addressed(high, size, device=None):
    """torch.randint whose rows belong to the pictures that this process has."""
    rows, count = size
    generator = torch.Generator().manual_seed(count)
    whole = draw(high, (PICTURES, count), generator=generator)
    return whole[common.RANK::common.PROCESSES]


def main(out, unlabelled):
    stage = import_module("03_train_source")
    common.device()
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(PICTURES, c, H // s, W // s, generator=random)
                for c, s in zip((8, 8, 16, 16), (4, 8, 16, 32))]
    coarse = torch.randint(0, 5, (PICTURES, 4, 4), generator=random)
    labels = coarse.repeat_interleave(H // 4, 1).repeat_interleave(W // 4, 2)
    labels[1] = common.IGNORE                           # a picture without any label
    labels[2:, :, :8] = common.IGNORE
    torch.manual_seed(0)
    decoder = stage.Decoder((8, 8, 16, 16), 12, 32, 12, 2, 32, 1)
    D = stage.distributed(decoder)
    mine = slice(common.RANK, None, common.PROCESSES)
    torch.randint = addressed
    loss, terms = stage.mask_loss(*D([x[mine] for x in features]), labels[mine], 64, (2., 5., 5.),
                                  .1, unlabelled)
    loss.backward()
    numbers = torch.stack([loss, *terms.values()]).detach()
    result = {"numbers": common.sum_of_processes(numbers) / common.PROCESSES}
    result |= {name: value.grad for name, value in decoder.named_parameters()}
    if common.RANK == 0:
        torch.save(result, f"{out}.{common.PROCESSES}.pt")
    common.wait_for_others()
    if common.PROCESSES > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
