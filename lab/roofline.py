"""The least time that one call of the language model can take on this machine.

A call reads every weight once and multiplies matrices. Its floor is the greater of two times: its
bytes over the memory's bandwidth, and its FLOPs over the rate of matrix products. Work is counted
from the shapes (training/flops.py); both rates are measured.

Shapes: P prompt positions, G answer tokens, L = P + G, M positions that pass through, N positions
that are scored.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lm import DiffusionLM
from sampler import SamplerConfig, blocks_of
from training.flops import block_weights, lm_flops, measured_peak

BYTES_READ = {"cpu": 2**28, "cuda": 2**32}  # by the measurement of the bandwidth


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine can do with the model's dtype."""

    bandwidth: float  # bytes a second, read from memory
    flops: float  # FLOP/s of matrix products


def clock(device: torch.device) -> float:
    """Seconds now, when the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turns(
    works: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each work over some rounds, by name: a slow minute affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work()  # warms up: it may compile, and it brings its weights near
            started = clock(device)
            work()
            times[name].append(clock(device) - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Both rates, the best of several tries, since a busy machine would flatter the sampler."""
    n_bytes = BYTES_READ[device.type]
    large = torch.ones(n_bytes, dtype=torch.uint8, device=device).view(torch.float32)
    times = []
    for _ in range(8):
        started = clock(device)
        large.sum()
        times.append(clock(device) - started)
    return Rates(bandwidth=n_bytes / min(times), flops=measured_peak(device, dtype))


def floor_of_call(lm: DiffusionLM, rates: Rates, M: int, L: int, N: float, B: int = 1) -> float:
    """Least seconds of one call for B items: M of L positions pass through, N are scored."""
    c = lm.config
    weights = c.n_layers * sum(block_weights(c)) + c.vocab * c.width
    cached = 2 * B * c.n_layers * (L + M) * c.n_kv_heads * c.head_dim  # L read, M written
    n_bytes = (weights + cached) * lm.embedding.weight.dtype.itemsize
    return max(n_bytes / rates.bandwidth, lm_flops(c, B, M, L, N) / rates.flops)


def floor_of_answer(
    lm: DiffusionLM, rates: Rates, config: SamplerConfig, P: int, calls: float, B: int = 1
) -> float:
    """Least seconds of B answers at once, in `calls` calls; each block is taken to need as many."""
    G = config.length
    N = config.block_length
    opening = min(config.n_blocks / calls, 1)  # fraction of the calls that open a block

    # The i-th of a block's k calls scores the 1 - i / k of it that is still masked. Compiled calls
    # score the whole block.
    scored = G / config.n_blocks * (1 if config.compile else (1 + opening) / 2)
    appends = lm.config.appends if config.append is None else config.append
    ends = [block.stop for block, _ in blocks_of(config)] if appends else [G]
    full = statistics.mean(floor_of_call(lm, rates, P + n, P + n, scored, B) for n in ends)
    if config.cache == "none":
        return calls * full

    # With a cache, the other calls pass only the block, or all from the block on.
    rest = range(G, 0, -N)
    widths = rest if config.cache == "prefix" else [min(N, width) for width in rest]
    cached = statistics.mean(floor_of_call(lm, rates, M, P + G, scored, B) for M in widths)

    # Where blocks share a prompt, only the first of them opens with a full pass.
    fresh = -(-config.n_blocks // config.refresh) / config.n_blocks
    kept = floor_of_call(lm, rates, G, P + G, scored, B) if config.refresh > 1 else full
    opened = fresh * full + (1 - fresh) * kept
    return calls * (opening * opened + (1 - opening) * cached)


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as a CUDA graph, which no launch from the host delays; on a CPU the work."""
    if device.type == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # what the work reads is being written there
    with torch.cuda.stream(side):  # libraries start before the recording
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(reads: Callable = work) -> None:
        # A graph knows the memory that it reads by address: `work` must keep it.
        graph.replay()

    return replay


def matrix_products(lm: DiffusionLM, M: int, L: int, N: int) -> Callable[[], None]:
    """The matrix products of one call for one item, and nothing else; arguments as above."""
    c = lm.config
    widest = max(c.width, c.ffn, c.n_heads * max(c.head_dim, M))
    memory = lm.embedding.weight.new_ones(L * widest)

    def ones(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    products: list[tuple[Callable, Tensor]] = []
    for block in lm.blocks:
        attn = block.attn
        mlp = block.mlp

        # The last block computes only keys and values for rows that are not scored.
        rows = N if block is lm.blocks[-1] else M
        layers = [(attn.key, M), (attn.value, M), (attn.query, rows), (attn.out, rows)]
        layers += [(mlp.gate, rows), (mlp.up, rows), (mlp.down, rows)]
        products += [(layer, ones(n, layer.in_features)) for layer, n in layers]

        # Queries by keys, and attention weights by values.
        products.append((ones(c.n_heads, rows, c.head_dim).matmul, ones(c.n_heads, c.head_dim, L)))
        products.append((ones(c.n_heads, rows, L).matmul, ones(c.n_heads, L, c.head_dim)))
    products.append((lm.head, ones(N, c.width)))

    @torch.no_grad()
    def multiply() -> None:
        for product, x in products:
            product(x)

    return multiply
