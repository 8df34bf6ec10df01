"""How much work a step does, and how fast this machine could do it.

The one count of the LM's FLOPs and the one measurement of the peak; lab.roofline uses both.

Shapes: B batch, L positions, M of them that pass through, N of those that are output and scored.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusion_lm import LMConfig
from training import processes

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # side of the matrices that measure the peak
TRIES = 8  # the first of them warm up


@dataclass
class Work:
    """Running totals of one process. The batches add to them; the loop reports differences.

    audio: seconds. tokens: positions that the LM read. flops: of the LM, without what is recomputed
    to save memory. waited: seconds without data. peak: FLOP/s that the device can reach.
    """

    audio: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0
    peak: float = math.inf

    def speeds(self, before: "Work", seconds: float) -> dict[str, float]:
        """The speed of all processes together, since `before`, `seconds` ago."""
        n = processes.world()
        return {
            "audio_hours_an_hour": n * (self.audio - before.audio) / seconds,
            "tokens_a_second": n * (self.tokens - before.tokens) / seconds,
            "share_of_peak": (self.flops - before.flops) / seconds / self.peak,
            "share_waiting": (self.waited - before.waited) / seconds,
        }


def block_weights(config: LMConfig) -> tuple[int, int]:
    """Weights of one block: those of keys and values, and all others."""
    keys_values = 2 * config.width * config.n_kv_heads * config.head_dim
    query_out = 2 * config.width * config.n_heads * config.head_dim
    return keys_values, query_out + 3 * config.width * config.ffn


def lm_flops(config: LMConfig, B: int, M: int, L: int, N: float, backward: bool = False) -> float:
    """FLOPs of the LM for B items: M of L positions pass through, N of them are output and scored.

    The last block computes only keys and values for the positions that are not output. backward:
    with the backward pass to the inputs; the frozen weights take no gradient.
    """
    keys_values, others = block_weights(config)
    rows = M * (config.n_layers - 1) + N  # that pass a whole block

    # Multiplications and additions, without and with a weight: q by k and attention by v.
    weights = M * config.n_layers * keys_values + rows * others + N * config.vocab * config.width
    attention = 2 * rows * L * config.n_heads * config.head_dim

    # A product with a weight costs as much again backward; one of two activations twice as much.
    if backward:
        return 2 * B * (2 * weights + 3 * attention)
    return 2 * B * (weights + attention)


def measured_peak(device: str | torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device: the best of several tries."""
    device = torch.device(device)
    n = MATRIX_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    fastest = math.inf
    for _ in range(TRIES):
        started = time.perf_counter()
        F.linear(a, b)[0, 0].item()  # waits for the result
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * n**3 / fastest
