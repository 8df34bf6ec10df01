"""Read a sound file in bounded time and memory, and refuse sound that a model cannot use.

Shapes: S samples, C channels.
"""

import io
import math
import os
import stat
from pathlib import Path

import numpy as np
import soundfile

from audio.completeness import NO_INDEX, missing_sound, with_index

LOWEST_RATE = 2000  # Hz; below is no speech
HIGHEST_RATE = 768_000  # Hz
LONGEST = 3600  # seconds of a clip that is read whole
BLOCK = 2**20  # numbers decoded at a time, over all channels
LOUDEST = 8.0  # float files may exceed 1, but not by so much
LOUDEST_16_BIT = 40_000  # 32,768 and what resampling may add
CANCELLED = 0.01  # of the channels' power must be left in their mean


class AudioError(ValueError):
    """An audio file that cannot be used; the message names it."""


class Forward(soundfile.SoundFile):
    """An open file that is read straight on; soundfile would seek after each block.

    A FLAC that was written to a pipe cannot be sought in.
    """

    def seekable(self) -> bool:
        return False


def decode(path: str | Path, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """A sound file as float32 mono (S,), about in [-1, 1], and its rate in Hz.

    Args:
        seconds: read no more than this from the start; by default all, at most an hour.
    Raises:
        AudioError: whatever is wrong with the file.
    """
    name = str(path).encode(errors="backslashreplace").decode()  # names need not be UTF-8
    try:
        # A FIFO would be waited for, and a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError("is a folder or device, not an audio file")

        # libsndfile gets no name: an ending such as .raw would make it read anything as sound.
        with open(path, "rb") as file, Forward(file.fileno(), closefd=False) as sound:
            try:
                return read_mono(sound, file, seconds), sound.samplerate
            except AudioError as error:
                # libsndfile guesses the length of an MP3 without an index, often too short.
                indexed = with_index(file) if str(error) == NO_INDEX else None
                if indexed is None:
                    raise
            with Forward(io.BytesIO(indexed)) as sound:
                return read_mono(sound, file, seconds), sound.samplerate
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(f"{name}: no such audio file") from None
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be read as WAV, FLAC, OGG or MP3 ({reason})") from error


def read_mono(sound: soundfile.SoundFile, file, seconds: float | None) -> np.ndarray:
    """The mean of the channels (S,) of an open file. Raises AudioError, without the path."""
    rate = sound.samplerate
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(f"its rate is {rate} Hz, not {LOWEST_RATE} to {HIGHEST_RATE}")
    limit = LONGEST * min(rate, 48_000)
    wanted = limit + 1 if seconds is None else math.ceil(seconds * rate)

    # In blocks, because a header may promise any length.
    blocks = []
    n = 0
    peak = 0.0
    power = 0.0  # summed over samples, of the channels
    mean_power = 0.0  # the same of their mean
    while n < wanted:
        frames = min(wanted - n, BLOCK // sound.channels)
        block = sound.read(frames, dtype="float32", always_2d=True)  # (S, C)
        if len(block) == 0:
            break
        if not np.isfinite(block).all():
            raise AudioError("holds NaN or infinite samples")
        peak = max(peak, float(np.abs(block).max()))
        mono = block.mean(axis=1)  # (S,)
        power += np.square(block, dtype=np.float64).sum() / sound.channels
        mean_power += np.square(mono, dtype=np.float64).sum()
        blocks.append(mono)
        n += len(mono)

    # What Whisper would turn into noise is refused.
    if n == 0:
        raise AudioError("holds no samples")
    if n > limit and seconds is None:
        raise AudioError(f"lasts longer than {LONGEST} s; shorten it")
    if peak == 0:
        raise AudioError("holds only silence (every sample is 0)")
    if peak > LOUDEST:
        cause = (
            "16-bit numbers in a float file? divide by 32,768"
            if peak <= LOUDEST_16_BIT
            else "is it damaged?"
        )
        raise AudioError(f"holds samples up to {peak:.3g}, far outside [-1, 1] ({cause})")
    if mean_power < CANCELLED * power:
        raise AudioError("its channels cancel each other (opposite phase); keep one of them")

    problem = missing_sound(sound, file, n) if n < wanted else ""
    if problem:
        raise AudioError(problem)
    return np.concatenate(blocks)
