"""The least time that one call of the language model can take on this machine.

A call reads every weight once and multiplies matrices. Its floor is the greater of two times: its
bytes over the memory's bandwidth, and its FLOPs over the rate of matrix products. Work is counted
from the shapes (training/flops.py); both rates are measured.

Shapes: P prompt positions, G answer tokens, L = P + G, M positions that pass through, N positions
that are scored.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from diffusion_lm import DiffusionLM
from sampler import SamplerConfig
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


def floor_of_call(lm: DiffusionLM, rates: Rates, M: int, L: int, N: float) -> float:
    """Least seconds of one call for one item: M of L positions pass through, N are scored."""
    c = lm.config
    weights = c.n_layers * sum(block_weights(c)) + c.vocab * c.width
    cached = (
        2 * c.n_layers * (L + M) * c.n_kv_heads * c.head_dim
    )  # keys and values: L read, M written
    n_bytes = (weights + cached) * lm.embedding.weight.dtype.itemsize
    return max(n_bytes / rates.bandwidth, lm_flops(c, 1, M, L, N) / rates.flops)


def floor_of_answer(
    lm: DiffusionLM, rates: Rates, config: SamplerConfig, P: int, calls: float
) -> float:
    """Least seconds of an answer of `calls` calls; blocks are taken to need equally many."""
    G = config.length
    N = config.block_length
    opening = min(config.n_blocks / calls, 1)  # fraction of the calls that open a block

    # The i-th of a block's k calls scores the 1 - i / k of it that is still masked. Compiled calls
    # score the whole block.
    scored = G / config.n_blocks * (1 if config.compile else (1 + opening) / 2)
    full = floor_of_call(lm, rates, P + G, P + G, scored)
    if config.cache == "none":
        return calls * full

    # With a cache, the other calls pass only the block, or all from the block on.
    rest = range(G, 0, -N)
    widths = rest if config.cache == "prefix" else [min(N, width) for width in rest]
    cached = statistics.mean(floor_of_call(lm, rates, M, P + G, scored) for M in widths)
    return calls * (opening * full + (1 - opening) * cached)
