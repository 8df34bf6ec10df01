"""The states of step after step, from memory, from audio that is read ahead, or from a folder.

  memory   every clip is encoded once at the start: the toy corpus
  none     worker processes decode the audio of the next steps; the encoder hears it every time
  a folder every clip is encoded once, ever, into a file; workers read the next steps' files

Shapes: B clips, T encoder frames, D_w encoder width.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from training import processes
from training.flops import Work
from training.order import Order
from training.recipe import Execution
from training.state_files import fill_folder, read_state_files, state_file
from training.states import Clips, Read, StateCache, Unreadable, load_ahead, on_device, read_padded

Heard = tuple[list[Tensor], Tensor, Tensor]  # states, real frames (B,), readable (B,)


@dataclass(kw_only=True)
class Stream:
    """The states of the clips of every step; call it with a step for its local parts."""

    model: torch.nn.Module  # a DIFFA; its encoder hears what is read as waveforms
    paths: list[str]  # of the items' clips
    order: Order
    read: Callable[[list[str]], Read]  # the workers call it
    workers: int
    unreadable: Unreadable
    work: Work  # its `waited` grows by the seconds that the caller waits for clips
    next_step: int | None = None

    def __call__(self, step: int) -> Iterator[Heard]:
        """The local parts of a step, one by one. Raises AudioError: too many are unreadable."""
        if step != self.next_step:  # the first step of this run
            batches = (part.tolist() for part in self.order.parts_from(step))
            pin = self.model.device.type == "cuda"
            self.loader = load_ahead(Clips(self.paths, self.read), batches, self.workers, pin)
        self.next_step = step + 1

        for rows in self.order.parts_of(step):
            started = time.perf_counter()
            found, lengths, errors = next(self.loader)
            self.work.waited += time.perf_counter() - started

            self.unreadable.add((self.paths[row] for row in rows), errors)
            lengths = lengths.to(self.model.device, non_blocking=True)
            if isinstance(found, dict):
                states, frames = on_device(self.model, found), lengths
            else:
                waveforms = found.to(self.model.device, non_blocking=True)
                states, frames = self.model.encode(waveforms, lengths)
            yield states, frames, torch.tensor([not error for error in errors])


def make_stream(
    model, items: list[dict], order: Order, execution: Execution, encoder_name: str, work: Work
) -> Stream:
    """The stream of a run, from where execution.cache says.

    Args:
        model: a DIFFA. items: of a manifest. encoder_name: tells encoders and dtypes apart in a
            folder. work: see Stream.
    Raises:
        AudioError: too many clips cannot be read.
    """
    unreadable = Unreadable(execution.max_unreadable)
    config = model.encoder.config
    used = model.read_states
    workers = execution.workers

    if execution.cache == "memory":
        workers = 0  # nothing is left to read ahead
        bar = functools.partial(tqdm, desc="encoding", leave=False, disable=processes.rank() > 0)
        read = StateCache(model, items, progress=bar, unreadable=unreadable, used=used).read
    elif execution.cache == "none":
        read = functools.partial(read_padded, n_samples=config.n_samples)
    else:
        folder = Path(execution.cache)
        file_of = functools.partial(state_file, folder, encoder_name, used=used)
        fill_folder(model, items, file_of, workers, unreadable)
        read = functools.partial(read_state_files, file_of=file_of, used=used, width=config.width)

    return Stream(
        model=model,
        paths=[item["audio_filepath"] for item in items],
        order=order,
        read=read,
        workers=workers,
        unreadable=unreadable,
        work=work,
    )
