"""A new acoustic adapter that starts by seeing the encoder's states whitened.

A real Whisper's tapped states are mostly the same for every clip: means twice the size of what varies, and of that the
greater part is position and loudness, not voice. Behind the Q-Former's LayerNorms a voice is then a few percent of what
the adapter begins with, and training waits for it. Whitening moves the states' mean to zero and gives each of their
directions the same variance. It is linear, so it needs no layer of its own: the keys and values of the cross-attention
start as themselves after it, and train on from there. What is saved has the paper's shapes and is read as ever.

Ours, not the paper's: `--whiten`.

Shapes: B clips, T encoder frames, D encoder width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters import AcousticAdapter
from training.clips import pick, read_padded

CLIPS = 256  # of the training clips, to measure the states on: some 40,000 frames of the toy's window for each tap
AT_ONCE = 16  # clips through the encoder: all states of 16 clips of 30 s are 4 GB at large-v3
LOUD = 4.0  # times the values: what a clip adds to the queries is then about a third of their size; with 0.1, 1 or 12 the loss falls later
RIDGE = 0.01  # of the mean variance, added to each: directions that hardly vary are not blown up to noise


def mean_and_whitening(states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics of all rows of the states, tensors (..., D): their mean (D,) and the whitening (C + ridge)^(-1/2), (D, D).

    (x - mean) @ whitening has, but for the ridge, the identity as covariance. Sums are made in float64. Raises ValueError: no states.
    """
    n, total, products = 0, 0.0, 0.0
    for state in states:
        rows = state.flatten(0, -2).double()  # (B T, D)
        n, total, products = n + len(rows), total + rows.sum(dim=0), products + rows.T @ rows
    if n == 0:
        raise ValueError("none of the clips to measure the encoder's states on (--whiten) can be read")
    mean = total / n
    variances, directions = torch.linalg.eigh(products / n - torch.outer(mean, mean))  # (D,), (D, D)
    variances = variances.clamp(min=0) + RIDGE * variances.mean()
    return mean.float(), ((directions * variances.rsqrt()) @ directions.T).float()


@torch.no_grad()
def see_whitened(acoustic: AcousticAdapter, mean: Tensor, whitening: Tensor) -> None:
    """Change every cross-attention's layer W x + b of keys into W whitening (x - mean) + b, that of values into LOUD times it.

    mean (D,) and whitening (D, D) are mean_and_whitening's; the adapter is changed in place.
    """
    for block in acoustic.blocks:
        for layer, gain in ((block.cross_attn.key, 1.0), (block.cross_attn.value, LOUD)):
            layer.weight.copy_(gain * layer.weight @ whitening)  # (D, D); whitening is symmetric
            layer.bias.copy_(gain * layer.bias - layer.weight @ mean)


def tapped_states(model, items: list[dict], seed: int) -> Iterable[Tensor]:
    """States (B, T, D), one tap after the other, of CLIPS of the items at most, drawn by seed; clips that cannot be read are left out.

    The whole window, the silence behind a clip too: so the adapter sees it.
    """
    device, n = model.prompts.device, min(CLIPS, len(items))
    chosen = [items[i]["audio_filepath"] for i in pick(0, len(items), n, seed)]
    for start in range(0, n, AT_ONCE):
        waveforms, n_samples, wrong = read_padded(chosen[start : start + AT_ONCE], model.encoder.config.n_samples)
        good = torch.tensor([not why for why in wrong])
        if good.any():
            states, _ = model.encode(waveforms[good].to(device), n_samples[good].to(device))
            yield from (states[tap] for tap in model.config.taps)


def whiten(model, items: list[dict], seed: int) -> None:
    """Let a DIFFA's new acoustic adapter start on the whitened states of its training clips.

    Args:
        model: its encoder is measured, its acoustic adapter changed. items: of a manifest. seed: the run's.
    Raises:
        ValueError: none of the clips that were drawn can be read.
    """
    see_whitened(model.acoustic, *mean_and_whitening(tapped_states(model, items, seed)))
