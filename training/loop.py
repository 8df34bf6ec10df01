"""The training loop: steps, clipping, checkpoints, exact resume, validation, progress.

All randomness of a step (items, noise, dropout) follows from (seed, step) alone. So a run that was
killed resumes from its newest checkpoint to the same result, on any number of processes. A
checkpoint needs no random states and no position in the data.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import processes
from training.flops import Work
from training.optimizers import MAY_CHANGE_ON_RESUME, TrainConfig, learning_rate, make_optimizers
from training.run_files import (
    Metrics,
    checkpoints,
    load_newest,
    name_on_disk,
    refuse_another_run,
    save_checkpoint,
)

LOG_EVERY = 10  # steps that one record of the metrics covers
SHOWN = 50  # steps whose mean loss the progress bar shows


def fit(
    parameters: dict[str, nn.Parameter],
    loss_of_step: Callable[[int, torch.Generator], Tensor | Iterable[Tensor]],
    config: TrainConfig,
    checkpoint: Path,
    title: str,
    **options,
) -> list[float]:
    """Train; arguments, result and errors are those of Trainer and its `run`."""
    return Trainer(parameters, loss_of_step, config, checkpoint, title, **options).run()


class StopSignals:
    """Within it, the first Ctrl-C or SIGTERM only sets `received`; a second one stops at once."""

    def __enter__(self):
        self.received = False
        self.handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in self.handlers:
            signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self.handlers[number])

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Stopwatch:
    """Time and work since it was started."""

    def __init__(self, step: int, work: Work | None):
        self.step = step
        self.work = work
        self.before = replace(work) if work else None
        self.started = time.perf_counter()

    def speeds(self, step: int) -> dict:
        """Seconds of a step; with `work`, the speed of all processes together too."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        speeds = {"seconds_a_step": seconds / (step - self.step)}
        if not self.work:
            return speeds

        n = processes.world()
        done, before = self.work, self.before
        return speeds | {
            "audio_hours_an_hour": n * (done.audio - before.audio) / seconds,
            "tokens_a_second": n * (done.tokens - before.tokens) / seconds,
            "share_of_peak": (done.flops - before.flops) / seconds / done.peak,
            "share_waiting": (done.waited - before.waited) / seconds,
        }


@dataclass
class Trainer:
    """A run of training, up to config.steps."""

    parameters: dict[str, nn.Parameter]  # what trains, by name
    # From a step and a generator seeded for it: the loss, or the parts whose sum it is. Each part is
    # differentiated before the next one is computed (gradient accumulation).
    loss_of_step: Callable[[int, torch.Generator], Tensor | Iterable[Tensor]]
    config: TrainConfig
    checkpoint: Path  # NAME.pt: written as NAME-STEP.pt
    title: str  # of the progress bar
    identity: dict | None = None  # what must be the same on resume, beside config: model, corpus
    names_of_step: Callable[[int], list[str]] | None = None  # of a step's items, for errors
    validate: Callable[[], dict] | None = None  # -> {"loss": ..., ...}
    keep_best: Callable[[], None] | None = None  # called after the best validation so far
    metrics: Path | None = None  # JSONL file
    work: Work | None = None  # where loss_of_step adds up what it does
    lr_scale_parts: tuple[str, ...] = ()  # parts that learn at config.pretrained_lr_scale

    def run(self) -> list[float]:
        """Train from the newest checkpoint, if there is one.

        A checkpoint is written every `save_every` steps, before each validation, when the run is
        stopped, and at the end.

        Returns:
            the loss of every step.
        Raises:
            SystemExit: stopped by a signal, the loss is not finite, or the disk is full; the
                message says what is saved.
            ValueError: the checkpoints are of another run, or all damaged.
        """
        self.is_main = processes.rank() == 0
        self.device = next(iter(self.parameters.values())).device
        self.optimizers = make_optimizers(self.parameters, self.config, self.lr_scale_parts)
        self.losses: list[float] = []
        self.resume()
        self.records = Metrics(self.metrics, len(self.losses))

        steps = range(len(self.losses), self.config.steps)
        bar = tqdm(
            total=self.config.steps,
            initial=len(self.losses),
            desc=self.title,
            unit="step",
            disable=not self.is_main,
        )
        with StopSignals() as stop, bar:
            self.validate_if_due()  # a kill may have come between a checkpoint and its validation
            self.stopwatch = Stopwatch(len(self.losses), self.work)
            for step in steps:
                must_stop = self.step(step, stop)
                bar.update()
                self.after_step(bar, must_stop)
        return self.losses

    # Steps

    def step(self, step: int, stop: StopSignals) -> bool:
        """Update the parameters once. Returns whether any process was asked to stop."""
        seed = (self.config.seed << 32) + step
        torch.manual_seed(seed)  # dropout
        parts = self.loss_of_step(step, torch.Generator().manual_seed(seed))

        # Loss and gradient, summed over the parts of the batch and over the processes.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value = self.backward([parts] if isinstance(parts, Tensor) else parts)
        loss, n_stopped = processes.total([value, float(stop.received)], self.device)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip).item()
        self.refuse_not_finite(step, loss, norm)

        lr = learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * lr
            optimizer.step()

        self.losses.append(loss)
        self.norm = norm
        return n_stopped > 0

    def backward(self, parts: Iterable[Tensor]) -> float:
        """Differentiate the local parts of a batch, one by one. Returns the sum of their losses."""
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in parts:
            # DistributedDataParallel takes the mean of gradients, but losses are summed.
            (part * processes.world()).backward()
            value = value + part.detach().double()
        return value.item()

    def refuse_not_finite(self, step: int, loss: float, norm: float) -> None:
        """Save and exit before a loss or gradient that is not finite reaches the weights."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.save()
        wrong = f"gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        names = f"; its items: {', '.join(self.names_of_step(step))}" if self.names_of_step else ""
        self.exit(
            f"{self.title}: {wrong} at step {step}; the weights before it are in "
            f"{self.checkpoint.parent}{names}"
        )

    def after_step(self, bar: tqdm, must_stop: bool) -> None:
        """Report, save and validate, where it is time to."""
        n = len(self.losses)
        if n % LOG_EVERY == 0:
            self.report(bar)

        if must_stop:
            self.save()
            self.exit(f"\n{self.title}: stopped at step {n}; run the same command to resume")

        # Saved before the validation, so that an error there costs no training.
        if n % self.config.save_every == 0 or self.is_validation_due():
            self.save()
        self.validate_if_due()

        if n % LOG_EVERY == 0:
            self.stopwatch = Stopwatch(n, self.work)

    def report(self, bar: tqdm) -> None:
        """Record the last LOG_EVERY steps, and show them beside the progress bar."""
        n = len(self.losses)
        lr = learning_rate(n - 1, self.config)
        loss = sum(self.losses[-LOG_EVERY:]) / LOG_EVERY
        speeds = self.stopwatch.speeds(n)
        self.records.add(step=n, loss=loss, lr=lr, gradient_norm=self.norm, **speeds)

        last = self.losses[-SHOWN:]
        shown = {
            "loss": f"{sum(last) / len(last):.3f}",
            "lr": f"{lr:.1e}",
            "norm": f"{self.norm:.2f}",
        }
        if self.work:
            shown["audio"] = f"{speeds['audio_hours_an_hour']:.0f} h/h"
            shown["tok/s"] = f"{speeds['tokens_a_second']:.0f}"
            shown["peak"] = f"{speeds['share_of_peak']:.0%}"
            shown["waits"] = f"{speeds['share_waiting']:.0%}"
        bar.set_postfix(shown, refresh=False)

    # Validation

    def is_validation_due(self) -> bool:
        """True at the end, and every `validate_every` steps."""
        n, every = len(self.losses), self.config.validate_every
        return n == self.config.steps or (n > 0 and every > 0 and n % every == 0)

    def validate_if_due(self) -> None:
        """Validate, if it is time to and no record of this step's validation exists."""
        n = len(self.losses)
        earlier = self.records.validations()
        if self.validate is None or not self.is_validation_due() or n in earlier:
            return

        result = self.validate()
        best = min((other["loss"] for other in earlier.values()), default=math.inf)
        if result["loss"] < best and self.keep_best and self.is_main:
            self.keep_best()
        self.records.add(step=n, validation=result)

        if self.is_main:
            shown = [
                f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
            ]
            tqdm.write(f"{self.title}: step {n}: {', '.join(shown)}")

    # Checkpoints

    def identity_of_run(self) -> dict:
        """What must be the same for a checkpoint to be of this run."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in MAY_CHANGE_ON_RESUME}
        shapes = {f"shape of {name_on_disk(n)}": list(p.shape) for n, p in self.parameters.items()}
        return settings | (self.identity or {}) | shapes

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        saved = load_newest(self.checkpoint)
        if not saved:
            return
        refuse_another_run(saved["run"], self.identity_of_run(), self.checkpoint)

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name_on_disk(name)])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.losses = saved["losses"]

        if self.is_main and len(self.losses) < self.config.steps:
            tqdm.write(f"{self.title}: resumes from step {len(self.losses)} of {self.checkpoint}")

    def save(self) -> None:
        """Write a checkpoint of now; exit if that fails."""
        if not self.is_main:
            return
        state = {
            "run": self.identity_of_run(),
            "parameters": {name_on_disk(n): p.detach() for n, p in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses,
        }
        try:
            save_checkpoint(state, self.checkpoint, len(self.losses), self.config.keep)
        except OSError as error:
            intact = (checkpoints(self.checkpoint) or ["no checkpoint"])[0]
            self.exit(
                f"{self.title}: {error}; {intact} is intact; make room, then run the same command"
            )

    def exit(self, message: str) -> None:
        """End this process; only the first one prints the message."""
        raise SystemExit(message if self.is_main else 1)
