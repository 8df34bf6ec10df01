"""The weights of a language model in 8 bits, for answering: half the memory of 16 bits.

Each row of a linear layer becomes integers from -127 to 127 and one scale, so that weight = rows *
scale, up to half a scale. All linear layers of the LM are held so: those of the blocks, and the
unembedding where it is not tied. The embedding table, norms and biases keep their dtype.

A product makes a stripe of the weight again, in the dtype of the activations. So the memory falls,
and no product becomes faster. torchao computes the same for weights in int8.

Shapes: D_in and D_out of a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lm import DiffusionLM, LMConfig

MOST = 127  # the largest integer: -128 stays unused, so that both signs have the same range
# Elements of the weight that are made again at a time. On a CPU the stripe stays in the cache; on
# other devices and in a compiled graph, fewer and larger products pay.
CPU_STRIPE = 1 << 18
STRIPE = 1 << 26


def to_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (D_out, D_in) as rows (D_out, D_in) in int8 and scales (D_out, 1) in its dtype.

    No number of rows * scale is farther from the weight than half of its row's scale, but for the
    rounding of that product itself. The weight must be finite.
    """
    # The scale is rounded to the dtype before it divides, so its rounding adds no error. Zeros, and
    # rows below the normal range of the dtype, take the smallest normal number.
    lowest, highest = weight.aminmax(dim=1, keepdim=True)
    scale = torch.maximum(-lowest, highest).float() / MOST  # (D_out, 1)
    scale = scale.to(weight.dtype).clamp(min=torch.finfo(weight.dtype).smallest_normal)

    # In stripes: float32 numbers of a whole vocabulary would take gigabytes.
    rows = torch.empty_like(weight, dtype=torch.int8)
    n = max(STRIPE // weight.shape[1], 1)
    for stripe, part, s in zip(weight.split(n), rows.split(n), scale.split(n), strict=True):
        part.copy_((stripe.float() / s.float()).round_())
    return rows, scale


class Int8Linear(nn.Linear):
    """A linear layer that takes its weight once and holds it as int8 rows and scales."""

    def take(self, weight: Tensor) -> None:
        """Hold this weight (D_out, D_in) in 8 bits instead of the parameter `weight`."""
        rows, scale = to_rows(weight.detach())
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D_in) -> (..., D_out)."""
        in_cache = x.device.type == "cpu" and not torch.compiler.is_compiling()
        n = max((CPU_STRIPE if in_cache else STRIPE) // self.in_features, 1)
        stripes = zip(self.rows.split(n), self.scale.split(n), strict=True)

        # An integer times a scale has the dtype of the scale.
        y = torch.cat([F.linear(x, rows * scale) for rows, scale in stripes], dim=-1)
        return y if self.bias is None else y + self.bias

    def may_hold(self, weight: Tensor) -> bool:
        """Whether the rows are those of this weight, as far as both may be rounded to 16 bits."""
        if weight.shape != self.rows.shape:
            return False
        n = max(STRIPE // self.in_features, 1)
        stripes = zip(weight.split(n), self.rows.split(n), self.scale.split(n), strict=True)
        for stripe, rows, scale in stripes:
            # Half a step to the nearest integer, and half a step of bfloat16: 2^-8 of 127 steps.
            steps = stripe.to(rows.device).float() / scale.float()
            if not ((steps - rows).abs() <= 1).all():
                return False
        return True


def int8_layers(module: nn.Module) -> dict[str, Int8Linear]:
    """The layers of a module that hold, or will take, weights of 8 bits, by their names."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Int8Linear)}


def use_int8(lm: DiffusionLM) -> DiffusionLM:
    """Let each linear layer of an LM without weights yet be an Int8Linear; returns the LM.

    The layers stay the same objects. A tied unembedding is the embedding table, and stays too.
    """
    for layer in lm.modules():
        if type(layer) is nn.Linear and layer.weight is not lm.embedding.weight:
            layer.__class__ = Int8Linear
    return lm


def weight_bytes(config: LMConfig, dtype: torch.dtype, int8: bool) -> int:
    """Bytes that the weights of an LM take, by its config; nothing is allocated."""
    with torch.device("meta"):
        lm = DiffusionLM(config).to(dtype)
    if int8:
        for layer in int8_layers(use_int8(lm)).values():
            layer.take(layer.weight)
    return sum(tensor.nbytes for tensor in (*lm.parameters(), *lm.buffers()))
