"""Many processes, one training. torchrun starts the processes; this file says who each one is and what all of them share.

    torchrun --nproc-per-node 4 train_asr.py ...        four GPUs: each takes a quarter of every batch

Every process holds the adapters and works on its own part of the batch; gradients are summed while they are computed
(DistributedDataParallel). The frozen LM is held by each process, or cut in slices (`shard`) where a card cannot hold it.
Without torchrun there is one process, and nothing here does anything.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> str:
    """Join the other processes, if torchrun started any. Returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not device.startswith("cuda"):
        dist.init_process_group("gloo")
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    return device


def finish() -> None:
    """Take leave of the others, once all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; number 0 writes and speaks for all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device: str | torch.device = "cpu") -> list[float]:
    """Each value summed over all processes, the same in every one of them."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


class Hearing(nn.Module):
    """The trained half of a DIFFA as the one module that DistributedDataParallel wants: only what trains is inside."""

    def __init__(self, model):
        super().__init__()
        self.hear = model.hear
        for name, part in model.trainable().items():
            setattr(self, name, part)

    def forward(self, states: list[Tensor], frames: Tensor) -> tuple[Tensor, Tensor]:
        return self.hear(states, frames)


def replicate(model) -> nn.Module:
    """What to call instead of model.hear, so that gradients come out as their mean over the processes."""
    hearing = Hearing(model)
    if world() == 1:
        return hearing
    return nn.parallel.DistributedDataParallel(hearing)


def shard(lm: nn.Module, device: str) -> None:
    """Cut the frozen LM in slices, one a process (FSDP2): each block is gathered when its turn comes, then let go.

    Load it on the CPU first: its weights move to `device` block by block. Embedding table, unembedding and last norm
    form the outermost slice; `embed` and `head` are called from outside, and gather it as `forward` does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(lm, mesh=mesh)
    for method in ("embed", "head"):
        register_fsdp_forward_method(lm, method)
