"""The batch of a step, in the parts that this process computes one after the other.

A step's batch is the same however it is executed. It is cut into `processes x accumulate` parts,
whose losses add up to the loss of the batch.

Shapes: B batch, b clips of one part, P prompt positions, G answer tokens, N examples.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Prompt
from training import processes
from training.examples import Examples
from training.flops import Work, lm_flops, measured_peak
from training.order import local_rows, pick, pick_by_length
from training.recipe import Recipe
from training.stream import Heard, Stream


@dataclass(frozen=True, kw_only=True)
class Part:
    """The clips of a batch that are computed at once.

    rows: (b,) of the batch. readable: (b,), false where a clip could not be read; such a clip must
    not have a loss. hear: -> audio embeddings (b, A, D) and their mask (b, A). Arguments of hear:
    another model's `hear` that listens instead; the passes of the LM that follow (1).
    """

    rows: np.ndarray
    prompts: list[Prompt]
    readable: Tensor
    hear: Callable[..., tuple[Tensor, Tensor]]

    def take(self, values: Tensor) -> Tensor:
        """This part's rows (b, ...) of values of the batch (B, ...), on the model's device."""
        return values[self.rows].to(self.readable.device)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The answers (B, G) of a whole batch, on the CPU, and its local parts.

    A part must be differentiated before the next one is taken. rejected_ids: (B, G), the worse
    answers of stage 4.
    """

    answer_ids: Tensor
    parts: Callable[[], Iterator[Part]]
    rejected_ids: Tensor | None = None


class Batches:
    """The batch of every step; call it with a step."""

    def __init__(self, model, examples: Examples, recipe: Recipe, encoder_name: str):
        """model: a DIFFA. encoder_name: see Stream.

        Raises ValueError: the batch cannot be cut in parts. AudioError: too many unreadable clips.
        """
        config = recipe.train
        self.model = model
        self.examples = examples
        self.recipe = recipe
        self.rows = local_rows(config.batch, recipe.execution.accumulate)  # (parts, b)
        self.work = Work(peak=measured_peak(model.device, getattr(torch, recipe.dtype)))
        self.hear = processes.replicate(model)
        self.autocast = functools.partial(
            torch.autocast, model.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"
        )

        # From a step to the rows (B,) of its examples.
        n = len(examples.items)
        self.order = lambda step: pick(step, n, config.batch, config.seed)
        if recipe.bucket_by_length:
            durations = np.array([item["duration"] for item in examples.items])
            self.order = pick_by_length(durations, config.batch, config.seed)

        self.stream = Stream(
            model,
            examples.items,
            lambda step: self.order(step)[self.rows],
            config.steps,
            recipe.execution,
            encoder_name,
            self.work,
        )

    def __call__(self, step: int) -> Batch:
        rows = self.order(step)
        rejected = self.examples.rejected_ids
        return Batch(
            answer_ids=self.examples.answer_ids[rows],
            parts=functools.partial(self.parts, step),
            rejected_ids=None if rejected is None else rejected[rows],
        )

    def names(self, step: int) -> list[str]:
        """The audio_id of each item of a step."""
        return [self.examples.items[row]["audio_id"] for row in self.order(step)]

    def parts(self, step: int) -> Iterator[Part]:
        """The local parts of a step."""
        n_parts = len(self.rows)
        for i, heard in enumerate(self.stream(step)):
            # Dropout depends on the part alone, whichever process computes it. Part 0 keeps the
            # seed of the step.
            number = processes.rank() * n_parts + i
            if number > 0:
                torch.manual_seed((self.recipe.train.seed << 32) + (number << 24) + step)

            # Gradients are summed over the processes once, together with those of the last part.
            is_summed = i == n_parts - 1 or processes.world() == 1
            with contextlib.nullcontext() if is_summed else self.hear.no_sync():
                yield self.part(self.rows[i], self.order(step)[self.rows[i]], heard)

    def part(self, rows: np.ndarray, example_rows: np.ndarray, heard: Heard) -> Part:
        """One part: rows (b,) of the batch, the same of the examples, what the encoder heard."""
        states, frames, readable = heard
        prompts = [self.examples.prompts[row] for row in example_rows]
        B, G = len(rows), self.recipe.answer_length

        def hear(by: Callable | None = None, passes: int = 1) -> tuple[Tensor, Tensor]:
            trains = by is None
            with self.autocast():
                audio, mask = (by or self.hear)(states, frames)

            # The work that follows. All answer tokens count as scored, masked or not.
            n_audio = mask.sum(dim=1).tolist()
            L = G + max(len(p.before) + n + len(p.after) for p, n in zip(prompts, n_audio))
            if trains:
                durations = [self.examples.items[row]["duration"] for row in example_rows]
                self.work.audio += sum(durations)
            self.work.tokens += passes * B * L
            flops = lm_flops(self.model.lm.config, B, L, L, G, backward=trains)
            self.work.flops += passes * flops
            return audio, mask

        on_device = readable.to(self.model.device)
        return Part(rows=rows, prompts=prompts, readable=on_device, hear=hear)
