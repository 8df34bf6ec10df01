"""How fast is each way of sampling, and what does its speed cost? The same weights and prompts.

    python -m lab.benchmark                     150m: random weights, a 30 s clip, CPU or GPU
    python -m lab.benchmark --size toy          the trained toy of `make demo`, with its WER
    python -m lab.benchmark --size llada-8b     LLaDA's shapes with random weights, on a GPU

The yardstick is sampler.generate_plain, the published procedure. lab/roofline.py computes the least
possible time.

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
from checkpoints.model import randomize
from data import build_prompt, decode_answer, load_manifest
from diffa import DIFFA, Spliced, splice
from diffusion_lm import SIZES, DiffusionLM, LMConfig
from evaluation.figure import figure
from evaluation.wer import word_error_rate
from lab.roofline import Rates, clock, floor_of_answer, measure_rates, seconds_of
from sampler import SamplerConfig, generate, generate_plain
from speed.compiled import BUCKET
from speed.few_rows import use_few_rows
from toy.pretrain_lm import ANSWER_LENGTH
from training.states import StateCache

RANDOM = {
    "150m": LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072),
    "llada-8b": SIZES["llada-8b"],
}
POSITIONS = (
    499  # of a random prompt: 439 audio embeddings of a 30 s clip, 30 tokens before, 30 after
)
HEADS = (
    "setting|calls|ms a call|tokens a call|tokens/s|s an answer|speed-up|of roofline|same ids|WER %"
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

    def line(self, yardstick: float) -> str:
        """The row of the table under HEADS. yardstick: seconds that the speed-up is relative to."""
        same = "-" if self.same is None else f"{self.same:.1f} %"
        wer = "-" if self.wer is None else f"{self.wer:.1f}"
        return (
            f"| {self.name} | {self.calls:.1f} | {1000 * self.seconds / self.calls:.1f} "
            f"| {self.tokens / self.calls:.2f} | {self.tokens / self.seconds:.1f} "
            f"| {self.seconds:.3f} | {yardstick / self.seconds:.1f} x "
            f"| {100 * self.floor / self.seconds:.0f} % | {same} | {wer} |"
        )


# ---- models and prompts
def random_lm(config: LMConfig, device: str) -> tuple[DiffusionLM, Spliced]:
    """An LM of random weights, and 8 prompts as for clips of 30 s and shorter."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(config)
    lm = use_few_rows(randomize(lm, dtype, device)).requires_grad_(False)

    embeddings = torch.randn(8, POSITIONS, config.width).to(device, dtype)  # (8, P, D)
    order = torch.arange(POSITIONS, device=device)[None]
    mask = order >= 20 * torch.arange(8, device=device)[:, None]  # (8, P): each 20 shorter
    is_text = mask & ((order < 30) | (order >= POSITIONS - 30))
    return lm, Spliced(embeddings=embeddings, mask=mask, is_text=is_text)


@torch.inference_mode()
def load_toy(run: Path, clips: int, device: str) -> tuple[DIFFA, Spliced, list[str]]:
    """A run's stage-1 model, prompts of its first test clips, and their transcripts."""
    model = DIFFA.from_pretrained(run / "whisper", run / "llada", run / "stage1", device=device)
    items = load_manifest(run / "corpus/asr_test.json")[:clips]
    audio = model.eval().hear(*StateCache(model, items)(items))
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]
    return model, splice(model.lm, prompts, *audio), [item["transcription"] for item in items]


def one_by_one(prompt: Spliced) -> list[Spliced]:
    """Each prompt of a batch alone, without its padding."""
    return [
        Spliced(
            embeddings=prompt.embeddings[i : i + 1, real],
            mask=prompt.mask[i : i + 1, real],
            is_text=prompt.is_text[i : i + 1, real],
        )
        for i, real in enumerate(prompt.mask)
    ]


# ---- settings
def name_of(config: SamplerConfig) -> str:
    """A setting for people."""
    number = f"{config.steps} steps"
    if config.rule != "count":
        number = f"{getattr(config, config.rule):.3g}"
    return f"{config.rule} {number}, {config.cache}{', compiled' if config.compile else ''}"


def settings_of(base: SamplerConfig, threshold: float, trained: bool) -> list[SamplerConfig]:
    """Each rule with each cache; and the dual cache compiled."""
    base = replace(base, stop_at_end=trained)
    few = max(round(base.length / 3.25), base.length // base.block_length)  # 3.25 tokens a call
    fewer_steps = replace(base, steps=few)
    # Random weights are never confident: the factor rule then commits factor - 1 tokens a call.
    rules = [
        base,
        fewer_steps,
        replace(base, rule="threshold", threshold=threshold),
        replace(base, rule="factor", factor=1.0 if trained else 4.25),
    ]

    # Random weights take minutes: leave out most full passes, and rules that cost the same a call.
    by_cache = {"none": rules, "prefix": rules, "dual": rules}
    if not trained:
        by_cache |= {"none": [fewer_steps], "prefix": [base, fewer_steps]}
    eager = [replace(rule, cache=cache) for cache, chosen in by_cache.items() for rule in chosen]
    return [*eager, replace(fewer_steps, cache="dual", compile=True)]


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
    for prompt in [*shapes.values()] * 2:
        generate(lm, prompt, replace(config, steps=steps))


def time_setting(
    lm: DiffusionLM,
    prompts: list[Spliced],
    config: SamplerConfig,
    rates: Rates,
    decode: Callable = generate,
) -> Row:
    """Time one setting on all prompts, one at a time.

    Where `decode` stops early, as generate_plain may, its seconds are scaled up.
    """
    device = str(lm.embedding.weight.device)
    row = Row(name_of(config))
    if config.compile:
        warm_up(lm, prompts, config)

    for prompt in prompts:
        started = clock(device)
        out = decode(lm, prompt, config)
        seconds = clock(device) - started

        made = out.calls.item()
        calls = made if decode is generate else config.steps
        tokens = out.text_tokens.item() if config.stop_at_end else config.length
        P = prompt.embeddings.shape[1]
        row.calls += calls / len(prompts)
        row.seconds += seconds * calls / made / len(prompts)
        row.tokens += tokens / len(prompts)
        row.floor += floor_of_answer(lm, rates, config, P, calls) / len(prompts)
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


def compare_batch(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig) -> str:
    """One line: prompts of unequal length in one batch against the same prompts one by one."""
    device = str(lm.embedding.weight.device)
    singles = one_by_one(prompt)
    alone = torch.cat([generate(lm, single, config).ids for single in singles])
    equal = torch.equal(alone, generate(lm, prompt, config).ids)

    slow = seconds_of(lambda: [generate(lm, single, config) for single in singles], device)
    fast = seconds_of(lambda: generate(lm, prompt, config), device)
    return (
        f"{len(singles)} in one batch, {name_of(config)}: {len(singles) / fast:.2f} answers/s; one "
        f"by one {len(singles) / slow:.2f}; ids {'equal' if equal else 'NOT equal'}"
    )


def plot_rules(measure: Callable[[SamplerConfig], Row], length: int, path: Path) -> None:
    """WER against milliseconds a clip: one line for each rule, one point for each setting."""
    settings = {
        "steps": (length, length // 2, length // 3, length // 4, 4, 3, 2, 1),
        "threshold": (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3),
        "factor": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    }
    with figure(path, size=(5.5, 3.4)) as axis:
        for name, numbers in settings.items():
            rule = "count" if name == "steps" else name
            rows = [measure(SamplerConfig(length=length, rule=rule, **{name: n})) for n in numbers]
            seconds = [1000 * row.seconds for row in rows]
            axis.plot(seconds, [row.wer for row in rows], "o-", label=rule, lw=1, ms=4)

        axis.set(xlabel="milliseconds a clip, one at a time", ylabel="WER (%)", ylim=(0, None))
        axis.legend()


# ---- the command
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
    print(f"| {HEADS.replace('|', ' | ')} |\n{'| --- ' * (HEADS.count('|') + 1)}|")
    yardstick = measure(base, functools.partial(generate_plain, max_steps=max_steps))
    yardstick.name = f"generate_plain, {base.steps} steps"
    print(yardstick.line(yardstick.seconds), flush=True)

    # Answers without a cache are exact; those with one are compared with them.
    exact = {} if max_steps else {("count", base.steps): yardstick.ids}
    for config in settings:
        row = measure(config)
        key = (config.rule, config.steps)
        if config.cache == "none":
            exact.setdefault(key, row.ids)
        if key in exact:
            row.same = agreement(row.ids, exact[key], end_id if config.stop_at_end else None)
        print(row.line(yardstick.seconds), flush=True)


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.benchmark"
    parser = argparse.ArgumentParser(prog=name, description="How fast is each way of sampling?")
    parser.add_argument("--size", default="150m", choices=["toy", *RANDOM])
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="toy: from `make demo`")
    parser.add_argument("--clips", type=int, default=50, help="toy: of its test set (default 50)")
    parser.add_argument("--length", type=int, help="of answers (default: toy as trained; 128)")
    parser.add_argument("--block-length", type=int, help="default: toy half of the answer; 32")
    parser.add_argument("--plain-steps", type=int, default=8, help="of the yardstick (toy: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="toy: also draw WER against time, here")
    args = parser.parse_args(arguments)

    # Models, prompts, and a threshold that about three tokens a call pass.
    toy = args.size == "toy"
    length = args.length or (ANSWER_LENGTH if toy else 128)
    block_length = args.block_length or (length // 2 if toy else 32)
    with one_line_errors(name):
        base = SamplerConfig(length=length, block_length=block_length, stop_at_end=False)
        if toy:
            model, batch, transcripts = load_toy(args.run, args.clips, args.device)
            lm = model.lm
            prompts = one_by_one(batch)
            threshold = 0.9
        else:
            lm, batch = random_lm(RANDOM[args.size], args.device)
            prompts = one_by_one(batch)[:1]
            threshold = threshold_of_random(lm, prompts[0], block_length)

    dtype = lm.embedding.weight.dtype
    rates = measure_rates(args.device, dtype)
    print(
        f"{args.size}, {dtype}, {args.device}, {torch.get_num_threads()} threads; {len(prompts)} "
        f"prompts of {prompts[0].embeddings.shape[1]} positions, answers of {length} in blocks of "
        f"{block_length}; {rates.bandwidth / 1e9:.1f} GB/s, {rates.flops / 1e9:.0f} GFLOP/s\n"
    )

    def measure(config: SamplerConfig, decode: Callable = generate) -> Row:
        row = time_setting(lm, prompts, config, rates, decode)
        if toy:
            texts = [decode_answer(model.tokenizer, ids) for ids in row.ids]
            row.wer = word_error_rate(texts, transcripts)
        return row

    settings = settings_of(base, threshold, toy)
    print_table(measure, base, settings, None if toy else args.plain_steps, lm.config.end_id)

    # One batch. On a CPU, random weights of full size would take minutes.
    if toy or args.device.startswith("cuda"):
        eight = {name: value[:8] for name, value in vars(batch).items()}
        print(f"\n{compare_batch(lm, Spliced(**eight), settings[-1])}")
    if toy and args.plot:
        plot_rules(measure, length, args.plot)


if __name__ == "__main__":
    main()
