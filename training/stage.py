"""A stage of training, from manifests to saved adapters. The stage brings its own loss."""

import functools
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from adapters import TAPS, AdapterConfig
from checkpoints.command_line import one_line_errors
from checkpoints.digests import digest
from checkpoints.files import write_json
from checkpoints.model import Loaded, load_for_training, save_trained
from checkpoints.progress import is_quiet
from data import load_manifest
from diffa import DIFFA, match_embedding_scale, new_parts
from training import processes
from training.batches import Batches
from training.examples import Examples, usable
from training.execution import prepare
from training.loop import Trainer
from training.recipe import Recipe, chosen_recipe, given, with_steps
from training.run import Run, Stage, check_run
from training.run_files import name_on_disk
from training.validation import Validation, sample_answer
from training.whitening import whiten

# Fields of AdapterConfig that shape the acoustic adapter alone.
ACOUSTIC = ("n_heads", "taps", "n_queries", "qformer_layers", "ffn", "dropout")


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
    # A mistake shows before anything large is read.
    check_run(recipe, run)
    items = load_manifest(run.train)
    other_items = load_manifest(run.validation) if run.validation else []
    run = replace(run, device=processes.start(run.device))
    if run.random_weights:
        name = f"random weights ({run.random_weights})"
        run = replace(run, whisper=name, llm=name, adapters=None)

    # The model.
    loaded = load_model(stage, recipe, run)
    model = loaded.model
    run = replace(run, **loaded.sources)
    start = digests(loaded, stage, run)
    loss = functools.partial(stage.loss, **stage.settings)
    if stage.reference:
        loss = functools.partial(loss, reference=stage.reference(model))
    trained = prepare(model, recipe.execution, run.device)

    # The data.
    examples, held_out = usable_data(stage, recipe, run, model, items, other_items)
    recipe = with_steps(recipe, len(examples.items))
    describe(recipe, run, loaded, start)
    batches = Batches(model, examples, recipe, f"{start['encoder']} {recipe.dtype}")

    def save(path: Path) -> None:
        save_trained(model, path, run.whisper, run.llm, answer_length=recipe.answer_length)

    # The loop. Without a validation, which answers a held-out clip, it shows a training clip.
    shows = not held_out and processes.world() == 1 and not is_quiet()
    sample = functools.partial(sample_answer, model, examples, batches, stage.decode)
    trainer = Trainer(
        trained,
        lambda step, generator: loss(model, batches(step), generator, recipe),
        recipe.train,
        run.out / "checkpoint.pt",
        stage.title,
        identity=identity(stage, recipe, start, examples),
        names_of_step=batches.names,
        validate=Validation(model, held_out, batches, stage.decode) if held_out else None,
        keep_best=lambda: save(run.out / "best"),
        sample=sample if shows else None,
        metrics=run.out / "metrics.jsonl",
        work=batches.work,
        lr_scale_parts=tuple(n for n in model.trained_parts() if n not in loaded.new),
    )
    trainer.begin()
    if len(trainer.losses) == recipe.train.steps and (run.out / "training.json").is_file():
        if processes.rank() == 0:
            print(f"{run.out}: this run is finished; nothing is trained or written")
        processes.finish()
        return

    # States are encoded only for a run that is not finished.
    if recipe.whiten and not trainer.losses:
        whiten(model, examples.items, recipe.train.seed)
    batches.stream.open()
    losses = trainer.finish()

    if processes.rank() == 0:
        save(run.out)
        write_result(run.out / "training.json", model, losses, trainer.minutes())
    processes.finish()  # after the files are written


def usable_data(
    stage: Stage, recipe: Recipe, run: Run, model: DIFFA, items: list[dict], others: list[dict]
) -> tuple[Examples, Examples | None]:
    """The examples that train, and those of the validation, if there is one; errors: `usable`."""
    options = {"target": stage.target, "model": model, "length": recipe.answer_length}
    options |= {"cut": recipe.execution.cut, "rejected": stage.rejected}
    options["unusable"] = stage.unusable
    examples = usable(items, run.train, **options)
    if not run.validation:
        return examples, None
    return examples, usable(others, run.validation, **options).first(run.validation_items)


def identity(stage: Stage, recipe: Recipe, start: dict[str, str], examples: Examples) -> dict:
    """What a run resumes with only if it is the same: parts, data, recipe, but not its execution.

    start: see `digests`. The settings of the optimisation are the trainer's to compare.
    """
    same = start | asdict(recipe) | stage.settings | {"corpus": examples.digest()}
    for name in ("train", "execution", "shapes"):
        del same[name]
    return same


def write_result(path: Path, model: DIFFA, losses: list[float], minutes: float) -> None:
    """Write what a finished run says of itself; the last file that it writes."""
    parts = model.trained_parts()
    trained = [p for n, p in model.named_parameters() if n.split(".")[0] in parts]
    result = {
        "losses": losses,
        "minutes": minutes,
        "trained_parameters": sum(p.numel() for p in trained),
        "parts": list(parts),
    }
    write_json(path, result)


def digests(loaded: Loaded, stage: Stage, run: Run) -> dict[str, str]:
    """What a run starts from: its stage, and digests of its weights."""
    model = loaded.model
    start = {"stage": stage.parts, "encoder": digest(model.encoder.named_parameters())}
    start["lm"] = digest((name_on_disk(n), p) for n, p in model.lm.named_parameters())
    if run.adapters:
        start["adapters"] = digest(model.semantic.named_parameters())
        for part in {"prompts", "acoustic"} & (model.trained_parts().keys() - set(loaded.new)):
            named = [(n, p) for n, p in model.named_parameters() if n.split(".")[0] == part]
            start[part] = digest(named)
    if model.lora is not None:
        start["lora"] = digest(model.lora.named_parameters())
    return start


def with_own_shapes(loaded: Loaded, recipe: Recipe, run: Run) -> Loaded:
    """The model, whose new acoustic adapter has the recipe's shapes, not those of stage 1's file.

    Raises ValueError: an option for parts that are not new.
    """
    model = loaded.model
    if "acoustic" not in loaded.new:
        no_effect = "the acoustic adapter of this run is not new"
        if model.acoustic is None:
            no_effect = f"{model.stage} has no acoustic adapter"
        if run.queries and (model.acoustic is None or run.queries != model.config.n_queries):
            raise ValueError(f"--queries {run.queries} has no effect: {no_effect}")
        if recipe.whiten:
            raise ValueError(f"--whiten has no effect: {no_effect}")
    if recipe.train.pretrained_lr_scale != 1 and set(loaded.new) == set(model.trained_parts()):
        raise ValueError(
            "--pretrained-lr-scale has no effect: no trained part comes from --adapters"
        )
    if "acoustic" not in loaded.new or not run.adapters:
        return loaded

    # The paper's shapes for this encoder, but for the recipe's.
    encoder = model.encoder.config
    defaults = {field.name: field.default for field in fields(AdapterConfig)}
    shapes = {name: defaults[name] for name in ACOUSTIC} | {"n_heads": encoder.n_heads}
    shapes["taps"] = TAPS.get(encoder.n_layers, model.config.taps)
    shapes |= own_shapes(recipe, run)
    for name in set(shapes) - set(ACOUSTIC):
        if shapes[name] != getattr(model.config, name):
            was = getattr(model.config, name)
            raise ValueError(f"{run.adapters}: its {name} is {was}, the recipe's {shapes[name]}")
    config = replace(model.config, **shapes)
    if config == model.config:
        return loaded

    # Drawn again from the same seed.
    torch.manual_seed(recipe.train.seed)
    kept = {n: p for n, p in model.trained_parts().items() if n not in loaded.new or n == "lora"}
    drawn = tuple(name for name in loaded.new if name != "lora")
    parts = new_parts(config, drawn) | kept
    pieces = (model.encoder, model.lm, model.tokenizer, config, parts)
    made = DIFFA(*pieces, model.answer_length, model.made_of).to(model.device)
    return replace(loaded, model=made)


def own_shapes(recipe: Recipe, run: Run) -> dict:
    """The shapes of new parts that the recipe and the options give."""
    return recipe.shapes | ({"n_queries": run.queries} if run.queries else {})


def load_model(stage: Stage, recipe: Recipe, run: Run) -> Loaded:
    """The model on this process's device, its new parts drawn with the recipe's seed."""
    shard = recipe.execution.shard
    if shard and processes.world() == 1:
        advice = "start it with torchrun --nproc-per-node N"
        raise ValueError(f"--shard cuts the LM over several processes, and there is one; {advice}")

    lora = "none" if run.no_lora else run.lora or ("train" if stage.trains_lora else "refuse")

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
        lora=lora,
        draw_missing=stage.reference is None,
        **({} if run.adapters else own_shapes(recipe, run)),
    )

    loaded = with_own_shapes(loaded, recipe, run)

    # Ours: parts that an earlier run trained stay as they are.
    if recipe.match_embedding_scale:
        parts = loaded.model.trained_parts()
        match_embedding_scale({name: parts[name] for name in loaded.new}, loaded.model.lm)
    return loaded


def describe(recipe: Recipe, run: Run, loaded: Loaded, start: dict[str, str]) -> None:
    """Print the recipe, and of each part of the model its number of parameters and its source."""
    if processes.rank() > 0 or is_quiet():
        return
    shapes = asdict(loaded.model.config)  # of the model, whatever the options were
    if loaded.model.acoustic is None:
        shapes = {name: value for name, value in shapes.items() if name not in ACOUSTIC}
    print(replace(recipe, shapes=shapes))
    print(f"device {run.device}, {processes.world()} processes")

    # Where the weights come from, then how many there are.
    sources = {
        name: f"trained, float32, from {run.adapters}" for name in loaded.model.trained_parts()
    }
    sources |= {name: "trained, float32, new, random weights" for name in loaded.new}
    for name, source in (("encoder", run.whisper), ("lm", run.llm)):
        sources[name] = f"frozen, {recipe.dtype}, from {source} ({start[name]})"

    sizes = Counter()
    for name, parameter in loaded.model.named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    for name, size in sizes.items():
        print(f"  {name:9} {size:>13,} {sources[name]}")
