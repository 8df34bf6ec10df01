"""How fast is each way of sampling, and what does its speed cost? The same weights and prompts.

    python -m lab.benchmark                     150m: random weights, a 30 s clip, CPU or GPU
    python -m lab.benchmark --size toy          the trained toy of `make demo`, with its WER
    python -m lab.benchmark --size llada-8b     LLaDA's shapes with random weights, on a GPU

The yardstick is sampler.generate_plain, the published procedure. lab/roofline.py computes the least
possible time. After the table of all settings, a second one has the two kinds of calls alone; a
last line compares prompts in a batch with the same one by one.

Shapes: B prompts, P prompt positions, G answer tokens, L = P + G, D width; M positions that pass
through the model, N of which are scored.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from checkpoints.command_line import DTYPES, add_force_parts, count, one_line_errors
from checkpoints.model import randomize
from checkpoints.sizes import LM_SIZES
from data import build_prompt, decode_answer, load_manifest
from diffa import DIFFA, Spliced, splice
from diffusion_lm import DiffusionLM, LMConfig
from evaluation.wer import word_error_rate
from lab.findings import markdown
from lab.one_call import time_calls
from lab.roofline import (
    clock,
    floor_of_answer,
    measure_rates,
    time_in_turns,
)
from sampler import SamplerConfig, generate, generate_plain
from speed.few_rows import use_few_rows
from toy.pretrain_lm import ANSWER_LENGTH
from training.states import StateCache

NAME = "python -m lab.benchmark"
RANDOM = {
    "150m": LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072),
    "llada-8b": LM_SIZES["llada-8b"],
    "qwen3-0.6b": LM_SIZES["qwen3-0.6b"],
}
# Of a random prompt: 439 audio embeddings of a 30 s clip, 30 tokens before, 30 after.
POSITIONS = 499
BATCH = 8  # prompts that are answered at once
HEADS = "setting calls ms/call tokens/call tokens/s s/answer speed-up of-roofline same-ids WER"


@dataclass
class Row:
    """One setting's figures: means over the prompts."""

    name: str
    calls: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0  # positions filled, or text tokens where the sampler stops at the end
    floor: float = 0.0  # least possible seconds
    ids: list[list[int]] = field(default_factory=list)
    same: str = "-"  # percent of positions that equal the exact answer
    wer: str = "-"  # percent

    def cells(self, yardstick: float) -> list[str]:
        """The row of the table under HEADS. yardstick: seconds that the speed-up is relative to."""
        return [
            self.name,
            f"{self.calls:.1f}",
            f"{1000 * self.seconds / self.calls:.1f}",
            f"{self.tokens / self.calls:.2f}",
            f"{self.tokens / self.seconds:.1f}",
            f"{self.seconds:.3f}",
            f"{yardstick / self.seconds:.1f} x",
            f"{100 * self.floor / self.seconds:.0f} %",
            self.same,
            self.wer,
        ]


# ---- models and prompts
def random_lm(
    config: LMConfig, device: str, dtype: torch.dtype | None
) -> tuple[DiffusionLM, Spliced]:
    """An LM of random weights, and prompts: one as for a clip of 30 s, then ever shorter ones.

    dtype: of the weights. None: bfloat16 on a GPU, else float32.
    """
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(config)
    lm = use_few_rows(randomize(lm, dtype, device)).requires_grad_(False)

    embeddings = torch.randn(BATCH, POSITIONS, config.width).to(device, dtype)  # (B, P, D)
    order = torch.arange(POSITIONS, device=device)[None]
    mask = order >= 20 * torch.arange(BATCH, device=device)[:, None]  # (B, P)
    is_text = mask & ((order < 30) | (order >= POSITIONS - 30))
    return lm, Spliced(embeddings=embeddings, mask=mask, is_text=is_text)


def load_toy(run: Path, n: int, **options) -> tuple[DIFFA, Spliced, list[str]]:
    """A run's stage-1 model, prompts of its first n test clips, and their transcripts.

    options: of load_diffa.
    """
    model = DIFFA.from_pretrained(run / "whisper", run / "llada", run / "stage1", **options)
    items = load_manifest(run / "corpus/asr_test.json")[:n]
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]

    # The weights stay outside of inference mode, as when clips are answered.
    with torch.inference_mode():
        audio = model.eval().hear(*StateCache(model, items)(items))
        batch = splice(model.lm, prompts, *audio)
    return model, batch, [item["transcription"] for item in items]


def take(batch: Spliced, *index) -> Spliced:
    """The part of each tensor of a batch at an index."""
    return Spliced(**{field.name: getattr(batch, field.name)[index] for field in fields(Spliced)})


def one_by_one(batch: Spliced) -> list[Spliced]:
    """Each prompt of a batch alone, without its padding."""
    return [take(batch, slice(i, i + 1), real) for i, real in enumerate(batch.mask)]


# ---- settings
def name_of(config: SamplerConfig) -> str:
    """A setting for people."""
    number = f"{config.steps} steps"
    if config.rule != "count":
        number = f"{getattr(config, config.rule):.3g}"
    parts = [f"{config.rule} {number}", config.cache]
    parts += [f"refresh {config.refresh}"] * (config.refresh > 1)
    parts += ["appended"] * bool(config.append)
    parts += [f"deliberate {config.deliberate}"] * (config.deliberate > 0)
    return ", ".join(parts + ["compiled"] * config.compile)


def settings_of(
    base: SamplerConfig, trained: bool, compile_all: bool = False, only: str = ""
) -> list[SamplerConfig]:
    """Each rule with each cache, the prompt kept, what changes answers, the fastest compiled.

    Args:
        trained: whether the LM is. Random weights are never confident, so with them only the count
            rule and one other are timed, which commits a token a call; and not with a full pass for
            each token, which takes minutes.
        compile_all: every setting is also compiled, which takes minutes too.
        only: keep those whose name holds this text. Raises ValueError: there is none.
    """
    base = replace(base, stop_at_end=trained)
    few = max(round(base.length / 3.25), base.n_blocks)  # 3.25 tokens a call
    fewer = replace(base, steps=few)
    rules = [base, fewer]
    if trained:
        rules += [replace(base, rule=rule) for rule in ("threshold", "factor", "frechet")]

    eager = [replace(rule, cache=cache) for cache in ("none", "prefix", "dual") for rule in rules]
    frechet = replace(base, rule="frechet")
    confident = replace(base, rule="threshold")
    if trained:
        low = replace(confident, threshold=0.7)
        eager += [low, replace(low, deliberate=0.9), replace(confident, deliberate=0.9)]
    else:
        eager.remove(base)
        eager.append(replace(frechet, cache="dual"))

    # With one block there is none to append, and none that could share a prompt.
    if base.n_blocks > 1:
        eager.append(replace(confident if trained else fewer, cache="dual", refresh=base.n_blocks))
        if trained:
            eager.append(replace(confident, append=True))
    compiled = eager if compile_all else [replace(fewer, cache="dual")]
    settings = eager + [replace(config, compile=True) for config in compiled]
    settings = [config for config in settings if only in name_of(config)]
    if not settings:
        raise ValueError(f"--only {only!r}: no setting has this in its name")
    return settings


# ---- measurements
def time_setting(
    lm: DiffusionLM,
    prompts: list[Spliced],
    config: SamplerConfig,
    floor_of: Callable[..., float],
    decode: Callable = generate,
) -> Row:
    """Time one setting on all prompts, one at a time.

    Args:
        floor_of: config, prompt positions and calls -> least seconds.
        decode: `generate`, or generate_plain; where that stops early, its seconds are scaled up.
    """
    device = lm.embedding.weight.device
    row = Row(name_of(config))
    n = len(prompts)

    # The compiler sees every prompt twice before it is timed, since a GPU records the second time.
    # Without it, the first answer on a GPU loads its libraries.
    for prompt in prompts * (2 if config.compile else 0):
        generate(lm, prompt, config)
    if device.type == "cuda" and not config.compile:
        decode(lm, prompts[0], config)

    for prompt in prompts:
        started = clock(device)
        out = decode(lm, prompt, config)
        seconds = clock(device) - started

        made = out.calls.item()
        calls = made if decode is generate else config.steps
        row.calls += calls / n
        row.seconds += seconds * calls / made / n
        row.tokens += (out.text_tokens.item() if config.stop_at_end else config.length) / n
        row.floor += floor_of(config, prompt.embeddings.shape[1], calls) / n
        row.ids.append(out.ids[0].tolist())

    return row


def agreement(a: list[list[int]], b: list[list[int]], end_id: int | None) -> float:
    """Percent of positions at which the answers a equal the answers b.

    end_id: compare only the text of b and its end token; None: compare every position.
    """
    same = []
    for own, other in zip(a, b):
        length = other.index(end_id) + 1 if end_id in other else len(other)
        same += [x == y for x, y in zip(own[:length], other[:length])]
    return 100 * statistics.mean(same)


def compare_batch(lm: DiffusionLM, batch: Spliced, config: SamplerConfig) -> str:
    """A line: a batch of prompts of unequal length at once against the same one by one."""
    answers = {}

    def answer_with(name: str, prompts: list[Spliced]) -> None:
        answers[name] = torch.cat([generate(lm, prompt, config).ids for prompt in prompts])

    works = {
        "at once": functools.partial(answer_with, "at once", [batch]),
        "one by one": functools.partial(answer_with, "one by one", one_by_one(batch)),
    }
    seconds = time_in_turns(works, batch.mask.device, rounds=3)
    equal = "equal" if torch.equal(*answers.values()) else "NOT equal"
    n = len(batch.mask)
    speeds = [f"{name} {n / taken:.2f} answers/s" for name, taken in seconds.items()]
    return f"{n} of unequal length, {name_of(config)}: {', '.join(speeds)}; ids {equal}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, description="How fast is each way of sampling?")
    parser.add_argument("--size", default="150m", choices=["toy", *RANDOM])
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="toy: from `make demo`")
    parser.add_argument("--length", type=int, help="of answers (default 128; toy: as trained)")
    parser.add_argument("--block-length", type=int, help="default 32; toy: half of the answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    usual = "default bfloat16 on a GPU, else float32; toy: float32"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=usual)
    only = "settings whose name in the table holds this text (default: all)"
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument("--clips", type=count, default=50, help="toy: default 50")
    every = "compile every setting, not only the fastest"
    parser.add_argument("--compile-all", action="store_true", help=every)
    timed = "steps of the published procedure that are timed (default 8; toy: all)"
    parser.add_argument("--reference-steps", type=count, default=8, help=timed)
    add_force_parts(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    toy = args.size == "toy"
    length = args.length or (ANSWER_LENGTH if toy else 128)
    block_length = args.block_length or ((length + 1) // 2 if toy else 32)
    dtype = DTYPES.get(args.dtype)
    with one_line_errors(NAME):
        base = SamplerConfig(length=length, block_length=block_length, stop_at_end=False)
        settings = settings_of(base, toy, args.compile_all, args.only)
        if toy:
            options = {"device": args.device, "dtype": dtype}
            options["allow_other_parts"] = args.allow_other_parts
            model, batch, transcripts = load_toy(args.run, args.clips, **options)
            lm = model.lm
        else:
            lm, batch = random_lm(RANDOM[args.size], args.device, dtype)
    prompts = one_by_one(batch) if toy else one_by_one(batch)[:1]

    weight = lm.embedding.weight
    rates = measure_rates(weight.device, weight.dtype)
    floor_of = functools.partial(floor_of_answer, lm, rates)
    print(
        f"{args.size}, {weight.dtype}, {args.device}, {torch.get_num_threads()} threads; "
        f"{len(prompts)} prompts, answers of {length} in blocks of {base.block_length}; "
        f"{rates.bandwidth / 1e9:.1f} GB/s, {rates.flops / 1e9:.0f} GFLOP/s\n"
    )
    heads = HEADS.split()
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")

    # The yardstick comes first. Ids are compared with those of the same rule without a cache.
    plain = functools.partial(generate_plain, max_steps=None if toy else args.reference_steps)
    row = time_setting(lm, prompts, base, floor_of, plain)
    row.name = f"generate_plain, {length} steps"
    yardstick = row.seconds

    def show(row: Row) -> None:
        if toy:
            texts = [decode_answer(model.tokenizer, ids) for ids in row.ids]
            row.wer = f"{word_error_rate(texts, transcripts):.2f} %"
        print(f"| {' | '.join(row.cells(yardstick))} |", flush=True)

    show(row)
    exact = {("count", length, base.threshold): row.ids} if toy else {}
    for config in settings:
        row = time_setting(lm, prompts, config, floor_of)
        key = (config.rule, config.steps, config.threshold)
        if key in exact:
            end_id = lm.config.end_id if config.stop_at_end else None
            row.same = f"{agreement(row.ids, exact[key], end_id):.1f} %"
        if config.cache == "none":
            exact.setdefault(key, row.ids)
        show(row)

    print(f"\n{markdown(*time_calls(lm, prompts[0], base, rates))}\n")

    # Random weights would take minutes in a batch on a CPU.
    for config in settings:
        fast = toy or (config.compile and weight.is_cuda)
        if fast and config.cache != "prefix":
            print(compare_batch(lm, take(batch, slice(BATCH)), config), flush=True)


if __name__ == "__main__":
    main()
