"""The least time that one call of the language model can take on this machine.

A call reads every weight once and multiplies matrices. Its floor is the greater of two times: its
bytes over the memory's bandwidth, and its FLOPs over the rate of matrix products. Work is counted
from the shapes (training/flops.py); both rates are measured.

Shapes: P prompt positions, G answer tokens, L = P + G, M positions that pass through, N positions
that are scored.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion_lm import DiffusionLM, LMConfig
from sampler import SamplerConfig
from training.flops import block_weights, lm_flops, measured_peak

BYTES_READ = {"cpu": 2**28, "cuda": 2**32}  # by the measurement of the bandwidth


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine can do with the model's dtype."""

    bandwidth: float  # bytes a second, read from memory
    flops: float  # FLOP/s of matrix products


def clock(device: str) -> float:
    """Seconds now, when the device has finished all work."""
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


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """Both rates, the best of several tries, since a busy machine would flatter the sampler."""
    n_bytes = BYTES_READ[torch.device(device).type]
    large = torch.ones(n_bytes, dtype=torch.uint8, device=device).view(torch.float32)
    fastest = min(seconds_of(large.sum, device) for _ in range(5))
    return Rates(bandwidth=n_bytes / fastest, flops=measured_peak(torch.device(device), dtype))


def numbers_moved(config: LMConfig, M: int, L: int) -> int:
    """Numbers that one call reads or writes: all weights once, all keys and values, M new ones."""
    weights = config.n_layers * sum(block_weights(config)) + config.vocab * config.width
    return weights + 2 * config.n_layers * (L + M) * config.n_kv_heads * config.head_dim


def floor_of_call(lm: DiffusionLM, rates: Rates, M: int, L: int, N: float) -> float:
    """Least seconds of one call for one item: M of L positions pass through, N are scored."""
    n_bytes = numbers_moved(lm.config, M, L) * lm.embedding.weight.dtype.itemsize
    return max(n_bytes / rates.bandwidth, lm_flops(lm.config, 1, M, L, N) / rates.flops)


def floor_of_answer(
    lm: DiffusionLM, rates: Rates, config: SamplerConfig, P: int, calls: float
) -> float:
    """Least seconds of an answer of `calls` calls; blocks are taken to need equally many."""
    G = config.length
    N = config.block_length
    opening = min(G // N / calls, 1)  # fraction of the calls that open a block

    # The i-th of a block's k calls scores the 1 - i / k of it that is still masked. Compiled calls
    # score the whole block.
    scored = N if config.compile else N * (1 + opening) / 2
    full = floor_of_call(lm, rates, P + G, P + G, scored)
    if config.cache == "none":
        return calls * full

    # With a cache, the other calls pass only the block, or all from the block on.
    widths = [G - start if config.cache == "prefix" else N for start in range(0, G, N)]
    cached = statistics.mean(floor_of_call(lm, rates, M, P + G, scored) for M in widths)
    return calls * (opening * full + (1 - opening) * cached)
