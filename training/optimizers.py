"""The optimisation of a run: its settings, its learning rate, its optimisers."""

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from training.muon import Muon

OPTIMIZERS = ("adamw", "muon")
ADAMW_ONLY = ("embedding", "unembedding", "words", "heads")  # one row for each word or label
BETAS = (0.9, 0.98)  # AdamW's


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run optimises. The learning rate warms up linearly, then falls by `schedule` to 0."""

    steps: int
    batch: int  # items of a step, over all processes
    lr: float  # at its peak
    warmup: int  # steps
    schedule: str = "cosine"  # or "linear"
    weight_decay: float = 0.05
    clip: float = 1.0  # norm of the gradient
    seed: int = 0
    optimizer: str = "adamw"  # or "muon", for the matrices
    pretrained_lr_scale: float = 1.0  # times the learning rate, for parts that are trained already
    save_every: int = 200  # steps between checkpoints
    validate_every: int = 0  # steps between validations; 0: only at the end
    keep: int = 2  # newest checkpoints that stay on disk


MAY_CHANGE_ON_RESUME = (
    "save_every",
    "validate_every",
    "keep",
)  # the result does not depend on them


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup

    done = (step - config.warmup) / max(config.steps - config.warmup, 1)  # fraction, 0 to 1
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr * (1 - done)


def make_optimizers(
    parameters: dict[str, nn.Parameter], config: TrainConfig, lr_scale_parts: tuple[str, ...] = ()
) -> list[Optimizer]:
    """AdamW for everything; or Muon for matrices and convolutions, and AdamW for the rest.

    Args:
        parameters: by name. The first word of a name is its part.
        lr_scale_parts: parts whose learning rate is multiplied by config.pretrained_lr_scale. The
            factor is the field "lr_scale" of each parameter group.
    Raises:
        ValueError: config.optimizer is none of OPTIMIZERS.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {config.optimizer!r} is none of {', '.join(OPTIMIZERS)}")

    # Sorted by optimiser, then by factor.
    matrices: dict[float, list[nn.Parameter]] = {}
    rest: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        lr_scale = config.pretrained_lr_scale if part in lr_scale_parts else 1.0
        is_matrix = parameter.ndim > 1 and name.endswith(".weight") and part not in ADAMW_ONLY
        groups = matrices if is_matrix and config.optimizer == "muon" else rest
        groups.setdefault(lr_scale, []).append(parameter)

    def as_groups(by_scale: dict[float, list[nn.Parameter]]) -> list[dict]:
        return [{"params": listed, "lr_scale": scale} for scale, listed in by_scale.items()]

    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(as_groups(matrices), **options))
    if rest:
        optimizers.append(AdamW(as_groups(rest), betas=BETAS, **options))
    return optimizers
