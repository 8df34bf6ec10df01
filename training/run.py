"""What a stage is, where a run of it reads and writes, and what is refused before it starts."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from checkpoints.files import refuse_model
from diffa import DIFFA
from diffusion_lm import DiffusionLM
from sampler import Generation, generate
from training.recipe import Recipe
from training.run_files import checkpoints


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage trains, on which answers, by which loss.

    parts: key of diffa.AUDIO_PARTS. target: field of the manifest that holds the answer.
    loss: (model, batch, generator of the step, recipe) -> the losses of the batch's local parts.
    title: of the line of progress. decode: answers a clip now and then, see sampler.answer.
    trains_lora: the LoRA that the adapters hold trains, without --lora.
    rejected: field of the worse answer, in stage 4. reference: makes of the model, before it
    trains, what the loss takes as its argument `reference`. settings: more arguments of the loss.
    unusable: more reasons to leave an item out: words of the message, and a function of item and
    model that says whether it applies.
    """

    parts: str
    target: str
    loss: Callable[..., Iterator[Tensor]]
    title: str
    decode: Callable[..., Generation] = generate
    trains_lora: bool = False
    rejected: str | None = None
    reference: Callable[[DIFFA], DIFFA] | None = None
    settings: dict = field(default_factory=dict)
    unusable: dict[str, Callable[[dict, DIFFA], bool]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the models and data of a run come from, where it writes, and on which device.

    whisper, llm: None: those that the adapters record, else the toy run's. adapters: None: new
    ones. train, validation: manifests. validation_items: at most. audio_context: seconds of the
    encoder's window. random_weights: named sizes, in place of whisper, llm and adapters.
    allow_other_parts: see load_for_training. queries: of a new acoustic adapter; None: the
    recipe's. lora: rank of the LoRA to train; None: none. no_lora: leave out that of the adapters.
    """

    whisper: str | Path | None = None
    llm: str | Path | None = None
    adapters: str | Path | None = None
    train: Path
    out: Path
    validation: Path | None = None
    validation_items: int = 100
    device: str = "cpu"
    audio_context: float | None = None
    random_weights: str | None = None
    allow_other_parts: bool = False
    queries: int | None = None
    lora: int | None = None
    no_lora: bool = False
    lm_class: type[DiffusionLM] = DiffusionLM


def check_run(recipe: Recipe, run: Run) -> None:
    """Raise ValueError: the dtype cannot train, an option has no effect, or the folder cannot be
    written or holds what would be overwritten.
    """
    if recipe.dtype == "float16":
        problem = "small gradients become 0 in it, for training has no loss scale"
        raise ValueError(f"--dtype float16: {problem}; use bfloat16 or float32")

    if run.lora and run.no_lora:
        raise ValueError("--lora and --no-lora exclude each other; give one of them")

    if not run.adapters and (run.no_lora or run.allow_other_parts):
        option = "--no-lora" if run.no_lora else "--force-parts"
        raise ValueError(f"{option} has no effect without --adapters")

    if run.adapters and Path(run.adapters).resolve() == run.out.resolve():
        raise ValueError(f"--out {run.out} is --adapters, which would be overwritten; take another")

    refuse_model(run.out)
    if (run.out / "adapters.safetensors").exists() and not checkpoints(run.out / "checkpoint.pt"):
        raise ValueError(
            f"--out {run.out} holds adapters, but no run to resume; take another folder"
        )

    there = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {run.out}: {there} is not a folder that can be written to")
