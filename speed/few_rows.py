"""A faster path for few rows of float32 through a large weight on a CPU.

A decoding step with a cache has few rows. For those, the CPU's library (MKL) is up to twice as fast
with the weight on the left: W x^T instead of x W^T, one stripe of W at a time. With many rows it is
slower.
"""

import torch
from torch import Tensor, nn

FEW_ROWS = 64  # the fast path takes at most this many rows
LARGE = 1 << 19  # and weights of at least this many elements
STRIPE = 2048  # rows of the weight in one product; 512 to 8192 are equally fast


class FewRowsLinear(nn.Linear):
    """A linear layer without bias, equal to nn.Linear but for rounding.

    It takes the fast path for 2 to FEW_ROWS rows of float32 on a CPU, when gradients are off.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., out)."""
        few = 1 < x[..., 0].numel() <= FEW_ROWS and x.dtype == torch.float32
        if not few or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)

        flat = x.flatten(0, -2).t()  # (D, rows)
        stripes = [(stripe @ flat).t() for stripe in self.weight.split(STRIPE)]  # (rows, STRIPE)
        return torch.cat(stripes, dim=-1).unflatten(0, x.shape[:-1])  # (..., out)


def use_few_rows(lm: nn.Module) -> nn.Module:
    """Let each large linear layer of `lm` without a bias be a FewRowsLinear; returns `lm`.

    The layers stay the same objects with the same weights: only their `forward` changes.
    """
    for layer in lm.modules():
        large = type(layer) is nn.Linear and layer.weight.numel() >= LARGE
        if large and layer.bias is None:
            layer.__class__ = FewRowsLinear
    return lm
