"""What `--audio-context` does to an encoder's hidden states: windows of some seconds against the whole one, on clips that fit them.

    python -m lab.measure_window --whisper whisper-tiny.en --clips DIR/test.json

Only frames of real sound are compared. For each state: the norm of the difference over the norm of the whole window's state, in
percent, and the least cosine of two frames; beside them the seconds that a clip takes.

Shapes: T real encoder frames of a clip, D width.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from training.clips import read_padded
from data import load_manifest
from encoder import WhisperEncoder, encoder_frames, log_mel
from checkpoints.weights import load_whisper


@torch.inference_mode()
def states_in_window(encoder: WhisperEncoder, paths: list[str]) -> tuple[list[Tensor], float]:
    """All states, real frames of all clips one after the other, (frames, D) each; and the seconds a clip took."""
    states, started = [], time.perf_counter()
    for path in paths:  # one by one: the whole window's states of many clips are large
        waveform, n_samples, wrong = read_padded([path], encoder.config.n_samples)
        if wrong[0]:
            raise SystemExit(wrong[0])
        T = encoder_frames(int(n_samples[0]))
        states.append([state[0, :T] for state in encoder(log_mel(waveform, encoder.config.n_mels))])  # (T, D) each
    return [torch.cat(mine) for mine in zip(*states)], (time.perf_counter() - started) / len(paths)


def difference(cut: Tensor, whole: Tensor) -> tuple[float, float]:
    """Of states (frames, D): relative difference in percent, and the least cosine of two frames."""
    return 100 * ((cut - whole).norm() / whole.norm()).item(), torch.cosine_similarity(cut, whole, dim=-1).min().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--clips", type=Path, required=True, help="manifest")
    parser.add_argument("--windows", type=float, nargs="+", default=[4.0, 6.0, 10.0, 20.0], help="seconds")
    parser.add_argument("--items", type=int, default=10, help="so many clips that the least window holds")
    args = parser.parse_args()
    fit = [item for item in load_manifest(args.clips) if item["duration"] <= min(args.windows)]
    clips = [item["audio_filepath"] for item in fit[:: max(len(fit) // args.items, 1)][: args.items]]
    whole, seconds = states_in_window(load_whisper(args.whisper), clips)
    print(f"{len(clips)} clips; a clip takes {seconds:.2f} s in the whole window")
    print("| window | " + " | ".join(f"state {k}" for k in range(len(whole))) + " | seconds a clip |")
    print("| --- |" + " --- |" * (len(whole) + 1))
    for window in args.windows:
        cut, seconds = states_in_window(load_whisper(args.whisper, audio_context=window), clips)
        cells = ["{:.1f} % ({:.3f})".format(*difference(a, b)) for a, b in zip(cut, whole)]
        print(f"| {window:g} s | " + " | ".join(cells) + f" | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
