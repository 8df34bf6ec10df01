"""Many processes, one training: which one each process is, and what all have in common.

    torchrun --nproc-per-node 4 train_asr.py ...    four GPUs: each takes a quarter of a batch

Every process holds the adapters and computes its own part of the batch; gradients are summed over
the processes (DistributedDataParallel). Each process holds the whole frozen LM, or a slice of it
(`shard`) where a card cannot hold it. Without torchrun there is one process, and nothing is shared.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
    """Leave the other processes, once all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number. Number 0 alone prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device: str | torch.device = "cpu") -> list[float]:
    """Each value summed over all processes, the same in every one of them."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def wait() -> None:
    """Wait until every process has come to this line."""
    if world() > 1:
        dist.barrier()


class Hearing(nn.Module):
    """The trained parts of a DIFFA alone, as the one module that DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.hear = model.hear
        for name, part in model.trained_parts().items():
            setattr(self, name, part)

    def forward(self, states: list[Tensor], frames: Tensor) -> tuple[Tensor, Tensor]:
        return self.hear(states, frames)


def replicate(model) -> nn.Module:
    """What to call in place of model.hear: its gradients become their mean over the processes."""
    hearing = Hearing(model)
    return hearing if world() == 1 else DistributedDataParallel(hearing)


def shard(lm: nn.Module, device: str) -> None:
    """Cut the frozen LM in slices, one for each process (FSDP2).

    A block is gathered when its turn comes and freed after it. Load the LM on the CPU first: its
    weights move to `device` block by block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)

    # Embedding, unembedding and last norm form the outermost slice. `embed` and `head` are called
    # from outside, and must gather it as `forward` does.
    fully_shard(lm, mesh=mesh)
    for method in ("embed", "head"):
        register_fsdp_forward_method(lm, method)
