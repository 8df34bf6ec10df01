"""Loads and saves trained adapters: the release's `pytorch_model.bin`, or a directory of ours. They are always float32."""

from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters import TAPS, AcousticAdapter, AdapterConfig, SemanticAdapter
from checkpoints.files import (
    Checkpoint,
    WeightsError,
    read_json,
    read_shards,
    require,
    save_tensors,
    write_json,
)
from checkpoints.fill import Unfilled, fill, named
from checkpoints.key_tables import ACOUSTIC_KEYS, ADAPTERS_DROPPED, PROMPT_KEYS, SEMANTIC_KEYS

Part = nn.Parameter | nn.Module

ADAPTER_FILES = (  # ours first, then the release's
    "adapters.safetensors",
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
)


def find_adapters(path: Path) -> Path:
    """The file of adapters, or the index of its shards, for a file or a directory.

    Raises WeightsError: nothing is there, or a directory holds several (they are listed).
    """
    require(adapters=path)
    if not path.is_dir():
        return path
    for name in ADAPTER_FILES:
        if (path / name).is_file():
            return path / name

    below = sorted(file for name in ADAPTER_FILES for file in path.glob(f"**/{name}"))
    if len(below) > 1:
        listed = ", ".join(str(file) for file in below[:10])
        raise WeightsError(f"--adapters {path}: holds several adapters; pass one of {listed}")
    if not below:
        raise WeightsError(
            f"{path}: holds neither adapters.safetensors nor pytorch_model.bin; is the download or training complete?"
        )
    return below[0]


def shapes_from_tensors(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Fields of AdapterConfig that the tensors of every adapter file show."""
    shapes = {
        "encoder_width": tensors["semantic_connector.conv.0.weight"].shape[0],
        "lm_width": tensors["semantic_connector.linear_connector.2.weight"].shape[0],
    }
    if "trainable_prompts.weight" in tensors:
        shapes["n_prompts"] = tensors["trainable_prompts.weight"].shape[0]
    return shapes


def shapes_of_release(
    tensors: dict[str, Tensor], n_layers: int, taps: tuple[int, ...] | None
) -> dict:
    """The remaining fields for the release, which has no config. Raises ValueError: the number of taps differs."""
    taps = taps or TAPS.get(n_layers, ())
    shapes: dict = {"taps": taps} if taps else {}
    if "acoustic_connector.layer_weights" not in tensors:
        return shapes

    n_queries, n_taps = tensors["acoustic_connector.layer_weights"].shape
    if len(taps) != n_taps:
        raise ValueError(
            f"taps {n_taps} hidden states, and of {n_layers} encoder layers {len(taps)} are tapped; "
            "pass taps=, or another Whisper"
        )
    blocks = [
        int(name.split(".")[3])
        for name in tensors
        if name.startswith("acoustic_connector.qformer.layer.")
    ]
    shapes |= {"n_queries": n_queries, "qformer_layers": max(blocks, default=-1) + 1}
    inner = tensors.get("acoustic_connector.qformer.layer.0.intermediate.dense.weight")
    return shapes if inner is None else shapes | {"ffn": inner.shape[0]}


def shapes_of_ours(info: dict) -> dict:
    """The remaining fields for a directory of ours, from its config.json."""
    known = {field.name for field in fields(AdapterConfig)}
    shapes = {name: value for name, value in info.get("adapters", {}).items() if name in known}
    return shapes | ({"taps": tuple(shapes["taps"])} if "taps" in shapes else {})


def load_adapters(
    path: str | Path, n_heads: int, n_layers: int = 12, taps: tuple[int, ...] | None = None
) -> tuple[AdapterConfig, dict[str, Part], dict]:
    """Trained adapters: a directory of ours, or the release's `pytorch_model.bin` (or a directory that holds it).

    Args:
        n_heads: of the Q-Former, which no tensor shows; the release takes the encoder's number.
        n_layers: of the encoder, which determines the tapped layers of a release (TAPS).
        taps: the tapped layers instead.
    Returns:
        config, the parts among "prompts", "semantic" and "acoustic" that the file has (each complete), and the
        directory's config.json ({} for the release).
    Raises:
        WeightsError: the file is missing, damaged, or not that of adapters.
    """
    file = find_adapters(Path(path))
    info = read_json(file.parent / "config.json") if file.name == "adapters.safetensors" else {}
    found = read_shards(file) if file.suffix == ".json" else Checkpoint(file)
    tensors = {name: found[name] for name in found if not name.startswith(ADAPTERS_DROPPED)}

    # Shapes: from the tensors where they show them.
    for needed in (
        "semantic_connector.conv.0.weight",
        "semantic_connector.linear_connector.2.weight",
    ):
        if needed not in tensors:
            raise WeightsError(f"{file}: missing {needed}; is this a DIFFA adapter file?")
    try:
        rest = shapes_of_ours(info) if info else shapes_of_release(tensors, n_layers, taps)
        chosen = {"taps": tuple(taps)} if taps else {}
        config = AdapterConfig(
            **({"n_heads": n_heads} | rest | chosen | shapes_from_tensors(tensors))
        )
    except (ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{file}: not the shapes of adapters ({error})") from error

    # Parts: each that has a tensor in the file must have all.
    with torch.device("meta"), Unfilled():
        prompts = nn.ParameterDict(
            {"prompts": nn.Parameter(torch.empty(config.n_prompts, config.lm_width))}
        )
        modules = {
            "trainable_prompts.": ("prompts", prompts, PROMPT_KEYS),
            "semantic_connector.": ("semantic", SemanticAdapter(config), SEMANTIC_KEYS),
            "acoustic_connector.": ("acoustic", AcousticAdapter(config), ACOUSTIC_KEYS),
        }
    parts: dict[str, Part] = {}
    for prefix, (name, module, table) in modules.items():
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if own:
            fill(module, own, table, (), file, dtype=torch.float32)
            parts[name] = prompts["prompts"] if name == "prompts" else module

    extra = sorted(key for key in tensors if not key.startswith(tuple(modules)))
    if extra:
        raise WeightsError(f"{file}: extra tensors {', '.join(extra[:5])}")
    return config, parts, info


def save_adapters(
    path: str | Path, config: AdapterConfig, parts: dict[str, Part], info: dict
) -> None:
    """Write trained parts: `adapters.safetensors` (under the release's names), and `config.json` with `info`."""
    path = Path(path)
    tensors = {}
    if "prompts" in parts:
        tensors["trainable_prompts.weight"] = parts["prompts"].detach().cpu().contiguous()
    for name, table in (("semantic", SEMANTIC_KEYS), ("acoustic", ACOUSTIC_KEYS)):
        if name in parts:
            tensors |= named(parts[name], table)
    save_tensors(path / "adapters.safetensors", tensors)
    write_json(path / "config.json", info | {"adapters": asdict(config)})
