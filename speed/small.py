"""A call of a small LM on a CPU in fewer operations: DiffusionLM.forward, equal but for rounding.

At toy size an operation takes microseconds, so their number counts. Query, key and value are one
product here, as are gate and up (joined.py). Queries and keys are rotated together, by angles that
are made once. The code to read is DiffusionLM.forward, which every other LM runs.

Shapes: R rows, L positions, M of them that pass through, N that are predicted; D width, H heads,
K key-value heads, C head width, F the SwiGLU's width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lm import Attention, Block, DiffusionLM, KeyValues, RMSNorm, SwiGLU, rotary_angles
from sampler import refine
from speed.few_rows import LARGE
from speed.joined import JoinedAttention, JoinedSwiGLU, join_layers

FORWARD = DiffusionLM.forward
PLAIN = {Block, Attention, SwiGLU, JoinedAttention, JoinedSwiGLU, RMSNorm, nn.Linear}


class Weights(NamedTuple):
    """The weights of a block: x @ weight is a product."""

    attn_norm: Tensor  # (D,)
    qkv: Tensor  # (D, (H + 2 K) C)
    out: Tensor  # (H C, D)
    mlp_norm: Tensor  # (D,)
    gate_up: Tensor  # (D, 2 F)
    down: Tensor  # (F, D)


def is_changed(module: nn.Module) -> bool:
    """Whether hooks (LoRA's, a recorder's) or a replaced forward add to what a module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def weights_of(block: Block) -> Weights | None:
    """The weights of a block, two groups of them joined in place; None: it computes more."""
    attn = block.attn
    mlp = block.mlp
    qkv = (attn.query, attn.key, attn.value)
    gate_up = (mlp.gate, mlp.up)
    others = (block.attn_norm, attn.out, block.mlp_norm, mlp.down)

    # A layer of another kind computes something else.
    for module in (block, attn, mlp, *qkv, *gate_up, *others):
        if type(module) not in PLAIN or is_changed(module):
            return None

    join_layers(attn, qkv)
    join_layers(mlp, gate_up)
    attn_norm, out, mlp_norm, down = [layer.weight for layer in others]
    return Weights(attn_norm, attn.joined.t(), out.t(), mlp_norm, mlp.joined.t(), down.t())


@functools.lru_cache(maxsize=16)
def angles_of(n: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, C) of the first n positions; half of the sines with a minus."""
    cos, sin = rotary_angles(torch.arange(n)[None], head_dim, theta)  # (1, 1, n, C)
    first, second = sin[0, 0].chunk(2, dim=-1)
    return cos[0, 0], torch.cat([-first, second], dim=-1)


class SmallLM:
    """The hidden states and logits of a small LM, for `refine`."""

    def __init__(self, lm: DiffusionLM, blocks: list[Weights]):
        self.config = lm.config
        self.head = lm.head
        self.blocks = blocks
        self.norm_weight = lm.norm.weight

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x (R M, D), in fewer operations than the library's function."""
        scale = (x * x).mean(dim=-1, keepdim=True).add_(self.config.norm_eps).rsqrt_()  # (R M, 1)
        return (x * scale).mul_(weight)

    def __call__(
        self,
        x: Tensor,
        real: Tensor | None,
        cache: KeyValues | None,
        indices: Tensor,
        output_rows: Tensor,
    ) -> Tensor:
        """As DiffusionLM.forward; the M `indices` are consecutive."""
        c = self.config
        R, M, D = x.shape
        L = M if cache is None else cache[0][0].shape[2]
        start = int(indices[0])
        here = slice(start, start + M)
        n_rotated = c.n_heads + c.n_kv_heads

        # Angles of the positions (M, C); with padding (R, 1, M, C), and what hides it.
        cos, sin = angles_of(1 << (L - 1).bit_length(), c.head_dim, c.rope_theta)
        mask = None
        if real is None:
            cos = cos[here]
            sin = sin[here]
        else:
            positions = (real.cumsum(dim=1) - 1).clamp_(min=0)[:, None, here]  # (R, 1, M)
            cos = cos[positions]
            sin = sin[positions]
            mask = torch.zeros(real.shape).masked_fill_(~real, -torch.inf)[:, None, None]

        x = x.flatten(0, 1)  # (R M, D)
        for i, block in enumerate(self.blocks):
            # Queries, keys and values are one product, and so are both rotations.
            heads = torch.mm(self.norm(x, block.attn_norm), block.qkv)
            heads = heads.view(R, M, -1, c.head_dim).transpose(1, 2)  # (R, H + 2 K, M, C)
            rotated = heads[:, :n_rotated]
            rotated = (rotated * cos).addcmul_(rotated.roll(c.head_dim // 2, -1), sin)
            q, k = rotated.split((c.n_heads, c.n_kv_heads), dim=1)
            v = heads[:, n_rotated:]
            if cache is not None:
                k, v = (put(old, new, here) for old, new in zip(cache[i], (k, v), strict=True))

            # After the last block, only the output rows are read.
            if i == c.n_layers - 1:
                q = q[:, :, output_rows]  # (R, H, N, C)
                x = x.view(R, M, D)[:, output_rows].flatten(0, 1)  # (R N, D)

            # Attention and its residual, then those of SwiGLU.
            grouped = c.n_heads != c.n_kv_heads
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            x = torch.mm(mixed.transpose(1, 2).reshape(len(x), len(block.out)), block.out).add_(x)
            gate, up = torch.mm(self.norm(x, block.mlp_norm), block.gate_up).chunk(2, dim=-1)
            x = torch.mm(F.silu(gate).mul_(up), block.down).add_(x)
        return self.norm(x, self.norm_weight).view(R, len(output_rows), D)


def put(cached: Tensor, new: Tensor, here: slice) -> Tensor:
    """Replace entries of cached (R, K, L, C) by new (R, K, M, C); returns those of all L."""
    cached[:, :, here] = new
    return new if new.shape == cached.shape else cached


def small_step(lm: DiffusionLM) -> Callable:
    """`refine`; with fewer operations if the LM is small, frozen, in float32 and on a CPU."""
    c = lm.config
    weight = lm.embedding.weight
    small = weight.device.type == "cpu" and weight.dtype == torch.float32
    small = small and c.width * c.ffn < LARGE
    if not small or c.qk_norm or c.qkv_bias or c.shifted:
        return refine

    # Weights that train stay apart. Those made in inference mode could not be used outside of it.
    if weight.requires_grad or weight.is_inference():
        return refine

    # A subclass, or a forward that was replaced, computes something else.
    if type(lm) is not DiffusionLM or DiffusionLM.forward is not FORWARD or is_changed(lm):
        return refine

    blocks = [weights_of(block) for block in lm.blocks]
    if None in blocks:
        return refine
    fast = SmallLM(lm, blocks)
    return lambda lm, *arguments: refine(fast, *arguments)
