"""Pseudo-perplexity: how well a masked-diffusion LM predicts each token of a text from all others.

It stands for the perplexity of a causal LM, which such an LM does not have (Salazar et al., arXiv
1910.14659). The exam of an adapted LM and evaluation/likelihood.py measure it.

Shapes: L tokens of a text, R windows of a forward pass, W tokens of a window, D width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lm import DiffusionLM
from sampler import check_finite, split_evenly

LARGEST = 700.0  # nats; exp of more overflows


@torch.no_grad()
def pseudo_perplexity(
    lm: DiffusionLM, ids: Sequence[int] | Tensor, *, window: int = 128, batch: int = 16
) -> float:
    """exp of the mean negative log-probability of each token, given all others of its window.

    It takes a forward pass of `window` tokens for each token. Not comparable with the perplexity of
    a causal LM, which sees the tokens before only. Infinite if it exceeds a float.

    Args:
        ids: (L,) tokens of a text. window: most tokens that the LM sees at once; a longer text is
            cut into windows of nearly equal length. batch: windows in a forward pass.
    Raises:
        ValueError: no token, or logits that are NaN or infinite.
    """
    ids = torch.as_tensor(ids, device=lm.embedding.weight.device)
    if len(ids) == 0:
        raise ValueError("a text without a token has no perplexity")
    window = min(window, lm.config.max_length)

    total = 0.0
    for part in ids.split(split_evenly(len(ids), -(-len(ids) // window))):
        # A row for each token, which alone is masked there.
        for masked in torch.arange(len(part), device=ids.device).split(batch):
            rows = torch.arange(len(masked), device=ids.device)
            noisy = part.repeat(len(masked), 1)  # (R, W)
            noisy[rows, masked] = lm.config.mask_id
            hidden = lm(lm.embed(noisy))[rows, masked]  # (R, D)
            losses = F.cross_entropy(lm.head(hidden).float(), part[masked], reduction="none")
            check_finite(lm, losses)
            total += losses.double().sum().item()
    mean = total / len(ids)
    return math.exp(mean) if mean < LARGEST else math.inf
