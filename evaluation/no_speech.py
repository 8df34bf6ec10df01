"""What does a model answer where nobody speaks? Words that it invents for silence, noise and music.

    python -m evaluation.no_speech --out runs/wer/no_speech.jsonl [--adapters DIR] [--clips 20]

The sounds are synthetic and the same everywhere: SOUNDS. They last from half a second to --longest.
OUT is written and resumed as by evaluation.transcribe; a line has `kind` in place of a reference.

Shapes: S samples.
"""

import argparse
import collections
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from checkpoints.command_line import number, one_line_errors
from data import pad_waveforms
from encoder import SAMPLE_RATE
from evaluation.transcribe import add_arguments, answer_all
from evaluation.wer import normalize_english
from training.states import Read

SHORTEST = 0.5  # seconds
NOTES = (220.0, 247.5, 275.0, 330.0, 371.25)  # Hz, pentatonic
NOTE_SECONDS = 0.3


def at_level(waveform: Tensor, decibel: float) -> Tensor:
    """A waveform (S,) scaled to a root mean square of `decibel` below full scale."""
    return waveform * 10 ** (decibel / 20) / waveform.pow(2).mean().sqrt()


def silence(n: int, generator: torch.Generator) -> Tensor:
    """n samples that are 0."""
    return torch.zeros(n)


def white_noise(n: int, generator: torch.Generator) -> Tensor:
    """n samples of noise with equal power at all frequencies, as of a loud fan."""
    return at_level(torch.randn(n, generator=generator), -30)


def faint_noise(n: int, generator: torch.Generator) -> Tensor:
    """n samples of white noise as weak as that of a good microphone in a quiet room."""
    return at_level(torch.randn(n, generator=generator), -70)


def pink_noise(n: int, generator: torch.Generator) -> Tensor:
    """n samples of noise whose power falls as 1/f, as rain or a street has about."""
    # The amplitude falls as the square root.
    spectrum = torch.fft.rfft(torch.randn(n, generator=generator))
    spectrum /= torch.arange(len(spectrum)).clamp(min=1).sqrt()
    return at_level(torch.fft.irfft(spectrum, n), -30)


def music(n: int, generator: torch.Generator) -> Tensor:
    """n samples of chords: every 0.3 s two random notes, plucked, with four overtones each."""
    # At each sample: which pluck it belongs to, and how long ago that was.
    t = torch.arange(n) / SAMPLE_RATE  # (S,)
    since = t % NOTE_SECONDS  # seconds since the last pluck
    which = (t / NOTE_SECONDS).long()

    # Each voice draws a note a pluck; overtones fade with their number.
    wave = torch.zeros(n)
    for _voice in range(2):
        drawn = torch.randint(len(NOTES), (int(which[-1]) + 1,), generator=generator)
        hertz = torch.tensor(NOTES)[drawn][which]  # (S,)
        for overtone in range(1, 6):
            wave += torch.sin(2 * torch.pi * overtone * hertz * since) / overtone
    return at_level(wave * torch.exp(-6 * since), -25)


SOUNDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "silence": silence,
    "faint noise": faint_noise,
    "white noise": white_noise,
    "pink noise": pink_noise,
    "music": music,
}


def sounds(n_clips: int, longest: float) -> list[dict]:
    """Rows of `n_clips` sounds of each kind, whose `duration` grows evenly up to `longest`."""
    rows = []
    for kind in SOUNDS:
        for i in range(n_clips):
            duration = SHORTEST + (longest - SHORTEST) * (i + 1) / n_clips
            row = {"id": f"{kind} {i}", "kind": kind, "duration": round(duration, 3), "seed": i}
            rows.append(row)
    return rows


def waveform_of(row: dict) -> Tensor:
    """The sound (S,) of a row."""
    generator = torch.Generator().manual_seed(row["seed"])
    return SOUNDS[row["kind"]](int(row["duration"] * SAMPLE_RATE), generator)


def invented_lines(rows: list[dict]) -> list[str]:
    """A table of the words invented for each kind of sound, and the most frequent answers."""
    heading = f"{'':<12} {'clips':>6} {'answered with words':>20} {'words a minute':>15}  usually"
    lines = [heading]
    for kind in SOUNDS:
        # A filler such as "um" is no word.
        found = [row for row in rows if row["kind"] == kind]
        words = [len(normalize_english(row["text"] or "").split()) for row in found]

        # How often and how much is invented.
        with_words = 100 * sum(n > 0 for n in words) / len(found)
        rate = 60 * sum(words) / sum(row["duration"] for row in found)

        ((text, times),) = collections.Counter(row["text"] for row in found).most_common(1)
        usual = f"{text!r} ({times} times)"
        lines.append(f"{kind:<12} {len(found):>6} {with_words:>18.1f} % {rate:>15.1f}  {usual}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.no_speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    few = functools.partial(number, kind=int, least=1, most=10_000)
    parser.add_argument("--clips", type=few, default=20, help="of each kind (default 20)")
    seconds = functools.partial(number, kind=float, least=SHORTEST, most=3600)
    longest = "seconds of the longest sound (default 10); what exceeds the window is cut off"
    parser.add_argument("--longest", type=seconds, default=10.0, help=longest)
    args = parser.parse_args()

    with one_line_errors("python -m evaluation.no_speech"):
        # They are made as they are heard.
        clips = sounds(args.clips, args.longest)

        def read(indices: list[int], n_samples: int) -> Read:
            waveforms = [waveform_of(clips[i]) for i in indices]
            names = [clips[i]["id"] for i in indices]
            return *pad_waveforms(waveforms, n_samples, names, cut=True), [""] * len(indices)

        about = f"{args.clips} sounds up to {args.longest:g} s"
        rows, speed = answer_all(args, clips, read, about)
        print("\n".join([*invented_lines(rows), speed.line()]))


if __name__ == "__main__":
    main()
