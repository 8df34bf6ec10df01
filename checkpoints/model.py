"""Loads a whole DIFFA, saves its trained parts, and makes random weights of full shapes.

Trained parts are always float32. The frozen parts may have any dtype that their device can run.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters import TAPS, AdapterConfig
from checkpoints.adapters import Part, load_adapters, save_adapters
from checkpoints.files import require
from checkpoints.fill import Unfilled, assign, check_device
from checkpoints.few_rows import use_few_rows
from checkpoints.lm import load_lm, read_lm_config
from checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from checkpoints.whisper import cut_window, load_whisper
from diffa import AUDIO_PARTS, DIFFA, new_parts
from diffusion_lm import SIZES as LM_SIZES
from diffusion_lm import DiffusionLM, LMConfig
from encoder import FRAMES_PER_SECOND, EncoderConfig, WhisperEncoder, sinusoids
from encoder import SIZES as ENCODER_SIZES


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A DIFFA, and which of its trained parts are new."""

    model: DIFFA
    new: tuple[str, ...]  # parts that no adapters' file gave: random weights


def load_diffa(whisper, llm, adapters=None, **options) -> DIFFA:
    """A DIFFA from files. Arguments and errors: see `load_for_training`."""
    return load_for_training(whisper, llm, adapters, **options).model


def load_for_training(
    whisper: str | Path | None,
    llm: str | Path | None,
    adapters: str | Path | None = None,
    *,
    stage: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    audio_context: float | None = None,
    random_weights: str | None = None,
    lm_class: type[DiffusionLM] = DiffusionLM,
    **shapes,
) -> Loaded:
    """A DIFFA from files, with the names of its new parts.

    Parts of the stage come from the adapters' file. Those that the file lacks are drawn from torch's global generator.

    Args:
        whisper: a directory of the hub, or OpenAI's `.pt`. llm: a LLaDA or Qwen3 directory, with its tokenizer.
        adapters: a directory of ours, or the release's file. None: new adapters of the paper's shapes.
        stage: a key of AUDIO_PARTS. None: what the adapters' directory records; else stage 2 if the adapters have an
            acoustic part or weights are random; else stage 1.
        dtype: of the frozen parts. None: the LM's as in its file, the encoder's float32.
        audio_context: seconds of the encoder's window. None: what the adapters' directory records; else all of it.
        random_weights: named sizes, such as "small+llada-8b". The three paths are then ignored.
        lm_class: see load_lm.
        shapes: fields of AdapterConfig for new adapters. With `adapters` only `taps`, which a release does not record.
    Raises:
        WeightsError: files are missing, damaged, or of other shapes. ValueError: parts that do not fit each other.
    """
    # What is small comes first: a mistake shows before the LM is read.
    if random_weights:
        encoder, lm = random_pieces(random_weights, dtype, device, audio_context, lm_class)
        tokenizer = ByteTokenizer(lm.config)
        config, found, info = read_or_shape(None, encoder.config, lm.config, shapes)
    else:
        require(whisper=whisper, llm=llm, adapters=adapters)
        encoder = load_whisper(whisper, dtype or torch.float32, device)
        lm_config = read_lm_config(llm)
        tokenizer = load_tokenizer(llm, lm_config)
        config, found, info = read_or_shape(adapters, encoder.config, lm_config, shapes)
        seconds = info.get("audio_context") if audio_context is None else audio_context
        if seconds is not None:
            encoder = cut_window(encoder, seconds)
        lm = load_lm(llm, dtype, device, lm_class)

    # The parts of the stage. New ones are always drawn, so that later draws do not depend on what a file holds.
    chosen = (
        stage
        or info.get("stage")
        or ("stage2" if "acoustic" in found or random_weights else "stage1")
    )
    if chosen not in AUDIO_PARTS:
        raise ValueError(f"stage {chosen!r} is none of {', '.join(AUDIO_PARTS)}")
    new = tuple(name for name in AUDIO_PARTS[chosen] if name not in found)
    parts = new_parts(config, new) | {
        name: found[name] for name in AUDIO_PARTS[chosen] if name in found
    }
    return Loaded(model=DIFFA(encoder, lm, tokenizer, config, parts).to(device), new=new)


def read_or_shape(
    path: str | Path | None, encoder: EncoderConfig, lm: LMConfig, shapes: dict
) -> tuple[AdapterConfig, dict[str, Part], dict]:
    """The adapters in `path`, or the config of new ones that fit encoder and LM.

    Args:
        path, shapes: as `adapters` and `shapes` of load_for_training.
    Returns:
        config, parts and info, as load_adapters; parts and info are empty without a path.
    Raises:
        WeightsError: the file cannot be used. ValueError: the adapters do not fit encoder and LM.
    """
    widths = {"encoder_width": encoder.width, "lm_width": lm.width}
    if path is None:
        if encoder.n_layers not in TAPS and "taps" not in shapes:
            raise ValueError(
                f"no tapped layers are known for {encoder.n_layers} encoder layers; pass taps="
            )
        defaults = {"n_heads": encoder.n_heads, "taps": TAPS.get(encoder.n_layers)}
        config = AdapterConfig(**(widths | defaults | shapes))
        parts: dict[str, Part] = {}
        info: dict = {}
    else:
        fixed = sorted(shapes.keys() - {"taps"})
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)}: shapes of adapters that are read from {path} are known"
            )
        config, parts, info = load_adapters(
            path, encoder.n_heads, encoder.n_layers, shapes.get("taps")
        )

    for name, width in widths.items():
        if getattr(config, name) != width:
            raise ValueError(
                f"{path}: adapters were made for {name} {getattr(config, name)}, this one has {width}; "
                "take the models that they were trained with, or train new ones"
            )
    if max(config.taps) > encoder.n_layers:
        raise ValueError(
            f"taps {config.taps} reach past the encoder's {encoder.n_layers} layers; "
            "these adapters need a deeper Whisper"
        )
    return config, parts, info


def save_trained(model: DIFFA, path: str | Path, whisper: str | Path, llm: str | Path) -> None:
    """Write the trained parts of a model, and where its frozen parts come from.

    Args:
        path: the directory. whisper, llm: recorded in its config.json, with the stage and the encoder's window.
    """
    info = {
        "stage": model.stage,
        "whisper": str(whisper),
        "llm": str(llm),
        "audio_context": model.encoder.config.context / FRAMES_PER_SECOND,  # seconds
    }
    save_adapters(path, model.config, model.trained_parts(), info)


# Random weights of full shapes, to measure speed and memory without a download


@torch.no_grad()
def randomize(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Give a model from the meta device random weights: matrices N(0, 0.02), norms 1, biases 0."""
    check_device(device, dtype)
    new: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if tensor.ndim > 1:
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(float(name.endswith("weight")))
        new[name] = tensor
    assign(model, new)
    return model.eval()


def random_pieces(
    size: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    audio_context: float | None = None,
    lm_class: type[DiffusionLM] = DiffusionLM,
) -> tuple[WhisperEncoder, DiffusionLM]:
    """An encoder and a language model with random weights.

    Args:
        size: names of both, such as "small+llada-8b" or "toy+toy".
        dtype: None: float32 for the encoder and the toy LM, bfloat16 for other LMs.
        audio_context: seconds of the encoder's window, at most its own.
    Raises:
        ValueError: a size without a name; the message lists all names. WeightsError: the device cannot be used.
    """
    whisper, _, llm = size.partition("+")
    if whisper not in ENCODER_SIZES or llm not in LM_SIZES:
        raise ValueError(
            f"--random-weights {size}: give one of {', '.join(ENCODER_SIZES)}, a plus, and one of {', '.join(LM_SIZES)}"
        )

    # The toy's vocabulary comes from its tokenizer. Here it has bytes and markers.
    config = LM_SIZES[llm]
    if not config.vocab:
        config = replace(config, vocab=272, mask_id=256, end_id=257)
    with torch.device("meta"), Unfilled():
        encoder = WhisperEncoder(ENCODER_SIZES[whisper])
        lm = lm_class(config)

    encoder = randomize(encoder, dtype or torch.float32, device)
    encoder.positions.data.copy_(sinusoids(encoder.config.context, encoder.config.width))
    if audio_context is not None:
        encoder = cut_window(encoder, audio_context)
    lm = randomize(lm, dtype or (torch.float32 if llm == "toy" else torch.bfloat16), device)
    return encoder.eval(), use_few_rows(lm)
