"""What both stages share: recipes, the machine they run on, which items can be used, and the loss of a step.

A batch of step k is the same whatever the machine: it is cut into `processes x accumulate` parts, the noise is drawn for
the whole of it, and the parts' losses add up to the loss of the batch.

Shapes: B batch, b clips of one part, G answer tokens, L positions that the LM reads, N items.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import processes as ranks
from training.clips import StateCache, Stream, Unreadable, fill_folder, my_places, needed_states, pick, pick_alike, state_file
from data import ManifestError, load_manifest
from checkpoints.tokenizer import build_prompt, encode_answers
from diffa import AUDIO_PARTS, DIFFA, model_options
from diffusion_lm import LMConfig, diffusion_loss, next_token_loss, noise, noise_levels
from encoder import SAMPLE_RATE
from training.loop import OPTIMIZERS, TrainConfig, Work, fit
from training.validation import make_validation
from checkpoints.weights import load_adapters, write_json
from training.whitening import whiten


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a run is carried out here. May change when it goes on: the result stays the same but for rounding."""

    accumulate: int = 1  # parts that a process's share of a batch is computed in, one after the other
    workers: int = 0  # processes beside each training process that decode audio ahead
    cache: str = "memory"  # of the encoder's states: "memory", "none", or a folder
    recompute: bool = False  # the LM's blocks again in the backward pass, for memory
    compile: bool = False  # the LM's blocks, with torch.compile
    shard: bool = False  # the LM over the processes (FSDP2)
    max_unreadable: int = 10  # clips that may be skipped


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe: the optimiser's settings and what of the method is adapted to the size."""

    train: TrainConfig
    answer_length: int  # tokens, padded with the end of text
    t_min: float  # noise levels are drawn from (t_min, 1]; the paper's is 0
    stratified: bool  # noise levels spread over the batch instead of independent
    match_embedding_scale: bool  # new adapters start at the size of the LM's embeddings; the paper's at LayerNorm's 1
    shapes: dict  # AdapterConfig fields of new adapters that differ from the paper's
    dtype: str = "float32"  # of the frozen parts, and of the adapters' arithmetic; adapters themselves are float32
    alike: bool = False  # clips of about one length in a batch
    whiten: bool = False  # a new acoustic adapter starts on whitened states (whitening.py); the paper's on the states
    machine: Machine = Machine()


TOY_SHAPES = {"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0}
FULL_SIZE = Machine(workers=8, cache="none", recompute=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that both stages take; those without a default are the preset's."""
    parser.add_argument("--preset", choices=["toy", "paper"], default="toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="clips a step, over all processes")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--inherited", type=float, metavar="SHARE", help="of --lr, for parts that --adapters brings (default 1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="muon (its rest by adamw), or adamw for all, as in the paper")
    parser.add_argument("--whiten", action="store_true", help="a new acoustic adapter starts on whitened states (whitening.py)")
    parser.add_argument("--validation", type=Path, help="manifest of clips that do not train")
    parser.add_argument("--validation-items", type=int, default=100, help="at most so many of them (default 100)")
    parser.add_argument("--validate-every", type=int, help="steps")
    parser.add_argument("--save-every", type=int, help="steps")
    parser.add_argument("--keep", type=int, help="newest checkpoints to keep")
    parser.add_argument("--accumulate", type=int, help="parts that a process computes its share of a batch in")
    parser.add_argument("--workers", type=int, help="processes that decode audio ahead")
    parser.add_argument("--cache-encoder", dest="cache", metavar="DIR", help="folder for the encoder's states; or memory, none")
    parser.add_argument("--max-unreadable", type=int, help="clips that may be skipped")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="activation checkpointing: slower, less memory")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile")
    parser.add_argument("--shard", action="store_true", default=None, help="cut the LM over the processes of torchrun (FSDP2)")


def chosen_preset(presets: dict[str, Preset], args: argparse.Namespace) -> Preset:
    """The preset by name with what the command line overrides."""
    preset = presets[args.preset]

    def overridden(config):
        given = {field.name: getattr(args, field.name, None) for field in fields(config)}
        return replace(config, **{name: value for name, value in given.items() if value is not None})

    return replace(
        preset,
        train=overridden(preset.train),
        machine=overridden(preset.machine),
        dtype=args.dtype or preset.dtype,
        whiten=args.whiten or preset.whiten,
    )


def digest(module: nn.Module) -> str:
    """A name for a module's weights, from 64 numbers of each."""
    made = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.detach().flatten()
        made.update(f"{name} {tuple(parameter.shape)}".encode() + flat[:: max(len(flat) // 64, 1)].float().cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def load_model(args: argparse.Namespace, preset: Preset, stage: str) -> tuple[DIFFA, dict, tuple[str, ...]]:
    """The model on this process's device, the names of what it is made of, and which parts are newly drawn."""
    args.device = ranks.start(args.device)
    if args.random_weights:  # nothing is read
        args.adapters, args.whisper, args.llm = "", *[f"random weights ({args.random_weights})"] * 2
    if preset.machine.shard and ranks.world() == 1:
        raise ValueError("--shard cuts the LM over several processes, and there is one; start it with torchrun --nproc-per-node N")
    torch.manual_seed(args.seed)
    # What is going to be sharded must not be put whole on a card that cannot hold it.
    device = "cpu" if preset.machine.shard else args.device
    options = model_options(args) | {"dtype": getattr(torch, preset.dtype), "device": device}
    shapes = {} if args.adapters else preset.shapes
    model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters or None, stage, **options, **shapes)
    made_of, found = {"encoder": digest(model.encoder), "lm": digest(model.lm), "stage": stage}, {}
    if args.adapters:
        made_of["adapters"] = digest(model.semantic)
        _, found, _ = load_adapters(args.adapters, model.encoder.config.n_heads, model.encoder.config.n_layers)
    new = tuple(name for name in AUDIO_PARTS[stage] if name not in found)
    if preset.match_embedding_scale:
        model.match_embedding_scale(new)
    if preset.machine.compile:
        for block in model.lm.blocks:
            block.compile()
    if preset.machine.shard:
        ranks.shard(model.lm, args.device)
        model.encoder.to(args.device)
        model.semantic.to(args.device)
        model.acoustic.to(args.device)
        model.prompts.data = model.prompts.data.to(args.device)
    model.lm.recompute = preset.machine.recompute
    return model, made_of, new


def describe(args: argparse.Namespace, preset: Preset, model: DIFFA, made_of: dict, new: tuple[str, ...]) -> None:
    """Print the recipe and where each part comes from."""
    if ranks.rank() > 0:
        return
    settings = {**asdict(preset), **{k: v for k, v in asdict(preset.train).items()}}
    machine = {"device": args.device, "processes": ranks.world(), **settings.pop("machine")}
    settings.pop("train")
    print(f"preset {args.preset}: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    for name, source in (("encoder", args.whisper), ("lm", args.llm)):
        n = sum(p.numel() for p in getattr(model, name).parameters())
        print(f"  {name:9} {n:>13,} frozen, {preset.dtype}, from {source} ({made_of[name]})")
    for name, part in model.trainable().items():
        n = part.numel() if isinstance(part, Tensor) else sum(p.numel() for p in part.parameters())
        print(f"  {name:9} {n:>13,} trained, float32, " + ("newly drawn" if name in new else f"inherited from {args.adapters}"))


def usable(items: list[dict], answers: list[str], model: DIFFA, length: int, source: str) -> tuple[list[dict], Tensor]:
    """Items that have an answer and fit the encoder's window and the answer's length; and answers (N, G). Says what it leaves out.

    Raises ManifestError: nothing is left.
    """
    seconds = model.encoder.config.n_samples / SAMPLE_RATE
    too_long = [item["duration"] > seconds + 0.01 for item in items]
    too_wordy = [len(model.tokenizer.encode(answer)) >= length for answer in answers]
    empty = [not answer.strip() for answer in answers]
    kept = [i for i in range(len(items)) if not (too_long[i] or too_wordy[i] or empty[i])]
    if len(kept) < len(items):
        said = (f"{source}: of {len(items)} items, {sum(too_long)} last longer than the encoder's {seconds:.1f} s, "
                f"{sum(too_wordy)} have answers of {length} tokens or more and {sum(empty)} have none")  # fmt: skip
        if not kept:
            raise ManifestError(f"{said}: no item is left; cut the clips, or choose another manifest, encoder or answer length")
        if ranks.rank() == 0:
            tqdm.write(f"{said}; they are left out")
    return [items[i] for i in kept], encode_answers(model.tokenizer, [answers[i] for i in kept], length)


def lm_flops(config: LMConfig, B: int, L: int, n_masked: int) -> float:
    """Of one part: forward, and backward to the inputs alone, since the LM's own weights take no gradient."""
    heads = config.n_heads * config.head_dim
    block = config.width * (2 * heads + 2 * config.n_kv_heads * config.head_dim + 3 * config.ffn)  # weights
    attention = 2 * L * heads  # query times key, weights times value: a position
    return B * L * config.n_layers * (4 * block + 6 * attention) + 4 * config.width * config.vocab * n_masked


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here: the peak that shares are shares of."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(8):  # the first ones warm up
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the result
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def train_stage(
    model: DIFFA, made_of: dict, new: tuple[str, ...], data: tuple, held_out: tuple | None, preset: Preset, out: Path, title: str,
    keep_best: Callable[[], None],
) -> list[float]:
    """Train what the model's stage trains; writes `out` and returns the loss of every step.

    Args:
        made_of, new: from load_model. data, held_out: items and answers (N, G) as `usable` gives them. keep_best: see `fit`.
    Raises:
        ValueError: a prompt too long for the LM, known before the first step. AudioError: too many clips cannot be read.
    """
    (items, answer_ids), config, machine = data, preset.train, preset.machine
    device, lm = model.prompts.device, model.lm
    prompts = {text: build_prompt(model.tokenizer, text) for text in {item["input"] for item in items}}
    longest = max(len(p.before) + len(p.after) for p in prompts.values()) + preset.answer_length
    if longest > lm.config.max_length:
        raise ValueError(f"a prompt and answer of {longest} tokens exceed the LM's context of {lm.config.max_length}")
    places, work = my_places(config.batch, machine.accumulate), Work(peak=measured_peak(device, getattr(torch, preset.dtype)))
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=preset.dtype == "bfloat16")

    def rows_of_step(step: int) -> np.ndarray:
        return pick(step, len(items), config.batch, config.seed)

    if preset.alike:
        rows_of_step = pick_alike(np.array([item["duration"] for item in items]), config.batch, config.seed)
    unreadable = Unreadable(machine.max_unreadable)
    if machine.cache == "memory":
        shown = functools.partial(tqdm, desc=f"{title}: encoding", leave=False, disable=ranks.rank() > 0)
        cache = StateCache(model, items, progress=shown, unreadable=unreadable, used=needed_states(model))

        def heard_in(step: int) -> Iterator:
            for mine in places:
                started, chosen = time.perf_counter(), [items[i] for i in rows_of_step(step)[mine]]
                states, frames = cache(chosen)
                work.waited += time.perf_counter() - started
                yield states, frames, cache.is_readable(chosen)
    else:
        file_of = None
        if machine.cache != "none":
            file_of = functools.partial(state_file, Path(machine.cache), f"{made_of['encoder']} {preset.dtype}", used=needed_states(model))
            fill_folder(model, items, file_of, machine.workers, unreadable)
        heard_in = Stream(model, items, rows_of_step, places, config.steps, machine.workers, unreadable, work, file_of)

    hear = ranks.replicate(model)

    def loss_of_step(step: int, generator: torch.Generator) -> Iterator[Tensor]:
        rows = rows_of_step(step)
        answers = answer_ids[torch.from_numpy(rows)]  # (B, G)
        t = noise_levels(len(rows), generator, preset.t_min, preset.stratified)  # (B,) of the whole batch
        noisy = noise(answers, t, lm.config.mask_id, generator)  # (B, G)
        for i, (mine, (states, frames, readable)) in enumerate(zip(places, heard_in(step))):
            number = ranks.rank() * machine.accumulate + i
            if number > 0:
                torch.manual_seed((config.seed << 32) + (number << 24) + step)  # dropout of this part, on any machine
            last = i == len(places) - 1
            # Gradients are summed over the processes once, with those of the last part.
            with contextlib.nullcontext() if last or ranks.world() == 1 else hear.no_sync():
                with autocast():
                    audio = hear(states, frames)
                prompt = model.splice([prompts[items[r]["input"]] for r in rows[mine]], *audio)
                meant = answers[mine]  # (b, G)
                # What could not be heard is not asked about: an answer without a mask has no loss.
                masked = torch.where(readable[:, None], noisy[mine], meant)  # (b, G)
                asked = readable[:, None].expand_as(meant) if lm.config.causal else masked == lm.config.mask_id  # (b, G)
                L = prompt.mask.shape[1] + meant.shape[1]
                work.audio += sum(items[r]["duration"] for r in rows[mine])
                work.tokens += len(mine) * L
                work.flops += lm_flops(lm.config, len(mine), L, int(asked.sum()))
                # Divided by the tokens of the whole batch: the parts' losses add up to the batch's.
                if lm.config.causal:  # the twin of autoregressive.py, to which noise is nothing
                    yield next_token_loss(lm, prompt.embeddings, prompt.mask, meant.to(device), answers.numel(), asked.to(device))
                else:
                    yield diffusion_loss(lm, prompt.embeddings, prompt.mask, meant.to(device), masked.to(device), t[mine], answers.numel())

    model.train()
    model.encoder.eval()
    parameters = {}
    for name, part in model.trainable().items():
        parameters |= {name: part} if isinstance(part, Tensor) else {f"{name}.{n}": p for n, p in part.named_parameters()}
    told = [[item["audio_id"], item["input"], ids] for item, ids in zip(items, answer_ids.tolist())]
    recipe = {k: v for k, v in asdict(preset).items() if k not in ("train", "machine", "shapes")}
    return fit(
        {n: p.requires_grad_() for n, p in parameters.items()},
        loss_of_step,
        config,
        out / "checkpoint.pt",
        title,
        identity={**made_of, **recipe, "corpus": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]},
        names_of_step=lambda step: [items[i]["audio_id"] for i in rows_of_step(step)],
        validate=make_validation(model, *held_out, len(places[0]), autocast) if held_out else None,
        keep_best=keep_best,
        metrics=out / "metrics.jsonl",
        inherited=tuple(name for name in model.trainable() if name not in new),
        work=work,
    )


def run_stage(args: argparse.Namespace, preset: Preset, stage: str, target: str, title: str) -> None:
    """The command of a stage: from manifests to `args.out`. target: the manifest's field that is the answer."""
    started = time.perf_counter()
    items = load_manifest(args.train)
    model, made_of, new = load_model(args, preset, stage)
    describe(args, preset, model, made_of, new)
    data = usable(items, [item[target] for item in items], model, preset.answer_length, args.train)
    if preset.whiten and "acoustic" in new:
        whiten(model, data[0], args.seed)
    held_out = None
    if args.validation:
        others = load_manifest(args.validation)
        others, ids = usable(others, [item[target] for item in others], model, preset.answer_length, args.validation)
        held_out = others[: args.validation_items], ids[: args.validation_items]

    def keep_best() -> None:
        model.save(args.out / "best", args.whisper, args.llm)

    losses = train_stage(model, made_of, new, data, held_out, preset, args.out, title, keep_best)
    if ranks.rank() == 0:
        model.save(args.out, args.whisper, args.llm)
        minutes = (time.perf_counter() - started) / 60
        trained = sum(p.numel() if isinstance(p, Tensor) else sum(q.numel() for q in p.parameters()) for p in model.trainable().values())
        write_json(args.out / "training.json", {"losses": losses, "minutes": minutes, "trained_parameters": trained, "parts": AUDIO_PARTS[stage]})
    ranks.finish()  # after the files are written
