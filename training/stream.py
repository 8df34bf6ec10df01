"""The states of step after step, from memory, from audio that is read ahead, or from a folder.

  memory   every clip is encoded once at the start: the toy corpus
  none     worker processes decode the audio of the next steps; the encoder hears it every time
  a folder every clip is encoded once, ever, into a file; workers read the next steps' files

Shapes: B clips, T encoder frames, D_w encoder width.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.flops import Work
from training.recipe import Execution
from training.state_files import fill_folder, read_state_files, state_file
from training.states import (
    Clips,
    StateCache,
    Unreadable,
    on_device,
    read_padded,
    refuse_overflow,
)

Heard = tuple[list[Tensor], Tensor, Tensor]  # states, real frames (B,), readable (B,)


class Stream:
    """The states of the clips of every step; call it with a step for its local parts."""

    def __init__(
        self,
        model,
        items: list[dict],
        parts_of: Callable[[int], list[np.ndarray]],
        steps: int,
        execution: Execution,
        encoder_name: str,
        work: Work,
    ):
        """
        Args:
            model: a DIFFA. items: of a manifest. parts_of: step -> rows of items of its parts.
            steps: of the whole run. encoder_name: distinguishes encoders and dtypes in a folder.
            work: its `waited` grows by the seconds that the caller waits for clips.
        """
        self.model = model
        self.parts_of = parts_of
        self.steps = steps
        self.work = work
        self.workers = 0 if execution.cache == "memory" else execution.workers
        self.next_step: int | None = None

        # At least one clip must be readable.
        n_clips = len({item["audio_filepath"] for item in items})
        self.unreadable = Unreadable(min(execution.max_unreadable, n_clips - 1))

        # Called once a run is known to have steps left, at the latest by the first of them.
        self.open = functools.partial(self.make_clips, items, execution, encoder_name)
        self.clips: Clips | None = None

    def make_clips(self, items: list[dict], execution: Execution, encoder_name: str) -> None:
        """Encode what is kept of all clips. Raises AudioError: too many are unreadable."""
        model = self.model
        config = model.encoder.config
        used = model.read_states
        if execution.cache == "memory":
            options = {"unreadable": self.unreadable, "used": used, "cut": execution.cut}
            read = StateCache(model, items, **options).read
        elif execution.cache == "none":
            read = functools.partial(read_padded, n_samples=config.n_samples, cut=execution.cut)
        else:
            folder = Path(execution.cache)
            file_of = functools.partial(state_file, folder, encoder_name, used=used)
            fill_folder(model, items, file_of, self.workers, self.unreadable, execution.cut)
            read = functools.partial(
                read_state_files, file_of=file_of, used=used, width=config.width
            )
        self.clips = Clips([item["audio_filepath"] for item in items], read)

    def __call__(self, step: int) -> Iterator[Heard]:
        """The local parts of a step, one by one. Raises AudioError: too many are unreadable."""
        device = self.model.device
        if self.clips is None:
            self.open()
        if step != self.next_step:  # the first step of this run
            later = range(step, self.steps)
            batches = (part.tolist() for s in later for part in self.parts_of(s))
            self.loader = self.clips.ahead(batches, self.workers, device.type == "cuda")
        self.next_step = step + 1

        for rows in self.parts_of(step):
            # What the workers have read.
            started = time.perf_counter()
            found, lengths, errors = next(self.loader)
            self.work.waited += time.perf_counter() - started

            yield self.heard(rows, found, lengths, errors)

    def heard(self, rows: Sequence[int], found, lengths: Tensor, errors: list[str]) -> Heard:
        """What the model hears in clips that were read (states.Read)."""
        device = self.model.device
        lengths = lengths.to(device, non_blocking=True)

        # Waveforms still have to pass the encoder.
        paths = [self.clips.paths[row] for row in rows]
        if isinstance(found, dict):
            states, frames = on_device(self.model, found), lengths
        else:
            waveforms = found.to(device, non_blocking=True)
            states, frames = self.model.encode(waveforms, lengths)
            errors = refuse_overflow(paths, states, errors)
        self.unreadable.add(paths, errors)
        return states, frames, torch.tensor([not error for error in errors])

    def one(self, row: int) -> Heard:
        """One clip by itself, after `open`; it is read now, whatever the step."""
        return self.heard([row], *self.clips[[row]])
