"""The options of train_asr.py and train_instruct.py, and what a command does with them."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from checkpoints.command_line import add_model_arguments, one_line_errors
from training.optimizers import OPTIMIZERS
from training.recipe import Recipe
from training.stage import Run, Stage, run_stage


def add_training_arguments(
    parser: argparse.ArgumentParser, train: str, out: str, adapters: str
) -> None:
    """The options of both stages, with these defaults; others are the recipe's."""
    add_model_arguments(parser, adapters)
    add = parser.add_argument
    add("--train", type=Path, default=Path(train), help="manifest")
    add("--out", type=Path, default=Path(out), help="folder")
    add("--validation", type=Path, help="manifest of clips that do not train")
    add("--validation-items", type=int, default=100, help="of it, at most (default 100)")

    add("--preset", choices=["toy", "paper"], default="toy", help="recipe (default toy)")
    add("--seed", type=int, default=0)
    add("--steps", type=int)
    add("--batch", type=int, help="clips of a step, over all processes")
    add("--lr", type=float, help="peak learning rate")
    add(
        "--pretrained-lr-scale",
        type=float,
        metavar="FACTOR",
        help="of --lr, for the parts that --adapters brings (default 1)",
    )
    add("--optimizer", choices=OPTIMIZERS, help="muon (with adamw for the rest), or adamw for all")
    add("--whiten", action="store_true", default=None, help="see training/whitening.py")

    # What may change when a run resumes.
    add("--validate-every", type=int, metavar="STEPS")
    add("--save-every", type=int, metavar="STEPS")
    add("--keep", type=int, help="newest checkpoints to keep")
    add("--accumulate", type=int, help="parts that a process computes its share of a batch in")
    add("--workers", type=int, help="processes that read audio ahead")
    add("--cache-encoder", dest="cache", metavar="DIR", help="encoder states; or memory, none")
    add("--max-unreadable", type=int, help="clips that may be skipped")
    recompute = "recompute the LM's blocks in the backward pass: slower, less memory"
    add("--recompute", action=argparse.BooleanOptionalAction, help=recompute)
    add("--compile", action="store_true", default=None, help="torch.compile")
    shard = "cut the LM over the processes of torchrun (FSDP2)"
    add("--shard", action="store_true", default=None, help=shard)


def given(config_class: type, options: dict) -> dict:
    """The options that are fields of a dataclass and were given."""
    found = {field.name: options.get(field.name) for field in fields(config_class)}
    return {name: value for name, value in found.items() if value is not None}


def chosen_recipe(recipes: dict[str, Recipe], options: dict) -> Recipe:
    """The recipe that `preset` names, with what other options override."""
    recipe = recipes[options["preset"]]
    return replace(
        recipe,
        train=replace(recipe.train, **given(type(recipe.train), options)),
        execution=replace(recipe.execution, **given(type(recipe.execution), options)),
        dtype=options["dtype"] or recipe.dtype,
        whiten=options["whiten"] or recipe.whiten,
    )


def run_command(name: str, stage: Stage, recipes: dict[str, Recipe], options: dict) -> None:
    """Run a stage with parsed options (as add_training_arguments has them); errors end in a line."""
    with one_line_errors(name):
        run_stage(stage, chosen_recipe(recipes, options), Run(**given(Run, options)))
