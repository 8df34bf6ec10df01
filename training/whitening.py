"""A new acoustic adapter that starts by seeing the encoder's states whitened. Ours: `--whiten`.

Most of a real Whisper's tapped states is the same for every clip: the mean is twice as large as
what varies, and most of what varies is position and loudness, not voice. After the Q-Former's
LayerNorms, a voice is then a few percent of the adapter's input, and training starts slowly.

Whitening moves the mean of the states to zero and gives each of their directions the same variance.
It is linear, so it needs no layer: it is multiplied into the weights of the cross-attention's keys
and values, which then train as usual. Saved adapters keep the paper's shapes.

Shapes: B clips, T encoder frames, D encoder width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters import AcousticAdapter
from training.order import pick
from training.states import Unreadable, encode_clips

# Clips that are measured: about 40,000 frames of the toy's window for each tap.
CLIPS = 256
# Clips encoded together: all states of 16 clips of 30 s are 4 GB at large-v3.
AT_ONCE = 16
# Factor of the values. A clip then adds about a third of the queries' size to them. With 0.1, 1
# or 12 the loss falls later.
LOUD = 4.0
# Times the mean variance, added to each variance: constant directions must not become noise.
RIDGE = 0.01


def mean_and_whitening(states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics of all rows of the states (..., D), summed in float64.

    Returns:
        the mean (D,) and the whitening (C + ridge)^(-1/2), (D, D), where C is the covariance. But
        for the ridge, (x - mean) @ whitening has the identity as its covariance.
    Raises:
        ValueError: there are no states.
    """
    n = 0
    total = 0.0
    products = 0.0
    for state in states:
        rows = state.flatten(0, -2).double()  # (B T, D)
        n += len(rows)
        total = total + rows.sum(dim=0)
        products = products + rows.T @ rows

    # The inverse square root of the covariance, by its directions.
    if n == 0:
        raise ValueError("none of the clips that --whiten measures the encoder's states on is read")

    mean = total / n
    covariance = products / n - torch.outer(mean, mean)  # (D, D)
    variances, directions = torch.linalg.eigh(covariance)  # (D,), (D, D)
    variances = variances.clamp(min=0) + RIDGE * variances.mean()
    whitening = (directions * variances.rsqrt()) @ directions.T
    return mean.float(), whitening.float()


@torch.no_grad()
def see_whitened(acoustic: AcousticAdapter, mean: Tensor, whitening: Tensor) -> None:
    """Let each cross-attention's keys and values, W x + b, be those of the whitened states.

    Keys become W whitening (x - mean) + b, values LOUD times that. The adapter is changed in place;
    mean (D,) and whitening (D, D) are those of mean_and_whitening.
    """
    for block in acoustic.blocks:
        for layer, gain in ((block.cross_attn.key, 1.0), (block.cross_attn.value, LOUD)):
            layer.weight.copy_(gain * layer.weight @ whitening)  # (D, D); whitening is symmetric
            layer.bias.copy_(gain * layer.bias - layer.weight @ mean)


def tapped_states(model, items: list[dict], seed: int) -> Iterable[Tensor]:
    """States (B, T, D) of one tap after the other, of at most CLIPS items drawn by seed.

    Clips that cannot be read are left out. The silence after a clip is not: the adapter sees it.
    """
    # A sample of the clips is enough.
    n = min(CLIPS, len(items))
    paths = [items[i]["audio_filepath"] for i in pick(0, len(items), n, seed)]
    for _, states, _, errors in encode_clips(model, paths, AT_ONCE, Unreadable(limit=n)):
        readable = [i for i, error in enumerate(errors) if not error]
        if readable:
            yield from (states[tap][readable] for tap in model.config.taps)


def whiten(model, items: list[dict], seed: int) -> None:
    """Let a DIFFA's new acoustic adapter start on whitened states.

    Args:
        model: its encoder is measured, its acoustic adapter changed in place.
        items: of the training manifest. seed: the run's; it chooses the clips that are measured.
    Raises:
        ValueError: none of these clips can be read.
    """
    see_whitened(model.acoustic, *mean_and_whitening(tapped_states(model, items, seed)))
