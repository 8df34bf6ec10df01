"""Samples of an audio file, in bounded time and memory whatever its header says.

Shapes: S samples, C channels.
"""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from audio.whole import refuse_partial

RATES = (1000, 768_000)  # Hz
BLOCK = 1 << 20  # samples that are decoded at once: a header may promise any number of them
LONGEST = 3600.0  # seconds
LARGEST = 1 << 30  # bytes of a file
LOUDEST = 10.0  # a float file may exceed 1 a little
MOST_PHASES = 2000  # of a resampling filter; an odd sample rate is rounded to the nearest ratio


def decode(path: Path, max_seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Samples (S, C) in float32 and the sample rate of a WAV, FLAC, OGG or MP3 file.

    max_seconds: only the beginning is decoded. Raises ValueError: what is wrong with the file.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB; cut it into clips")
    try:
        # An open file, because the library does not take every name.
        with open(path, "rb") as opened, soundfile.SoundFile(opened) as file:
            rate = file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise ValueError(f"its sample rate of {rate} Hz is not one of audio")
            wanted = math.ceil((max_seconds or LONGEST) * rate) + 1
            samples = read_blocks(file, wanted)
    except ValueError:
        raise
    except Exception as error:  # soundfile raises many classes
        raise ValueError(f"cannot be read as WAV, FLAC, OGG or MP3 ({error})") from error

    if max_seconds is None:
        if len(samples) == wanted:
            raise ValueError(f"longer than {LONGEST / 60:.0f} minutes; cut it into clips")
        refuse_partial(path.read_bytes(), len(samples) / rate)
    return samples, rate


def read_blocks(file: soundfile.SoundFile, wanted: int) -> np.ndarray:
    """At most `wanted` samples (S, C), read block by block until there are no more."""
    blocks = [np.zeros((0, file.channels), dtype=np.float32)]
    while wanted > 0:
        size = min(BLOCK // file.channels + 1, wanted)
        block = file.read(size, dtype="float32", always_2d=True)  # (size or fewer, C)
        blocks.append(block)
        wanted -= len(block)
        if len(block) < size:
            break
    return np.concatenate(blocks)


def mix(samples: np.ndarray) -> Tensor:
    """One channel (S,) of samples (S, C), their mean. Raises ValueError: no audio can be heard."""
    if len(samples) == 0:
        raise ValueError("holds no samples")
    if not np.isfinite(samples).all():
        raise ValueError("holds NaN or infinite samples")
    loudest = np.abs(samples).max()
    if loudest == 0:
        raise ValueError("holds only silence (every sample is 0)")
    if loudest > LOUDEST:
        integers = " (16-bit integers in a float file? divide them by 32,768)"
        advice = integers if 256 < loudest <= 32_768 else ""
        raise ValueError(f"holds samples up to {loudest:.3g}, far outside [-1, 1]{advice}")

    mean = samples.mean(axis=1)
    if np.abs(mean).max() < 1e-4 * loudest:
        raise ValueError("its channels cancel each other (opposite phase); keep one of them")
    return torch.from_numpy(mean)


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """A waveform (S,) at another sample rate; usual rates exactly, odd ones within 0.05 %."""
    ratio = Fraction(new_rate, rate).limit_denominator(MOST_PHASES)
    if ratio == 1:
        return waveform
    return torchaudio.functional.resample(waveform, ratio.denominator, ratio.numerator)
