"""Checkpoint files on a disk: read without trust and without copies, written whole or not at all.

Tensors are memory-mapped: opening a file of 16 GB costs nothing until a tensor is used, and using
it makes no second copy. Only tensors and plain values are ever unpickled (`weights_only=True`).
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/"  # Git leaves this in place of a large file
)

MOST_TEXT = 1 << 30  # bytes; a manifest of a million clips has half of it


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names files and tensors."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


# Reading


def refuse_pointer(path: Path, most: int | None = None) -> None:
    """Raise WeightsError when the file is missing, no regular file, or only a Git LFS pointer.

    most: bytes of a file that will be read whole.
    """
    if not path.is_file():
        # A pipe would be waited for without end.
        problem = "not a file, but a folder, pipe or device" if path.exists() else "no such file"
        raise WeightsError(f"{path}: {problem}")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(
                f"{path}: only a Git LFS pointer, not the file itself; "
                f"run `git lfs pull` in {path.parent}, or download the file again"
            )
    if most and path.stat().st_size > most:
        raise WeightsError(f"{path}: {path.stat().st_size:,} bytes are not a file of this kind")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the locale, without a byte-order mark.

    Raises WeightsError: the file is missing, no regular file, or not UTF-8.
    """
    path = Path(path)
    refuse_pointer(path, most=MOST_TEXT)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def read_sentences(path: str | Path) -> list[str]:
    """The lines of a text file that hold a letter or digit, without their ends.

    Not splitlines, which breaks at characters that may stand within a sentence, such as U+2028.

    Raises WeightsError: there are none; or as read_text.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    lines = [line for line in lines if any(map(str.isalnum, line))]
    if not lines:
        raise WeightsError(f"{path}: no line of text")
    return lines


def refuse_twice(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object from its pairs. Raises ValueError: a name is in it twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            key, known = pairs[0]
            begins = f"{key!r}: {str(known)[:40]!r}"
            raise ValueError(f"{name!r} is twice in one object, which begins with {begins}")
        found[name] = value
    return found


def parse_json(text: str, source: str | Path) -> object:
    """The value of a JSON text. Raises WeightsError that names `source`: it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{source}: not valid JSON ({first_line(error)})") from error


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises WeightsError when the file is missing, damaged or holds no object."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return value


def read_config(path: Path, model_types: tuple[str, ...]) -> dict:
    """The `config.json` of a directory.

    Raises WeightsError: it is missing, or its model_type is not one of model_types.
    """
    source = path / "config.json"
    raw = read_json(source)
    if raw.get("model_type") not in model_types:
        expected = " or ".join(repr(name) for name in model_types)
        raise WeightsError(
            f"{source}: model_type is {repr(raw.get('model_type'))[:60]}, expected {expected}; "
            "are --whisper and --llm swapped?"
        )
    return raw


def unpickle(path: Path) -> object:
    """The content of a `.bin` or `.pt` file, its tensors memory-mapped.

    Raises WeightsError: the file is missing, cut short, or holds code.
    """
    refuse_pointer(path)
    try:
        # Before PyTorch 1.6 pickles were no zip archives. Those can be read, but not mapped.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged pickles raise errors of many kinds
        raise WeightsError(
            f"{path}: damaged, or more than plain tensors (code is never run); "
            f"download it again ({first_line(error)})"
        ) from error


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip archive that unpacks to more than itself: none of PyTorch does."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"its {path.stat().st_size:,} bytes unpack to {unpacked:,}")


def named_tensors(value: object, source: Path) -> dict[str, Tensor]:
    """The value itself if it is a dict of tensors by name, else WeightsError."""
    fits = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if not fits or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise WeightsError(f"{source}: holds something else than tensors with names")

    # A pickle can claim more elements than it has numbers, or none at all.
    for name, tensor in value.items():
        plain = tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise WeightsError(f"{source}: {name} is not a plain tensor of {tuple(tensor.shape)}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or pickle file by name, memory-mapped.

    Raises WeightsError: the file is missing, a Git LFS pointer, cut short, too long, or holds
    something else.
    """
    if path.suffix != ".safetensors":
        return named_tensors(unpickle(path), path)
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # a damaged header shows in many ways
        problem = "not a whole safetensors file, cut short or padded"
        raise WeightsError(f"{path}: {problem} ({first_line(error)}); download it again") from error


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of one or more files by name, in the order of the files.

    It holds one file at a time. Copying the tensors in order, to a GPU or to another dtype, takes
    memory for the copies and for one file, not for all files.

    Attributes:
        files: the file of each tensor.
    Raises:
        WeightsError: a file cannot be used, or a tensor is in two files.
    """

    def __init__(self, *paths: Path):
        self.files: dict[str, Path] = {}
        for path in paths:
            self._path = path
            self._tensors = read_tensors(path)

            # Which of the two would count?
            twice = sorted(self._tensors.keys() & self.files.keys())
            if twice:
                file = self.files[twice[0]].name
                raise WeightsError(f"{path}: {twice[0]} is already in {file}")
            self.files |= dict.fromkeys(self._tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        if self.files[name] != self._path:
            self._path = self.files[name]
            self._tensors = read_tensors(self._path)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def read_checkpoint(path: Path) -> Checkpoint:
    """All tensors of a hub directory: safetensors if there are any, else pickles; shards first.

    Raises WeightsError: no weights, missing shards (all are listed), or an index that disagrees
    with its shards.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            return read_shards(index)
        if (path / name).is_file():
            return Checkpoint(path / name)
    raise WeightsError(
        f"{path}: holds neither model.safetensors nor pytorch_model.bin, whole or as shards "
        "with an index; is the download complete?"
    )


def read_shards(index: Path) -> Checkpoint:
    """All tensors of a checkpoint in shards, by its `*.index.json`."""
    names = read_json(index).get("weight_map")
    values = list(names.values()) if isinstance(names, dict) else []
    if not values or not all(isinstance(value, str) for value in values):
        raise WeightsError(f"{index}: lacks weight_map, which gives the file of each tensor")
    odd = [v for v in values if Path(v).name != v or "\0" in v or len(v) > 255]
    if odd:
        raise WeightsError(f"{index}: {odd[0][:60]!r} is not the name of a file in its folder")

    # A download that stopped halfway lacks whole files.
    shards = [index.parent / shard for shard in sorted(set(values))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise WeightsError(f"{index}: lacks {', '.join(missing)}; start the download again")

    # Index and shards must agree about every tensor.
    tensors = Checkpoint(*shards)
    different = sorted(set(tensors) ^ set(names))
    if different:
        listed = ", ".join(different[:5])
        raise WeightsError(f"{index} and its shards disagree about {listed}; download all again")
    return tensors


# Writing


def temporary_beside(path: Path) -> Path:
    """Where a file is written until it is whole. Raises OSError: a folder or device is there."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be saved (it is no file but a folder or a device)")

    # Several processes may write the same file, hence the process id.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def refuse_model(folder: Path) -> None:
    """Raise ValueError: the folder holds a model, whose config would be overwritten."""
    config = folder / "config.json"
    found = read_json(config) if config.is_file() else None
    if isinstance(found, dict) and "model_type" in found:
        problem = "holds a model, whose config.json would be overwritten"
        raise ValueError(f"{folder} {problem}; take another folder")


def check_writable(path: str | Path) -> None:
    """Raise OSError, before long work: the folder is missing, or a file cannot be written in it."""
    path = Path(path)
    temporary = temporary_beside(path)
    if not path.parent.is_dir():
        raise OSError(f"{path}: cannot be saved (no folder {path.parent}; make it first)")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be saved ({error})") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: whatever goes wrong, the old file stays as it was.

        with whole_file(path) as temporary:
            temporary.write_text(...)

    Yields:
        a temporary path in the same folder (made if missing). Its name ends in `.tmp`, so pass the
        format to functions that would infer it from the name. What was written there is flushed to
        the disk and then renamed.
    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary

        # Without fsync a power cut can leave the new name on an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # A full disk: torch raises RuntimeError for it.
        raise OSError(f"{path}: cannot be saved ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
