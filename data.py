"""Audio files, manifests and batches of clips.

A manifest is a JSON list with one object an item: `audio_id, audio_filepath, input` (the instruction), `transcription,
target, dataset, duration` (seconds), `seed_transcript`; the format of the DIFFA release.

Shapes: S samples.
"""

import json
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from encoder import SAMPLE_RATE

MANIFEST_FIELDS = (
    "audio_id", "audio_filepath", "input", "transcription", "target", "dataset", "duration", "seed_transcript",
)  # fmt: skip


class AudioError(ValueError):
    """A sound file that cannot be listened to; the message names it."""


class ManifestError(ValueError):
    """A manifest that cannot be used; the message lists every bad item."""


def read_audio(path: str | Path) -> Tensor:
    """Any WAV, FLAC, OGG or MP3 file as mono float samples (S,) in [-1, 1] at 16 kHz.

    Raises AudioError: the file is absent, not audio, empty, silent, or holds NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be read as WAV, FLAC, OGG or MP3 ({error})") from error
    waveform = torch.from_numpy(samples.mean(axis=1))  # (S,)
    if len(waveform) == 0:
        raise AudioError(f"{path}: holds no samples")
    if not torch.isfinite(waveform).all():
        raise AudioError(f"{path}: holds NaN or infinite samples")
    if not waveform.any():
        raise AudioError(f"{path}: holds only silence (every sample is 0)")
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
    return waveform


def pad_waveforms(waveforms: list[Tensor], n_samples: int, names: list[str], cut: bool = False) -> tuple[Tensor, Tensor]:
    """Clips side by side, each padded with zeros to the encoder's context.

    Args:
        waveforms: clips (S,). names: what to call them in errors. n_samples: the context. cut: shorten longer clips.
    Returns:
        (B, n_samples) and the real numbers of samples (B,).
    Raises:
        AudioError: a clip longer than the context when cut is false.
    """
    batch = torch.zeros(len(waveforms), n_samples)
    for row, waveform, name in zip(batch, waveforms, names):
        if len(waveform) > n_samples and not cut:
            raise AudioError(
                f"{name}: {len(waveform) / SAMPLE_RATE:.1f} s is longer than the encoder's context of "
                f"{n_samples / SAMPLE_RATE:.1f} s; shorten it, or pass --cut to hear its beginning only"
            )
        row[: len(waveform)] = waveform[:n_samples]
    return batch, torch.tensor([min(len(w), n_samples) for w in waveforms])


def word_error_rate(said: list[str], meant: list[str]) -> float:
    """Substituted, missing and extra words in 100 words meant."""
    errors = sum(torchaudio.functional.edit_distance(m.split(), s.split()) for s, m in zip(said, meant))
    return 100 * errors / sum(len(m.split()) for m in meant)


def load_manifest(path: str | Path) -> list[dict]:
    """Items of a manifest, `audio_filepath` made absolute (it is relative to the manifest's folder).

    Raises ManifestError: not a JSON list, empty, or items with missing fields or files, all of them listed at once.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest; `make demo` makes the toy's, corpora.py others")
    try:
        items = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(items, list) or not items:
        raise ManifestError(f"{path}: not a JSON list with at least one item")
    problems, good = [], []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append(f"item {i}: not an object")
            continue
        name = f"item {i} ({item.get('audio_id', 'no audio_id')})"
        absent = [field for field in MANIFEST_FIELDS if field not in item]
        if absent:
            problems.append(f"{name}: lacks {', '.join(absent)}")
            continue
        if not isinstance(item["audio_filepath"], str):
            problems.append(f"{name}: audio_filepath is not text")
            continue
        file = path.parent / item["audio_filepath"]
        if not file.is_file():
            problems.append(f"{name}: no such file {file}")
        good.append(item | {"audio_filepath": str(file)})
    if problems:
        raise ManifestError(f"{path}: {len(problems)} bad items\n  " + "\n  ".join(problems))
    return good


def write_manifest(path: Path, items: list[dict]) -> None:
    """Write a manifest, one item a line. The file appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) + "\n]\n")
    temporary.replace(path)
