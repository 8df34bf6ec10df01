"""The optimisation of a run: its settings, its learning rate, its optimisers."""

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from training.muon import Muon

OPTIMIZERS = ("adamw", "muon")
# Parts whose matrices have one row for each word or label.
ADAMW_ONLY = ("embedding", "unembedding", "words", "heads")
BETAS = (0.9, 0.98)  # of AdamW: ours; no source that we could check names the paper's
# The result of a run does not depend on these settings.
MAY_CHANGE_ON_RESUME = ("save_every", "validate_every", "keep")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run optimises.

    steps, epochs: how long; one of them is None. A stage derives the steps from the epochs.
    batch: items of a step, over all processes.
    lr, warmup, schedule: the learning rate rises linearly to lr in `warmup` steps, then falls to 0
        by a "cosine" or "linear".
    clip: largest norm of the gradient.
    optimizer: "adamw", or "muon" for the matrices.
    pretrained_lr_scale: times the learning rate, for parts that are trained already.
    save_every: steps between checkpoints, 1 or more. keep: newest checkpoints that stay on disk.
    validate_every: steps between validations; 0: only at the end.
    """

    steps: int | None = None
    batch: int
    lr: float
    warmup: int
    schedule: str = "cosine"
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"
    pretrained_lr_scale: float = 1.0
    save_every: int = 200
    validate_every: int = 0
    keep: int = 2
    epochs: int | None = None


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

    # Parameter groups of Muon (True) and AdamW (False), by their factor.
    groups: dict[bool, dict[float, list]] = {True: {}, False: {}}
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        is_matrix = parameter.ndim > 1 and name.endswith(".weight") and part not in ADAMW_ONLY
        by_muon = is_matrix and config.optimizer == "muon"
        lr_scale = config.pretrained_lr_scale if part in lr_scale_parts else 1.0
        groups[by_muon].setdefault(lr_scale, []).append(parameter)

    made: list[Optimizer] = []
    for by_muon, by_scale in groups.items():
        listed = [{"params": group, "lr_scale": scale} for scale, group in by_scale.items()]
        if listed and by_muon:
            made.append(Muon(listed, config.lr, config.weight_decay))
        elif listed:
            made.append(AdamW(listed, config.lr, BETAS, weight_decay=config.weight_decay))
    return made
