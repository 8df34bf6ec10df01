"""What a recipe holds, how a run is executed, and the options of both stages' commands."""

import argparse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from checkpoints.command_line import add_model_arguments
from training.optimizers import OPTIMIZERS, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed. May change on resume: the result is the same but for rounding.

    accumulate: parts that a process computes its rows of a batch in, one after the other.
    workers: processes beside each training process that read clips ahead.
    cache: of the encoder's states: "memory", "none", or a folder.
    recompute: the LM's blocks again in the backward pass, to save memory.
    compile: the LM's blocks, with torch.compile.
    shard: the LM over the processes (FSDP2).
    max_unreadable: clips that may be skipped.
    """

    accumulate: int = 1
    workers: int = 0
    cache: str = "memory"
    recompute: bool = False
    compile: bool = False
    shard: bool = False
    max_unreadable: int = 10


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a stage.

    answer_length: tokens; shorter answers are padded with the end token.
    t_min, stratified: of the noise levels; see diffusion_lm.noise_levels.
    match_embedding_scale: new parts start at the size of the LM's token embeddings.
    shapes: AdapterConfig fields of new adapters that differ from the paper's.
    dtype: of the frozen parts and of the arithmetic; the adapters' weights are float32.
    bucket_by_length: clips of similar length in a batch.
    whiten: a new acoustic adapter starts on whitened states (whitening.py).
    """

    train: TrainConfig
    answer_length: int
    t_min: float
    stratified: bool
    match_embedding_scale: bool
    shapes: dict
    dtype: str = "float32"
    bucket_by_length: bool = False
    whiten: bool = False
    execution: Execution = field(default_factory=Execution)


# Options of both stages: type and help.
OPTIONS = {
    "train": (Path, "manifest"),
    "out": (Path, "folder"),
    "validation": (Path, "manifest of clips that do not train"),
    "validation-items": (int, "of it, at most (default 100)"),
    "seed": (int, None),
    "steps": (int, None),
    "batch": (int, "clips of a step, over all processes"),
    "lr": (float, "peak learning rate"),
    "pretrained-lr-scale": (float, "of --lr, for the parts that --adapters brings (default 1)"),
    "validate-every": (int, "steps"),
    "save-every": (int, "steps"),
    "keep": (int, "newest checkpoints to keep"),
    "accumulate": (int, "parts that a process computes its rows of a batch in"),
    "workers": (int, "processes that read audio ahead"),
    "max-unreadable": (int, "clips that may be skipped"),
}


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """The options of both stages. An option without a default is the recipe's."""
    add = parser.add_argument
    add_model_arguments(parser, defaults["adapters"])
    add("--preset", choices=["toy", "paper"], default="toy", help="recipe (default toy)")
    for name, (kind, text) in OPTIONS.items():
        add(f"--{name}", type=kind, help=text)

    # Options that are not a plain value.
    add("--cache-encoder", dest="cache", metavar="DIR", help="encoder states; or memory, none")
    add("--optimizer", choices=OPTIMIZERS, help="muon (with adamw for the rest), or adamw for all")
    add("--whiten", action="store_true", help="new acoustic adapter: start on whitened states")
    recompute = "the LM's blocks in the backward pass: slower, less memory"
    add("--recompute", action=argparse.BooleanOptionalAction, help=recompute)
    add("--compile", action="store_true", default=None, help="torch.compile")
    add("--shard", action="store_true", default=None, help="the LM over the processes (FSDP2)")

    # Those of this stage: train, out, adapters.
    parser.set_defaults(**defaults)


def given(config_class: type, options: dict) -> dict:
    """The options that are fields of a dataclass and were given."""
    names = [field.name for field in fields(config_class)]
    return {name: options[name] for name in names if options.get(name) is not None}


def chosen_recipe(recipes: dict[str, Recipe], options: dict) -> Recipe:
    """The recipe that `preset` names, with what other options override."""
    recipe = recipes[options["preset"]]
    return replace(
        recipe,
        train=replace(recipe.train, **given(TrainConfig, options)),
        execution=replace(recipe.execution, **given(Execution, options)),
        dtype=options["dtype"] or recipe.dtype,
        whiten=options["whiten"] or recipe.whiten,
    )
