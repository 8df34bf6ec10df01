"""The frozen encoder's states of clips, computed once and kept in memory.

A clip that cannot be read keeps its row, filled with silence. `readable` says which clips were
read, so that the loss can leave the others out.

Shapes: B clips, N clips in the cache, S samples, T encoder frames, D_w encoder width.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from data import AudioError, pad_waveforms, read_audio
from encoder import SAMPLE_RATE

States = list[Tensor]  # n_layers + 1 hidden states (B, T, D_w); empty tensors where none is read


class Unreadable:
    """The clips that could not be read, by path. More than `limit` of them end the run."""

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        """Note a clip, once. Raises AudioError: there are too many; all are listed."""
        if path in self.reasons:
            return
        self.reasons[path] = reason

        n = len(self.reasons)
        if n > self.limit:
            listed = "\n  ".join(self.reasons.values())
            raise AudioError(
                f"{n} clips cannot be read, more than the {self.limit} allowed:\n  {listed}"
            )
        tqdm.write(f"skipped ({n} so far): {reason}")


def read_padded(paths: list[str], n_samples: int) -> tuple[Tensor, Tensor, list[str]]:
    """Clips as one batch; one that cannot be read becomes a second of silence.

    Returns:
        waveforms (B, n_samples), real samples (B,), and what is wrong with each clip ("": nothing).
    """
    waveforms = []
    errors = []
    for path in paths:
        try:
            waveform = read_audio(path)
            pad_waveforms([waveform], n_samples, [path])  # refuses a clip that is too long
            errors.append("")
        except AudioError as error:
            waveform = torch.zeros(min(SAMPLE_RATE, n_samples))
            errors.append(str(error))
        waveforms.append(waveform)
    return *pad_waveforms(waveforms, n_samples, paths), errors


class StateCache:
    """States of every clip in float16. The encoder never changes, so one pass serves all epochs."""

    def __init__(
        self,
        model,
        items: list[dict],
        batch: int = 64,
        progress=lambda iterable: iterable,
        unreadable: Unreadable | None = None,
        used: tuple[int, ...] | None = None,
    ):
        """
        Args:
            model: a DIFFA, whose encoder is used. items: of a manifest. batch: clips at a time.
            progress: wraps the iterable of batches, such as tqdm.
            unreadable: collects clips that cannot be read; by default none may be.
            used: indices of the states to keep; by default all that any adapter of this encoder
                reads, so that one cache serves the models of every stage.
        Raises:
            AudioError: too many clips cannot be read.
        """
        unreadable = unreadable or Unreadable()
        paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
        config = model.encoder.config
        self.row_of = {path: row for row, path in enumerate(paths)}
        self.device = model.device
        self.n_states = config.n_layers + 1
        self.used = used or tuple(sorted({*model.config.taps, config.n_layers}))

        shape = (len(paths), config.context, config.width)
        self.states = {k: torch.empty(shape, dtype=torch.float16) for k in self.used}  # (N, T, D_w)
        self.frames = torch.empty(len(paths), dtype=torch.long)
        self.readable = torch.ones(len(paths), dtype=torch.bool)

        for start in progress(range(0, len(paths), batch)):
            rows = slice(start, start + batch)
            waveforms, n_samples, errors = read_padded(paths[rows], config.n_samples)
            for row, error in enumerate(errors, start):
                if error:
                    unreadable.add(paths[row], error)
                    self.readable[row] = False

            states, frames = model.encode(waveforms.to(self.device), n_samples.to(self.device))
            for k in self.used:
                self.states[k][rows] = states[k]
            self.frames[rows] = frames.cpu()

    def rows(self, items: list[dict]) -> list[int]:
        """The cache's rows of these items."""
        return [self.row_of[item["audio_filepath"]] for item in items]

    def __call__(self, items: list[dict]) -> tuple[States, Tensor]:
        """What DIFFA.encode gives for these items: states and real frames (B,)."""
        rows = self.rows(items)
        states = [torch.empty(0)] * self.n_states
        for k in self.used:
            states[k] = self.states[k][rows].to(self.device).float()  # (B, T, D_w)
        return states, self.frames[rows].to(self.device)

    def is_readable(self, items: list[dict]) -> Tensor:
        """(B,), false where a clip could not be read."""
        return self.readable[self.rows(items)]
