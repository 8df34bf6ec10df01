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
    """A linear layer without bias that shares the weight of another; equal but for rounding.

    It takes the fast path for 2 to FEW_ROWS rows of float32 on a CPU, when gradients are off.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's would draw a new weight
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.weight = layer.weight  # (out, D)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., out)."""
        few = 1 < x[..., 0].numel() <= FEW_ROWS and x.dtype == torch.float32
        if not few or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)

        flat = x.flatten(0, -2).t()  # (D, rows)
        stripes = [
            (stripe @ flat).t() for stripe in self.weight.split(STRIPE)
        ]  # (rows, STRIPE) each
        return torch.cat(stripes, dim=-1).unflatten(0, x.shape[:-1])  # (..., out)


def use_few_rows(lm: nn.Module) -> nn.Module:
    """Replace each large linear layer without bias of `lm`, in place; returns `lm`.

    Names of parameters stay, and tied weights stay tied.
    """
    for module in list(lm.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.bias is None and layer.weight.numel() >= LARGE:
                setattr(module, name, FewRowsLinear(layer))
    return lm
