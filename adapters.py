"""Hidden states of the encoder -> audio embeddings that a language model can read. These two are all that DIFFA trains.

The *semantic* adapter (paper, section 3.1) squeezes the last hidden state four-fold in time by convolutions: what is
said, 12.5 embeddings a second. The *acoustic* adapter lets learned queries look at several earlier hidden states through
one small Q-Former (BLIP-2, arXiv 2301.12597; the per-layer queries follow DeSTA2): how it sounds, 64 embeddings a clip.

Shapes: B batch, T encoder frames, A audio embeddings, Q queries, K tapped layers, D_w encoder width, D_l LM width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQUEEZE = 4  # encoder frames in a semantic embedding (stride of the second convolution)

# Tapped hidden states by the encoder's depth, which tells the Whispers apart better than a path's name does. Quirk of the
# release, kept since its weights were trained so: the indices count the list [what enters block 1, block 1, ..., block N],
# so 11 of 12 is not the last block.
TAPS = {
    3: (0, 1, 2),  # our toy; ours, tiny's pattern
    4: (0, 1, 2, 3),  # tiny, tiny.en: DIFFA's released code
    6: (1, 3, 5),  # base, base.en: ours, spaced as small's are; the release names none
    12: (2, 5, 8, 11),  # small, small.en: DIFFA's released code; the paper's and the released weights' encoder
    24: (5, 11, 17, 23),  # medium, medium.en: DIFFA's released code
    32: (3, 7, 11, 15, 19, 23, 27, 31),  # large-v3: DIFFA's released code; large, large-v2 and large-v3-turbo: the same by depth, ours
}


@dataclass(frozen=True)
class AdapterConfig:
    """Shapes of both adapters and the stage-1 prompts. Defaults are the paper's, for Whisper small and LLaDA-8B."""

    encoder_width: int = 768
    lm_width: int = 4096
    n_heads: int = 12  # the Q-Former's; the release takes the encoder's number
    taps: tuple[int, ...] = TAPS[12]
    n_queries: int = 64
    qformer_layers: int = 2
    ffn: int = 3072  # BERT-base's, whatever the encoder's width
    dropout: float = 0.1
    n_prompts: int = 20  # learned vectors in front of the semantic embeddings, stage 1 only

    def __post_init__(self):
        if self.encoder_width % self.n_heads:
            raise ValueError(f"width {self.encoder_width} does not divide into the Q-Former's {self.n_heads} heads")


class SemanticAdapter(nn.Module):
    """(B, T, D_w) -> (B, T // 4, D_l): two convolutions, two linear layers, LayerNorm."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        D_w, D_l = config.encoder_width, config.lm_width
        self.conv1 = nn.Conv1d(D_w, D_w, 3, padding=1)
        self.conv2 = nn.Conv1d(D_w, SQUEEZE * D_w, 3, stride=SQUEEZE, padding=1)
        self.linear1 = nn.Linear(SQUEEZE * D_w, D_w)
        self.linear2 = nn.Linear(D_w, D_l)
        self.norm = nn.LayerNorm(D_l)

    def forward(self, state: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the words in a clip.

        Args:
            state: (B, T, D_w) the encoder's last hidden state.
            frames: (B,) real encoder frames of each clip; states after them are not looked at.
        Returns:
            embeddings (B, A, D_l) and mask (B, A), true where an embedding is real. A is the longest clip's number.
        """
        lengths = frames // SQUEEZE  # whole groups of 4 frames; what is left over is cut
        A = max(int(lengths.max()), 1)
        x = state[:, : A * SQUEEZE]  # (B, 4 A, D_w)
        # A clip's own zeros, not its neighbour's padding, lie beyond its end: convolutions see what they would see alone.
        real = torch.arange(x.shape[1], device=x.device)[None] < (lengths * SQUEEZE)[:, None]  # (B, 4 A)
        x = (x * real[..., None]).transpose(1, 2)  # (B, D_w, 4 A)
        x = F.gelu(self.conv1(x)) * real[:, None]
        x = self.conv2(x).transpose(1, 2)  # (B, A, 4 D_w)
        x = F.relu(self.linear2(F.relu(self.linear1(x))))
        mask = torch.arange(A, device=x.device)[None] < lengths[:, None]  # (B, A)
        return self.norm(x), mask


class BertAttention(nn.Module):
    """Attention, output projection, then LayerNorm of the sum (post-norm), as in BERT."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        width = config.encoder_width
        self.n_heads, self.p = config.n_heads, config.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (B, Q, D_w) looks at source (B, T, D_w); returns (B, Q, D_w)."""
        B, Q, D = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(B, -1, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, T or Q, D / H)

        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(source)), heads(self.value(source)), dropout_p=self.p if self.training else 0.0
        )
        mixed = mixed.transpose(1, 2).reshape(B, Q, D)
        return self.norm(x + self.dropout(self.out(mixed)))


class QFormerBlock(nn.Module):
    """Queries look at each other, then at the encoder's states, then pass a feed-forward layer."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.self_attn = BertAttention(config)
        self.cross_attn = BertAttention(config)
        self.ffn_in = nn.Linear(config.encoder_width, config.ffn)
        self.ffn_out = nn.Linear(config.ffn, config.encoder_width)
        self.norm = nn.LayerNorm(config.encoder_width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, state: Tensor) -> Tensor:
        queries = self.self_attn(queries, queries)  # (B, Q, D_w)
        queries = self.cross_attn(queries, state)
        return self.norm(queries + self.dropout(self.ffn_out(F.gelu(self.ffn_in(queries)))))


class AcousticAdapter(nn.Module):
    """K hidden states (B, T, D_w) -> (B, Q, D_l): one Q-Former, own queries for each tapped layer, learned mixture."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.taps = config.taps
        K, Q, D_w = len(config.taps), config.n_queries, config.encoder_width
        self.queries = nn.ParameterList(nn.Parameter(torch.randn(1, Q, D_w)) for _ in range(K))
        self.layer_weights = nn.Parameter(torch.zeros(Q, K))
        self.blocks = nn.ModuleList(QFormerBlock(config) for _ in range(config.qformer_layers))
        self.norm = nn.LayerNorm(D_w)
        self.proj = nn.Linear(D_w, config.lm_width)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Embeddings of the voice in a clip.

        Args:
            states: all hidden states of the encoder, n_layers + 1 tensors (B, T, D_w).
        Returns:
            (B, Q, D_l). Quirk of the release, kept since its weights were trained so: the tapped states are not cut to
            the clip's real length, so the silence that fills the context is looked at too.
        """
        outputs = []
        for queries, tap in zip(self.queries, self.taps):
            x = queries.expand(len(states[tap]), -1, -1)  # (B, Q, D_w)
            for block in self.blocks:
                x = block(x, states[tap])
            outputs.append(x)
        weights = self.layer_weights.softmax(dim=-1)  # (Q, K)
        mixed = torch.einsum("kbqd,qk->bqd", torch.stack(outputs), weights)  # (B, Q, D_w)
        return self.proj(self.norm(mixed))
