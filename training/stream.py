"""The clips of the next steps, read by worker processes while the model computes.

Shapes: B clips, S samples, T encoder frames, D_w encoder width.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.flops import Work
from training.order import Order
from training.states import States, Unreadable

PREFETCH = 4  # batches that each worker prepares ahead

# Clips read together: waveforms (B, S) or states {k: (B, T, D_w)}; samples or real frames (B,);
# what is wrong with each clip ("": nothing).
Read = tuple[Tensor | dict[int, Tensor], Tensor, list[str]]
Heard = tuple[States, Tensor, Tensor]  # states, real frames (B,), readable (B,)


class Clips(Dataset):
    """Batches of clips as worker processes read them."""

    def __init__(self, paths: list[str], read: Callable[[list[str]], Read]):
        self.paths = paths
        self.read = read

    def __getitem__(self, rows: Iterable[int]) -> Read:
        return self.read([self.paths[row] for row in rows])


def load_ahead(
    paths: list[str],
    read: Callable[[list[str]], Read],
    batches: Iterable[Iterable[int]],
    workers: int,
    pin: bool = False,
) -> Iterator[Read]:
    """Read the clips of each batch (indices of paths) in turn, `workers` processes ahead."""
    loader = DataLoader(
        Clips(paths, read),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        # A generator of its own: DataLoader would draw from the global one, which drives dropout.
        generator=torch.Generator(),
        pin_memory=pin,
    )
    return iter(loader)


class Stream:
    """The states of step after step, from audio or from files of states that are read ahead."""

    def __init__(
        self,
        model,
        items: list[dict],
        order: Order,
        read: Callable[[list[str]], Read],
        workers: int,
        unreadable: Unreadable,
        work: Work,
    ):
        """
        Args:
            model: a DIFFA; its encoder hears the waveforms, if `read` gives waveforms.
            items: of a manifest. read: from paths to clips; the workers call it.
            work: its `waited` grows by the seconds that the caller waits for a clip.
        """
        self.model = model
        self.paths = [item["audio_filepath"] for item in items]
        self.order = order
        self.read = read
        self.workers = workers
        self.unreadable = unreadable
        self.work = work
        self.next_step: int | None = None

    def __call__(self, step: int) -> Iterator[Heard]:
        """The local parts of a step, one by one. Raises AudioError: too many are unreadable."""
        if step != self.next_step:  # the first step of this run
            batches = (part.tolist() for part in self.order.parts_from(step))
            pin = self.model.device.type == "cuda"
            self.loader = load_ahead(self.paths, self.read, batches, self.workers, pin)
        self.next_step = step + 1

        for rows in self.order.parts_of(step):
            started = time.perf_counter()
            found, lengths, errors = next(self.loader)
            self.work.waited += time.perf_counter() - started

            for row, error in zip(rows, errors, strict=True):
                if error:
                    self.unreadable.add(self.paths[row], error)
            states, frames = self.states_of(found, lengths)
            yield states, frames, torch.tensor([not error for error in errors])

    def states_of(
        self, found: Tensor | dict[int, Tensor], lengths: Tensor
    ) -> tuple[States, Tensor]:
        """States and real frames (B,) on the model's device, from what was read."""
        device = self.model.device
        lengths = lengths.to(device, non_blocking=True)
        if isinstance(found, Tensor):
            return self.model.encode(found.to(device, non_blocking=True), lengths)

        states = [torch.empty(0)] * (self.model.encoder.config.n_layers + 1)
        for k, state in found.items():
            states[k] = state.to(device, non_blocking=True).float()  # (B, T, D_w)
        return states, lengths
