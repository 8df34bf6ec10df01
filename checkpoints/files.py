"""Checkpoint files as they lie on a disk: read without trust and without copies, written whole or not at all.

Tensors are memory-mapped: reading a file of 16 GB costs nothing until a tensor is looked at, and then no second copy.
Nothing is ever unpickled but tensors and plain values (`weights_only=True`).
"""

import json
import os
import shlex
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how git leaves a large file that it has not fetched


# What can be downloaded, by a word in the path that is not there; the first is meant where no word is in it.
WHISPER_SIZES = ("large-v3-turbo", "large-v3", "large-v2", "large", "medium.en", "medium", "base.en", "base", "tiny.en", "tiny", "small.en", "small")
PUBLISHED = {
    "whisper": {"": "openai/whisper-small", "turbo": "openai/whisper-large-v3-turbo"} | {size: f"openai/whisper-{size}" for size in WHISPER_SIZES},
    "llm": {
        "": "GSAI-ML/LLaDA-8B-Instruct", "qwen": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "1.5": "GSAI-ML/LLaDA-1.5",
        "instruct": "GSAI-ML/LLaDA-8B-Instruct", "base": "GSAI-ML/LLaDA-8B-Base",
    },
    "adapters": {"": "zhoujiaming777/DIFFA"},
}  # fmt: skip


class WeightsError(ValueError):
    """A checkpoint that cannot be used, said in terms of its files and tensors."""


def download_command(piece: str, path: Path) -> str:
    """What would fill `path`, for one to run: piece is a key of PUBLISHED."""
    if path.parts[:1] == ("runs",) or path.parts[-3:-1] == ("runs", "toy"):
        return "`make demo` makes the toy run's"
    known = PUBLISHED[piece]
    words = (word for part in reversed(path.parts) for word in known if word and word in part.lower())  # the name says more than where it lies
    only = " config.json model.safetensors" if piece == "whisper" else ""  # the rest of those is for other libraries
    folder = path if path.suffix not in (".pt", ".bin", ".safetensors") else path.with_suffix("") if piece == "whisper" else path.parent
    then = "" if folder == path or piece == "adapters" else f", and pass --{piece} {shlex.quote(str(folder))}"
    return f"download it: hf download {known[next(words, '')]}{only} --local-dir {shlex.quote(str(folder))}{then}"


def require(**pieces: str | Path | None) -> None:
    """WeightsError that names every piece (a key of PUBLISHED) that is not there, each with the command that brings it."""
    lines = []
    for piece, path in pieces.items():
        if path is not None and not Path(path).exists():
            lines.append(f"--{piece} {path}: no such directory or file\n  {download_command(piece, Path(path))}")
        elif path is not None and piece != "adapters" and Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            lines.append(f"--{piece} {path}: holds no config.json\n  {download_command(piece, Path(path))}")
    if lines:
        raise WeightsError("\n".join(lines))


def refuse_pointer(path: Path) -> None:
    """Raise WeightsError when the file is absent, or a Git LFS pointer where the file itself should be."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(
                f"{path}: only a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}, or download the file again"
            )


def unpickle(path: Path) -> object:
    """What a `.bin` or `.pt` file holds, its tensors memory-mapped; WeightsError when that is code, or half a file."""
    refuse_pointer(path)
    try:
        # Before PyTorch 1.6 pickles were not zip archives; those can be read, but not mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint file ({error}); download it again") from error
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise besides
        raise WeightsError(
            f"{path}: refused, holds more than plain tensors (code is never run) or is damaged; download it again ({error})"
        ) from error


def named_tensors(value: object, source: Path) -> dict[str, Tensor]:
    """The value itself when it is tensors by name; WeightsError otherwise."""
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise WeightsError(f"{source}: holds something else than tensors with names")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or `.bin` file, memory-mapped.

    Raises WeightsError: the file is absent, an LFS pointer, cut short or too long, or a pickle that holds anything else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return named_tensors(unpickle(path), path)
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file, cut short or padded ({error}); download it again") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """All tensors of a hub directory, memory-mapped, and the file in which each lies.

    Shards with their index come first, then one safetensors file, then the same in pickles. Tensors come in the order of
    the files, so that who drops them as they are used lets go of one shard after the other.

    Raises WeightsError: no weights, shards of the index that are not there (all named), an index that disagrees with them.
    """
    path = Path(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            return read_shards(index)
        if (path / name).is_file():
            tensors = read_tensors(path / name)
            return tensors, dict.fromkeys(tensors, path / name)
    raise WeightsError(
        f"{path}: holds neither model.safetensors nor pytorch_model.bin, whole or as shards with an index; is the download complete?"
    )


def read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The same of a checkpoint in pieces, by its `*.index.json`."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise WeightsError(f"{index}: lacks weight_map, which tells the file of each tensor")
    shards = sorted(set(names.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise WeightsError(f"{index} names files that are not there: {', '.join(absent)}; the download is half done, start it again")
    tensors, files = {}, {}
    for shard in shards:
        found = read_tensors(index.parent / shard)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise WeightsError(f"{index.parent / shard}: {', '.join(twice[:5])} already stood in {files[twice[0]].name}")
        tensors |= found
        files |= dict.fromkeys(found, index.parent / shard)
    if set(tensors) != set(names):
        odd = sorted(set(tensors) ^ set(names))
        raise WeightsError(f"{index} and its shards disagree about {', '.join(odd[:5])}; they belong to different downloads")
    return tensors, files


def read_json(path: Path) -> dict:
    """A JSON object from a file; WeightsError names the file when it is absent or broken."""
    path = Path(path)
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON under another name first, so that a killed run leaves the old file whole."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, likewise under another name first."""
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
