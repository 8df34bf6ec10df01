"""The least time that a call of the language model can take on this machine.

A call reads every weight once and multiplies matrices: its floor is the greater of its bytes over the bandwidth of the
memory and its FLOPs over the rate of matrix products. Both are counted from the shapes; both rates are measured here.

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, M positions through the model, N positions scored.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from diffusion_lm import DiffusionLM, LMConfig, linear
from sampler import SamplerConfig


SIZE = {"cpu": (2**28, 1024), "cuda": (2**32, 8192)}  # bytes summed, side of the matrices multiplied


@dataclass(frozen=True)
class Machine:
    """Bytes a second read from memory, and FLOPs a second of matrix products in the model's dtype."""

    bandwidth: float
    rate: float


def clock(device: str) -> float:
    """Seconds now, all work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median seconds of work(), after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = clock(device)
        work()
        times.append(clock(device) - started)
    return statistics.median(times)


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Both rates on the spot, the best of several tries: a floor must not be flattered by a busy machine."""
    n_bytes, n = SIZE["cuda" if device.startswith("cuda") else "cpu"]
    large = torch.ones(n_bytes, dtype=torch.uint8, device=device).view(torch.float32)
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    bandwidth = max(n_bytes / seconds_of(large.sum, device) for _ in range(5))
    return Machine(bandwidth, max(2 * n**3 / seconds_of(lambda: F.linear(a, b), device) for _ in range(5)))


def work_of(c: LMConfig, B: int, M: int, L: int, N: float) -> tuple[float, float]:
    """FLOPs, and numbers read and written, of one call in which M of L positions pass through and N are scored, B items."""
    keyed = 2 * c.width * c.n_kv_heads * c.head_dim  # key and value weights of a block
    other = 2 * c.width * c.n_heads * c.head_dim + 3 * c.width * c.ffn  # query, out; gate, up, down
    rows = M * (c.n_layers - 1) + N  # the last block computes nothing else for rows that are not scored
    flops = 2 * B * (M * c.n_layers * keyed + rows * other + N * c.vocab * c.width)
    flops += 4 * B * rows * L * c.n_heads * c.head_dim  # queries by keys, weights by values
    weights = c.n_layers * (keyed + other) + c.vocab * c.width
    return flops, weights + 2 * B * c.n_layers * (L + M) * c.n_kv_heads * c.head_dim  # keys and values: read all, written M


def floor(lm: DiffusionLM, machine: Machine, M: int, L: int, N: float) -> float:
    """Least seconds of one call for one item; arguments as in work_of."""
    flops, numbers = work_of(lm.config, 1, M, L, N)
    return max(numbers * lm.embedding.weight.dtype.itemsize / machine.bandwidth, flops / machine.rate)


def floor_of_answer(lm: DiffusionLM, machine: Machine, config: SamplerConfig, P: int, calls: float) -> float:
    """Least seconds of an answer; calls after those that open a block are taken as spread evenly over the blocks."""
    G, N = config.length, config.block_length
    n_blocks = G // N
    share = min(n_blocks / calls, 1)  # of the calls that open a block; of a block's k calls the i-th finds 1 - i / k of it waiting
    scored = N if config.compile else N * (1 + share) / 2
    full = floor(lm, machine, P + G, P + G, scored)
    if config.cache == "none":
        return calls * full
    widths = [G - start if config.cache == "prefix" else N for start in range(0, G, N)]  # positions that pass through
    again = statistics.mean(floor(lm, machine, M, P + G, scored) for M in widths)
    return calls * (share * full + (1 - share) * again)


@torch.no_grad()
def matrix_products(lm: DiffusionLM, M: int, L: int, N: int) -> Callable[[], None]:
    """The matrix products of a call in which M of L positions pass through and N are scored, and nothing else."""
    c, like = lm.config, lm.embedding.weight
    k = like.new_ones(1, c.n_heads, L, c.head_dim)
    ones = {(m, width): like.new_ones(1, m, width) for m in (M, N) for width in (c.width, c.ffn, c.n_heads * c.head_dim)}
    shares_of = {m: like.new_ones(1, c.n_heads, m, L) for m in (M, N)}  # of attention

    @torch.no_grad()
    def work() -> None:
        for block in lm.blocks:
            m = N if block is lm.blocks[-1] else M  # the last block computes but keys and values for rows that are not scored
            for layer, rows in ((block.key, M), (block.value, M), (block.query, m), (block.gate, m), (block.up, m)):
                linear(layer, ones[rows, c.width])
            q = ones[m, c.n_heads * c.head_dim]
            q.view(1, m, c.n_heads, c.head_dim).transpose(1, 2) @ k.transpose(-1, -2), shares_of[m] @ k
            linear(block.out, q), linear(block.down, ones[m, c.ffn])
        lm.head(ones[N, c.width])

    return work
