"""Waveform -> log-mel spectrogram -> the hidden states of a Whisper encoder.

Whisper (Radford et al. 2022, arXiv 2212.04356, section 2.2) turns 16 kHz mono audio into 100 mel
frames a second. A strided convolution halves them; pre-LayerNorm transformer blocks follow. DIFFA
keeps this encoder frozen, and its adapters (adapters.py) read several hidden states of it. The last
one serves for the words, earlier ones for how the voice sounds.

Shapes: B batch, S samples, F mel frames (100 a second), T encoder frames (50 a second), M mel bins,
D width, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples of a window: 25 ms
HOP = 160  # samples between mel frames: 10 ms
CONV_STRIDE = 2  # of the second convolution: mel frames in an encoder frame
FRAMES_PER_SECOND = SAMPLE_RATE // (HOP * CONV_STRIDE)  # 50 encoder frames


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shapes of a Whisper encoder, by default Whisper small's. ValueError: heads do not fit."""

    n_mels: int = 80
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    ffn: int = 3072
    context: int = 1500  # encoder frames in the window; 1,500 are 30 s

    def __post_init__(self):
        if self.width % self.n_heads or self.width % 2:
            raise ValueError(f"width {self.width} does not divide into {self.n_heads} heads")

    @property
    def n_samples(self) -> int:
        """Samples that fill the context."""
        return self.context * CONV_STRIDE * HOP


def mel_filters(n_mels: int) -> Tensor:
    """Triangles of area 1 that are equally wide on Slaney's mel scale: (N_FFT // 2 + 1, M).

    Made in float64, as for the published weights; float32 would change the spectrogram by 2e-5.
    """
    # The scale is linear up to 15 mel (1 kHz), then logarithmic.
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000, 6.4)
    mel = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hertz = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # (M + 2,)

    # Each filter rises from its left neighbour's centre and falls to its right neighbour's.
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])  # (N_FFT // 2 + 1, M)
    falling = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0) * 2 / (hertz[2:] - hertz[:-2])
    return filters.float()


def log_mel(waveform: Tensor, n_mels: int = 80) -> Tensor:
    """Log-mel spectrogram (..., M, F) as Whisper was trained on it (section 2.2), F = S // 160.

    waveform: (..., S) float samples in [-1, 1] at 16 kHz, padded to the encoder's context.
    """
    # Power spectrum of 25 ms windows, every 10 ms. Whisper drops the last frame.
    flat = waveform.reshape(-1, waveform.shape[-1])  # (B, S)
    window = torch.hann_window(N_FFT, device=waveform.device)
    spectrum = torch.stft(flat, N_FFT, HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2  # (B, N_FFT // 2 + 1, F)

    # Mel bins on Slaney's scale.
    mel = mel_filters(n_mels).to(waveform.device).T @ power  # (B, M, F)

    # Log10 of the power, floored 8 (80 dB) below the loudest bin of each clip, then scaled to about
    # [-1, 1] as in Whisper.
    log = mel.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.amax(dim=(-2, -1), keepdim=True) - 8.0)
    return ((log + 4.0) / 4.0).reshape(*waveform.shape[:-1], n_mels, -1)


def encoder_frames(n_samples: Tensor | int) -> Tensor | int:
    """Encoder frames that hold real audio, for clips of n_samples (int or integer tensor)."""
    mel_frames = -(-n_samples // HOP)  # rounded up: a partial frame counts
    return (mel_frames - 1) // CONV_STRIDE + 1


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed positions (length, width) on the CPU: sines, then cosines."""
    scale = math.log(10_000) / (width // 2 - 1)
    frequencies = torch.exp(-scale * torch.arange(width // 2, device="cpu"))
    angles = torch.arange(length, device="cpu")[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EncoderAttention(nn.Module):
    """Multi-head self-attention over all frames; the key projection has no bias, as in Whisper."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        B, T, D = x.shape

        def split_heads(y: Tensor) -> Tensor:
            return y.view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)  # (B, H, T, D / H)

        q = split_heads(self.query(x))
        k = split_heads(self.key(x))
        v = split_heads(self.value(x))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width)
        self.attn = EncoderAttention(config.width, config.n_heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.ffn)
        self.mlp_out = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class WhisperEncoder(nn.Module):
    """The encoder half of Whisper, of any size."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=CONV_STRIDE, padding=1)
        self.positions = nn.Parameter(sinusoids(config.context, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, mel: Tensor) -> list[Tensor]:
        """All hidden states of a batch of log-mels (B, M, F); ValueError unless F = 2 * context.

        Returns n_layers + 1 tensors (B, T, D): what enters the first block, then what leaves each
        block. The last one has also passed the final LayerNorm. DIFFA's tapped layers are indices
        into this list.
        """
        n_frames = CONV_STRIDE * self.config.context
        if mel.shape[-1] != n_frames:
            raise ValueError(
                f"the encoder's context is {n_frames} mel frames, got {mel.shape[-1]}: "
                "pad or cut the waveform to config.n_samples before log_mel"
            )

        # Two convolutions; the second one halves the frame rate.
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))  # (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, D)

        # Every hidden state is kept: n_layers + 1 times (B, T, D).
        states = [x + self.positions]
        for block in self.blocks:
            states.append(block(states[-1]))
        states[-1] = self.norm(states[-1])
        return states
