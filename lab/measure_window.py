"""How a shorter encoder window (`--audio-context`) changes the hidden states of clips that fit it.

    python -m lab.measure_window WHISPER MANIFEST

Only frames of real audio are compared. For each state: the norm of the difference over the norm of
the whole window's state, in percent, and the least cosine of two frames.

Shapes: T real encoder frames, over all clips; D width.
"""

import argparse
import time

import torch
from torch import Tensor

from checkpoints.command_line import one_line_errors
from checkpoints.whisper import load_whisper
from data import load_manifest, pad_waveforms, read_audio
from encoder import WhisperEncoder, encoder_frames, log_mel
from lab.findings import markdown

WINDOWS = (4.0, 6.0, 10.0, 20.0)  # seconds
MOST_CLIPS = 10


@torch.inference_mode()
def states_of_clips(encoder: WhisperEncoder, clips: list[str]) -> tuple[list[Tensor], float]:
    """Hidden states of the real frames of all clips, (T, D) each; and the seconds a clip took."""
    by_clip = []
    started = time.perf_counter()
    for clip in clips:  # one by one: a whole window's states of many clips are large
        waveform, n_samples = pad_waveforms([read_audio(clip)], encoder.config.n_samples, [clip])
        states = encoder(log_mel(waveform, encoder.config.n_mels))
        by_clip.append([state[0, : encoder_frames(int(n_samples[0]))] for state in states])

    seconds = (time.perf_counter() - started) / len(clips)
    return [torch.cat(layer) for layer in zip(*by_clip)], seconds


def difference(short: Tensor, whole: Tensor) -> str:
    """Relative difference of states (T, D) in percent, and the least cosine of two frames."""
    percent = 100 * ((short - whole).norm() / whole.norm()).item()
    cosine = torch.cosine_similarity(short, whole, dim=-1).min().item()
    return f"{percent:.1f} % ({cosine:.3f})"


def main() -> None:
    name = "python -m lab.measure_window"
    parser = argparse.ArgumentParser(prog=name, description="The states of shorter windows.")
    parser.add_argument("whisper", help="directory of the hub")
    parser.add_argument("manifest", help="of clips")
    args = parser.parse_args()
    with one_line_errors(name):
        print(compare_windows(args.whisper, args.manifest))


def compare_windows(whisper: str, manifest: str) -> str:
    """The table of a Whisper and the clips of a manifest that fit the shortest window."""
    items = load_manifest(manifest)
    clips = [item["audio_filepath"] for item in items if item["duration"] <= min(WINDOWS)]
    clips = clips[:: max(len(clips) // MOST_CLIPS, 1)][:MOST_CLIPS]

    rows = []
    whole, seconds = states_of_clips(load_whisper(whisper), clips)
    for window in WINDOWS:
        short, short_seconds = states_of_clips(load_whisper(whisper, audio_context=window), clips)
        cells = [difference(a, b) for a, b in zip(short, whole)]
        rows.append([f"{window:g} s", *cells, f"{short_seconds:.3f}"])

    states = [f"state {k}" for k in range(len(whole))]
    return markdown(["window", *states, f"seconds a clip (30 s: {seconds:.3f})"], rows)


if __name__ == "__main__":
    main()
