"""How the frozen LM is run while adapters train: its blocks recomputed, compiled, or cut in shards.

None of these changes what is computed, only its memory and time.
"""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from diffa import DIFFA
from diffusion_lm import DiffusionLM
from training import processes
from training.recipe import Execution


def recompute_blocks(lm: DiffusionLM) -> None:
    """Keep only the inputs of the LM's blocks; the backward pass computes each block again."""
    for block in lm.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def prepare(model: DIFFA, execution: Execution, device: str) -> dict[str, nn.Parameter]:
    """Recompute, compile and shard the LM, and set the model to train. Returns what trains."""
    parts = model.trained_parts()
    trained = {n: p for n, p in model.named_parameters() if n.split(".")[0] in parts}

    # The LM, whose blocks take most of the time and memory.
    if execution.recompute:
        recompute_blocks(model.lm)
    if execution.compile:
        for block in model.lm.blocks:
            block.compile()
    if execution.shard:
        processes.shard(model.lm, device)
        model.encoder.to(device)
        for parameter in trained.values():
            parameter.data = parameter.data.to(device)

    # Dropout in the trained parts; no gradient for anything else.
    model.train()
    model.encoder.eval()
    return {name: parameter.requires_grad_() for name, parameter in trained.items()}
