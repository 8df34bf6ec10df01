"""One graph for a whole sampling step: torch.compile on any device, CUDA graphs on a GPU.

Shapes: B batch, L positions.
"""

import functools
import weakref
from collections.abc import Callable

import torch

from diffusion_lm import DiffusionLM, KeyValues

STATIC_CACHES: weakref.WeakKeyDictionary[DiffusionLM, dict] = weakref.WeakKeyDictionary()


@functools.cache
def compiled(function: Callable, device_type: str) -> Callable:
    """`function` as one graph for each shape; on a GPU the graph is recorded once and replayed."""
    # Shapes, rules and models: the default limit of 8 is meant for graphs that leak.
    torch._dynamo.config.recompile_limit = 256
    mode = "reduce-overhead" if device_type == "cuda" else None
    graph = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    @functools.wraps(function)
    def step(*arguments):
        # What the last call returned has been read: its memory may be used again.
        torch.compiler.cudagraph_mark_step_begin()
        return graph(*arguments)

    return step


def static_cache(lm: DiffusionLM, B: int, L: int) -> KeyValues:
    """The same cache for every answer of one shape: CUDA graphs know memory by its address."""
    weight = lm.embedding.weight
    caches = STATIC_CACHES.setdefault(lm, {})
    key = (B, L, weight.device, weight.dtype)
    if key not in caches:
        # Outside of inference mode, or the cache could not be written to outside of it.
        with torch.inference_mode(False):
            caches[key] = lm.new_cache(B, L)
        for keys, values in caches[key]:
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)
    return caches[key]
