"""A masked-diffusion language model: a transformer that looks both ways, its noise, and its loss.

LLaDA (Nie et al. 2025, arXiv 2502.09992) is a Llama without the causal mask. Noise replaces each answer token by [MASK]
with probability t; the model learns to put back what was there, and generates by starting from masks alone.

Shapes: B batch, L positions (prompt and answer), M of them that pass through, N of those that are wanted at the end,
G answer tokens, D width, H heads, K key-value heads, C head width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeyValues = list[tuple[Tensor, Tensor]]  # of each block the keys, stored rotated, and the values: (B, K, L, C) each
LOGITS_AT_ONCE = 1 << 24  # most logits that a loss makes at a time: 67 MB in float32
FEW_ROWS, LARGE = 64, 1 << 19  # up to so many positions, with weights of so many numbers, a CPU multiplies as `linear` says
STRIPE = 2048  # rows of a weight at a time there; as fast from 512 to 8192
T_MIN = 1e-3  # noise levels are floored here, where the weight 1/t of the loss would run away


@dataclass(frozen=True)
class LMConfig:
    """Shapes of the transformer. Defaults are LLaDA-8B's."""

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
    n_kv_heads: int | None = None  # fewer than n_heads: groups of queries share keys and values; None: n_heads
    head_dim: int | None = None  # None: width / n_heads
    qk_norm: bool = False  # an RMSNorm on the query and key of each head (Qwen3)
    tied: bool = False  # the unembedding is the embedding table
    family: str = "llada"  # or "qwen3": whose names the files use, and whose chat format its prompts
    causal: bool = False  # true for the autoregressive twin of the paper's backbone ablation, never for LLaDA

    def __post_init__(self):
        if self.head_dim is None and self.width % self.n_heads:
            raise ValueError(f"width {self.width} does not divide into {self.n_heads} heads")
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.width // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not divide into {self.n_kv_heads} groups")


SIZES = {
    "llada-8b": LMConfig(),
    "qwen3-0.6b": LMConfig(
        width=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, qk_norm=True, ffn=3072, vocab=151_936,
        max_length=40_960, rope_theta=1e6, norm_eps=1e-6, mask_id=151_669, end_id=151_643, tied=True, family="qwen3",
    ),
    "toy": LMConfig(width=128, n_layers=4, n_heads=4, ffn=352, vocab=0, max_length=256, mask_id=-1, end_id=-1),
}  # the toy's vocabulary and special ids come from its tokenizer (pretrain.py)
SIZES["llada-1.5"] = SIZES["llada-8b"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square taken in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, C) in float32 for positions (B, L) (RoPE, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, L, C / 2)
    angles = torch.cat([angles, angles], dim=-1)  # the halves of a head are rotated against each other
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads x (B, H, L, C) by the angles of their positions, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) for x (..., D), without a bias; the same numbers but for rounding.

    A cached step has few rows, and for few rows of float32 the CPU's library (MKL) is up to twice as fast with a large weight
    on the left, W x^T instead of x W^T, a stripe of W at a time. With many rows it is the other way round.
    """
    few = 1 < x[..., 0].numel() <= FEW_ROWS and layer.weight.numel() >= LARGE and x.dtype == torch.float32
    if not few or x.device.type != "cpu" or torch.is_grad_enabled():
        return layer(x)
    flat = x.flatten(0, -2).t()  # (D, rows)
    stripes = [(stripe @ flat).t() for stripe in layer.weight.split(STRIPE)]  # (rows, STRIPE) each
    return torch.cat(stripes, dim=-1).unflatten(0, x.shape[:-1])  # (..., V) or whatever the layer makes


class LMBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); no biases anywhere."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        D, H, K, C = config.width, config.n_heads, config.n_kv_heads, config.head_dim
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.query = nn.Linear(D, H * C, bias=False)
        self.key = nn.Linear(D, K * C, bias=False)
        self.value = nn.Linear(D, K * C, bias=False)
        self.out = nn.Linear(H * C, D, bias=False)
        if config.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(C, config.norm_eps), RMSNorm(C, config.norm_eps)
        self.ffn_norm = RMSNorm(D, config.norm_eps)
        self.gate = nn.Linear(D, config.ffn, bias=False)
        self.up = nn.Linear(D, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, D, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None, where: Tensor | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, M, D) to (B, M, D), or to (B, N, D) where only the rows `wanted` (N,) of x are asked for.

        cache: this block's keys and values of all L positions; those of x are written there, at `where` (M,), and x
        attends to the whole of it.
        """
        B, M, _ = x.shape
        c, normed = self.config, self.attn_norm(x)
        k, v = linear(self.key, normed).view(B, M, c.n_kv_heads, c.head_dim), linear(self.value, normed).view(B, M, c.n_kv_heads, c.head_dim)
        cos_q, sin_q = cos, sin
        if wanted is not None:  # the others are of use as keys and values alone
            x, normed, cos_q, sin_q = x[:, wanted], normed[:, wanted], cos[:, :, wanted], sin[:, :, wanted]
        q = linear(self.query, normed).view(B, x.shape[1], c.n_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N or M, C), twice (B, K, M, C)
        q, k = rotate(q, cos_q, sin_q), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache[0].index_copy_(2, where, k), cache[1].index_copy_(2, where, v)  # (B, K, L, C)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=c.n_heads != c.n_kv_heads)
        x = x + linear(self.out, mixed.transpose(1, 2).flatten(2))  # (B, H, N, C) -> (B, N, H C) -> (B, N, D)
        normed = self.ffn_norm(x)
        return x + linear(self.down, F.silu(linear(self.gate, normed)) * linear(self.up, normed))


class DiffusionLM(nn.Module):
    """LLaDA's transformer, from embeddings to hidden states to logits."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(LMBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.unembedding.weight = self.embedding.weight
        self.fixed_caches: dict[tuple, KeyValues] = {}  # see new_cache
        self.recompute = False  # true: the backward pass computes each block again, and only their inputs are kept

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> embeddings (B, L, D)."""
        return self.embedding(ids)

    def new_cache(self, B: int, L: int, fixed: bool = False) -> KeyValues:
        """Room for the keys and values of L positions in every block; a first forward must fill it.

        fixed: the same tensors whenever that shape is asked for, for recorded CUDA graphs know addresses.
        """
        c, like = self.config, self.embedding.weight
        if fixed and (B, L, like.device, like.dtype) in self.fixed_caches:
            return self.fixed_caches[B, L, like.device, like.dtype]
        shape = (B, c.n_kv_heads, L, c.head_dim)
        with torch.inference_mode(False):  # else they could not be written to outside of it
            kind = {"dtype": like.dtype, "device": like.device}  # not like.new_empty: of a sharded LM that would be a slice
            cache = [(torch.empty(shape, **kind), torch.empty(shape, **kind)) for _ in self.blocks]
        if fixed:
            for tensor in (tensor for pair in cache for tensor in pair):
                torch._dynamo.mark_static_address(tensor)
            self.fixed_caches[B, L, like.device, like.dtype] = cache
        return cache

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None,
        cache: KeyValues | None = None, where: Tensor | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states of a sequence, seen in both directions, or by a causal LM backwards only.

        Args:
            embeddings: (B, M, D), of tokens or of sound; without a cache M = L, the whole sequence.
            mask: (B, L), true where a position is real; None when all are. Padding may lie anywhere: real positions
                are numbered from 0 without it and never attend to it, so an item does not depend on its neighbours.
            cache: keys and values of the whole sequence. Those of `embeddings` are written there, all others read: a causal
                LM reads those before, but none may be unfilled, so hand it the cache up to its last position, L of them.
            where: (M,) the positions of `embeddings` in the sequence; needed with a cache.
            wanted: (N,) the rows of `embeddings` whose hidden states are returned. The last block computes no others.
        Returns:
            (B, M, D) hidden states after the final norm, or (B, N, D) with `wanted`; meaningless at padding.
        """
        M, device = embeddings.shape[1], embeddings.device
        queries = torch.arange(M, device=device) if where is None else where  # (M,)
        if mask is None:
            positions, attend = queries[None], None  # (1, M)
        else:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, L)
            positions = positions if where is None else positions[:, where]  # (B, M)
            attend = mask[:, None, None, :]  # (B, 1, 1, L)
        if self.config.causal:
            keys = torch.arange(M if cache is None else cache[0][0].shape[2], device=device)  # (L,)
            before, own = keys <= queries[:, None], keys == queries[:, None]  # (M, L) both
            # A padded query may look at itself, or its softmax over nothing would be NaN.
            attend = before if attend is None else (before & attend) | own  # (M, L) or (B, 1, M, L)
        rows = attend[..., wanted, :] if self.config.causal and wanted is not None else attend  # of the last block's queries
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x, last = embeddings, len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            attend, asked = (rows, wanted) if i == last else (attend, None)
            arguments = (x, cos, sin, attend, None if cache is None else cache[i], where, asked)
            x = checkpoint(block, *arguments, use_reentrant=False) if self.recompute and x.requires_grad else block(*arguments)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D); logits at position i speak of token i, unless causal."""
        return linear(self.unembedding, hidden)


def noise_levels(n: int, generator: torch.Generator, t_min: float = 0.0, stratified: bool = False) -> Tensor:
    """One noise level per item, (n,) on the CPU, t ~ U(t_min, 1] floored at 1e-3 (LLaDA, section 2.2).

    stratified: one level from each n-th of the range, in random order, which calms the 1/t weights of a small batch.
    """
    u = torch.rand(n, generator=generator)
    if stratified:
        u = (torch.randperm(n, generator=generator) + u) / n
    return (1.0 - u * (1.0 - t_min)).clamp(min=T_MIN)


def noise(answer_ids: Tensor, t: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Forward process: each token of answer_ids (B, G) becomes mask_id with its item's probability t (B,).

    End tokens that pad a short answer are noised like any other: that is how the model learns where to stop.
    """
    u = torch.rand(answer_ids.shape, generator=generator)  # on the CPU: the same noise on any device
    return torch.where(u.to(answer_ids.device) < t.to(answer_ids.device)[:, None], mask_id, answer_ids)


def token_losses(lm: DiffusionLM, hidden: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy (n,) of the tokens ids (n,) given their hidden states (n, D).

    Logits of a large vocabulary are the largest tensors of training: 126,464 numbers a token. Where they are many they
    are made chunk by chunk, forgotten, and made again in the backward pass, so that no more than a chunk ever exists.
    """

    def of_chunk(hidden: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(lm.head(hidden).float(), ids, reduction="none")

    rows = max(LOGITS_AT_ONCE // lm.config.vocab, 1)
    if len(ids) <= rows or not torch.is_grad_enabled():
        chunks = [of_chunk(h, i) for h, i in zip(hidden.split(rows), ids.split(rows))]
    else:
        chunks = [checkpoint(of_chunk, h, i, use_reentrant=False) for h, i in zip(hidden.split(rows), ids.split(rows))]
    return torch.cat(chunks)


def diffusion_loss(
    lm: DiffusionLM,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    answer_ids: Tensor,
    noisy_ids: Tensor,
    t: Tensor,
    n_tokens: int,
) -> Tensor:
    """Loss of putting the answer back (LLaDA, equation 3; paper, equation 2).

    Args:
        prompt: (B, P, D) embeddings before the answer, sound included; prompt_mask (B, P), true where real.
        answer_ids: (B, G) the answers, padded with the end token. noisy_ids: (B, G) the same after `noise`.
        t: (B,) noise levels.
        n_tokens: what the sum is divided by: all answer tokens of the batch, masked or not (the release). Where every
            answer is padded to G this is B * G, and equals LLaDA's division per item.
    Returns:
        a scalar.
    Raises:
        ValueError: the LM is causal.
    """
    if lm.config.causal:
        raise ValueError("masks tell a causal LM nothing; its loss is next_token_loss")
    # 1. Sequence: the clean prompt, then the noisy answer.
    x = torch.cat([prompt, lm.embed(noisy_ids)], dim=1)  # (B, P + G, D)
    if prompt_mask is not None:
        prompt_mask = torch.cat([prompt_mask, torch.ones_like(noisy_ids, dtype=torch.bool)], dim=1)  # (B, P + G)
    # 2. One pass in both directions.
    P, L = prompt.shape[1], x.shape[1]
    hidden = lm(x, prompt_mask, wanted=torch.arange(P, L, device=x.device))  # (B, G, D)
    # 3. Cross-entropy at the masked positions only, n of them: no position is shifted, i predicts i.
    masked = noisy_ids == lm.config.mask_id  # (B, G)
    losses = token_losses(lm, hidden[masked], answer_ids[masked])  # (n,)
    # 4. Weighted by 1 / t.
    weights = (1.0 / t.to(losses))[:, None].expand_as(masked)[masked]  # (n,)
    # 5. Normalisation by answer tokens.
    return (losses * weights).sum() / n_tokens


def next_token_loss(
    lm: DiffusionLM, prompt: Tensor, prompt_mask: Tensor | None, answer_ids: Tensor, n_tokens: int, counted: Tensor | None = None
) -> Tensor:
    """Loss of a causal LM: cross-entropy of each answer token given all before it. Arguments as in diffusion_loss, and

    Args:
        counted: (B, G), true at the tokens that have a loss; None: all.
    Raises:
        ValueError: the LM is not causal, and would read each token off the answer itself.
    """
    if not lm.config.causal:
        raise ValueError("next_token_loss is for a causal LM; one that sees the whole answer has diffusion_loss")
    x = torch.cat([prompt, lm.embed(answer_ids)], dim=1)  # (B, P + G, D)
    if prompt_mask is not None:
        prompt_mask = torch.cat([prompt_mask, torch.ones_like(answer_ids, dtype=torch.bool)], dim=1)  # (B, P + G)
    P, L = prompt.shape[1], x.shape[1]
    hidden = lm(x, prompt_mask, wanted=torch.arange(P - 1, L - 1, device=x.device))  # (B, G, D): position i predicts token i + 1
    counted = torch.ones_like(answer_ids, dtype=torch.bool) if counted is None else counted  # (B, G), n of them true
    return token_losses(lm, hidden[counted], answer_ids[counted]).sum() / n_tokens  # of n losses
