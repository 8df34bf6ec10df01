"""Short names for weights and files: by them, adapters recognise what they were trained with."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor


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


def same_weights(first: str, second: str) -> bool:
    """True for the rounded_digests of the same weights, in files of the same dtype or not."""
    return not set(first.split("-")).isdisjoint(second.split("-"))


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
