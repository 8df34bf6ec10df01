"""The sound files of an exam: found, read once, and checked before a model is loaded."""

import sys
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data import AudioError, read_audio
from encoder import SAMPLE_RATE
from evaluation.exam_rules import Exam, ExamError

# Samples that are kept of a clip: more than any Whisper hears, so that longer ones are known.
LONGEST = 30 * SAMPLE_RATE + 1


@dataclass(frozen=True, kw_only=True)
class ExamClip:
    """A sound file of an exam."""

    path: Path
    waveform: Tensor  # (S,) at 16 kHz, at most LONGEST of them


def find_clip(audio: str, folder: Path) -> Path:
    """The file of a published path, which may begin with a slash and yet lie below the folder.

    Where nothing is found below, an absolute path as it stands is tried, then the file name alone.
    """
    below = folder / audio.lstrip("/\\")
    candidates = (below, folder / audio, folder / Path(audio).name)
    return next(filter(isfile, candidates), below)


def read_clips(
    items: list[dict], exam: Exam, folder: Path
) -> tuple[list[ExamClip | None], list[str]]:
    """The clip of each item, None where it cannot be used; and why, a line for each such file.

    Each file is read once, and stays in memory: 64 kB a second, about 2 GB for MMSU.
    """
    paths = [find_clip(item[exam.audio_field], folder) for item in items]

    # Several items may have the same file. All problems are listed at once.
    clips = {}
    problems = []
    for path in tqdm(dict.fromkeys(paths), "reading clips", leave=False, disable=None):
        try:
            clips[path] = ExamClip(path=path, waveform=read_audio(path, LONGEST / SAMPLE_RATE))
        except AudioError as error:
            problems.append(str(error))
    return [clips.get(path) for path in paths], problems


def usable_clips(
    items: list[dict], exam: Exam, folder: Path, skip_missing: bool
) -> list[ExamClip | None]:
    """The clip of each item, None where it is skipped; those that cannot be used are listed.

    Raises ExamError: a clip cannot be used, and skip_missing is false; or none can.
    """
    clips, problems = read_clips(items, exam, folder)
    if not problems:
        return clips

    # Every file is listed, whether the exam goes on or not.
    n_items = clips.count(None)
    heading = f"{len(problems)} clips, of {n_items} items, cannot be used"
    listed = "\n  ".join(["", *problems])
    if not skip_missing or n_items == len(items):
        advice = "is --audio correct? --skip-missing leaves these items without a reply"
        raise ExamError(f"{heading}; {advice}{listed}")
    print(f"{heading} and have no reply:{listed}", file=sys.stderr)
    return clips
