"""Loads and saves Whisper encoders: directories of the hub (`openai/whisper-*`), OpenAI's `.pt`."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import key_tables as keys
from checkpoints.downloads import require
from checkpoints.files import (
    WeightsError,
    named_tensors,
    read_checkpoint,
    read_config,
    save_tensors,
    unpickle,
    write_json,
)
from checkpoints.fill import Unfilled, assign, build, fill, named, read_fields
from encoder import FRAMES_PER_SECOND, EncoderConfig, WhisperEncoder


def read_whisper_config(path: Path) -> EncoderConfig:
    """Shapes of the encoder in a directory of the hub."""
    raw = read_config(path, ("whisper",))
    source = path / "config.json"
    return read_fields(EncoderConfig, raw, keys.WHISPER_CONFIG, keys.WHISPER_FIXED, source)


def read_openai(path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Shapes of the encoder in OpenAI's `.pt`, and all tensors of the file."""
    if path.suffix != ".pt":
        advice = "pass the directory that holds it and its config.json, or OpenAI's own .pt file"
        raise WeightsError(f"--whisper {path}: {advice}")

    whole = unpickle(path)
    has_dims = isinstance(whole, dict) and isinstance(whole.get("dims"), dict)
    if not has_dims or "model_state_dict" not in whole:
        raise WeightsError(f"{path}: not OpenAI's Whisper, which has dims and model_state_dict")

    # The feed-forward layer is always four times as wide.
    dims = whole["dims"] | {"ffn": 4 * (whole["dims"].get("n_audio_state") or 0)}
    config = read_fields(EncoderConfig, dims, keys.OPENAI_CONFIG, {}, path)
    return config, named_tensors(whole["model_state_dict"], path)


def load_whisper(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    audio_context: float | None = None,
    note: Callable[[str], None] | None = None,
) -> WhisperEncoder:
    """The encoder of a Whisper, without its decoder.

    Args:
        path: a directory of the hub, or OpenAI's `.pt`.
        dtype: of the parameters; None keeps the file's.
        audio_context: seconds of the window, at most the file's (30 s); see cut_window.
        note: as for fill.
    Raises:
        WeightsError: files are missing, damaged, or not a Whisper. ValueError: no such window.
    """
    path = Path(path)
    require(whisper=path)

    # The two formats have different configs and names, and the same tensors.
    if path.is_dir():
        config = read_whisper_config(path)
        tensors = read_checkpoint(path)
        prefixes = ("", "model.", "model.encoder.")
        table = keys.fitting_table(keys.WHISPER_KEYS, "conv1.weight", prefixes, tensors)
        dropped = keys.WHISPER_DROPPED
    else:
        config, tensors = read_openai(path)
        table = keys.OPENAI_KEYS
        dropped = keys.OPENAI_DROPPED

    encoder = build(lambda: WhisperEncoder(config), config.n_layers, len(tensors), path)
    fill(encoder, tensors, table, dropped, path, dtype, device, note)
    return cut_window(encoder, audio_context).eval()


def cut_window(encoder: WhisperEncoder, seconds: float | None) -> WhisperEncoder:
    """The same encoder, its window cut to `seconds`; None: as it is.

    All weights are shared but the positions, of which only the first are kept. Whisper was trained
    on 30 s, filled up with silence. A short clip costs less in a window near its length, but its
    hidden states differ a little.

    Raises ValueError: the window is empty, or longer than the encoder's.
    """
    if seconds is None:
        return encoder

    context = round(seconds * FRAMES_PER_SECOND) if math.isfinite(seconds) else 0
    if not 0 < context <= encoder.config.context:
        longest = f"{encoder.config.context / FRAMES_PER_SECOND:g} s, which can only be cut"
        raise ValueError(f"a window of {seconds:g} s is requested; this encoder's has {longest}")

    with torch.device("meta"), Unfilled():
        short = WhisperEncoder(replace(encoder.config, context=context))
    tensors = dict(encoder.named_parameters())
    tensors["positions"] = encoder.positions[:context].clone()  # (T, D)
    assign(short, tensors)
    return short


def save_whisper(encoder: WhisperEncoder, path: str | Path) -> None:
    """Write an encoder as `openai/whisper-*` is on the hub, without a decoder."""
    path = Path(path)
    save_tensors(path / "model.safetensors", named(encoder, keys.WHISPER_KEYS))
    raw = {theirs: getattr(encoder.config, ours) for ours, theirs in keys.WHISPER_CONFIG.items()}
    raw |= {"model_type": "whisper", "activation_function": "gelu"}
    write_json(path / "config.json", raw)
