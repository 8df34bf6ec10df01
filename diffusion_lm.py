"""A masked-diffusion language model: a bidirectional transformer, its noise and its loss.

LLaDA (Nie et al. 2025, arXiv 2502.09992) is a Llama without the causal mask. The forward process
replaces each answer token by [MASK] with probability t. The model learns to predict what was there,
and generates by starting from masks alone (sampler.py).

Shapes: B batch, P prompt positions, G answer tokens, L = P + G positions, n masked tokens. D width,
H heads, K key-value heads, C head width, V vocabulary. M positions pass through the blocks: all L,
or the few that a cache does not hold. N of them are output rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Keys (stored rotated) and values of each block: two tensors (B, K, L, C) a block.
KeyValues = list[tuple[Tensor, Tensor]]

T_MIN = 1e-3  # noise levels are floored here, where the weight 1/t of the loss would explode
LOGITS_AT_ONCE = 1 << 24  # most logits that the loss holds at a time: 67 MB in float32


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Shapes of the transformer, by default LLaDA-8B's. ValueError: heads or groups do not fit."""

    width: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    ffn: int = 12_288
    vocab: int = 126_464
    max_length: int = 4096
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    mask_id: int = 126_336
    end_id: int = 126_081  # <|endoftext|>: ends an answer and pads it
    n_kv_heads: int | None = None  # fewer than n_heads: groups of queries share keys and values
    head_dim: int | None = None  # None: width / n_heads
    qk_norm: bool = False  # an RMSNorm on each head's query and key, as in Qwen3
    tied: bool = False  # the unembedding is the embedding table
    qkv_bias: bool = False  # queries, keys and values have biases, as in Qwen2
    shifted: bool = False  # position i predicts token i + 1, as in Dream
    appends: bool = False  # answers grow block by block, no masks follow a block, as in iLLaDA
    family: str = "llada"  # decides names in files and chat format (checkpoints/key_tables.py)

    def __post_init__(self):
        if self.head_dim is None and self.width % self.n_heads:
            raise ValueError(f"width {self.width} does not divide into {self.n_heads} heads")

        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.n_heads)

        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not divide into {self.n_kv_heads} groups")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the root mean square in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32 the library's function does the same with fewer calls.
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, C) in float32 for positions (B, L) (RoPE, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)  # (C / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, L, C / 2)

    # Both halves of a head have the same angles: they are rotated against each other.
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, L, C)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads x (B, H, L, C) by the angles of their positions, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Rotary attention with optional groups of heads, norms on heads, and biases."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        query_width = config.n_heads * config.head_dim
        key_width = config.n_kv_heads * config.head_dim
        self.query = nn.Linear(config.width, query_width, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, key_width, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, key_width, bias=config.qkv_bias)
        self.out = nn.Linear(query_width, config.width, bias=False)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor, output_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H C) of the output rows of x; keys and values (B, M, K C) of all rows."""
        asking = x if output_rows is None else x[:, output_rows]  # (B, N, D)
        return self.query(asking), self.key(x), self.value(x)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
        indices: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """x (B, M, D) to (B, M, D), or to (B, N, D) for the `output_rows` (N,) of x.

        angles: cosines and sines (B, 1, M, C) of the positions of x.
        mask: what each query may attend to, broadcast to (B, H, queries, L); None: everything.
        cache: keys and values of all L positions. Those of x replace the entries at `indices` (M,).
        """
        config = self.config
        q, k, v = self.project(x, output_rows)
        q = q.unflatten(-1, (config.n_heads, config.head_dim))  # (B, N, H, C)
        k = k.unflatten(-1, (config.n_kv_heads, config.head_dim))  # (B, M, K, C)
        v = v.unflatten(-1, (config.n_kv_heads, config.head_dim))

        # Queries keep the angles of their own positions.
        query_angles = angles
        if output_rows is not None:
            query_angles = tuple(angle[:, :, output_rows] for angle in angles)

        # Norms on heads come before the rotation.
        if config.qk_norm:
            q = self.query_norm(q)
            k = self.key_norm(k)
        q = rotate(q.transpose(1, 2), *query_angles)  # (B, H, N, C)
        k = rotate(k.transpose(1, 2), *angles)  # (B, K, M, C)
        v = v.transpose(1, 2)

        # With a cache, x attends to all L positions: its own entries are replaced, in place.
        if cache is not None:
            k = cache[0].index_copy_(2, indices, k)  # (B, K, L, C)
            v = cache[1].index_copy_(2, indices, v)

        # Every query attends to positions on both sides of it; only `mask` excludes any.
        grouped = config.n_heads != config.n_kv_heads
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, N, C) to (B, N, D)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, angles, mask, cache=None, indices=None, output_rows=None) -> Tensor:
        """Arguments and result as in Attention.forward."""
        attended = self.attn(self.attn_norm(x), angles, mask, cache, indices, output_rows)
        if output_rows is not None:
            x = x[:, output_rows]  # (B, N, D)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class DiffusionLM(nn.Module):
    """LLaDA's transformer, from embeddings to hidden states to logits."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.unembedding.weight = self.embedding.weight

    def embed(self, ids: Tensor) -> Tensor:
        """ids (..., L) -> embeddings (..., L, D)."""
        return self.embedding(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) of `forward` -> logits (..., V) of the tokens at their rows."""
        return self.unembedding(hidden)

    def new_cache(self, B: int, L: int) -> KeyValues:
        """Empty keys and values of L positions in every block; the first pass must fill them."""
        shape = (B, self.config.n_kv_heads, L, self.config.head_dim)
        # torch.empty, because new_empty of a sharded weight would be sharded too.
        options = {"dtype": self.embedding.weight.dtype, "device": self.embedding.weight.device}
        return [(torch.empty(shape, **options), torch.empty(shape, **options)) for _ in self.blocks]

    def attention_mask(self, mask: Tensor | None, indices: Tensor, n_keys: int) -> Tensor | None:
        """What queries may attend to: every real position, before and after. None: all positions.

        mask: (B, L), true where a position is real, or None. A causal model also needs the
        positions of the queries, indices (M,), and n_keys, L (toy/autoregressive.py).
        """
        return None if mask is None else mask[:, None, None, :]  # (B, 1, 1, L)

    def forward(
        self,
        embeddings: Tensor,
        mask: Tensor | None = None,
        cache: KeyValues | None = None,
        indices: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of a sequence, with attention in both directions.

        Args:
            embeddings: (B, M, D), of tokens or of audio; without a cache M = L, the whole sequence.
            mask: (B, L), true where a position is real; None when all are. Padding may lie
                anywhere: no position attends to it, so an item does not depend on its neighbours.
            cache: keys and values of all L positions; the pass replaces those at `indices` (M,).
            output_rows: (N,) rows of `embeddings` to return; the last block computes no others.
        Returns:
            (B, M, D) or (B, N, D) after the final norm; meaningless at padding. They predict the
            tokens at their rows: those of a `shifted` LM are from one row before.
        """
        if indices is None:
            indices = torch.arange(embeddings.shape[1], device=embeddings.device)  # (M,)

        # A shifted LM predicts a token one row before it; the first row predicts itself as well.
        if self.config.shifted:
            rows = torch.arange(embeddings.shape[1], device=embeddings.device)  # (M,)
            output_rows = ((rows if output_rows is None else output_rows) - 1).clamp(min=0)

        # Positions count real tokens only, so left padding does not move a prompt.
        if mask is None:
            positions = indices[None]  # (1, M)
        else:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, indices]  # (B, M)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

        n_keys = embeddings.shape[1] if cache is None else cache[0][0].shape[2]  # L
        attend = self.attention_mask(mask, indices, n_keys)

        # All blocks but the last one compute every position: the next one needs their keys.
        x = embeddings
        for i, block in enumerate(self.blocks):
            rows = None
            if i == len(self.blocks) - 1 and output_rows is not None:
                rows = output_rows
                attend = self.attention_mask(mask, indices[rows], n_keys)
            x = block(x, angles, attend, cache[i] if cache else None, indices, rows)
        return self.norm(x)


def noise_levels(
    n: int, generator: torch.Generator, t_min: float = 0.0, stratified: bool = False
) -> Tensor:
    """A noise level for each item, (n,) on the CPU: t ~ U(t_min, 1], floored at T_MIN.

    LLaDA, section 2.1, has t_min = 0. stratified: one level from each of n equal slices of the
    range, in random order. This reduces the variance of the 1/t weights in a small batch.
    """
    u = torch.rand(n, generator=generator)
    if stratified:
        u = (torch.randperm(n, generator=generator) + u) / n
    return (1.0 - u * (1.0 - t_min)).clamp(min=T_MIN)


def noise(answer_ids: Tensor, t: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Forward process: each token of answer_ids (B, G) becomes mask_id with probability t (B,).

    LLaDA, appendix A.1, equations 7 and 8. End tokens that pad a short answer are noised like any
    other token: predicting them is how the model learns where to stop.
    """
    u = torch.rand(answer_ids.shape, generator=generator)  # on the CPU: the same on every device
    is_masked = u.to(answer_ids.device) < t.to(answer_ids.device)[:, None]  # (B, G)
    return torch.where(is_masked, mask_id, answer_ids)


def token_losses(lm: DiffusionLM, hidden: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy (n,) of the tokens ids (n,) given their hidden states (n, D).

    Logits are the largest tensors of training: 126,464 numbers a token. They are computed chunk by
    chunk, dropped, and computed again in the backward pass, so only one chunk exists at a time.
    """

    def chunk_losses(hidden: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(lm.head(hidden).float(), ids, reduction="none")

    rows = max(LOGITS_AT_ONCE // lm.config.vocab, 1)
    chunks = zip(hidden.split(rows), ids.split(rows), strict=True)

    # A single chunk, or no backward pass: nothing would be saved.
    if len(ids) <= rows or not torch.is_grad_enabled():
        return torch.cat([chunk_losses(h, i) for h, i in chunks])
    return torch.cat([checkpoint(chunk_losses, h, i, use_reentrant=False) for h, i in chunks])


def diffusion_loss(
    lm: DiffusionLM,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    answer_ids: Tensor,
    noisy_ids: Tensor,
    t: Tensor,
    n_tokens: int,
) -> Tensor:
    """Masked-diffusion loss of answers, a scalar (LLaDA, equation 5: the prompt is never noised).

    n_tokens: the divisor of the sum: all answer tokens of the batch, masked or not (as in the
    release). When every answer is padded to G, B * G equals LLaDA's mean over items.
    The other arguments, and the weight 1/t, are those of weighted_losses.
    """
    losses, _ = weighted_losses(lm, prompt, prompt_mask, answer_ids, noisy_ids, t)  # (n,)
    return losses.sum() / n_tokens


def weighted_losses(
    lm: DiffusionLM,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    answer_ids: Tensor,
    noisy_ids: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every masked answer token, weighted by 1/t.

    Args:
        prompt: (B, P, D), audio included. prompt_mask: (B, P), true where real; None: everywhere.
        answer_ids: (B, G), padded with the end token. noisy_ids: (B, G), the same after `noise`.
        t: (B,) noise levels.
    Returns:
        the losses (n,) of the n masked tokens, and the row of the batch (n,) of each.
    """
    # 1. The sequence: the clean prompt, then the noisy answer.
    x = torch.cat([prompt, lm.embed(noisy_ids)], dim=1)  # (B, P + G, D)
    G = noisy_ids.shape[1]
    mask = None if prompt_mask is None else F.pad(prompt_mask, (0, G), value=True)  # (B, P + G)

    # 2. One pass in both directions, hidden states of the answer only.
    answer_rows = torch.arange(prompt.shape[1], x.shape[1], device=x.device)  # (G,)
    hidden = lm(x, mask, output_rows=answer_rows)  # (B, G, D)

    # 3. Cross-entropy at the masked positions only.
    is_masked = noisy_ids == lm.config.mask_id  # (B, G)
    losses = token_losses(lm, hidden[is_masked], answer_ids[is_masked])  # (n,)

    # 4. Weight 1/t: at level t only a fraction t of the tokens is scored, and the weight makes up
    #    for it. With t ~ U(0, 1] the expected loss bounds the negative log-likelihood from above.
    weights = (1.0 / t.to(losses))[:, None].expand_as(is_masked)[is_masked]  # (n,)
    return losses * weights, is_masked.nonzero()[:, 0]
