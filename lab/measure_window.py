"""How a shorter encoder window (`--audio-context`) changes the hidden states of clips that fit it.

    python -m lab.measure_window --whisper whisper-tiny.en --clips DIR/test.json

Only frames of real audio are compared. For each state: the norm of the difference over the norm of the whole window's
state, in percent, and the least cosine of two frames. Beside them: the seconds that a clip takes.

Shapes: T real encoder frames, over all clips; D width.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.command_line import one_line_errors
from checkpoints.whisper import load_whisper
from data import load_manifest, pad_waveforms, read_audio
from encoder import WhisperEncoder, encoder_frames, log_mel
from lab.findings import markdown


@torch.inference_mode()
def states_of_clips(encoder: WhisperEncoder, clips: list[str]) -> tuple[list[Tensor], float]:
    """Every hidden state of the real frames of all clips, (T, D) each; and the seconds a clip took."""
    by_clip = []
    started = time.perf_counter()
    for clip in clips:  # one by one: a whole window's states of many clips are large
        waveform, n_samples = pad_waveforms([read_audio(clip)], encoder.config.n_samples, [clip])
        n_frames = encoder_frames(int(n_samples[0]))
        states = encoder(log_mel(waveform, encoder.config.n_mels))
        by_clip.append([state[0, :n_frames] for state in states])

    seconds = (time.perf_counter() - started) / len(clips)
    return [torch.cat(layer) for layer in zip(*by_clip)], seconds


def difference(short: Tensor, whole: Tensor) -> str:
    """Relative difference in percent of states (T, D), and the least cosine of two frames."""
    percent = 100 * ((short - whole).norm() / whole.norm()).item()
    cosine = torch.cosine_similarity(short, whole, dim=-1).min().item()
    return f"{percent:.1f} % ({cosine:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.measure_window", description="What a shorter window changes."
    )
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--clips", type=Path, required=True, help="manifest")
    parser.add_argument("--windows", type=float, nargs="+", default=[4.0, 6.0, 10.0, 20.0])
    parser.add_argument("--items", type=int, default=10, help="clips that the least window holds")
    args = parser.parse_args()

    with one_line_errors("python -m lab.measure_window"):
        items = load_manifest(args.clips)
        fit = [item["audio_filepath"] for item in items if item["duration"] <= min(args.windows)]
        clips = fit[:: max(len(fit) // args.items, 1)][: args.items]
        if not clips:
            raise ValueError(
                f"{args.clips}: no clip fits {min(args.windows):g} s; choose longer --windows"
            )

        whole, seconds = states_of_clips(load_whisper(args.whisper), clips)
        rows = [["whole", *["-"] * len(whole), f"{seconds:.3f}"]]
        for window in args.windows:
            encoder = load_whisper(args.whisper, audio_context=window)
            short, seconds = states_of_clips(encoder, clips)
            cells = [difference(a, b) for a, b in zip(short, whole)]
            rows.append([f"{window:g} s", *cells, f"{seconds:.3f}"])

    heads = ["window", *(f"state {k}" for k in range(len(whole))), "seconds a clip"]
    print(f"{len(clips)} clips\n{markdown(heads, rows)}")


if __name__ == "__main__":
    main()
