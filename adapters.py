"""Hidden states of the encoder -> audio embeddings that a language model can read.

These two adapters, and stage 1's prompts, are all that DIFFA trains (figure 2). The *semantic*
adapter squeezes the last hidden state four-fold in time by convolutions: the words, 12.5 embeddings
a second. The *acoustic* adapter carries how the voice sounds, in 64 embeddings a clip: learned
queries attend to several hidden states through one small Q-Former (BLIP-2, arXiv 2301.12597).

Shapes: B batch, T encoder frames, A audio embeddings, Q queries, K tapped layers, D_w encoder
width, D_l LM width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQUEEZE = 4  # encoder frames in a semantic embedding: the stride of the second convolution

# Tapped hidden states, by the encoder's depth. Words are easiest to read off the last state.
# Speaker, accent and mood are clearer in earlier ones, so the acoustic adapter taps states over the
# whole depth. Quirk of the release: index 0 is what enters block 1, and index i is what leaves
# block i. So 11 of 12 is not the last block.
TAPS = {
    3: (0, 1, 2),  # the toy: ours, like tiny's
    4: (0, 1, 2, 3),  # tiny: the release
    6: (1, 3, 5),  # base: ours, spaced as small's
    12: (2, 5, 8, 11),  # small: the release; the paper's encoder
    24: (5, 11, 17, 23),  # medium: the release
    32: (3, 7, 11, 15, 19, 23, 27, 31),  # large-v3: the release; ours for other large ones
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shapes of both adapters and stage 1's prompts. ValueError: Q-Former heads do not fit.

    Defaults are the paper's, for Whisper small and LLaDA-8B.
    """

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
            raise ValueError(
                f"width {self.encoder_width} does not divide into {self.n_heads} Q-Former heads"
            )


class SemanticAdapter(nn.Module):
    """(B, T, D_w) -> (B, A, D_l): two convolutions, two linear layers, LayerNorm."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        D_w, D_l = config.encoder_width, config.lm_width
        self.conv1 = nn.Conv1d(D_w, D_w, 3, padding=1)
        self.conv2 = nn.Conv1d(D_w, SQUEEZE * D_w, 3, stride=SQUEEZE, padding=1)
        self.linear1 = nn.Linear(SQUEEZE * D_w, D_w)
        self.linear2 = nn.Linear(D_w, D_l)
        self.norm = nn.LayerNorm(D_l)

    def forward(self, state: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the words (B, A, D_l) and their mask (B, A), true where one is real.

        state: (B, T, D_w) the encoder's last hidden state. frames: (B,) real encoder frames of each
        clip; states after them are not read. A is that of the longest clip.
        """
        # Whole groups of 4 frames; what is left over is cut, as in the release.
        lengths = frames // SQUEEZE  # (B,)
        A = max(int(lengths.max()), 1)
        x = state[:, : A * SQUEEZE]  # (B, 4 A, D_w)

        # Frames after a clip's end are set to zero, so the convolutions give what they would give
        # for the clip alone.
        position = torch.arange(x.shape[1], device=x.device)
        is_real = position[None] < (lengths * SQUEEZE)[:, None]  # (B, 4 A)
        x = (x * is_real[..., None]).transpose(1, 2)  # (B, D_w, 4 A)

        # Two convolutions; the second one squeezes time.
        x = F.gelu(self.conv1(x)) * is_real[:, None]
        x = self.conv2(x).transpose(1, 2)  # (B, A, 4 D_w)

        # Two linear layers into the LM's width.
        x = F.relu(self.linear1(x))  # (B, A, D_w)
        x = F.relu(self.linear2(x))  # (B, A, D_l)
        mask = torch.arange(A, device=x.device)[None] < lengths[:, None]  # (B, A)
        return self.norm(x), mask


class BertAttention(nn.Module):
    """Attention, output projection, then LayerNorm of the sum (post-norm), as in BERT."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        width = config.encoder_width
        self.n_heads = config.n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (B, Q, D_w) attends to source (B, T, D_w); returns (B, Q, D_w)."""
        B, Q, D = x.shape

        def split_heads(y: Tensor) -> Tensor:
            return y.view(B, -1, self.n_heads, D // self.n_heads).transpose(1, 2)

        q = split_heads(self.query(x))  # (B, H, Q, D_w / H)
        k = split_heads(self.key(source))  # (B, H, T, D_w / H)
        v = split_heads(self.value(source))

        # Every query attends to the whole source, padding included.
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, Q, D_w / H)
        mixed = mixed.transpose(1, 2).reshape(B, Q, D)  # heads side by side
        return self.norm(x + self.dropout(self.out(mixed)))


class QFormerBlock(nn.Module):
    """Queries attend to each other, then to the states, then pass a feed-forward layer."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.self_attn = BertAttention(config)
        self.cross_attn = BertAttention(config)
        self.ffn_in = nn.Linear(config.encoder_width, config.ffn)
        self.ffn_out = nn.Linear(config.ffn, config.encoder_width)
        self.norm = nn.LayerNorm(config.encoder_width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, state: Tensor) -> Tensor:
        """queries (B, Q, D_w), state (B, T, D_w) -> (B, Q, D_w)."""
        queries = self.self_attn(queries, queries)
        queries = self.cross_attn(queries, state)
        fed = self.ffn_out(F.gelu(self.ffn_in(queries)))
        return self.norm(queries + self.dropout(fed))


class AcousticAdapter(nn.Module):
    """K hidden states (B, T, D_w) -> (B, Q, D_l): one Q-Former, own queries for each state."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.taps = config.taps
        D_w = config.encoder_width
        self.queries = nn.ParameterList(
            nn.Parameter(torch.randn(1, config.n_queries, D_w)) for _ in config.taps
        )
        self.layer_weights = nn.Parameter(torch.zeros(config.n_queries, len(config.taps)))
        self.blocks = nn.ModuleList(QFormerBlock(config) for _ in range(config.qformer_layers))
        self.norm = nn.LayerNorm(D_w)
        self.proj = nn.Linear(D_w, config.lm_width)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Embeddings of the voice (B, Q, D_l), from all n_layers + 1 hidden states (B, T, D_w).

        Quirk of the release, which its weights need: the tapped states are not cut to the clip's
        real length. Queries attend to the silence after it as well.
        """
        # The same Q-Former reads each tapped state with queries of its own.
        outputs = []
        for queries, tap in zip(self.queries, self.taps, strict=True):
            x = queries.expand(len(states[tap]), -1, -1)  # (B, Q, D_w)
            for block in self.blocks:
                x = block(x, states[tap])
            outputs.append(x)

        # Each query mixes its K outputs by learned weights.
        weights = self.layer_weights.softmax(dim=-1)  # (Q, K)
        mixed = torch.einsum("kbqd,qk->bqd", torch.stack(outputs), weights)  # (B, Q, D_w)
        return self.proj(self.norm(mixed))
