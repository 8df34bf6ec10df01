"""The training loop: steps, schedule, clipping, atomic checkpoints, exact resume, progress.

All randomness of step k comes from (seed, k) alone: the items, the noise, the dropout. So a run that is killed goes on
from its newest checkpoint to the same result, and a checkpoint need only hold weights, optimizer and step.
"""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. Learning rate warms up linearly, then falls by `schedule` to zero."""

    steps: int
    batch: int
    lr: float
    warmup: int
    schedule: str = "cosine"  # or "linear"
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    save_every: int = 200  # steps between checkpoints


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * ((1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done)


def save_atomically(value: dict, path: Path) -> None:
    """torch.save under another name first: a kill in the middle leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def fit(
    parameters: dict[str, nn.Parameter],
    loss_of_step: Callable[[int, torch.Generator], Tensor],
    config: TrainConfig,
    checkpoint: Path,
    title: str,
    position: int = 0,
) -> list[float]:
    """Train until `config.steps`, from the checkpoint if there is one.

    Args:
        parameters: by name; what trains. loss_of_step: (step, generator seeded for it) -> scalar loss.
        checkpoint: a file, written every `save_every` steps, on Ctrl-C and at the end.
        title, position: of the progress bar.
    Returns:
        the loss of every step from 0.
    Raises:
        SystemExit: on Ctrl-C after saving, or when the loss is not finite; ValueError: a checkpoint of another run.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    losses: list[float] = []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        if saved["config"] != asdict(config) or {n: tuple(p.shape) for n, p in saved["parameters"].items()} != shapes:
            raise ValueError(f"{checkpoint}: was made by a run with other settings; remove it or use another directory")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
        if len(losses) < config.steps:
            tqdm.write(f"{title}: going on from step {len(losses)} of {checkpoint}")

    def save() -> None:
        state = {"config": asdict(config), "parameters": {n: p.detach() for n, p in parameters.items()}}
        save_atomically(state | {"optimizer": optimizer.state_dict(), "losses": losses}, checkpoint)

    stop: list[int] = []  # Ctrl-C waits for the end of its step, so that no step is done by half; a second one does not wait

    def on_ctrl_c(number: int, frame: object) -> None:
        stop.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_ctrl_c)
    bar = tqdm(total=config.steps, initial=len(losses), desc=title, position=position, mininterval=1.0, unit="step")
    try:
        for step in range(len(losses), config.steps):
            seed = (config.seed << 32) + step
            torch.manual_seed(seed)  # dropout
            loss = loss_of_step(step, torch.Generator().manual_seed(seed))
            if not torch.isfinite(loss):
                save()
                raise SystemExit(f"{title}: loss is {loss.item()} at step {step}; the weights before it are in {checkpoint}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            if not torch.isfinite(norm):
                save()
                raise SystemExit(f"{title}: gradient is {norm.item()} at step {step}; the weights before it are in {checkpoint}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            if step % 10 == 9:
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
            if stop:
                save()
                raise SystemExit(f"\n{title}: stopped at step {len(losses)}; run the same command to go on")
            if len(losses) % config.save_every == 0:
                save()
    finally:
        signal.signal(signal.SIGINT, before)
    bar.close()
    save()
    return losses
