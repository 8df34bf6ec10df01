"""How fast is each way of sampling, and what does its speed cost? One process, the same weights, the same prompts.

    python sampler.py --benchmark                     150m: random weights, a 30 s clip, CPU or GPU
    python sampler.py --benchmark --size toy          the trained toy of `make demo`, with its word error rate
    python sampler.py --benchmark --size llada-8b     LLaDA's shapes with random weights, on a GPU

The yardstick is `reference`, the published procedure written down plainly. The floor of a call is the greater of its
bytes over the bandwidth and its FLOPs over the rate of matrix products, counted from the shapes, both rates measured here.

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, M positions through the model, N block length, D width.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data import StateCache, build_prompt, decode_answer, load_manifest, word_error_rate
from diffa import DIFFA, Spliced
from diffusion_lm import SIZES, DiffusionLM, LMConfig
from sampler import SamplerConfig, generate, shares

RANDOM = {"150m": LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072), "llada-8b": SIZES["llada-8b"]}
HEADS = ("setting", "calls", "ms a call", "tokens a call", "tokens/s", "s an answer", "speed-up", "of roofline", "same ids", "word errors %")


@dataclass
class Row:
    """What a setting did to all prompts, a mean an item each; None: not measured."""

    name: str
    calls: float
    seconds: float
    tokens: float  # positions filled, or real text where the stop at its end is on
    floor: float  # seconds
    ids: list[list[int]] | None = None
    same: float | None = None
    errors: float | None = None

    def cells(self, base: float) -> list[str]:
        optional = ["-" if x is None else f"{x:.1f}" for x in (None if self.same is None else 100 * self.same, self.errors)]
        return [
            self.name, f"{self.calls:.1f}", f"{1000 * self.seconds / self.calls:.1f}", f"{self.tokens / self.calls:.2f}",
            f"{self.tokens / self.seconds:.1f}", f"{self.seconds:.3f}", f"{base / self.seconds:.1f} x",
            f"{100 * self.floor / self.seconds:.0f} %", optional[0] + (" %" if self.same is not None else ""), optional[1],
        ]  # fmt: skip


# The yardstick


@torch.no_grad()
def reference(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, at_most: int | None = None) -> tuple[Tensor, int]:
    """LLaDA's sampler as DIFFA publishes it, for one item: ids (1, G), and the steps taken, `at_most` of them.

    Every step runs the whole sequence, scores every position, and takes a softmax in float64 of all of them.
    """
    P, G, N = prompt.embeddings.shape[1], config.length, config.block_length
    sound = bool((~prompt.is_text).any())
    x = torch.full((1, P + G), lm.config.mask_id, device=prompt.embeddings.device)
    x[:, :P] = -1  # whatever stands in the prompt is no mask
    n_blocks, done = G // N, 0
    for block in range(n_blocks):
        end = P + (block + 1) * N
        counts = shares(N, shares(config.steps, n_blocks)[block])
        for count in counts:
            if done == at_most:
                return x[:, P:], done
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
    return x[:, P:], done


# The floor


@dataclass(frozen=True)
class Machine:
    """Bytes a second read from memory, and FLOPs a second of matrix products in the model's dtype."""

    bandwidth: float
    rate: float


def seconds_of(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median seconds of work(), after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Both rates on the spot, the best of several tries: a floor must not be flattered by a busy machine."""
    large = torch.ones(2**28, dtype=torch.uint8, device=device).view(torch.float32)  # 256 MiB
    n = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    bandwidth = max(2**28 / seconds_of(large.sum, device, 3) for _ in range(5))
    return Machine(bandwidth, max(2 * n**3 / seconds_of(lambda: F.linear(a, b), device, 3) for _ in range(5)))


def floor(c: LMConfig, dtype: torch.dtype, machine: Machine, B: int, M: int, L: int, N: int) -> float:
    """Least seconds of one call in which M of L positions pass through and N are scored, B items."""
    keyed = 2 * c.width * c.n_kv_heads * c.head_dim  # key and value weights of a block
    other = 2 * c.width * c.n_heads * c.head_dim + 3 * c.width * c.ffn  # query, out; gate, up, down
    rows = M * (c.n_layers - 1) + N  # the last block computes nothing else for rows that are not scored
    flops = 2 * B * (M * c.n_layers * keyed + rows * other + N * c.vocab * c.width)
    flops += 4 * B * rows * L * c.n_heads * c.head_dim  # queries by keys, weights by values
    numbers = c.n_layers * (keyed + other) + c.vocab * c.width  # weights
    numbers += 2 * B * c.n_layers * (L + M) * c.n_kv_heads * c.head_dim  # keys and values, read and written
    return max(numbers * dtype.itemsize / machine.bandwidth, flops / machine.rate)


def floor_of_answer(lm: DiffusionLM, machine: Machine, config: SamplerConfig, P: int, calls: float) -> float:
    """Least seconds of an answer; calls after those that open a block are taken as spread evenly over the blocks."""
    G, N, dtype = config.length, config.block_length, lm.embedding.weight.dtype
    n_blocks = G // N
    full = floor(lm.config, dtype, machine, 1, P + G, P + G, N)
    if config.cache == "none":
        return calls * full
    widths = [G - start if config.cache == "prefix" else N for start in range(0, G, N)]  # positions that pass through
    again = statistics.mean(floor(lm.config, dtype, machine, 1, M, P + G, N) for M in widths)
    opened = min(n_blocks, calls)
    return opened * full + (calls - opened) * again


@torch.no_grad()
def matrix_products(lm: DiffusionLM, M: int, L: int) -> Callable[[], None]:
    """The matrix products of a block step of M positions among L, and nothing else."""
    c, like = lm.config, lm.embedding.weight
    x, wide = like.new_ones(1, M, c.width), like.new_ones(1, M, c.ffn)
    heads = like.new_ones(1, M, c.n_heads * c.head_dim)
    q = like.new_ones(1, c.n_heads, M, c.head_dim)
    k, p = like.new_ones(1, c.n_heads, L, c.head_dim), like.new_ones(1, c.n_heads, M, L)

    @torch.no_grad()
    def work() -> None:
        for block in lm.blocks:
            for linear, given in ((block.query, x), (block.key, x), (block.value, x), (block.gate, x), (block.up, x)):
                F.linear(given, linear.weight)
            q @ k.transpose(-1, -2), p @ k
            F.linear(heads, block.out.weight), F.linear(wide, block.down.weight)
        F.linear(x, lm.unembedding.weight)

    return work


# The race


def name_of(config: SamplerConfig) -> str:
    number = {"count": f"{config.steps} steps", "threshold": f"{config.threshold:.3g}", "factor": f"{config.factor:.3g}"}[config.rule]
    return f"{config.rule} {number}, {config.cache}{', compiled' if config.compile else ''}"


def race(lm: DiffusionLM, prompts: list[Spliced], config: SamplerConfig, machine: Machine) -> Row:
    """One setting on all prompts, one at a time."""
    device = str(lm.embedding.weight.device)
    if config.compile:  # warm: every shape once, or what is timed is the compiler
        shapes = {-(-prompt.embeddings.shape[1] // 64): prompt for prompt in prompts}
        for prompt in shapes.values():
            for _ in range(2 if device.startswith("cuda") else 1):
                n_blocks = config.length // config.block_length
                warm = replace(config, steps=min(2 * n_blocks, config.length)) if config.rule == "count" else config
                generate(lm, prompt, warm)
    ids, calls, tokens, seconds, least = [], 0, 0, 0.0, 0.0
    for prompt in prompts:
        wait(device)
        started = time.perf_counter()
        out = generate(lm, prompt, config)
        wait(device)
        seconds += time.perf_counter() - started
        ids.append(out.ids[0].tolist())
        calls += out.steps.item()
        tokens += out.text_tokens.item() if config.stop_at_end else config.length
        least += floor_of_answer(lm, machine, config, prompt.embeddings.shape[1], out.steps.item())
    n = len(prompts)
    return Row(name_of(config), calls / n, seconds / n, tokens / n, least / n, ids)


def race_reference(lm: DiffusionLM, prompts: list[Spliced], config: SamplerConfig, machine: Machine, at_most: int | None) -> Row:
    """The yardstick; when cut short, its time is scaled up, since each step costs the same. Its floor is that of cache none."""
    ids, seconds, least, device = [], 0.0, 0.0, str(lm.embedding.weight.device)
    for prompt in prompts:
        wait(device)
        started = time.perf_counter()
        found, steps = reference(lm, prompt, config, at_most)
        wait(device)
        seconds += (time.perf_counter() - started) * config.steps / steps
        ids.append(found[0].tolist())
        least += floor_of_answer(lm, machine, config, prompt.embeddings.shape[1], config.steps)
    n, whole = len(prompts), at_most is None or at_most >= config.steps
    return Row(f"reference, {config.steps} steps", config.steps, seconds / n, config.length, least / n, ids if whole else None)


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of positions at which two answers have the same token."""
    return statistics.mean(x == y for one, other in zip(a, b) for x, y in zip(one, other))


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)
