"""What a recipe holds, how a run is executed, and the options of both stages' commands."""

import argparse
import functools
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tqdm import tqdm

from checkpoints.command_line import add_model_arguments, count, count_or_zero, number, seed
from checkpoints.progress import add_quiet
from training import processes
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
    cut: keep the start of clips that are longer than the encoder's window; else leave them out.
    """

    accumulate: int = 1
    workers: int = 0
    cache: str = "memory"
    recompute: bool = False
    compile: bool = False
    shard: bool = False
    max_unreadable: int = 10
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a stage.

    answer_length: tokens; shorter answers are padded with the end token.
    t_min, stratified: of the noise levels; see diffusion_lm.noise_levels. None: the stage draws
        none.
    match_embedding_scale: new parts start at the size of the LM's token embeddings.
    shapes: AdapterConfig fields of new adapters that differ from the paper's.
    dtype: of the frozen parts and of the arithmetic; the adapters' weights are float32.
    bucket_by_length: clips of similar length in a batch.
    whiten: a new acoustic adapter starts on whitened states (whitening.py).
    """

    train: TrainConfig
    answer_length: int
    t_min: float | None = None
    stratified: bool | None = None
    match_embedding_scale: bool
    shapes: dict
    dtype: str = "float32"
    bucket_by_length: bool = False
    whiten: bool = False
    execution: Execution = field(default_factory=Execution)


learning_rate = functools.partial(number, kind=float, least=0.0, most=1.0)  # above, none converges
scale = functools.partial(number, kind=float, least=0.0, most=100.0)
below_one = functools.partial(number, kind=float, least=0.0, most=0.999)

# Options of both stages: type and help.
OPTIONS = {
    "train": (Path, "manifest"),
    "out": (Path, "folder"),
    "validation": (Path, "manifest of clips that do not train"),
    "validation-items": (count, "of it, at most (default 100)"),
    "seed": (seed, "of new parts, order, noise and dropout (default 0)"),
    "steps": (count, "in place of --epochs"),
    "epochs": (count, "over the items that can be used, in place of --steps"),
    "answer-length": (count, "tokens; the window in which answers are noised"),
    "t-min": (below_one, "least noise level"),
    "queries": (count, "of a new acoustic adapter"),
    "batch": (count, "clips of a step, over all processes"),
    "lr": (learning_rate, "peak learning rate"),
    "pretrained-lr-scale": (scale, "of --lr, for the parts that --adapters brings (default 1)"),
    "validate-every": (count_or_zero, "steps"),
    "save-every": (count, "steps"),
    "keep": (count, "newest checkpoints to keep"),
    "accumulate": (
        count,
        "gradient accumulation: parts of a batch that a process computes in turn",
    ),
    "workers": (count_or_zero, "processes that read audio ahead"),
    "max-unreadable": (count_or_zero, "clips that may be skipped"),
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
    cut = "clips longer than the encoder's window: keep their start (default: leave them out)"
    add("--cut", action="store_true", default=None, help=cut)
    add("--whiten", action="store_true", help="new acoustic adapter: start on whitened states")
    recompute = "the LM's blocks in the backward pass: slower, less memory"
    add("--recompute", action=argparse.BooleanOptionalAction, help=recompute)
    add("--compile", action="store_true", default=None, help="torch.compile")
    add("--shard", action="store_true", default=None, help="the LM over the processes (FSDP2)")

    add_quiet(parser)

    # Those of this stage: train, out, adapters.
    parser.set_defaults(**defaults)


def given(config_class: type, options: dict) -> dict:
    """The options that are fields of a dataclass and were given."""
    names = [field.name for field in fields(config_class)]
    return {name: options[name] for name in names if options.get(name) is not None}


def chosen_recipe(recipes: dict[str, Recipe], options: dict) -> Recipe:
    """The recipe that `preset` names, with what other options override.

    Raises ValueError: options that exclude each other, or that cannot take effect.
    """
    recipe = recipes[options["preset"]]
    if options.get("weights"):
        raise ValueError(
            f"--weights {options['weights']} is for answers alone: adapters would learn to suit "
            "rounded weights, and the backward pass would keep each weight in 16 or 32 bits, which "
            "saves nothing; leave it out, and add --dtype bfloat16 or --recompute"
        )

    # Either the steps or the epochs.
    train = given(TrainConfig, options)
    if "steps" in train and "epochs" in train:
        raise ValueError("--steps and --epochs exclude each other; give one of them")
    if "steps" in train or "epochs" in train:
        train = {"steps": None, "epochs": None} | train

    execution = replace(recipe.execution, **given(Execution, options))
    if options["workers"] and execution.cache == "memory":
        advice = "leave it out, or add --cache-encoder none or a folder"
        raise ValueError(f"--workers: states in memory are not read ahead; {advice}")
    for name in ("validation_items", "validate_every"):
        if options[name] and not options["validation"]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no effect without --validation MANIFEST")

    # The fields of the recipe itself.
    own = given(Recipe, {name: options[name] for name in ("answer_length", "t_min", "dtype")})
    whiten = options["whiten"] or recipe.whiten
    train = replace(recipe.train, **train)
    return replace(recipe, **own, train=train, execution=execution, whiten=whiten)


def with_steps(recipe: Recipe, n_items: int) -> Recipe:
    """The recipe with its steps; they follow from the epochs, if the recipe has these.

    Says which, and if a run is shorter than its warm-up.
    """
    train = recipe.train
    is_main = processes.rank() == 0
    if train.epochs:
        steps = train.epochs * max(n_items // train.batch, 1)
        if is_main:
            print(f"{train.epochs} epochs of {n_items:,} items are {steps:,} steps")
        train = replace(train, steps=steps, epochs=None)

    if train.steps < train.warmup and is_main:
        peak = train.lr * train.steps / train.warmup
        shorter = f"{train.steps:,} steps are fewer than the {train.warmup:,} of the warm-up"
        tqdm.write(f"warning: {shorter}; the learning rate ends at {peak:.1e}, not {train.lr:.1e}")
    return replace(recipe, train=train)
