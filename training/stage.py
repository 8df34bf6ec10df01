"""A stage of training, from manifests to saved adapters. The stage brings its own loss."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints.command_line import one_line_errors
from checkpoints.files import write_json
from checkpoints.model import Loaded, load_for_training, save_trained
from data import load_manifest
from diffa import DIFFA, match_embedding_scale
from diffusion_lm import DiffusionLM
from training import processes
from training.batches import Batch, Batches, autocast_of
from training.examples import Examples, usable
from training.flops import Work, measured_peak
from training.loop import Trainer
from training.order import Order, local_rows, pick, pick_by_length
from training.recipe import Execution, Recipe, chosen_recipe, given
from training.run_files import name_on_disk
from training.stream import make_stream
from training.validation import Validation
from training.whitening import whiten

# (model, batch, generator of the step, recipe) -> the losses of the batch's local parts, one by one
StageLoss = Callable[[DIFFA, Batch, torch.Generator, Recipe], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage trains, on which answers, by which loss."""

    parts: str  # key of diffa.AUDIO_PARTS
    target: str  # field of the manifest that holds the answer
    loss: StageLoss
    title: str  # of the progress bar


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the models and data of a run come from, where it writes, and on which device."""

    whisper: str | Path
    llm: str | Path
    adapters: str | Path | None = None  # None: new ones
    train: Path  # manifest
    out: Path  # folder
    validation: Path | None = None  # manifest of clips that do not train
    validation_items: int = 100  # at most
    device: str = "cpu"
    audio_context: float | None = None  # seconds of the encoder's window
    random_weights: str | None = None  # named sizes in place of whisper, llm and adapters
    lm_class: type[DiffusionLM] = DiffusionLM


def run_stage(stage: Stage, recipe: Recipe, run: Run) -> None:
    """Train a stage, or resume it, and write run.out.

    Raises:
        ManifestError, AudioError: data that cannot be used. WeightsError, ValueError: models that
        cannot, or settings that do not fit. SystemExit: see Trainer.run.
    """
    started = time.perf_counter()
    if run.random_weights:
        name = f"random weights ({run.random_weights})"
        run = replace(run, whisper=name, llm=name, adapters=None)
    items = load_manifest(run.train)
    run = replace(run, device=processes.start(run.device))

    # The model, and what it is made of.
    loaded = load_model(stage, recipe, run)
    model = loaded.model
    made_of = digests(model, stage, run)
    prepare(model, recipe.execution, run.device)
    describe(recipe, run, loaded, made_of)

    # The data.
    examples = usable(items, stage.target, model, recipe.answer_length, run.train)
    if recipe.whiten and "acoustic" in loaded.new:
        whiten(model, examples.items, recipe.train.seed)
    held_out = None
    if run.validation:
        others = load_manifest(run.validation)
        others = usable(others, stage.target, model, recipe.answer_length, run.validation)
        held_out = others.first(run.validation_items)

    losses = make_trainer(stage, recipe, run, loaded, made_of, examples, held_out).run()

    if processes.rank() == 0:
        save_trained(model, run.out, run.whisper, run.llm)
        result = {
            "losses": losses,
            "minutes": (time.perf_counter() - started) / 60,
            "trained_parameters": sum(map(n_parameters, model.trained_parts().values())),
            "parts": tuple(model.trained_parts()),
        }
        write_json(run.out / "training.json", result)
    processes.finish()  # after the files are written


def run_command(name: str, stage: Stage, recipes: dict[str, Recipe], options: dict) -> None:
    """Run a stage with parsed options (recipe.add_training_arguments); errors end in one line."""
    with one_line_errors(name):
        run_stage(stage, chosen_recipe(recipes, options), Run(**given(Run, options)))


# The model


def load_model(stage: Stage, recipe: Recipe, run: Run) -> Loaded:
    """The model on this process's device, its new parts drawn with the recipe's seed."""
    shard = recipe.execution.shard
    if shard and processes.world() == 1:
        raise ValueError(
            "--shard cuts the LM over several processes, and there is one; start it with "
            "torchrun --nproc-per-node N"
        )
    torch.manual_seed(recipe.train.seed)
    loaded = load_for_training(
        run.whisper,
        run.llm,
        run.adapters or None,
        stage=stage.parts,
        dtype=getattr(torch, recipe.dtype),
        # An LM that will be sharded may not fit on one card as a whole.
        device="cpu" if shard else run.device,
        audio_context=run.audio_context,
        random_weights=run.random_weights,
        lm_class=run.lm_class,
        **({} if run.adapters else recipe.shapes),
    )
    if recipe.match_embedding_scale:
        parts = loaded.model.trained_parts()
        match_embedding_scale({name: parts[name] for name in loaded.new}, loaded.model.lm)
    return loaded


def recompute_blocks(lm: DiffusionLM) -> None:
    """Keep only the inputs of the LM's blocks; the backward pass computes each block again."""
    for block in lm.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def prepare(model: DIFFA, execution: Execution, device: str) -> None:
    """Recompute, compile and shard the LM, as `execution` says. Then set the model to train."""
    if execution.recompute:
        recompute_blocks(model.lm)
    if execution.compile:
        for block in model.lm.blocks:
            block.compile()
    if execution.shard:
        processes.shard(model.lm, device)
        model.encoder.to(device)
        for part in model.trained_parts().values():
            if isinstance(part, nn.Parameter):
                part.data = part.data.to(device)
            else:
                part.to(device)

    model.train()
    model.encoder.eval()
    for part in model.trained_parts().values():
        part.requires_grad_()


def digest(module: nn.Module, name_of: Callable[[str], str] = str) -> str:
    """A name for a module's weights, from about 64 numbers of each."""
    made = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.detach().flatten()
        numbers = flat[:: max(len(flat) // 64, 1)].float().cpu().numpy()
        made.update(f"{name_of(name)} {tuple(parameter.shape)}".encode() + numbers.tobytes())
    return made.hexdigest()[:16]


def digests(model: DIFFA, stage: Stage, run: Run) -> dict[str, str]:
    """What a model is made of; a run resumes only with the same."""
    made_of = {
        "encoder": digest(model.encoder),
        "lm": digest(model.lm, name_on_disk),
        "stage": stage.parts,
    }
    if run.adapters:
        made_of["adapters"] = digest(model.semantic)
    return made_of


def n_parameters(part: nn.Parameter | nn.Module) -> int:
    """The number of parameters of a part."""
    if isinstance(part, nn.Parameter):
        return part.numel()
    return sum(parameter.numel() for parameter in part.parameters())


def describe(recipe: Recipe, run: Run, loaded: Loaded, made_of: dict[str, str]) -> None:
    """Print the recipe, and where each part of the model comes from."""
    if processes.rank() > 0:
        return
    settings = asdict(recipe)
    execution = {"device": run.device, "processes": processes.world()} | settings.pop("execution")
    settings = settings.pop("train") | settings
    for title, values in (("recipe", settings), ("execution", execution)):
        print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items()))

    model = loaded.model
    sources = {"encoder": run.whisper, "lm": run.llm}
    for name, source in sources.items():
        n = n_parameters(getattr(model, name))
        print(f"  {name:9} {n:>13,} frozen, {recipe.dtype}, from {source} ({made_of[name]})")
    for name, part in model.trained_parts().items():
        source = "new, random weights" if name in loaded.new else f"from {run.adapters}"
        print(f"  {name:9} {n_parameters(part):>13,} trained, float32, {source}")


# The loop


def named_parameters(model: DIFFA) -> dict[str, nn.Parameter]:
    """Every trained parameter; the first word of its name is its part."""
    parameters = {}
    for name, part in model.trained_parts().items():
        if isinstance(part, nn.Parameter):
            parameters[name] = part
        else:
            parameters |= {f"{name}.{inner}": p for inner, p in part.named_parameters()}
    return parameters


def make_order(items: list[dict], recipe: Recipe) -> Order:
    """Which items each step trains on."""
    config = recipe.train
    if recipe.bucket_by_length:
        durations = np.array([item["duration"] for item in items])
        rows_of_step = pick_by_length(durations, config.batch, config.seed)
    else:
        options = {"n_items": len(items), "batch": config.batch, "seed": config.seed}
        rows_of_step = functools.partial(pick, **options)
    parts = local_rows(config.batch, recipe.execution.accumulate)
    return Order(rows_of_step=rows_of_step, parts=parts, steps=config.steps)


def make_trainer(
    stage: Stage,
    recipe: Recipe,
    run: Run,
    loaded: Loaded,
    made_of: dict[str, str],
    examples: Examples,
    held_out: Examples | None,
) -> Trainer:
    """The loop of a stage; its run writes run.out. held_out: clips for validation."""
    model = loaded.model
    order = make_order(examples.items, recipe)
    work = Work(peak=measured_peak(model.device, getattr(torch, recipe.dtype)))
    encoder_name = f"{made_of['encoder']} {recipe.dtype}"
    batches = Batches(
        model=model,
        examples=examples,
        recipe=recipe,
        order=order,
        stream=make_stream(model, examples.items, order, recipe.execution, encoder_name, work),
        work=work,
    )

    validate = None
    if held_out:
        autocast = autocast_of(recipe, model.device)
        validate = Validation(model, held_out, len(order.parts[0]), autocast)

    # A run resumes only with the same recipe, but for how it is executed.
    settings = asdict(recipe)
    for name in ("train", "execution", "shapes"):
        del settings[name]

    return Trainer(
        parameters=named_parameters(model),
        loss_of_step=lambda step, generator: stage.loss(model, batches(step), generator, recipe),
        config=recipe.train,
        checkpoint=run.out / "checkpoint.pt",
        title=stage.title,
        identity={**made_of, **settings, "corpus": examples.digest},
        names_of_step=lambda step: examples.names(order.rows_of_step(step)),
        validate=validate,
        keep_best=lambda: save_trained(model, run.out / "best", run.whisper, run.llm),
        metrics=run.out / "metrics.jsonl",
        work=work,
        lr_scale_parts=tuple(n for n in model.trained_parts() if n not in loaded.new),
    )
