"""What a recording's signal says of the voice, in words; and the seed transcript, which gathers it.

Where a corpus does not say how a voice sounds, it is measured: pitch, volume, speaking speed.

Shapes: S samples at SAMPLE_RATE, n frames.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder import SAMPLE_RATE

# Bounds between low, normal and high. They are ours: the paper names none.
PITCH = {"male": (100, 140), "female": (180, 230), "": (130, 210)}  # Hz
VOLUME = (-32, -18)  # dB below full scale, over frames with sound
SPEED = (2.0, 3.3)  # words a second


def pitch(waveform: Tensor) -> float | None:
    """Median fundamental frequency of a clip (S,), 60 to 400 Hz; None if nothing is voiced.

    It is the lag of the first high peak of the autocorrelation.
    """
    # 50 ms hold three periods of the lowest voice.
    window = SAMPLE_RATE // 20
    hop = SAMPLE_RATE // 50
    if len(waveform) < window:
        return None

    # Frames with sound.
    frames = waveform.unfold(0, window, hop)  # (n, window)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames[frames.pow(2).mean(dim=1) > 0.1 * waveform.pow(2).mean()]

    # Autocorrelation of each frame and of the window. The window's own fades with the lag and would
    # favour high voices, so it is divided out.
    hann = torch.hann_window(window)
    correlation = autocorrelation(frames * hann)  # (n, window)
    fading = autocorrelation(hann)  # (window,)
    shape = correlation / correlation[:, :1].clamp(min=1e-12)
    shape = shape / (fading / fading[0]).clamp(min=1e-3)

    # The first peak that is nearly the highest; the others are its multiples, octaves too low.
    first = SAMPLE_RATE // 400
    last = SAMPLE_RATE // 60
    here = shape[:, first:last]  # (n, lags)
    highest = here.max(dim=1, keepdim=True).values
    is_peak = (here >= shape[:, first - 1 : last - 1]) & (here >= shape[:, first + 1 : last + 1])
    is_peak &= here > 0.9 * highest
    lag = first + is_peak.float().argmax(dim=1)  # (n,)

    voiced = (highest[:, 0] > 0.5) & is_peak.any(dim=1)
    return SAMPLE_RATE / lag[voiced].float().median().item() if voiced.any() else None


def autocorrelation(frames: Tensor) -> Tensor:
    """Autocorrelation of frames (..., window) at lags 0 to window - 1, (..., window)."""
    window = frames.shape[-1]
    spectrum = torch.fft.rfft(frames, 2 * window)
    return torch.fft.irfft(spectrum.abs() ** 2)[..., :window]


def volume(waveform: Tensor) -> float:
    """Loudness of a clip (S,) in dB below full scale, over the frames that hold sound."""
    power = F.avg_pool1d(waveform.pow(2)[None], min(400, len(waveform)))[0]
    power = power[power > 0.01 * power.max()].mean()
    return 10 * power.clamp(min=1e-12).log10().item()


def range_name(value: float, bounds: tuple, names: str = "low normal high") -> str:
    """The name of the range that a value falls in: below, between or above the two bounds."""
    return names.split()[sum(value > bound for bound in bounds)]


def measured(waveform: Tensor, words: str, gender: str) -> dict[str, str]:
    """Attributes of a clip (S,) taken from its signal. words, gender: "" where unknown."""
    attributes = {"Volume": range_name(volume(waveform), VOLUME)}

    hertz = pitch(waveform)
    if hertz is not None:
        attributes["Pitch"] = range_name(hertz, PITCH[gender])

    if words:
        speed = len(words.split()) / (len(waveform) / SAMPLE_RATE)
        attributes["Speaking speed"] = range_name(speed, SPEED, "slow normal fast")
    return attributes


def describe_clip(words: str, attributes: dict[str, str], end: int) -> str:
    """One line about a clip of `end` seconds: time span, words (maybe ""), attributes."""
    span = f"[00:00:00 - {end // 3600:02d}:{end // 60 % 60:02d}:{end % 60:02d}]"
    facts = ", ".join(f"{name}: {value}" for name, value in attributes.items())
    return " ".join(filter(None, [span, words, f"({facts})"]))


def seed_transcript(words: str, attributes: dict[str, str], seconds: float) -> str:
    """One line with all that is known of a clip, for a text model to answer questions about it."""
    facts = attributes | {"Duration": f"{seconds:.1f} s"}
    return describe_clip(words, facts, math.ceil(seconds))
