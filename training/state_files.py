"""The frozen encoder's states of clips in a folder: one file for each clip, made once, ever.

Whisper small's states of LibriSpeech (960 hours) take 265 GB for stage 1. Stage 2 keeps its tapped
states whole, 10 MB a clip.

Shapes: B clips, T encoder frames, D_w encoder width.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import whole_file
from encoder import encoder_frames
from training import processes
from training.states import Unreadable, read_padded
from training.stream import load_ahead

FileOf = Callable[[str], Path]  # from a clip's path to the file of its states


def state_file(folder: Path, encoder_name: str, path: str, used: tuple[int, ...]) -> Path:
    """The file of a clip's states. Its name changes with the clip, the encoder and `used`."""
    facts = Path(path).stat()
    key = f"{encoder_name} {Path(path).resolve()} {facts.st_size} {facts.st_mtime_ns} {used}"
    name = hashlib.sha256(key.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def is_whole(file: Path) -> bool:
    """True for a file of states that can be read."""
    try:
        with safe_open(file, "pt") as states:  # compares the file's size with its header
            return "frames" in states.keys()
    except (OSError, SafetensorError):
        return False


def read_state_files(
    paths: list[str], file_of: FileOf, used: tuple[int, ...], width: int
) -> tuple[dict[int, Tensor], Tensor, list[str]]:
    """States of clips from their files; zeros for a clip whose file cannot be read.

    Returns:
        {k: (B, T, D_w) in float16} for k in used, real frames (B,), and what is wrong with each
        clip ("": nothing).
    """
    clips: list[dict] = []
    errors = []
    for path in paths:
        try:
            clips.append(load_file(file_of(path)))
            errors.append("")
        except (OSError, SafetensorError) as error:
            clips.append({"frames": torch.tensor(1)})
            errors.append(
                f"{path}: its encoder states cannot be read ({error}); run again to make them"
            )

    # Clips have different numbers of frames: padded with zeros to the longest.
    states = {}
    for k in used:
        rows = [clip.get(str(k), torch.zeros(1, width)) for clip in clips]  # (T_clip, D_w) each
        longest = max(len(row) for row in rows)
        states[k] = torch.zeros(len(rows), longest, width, dtype=torch.float16)
        for padded, row in zip(states[k], rows, strict=True):
            padded[: len(row)] = row
    return states, torch.tensor([int(clip["frames"]) for clip in clips]), errors


@torch.no_grad()
def fill_folder(
    model,
    items: list[dict],
    file_of: FileOf,
    workers: int,
    unreadable: Unreadable,
    batch: int = 16,
) -> None:
    """Encode each clip that has no file yet; the processes share the work.

    Args:
        model: a DIFFA, whose encoder is used; the states that its parts read are kept.
        items: of a manifest. workers: processes that decode audio ahead. batch: clips at a time.
    Raises:
        AudioError: too many clips cannot be read.
    """
    config = model.encoder.config
    all_paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
    local_paths = all_paths[processes.rank() :: processes.world()]
    paths = [p for p in local_paths if Path(p).is_file() and not is_whole(file_of(p))]

    batches = [range(i, min(i + batch, len(paths))) for i in range(0, len(paths), batch)]
    read = functools.partial(read_padded, n_samples=config.n_samples)
    loader = load_ahead(paths, read, batches, workers)
    bar = tqdm(batches, desc="encoding", leave=False, disable=processes.rank() > 0)

    for rows, (waveforms, n_samples, errors) in zip(bar, loader, strict=True):
        states, _ = model.encode(waveforms.to(model.device), n_samples.to(model.device))
        for i, row in enumerate(rows):
            if errors[i]:
                unreadable.add(paths[row], errors[i])
                continue

            frames = int(encoder_frames(n_samples[i]))
            kept = {"frames": torch.tensor(frames)}
            for k in model.read_states:
                # The semantic adapter reads the real frames only; taps are read in full.
                is_tapped = model.acoustic is not None and k in model.config.taps
                whole = states[k][i]  # (T, D_w)
                cut = whole if is_tapped else whole[:frames]
                kept[str(k)] = cut.half().cpu().contiguous()
            with whole_file(file_of(paths[row])) as temporary:
                save_file(kept, temporary)
    processes.wait()
