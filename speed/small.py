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
    """The weights of a block; those of products as F.linear takes them."""

    attn_norm: Tensor  # (D,)
    qkv: Tensor  # ((H + 2 K) C, D)
    out: Tensor  # (D, H C)
    mlp_norm: Tensor  # (D,)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)


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
    return Weights(attn_norm, attn.joined, out, mlp_norm, mlp.joined, down)


@functools.lru_cache(maxsize=16)
def angles_of(n: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, 1, C) of the first n positions; half of the sines with a minus."""
    cos, sin = rotary_angles(torch.arange(n)[None], head_dim, theta)  # (1, 1, n, C)
    first, second = sin.chunk(2, dim=-1)
    sin = torch.cat([-first, second], dim=-1)
    return cos[0, 0, :, None], sin[0, 0, :, None]


def rotate(x: Tensor, angles: list[Tensor]) -> Tensor:
    """diffusion_lm.rotate for heads x (R, M, H, C), with its minus in the sines."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat([second, first], dim=-1).mul_(sin))


class SmallLM:
    """The hidden states and logits of a small LM, for `refine`."""

    def __init__(self, lm: DiffusionLM, blocks: list[Weights]):
        self.config = lm.config
        self.head = lm.head
        self.blocks = blocks
        self.norm_weight = lm.norm.weight

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

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
        M = x.shape[1]
        L = M if cache is None else cache[0][0].shape[2]
        start = int(indices[0])
        here = slice(start, start + M)

        # Angles of the positions (M, 1, C); with padding (R, M, 1, C), and what hides it.
        angles = angles_of(1 << (L - 1).bit_length(), c.head_dim, c.rope_theta)
        mask = None
        if real is None:
            angles = [table[here] for table in angles]
        else:
            positions = (real.cumsum(dim=1) - 1).clamp_(min=0)[:, here]  # (R, M)
            angles = [table[positions] for table in angles]
            mask = torch.zeros(real.shape).masked_fill_(~real, -torch.inf)[:, None, None]

        for i, block in enumerate(self.blocks):
            # Queries, keys and values; the last block has queries of the output rows only.
            rows = output_rows if i == c.n_layers - 1 else None
            q, k, v = self.heads(block, x, angles, rows)
            if rows is not None:
                x = x[:, rows]  # (R, N, D)
            if cache is not None:
                k, v = (put(old, new, here) for old, new in zip(cache[i], (k, v), strict=True))

            # Attention and its residual, (R, M, D); then those of SwiGLU.
            grouped = c.n_heads != c.n_kv_heads
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            x = add_product(x, mixed.transpose(1, 2).flatten(2), block.out)
            gate, up = F.linear(self.norm(x, block.mlp_norm), block.gate_up).chunk(2, dim=-1)
            x = add_product(x, F.silu(gate).mul_(up), block.down)
        return self.norm(x, self.norm_weight)

    def heads(
        self, block: Weights, x: Tensor, angles: list[Tensor], rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (R, H, N, C) and keys (R, K, M, C), and values (R, K, M, C)."""
        c = self.config
        H = c.n_heads
        K = c.n_kv_heads
        x = self.norm(x, block.attn_norm)  # (R, M, D)

        # All three in one product, and both rotations in one.
        if rows is None:
            heads = F.linear(x, block.qkv).unflatten(-1, (-1, c.head_dim))  # (R, M, H + 2 K, C)
            q, k = rotate(heads[:, :, : H + K], angles).split((H, K), dim=2)
            v = heads[:, :, H + K :]
        else:
            queries, others = block.qkv.split((H * c.head_dim, 2 * K * c.head_dim))
            k, v = F.linear(x, others).unflatten(-1, (-1, c.head_dim)).chunk(2, dim=2)
            k = rotate(k, angles)  # (R, M, K, C)
            q = F.linear(x[:, rows], queries).unflatten(-1, (H, -1))  # (R, N, H, C)
            q = rotate(q, [angle[..., rows, :, :] for angle in angles])
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def add_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + F.linear(y, weight), (R, M, D), in one operation."""
    return torch.addmm(x.flatten(0, 1), y.flatten(0, 1), weight.t()).view(x.shape)


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
