"""Copies of the frozen encoder and LM in an adapters' file: the only tensors that may be dropped.

A training program may write the whole model. Encoder and LM have directories of their own, so
their copies are not read, once it is known that they are copies. Anything else under their prefixes
was trained, and leaving it out would change the answers without a word.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.files import Checkpoint, WeightsError
from checkpoints.fill import their_name
from checkpoints.key_tables import LM_TABLES, WHISPER_KEYS
from checkpoints.lora import is_lora
from diffusion_lm import DiffusionLM
from encoder import WhisperEncoder
from speed.int8 import Int8Linear, int8_layers

PREFIXES = ("whisper_model.", "llm_model.")
ENCODER = re.compile(r"whisper_model\.(?:model\.)?(?:encoder\.)?")
DECODER = re.compile(r"whisper_model\.(?:model\.)?(?:decoder|proj_out)\.")
# PEFT wraps a model in base_model.model, and an adapted layer in base_layer.
LM = re.compile(r"llm_model\.(?:base_model\.model\.)?")


def original_name(name: str) -> str:
    """The name of a copied tensor in the directory of the encoder or LM that it is a copy of."""
    if name.startswith("whisper_model."):
        return ENCODER.sub("model.encoder.", name, count=1)
    return LM.sub("", name, count=1).replace(".base_layer.", ".")


def is_copy(name: str) -> bool:
    """Whether the name under PREFIXES is that of a tensor of a Whisper or of an LM that we know."""
    if DECODER.match(name):
        return True
    tables = [WHISPER_KEYS]
    if name.startswith("llm_model."):
        tables = [keys for keys, _, _ in LM_TABLES.values()]

    # A table names modules, or single tensors.
    template = re.sub(r"\.\d+(?=\.)", ".{}", original_name(name))
    module, _, leaf = template.rpartition(".")
    known = {theirs for keys in tables for theirs in keys.values()}
    return template in known or (module in known and leaf in ("weight", "bias"))


def copies_in(file: Path, tensors: Checkpoint) -> Iterator[str]:
    """Names of the copies in an adapters' file.

    Raises WeightsError: a tensor under PREFIXES is neither a copy nor LoRA (they are listed).
    """
    unknown = []
    for name in tensors:
        if not name.startswith(PREFIXES) or is_lora(name):
            continue
        if is_copy(name):
            yield name
        else:
            unknown.append(name)
    if unknown:
        listed = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        problem = "neither LoRA of the layers that DIFFA-2 adapts nor copies of Whisper or the LM"
        raise WeightsError(f"{file}: {listed}: {problem}, so they cannot be left out")


def check_copies(file: Path, tensors: Checkpoint, encoder: WhisperEncoder, lm: DiffusionLM) -> None:
    """Raise WeightsError when a copy differs from the encoder or LM that takes its place.

    All numbers are compared, rounded as two 16-bit types round them: a copy may have another dtype.
    Whisper's decoder, which is not loaded, is not compared.
    """
    ours = {}
    for model, table in ((encoder, WHISPER_KEYS), (lm, LM_TABLES[lm.config.family][0])):
        named = model.named_parameters(remove_duplicate=False)
        ours |= {their_name(table, name): parameter for name, parameter in named}
        layers = int8_layers(model).items()
        ours |= {their_name(table, f"{name}.weight"): layer for name, layer in layers}

    for name in tensors:
        if not name.startswith(PREFIXES) or is_lora(name) or DECODER.match(name):
            continue
        frozen = ours.get(original_name(name))
        if frozen is None:
            raise WeightsError(f"{file}: {name} is a copy of nothing in --whisper or --llm")

        if not is_same(tensors[name], frozen):
            problem = "differs from that of the frozen part, so it was trained, or made for another"
            advice = "pass the --whisper and --llm that it belongs to, or --force-parts"
            raise WeightsError(f"{file}: {name} {problem}; {advice}")


def is_same(copy: Tensor, frozen: Tensor | Int8Linear) -> bool:
    """Whether a copy has the numbers of a frozen parameter, or the rows of a layer in 8 bits."""
    if isinstance(frozen, Int8Linear):
        return frozen.may_hold(copy)

    # The positions of a shortened window are the first ones.
    if copy.ndim == frozen.ndim:
        copy = copy[: len(frozen)]
    return copy.shape == frozen.shape and any(
        torch.equal(copy.to(frozen.device, dtype), frozen.to(dtype))
        for dtype in (torch.bfloat16, torch.float16)
    )
