"""One graph for a whole sampling step: torch.compile on any device, CUDA graphs on a GPU.

Graphs are compiled for shapes and recorded with addresses of memory, so neither may change: prompts
are padded to a few lengths, every row and column is computed at every step, and the cache stays.

Shapes: B batch, L positions, R rows, N block length.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa import Spliced
from diffusion_lm import DiffusionLM, KeyValues
from sampler import Call, Choice, SamplerConfig, refine
from speed.canvas import Canvas
from speed.joined import join

BUCKET = 64  # prompts are padded to a multiple of this, so that few shapes are compiled
STATIC_CACHES: weakref.WeakKeyDictionary[DiffusionLM, dict] = weakref.WeakKeyDictionary()


@functools.cache
def compiled_refine(device_type: str) -> Callable:
    """sampler.refine as one graph for each shape; on a GPU it is recorded once and replayed."""
    # Shapes, rules and models: the default limit of 8 is for graphs that leak.
    torch._dynamo.config.recompile_limit = 256
    mode = "reduce-overhead" if device_type == "cuda" else None
    graph = torch.compile(refine, fullgraph=True, dynamic=False, mode=mode)

    def step(lm: DiffusionLM, call: Call, block_ids: Tensor, choice: Choice):
        # What the last call returned has been read: its memory may be used again.
        torch.compiler.cudagraph_mark_step_begin()
        return graph(lm, call, block_ids, choice)

    return step


def static_cache(lm: DiffusionLM, rows: int, L: int) -> KeyValues:
    """The same cache for every answer of one shape: CUDA graphs know memory by its address."""
    weight = lm.embedding.weight
    caches = STATIC_CACHES.setdefault(lm, {})
    key = (rows, L, weight.device, weight.dtype)
    if key not in caches:
        # Outside of inference mode, or the cache could not be written to outside of it.
        with torch.inference_mode(False):
            caches[key] = lm.new_cache(rows, L)
        for keys, values in caches[key]:
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)
    return caches[key]


class CompiledCanvas(Canvas):
    """A canvas whose calls keep their shapes and their memory."""

    def __init__(self, lm: DiffusionLM, prompt: Spliced, config: SamplerConfig):
        pad = -prompt.embeddings.shape[1] % BUCKET
        padded = replace(
            prompt,
            embeddings=F.pad(prompt.embeddings, (0, 0, pad, 0)),
            mask=F.pad(prompt.mask, (pad, 0)),
            is_text=F.pad(prompt.is_text, (pad, 0)),
        )
        super().__init__(lm, padded, config)
        self.is_padded = True  # for one graph with and without padding

    def new_cache(self, rows: int, L: int) -> KeyValues:
        return static_cache(self.lm, rows, L)

    def cache_of(self, rows: int, L: int) -> KeyValues:
        return self.cache

    def open_block(self, block: slice) -> None:
        # What is not appended yet is there, but hidden like padding.
        if self.appends:
            answer = self.real[:, -self.config.length :]  # (B, G)
            answer[:, : block.stop] = True
            answer[:, block.stop :] = False

    def rows(self, waiting: Tensor) -> Tensor:
        return torch.arange(len(waiting), device=waiting.device)  # (R,)

    def columns(self, block: slice) -> Tensor:
        return torch.arange(block.start, block.stop, device=self.ids.device)  # (N,)


def compile_step(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, joined: bool = True
) -> tuple[CompiledCanvas, Callable]:
    """The canvas of `generate`, and its step instead of `refine`.

    joined: on a GPU, with the products of joined.py.
    """
    if joined and prompt.mask.is_cuda:
        join(lm)
    return CompiledCanvas(lm, prompt, config), compiled_refine(prompt.mask.device.type)
