"""Short names for weights and files: by them, adapters recognise what they were trained with."""

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

# Kinds of checksums, the finest first. A file of 32 bits has all of them, one of 16 bits its own.
KINDS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
AT_ONCE = 1 << 24  # numbers that are converted at a time


def sample(tensor: Tensor) -> Tensor:
    """About 64 numbers of a tensor, evenly spaced."""
    flat = tensor.detach().flatten()
    return flat[:: max(len(flat) // 64, 1)]


def digest(
    tensors: Iterable[tuple[str, Tensor]], more: str = "", dtype: torch.dtype = torch.float32
) -> str:
    """A name for weights, from a sample of each tensor.

    Args:
        tensors: with their names. more: what else the name depends on.
        dtype: to which the numbers are rounded first.
    """
    made = hashlib.sha256()
    for name, tensor in tensors:
        numbers = sample(tensor).to(dtype).float().cpu().numpy()
        made.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    made.update(more.encode())
    return made.hexdigest()[:16]


def rounded_digests(tensors: Iterable[tuple[str, Tensor]], more: str = "") -> str:
    """Names of weights rounded to 16 bits in both ways, with a hyphen between: see same_weights."""
    tensors = list(tensors)
    return "-".join(digest(tensors, more, dtype) for dtype in (torch.bfloat16, torch.float16))


def checksums(tensor: Tensor) -> dict[str, int]:
    """CRC-32 over all numbers of a tensor, by kind."""
    found = {}
    for kind, dtype in KINDS.items():
        # Rounding is defined from 32 bits down, not between the two kinds of 16 bits.
        if tensor.dtype in (dtype, torch.float32, torch.float64):
            found[kind] = 0

            # In parts: the converted copy of a large table would take gigabytes.
            for part in tensor.detach().flatten().split(AT_ONCE):
                numbers = part.to(dtype).view(torch.uint8).cpu().numpy()
                found[kind] = zlib.crc32(numbers, found[kind])
    return found


def with_checksums(samples: str, found: dict[str, dict[str, int]]) -> str:
    """The rounded_digests of weights, and a digest of all their numbers for each kind.

    found: the checksums of every tensor by its name.
    """
    parts = [samples]
    for kind in KINDS:
        # Files may mix dtypes: a kind counts where all tensors have it.
        if found and all(kind in checks for checks in found.values()):
            listed = sorted((name, checks[kind]) for name, checks in found.items())
            parts.append(f"{kind}:{hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}")
    return "-".join(parts)


def same_weights(first: str, second: str) -> bool:
    """True for the digests of the same weights, in files of the same dtype or not.

    The samples must agree in one of the roundings. Of the checksums, the finest kind that both have
    decides. Digests by older versions have no checksums, and a bfloat16 file and a float16 file
    have no kind in common.
    """
    known = [set(text.split("-")) for text in (first, second)]

    # Samples have no colon.
    samples = [{part for part in parts if ":" not in part} for parts in known]
    if samples[0].isdisjoint(samples[1]):
        return False

    # The finest kind comes first.
    for kind in KINDS:
        whole = [{part for part in parts if part.startswith(f"{kind}:")} for parts in known]
        if whole[0] and whole[1]:
            return whole[0] == whole[1]
    return True


def described(config) -> str:
    """A config as text, without the fields that have their usual values.

    They are left out so that a new field does not change old digests. The longest context is left
    out too: it changes nothing that is computed.
    """
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name != "max_length":
            values[field.name] = value
    return json.dumps(values, sort_keys=True)


def file_digest(path: Path) -> str:
    """A name for the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
