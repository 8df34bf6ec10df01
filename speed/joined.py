"""Fewer, larger products: query, key and value in one, gate and up too.

For compiled steps on a GPU (here), and for the calls of a small LM on a CPU (small.py).

A block step multiplies few rows by many weights. One product of a joined weight reads memory faster
than three, and a graph with fewer kernels has fewer gaps. The joined weight shares its memory with
the layers' own, so it takes none, and what eager code computes is unchanged.

Shapes: B batch, M positions, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lm import Attention, DiffusionLM, SwiGLU
from speed.int8 import int8_layers


class JoinedAttention(Attention):
    """Attention whose compiled projections are one product."""

    def project(self, x: Tensor, output_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if output_rows is not None or not torch.compiler.is_compiling():
            return super().project(x, output_rows)
        widths = [layer.out_features for layer in (self.query, self.key, self.value)]
        return F.linear(x, self.joined).split(widths, dim=-1)


class JoinedSwiGLU(SwiGLU):
    """SwiGLU whose compiled gate and up are one product."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        gate, up = F.linear(x, self.joined).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def join_layers(module: nn.Module, layers: tuple[nn.Linear, ...]) -> None:
    """module.joined is the weights of all layers, and each layer's weight is a part of it."""
    weights = [layer.weight for layer in layers]
    joined = getattr(module, "joined", None)
    if joined is not None and joined.data_ptr() == weights[0].data_ptr():
        return

    # Outside of inference mode, or the weights could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        module.joined = torch.cat([weight.detach() for weight in weights])
        parts = module.joined.split([len(weight) for weight in weights])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
    if module.joined.is_cuda:
        torch._dynamo.mark_static_address(module.joined)  # a CUDA graph copies what may move


def join(lm: DiffusionLM) -> None:
    """Join the products of each block that has no biases. Again after its weights have moved."""
    for block in lm.blocks:
        # Rows of 8 bits are no weights that one product could read.
        if int8_layers(block):
            continue

        attn = block.attn
        if type(attn) in (Attention, JoinedAttention) and attn.query.bias is None:
            join_layers(attn, (attn.query, attn.key, attn.value))
            attn.__class__ = JoinedAttention
        if type(block.mlp) in (SwiGLU, JoinedSwiGLU):
            join_layers(block.mlp, (block.mlp.gate, block.mlp.up))
            block.mlp.__class__ = JoinedSwiGLU
