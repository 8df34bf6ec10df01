"""A stage of training, from manifests to saved adapters. The stage brings its own loss."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints.command_line import one_line_errors
from checkpoints.digests import digest
from checkpoints.files import write_json
from checkpoints.model import Loaded, load_for_training, save_trained
from data import load_manifest
from diffa import DIFFA, match_embedding_scale
from diffusion_lm import DiffusionLM
from training import processes
from training.batches import Batch, Batches
from training.examples import usable
from training.loop import Trainer
from training.recipe import Execution, Recipe, chosen_recipe, given
from training.run_files import name_on_disk
from training.validation import Validation
from training.whitening import whiten


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage trains, on which answers, by which loss.

    parts: key of diffa.AUDIO_PARTS. target: field of the manifest that holds the answer.
    loss: (model, batch, generator of the step, recipe) -> the losses of the batch's local parts.
    title: of the progress bar.
    """

    parts: str
    target: str
    loss: Callable[[DIFFA, Batch, torch.Generator, Recipe], Iterator[Tensor]]
    title: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the models and data of a run come from, where it writes, and on which device.

    whisper, llm: None: those that the adapters record, else the toy run's. adapters: None: new
    ones. train, validation: manifests. validation_items: at most. audio_context: seconds of the
    encoder's window. random_weights: named sizes, in place of whisper, llm and adapters.
    allow_other_parts: see load_for_training.
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
    lm_class: type[DiffusionLM] = DiffusionLM


def run_command(name: str, stage: Stage, recipes: dict[str, Recipe], options: dict) -> None:
    """Run a stage with parsed options (recipe.add_training_arguments); errors end in one line."""
    with one_line_errors(name):
        run_stage(stage, chosen_recipe(recipes, options), Run(**given(Run, options)))


def run_stage(stage: Stage, recipe: Recipe, run: Run) -> None:
    """Train a stage, or resume it, and write run.out.

    Raises:
        ManifestError, AudioError: data that cannot be used. WeightsError, ValueError: models that
        cannot, or settings that do not fit. SystemExit: see Trainer.run.
    """
    started = time.perf_counter()
    items = load_manifest(run.train)
    run = replace(run, device=processes.start(run.device))
    if run.random_weights:
        name = f"random weights ({run.random_weights})"
        run = replace(run, whisper=name, llm=name, adapters=None)

    # The model.
    loaded = load_model(stage, recipe, run)
    model = loaded.model
    run = replace(run, **loaded.sources)
    made_of = {"stage": stage.parts, "encoder": digest(model.encoder.named_parameters())}
    made_of["lm"] = digest((name_on_disk(n), p) for n, p in model.lm.named_parameters())
    if run.adapters:
        made_of["adapters"] = digest(model.semantic.named_parameters())
    trained = prepare(model, recipe.execution, run.device)
    describe(recipe, run, loaded, made_of)

    # The data.
    options = {"target": stage.target, "model": model, "length": recipe.answer_length}
    examples = usable(items, run.train, **options)
    if recipe.whiten and "acoustic" in loaded.new:
        whiten(model, examples.items, recipe.train.seed)
    held_out = None
    if run.validation:
        others = usable(load_manifest(run.validation), run.validation, **options)
        held_out = others.first(run.validation_items)
    batches = Batches(model, examples, recipe, f"{made_of['encoder']} {recipe.dtype}")

    # A run resumes only with the same recipe, but for how it is executed.
    identity = made_of | asdict(recipe) | {"corpus": examples.digest()}
    for name in ("train", "execution", "shapes"):
        del identity[name]

    # The loop.
    origin = {"whisper": run.whisper, "llm": run.llm, "answer_length": recipe.answer_length}
    trainer = Trainer(
        trained,
        lambda step, generator: stage.loss(model, batches(step), generator, recipe),
        recipe.train,
        run.out / "checkpoint.pt",
        stage.title,
        identity=identity,
        names_of_step=batches.names,
        validate=Validation(model, held_out, batches) if held_out else None,
        keep_best=lambda: save_trained(model, run.out / "best", **origin),
        metrics=run.out / "metrics.jsonl",
        work=batches.work,
        lr_scale_parts=tuple(n for n in model.trained_parts() if n not in loaded.new),
    )
    losses = trainer.run()

    if processes.rank() == 0:
        save_trained(model, run.out, **origin)
        result = {
            "losses": losses,
            "minutes": (time.perf_counter() - started) / 60,
            "trained_parameters": sum(p.numel() for p in trained.values()),
            "parts": list(model.trained_parts()),
        }
        write_json(run.out / "training.json", result)
    processes.finish()  # after the files are written


def load_model(stage: Stage, recipe: Recipe, run: Run) -> Loaded:
    """The model on this process's device, its new parts drawn with the recipe's seed."""
    shard = recipe.execution.shard
    if shard and processes.world() == 1:
        advice = "start it with torchrun --nproc-per-node N"
        raise ValueError(f"--shard cuts the LM over several processes, and there is one; {advice}")

    # New parts are drawn here.
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
        allow_other_parts=run.allow_other_parts,
        **({} if run.adapters else recipe.shapes),
    )

    # Ours: parts that an earlier run trained stay as they are.
    if recipe.match_embedding_scale:
        parts = loaded.model.trained_parts()
        match_embedding_scale({name: parts[name] for name in loaded.new}, loaded.model.lm)
    return loaded


def recompute_blocks(lm: DiffusionLM) -> None:
    """Keep only the inputs of the LM's blocks; the backward pass computes each block again."""
    for block in lm.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def prepare(model: DIFFA, execution: Execution, device: str) -> dict[str, nn.Parameter]:
    """Recompute, compile and shard the LM, and set the model to train. Returns what trains."""
    parts = model.trained_parts()
    trained = {n: p for n, p in model.named_parameters() if n.split(".")[0] in parts}

    # The LM, whose blocks take most of the time and memory.
    if execution.recompute:
        recompute_blocks(model.lm)
    if execution.compile:
        for block in model.lm.blocks:
            block.compile()
    if execution.shard:
        processes.shard(model.lm, device)
        model.encoder.to(device)
        for parameter in trained.values():
            parameter.data = parameter.data.to(device)

    # Dropout in the trained parts; no gradient for anything else.
    model.train()
    model.encoder.eval()
    return {name: parameter.requires_grad_() for name, parameter in trained.items()}


def describe(recipe: Recipe, run: Run, loaded: Loaded, made_of: dict[str, str]) -> None:
    """Print the recipe, and of each part of the model its number of parameters and its source."""
    if processes.rank() > 0:
        return
    print(recipe)
    print(f"device {run.device}, {processes.world()} processes")

    # Where the weights come from, then how many there are.
    sources = {
        name: f"trained, float32, from {run.adapters}" for name in loaded.model.trained_parts()
    }
    sources |= {name: "trained, float32, new, random weights" for name in loaded.new}
    for name, source in (("encoder", run.whisper), ("lm", run.llm)):
        sources[name] = f"frozen, {recipe.dtype}, from {source} ({made_of[name]})"

    sizes = Counter()
    for name, parameter in loaded.model.named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    for name, size in sizes.items():
        print(f"  {name:9} {size:>13,} {sources[name]}")
