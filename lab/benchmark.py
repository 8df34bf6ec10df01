"""How fast is each way of sampling, and what does its speed cost? One process, the same weights, the same prompts.

    python -m lab.benchmark                     150m: random weights, a 30 s clip, CPU or GPU
    python -m lab.benchmark --size toy          the trained toy of `make demo`, with its word error rate
    python -m lab.benchmark --size llada-8b     LLaDA's shapes with random weights, on a GPU

The yardstick is `reference`, the published procedure written down plainly; the floor of what is possible is in roofline.py.

Shapes: P prompt positions, G answer tokens, L = P + G, N block length, D width, V vocabulary.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from training.clips import StateCache
from data import load_manifest, word_error_rate
from checkpoints.tokenizer import build_prompt, decode_answer
from diffa import DIFFA, Spliced
from diffusion_lm import SIZES, DiffusionLM, LMConfig
from toy.grammar import ANSWER_LENGTH
from lab.roofline import Machine, clock, floor, floor_of_answer, matrix_products, measure_machine, seconds_of
from sampler import BUCKET, Generation, SamplerConfig, compiled_refine, generate, refine, shares

RANDOM = {"150m": LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072), "llada-8b": SIZES["llada-8b"]}
HEADS = ("setting", "calls", "ms a call", "tokens a call", "tokens/s", "s an answer", "speed-up", "of roofline", "same ids", "word errors %")


@dataclass
class Row:
    """What a setting did to all prompts, means an item; None: not known."""

    name: str
    calls: float
    seconds: float
    tokens: float  # positions filled, or real text where the sampler stops at its end
    floor: float  # seconds
    ids: list[list[int]]
    same: float | None = None  # share of positions as in the exact answer
    errors: float | None = None  # word error rate, percent

    def cells(self, base: float) -> list[str]:
        return [
            self.name, f"{self.calls:.1f}", f"{1000 * self.seconds / self.calls:.1f}", f"{self.tokens / self.calls:.2f}",
            f"{self.tokens / self.seconds:.1f}", f"{self.seconds:.3f}", f"{base / self.seconds:.1f} x",
            f"{100 * self.floor / self.seconds:.0f} %", "-" if self.same is None else f"{100 * self.same:.1f} %",
            "-" if self.errors is None else f"{self.errors:.1f}",
        ]  # fmt: skip


# The yardstick


@torch.no_grad()
def reference(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, at_most: int | None = None) -> Generation:
    """LLaDA's sampler as DIFFA publishes it, for one item, stopped after `at_most` steps.

    Every step runs the whole sequence, scores every position, and takes a softmax in float64 of all of them.
    """
    started, P, G, N = time.perf_counter(), prompt.embeddings.shape[1], config.length, config.block_length
    sound = bool((~prompt.is_text).any())
    x = torch.full((1, P + G), lm.config.mask_id, device=prompt.embeddings.device)
    x[:, :P] = -1  # whatever stands in the prompt is no mask
    n_blocks, done = G // N, 0
    for block in range(n_blocks):
        end = P + (block + 1) * N
        counts = shares(N, shares(config.steps, n_blocks)[block])
        for count in counts:
            if done == at_most:
                break
            embeddings = torch.cat([prompt.embeddings, lm.embed(x[:, P:])], dim=1)
            if sound:
                embeddings = embeddings.bfloat16().to(embeddings.dtype)
            logits = lm.head(lm(embeddings))  # (1, L, V)
            x0 = logits.argmax(dim=-1)
            p = F.softmax(logits.to(torch.float64), dim=-1)
            x0_p = p.gather(-1, x0[..., None])[..., 0]  # (1, L)
            x0_p[:, end:] = -torch.inf
            mask_index = x == lm.config.mask_id
            confidence = torch.where(mask_index, x0_p, -torch.inf)
            chosen = confidence[0].topk(count).indices
            x[0, chosen] = x0[0, chosen]
            done += 1
    return Generation(x[:, P:], torch.tensor([done]), torch.tensor([G]), time.perf_counter() - started)


# The race


def name_of(config: SamplerConfig) -> str:
    number = {"count": f"{config.steps} steps", "threshold": f"{config.threshold:.3g}", "factor": f"{config.factor:.3g}"}[config.rule]
    return f"{config.rule} {number}, {config.cache}{', compiled' if config.compile else ''}"


def race(lm: DiffusionLM, prompts: list[Spliced], config: SamplerConfig, machine: Machine, answer: Callable = generate) -> Row:
    """One setting on all prompts, one at a time. An answer cut short is scaled up: each of its steps costs the same."""
    device, n = str(lm.embedding.weight.device), len(prompts)
    if config.compile:  # every shape twice, or what is timed is the compiler
        for prompt in {-(-prompt.embeddings.shape[1] // BUCKET): prompt for prompt in prompts}.values():
            n_blocks = config.length // config.block_length
            for _ in range(2):
                generate(lm, prompt, replace(config, steps=min(2 * n_blocks, config.length)))
    row = Row(name_of(config), 0, 0, 0, 0, [])
    for prompt in prompts:
        started = clock(device)
        out = answer(lm, prompt, config)
        seconds, calls = clock(device) - started, out.steps.item()
        whole = config.steps if answer is not generate else calls
        row.seconds += seconds * whole / calls / n
        row.calls += whole / n
        row.tokens += (out.text_tokens.item() if config.stop_at_end else config.length) / n
        row.floor += floor_of_answer(lm, machine, config, prompt.embeddings.shape[1], whole) / n
        row.ids.append(out.ids[0].tolist())
    return row


def agreement(a: list[list[int]], b: list[list[int]], end_id: int | None) -> float:
    """Share of positions at which two answers have the same token; past the end of b's text only if end_id is None."""
    pairs = [pair for one, other in zip(a, b) for pair in zip(one, other[: other.index(end_id) + 1] if end_id in other else other)]
    return statistics.mean(x == y for x, y in pairs)


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def settings_of(length: int, block: int, confident: bool, tau: float, compile_all: bool) -> list[SamplerConfig]:
    """What races: each rule with each cache, eager and compiled; confident: the model is trained, so thresholds mean something."""
    base = SamplerConfig(length, block, length, stop_at_end=confident)
    few = max(round(length / 3.25), length // block)  # steps at 3.25 tokens a call
    rules = [base, replace(base, steps=few), replace(base, rule="threshold", threshold=tau)]
    # Without confidence the factor rule commits factor - 1 tokens a call.
    rules.append(replace(base, rule="factor", factor=1.0 if confident else 4.25))
    eager = [replace(rule, cache=cache) for cache in ("none", "prefix", "dual") for rule in rules]
    if not confident:  # what tells nothing new takes minutes: whole passes, and other rules than count where calls cost the same
        eager = [c for c in eager if c.cache == "dual" or c.rule == "count" and (c.cache == "prefix" or c.steps == few)]
    compiled = eager if compile_all else [c for c in eager if c.cache == "dual" and c.steps == few]
    return eager + [replace(config, compile=True) for config in compiled]


def random_lm(size: str, device: str, dtype: torch.dtype) -> tuple[DiffusionLM, Spliced]:
    """A model of random weights, and 8 prompts: 439 audio embeddings between 60 tokens, as of a 30 s clip; then ever shorter ones."""
    config = RANDOM[size]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        lm = DiffusionLM(config).eval().requires_grad_(False)
        embeddings = torch.randn(8, 499, config.width)
        torch.set_default_dtype(torch.float32)
        order = torch.arange(499)[None]
        mask = order >= 20 * torch.arange(8)[:, None]  # (8, 499)
    return lm, Spliced(embeddings, mask, mask & ((order < 30) | (order >= 469)))


def load_toy(run: Path, clips: int, device: str) -> tuple[DIFFA, Spliced, list[str]]:
    """The trained stage-1 model of a run, prompts of its first test clips, and what was said in them."""
    model = DIFFA.from_pretrained(run / "whisper", run / "llada", run / "stage1", device=device).eval()
    items = load_manifest(run / "corpus/asr_test.json")[:clips]
    with torch.no_grad():
        heard = model.hear(*StateCache(model, items)(items))
        batch = model.splice([build_prompt(model.tokenizer, item["input"]) for item in items], *heard)
    return model, batch, [item["transcription"] for item in items]


def singles(batch: Spliced) -> list[Spliced]:
    """Each prompt alone, without its padding."""
    fields = (batch.embeddings, batch.mask, batch.is_text)
    return [Spliced(*(field[i : i + 1, real] for field in fields)) for i, real in enumerate(batch.mask)]


def race_batch(lm: DiffusionLM, batch: Spliced, config: SamplerConfig) -> str:
    """A line on 8 prompts at once against the same one by one."""
    device, eight = str(lm.embedding.weight.device), Spliced(batch.embeddings[:8], batch.mask[:8], batch.is_text[:8])
    alone = [generate(lm, prompt, config) for prompt in singles(eight)]
    both = generate(lm, eight, config)
    same = all(torch.equal(one.ids[0], ids) for one, ids in zip(alone, both.ids))
    slow = seconds_of(lambda: [generate(lm, prompt, config) for prompt in singles(eight)], device)
    fast = seconds_of(lambda: generate(lm, eight, config), device)
    return (
        f"8 of unequal length at once, {name_of(config)}: {8 / fast:.2f} answers/s; one by one {8 / slow:.2f}; "
        f"{slow / fast:.1f} x; ids {'equal' if same else 'NOT equal'}"
    )


def race_block_step(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, machine: Machine) -> None:
    """Prints one cached call, eager and compiled, beside its matrix products alone and its floor, measured in turns."""
    device, G, N = prompt.embeddings.device, config.length, config.block_length
    pad = -prompt.embeddings.shape[1] % BUCKET  # the shapes that the sampler compiles
    P = prompt.embeddings.shape[1] + pad
    L, cache, everywhere = P + G, lm.new_cache(1, P + G, fixed=True), torch.arange(P + G, device=device)
    for tensor in (tensor for pair in cache for tensor in pair):
        tensor.normal_()
    real, one = everywhere[None] >= pad, torch.tensor(1.0, device=device)
    block = torch.full((1, N), lm.config.mask_id, device=device)
    full = torch.cat([F.pad(prompt.embeddings, (0, 0, pad, 0)), lm.embed(block.repeat(1, G // N))], dim=1)  # (1, L, D)
    of = {  # name: positions that pass through, and the arguments of `refine`
        "block step": (N, (full[:, P : P + N], block, real, cache, everywhere[P : P + N], everywhere[:N], "count", one, None, None, None)),
        "full pass": (L, (full, block, real, cache, everywhere, everywhere[P : P + N], "count", one, None, None, None)),
    }

    @torch.no_grad()
    def call(run: Callable, arguments: tuple) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(lm, *arguments)

    for name, (M, arguments) in of.items():
        works = {"its matrix products alone": matrix_products(lm, M, L, N)}
        works |= {kind: lambda run=run: call(run, arguments) for kind, run in (("eager", refine), ("compiled", compiled_refine(device.type)))}
        times = {kind: [] for kind in works}
        for _ in range(9 if M == N else 3):
            for kind, work in works.items():
                times[kind].append(seconds_of(work, str(device), 1))
        least = floor(lm, machine, M, L, N)
        medians = {kind: statistics.median(taken) for kind, taken in times.items()}
        print(f"{name}: floor {1000 * least:.1f} ms; " + "; ".join(
            f"{kind} {1000 * t:.1f} ms, {t / least:.2f} x the floor, {t / medians['its matrix products alone']:.2f} x the products" for kind, t in medians.items()
        ))  # fmt: skip


def plot_sampling(race_one: Callable[[SamplerConfig], Row], length: int, path: Path) -> None:
    """Word error rate against seconds a clip, a line a rule, several settings each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    numbers = {
        "count": {"steps": (length, length // 2, length // 3, length // 4, 4, 3, 2, 1)},
        "threshold": {"threshold": (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)},
        "factor": {"factor": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)},
    }
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for rule, setting in numbers.items():
        ((name, values),) = setting.items()
        rows = [race_one(SamplerConfig(length, length, **({"steps": length, "rule": rule} | {name: value}))) for value in values]
        axis.plot([1000 * row.seconds for row in rows], [row.errors for row in rows], "o-", label=rule, lw=1, ms=4)
    axis.set(xlabel="milliseconds a clip, one at a time", ylabel="word error rate (%)", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmark", description="How fast is each way of sampling?")
    parser.add_argument("--size", default="150m", choices=["toy", *RANDOM])
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="of the toy: what `make demo` wrote")
    parser.add_argument("--clips", type=int, default=50, help="of the toy's test set")
    parser.add_argument("--length", type=int, help="tokens of the answer (toy: as trained, else 128)")
    parser.add_argument("--block-length", type=int, help="tokens of a block (toy: half of the answer, else 32)")
    parser.add_argument("--reference-steps", type=int, default=8, help="how many steps of the reference are timed; the toy runs all")
    parser.add_argument("--compile-all", action="store_true", help="compile every variant, not the dual cache alone (minutes)")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="of the toy: also draw error rate against seconds, here")
    args = parser.parse_args(arguments)
    toy = args.size == "toy"
    length = args.length or (ANSWER_LENGTH if toy else 128)
    block = args.block_length or (length // 2 if toy else 32)
    dtype = torch.float32 if toy else getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    model, meant = None, []
    try:
        base = SamplerConfig(length, block, length, stop_at_end=False)
        if toy:
            model, batch, meant = load_toy(args.run, args.clips, args.device)
            lm, prompts = model.lm, singles(batch)
        else:
            lm, batch = random_lm(args.size, args.device, dtype)
            prompts = singles(batch)[:1]
    except ValueError as error:
        raise SystemExit(f"benchmark: {error}") from None
    c, machine = lm.config, measure_machine(args.device, dtype)

    def texts_of(row: Row) -> list[str]:
        return [decode_answer(model.tokenizer, ids) for ids in row.ids]

    def race_one(config: SamplerConfig, answer: Callable = generate) -> Row:
        row = race(lm, prompts, config, machine, answer)
        row.errors = word_error_rate(texts_of(row), meant) if toy else None
        return row

    print(
        f"{args.size}: width {c.width}, {c.n_layers} blocks, V {c.vocab}, {dtype}, {args.device}, {torch.get_num_threads()} threads; "
        f"{len(prompts)} prompts of {prompts[0].embeddings.shape[1]} positions, answers of {length} in blocks of {block}\n"
        f"measured: {machine.bandwidth / 1e9:.1f} GB/s read, {machine.rate / 1e9:.0f} GFLOP/s in matrix products\n"
    )
    tau = 0.9
    if not toy:  # a random model is sure of nothing: take the threshold that about 3 tokens of its first block pass
        first = generate(lm, prompts[0], SamplerConfig(block, block, 1, stop_at_end=False), trace=True).trace[0][1]
        tau = first[0].sort(descending=True).values[3].item()
    for cells in (HEADS, ["---"] * len(HEADS)):
        print_row(cells)
    cut = None if toy else args.reference_steps
    yardstick = race_one(base, lambda *arguments: reference(*arguments, cut))
    yardstick.name = f"reference, {length} steps"
    print_row(yardstick.cells(yardstick.seconds))
    exact = {} if cut else {("count", length): yardstick.ids}  # (rule, steps): ids without a cache
    for config in settings_of(length, block, toy, tau, args.compile_all):
        row, key = race_one(config), (config.rule, config.steps)
        if config.cache == "none" and not config.compile:
            exact.setdefault(key, row.ids)
        row.same = agreement(row.ids, exact[key], c.end_id if config.stop_at_end else None) if key in exact else None
        print_row(row.cells(yardstick.seconds))
    print()
    race_block_step(lm, prompts[0], base, machine)
    if toy:
        whole, stopped = (race_one(SamplerConfig(length, block, length, "threshold", stop_at_end=stop)) for stop in (False, True))
        same = "equal" if texts_of(whole) == texts_of(stopped) else "NOT equal"
        print(f"stop at the end of the text: {stopped.calls:.1f} calls instead of {whole.calls:.1f}, texts {same}")
    if toy:
        several = [replace(base, rule="threshold", stop_at_end=True), replace(base, stop_at_end=True)]
        several = [replace(rule, cache=cache) for rule in several for cache in ("none", "dual")]
    else:
        several = [replace(base, steps=round(length / 3.25), cache="dual", compile=True)] if args.device.startswith("cuda") else []
    for config in several:
        print(race_batch(lm, batch, config))
    if toy and args.plot:
        plot_sampling(race_one, length, args.plot)


if __name__ == "__main__":
    main()
