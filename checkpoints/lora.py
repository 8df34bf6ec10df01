"""LoRA: small trained matrices beside the frozen weights of a language model.

DIFFA-2 (arXiv 2601.23161) adapts five layers of every block of its LM this way, from its third
stage on. A layer W x becomes W x + SCALE * B A x, where A has r rows and B has r columns: 8 in
the release. Training runs the pairs A, B beside the weights (`attach`). Answering adds their
products to the weights (`merge`), which costs nothing later. A file has them under the names that
PEFT gives them, next to the adapters.

Shapes: D_in and D_out of a layer, r rank.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.files import Checkpoint, WeightsError
from checkpoints.fill import build, fill
from checkpoints.key_tables import LM_TABLES
from diffusion_lm import DiffusionLM, LMConfig
from speed.int8 import Int8Linear

# The release: alpha 16 by rank 8. No file records it, so it is the same for every rank.
SCALE = 2.0
DROPOUT = 0.05  # the release: of the layer's input, in training
MOST_RANK = 4096  # beyond are damaged files
# What is adapted in every block: the release's five layers.
LAYERS = {
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "gate": "mlp.gate",
    "up": "mlp.up",
}
PREFIX = "llm_model.base_model.model."
# The release writes PEFT's names, and its loader takes those without base_model.model as well.
NAME = re.compile(r"llm_model\.(?:base_model\.model\.)?(.+\.lora_[AB])(?:\.default)?\.weight")


class Pair(nn.Module):
    """SCALE * B A, beside one linear layer. B starts at zeros, so a new pair changes nothing."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.A = nn.Linear(layer.in_features, rank, bias=False).weight  # (r, D_in)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))  # (D_out, r)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D_in) -> what is added to the layer's output, (..., D_out), in the dtype of x."""
        x = F.dropout(x, DROPOUT, self.training)
        return SCALE * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class LoRA(nn.Module):
    """The pairs of all blocks of an LM: the part "lora" of a DIFFA."""

    def __init__(self, lm: DiffusionLM, rank: int):
        super().__init__()
        self.rank = rank
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: Pair(block.get_submodule(p), rank) for n, p in LAYERS.items()})
            for block in lm.blocks
        )

    def pairs(self, lm: DiffusionLM) -> Iterator[tuple[nn.Linear, Pair]]:
        """Each adapted layer of the LM, and its pair."""
        for block, pairs in zip(lm.blocks, self.blocks, strict=True):
            for name, path in LAYERS.items():
                yield block.get_submodule(path), pairs[name]


def add_pair(pair: Pair, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer."""
    return output + pair(*inputs)


def attach(lm: DiffusionLM, lora: LoRA) -> None:
    """Let the LM's layers add the output of their pairs. The LM's own weights stay as they are."""
    for layer, pair in lora.pairs(lm):
        layer.register_forward_hook(functools.partial(add_pair, pair))


@torch.no_grad()
def merge(lm: DiffusionLM, lora: LoRA) -> None:
    """Add the products of the pairs to the LM's weights: W + SCALE * B A, computed in float32.

    A weight in 8 bits would round them away. Its pair runs beside it, as a part of the layer.
    """
    for layer, pair in lora.pairs(lm):
        if isinstance(layer, Int8Linear):
            layer.pair = pair.eval().requires_grad_(False).to(layer.rows.device)
            layer.register_forward_hook(functools.partial(add_pair, pair))
            continue

        old = layer.weight
        product = pair.B.float().to(old.device) @ pair.A.float().to(old.device)  # (D_out, D_in)
        new = (old.float() + SCALE * product).to(old.dtype)

        # A new tensor: the old one may be the mapped file.
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def lora_keys(family: str) -> dict[str, str]:
    """The key table of LoRA beside an LM of this family, by the names of the release."""
    table, _, _ = LM_TABLES[family]
    return {
        f"lora.blocks.{{}}.{name}.{side}": (
            f"{PREFIX}{table['blocks.{}.' + path]}.lora_{side}.default.weight"
        )
        for name, path in LAYERS.items()
        for side in "AB"
    }


def is_lora(name: str) -> bool:
    """Whether a tensor of an adapters' file is half of a pair."""
    return NAME.fullmatch(name) is not None


def read_lora(file: Path, tensors: Checkpoint, lm_config: LMConfig) -> LoRA | None:
    """The LoRA in an adapters' file, in float32 on the CPU; None if there is none.

    Its rank is that of the matrices in the file.

    Raises WeightsError: pairs are incomplete, there twice, or do not fit the LM (all are listed).
    """
    found = {}
    for name in tensors:
        match = NAME.fullmatch(name)
        if not match:
            continue
        usual = f"{PREFIX}{match[1]}.default.weight"
        if usual in found:
            raise WeightsError(f"{file}: {usual} is there twice, the second time as {name}")
        found[usual] = tensors[name]
    if not found:
        return None

    # A is (r, D_in).
    ranks = [t.shape[0] for name, t in found.items() if ".lora_A." in name and t.ndim == 2]
    rank = ranks[0] if ranks else 0
    if not 0 < rank <= MOST_RANK:
        raise WeightsError(f"{file}: LoRA of rank {rank}, or without its matrices A")

    # The shapes of the LM are enough: no weights of it are read.
    def shapes() -> nn.Module:
        module = nn.Module()
        module.lora = LoRA(DiffusionLM(lm_config), rank)
        return module

    module = build(shapes, lm_config.n_layers, len(found), file)
    fill(module, found, lora_keys(lm_config.family), (), file, torch.float32)
    return module.lora
