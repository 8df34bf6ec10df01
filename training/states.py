"""Clips, and the hidden states that the frozen encoder makes of them.

A clip that cannot be read keeps its row in a batch, filled with silence. A message in `errors` says
what is wrong with it, so that the loss can leave it out.

Shapes: B clips, N clips in the cache, S samples, T encoder frames, D_w encoder width.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoints.progress import progress
from data import AudioError, pad_waveforms, read_audio
from encoder import SAMPLE_RATE
from training import processes

PREFETCH = 4  # batches that each worker prepares ahead

# Clips read together: waveforms (B, S), or states {index: (B, T, D_w)}; samples, or real frames,
# (B,); and what is wrong with each clip ("": nothing).
Read = tuple[Tensor | dict[int, Tensor], Tensor, list[str]]


class Unreadable:
    """The clips that could not be read, by path. More than `limit` of them end the run."""

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def add(self, paths: Iterable[str], errors: list[str]) -> None:
        """Note those clips that have an error. Raises AudioError: too many; all are listed."""
        for path, error in zip(paths, errors):
            if not error or path in self.reasons:
                continue
            self.reasons[path] = error

            # A few bad clips cost little; many are a mistake that the user must know of.
            n = len(self.reasons)
            if n > self.limit:
                listed = "\n  ".join(self.reasons.values())
                limit = f"more than the {self.limit} allowed"
                raise AudioError(f"{n} clips cannot be read, {limit}:\n  {listed}")
            tqdm.write(f"skipped ({n} so far): {error}")


def refuse_overflow(paths: list[str], states: list[Tensor], errors: list[str]) -> list[str]:
    """The errors, and those of clips whose states float16 cannot hold; these become zeros."""
    errors = list(errors)
    for state in states:
        if not len(state):
            continue
        bad = ~state.half().isfinite().flatten(1).all(dim=1)  # (B,)
        for i in bad.nonzero()[:, 0].tolist():
            state[i] = 0
            errors[i] = errors[i] or f"{paths[i]}: the encoder's states of it are not finite"
    return errors


def read_padded(paths: list[str], n_samples: int, cut: bool = False) -> Read:
    """Clips as waveforms (B, n_samples); one that cannot be read becomes a second of silence.

    cut: keep the start of clips that are longer (data.is_too_long) instead of refusing them.
    """
    waveforms = []
    errors = []
    seconds = (n_samples + 1) / SAMPLE_RATE if cut else None  # an hour is not decoded for its start
    for path in paths:
        try:
            waveform = read_audio(path, seconds)
            pad_waveforms([waveform], n_samples, [path], cut)
            errors.append("")
        except AudioError as error:
            waveform = torch.zeros(min(SAMPLE_RATE, n_samples))
            errors.append(str(error))
        waveforms.append(waveform)
    return *pad_waveforms(waveforms, n_samples, paths, cut=True), errors


class Clips(Dataset):
    """Clips that worker processes read, batch after batch."""

    def __init__(self, paths: list[str], read: Callable[[list[str]], Read]):
        self.paths = paths
        self.read = read

    def __getitem__(self, rows: Iterable[int]) -> Read:
        return self.read([self.paths[row] for row in rows])

    def ahead(self, batches: Iterable, workers: int, pin: bool = False) -> Iterator[Read]:
        """The clips of each batch (rows of paths) in turn, read by `workers` processes ahead."""
        options = {"num_workers": workers, "pin_memory": pin}
        if workers:
            options["prefetch_factor"] = PREFETCH

        # A generator of its own: DataLoader would draw from the global one, which drives dropout.
        options["generator"] = torch.Generator()
        return iter(DataLoader(self, batch_size=None, sampler=batches, **options))


def encode_clips(
    model,
    paths: list[str],
    batch: int,
    unreadable: Unreadable,
    workers: int = 0,
    cut: bool = False,
) -> Iterator[tuple[range, list[Tensor], Tensor, list[str]]]:
    """What a DIFFA's encoder hears in clips, batch after batch.

    Args:
        unreadable: collects the clips that cannot be read. workers: processes that read ahead.
        cut: see read_padded.
    Yields:
        rows (B) of paths, all hidden states (B, T, D_w), real frames (B,), errors (B).
    """
    # Decoded ahead by the workers.
    batches = [range(i, min(i + batch, len(paths))) for i in range(0, len(paths), batch)]
    read = functools.partial(read_padded, n_samples=model.encoder.config.n_samples, cut=cut)
    loader = Clips(paths, read).ahead(batches, workers)

    # Encoded here.
    shown = progress(batches, "encoding clips", unit=" batches", shown=processes.rank() == 0)
    for rows, (waveforms, n_samples, errors) in zip(shown, loader):
        states, frames = model.encode(waveforms.to(model.device), n_samples.to(model.device))
        local_paths = [paths[row] for row in rows]
        errors = refuse_overflow(local_paths, states, errors)
        unreadable.add(local_paths, errors)
        yield rows, states, frames, errors


def on_device(model, read: dict[int, Tensor]) -> list[Tensor]:
    """States as DIFFA.encode gives them, from those that were kept; the others are empty."""
    states = [torch.empty(0)] * (model.encoder.config.n_layers + 1)
    for k, state in read.items():
        states[k] = state.to(model.device, non_blocking=True).float()  # (B, T, D_w)
    return states


class StateCache:
    """States of every clip in float16. The encoder never changes, so one pass serves all epochs."""

    def __init__(
        self,
        model,
        items: list[dict],
        batch: int = 64,
        unreadable: Unreadable | None = None,
        used: tuple[int, ...] | None = None,
        cut: bool = False,
    ):
        """
        Args:
            model: a DIFFA, whose encoder is used. items: of a manifest. batch: clips at a time.
            unreadable: collects clips that cannot be read; by default none may be.
            used: indices of the states to keep; by default all that any adapter of this encoder
                reads, so that one cache serves the models of every stage.
            cut: see read_padded.
        Raises:
            AudioError: too many clips cannot be read.
        """
        paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
        config = model.encoder.config
        self.model = model
        self.row_of = {path: row for row, path in enumerate(paths)}
        self.frames = torch.empty(len(paths), dtype=torch.long)
        self.errors: list[str] = []

        shape = (len(paths), config.context, config.width)
        used = used or tuple(sorted({*model.config.taps, config.n_layers}))
        self.states = {k: torch.empty(shape, dtype=torch.float16) for k in used}  # (N, T, D_w)

        # One pass over all clips.
        encoded = encode_clips(model, paths, batch, unreadable or Unreadable(), cut=cut)
        for rows, states, frames, errors in encoded:
            self.frames[rows] = frames.cpu()
            self.errors += errors
            for k in self.states:
                self.states[k][rows] = states[k].half().cpu()

    def read(self, paths: list[str]) -> Read:
        """The states of clips that are in the cache."""
        rows = [self.row_of[path] for path in paths]
        states = {k: kept[rows] for k, kept in self.states.items()}  # (B, T, D_w)
        return states, self.frames[rows], [self.errors[row] for row in rows]

    def __call__(self, items: list[dict]) -> tuple[list[Tensor], Tensor]:
        """What DIFFA.encode gives for these items: states, and real frames (B,)."""
        states, frames, _ = self.read([item["audio_filepath"] for item in items])
        return on_device(self.model, states), frames.to(self.model.device)
