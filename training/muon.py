"""Muon: an optimiser that moves matrices by orthogonal steps (arXiv 2502.16982, section 2.2).

The momentum of a matrix is replaced by nearly the closest matrix whose singular values are all 1
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). So all directions are learned at
one speed, not only the few with large gradients. Scaled to the size of AdamW's steps, learning
rates keep their meaning. A convolution counts as the matrix (output channels, everything else).

torch.optim.Muon computes in bfloat16, which is ten times slower on a CPU without it. Here the
matrices' own dtype is used, and matrices of one shape are computed together.

Shapes: N matrices of one shape, R rows, C columns.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # Jordan et al., as are the polynomial and its number of steps
LINEAR = 3.4445
CUBIC = -4.7750
QUINTIC = 2.0315
STEPS = 5
ADAM_SIZE = 0.2  # usual root mean square of AdamW's steps (arXiv 2502.16982, equation 4)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (Newton-Schulz).

    Args:
        matrices: (N, R, C) of any floating dtype; the result has the same.
    Returns:
        (N, R, C). Singular values come to 0.7 to 1.2; the very smallest stay smaller.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices

    # The polynomial needs singular values of at most 1.
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)

    for _ in range(STEPS):
        # Each singular value s -> LINEAR s + CUBIC s^3 + QUINTIC s^5
        gram = wide @ wide.mT  # (N, R, R)
        wide = LINEAR * wide + (CUBIC * gram + QUINTIC * gram @ gram) @ wide
    return wide.mT if is_tall else wide


class Muon(torch.optim.Optimizer):
    """For parameters (R, C), or (R, ...), whose other dimensions together are the columns."""

    def __init__(self, parameters: list, lr: float, weight_decay: float):
        """
        Args:
            parameters: a list of parameters or of parameter groups.
            lr: as for AdamW; a step has the root mean square lr * ADAM_SIZE.
            weight_decay: decoupled; each step multiplies a weight by 1 - lr * weight_decay.
        """
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(R, C)) orthogonal(momentum)."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)

            for matrices in by_shape.values():
                self.move(matrices, group["lr"], group["weight_decay"])

    def move(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """One step of matrices that have one shape."""
        # Momentum: a running mean of the gradients.
        gradients = torch.stack([m.grad for m in matrices]).flatten(2)  # (N, R, C)
        before = [self.state[m].get("momentum", torch.zeros_like(m)) for m in matrices]
        momentum = torch.stack(before).flatten(2).lerp(gradients, 1 - MOMENTUM)

        # Orthogonal steps of AdamW's size, from Nesterov's estimate of the next momentum.
        steps = orthogonal(gradients.lerp(momentum, MOMENTUM))
        steps = steps * ADAM_SIZE * max(steps.shape[1:]) ** 0.5

        for matrix, kept, step in zip(matrices, momentum, steps):
            self.state[matrix]["momentum"] = kept.view(matrix.shape).clone()
            matrix.mul_(1 - lr * weight_decay).sub_(step.view(matrix.shape), alpha=lr)
