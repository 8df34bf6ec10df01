"""Loads and saves trained adapters: the release's `pytorch_model.bin`, or a directory of ours.

They are always float32.
"""

from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from adapters import TAPS, AdapterConfig
from checkpoints.copies import copies_in
from checkpoints.downloads import require
from checkpoints.files import (
    Checkpoint,
    WeightsError,
    first_line,
    read_json,
    read_shards,
    save_tensors,
    write_json,
)
from checkpoints.fill import build, fill, named
from checkpoints.key_tables import ADAPTER_KEYS
from checkpoints.lora import is_lora
from diffa import AUDIO_PARTS, Part, new_parts

# Names of an adapters' file, ours first, and of the first tensors of each part in it.
ADAPTER_FILES = (
    "adapters.safetensors",
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
)
PROMPTS = "trainable_prompts.weight"
CONV = "semantic_connector.conv.0.weight"
LINEAR = "semantic_connector.linear_connector.2.weight"
LAYER_WEIGHTS = "acoustic_connector.layer_weights"
QFORMER = "acoustic_connector.qformer.layer."
FFN = "acoustic_connector.qformer.layer.0.intermediate.dense.weight"
# Beyond are sizes of damaged configs.
LARGEST = {"": 1 << 16, "qformer_layers": 100}
MOST_PARAMETERS = 1_000_000_000
MOST_LETTERS = 4096  # of a path or prompt


def find_adapters(path: Path) -> Path:
    """The file of adapters, or the index of its shards, for a file or a directory.

    Raises WeightsError: nothing is there, or the directory holds several (they are listed).
    """
    require(adapters=path)
    if not path.is_dir():
        return path

    # Those of the directory itself count before those below it.
    found = [path / name for name in ADAPTER_FILES if (path / name).is_file()][:1]
    if not found:
        below = [f"{'*/' * depth}{name}" for depth in (1, 2, 3) for name in ADAPTER_FILES]
        found = sorted(file for pattern in below for file in path.glob(pattern))
    if len(found) > 1:
        listed = ", ".join(str(file) for file in found[:10])
        raise WeightsError(f"--adapters {path}: holds several adapters; pass one of {listed}")
    if not found:
        lacks = "lacks adapters.safetensors or pytorch_model.bin"
        raise WeightsError(f"{path}: {lacks}; is the download or training complete?")
    return found[0]


def open_adapters(path: str | Path) -> tuple[Path, Checkpoint]:
    """The file of adapters (find_adapters), or the index of its shards, and its tensors."""
    file = find_adapters(Path(path))
    return file, read_shards(file) if file.suffix == ".json" else Checkpoint(file)


def read_info(path: str | Path) -> dict:
    """The config.json beside adapters of ours; {} for the release, which has none.

    Raises WeightsError: it is damaged, or has values that save_trained does not write.
    """
    file = find_adapters(Path(path))
    if file.name != "adapters.safetensors":
        return {}

    source = file.parent / "config.json"
    info = read_json(source)
    window = info.get("audio_context")
    length = info.get("answer_length")
    made_of = info.get("trained_with") or {}

    def is_text(value: object) -> bool:
        return isinstance(value, str) and len(value) < MOST_LETTERS

    right = {
        "adapters": "adapters" in info,
        "stage": info.get("stage") in (None, *AUDIO_PARTS),
        "audio_context": window is None or (type(window) in (int, float) and 0 < window < 1e6),
        "answer_length": length is None or (type(length) is int and 0 < length < 1e6),
        "whisper": is_text(info.get("whisper", "")),
        "llm": is_text(info.get("llm", "")),
        "trained_with": isinstance(made_of, dict) and all(map(is_text, made_of.values())),
    }
    wrong = [f"{name} is {repr(info.get(name))[:60]}" for name, fits in right.items() if not fits]
    if wrong:
        raise WeightsError(f"{source}: {', '.join(wrong)}, which no training writes")
    return info


def shapes_in(tensors: Checkpoint) -> dict[str, int]:
    """Fields of AdapterConfig that the tensors show, and n_taps, the number of tapped layers."""
    shapes = {"encoder_width": tensors[CONV].shape[0], "lm_width": tensors[LINEAR].shape[0]}
    if PROMPTS in tensors:
        shapes["n_prompts"] = tensors[PROMPTS].shape[0]
    if LAYER_WEIGHTS in tensors:
        shapes["n_queries"], shapes["n_taps"] = tensors[LAYER_WEIGHTS].shape

        # The Q-Former: as many blocks as the names number.
        blocks = [int(name.split(".")[3]) for name in tensors if name.startswith(QFORMER)]
        shapes["qformer_layers"] = max(blocks, default=-1) + 1
        if FFN in tensors:
            shapes["ffn"] = tensors[FFN].shape[0]
    return shapes


def make_config(recorded: dict, found: dict[str, int], n_layers: int) -> AdapterConfig:
    """The config of trained adapters, from what is recorded and what the tensors show (shapes_in).

    Raises ValueError and the like: the two differ, shapes that no adapter has, or another number of
    tapped layers.
    """
    for name, value in recorded.items():
        if name in found and value != found[name]:
            recorded_value = repr(value)[:60]
            raise ValueError(
                f"{name} is {recorded_value} by config.json, {found[name]} in the file"
            )
    shapes = recorded | found
    taps = tuple(recorded.get("taps") or TAPS.get(n_layers, ()))
    n_taps = shapes.pop("n_taps", len(taps))
    if n_taps != len(taps):
        ours = f"of {n_layers} encoder layers {len(taps)} are tapped"
        raise ValueError(f"taps {n_taps} hidden states, and {ours}; pass taps=, or another Whisper")

    # A part that the file lacks will be made of these sizes.
    sizes = {name: v for name, v in shapes.items() if name not in ("taps", "dropout")}
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= LARGEST.get(name, LARGEST[""]):
            raise ValueError(f"{name} is {repr(size)[:60]}")
    if len(set(taps)) < len(taps) or not all(type(tap) is int and 0 <= tap < 1000 for tap in taps):
        raise ValueError(f"taps is {repr(taps)[:60]}")
    if not 0 <= shapes.get("dropout", 0) < 1:
        raise ValueError(f"dropout is {shapes['dropout']}")
    return AdapterConfig(**shapes | ({"taps": taps} if taps else {}))


def one_module(parts: dict[str, Part]) -> nn.Module:
    """A module whose children are the parts."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def load_adapters(
    path: str | Path, n_heads: int, n_layers: int = 12, taps: tuple[int, ...] | None = None
) -> tuple[AdapterConfig, dict[str, Part], dict]:
    """Trained adapters from a file of the release, a directory of ours, or one that holds either.

    Args:
        n_heads: of the Q-Former, which no tensor shows; the release takes the encoder's number.
        n_layers: of the encoder, which determines the tapped layers of a release (TAPS).
        taps: the tapped layers instead.
    Returns:
        config; the parts that the file has, among "prompts", "semantic" and "acoustic", each of
        them complete; and the directory's config.json ({} for the release).
    Raises:
        WeightsError: the file is missing, damaged, not that of adapters, or holds tensors that are
        neither of adapters, nor of LoRA (lora.read_lora), nor copies of frozen parts.
    """
    return read_adapters(*open_adapters(path), n_heads, n_layers, taps)


def read_adapters(
    file: Path, tensors: Checkpoint, n_heads: int, n_layers: int, taps: tuple[int, ...] | None
) -> tuple[AdapterConfig, dict[str, Part], dict]:
    """load_adapters, of a file that is open already (open_adapters)."""
    info = read_info(file)
    for needed in (CONV, LINEAR):
        if needed not in tensors:
            raise WeightsError(f"{file}: missing {needed}; is this a DIFFA adapter file?")

    # Shapes. A release records none; a field that an AdapterConfig no longer has is ignored.
    try:
        known = {field.name for field in fields(AdapterConfig)}
        recorded = {k: v for k, v in info.get("adapters", {}).items() if k in known}
        given = {"taps": taps} if taps else {}
        config = make_config({"n_heads": n_heads} | recorded | given, shapes_in(tensors), n_layers)
    except (ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{file}: not the shapes of adapters ({first_line(error)})") from error

    # A part of which the file has any tensor must be complete.
    prefixes = {"prompts": "trainable", "semantic": "semantic", "acoustic": "acoustic"}
    present = [
        part for part, prefix in prefixes.items() if any(n.startswith(prefix) for n in tensors)
    ]
    stage = info.get("stage")
    if stage and set(present) != set(AUDIO_PARTS[stage]):
        problem = f"holds the parts {', '.join(present)}, and config.json beside it is of {stage}"
        raise WeightsError(f"{file}: {problem}; they belong to different runs")

    # All parts, for the file's config also determines those that will be drawn.
    module = build(lambda: one_module(new_parts(config, tuple(prefixes))), 0, 0, file)
    if (n := sum(p.numel() for p in module.parameters())) > MOST_PARAMETERS:
        raise WeightsError(f"{file}: not the shapes of adapters ({n:,} parameters)")
    module = one_module({name: getattr(module, name) for name in present})
    others = (*filter(is_lora, tensors), *copies_in(file, tensors))
    fill(module, tensors, ADAPTER_KEYS, others, file, torch.float32)
    return config, {name: getattr(module, name) for name in present}, info


def save_adapters(
    path: str | Path, config: AdapterConfig, parts: dict[str, Part], table: dict, info: dict
) -> None:
    """Write trained parts to `adapters.safetensors` under the release's names, by a key table.

    info: more fields of config.json, beside the adapters' shapes.
    """
    path = Path(path)
    save_tensors(path / "adapters.safetensors", named(one_module(parts), table))
    write_json(path / "config.json", info | {"adapters": asdict(config)})
