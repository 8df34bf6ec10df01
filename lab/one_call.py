"""How long one call of the sampler takes, against its floor: a full pass, and a cached block step.

Shapes: M positions that pass through, L positions in all, N positions that are predicted.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from diffa import Spliced
from diffusion_lm import DiffusionLM
from lab.roofline import Rates, floor_of_call, matrix_products, recorded, time_in_turns
from sampler import Choice, SamplerConfig, refine
from speed.compiled import compile_step
from speed.small import small_step


class TimedCall(NamedTuple):
    """One kind of call with the dual cache: the ways to compute it, and its M, L, N."""

    works: dict[str, Callable[[], object]]
    shapes: tuple[int, int, int]


@torch.no_grad()
def calls_of(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, joined: bool = True
) -> dict[str, TimedCall]:
    """Both kinds of calls of one prompt's first block, by name. joined: see compile_step."""
    canvas, compiled = compile_step(lm, prompt, replace(config, cache="dual"), joined)
    device = prompt.mask.device
    block = slice(0, config.block_length)
    rows = torch.zeros(1, dtype=torch.long, device=device)  # the only item
    columns = canvas.columns(block)  # (N,)
    limit = canvas.step_limits(block, config.block_length)[0]  # ()
    choice = Choice(config.rule, limit, None, None, None)

    # The ids as `generate` takes them: other strides would be compiled anew.
    ids = canvas.ids[rows[:, None], columns]  # (1, N)

    # The full pass comes first, because it fills the cache.
    full = canvas.call(rows, columns)
    cached = canvas.call(rows, columns, block)
    calls = {}
    for name, call in (("full pass", full), ("block step", cached)):
        shapes = (call.x.shape[1], call.real.shape[1], len(columns))  # M, L, N
        inputs = (lm, call, ids, choice)
        works = {
            "eager": functools.partial(small_step(lm), *inputs),
            "compiled": functools.partial(compiled, *inputs),
            "its matrix products alone": recorded(matrix_products(lm, *shapes), device),
        }

        # Eager calls of a small LM have fewer operations than its plain forward.
        if works["eager"].func is not refine:
            works = {"plain forward": functools.partial(refine, *inputs), **works}
        calls[name] = TimedCall(works, shapes)
    return calls


@torch.no_grad()
def time_calls(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, rates: Rates
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of both kinds of calls, and of their matrix products alone.

    Each cell has a median time, and the same as a multiple of the floor.
    """
    table = []
    for name, call in calls_of(lm, prompt, config).items():
        floor = floor_of_call(lm, rates, *call.shapes)
        rounds = 3 if name == "full pass" else 9
        times = time_in_turns(call.works, prompt.mask.device, rounds).values()
        cells = [f"{1000 * t:.1f} ms, {t / floor:.2f} x" for t in times]
        table.append([name, *cells, f"{1000 * floor:.1f} ms"])
    return ["one call", *call.works, "floor"], table
