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

from checkpoints.progress import Phase, say
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
SHOWN = 50  # steps whose mean loss the line of progress shows


def fit(*arguments, **options) -> list[float]:
    """Train; arguments, result and errors are those of Trainer and its `run`."""
    return Trainer(*arguments, **options).run()


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


@dataclass
class Trainer:
    """A run of training, up to config.steps.

    parameters: what trains, by name.
    loss_of_step: (step, generator seeded for it) -> the loss, or the parts whose sum it is. Each
        part is differentiated before the next one is computed (gradient accumulation).
    checkpoint: NAME.pt, written as NAME-STEP.pt. title: of the line of progress.
    identity: what must be the same on resume, beside config: models, corpus.
    names_of_step: step -> what its items are called, for errors.
    validate: -> {"loss": ..., ...}. keep_best: called after the best validation so far.
    sample: -> an answer of the model as it is, in words; shown with every checkpoint.
    metrics: a JSONL file. work: where loss_of_step adds up what it does.
    lr_scale_parts: parts that learn at config.pretrained_lr_scale.
    """

    parameters: dict[str, nn.Parameter]
    loss_of_step: Callable[[int, torch.Generator], Tensor | Iterable[Tensor]]
    config: TrainConfig
    checkpoint: Path
    title: str
    identity: dict | None = None
    names_of_step: Callable[[int], list[str]] = lambda step: []
    validate: Callable[[], dict] | None = None
    keep_best: Callable[[], None] | None = None
    sample: Callable[[], str] | None = None
    metrics: Path | None = None
    work: Work | None = None
    lr_scale_parts: tuple[str, ...] = ()

    def begin(self) -> None:
        """Load the newest checkpoint, if there is one; `losses` are then those of its steps.

        Raises ValueError: the checkpoints are of another run, or all damaged.
        """
        self.is_main = processes.rank() == 0
        self.device = next(iter(self.parameters.values())).device
        self.optimizers = make_optimizers(self.parameters, self.config, self.lr_scale_parts)
        self.began = time.perf_counter()
        self.earlier_minutes = 0.0
        self.losses: list[float] = []
        self.resume()

    def minutes(self) -> float:
        """Minutes of this process since `begin`, and of those whose checkpoint it resumed."""
        return self.earlier_minutes + (time.perf_counter() - self.began) / 60

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
        self.begin()
        return self.finish()

    def finish(self) -> list[float]:
        """The steps that are left after `begin`; as `run`."""
        self.records = Metrics(self.metrics, len(self.losses))

        # The steps that are left.
        n = len(self.losses)
        steps = range(n, self.config.steps)
        phase = Phase(self.title, steps.stop, unit=" steps", done=n, shown=self.is_main)
        with StopSignals() as stop, phase:
            self.validate_if_due()  # a kill may have come between a checkpoint and its validation
            self.start_clock()
            for step in steps:
                n_stopped = self.step(step, stop)
                phase.update(note=self.recent_loss())
                self.after_step(n_stopped > 0)
        return self.losses

    # Steps

    def step(self, step: int, stop: StopSignals) -> float:
        """Update the parameters once. Returns the number of processes that were asked to stop."""
        seed = (self.config.seed << 32) + step
        torch.manual_seed(seed)  # dropout
        parts = self.loss_of_step(step, torch.Generator().manual_seed(seed))

        # Loss and gradient, summed over the parts of the batch and over the processes.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in [parts] if isinstance(parts, Tensor) else parts:
            # DistributedDataParallel takes the mean of gradients, but losses are summed.
            (part * processes.world()).backward()
            loss = loss + part.detach().double()
        loss, n_stopped = processes.total([loss.item(), float(stop.received)], self.device)

        # A loss or gradient that is not finite must not reach the weights.
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip).item()
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                self.save()
                saved = f"the weights before it are in {self.checkpoint.parent}"
                items = f"its items: {', '.join(self.names_of_step(step)) or 'unknown'}"
                self.exit(f"{self.title}: {name} is {value} at step {step}; {saved}; {items}")

        # The step itself, at this step's learning rate.
        self.lr = learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * self.lr
            optimizer.step()
        self.losses.append(loss)
        self.norm = norm
        return n_stopped

    def recent_loss(self) -> str:
        """The mean loss of the last steps, in words."""
        recent = self.losses[-SHOWN:]
        return f"loss {sum(recent) / len(recent):.3f}"

    def after_step(self, must_stop: bool) -> None:
        """Report, save and validate, where it is time to."""
        n = len(self.losses)
        if n % LOG_EVERY == 0:
            self.report()

        if must_stop:
            self.save()
            self.exit(f"\n{self.title}: stopped at step {n}; run the same command to resume")

        # Saved before the validation, so that an error there costs no training.
        if n % self.config.save_every == 0 or self.is_validation_due():
            self.save()
            if self.sample:
                say(f"{self.title}: step {n}: {self.sample()}")
        self.validate_if_due()

        if n % LOG_EVERY == 0:
            self.start_clock()

    def start_clock(self) -> None:
        """Begin to measure speed: steps, seconds and work count from here."""
        self.first = len(self.losses)
        self.before = replace(self.work) if self.work else None
        self.started = time.perf_counter()

    def report(self) -> None:
        """Record the last LOG_EVERY steps."""
        n = len(self.losses)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        values = {"loss": sum(self.losses[-LOG_EVERY:]) / LOG_EVERY, "lr": self.lr}
        values |= {"gradient_norm": self.norm, "seconds_a_step": seconds / (n - self.first)}

        # The speed of all processes together.
        if self.work:
            values |= self.work.speeds(self.before, seconds)
        self.records.add(step=n, **values)

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

        # The best weights so far are kept beside the last ones.
        result = self.validate()
        best = min((other["loss"] for other in earlier.values()), default=math.inf)
        if result["loss"] < best and self.keep_best and self.is_main:
            self.keep_best()
        self.records.add(step=n, validation=result)

        if self.is_main:
            shown = (
                f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
            )
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

        # Weights, optimisers and losses; the rest follows from the step.
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name_on_disk(name)])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.losses = saved["losses"]
        self.earlier_minutes = saved.get("minutes", 0.0)

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
            "minutes": self.minutes(),
        }
        try:
            save_checkpoint(state, self.checkpoint, len(self.losses), self.config.keep)
        except OSError as error:
            intact = next(iter(checkpoints(self.checkpoint)), "no checkpoint")
            advice = f"{intact} is intact; make room, then run the same command"
            self.exit(f"{self.title}: {error}; {advice}")

    def exit(self, message: str) -> None:
        """End this process; only the first one prints the message."""
        raise SystemExit(message if self.is_main else 1)
