"""Muon: matrices learn by orthogonal steps.

The momentum of a matrix is brought near to the closest one whose singular values are all 1, so that every direction is
learned at one speed and none waits for the few large ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
Scaled to the size of AdamW's steps, learning rates keep their meaning (arXiv 2502.16982, section 2.2). A convolution is
the matrix of its output channels by all that each of them sees. What is not a matrix is left to AdamW (trainer.py).

torch.optim.Muon computes in bfloat16, which a CPU without it does ten times slower; here it is the matrices' own dtype,
those of one shape together.

Shapes: N matrices of one shape, R rows, C columns.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # of Jordan et al., as are the polynomial and the number of its steps
LINEAR, CUBIC, QUINTIC, STEPS = 3.4445, -4.7750, 2.0315, 5
ADAM_SIZE = 0.2  # usual root mean square of AdamW's steps (arXiv 2502.16982, equation 4)


def orthogonal(matrices: Tensor) -> Tensor:
    """The same singular vectors with singular values near 1, by a polynomial applied five times (Newton-Schulz; Jordan et al.).

    Args:
        matrices: (N, R, C), of any floating dtype, which is the result's.
    Returns:
        (N, R, C); values come to 0.7 to 1.2, but for those that were far below the greatest, which stay smaller.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values at most 1, as the polynomial needs
    for _ in range(STEPS):
        gram = wide @ wide.mT  # (N, R, R)
        # Each singular value s -> LINEAR s + CUBIC s^3 + QUINTIC s^5
        wide = LINEAR * wide + (CUBIC * gram + QUINTIC * gram @ gram) @ wide
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide  # (N, R, C)


class Muon(torch.optim.Optimizer):
    """For parameters of two or more dimensions: (R, C), or (R, ...), whose other dimensions together are the columns."""

    def __init__(self, parameters: list, lr: float, weight_decay: float):
        """parameters: they, or groups of them. lr: as AdamW's, the size of a step but for ADAM_SIZE; weight_decay: the share
        lr * weight_decay of a weight goes a step."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient: W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(R, C)) orthogonal(momentum)."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                gradients = torch.stack([m.grad for m in matrices]).flatten(2)  # (N, R, C)
                before = [self.state[m].get("momentum", torch.zeros_like(m)) for m in matrices]
                momentum = torch.stack(before).flatten(2).lerp(gradients, 1 - MOMENTUM)
                moves = orthogonal(gradients.lerp(momentum, MOMENTUM))  # Nesterov's look ahead
                moves = moves * ADAM_SIZE * max(moves.shape[1:]) ** 0.5
                for matrix, kept, move in zip(matrices, momentum, moves):
                    self.state[matrix]["momentum"] = kept.view(shape).clone()
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move.view(shape), alpha=group["lr"])
