"""Loads a whole DIFFA, saves its trained parts, and makes random weights of full shapes.

Trained parts are always float32. Frozen parts may have any dtype that their device can run.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from adapters import TAPS, AdapterConfig
from checkpoints.adapters import open_adapters, read_adapters, read_info, save_adapters
from checkpoints.copies import check_copies
from checkpoints.digests import described
from checkpoints.downloads import require
from checkpoints.files import Checkpoint, WeightsError
from checkpoints.fill import Unfilled, assign, check_device
from checkpoints.key_tables import ADAPTER_KEYS
from checkpoints.lm import load_lm, read_lm_config
from checkpoints.lora import LoRA, attach, lora_keys, merge, read_lora
from checkpoints.origins import Origins
from checkpoints.sizes import ENCODER_SIZES, LM_SIZES
from checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from checkpoints.whisper import cut_window, load_whisper
from diffa import AUDIO_PARTS, DIFFA, Part, new_parts
from diffusion_lm import DiffusionLM, LMConfig
from encoder import FRAMES_PER_SECOND, EncoderConfig, WhisperEncoder, sinusoids
from speed.few_rows import use_few_rows
from speed.int8 import int8_layers, use_int8


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A DIFFA, the names of its newly drawn parts, and the paths of its "whisper" and "llm".

    sources is empty for random weights.
    """

    model: DIFFA
    new: tuple[str, ...]
    sources: dict[str, str | Path]


def load_diffa(whisper=None, llm=None, adapters=None, **options) -> DIFFA:
    """A DIFFA from files; arguments and errors as for load_for_training.

    If there are adapters, they must hold every part of the stage: none is drawn.
    """
    draw = adapters is None
    return load_for_training(whisper, llm, adapters, draw_missing=draw, **options).model


def load_for_training(
    whisper: str | Path | None = None,
    llm: str | Path | None = None,
    adapters: str | Path | None = None,
    *,
    stage: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    audio_context: float | None = None,
    random_weights: str | None = None,
    lm_class: type[DiffusionLM] = DiffusionLM,
    allow_other_parts: bool = False,
    lora: str | int = "merge",
    draw_missing: bool = True,
    int8: bool = False,
    **shapes,
) -> Loaded:
    """A DIFFA from files, and its new parts: those of the stage that the adapters' file lacks.

    They are drawn from torch's global generator.

    Args:
        whisper: a directory of the hub, or OpenAI's `.pt`. llm: a directory (docs/backbones.md).
            None: the path that the adapters' directory records; else the toy run's.
        adapters: a directory of ours, or the release's file; None: new ones of the paper's shapes.
        stage: a key of AUDIO_PARTS. None: as recorded; else stage 2 for an acoustic part or random
            weights, and stage 1 without.
        dtype: of the frozen parts. None: the LM's as in its file, the encoder's float32.
        audio_context: seconds of the encoder's window. None: as recorded; else the whole window.
        random_weights: named sizes, such as "small+llada-8b", instead of the three paths.
        lm_class: as for load_lm.
        allow_other_parts: adapters may meet other parts than in their training; else an error.
        lora: the LoRA in the adapters' file is merged into the LM ("merge"), left out ("none"),
            an error ("refuse"), or the model's part "lora" ("train", or a rank: drawn if absent).
        draw_missing: False: a part that the adapters' file lacks is an error.
        int8: the LM's weights in 8 bits, as for load_lm: to answer, not to train.
        shapes: fields of AdapterConfig for new adapters; with `adapters`, only `taps`.
    Raises:
        WeightsError: files that cannot be used. ValueError: pieces that do not fit each other.
    """
    known = adapters is not None and not random_weights and Path(adapters).exists()
    origins = Origins(adapters, read_info(adapters) if known else {}, allow_other_parts)
    if random_weights:
        sources = {}
        encoder, lm = random_pieces(random_weights, dtype, device, audio_context, lm_class, int8)
        tokenizer = ByteTokenizer(lm.config)
        config, found = fitting_adapters(None, encoder.config, lm.config, shapes)
        names = AUDIO_PARTS[known_stage(stage or "stage2")]
    else:
        sources = {"whisper": origins.path("whisper", whisper), "llm": origins.path("llm", llm)}
        require(**sources, adapters=adapters)

        # What is small comes first: a mistake shows before the LM is read.
        digests = []
        how = (dtype or torch.float32, device, origins.window(audio_context), digests.append)
        encoder = load_whisper(sources["whisper"], *how)
        lm_config = read_lm_config(sources["llm"])
        tokenizer = load_tokenizer(sources["llm"], lm_config)
        opened = None if adapters is None else open_adapters(adapters)
        config, found = fitting_adapters(opened, encoder.config, lm_config, shapes)
        found |= found_lora(opened, lm_config, lora)
        origins.note("encoder", digests[-1])
        origins.note_text(tokenizer)
        if adapters is not None:
            origins.note("shapes", described(config))
        stage = stage or origins.info.get("stage")
        names = parts_of_stage(stage, found, None if draw_missing else adapters)

        # The LM, which is large.
        note = functools.partial(origins.note, "lm")
        lm = load_lm(sources["llm"], dtype, device, lm_class, note, int8=int8)
        if opened and not allow_other_parts:
            check_copies(*opened, encoder, lm)

    # Drawn even if none is new: what is drawn next must not depend on the adapters' file.
    new = tuple(name for name in names if name not in found)
    parts = new_parts(config, new) | {name: found[name] for name in names if name in found}
    parts |= use_lora(lm, found.get("lora"), lora)
    new += tuple(parts.keys() - set(names) - found.keys())  # "lora", if it was drawn
    facts = {"answer_length": origins.info.get("answer_length"), "made_of": origins.found}
    model = DIFFA(encoder, lm, tokenizer, config, parts, **facts).to(device)
    return Loaded(model=model, new=new, sources=sources)


def parts_of_stage(
    stage: str | None, found: dict[str, Part], whole: str | Path | None
) -> tuple[str, ...]:
    """The audio parts of a stage; None: of the one that the parts `found` in a file make.

    whole: the adapters' file, if it must hold all of them. Raises WeightsError: it does not.
    """
    usual = "stage2" if "acoustic" in found else "stage1"
    stage = known_stage(stage or usual)
    names = AUDIO_PARTS[stage]
    missing = ", ".join(name for name in names if name not in found)
    if missing and whole:
        advice = "train that stage first, or choose another --stage"
        raise WeightsError(f"{whole}: lacks {missing} of {stage}; {advice}")
    return names


def known_stage(stage: str) -> str:
    """The stage itself. Raises ValueError: there is no such stage."""
    if stage not in AUDIO_PARTS:
        raise ValueError(f"stage {stage!r} is none of {', '.join(AUDIO_PARTS)}")
    return stage


def found_lora(
    opened: tuple[Path, Checkpoint] | None, lm: LMConfig, wanted: str | int
) -> dict[str, LoRA]:
    """{"lora": that of an open file}, where load_for_training's `lora` wants it and it exists.

    Raises WeightsError: it cannot be read, has another rank, or is not wanted.
    """
    found = read_lora(*opened, lm) if opened and wanted != "none" else None
    if found is None:
        return {}
    held = f"{opened[0]}: holds LoRA of rank {found.rank}"
    if wanted == "refuse":
        advice = "train it too by train_instruct.py --lora RANK, or leave it out by --no-lora"
        raise WeightsError(f"{held}; {advice}")
    if isinstance(wanted, int) and wanted != found.rank:
        raise WeightsError(f"{held}, --lora is {wanted}")
    return {"lora": found}


def use_lora(lm: DiffusionLM, lora: LoRA | None, wanted: str | int) -> dict[str, LoRA]:
    """Merge or attach LoRA, as load_for_training's `lora` wants it; a rank draws one if it is None.

    Returns {"lora": it} where it is a part of the model.
    """
    if lora is None and isinstance(wanted, int):
        lora = LoRA(lm, wanted)
    if lora is None:
        return {}
    if wanted == "merge":
        merge(lm, lora)
        return {}
    attach(lm, lora)
    return {"lora": lora}


def fitting_adapters(
    opened: tuple[Path, Checkpoint] | None, encoder: EncoderConfig, lm: LMConfig, shapes: dict
) -> tuple[AdapterConfig, dict[str, Part]]:
    """The adapters of an open file, or without one the config of new ones; see load_for_training.

    Returns:
        config and parts as from load_adapters; without a file no parts.
    Raises:
        WeightsError: the file cannot be used. ValueError: it does not fit encoder and LM.
    """
    widths = {"encoder_width": encoder.width, "lm_width": lm.width}
    if opened is None:
        # New ones, of the paper's shapes for this encoder.
        if encoder.n_layers not in TAPS and "taps" not in shapes:
            unknown = f"no tapped layers are known for {encoder.n_layers} encoder layers"
            raise ValueError(f"{unknown}; pass taps=")
        usual = {"n_heads": encoder.n_heads, "taps": TAPS.get(encoder.n_layers)}
        config = AdapterConfig(**(widths | usual | shapes))
        parts = {}
    else:
        # Trained ones: their file gives the shapes.
        if other := sorted(shapes.keys() - {"taps"}):
            raise ValueError(f"{', '.join(other)}: the shapes of adapters in {opened[0]} are known")
        taps = shapes.get("taps")
        config, parts, _ = read_adapters(*opened, encoder.n_heads, encoder.n_layers, taps)

    # Do they fit?
    for name, width in widths.items():
        if getattr(config, name) != width:
            made_for = (
                f"adapters were made for {name} {getattr(config, name)}, this one has {width}"
            )
            advice = "take the models that they were trained with, or train new ones"
            raise ValueError(f"{opened[0]}: {made_for}; {advice}")
    if max(config.taps) > encoder.n_layers:
        past = f"taps {config.taps} reach past the encoder's {encoder.n_layers} layers"
        raise ValueError(f"{past}; these adapters need a deeper Whisper")
    return config, parts


def save_trained(
    model: DIFFA,
    path: str | Path,
    whisper: str | Path,
    llm: str | Path,
    *,
    answer_length: int | None = None,
) -> None:
    """Write the trained parts of a model, and what they were trained with.

    Args:
        path: the directory. whisper, llm: recorded in its config.json, as are the stage, the
            encoder's window, and what the model is made of.
        answer_length: tokens of the answers that the parts were trained on; None: as loaded.
    """
    info = {
        "stage": model.stage,
        "whisper": str(whisper),
        "llm": str(llm),
        "audio_context": model.encoder.config.context / FRAMES_PER_SECOND,  # seconds
        "answer_length": answer_length or model.answer_length,
        "trained_with": model.made_of | {"shapes": described(model.config)},
    }
    table = ADAPTER_KEYS | lora_keys(model.lm.config.family)
    save_adapters(path, model.config, model.trained_parts(), table, info)


# Random weights of full shapes, to measure speed and memory without a download


@torch.no_grad()
def randomize(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Give a model from the meta device random weights: matrices N(0, 0.02), norms 1, biases 0."""
    check_device(device, dtype)
    new = {}
    layers = {f"{name}.weight": layer for name, layer in int8_layers(model).items()}
    for name, parameter in list(model.named_parameters()):
        numbers = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            numbers.normal_(std=0.02)
        else:
            numbers.fill_(float(name.endswith("weight")))  # 1 in norms, 0 in biases

        # Weights of 8 bits are rounded one by one.
        if name in layers:
            layers[name].take(numbers)
        else:
            new[name] = numbers
    assign(model, new)
    return model.eval()


def random_pieces(
    size: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    audio_context: float | None = None,
    lm_class: type[DiffusionLM] = DiffusionLM,
    int8: bool = False,
) -> tuple[WhisperEncoder, DiffusionLM]:
    """An encoder and a language model with random weights.

    Args:
        size: names of both, such as "small+llada-8b" or "toy+toy".
        dtype: None: float32 for the encoder and the toy LM, bfloat16 for other LMs.
        audio_context: seconds of the encoder's window, at most its own.
        int8: as for load_lm.
    Raises:
        ValueError: an unknown size; the message lists all. WeightsError: no such device.
    """
    whisper, _, llm = size.partition("+")
    if whisper not in ENCODER_SIZES or llm not in LM_SIZES:
        choices = f"one of {', '.join(ENCODER_SIZES)}, a plus, and one of {', '.join(LM_SIZES)}"
        raise ValueError(f"--random-weights {size}: give {choices}")

    # The toy's vocabulary comes from its tokenizer. Here it has bytes and markers.
    config = LM_SIZES[llm]
    if not config.vocab:
        config = replace(config, vocab=272, mask_id=256, end_id=257)
    with torch.device("meta"), Unfilled():
        encoder = WhisperEncoder(ENCODER_SIZES[whisper])
        lm = lm_class(config)
    if int8:
        use_int8(lm)

    # The positions are Whisper's own, as they are no weights but a formula.
    encoder = randomize(encoder, dtype or torch.float32, device)
    encoder.positions.data.copy_(sinusoids(encoder.config.context, encoder.config.width))
    encoder = cut_window(encoder, audio_context).eval()

    usual = torch.float32 if llm == "toy" else torch.bfloat16
    return encoder, use_few_rows(randomize(lm, dtype or usual, device))
