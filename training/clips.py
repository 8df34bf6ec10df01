"""Which clips a step hears, and what the frozen encoder makes of them, in time.

A step's clips follow from (seed, step) alone. Their encoder states come from one of three places, and never change:
  memory   every clip is encoded once at the start and kept in float16: the toy corpus
  none     worker processes decode the audio of the next steps while the GPU works; the encoder hears it anew each time
  a folder every clip is encoded once, ever, into a file; workers read the next steps' files ahead

A clip that cannot be read is skipped: its row keeps its place with silence, and the loss leaves it out.

Shapes: B clips, N items, S samples, T encoder frames, D_w encoder width.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training import processes as ranks
from data import AudioError, pad_waveforms, read_audio
from encoder import SAMPLE_RATE, encoder_frames
from training.loop import Work

POOL = 50  # batches that are sorted by length together

Heard = tuple[list[Tensor], Tensor, Tensor]  # states, n_layers + 1 of (B, T, D_w); real frames (B,); readable (B,)


# ---- which items
def pick(step: int, n_items: int, batch: int, seed: int) -> np.ndarray:
    """Indices (batch,) of step's items: the epochs are shuffled, and step alone says where we are, so runs resume exactly."""
    positions = np.arange(step * batch, (step + 1) * batch)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(positions // n_items):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n_items)
        here = positions // n_items == epoch
        chosen[here] = order[positions[here] % n_items]
    return chosen


def pick_alike(lengths: np.ndarray, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Like pick, with clips of about one length in a batch, so that little is padded.

    Each epoch is shuffled and cut in pools of 50 batches; a pool is sorted by length, its batches are shuffled. The few
    items that do not fill a batch are left out of that epoch.
    """
    per_epoch = len(lengths) // batch
    if per_epoch == 0:
        return lambda step: pick(step, len(lengths), batch, seed)

    @functools.lru_cache(2)
    def batches_of(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: per_epoch * batch]
        pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        return rng.permutation(order.reshape(per_epoch, batch))

    return lambda step: batches_of(step // per_epoch)[step % per_epoch]


def my_places(batch: int, accumulate: int) -> list[np.ndarray]:
    """The places in a batch that this process computes, in `accumulate` parts. Raises ValueError: it does not divide."""
    parts = ranks.world() * accumulate
    if batch % parts:
        raise ValueError(f"a batch of {batch} does not divide by {ranks.world()} processes with {accumulate} parts each")
    return list(np.arange(batch).reshape(parts, -1)[ranks.rank() * accumulate :][:accumulate])


# ---- what is heard
def needed_states(model) -> tuple[int, ...]:
    """The hidden states that the adapters of the model's stage read."""
    return model.used_states if "acoustic" in model.trainable() else (model.encoder.config.n_layers,)


class Unreadable:
    """The clips that could not be read, by path; more than `limit` of them end the run."""

    def __init__(self, limit: int):
        self.limit, self.why = limit, {}

    def add(self, path: str, why: str) -> None:
        if path in self.why:
            return
        self.why[path] = why
        if len(self.why) > self.limit:
            raise AudioError(f"{len(self.why)} clips cannot be read, more than the {self.limit} allowed:\n  " + "\n  ".join(self.why.values()))
        tqdm.write(f"skipped ({len(self.why)} so far): {why}")


def read_padded(paths: list[str], n_samples: int) -> tuple[Tensor, Tensor, list[str]]:
    """Waveforms (B, n_samples), samples (B,), and what is wrong with each ("": nothing). A bad clip is a second of silence."""
    waveforms, wrong = [], []
    for path in paths:
        try:
            waveforms.append(pad_waveforms([waveform := read_audio(path)], n_samples, [path])[0][0, : len(waveform)])
            wrong.append("")
        except AudioError as error:
            waveforms.append(torch.zeros(min(SAMPLE_RATE, n_samples)))
            wrong.append(str(error))
    return *pad_waveforms(waveforms, n_samples, paths), wrong


class StateCache:
    """The frozen encoder's states of every clip, computed once and kept in memory in float16.

    The encoder never changes while adapters train, so hearing a clip anew in each epoch is work without gain.
    """

    def __init__(self, model, items: list[dict], batch: int = 64, progress=lambda it: it, unreadable: Unreadable | None = None, used=None):
        """Encode the clips of manifest items through model (a DIFFA).

        used: the states to keep; by default all that any adapter reads, so that one cache serves models of any stage.
        Raises AudioError: too many clips cannot be read.
        """
        paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
        self.row = {path: i for i, path in enumerate(paths)}
        config, self.used, self.device = model.encoder.config, used or model.used_states, model.prompts.device
        self.n_states = config.n_layers + 1
        shape = (len(paths), config.context, config.width)
        self.states = {k: torch.empty(shape, dtype=torch.float16) for k in self.used}  # (N, T, D_w)
        self.frames = torch.empty(len(paths), dtype=torch.long)
        self.readable = torch.ones(len(paths), dtype=torch.bool)
        for start in progress(range(0, len(paths), batch)):
            names = paths[start : start + batch]
            waveforms, n_samples, wrong = read_padded(names, config.n_samples)
            for i, why in enumerate(wrong):
                if why:
                    (unreadable or Unreadable(0)).add(names[i], why)
                    self.readable[start + i] = False
            states, frames = model.encode(waveforms.to(self.device), n_samples.to(self.device))
            for k in self.used:
                self.states[k][start : start + batch] = states[k]
            self.frames[start : start + batch] = frames.cpu()

    def __call__(self, items: list[dict]) -> tuple[list[Tensor], Tensor]:
        """What DIFFA.encode gives for these items: states (unused ones empty) and frames (B,)."""
        rows = torch.tensor([self.row[item["audio_filepath"]] for item in items])
        states = [torch.empty(0)] * self.n_states
        for k in self.used:
            states[k] = self.states[k][rows].to(self.device).float()  # (B, T, D_w)
        return states, self.frames[rows].to(self.device)

    def is_readable(self, items: list[dict]) -> Tensor:
        """(B,) false where a clip could not be read."""
        return self.readable[[self.row[item["audio_filepath"]] for item in items]]


class Clips(Dataset):
    """Batches of clips as worker processes prepare them: waveforms, or the encoder's states from their files."""

    def __init__(self, items: list[dict], config, used: tuple[int, ...], file_of: Callable[[str], Path] | None):
        self.paths, self.config, self.used, self.file_of = [item["audio_filepath"] for item in items], config, used, file_of

    def __getitem__(self, rows: list[int]) -> tuple[dict | Tensor, Tensor, list[str]]:
        """Waveforms (B, S) or states {k: (B, T, D_w)}, samples or real frames (B,), and what is wrong with each clip."""
        paths = [self.paths[row] for row in rows]
        if self.file_of is None:
            return read_padded(paths, self.config.n_samples)
        found, frames, wrong = [], [], []
        for path in paths:
            try:
                found.append(load_file(self.file_of(path)))
                wrong.append("")
            except (OSError, SafetensorError) as error:
                found.append({})
                wrong.append(f"{path}: its encoder states cannot be read ({error}); run anew to make them")
            frames.append(int(found[-1]["frames"]) if found[-1] else 1)
        states = {}
        for k in self.used:
            rows = [clip[str(k)] if clip else torch.zeros(1, self.config.width) for clip in found]  # (T_clip, D_w) each
            states[k] = torch.zeros(len(rows), max(map(len, rows)), self.config.width, dtype=torch.float16)
            for place, row in zip(states[k], rows):
                place[: len(row)] = row
        return states, torch.tensor(frames), wrong


def ahead(clips: Clips, batches: Iterable[list[int]], workers: int, pin: bool) -> Iterator:
    """The clips of each batch in turn, prepared by workers while the caller is busy."""
    options = {"prefetch_factor": 4} if workers else {}
    # A generator of its own: DataLoader would else draw from the global one, and dropout would change with it.
    loader = DataLoader(clips, batch_size=None, sampler=batches, num_workers=workers, generator=torch.Generator(), pin_memory=pin, **options)
    return iter(loader)


def state_file(folder: Path, encoder_name: str, path: str, used: tuple[int, ...]) -> Path:
    """Where a clip's states lie. The name changes when the clip, the encoder or the wanted states do."""
    facts = Path(path).stat()
    key = f"{encoder_name} {Path(path).resolve()} {facts.st_size} {facts.st_mtime_ns} {used}"
    name = hashlib.sha256(key.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def is_whole(file: Path) -> bool:
    """True for a file of states that can be read."""
    try:
        with safe_open(file, "pt") as states:  # compares the file's size with what its header promises
            return "frames" in states.keys()
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def fill_folder(model, items: list[dict], file_of: Callable[[str], Path], workers: int, unreadable: Unreadable, batch: int = 16) -> None:
    """Encode, with the model's encoder, each clip that has no file yet; processes share the work.

    The last state is cut to the real frames, since the semantic adapter looks no further: LibriSpeech takes 40 % of the
    room. 960 hours of Whisper small are 265 GB for stage 1; stage 2's tapped states are kept whole, 10 MB a clip.
    """
    config, used, device = model.encoder.config, needed_states(model), model.prompts.device
    all_paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
    paths = [path for path in all_paths[ranks.rank() :: ranks.world()] if Path(path).is_file() and not is_whole(file_of(path))]
    rows = [list(range(i, min(i + batch, len(paths)))) for i in range(0, len(paths), batch)]
    clips = Clips([{"audio_filepath": path} for path in paths], config, used, None)
    for mine, (waveforms, n_samples, wrong) in zip(tqdm(rows, desc="encoding", leave=False, disable=ranks.rank() > 0), ahead(clips, rows, workers, False)):
        states, _ = model.encode(waveforms.to(device), n_samples.to(device))
        for i, row in enumerate(mine):
            if wrong[i]:
                unreadable.add(paths[row], wrong[i])
                continue
            frames = int(encoder_frames(n_samples[i]))
            cut = {k: frames if k == config.n_layers and ("acoustic" not in model.trainable() or k not in model.config.taps) else None for k in used}
            file = file_of(paths[row])
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{ranks.rank()}.tmp")
            kept = {str(k): states[k][i, : cut[k]].half().cpu().contiguous() for k in used}
            save_file(kept | {"frames": torch.tensor(frames)}, temporary)
            temporary.replace(file)
    ranks.wait()


class Stream:
    """Clips of step after step, prepared ahead: decoded audio, or states from files."""

    def __init__(self, model, items, rows_of_step, places, steps: int, workers: int, unreadable: Unreadable, work: Work, file_of=None):
        """rows_of_step(step) -> (batch,) indices of items; places: of the batch, one array for each of my parts."""
        self.model, self.items, self.rows_of_step, self.places, self.steps = model, items, rows_of_step, places, steps
        self.workers, self.unreadable, self.work, self.file_of, self.next = workers, unreadable, work, file_of, None
        self.clips = Clips(items, model.encoder.config, needed_states(model), file_of)

    def __call__(self, step: int) -> Iterator[Heard]:
        """The parts of a step, one by one."""
        device = self.model.prompts.device
        if step != self.next:  # the first step, or the one where a run goes on
            batches = (self.rows_of_step(s)[p].tolist() for s in range(step, self.steps) for p in self.places)
            self.loader = ahead(self.clips, batches, self.workers, device.type == "cuda")
        self.next = step + 1
        for places in self.places:
            started = time.perf_counter()
            found, lengths, wrong = next(self.loader)
            self.work.waited += time.perf_counter() - started
            for row, why in zip(self.rows_of_step(step)[places], wrong):
                if why:
                    self.unreadable.add(self.items[row]["audio_filepath"], why)
            lengths = lengths.to(device, non_blocking=True)
            if self.file_of is None:
                states, frames = self.model.encode(found.to(device, non_blocking=True), lengths)
            else:
                states, frames = [torch.empty(0)] * (self.model.encoder.config.n_layers + 1), lengths
                for k, state in found.items():
                    states[k] = state.to(device, non_blocking=True).float()
            yield states, frames, torch.tensor([not why for why in wrong])
