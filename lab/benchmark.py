"""How fast is each way of sampling, and what does its speed cost? One process, the same weights and prompts.

    python -m lab.benchmark                     150m: random weights, a 30 s clip, CPU or GPU
    python -m lab.benchmark --size toy          the trained toy of `make demo`, with its WER
    python -m lab.benchmark --size llada-8b     LLaDA's shapes with random weights, on a GPU

The yardstick is sampler.generate_plain, the published procedure. lab/roofline.py computes the least possible time.

Shapes: P prompt positions, G answer tokens, N block length, D width.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.command_line import one_line_errors
from checkpoints.few_rows import use_few_rows
from checkpoints.fill import randomize
from data import build_prompt, decode_answer, load_manifest
from diffa import DIFFA, Spliced, splice
from diffusion_lm import SIZES, DiffusionLM, LMConfig
from evaluation.figure import figure
from evaluation.wer import word_error_rate
from lab.roofline import Rates, clock, floor_of_answer, measure_rates, seconds_of
from sampler import BUCKET, SamplerConfig, generate, generate_plain
from train_asr import RECIPES
from training.states import StateCache

RANDOM = {
    "150m": LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072),
    "llada-8b": SIZES["llada-8b"],
}
POSITIONS = (
    499  # of a random prompt: 439 audio embeddings of a 30 s clip, 30 tokens before, 30 after
)
HEADS = (
    "setting",
    "calls",
    "ms a call",
    "tokens a call",
    "tokens/s",
    "s an answer",
    "speed-up",
    "of roofline",
    "same ids",
    "WER %",
)


@dataclass
class Row:
    """One setting's figures: means over the prompts. None: unknown."""

    name: str
    calls: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0  # positions filled, or text tokens where the sampler stops at the end
    floor: float = 0.0  # least possible seconds
    ids: list[list[int]] = field(default_factory=list)
    same: float | None = None  # percent of positions that equal the exact answer
    wer: float | None = None  # percent

    def cells(self, yardstick: float) -> list[str]:
        """Of the table with HEADS; yardstick: the seconds that the speed-up is relative to."""
        return [
            self.name,
            f"{self.calls:.1f}",
            f"{1000 * self.seconds / self.calls:.1f}",
            f"{self.tokens / self.calls:.2f}",
            f"{self.tokens / self.seconds:.1f}",
            f"{self.seconds:.3f}",
            f"{yardstick / self.seconds:.1f} x",
            f"{100 * self.floor / self.seconds:.0f} %",
            "-" if self.same is None else f"{self.same:.1f} %",
            "-" if self.wer is None else f"{self.wer:.1f}",
        ]


# ---- models and prompts
def random_lm(config: LMConfig, device: str, dtype: torch.dtype) -> tuple[DiffusionLM, Spliced]:
    """A model of random weights, and 8 prompts as for clips of 30 s and shorter."""
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(config)
    lm = use_few_rows(randomize(lm, dtype, device)).requires_grad_(False)

    embeddings = torch.randn(8, POSITIONS, config.width).to(device, dtype)  # (8, P, D)
    order = torch.arange(POSITIONS, device=device)[None]
    mask = order >= 20 * torch.arange(8, device=device)[:, None]  # (8, P): each 20 shorter
    is_text = mask & ((order < 30) | (order >= POSITIONS - 30))
    return lm, Spliced(embeddings=embeddings, mask=mask, is_text=is_text)


@torch.no_grad()
def load_toy(run: Path, clips: int, device: str) -> tuple[DIFFA, Spliced, list[str]]:
    """The trained stage-1 model of a run, prompts of its first test clips, and their transcripts."""
    model = DIFFA.from_pretrained(run / "whisper", run / "llada", run / "stage1", device=device)
    items = load_manifest(run / "corpus/asr_test.json")[:clips]
    audio = model.eval().hear(*StateCache(model, items)(items))
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]
    return model, splice(model.lm, prompts, *audio), [item["transcription"] for item in items]


def one_by_one(prompt: Spliced) -> list[Spliced]:
    """Each prompt of a batch alone, without its padding."""
    singles = []
    for i, real in enumerate(prompt.mask):
        embeddings = prompt.embeddings[i : i + 1, real]
        mask = prompt.mask[i : i + 1, real]
        is_text = prompt.is_text[i : i + 1, real]
        singles.append(Spliced(embeddings=embeddings, mask=mask, is_text=is_text))
    return singles


# ---- settings
def name_of(config: SamplerConfig) -> str:
    numbers = {
        "count": f"{config.steps} steps",
        "threshold": f"{config.threshold:.3g}",
        "factor": f"{config.factor:.3g}",
    }
    compiled = ", compiled" if config.compile else ""
    return f"{config.rule} {numbers[config.rule]}, {config.cache}{compiled}"


def settings_to_time(
    base: SamplerConfig, threshold: float, trained: bool, compile_all: bool
) -> list[SamplerConfig]:
    """Each rule with each cache, eager and compiled."""
    base = replace(base, stop_at_end=trained)
    few = max(round(base.length / 3.25), base.length // base.block_length)  # 3.25 tokens a call
    # Random weights are never confident; the factor rule then commits factor - 1 tokens a call.
    factor = 1.0 if trained else 4.25
    rules = [
        base,
        replace(base, steps=few),
        replace(base, rule="threshold", threshold=threshold),
        replace(base, rule="factor", factor=factor),
    ]
    eager = [replace(rule, cache=cache) for cache in ("none", "prefix", "dual") for rule in rules]

    # Random weights take minutes: leave out full passes and rules that cost the same a call.
    if not trained:
        eager = [
            config
            for config in eager
            if config.cache == "dual"
            or (config.rule == "count" and (config.cache == "prefix" or config.steps == few))
        ]

    dual = [config for config in eager if config.cache == "dual" and config.steps == few]
    compiled = eager if compile_all else dual
    return eager + [replace(config, compile=True) for config in compiled]


def threshold_of_random(lm: DiffusionLM, prompt: Spliced, length: int) -> float:
    """The threshold that three of the first `length` positions pass under random weights."""
    confidences = []

    def collect(ids: Tensor, confidence: Tensor) -> None:
        confidences.append(confidence[0].clone())

    generate(lm, prompt, SamplerConfig(length=length, steps=1, stop_at_end=False), collect)
    return confidences[0].sort(descending=True).values[3].item()


# ---- measurements
def warm_up(lm: DiffusionLM, prompts: list[Spliced], config: SamplerConfig) -> None:
    """Compile every shape before it is timed; each runs twice, since a GPU records the second."""
    shapes = {-(-prompt.embeddings.shape[1] // BUCKET): prompt for prompt in prompts}
    steps = min(2 * config.length // config.block_length, config.length)
    for prompt in shapes.values():
        for _ in range(2):
            generate(lm, prompt, replace(config, steps=steps))


def time_setting(
    lm: DiffusionLM,
    prompts: list[Spliced],
    config: SamplerConfig,
    rates: Rates,
    decode: Callable = generate,
    all_calls: int | None = None,
) -> Row:
    """Time one setting on all prompts, one at a time.

    all_calls: of a whole answer, where `decode` stops early; its seconds are then scaled up.
    """
    device = str(lm.embedding.weight.device)
    n = len(prompts)
    row = Row(name_of(config))
    if config.compile:
        warm_up(lm, prompts, config)

    for prompt in prompts:
        started = clock(device)
        out = decode(lm, prompt, config)
        seconds = clock(device) - started

        made = out.calls.item()
        calls = all_calls or made
        tokens = out.text_tokens.item() if config.stop_at_end else config.length
        P = prompt.embeddings.shape[1]
        row.seconds += seconds * calls / made / n
        row.calls += calls / n
        row.tokens += tokens / n
        row.floor += floor_of_answer(lm, rates, config, P, calls) / n
        row.ids.append(out.ids[0].tolist())

    return row


def agreement(a: list[list[int]], b: list[list[int]], end_id: int | None) -> float:
    """Percent of positions at which the answers a equal the answers b.

    end_id: compare only the text of b and its end token; None: compare every position.
    """
    same = []
    for mine, other in zip(a, b, strict=True):
        length = other.index(end_id) + 1 if end_id in other else len(other)
        same += [x == y for x, y in zip(mine[:length], other[:length], strict=True)]
    return 100 * statistics.mean(same)


def compare_batch(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig) -> str:
    """One line: the first eight prompts at once against the same prompts one by one."""
    device = str(lm.embedding.weight.device)
    first = [field[:8] for field in (prompt.embeddings, prompt.mask, prompt.is_text)]
    prompt = Spliced(embeddings=first[0], mask=first[1], is_text=first[2])
    singles = one_by_one(prompt)

    alone = [generate(lm, single, config).ids[0] for single in singles]
    together = generate(lm, prompt, config).ids
    equal = torch.equal(torch.stack(alone), together)

    slow = seconds_of(lambda: [generate(lm, single, config) for single in singles], device)
    fast = seconds_of(lambda: generate(lm, prompt, config), device)
    n = len(singles)
    return (
        f"{n} of unequal length at once, {name_of(config)}: {n / fast:.2f} answers/s; "
        f"one by one {n / slow:.2f}; {slow / fast:.1f} x; ids {'equal' if equal else 'NOT equal'}"
    )


def plot_rules(measure: Callable[[SamplerConfig], Row], length: int, path: Path) -> None:
    """WER against milliseconds a clip: one line for each rule, one point for each setting."""
    settings = {
        "count": ("steps", (length, length // 2, length // 3, length // 4, 4, 3, 2, 1)),
        "threshold": ("threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)),
        "factor": ("factor", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    }
    with figure(path, size=(5.5, 3.4)) as axis:
        for rule, (name, numbers) in settings.items():
            configs = [SamplerConfig(length=length, rule=rule, **{name: n}) for n in numbers]
            rows = [measure(config) for config in configs]
            x = [1000 * row.seconds for row in rows]
            axis.plot(x, [row.wer for row in rows], "o-", label=rule, lw=1, ms=4)

        axis.set(xlabel="milliseconds a clip, one at a time", ylabel="WER (%)", ylim=(0, None))
        axis.legend()


# ---- the command
def describe(lm: DiffusionLM, prompts: list[Spliced], base: SamplerConfig, rates: Rates) -> str:
    """What is timed, and the measured rates of the machine."""
    c = lm.config
    P = prompts[0].embeddings.shape[1]
    return (
        f"width {c.width}, {c.n_layers} blocks, vocabulary {c.vocab}, {torch.get_num_threads()} threads\n"
        f"{len(prompts)} prompts of {P} positions, answers of {base.length} in blocks of {base.block_length}\n"
        f"measured: {rates.bandwidth / 1e9:.1f} GB/s read, {rates.flops / 1e9:.0f} GFLOP/s in products"
    )


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def print_table(
    measure: Callable[..., Row],
    base: SamplerConfig,
    settings: list[SamplerConfig],
    max_steps: int | None,
    end_id: int,
) -> None:
    """Time the yardstick, then every setting.

    max_steps: of the yardstick; None runs it to its end, and answers are compared with its ids.
    """
    print_row(HEADS)
    print_row(["---"] * len(HEADS))
    plain = functools.partial(generate_plain, max_steps=max_steps)
    yardstick = measure(base, plain, base.steps)
    yardstick.name = f"generate_plain, {base.steps} steps"
    print_row(yardstick.cells(yardstick.seconds))

    # Answers without a cache are exact; those with one are compared with them.
    exact = {} if max_steps else {("count", base.steps): yardstick.ids}
    for config in settings:
        row = measure(config)
        key = (config.rule, config.steps)
        if config.cache == "none" and not config.compile:
            exact.setdefault(key, row.ids)
        if key in exact:
            row.same = agreement(row.ids, exact[key], end_id if config.stop_at_end else None)
        print_row(row.cells(yardstick.seconds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmark", description="How fast is each way of sampling?"
    )
    parser.add_argument("--size", default="150m", choices=["toy", *RANDOM])
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="toy: from `make demo`")
    parser.add_argument("--clips", type=int, default=50, help="toy: of its test set")
    parser.add_argument("--length", type=int, help="tokens of the answer (toy: as trained; 128)")
    parser.add_argument("--block-length", type=int, help="(toy: half of the answer; else 32)")
    parser.add_argument(
        "--plain-steps", type=int, default=8, help="timed steps of the yardstick; the toy runs all"
    )
    parser.add_argument(
        "--compile-all", action="store_true", help="compile every setting, not only the dual cache"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="toy: also draw WER against time, to this file")
    args = parser.parse_args(arguments)

    toy = args.size == "toy"
    length = args.length or (RECIPES["toy"].answer_length if toy else 128)
    block = args.block_length or (length // 2 if toy else 32)
    half = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype = torch.float32 if toy else getattr(torch, args.dtype or half)

    with one_line_errors("python -m lab.benchmark"):
        base = SamplerConfig(length=length, block_length=block, stop_at_end=False)
        if toy:
            model, batch, transcripts = load_toy(args.run, args.clips, args.device)
            lm = model.lm
            prompts = one_by_one(batch)
        else:
            lm, batch = random_lm(RANDOM[args.size], args.device, dtype)
            prompts = one_by_one(batch)[:1]

    rates = measure_rates(args.device, dtype)
    print(f"{args.size}, {dtype}, {args.device}; {describe(lm, prompts, base, rates)}\n")

    def measure(config: SamplerConfig, *plain: object) -> Row:
        row = time_setting(lm, prompts, config, rates, *plain)
        if toy:
            texts = [decode_answer(model.tokenizer, ids) for ids in row.ids]
            row.wer = word_error_rate(texts, transcripts)
        return row

    threshold = 0.9 if toy else threshold_of_random(lm, prompts[0], block)
    settings = settings_to_time(base, threshold, toy, args.compile_all)
    print_table(measure, base, settings, None if toy else args.plain_steps, c.end_id)

    # Eight prompts at once. On a CPU, random weights of full size would take minutes.
    together = []
    if toy:
        confident = replace(base, rule="threshold", stop_at_end=True)
        together = [replace(confident, cache=cache) for cache in ("none", "dual")]
    elif args.device.startswith("cuda"):
        together = settings[-1:]
    for config in together:
        print(compare_batch(lm, batch, config))

    if args.plot and toy:
        plot_rules(measure, length, args.plot)
        print(args.plot)


if __name__ == "__main__":
    main()
