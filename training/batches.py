"""The batch of a step, in the parts that this process computes one after the other.

A step's batch is the same however it is executed. It is cut into `processes x accumulate` parts,
whose losses add up to the loss of the batch.

Shapes: B batch, b clips of one part, P prompt positions, G answer tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Prompt
from diffa import DIFFA
from training import processes
from training.examples import Examples
from training.flops import Work, lm_flops
from training.order import Order
from training.recipe import Recipe
from training.stream import Heard, Stream


@dataclass(frozen=True, kw_only=True)
class Part:
    """The clips of a batch that are computed at once."""

    rows: Tensor  # (b,) of the batch
    prompts: list[Prompt]
    readable: Tensor  # (b,), false where a clip could not be read; it must not have a loss
    hear: Callable[[], tuple[Tensor, Tensor]]  # -> audio embeddings (b, A, D), mask (b, A)

    def take(self, values: Tensor) -> Tensor:
        """This part's rows (b, ...) of values of the batch (B, ...), on the model's device."""
        return values[self.rows].to(self.readable.device)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The answers of a batch, and the parts of it that this process computes."""

    answer_ids: Tensor  # (B, G), of the whole batch, on the CPU
    parts: Callable[[], Iterator[Part]]  # each part must be differentiated before the next is taken


@dataclass(kw_only=True)
class Batches:
    """The batch of every step; call it with a step."""

    model: DIFFA
    examples: Examples
    recipe: Recipe
    order: Order
    stream: Stream
    work: Work  # grows with every part

    def __post_init__(self):
        self.hear = processes.replicate(self.model)
        self.autocast = autocast_of(self.recipe, self.model.device)

    def __call__(self, step: int) -> Batch:
        rows = torch.from_numpy(self.order.rows_of_step(step))
        parts = functools.partial(self.parts_of, step)
        return Batch(answer_ids=self.examples.answer_ids[rows], parts=parts)

    def parts_of(self, step: int) -> Iterator[Part]:
        """The local parts of a step."""
        item_rows = self.order.parts_of(step)
        last = len(item_rows) - 1
        for i, heard in enumerate(self.stream(step)):
            # Dropout depends on the part alone, whichever process computes it. Part 0 keeps the
            # seed of the step.
            number = processes.rank() * len(item_rows) + i
            if number > 0:
                torch.manual_seed((self.recipe.train.seed << 32) + (number << 24) + step)

            # Gradients are summed over the processes once, together with those of the last part.
            is_summed = i == last or processes.world() == 1
            with contextlib.nullcontext() if is_summed else self.hear.no_sync():
                yield self.part(self.order.parts[i], item_rows[i], heard)

    def part(self, rows: np.ndarray, item_rows: np.ndarray, heard: Heard) -> Part:
        """One part: rows (b,) of the batch, rows (b,) of the examples, what the encoder heard."""
        states, frames, readable = heard
        prompts = [self.examples.prompts[row] for row in item_rows]

        def hear() -> tuple[Tensor, Tensor]:
            with self.autocast():
                audio, mask = self.hear(states, frames)
            self.work.audio += sum(self.examples.items[row]["duration"] for row in item_rows)
            self.count(prompts, mask)
            return audio, mask

        return Part(
            rows=torch.from_numpy(rows),
            prompts=prompts,
            readable=readable.to(self.model.device),
            hear=hear,
        )

    def count(self, prompts: list[Prompt], audio_mask: Tensor) -> None:
        """Add a part to the work. All answer tokens count as scored, masked or not."""
        B = len(prompts)
        G = self.recipe.answer_length
        n_audio = audio_mask.sum(dim=1).tolist()
        lengths = [len(p.before) + n + len(p.after) for p, n in zip(prompts, n_audio)]
        L = max(lengths) + G
        self.work.tokens += B * L
        self.work.flops += lm_flops(self.model.lm.config, B, L, L, G, backward=True)


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context in which the adapters compute: bfloat16, if the recipe's dtype is that."""
    enabled = recipe.dtype == "bfloat16"
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)
