"""The frozen encoder's states of clips in a folder: one file for each clip, made once, ever.

Whisper small's states of LibriSpeech (960 hours) take 265 GB for stage 1. Stage 2 keeps its tapped
states whole, 10 MB a clip.

Shapes: B clips, T encoder frames, D_w encoder width.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from checkpoints.files import whole_file
from training import processes
from training.states import Read, Unreadable, encode_clips

BATCH = 16  # clips that are encoded together
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
            return "frames" in states.keys()  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return False


def read_state_files(paths: list[str], file_of: FileOf, used: tuple[int, ...], width: int) -> Read:
    """States {k: (B, T, D_w) in float16} of clips, for k in used, from their files.

    A clip whose file cannot be read has zeros.
    """
    clips = []
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
    nothing = torch.zeros(1, width, dtype=torch.float16)
    states = {}
    for k in used:
        rows = [clip.get(str(k), nothing) for clip in clips]  # (T_clip, D_w) each
        states[k] = pad_sequence(rows, batch_first=True)
    return states, torch.tensor([int(clip["frames"]) for clip in clips]), errors


def fill_folder(
    model,
    items: list[dict],
    file_of: FileOf,
    workers: int,
    unreadable: Unreadable,
    cut: bool = False,
) -> None:
    """Encode each clip that has no file yet; the processes divide the work.

    Args:
        model: a DIFFA, whose encoder is used; the states that its parts read are kept.
        items: of a manifest. workers: processes that decode audio ahead. cut: see
            read_padded.
    Raises:
        AudioError: too many clips cannot be read.
    """
    all_paths = list(dict.fromkeys(item["audio_filepath"] for item in items))
    local_paths = all_paths[processes.rank() :: processes.world()]
    paths = [p for p in local_paths if Path(p).is_file() and not is_whole(file_of(p))]

    encoded = encode_clips(model, paths, BATCH, unreadable, workers, cut)
    for rows, states, frames, errors in encoded:
        for i, row in enumerate(rows):
            if errors[i]:
                continue

            # The semantic adapter reads the real frames only; the tapped states are read in full.
            kept = {"frames": frames[i].cpu()}
            for k in model.read_states:
                is_tapped = model.acoustic is not None and k in model.config.taps
                n = None if is_tapped else int(frames[i])
                kept[str(k)] = states[k][i, :n].half().cpu().contiguous()  # (T or fewer, D_w)
            with whole_file(file_of(paths[row])) as temporary:
                save_file(kept, temporary)
    processes.wait()
