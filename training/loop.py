"""The training loop: steps, schedule, clipping, checkpoints, exact resume, validation, progress.

All randomness of step k comes from (seed, k) alone: the items, the noise, the dropout. So a run that is killed goes on
from its newest checkpoint to the same result, on any number of processes, and a checkpoint need only hold weights,
optimizer and step: no random states, no place in the data.
"""

import json
import math
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import processes as ranks
from training.muon import Muon

LOG_EVERY = 10  # steps that one record of the metrics covers
OPTIMIZERS = ("adamw", "muon")
TABLES = ("embedding", "unembedding", "words", "heads")  # a row for each word or label: AdamW's, as Muon's authors have it


@dataclass(frozen=True, kw_only=True)
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
    optimizer: str = "adamw"  # or "muon", for the matrices
    inherited: float = 1.0  # times the learning rate, for parts that an earlier run has trained
    save_every: int = 200  # steps between checkpoints
    validate_every: int = 0  # steps between validations; 0: none but at the end
    keep: int = 2  # newest checkpoints that stay on disk


HABITS = ("save_every", "validate_every", "keep")  # may change when a run goes on: they do not touch its result


@dataclass
class Work:
    """What has been done so far, added up by whoever computes the loss; rates are made of its differences."""

    audio: float = 0.0  # seconds of sound
    tokens: int = 0  # positions that the LM read
    flops: float = 0.0  # multiplications and additions of the LM, without those made twice to save memory
    waited: float = 0.0  # seconds that the loop stood still for data
    peak: float = math.inf  # FLOP/s that the device can do


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * ((1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done)


def make_optimizers(parameters: dict[str, nn.Parameter], config: TrainConfig, inherited: tuple[str, ...] = ()) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon for matrices and convolutions, AdamW for the rest. Raises ValueError: another name.

    Each group's "share" is what it takes of the learning rate: 1, or config.inherited for parts (first words of names) among `inherited`.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {config.optimizer!r}: there are {' and '.join(OPTIMIZERS)}")
    matrices, rest = {}, {}  # parameters by their share
    for name, p in parameters.items():
        part = name.split(".")[0]
        is_matrix = p.ndim > 1 and name.endswith(".weight") and part not in TABLES
        share = config.inherited if part in inherited else 1.0
        (matrices if is_matrix and config.optimizer == "muon" else rest).setdefault(share, []).append(p)
    matrices, rest = ([{"params": mine, "share": share} for share, mine in group.items()] for group in (matrices, rest))
    made: list[torch.optim.Optimizer] = [Muon(matrices, config.lr, config.weight_decay)] if matrices else []
    return made + ([torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))] if rest else [])


# ---- checkpoints: run.pt stands for run-00000400.pt, run-00000200.pt, ...
def checkpoints(path: Path) -> list[Path]:
    """Those of a run, newest first."""
    return sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 8}{path.suffix}"), reverse=True)


def save_atomically(value: dict, path: Path) -> None:
    """torch.save under another name first: a kill or a full disk in the middle leaves older files whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name is: a power cut would else leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be saved ({error})") from error


def load_newest(path: Path) -> dict | None:
    """The newest checkpoint that is whole, damaged ones passed over with a warning; None when there is none at all."""
    found = checkpoints(path)
    for file in found:
        try:
            with zipfile.ZipFile(file) as whole:
                if broken := whole.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"{broken} does not match its checksum")
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # damage shows in many ways
            if ranks.rank() == 0:
                tqdm.write(f"warning: {file} is damaged ({error}); trying the one before it")
    if found:
        raise ValueError(f"{path.parent}: every checkpoint is damaged; remove {', '.join(f.name for f in found)} to start again")
    return None


def refuse_another_run(saved: dict, mine: dict, path: Path) -> None:
    """Raise ValueError that says what differs, when a checkpoint comes from other settings, model, corpus or shapes."""
    differ = [
        f"{name} was {saved.get(name)!r}, now is {mine.get(name)!r}"
        for name in sorted(saved.keys() | mine.keys())
        if saved.get(name) != mine.get(name)
    ]
    if differ:
        raise ValueError(
            f"{path.parent}: its checkpoint {path.stem} was made by a run with other settings; "
            "remove it or use another directory\n  " + "\n  ".join(differ)
        )


# ---- metrics: a JSON object a line
def read_metrics(path: Path, steps: int | None = None) -> list[dict]:
    """Records of a run, up to `steps` when given; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in records if steps is None or r["step"] <= steps]


def rates(work: Work, before: Work, seconds: float) -> dict:
    """Speed over the last seconds, of all processes together."""
    n, seconds = ranks.world(), max(seconds, 1e-9)
    return {
        "audio_hours_an_hour": n * (work.audio - before.audio) / seconds,
        "tokens_a_second": n * (work.tokens - before.tokens) / seconds,
        "share_of_peak": (work.flops - before.flops) / seconds / work.peak,
        "share_waiting": (work.waited - before.waited) / seconds,
    }


def fit(
    parameters: dict[str, nn.Parameter],
    loss_of_step: Callable[[int, torch.Generator], Tensor | Iterable[Tensor]],
    config: TrainConfig,
    checkpoint: Path,
    title: str,
    *,
    identity: dict | None = None,
    names_of_step: Callable[[int], list[str]] | None = None,
    validate: Callable[[], dict] | None = None,
    keep_best: Callable[[], None] | None = None,
    metrics: Path | None = None,
    work: Work | None = None,
    inherited: tuple[str, ...] = (),
) -> list[float]:
    """Train until `config.steps`, from the newest checkpoint if there is one.

    Args:
        parameters: by name; what trains. loss_of_step: (step, generator seeded for it) -> scalar loss, or the parts
            whose sum it is, yielded one by one: each is differentiated before the next is asked for (accumulation).
        checkpoint: written as NAME-STEP.pt every `save_every` steps, before each validation, on Ctrl-C, at the end.
        title: of the progress bar. identity: what else must be the same when the run goes on: model, corpus.
        names_of_step: what a step's items are called, for the error when its loss is not finite.
        validate: -> {"loss": ..., ...}; keep_best: called after the best validation so far. metrics: a JSONL file.
        work: where loss_of_step adds up what it does. inherited: parts that learn at config.inherited times the rate.
    Returns:
        the loss of every step from 0.
    Raises:
        SystemExit: on Ctrl-C after saving, when the loss is not finite, when the disk is full;
        ValueError: a checkpoint of another run.
    """
    main = ranks.rank() == 0
    device = next(iter(parameters.values())).device
    optimizers = make_optimizers(parameters, config, inherited)
    losses: list[float] = []
    mine = {k: v for k, v in asdict(config).items() if k not in HABITS} | (identity or {})
    mine |= {f"shape of {name}": list(p.shape) for name, p in parameters.items()}
    if saved := load_newest(checkpoint):
        refuse_another_run(saved["run"], mine, checkpoint)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved["parameters"][name])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        losses = saved["losses"]
        if main and len(losses) < config.steps:
            tqdm.write(f"{title}: going on from step {len(losses)} of {checkpoint}")
    records = read_metrics(metrics, len(losses)) if metrics else []
    ranks.wait()  # all have read before one writes
    if metrics and main:  # what came after the checkpoint is going to be done again
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.with_suffix(".tmp").write_text("".join(json.dumps(r) + "\n" for r in records))
        metrics.with_suffix(".tmp").replace(metrics)

    def leave(message: str) -> None:
        raise SystemExit(message if main else 1)

    def save() -> None:
        if not main:
            return
        state = {"run": mine, "parameters": {n: p.detach() for n, p in parameters.items()}}
        path = checkpoint.with_name(f"{checkpoint.stem}-{len(losses):08d}{checkpoint.suffix}")
        try:
            save_atomically(state | {"optimizers": [o.state_dict() for o in optimizers], "losses": losses}, path)
        except OSError as error:
            older = checkpoints(checkpoint)
            leave(f"{title}: {error}; {older[0] if older else 'no checkpoint'} is intact; make room, then run the same command")
        for old in checkpoints(checkpoint)[max(config.keep, 1) :]:
            old.unlink()

    def record(**values) -> None:
        records.append({"step": len(losses), **values})
        if metrics and main:
            with open(metrics, "a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    def due() -> bool:
        """True at the end and every `validate_every` steps."""
        at = len(losses)
        return at == config.steps or bool(at and config.validate_every and at % config.validate_every == 0)

    def check() -> None:
        """Validate, when it is time to and has not been done: also after a kill between a checkpoint and its validation."""
        at = len(losses)
        if validate is None or not due() or any("validation" in r and r["step"] == at for r in records):
            return
        best = min((r["validation"]["loss"] for r in records if "validation" in r), default=math.inf)
        result = validate()
        if result["loss"] < best and keep_best and main:
            keep_best()
        record(validation=result)
        if main:
            tqdm.write(f"{title}: step {at}: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()))

    stop: list[int] = []  # Ctrl-C waits for the end of its step, so that no step is done by half; a second one does not wait
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: object) -> None:
        stop.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, on_signal)
    bar = tqdm(total=config.steps, initial=len(losses), desc=title, unit="step", disable=not main)
    try:
        check()
        then, since, done = time.perf_counter(), len(losses), replace(work) if work else None
        for step in range(len(losses), config.steps):
            seed = (config.seed << 32) + step
            torch.manual_seed(seed)  # dropout
            parts = loss_of_step(step, torch.Generator().manual_seed(seed))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            value = torch.zeros((), dtype=torch.float64, device=device)
            for part in [parts] if isinstance(parts, Tensor) else parts:
                (part * ranks.world()).backward()  # of gradients DistributedDataParallel takes the mean, of losses we take the sum
                value = value + part.detach().double()
            loss, stopping = ranks.total([value.item(), float(len(stop))], device)
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                save()
                wrong = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {norm}"
                names = f"; its items: {', '.join(names_of_step(step))}" if names_of_step else ""
                leave(f"{title}: {wrong} at step {step}; the weights before it are in {checkpoint.parent}{names}")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["share"] * learning_rate(step, config)
                optimizer.step()
            losses.append(loss)
            bar.update()
            if len(losses) % LOG_EVERY == 0:
                now = time.perf_counter()
                speed = rates(work, done, now - then) if work else {}
                record(loss=sum(losses[-LOG_EVERY:]) / LOG_EVERY, lr=learning_rate(step, config), gradient_norm=norm,
                       seconds_a_step=(now - then) / (len(losses) - since), **speed)  # fmt: skip
                shown = {"loss": f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", "lr": f"{learning_rate(step, config):.1e}", "norm": f"{norm:.2f}"}
                if work:
                    shown |= {"audio": f"{speed['audio_hours_an_hour']:.0f} h/h", "tok/s": f"{speed['tokens_a_second']:.0f}",
                              "peak": f"{speed['share_of_peak']:.0%}", "waits": f"{speed['share_waiting']:.0%}"}  # fmt: skip
                bar.set_postfix(shown, refresh=False)
            if stopping:
                save()
                leave(f"\n{title}: stopped at step {len(losses)}; run the same command to go on")
            if len(losses) % config.save_every == 0 or due():
                save()  # before the validation: what has been learned must not hang on it
            check()
            if len(losses) % LOG_EVERY == 0:
                then, since, done = time.perf_counter(), len(losses), replace(work) if work else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    bar.close()
    return losses
