"""Loads and saves Whisper encoders: a directory of the hub (`openai/whisper-*`), or OpenAI's own `.pt`."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import key_tables as keys
from checkpoints.files import (
    WeightsError,
    named_tensors,
    read_checkpoint,
    read_config,
    require,
    save_tensors,
    unpickle,
    write_json,
)
from checkpoints.fill import Unfilled, assign, check_device, fill, make_config, named, our_fields
from encoder import FRAMES_PER_SECOND, EncoderConfig, WhisperEncoder


def read_whisper_config(path: Path) -> EncoderConfig:
    """Shapes of the encoder in a directory of the hub."""
    source = path / "config.json"
    raw = read_config(path, ("whisper",))
    return make_config(
        EncoderConfig, our_fields(raw, keys.WHISPER_CONFIG, keys.WHISPER_FIXED, source), source
    )


def read_openai(path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Shapes and tensors of the encoder and decoder in a `.pt` file of OpenAI."""
    if path.suffix != ".pt":
        raise WeightsError(
            f"--whisper {path}: pass the directory that holds it and its config.json, or OpenAI's own .pt file"
        )
    whole = unpickle(path)
    if (
        not isinstance(whole, dict)
        or not isinstance(whole.get("dims"), dict)
        or "model_state_dict" not in whole
    ):
        raise WeightsError(
            f"{path}: not one of OpenAI's Whisper files, which hold dims and model_state_dict"
        )
    fields = our_fields(whole["dims"], keys.OPENAI_CONFIG, {}, path)
    config = make_config(EncoderConfig, fields | {"ffn": 4 * fields["width"]}, path)
    return config, named_tensors(whole["model_state_dict"], path)


def load_whisper(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    audio_context: float | None = None,
) -> WhisperEncoder:
    """The encoder of a Whisper, without its decoder.

    Args:
        path: a directory of the hub, or OpenAI's `.pt`.
        dtype: of the parameters; None keeps the file's.
        audio_context: seconds of the window, at most the file's (30 s); see `cut_window`.
    Raises:
        WeightsError: files are missing, damaged, or not a Whisper. ValueError: no such window.
    """
    path = Path(path)
    require(whisper=path)
    if path.is_dir():
        config = read_whisper_config(path)
        tensors = read_checkpoint(path)
        files = tensors.files
        table = keys.WHISPER_KEYS
        dropped = keys.WHISPER_DROPPED
    else:
        config, tensors = read_openai(path)
        files = None
        table = keys.OPENAI_KEYS
        dropped = keys.OPENAI_DROPPED

    check_device(device, dtype or torch.float32)
    with torch.device("meta"), Unfilled():
        encoder = WhisperEncoder(config)
    fill(encoder, tensors, table, dropped, path, files, dtype, device)
    return (encoder if audio_context is None else cut_window(encoder, audio_context)).eval()


def cut_window(encoder: WhisperEncoder, seconds: float) -> WhisperEncoder:
    """The same encoder with a window of `seconds`: the positions after it are cut off, all other weights are shared.

    Whisper was trained on 30 s, filled up with silence. A short clip costs less in a window near its length, but its
    hidden states differ somewhat.

    Raises ValueError: the window is empty, or longer than the encoder's.
    """
    context = round(seconds * FRAMES_PER_SECOND)
    if not 0 < context <= encoder.config.context:
        longest = encoder.config.context / FRAMES_PER_SECOND
        raise ValueError(
            f"a window of {seconds:g} s is requested; this encoder's has {longest:g} s, which can only be cut"
        )

    with torch.device("meta"), Unfilled():
        short = WhisperEncoder(replace(encoder.config, context=context))
    tensors = {name: parameter.data for name, parameter in encoder.named_parameters()}
    tensors["positions"] = tensors["positions"][:context].clone()
    assign(short, tensors)
    return short


def save_whisper(encoder: WhisperEncoder, path: str | Path) -> None:
    """Write an encoder as `openai/whisper-*` is on the hub, without a decoder."""
    path = Path(path)
    save_tensors(path / "model.safetensors", named(encoder, keys.WHISPER_KEYS))
    raw = {theirs: getattr(encoder.config, ours) for ours, theirs in keys.WHISPER_CONFIG.items()}
    write_json(path / "config.json", {"model_type": "whisper", "activation_function": "gelu"} | raw)
