"""The batch of a step, in the parts that this process computes one after the other.

A step's batch is the same however it is executed. It is cut into `processes x accumulate` parts,
whose losses add up to the loss of the batch.

Shapes: B batch, b clips of one part, P prompt positions, G answer tokens.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Prompt
from training import processes
from training.examples import Examples
from training.flops import Work, lm_flops
from training.order import Order
from training.recipe import Execution, Recipe
from training.state_files import fill_folder, read_state_files, state_file
from training.states import StateCache, Unreadable, read_padded
from training.stream import Heard, Stream

Source = Callable[[int], Iterator[Heard]]  # from a step to the states of its local parts


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


class Batches:
    """The batch of every step; call it with a step."""

    def __init__(
        self,
        model,
        examples: Examples,
        recipe: Recipe,
        order: Order,
        source: Source,
        work: Work,
    ):
        """model: a DIFFA. source: of the encoder's states. work: grows with every part."""
        self.model = model
        self.examples = examples
        self.recipe = recipe
        self.order = order
        self.source = source
        self.work = work
        self.hear = processes.replicate(model)
        self.autocast = autocast_of(recipe, model.device)

    def __call__(self, step: int) -> Batch:
        rows = torch.from_numpy(self.order.rows_of_step(step))
        parts = functools.partial(self.parts_of, step)
        return Batch(answer_ids=self.examples.answer_ids[rows], parts=parts)

    def parts_of(self, step: int) -> Iterator[Part]:
        """The local parts of a step."""
        item_rows = self.order.parts_of(step)
        last = len(item_rows) - 1
        for i, heard in enumerate(self.source(step)):
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
        lengths = [len(p.before) + n + len(p.after) for p, n in zip(prompts, n_audio, strict=True)]
        L = max(lengths) + G
        self.work.tokens += B * L
        self.work.flops += lm_flops(self.model.lm.config, B, L, L, G, backward=True)


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context in which the adapters compute: bfloat16, if the recipe's dtype is that."""
    enabled = recipe.dtype == "bfloat16"
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


def make_source(
    model, items: list[dict], order: Order, execution: Execution, encoder_name: str, work: Work
) -> Source:
    """Where the encoder's states come from: memory, audio that is read ahead, or a folder.

    Args:
        model: a DIFFA. items: of a manifest. encoder_name: tells encoders and dtypes apart in the
            folder. work: its `waited` grows by the seconds that the loop waits for states.
    Raises:
        AudioError: too many clips cannot be read, now or when their step comes.
    """
    unreadable = Unreadable(execution.max_unreadable)
    if execution.cache == "memory":
        return from_memory(model, items, order, unreadable, work)

    config = model.encoder.config
    used = model.read_states
    if execution.cache == "none":
        read = functools.partial(read_padded, n_samples=config.n_samples)
    else:
        folder = Path(execution.cache)
        file_of = functools.partial(state_file, folder, encoder_name, used=used)
        fill_folder(model, items, file_of, execution.workers, unreadable)
        read = functools.partial(read_state_files, file_of=file_of, used=used, width=config.width)
    return Stream(model, items, order, read, execution.workers, unreadable, work)


def from_memory(
    model, items: list[dict], order: Order, unreadable: Unreadable, work: Work
) -> Source:
    """The source that encodes every clip now and keeps the states."""
    bar = functools.partial(tqdm, desc="encoding", leave=False, disable=processes.rank() > 0)
    cache = StateCache(model, items, progress=bar, unreadable=unreadable, used=model.read_states)

    def source(step: int) -> Iterator[Heard]:
        for rows in order.parts_of(step):
            started = time.perf_counter()
            chosen = [items[row] for row in rows]
            states, frames = cache(chosen)
            work.waited += time.perf_counter() - started
            yield states, frames, cache.is_readable(chosen)

    return source
