"""Text that imitates audio embeddings: an LM reads it before any adapter exists.

Token embeddings stand where the audio embeddings will go. They are blurred as an adapter in
training would blur them, and the LM learns to answer all the same. Afterwards an adapter only has
to learn audio embeddings that resemble those of the words.

Shapes: B batch, P prompt positions, D LM width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data import Prompt, left_pad
from diffusion_lm import DiffusionLM

# How many other words are mixed into a word's embedding. With three, and less than 0.75 of the
# embedding from all of them, the word's own fraction stays the largest unless two coincide.
N_OTHERS = 3


@dataclass(frozen=True, kw_only=True)
class ImitationItem:
    """A question about a clip, with text in the place of the clip's audio."""

    prompt: Prompt
    audio_ids: list[int]  # tokens whose embeddings stand where the audio embeddings will go
    answer: str


def pad_items(items: list[ImitationItem], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with the text that imitates audio, padded on the left.

    Returns:
        token ids, the mask of real positions, and true where a token imitates audio: (B, P) each.
    """
    rows = []
    flags = []
    for item in items:
        parts = (item.prompt.before, item.audio_ids, item.prompt.after)
        rows.append(torch.tensor(sum(parts, []), device=device))  # (P_item,)
        lengths = torch.tensor([len(part) for part in parts])
        is_audio = torch.tensor([False, True, False]).repeat_interleave(lengths)
        flags.append(is_audio.to(device))

    ids, mask = left_pad(rows)
    is_audio, _ = left_pad(flags)
    return ids, mask, is_audio


def blurred_embeddings(
    lm: DiffusionLM,
    ids: Tensor,
    is_audio: Tensor,
    gap_id: int,
    most: float,
    generator: torch.Generator,
    jitter: float = 0.0,
) -> Tensor:
    """Prompt embeddings (B, P, D) as an adapter in training would produce them.

    An adapter first predicts a mean of the words that it cannot yet tell apart. An LM that has only
    seen clean words answers such means at random. One that has seen mixtures becomes more confident
    of the correct word the more of it there is, which gives stage 1 a slope to follow. At silences
    and stage 1's prompts nobody knows beforehand what an adapter will produce. Noise of the
    embeddings' size stands there, and the LM learns to ignore it.

    Args:
        ids, is_audio: (B, P), see `pad_items`. gap_id: of the silences.
        most: largest fraction of a word's embedding that comes from other words.
        generator: on the CPU, or on the device of the ids, where it is faster.
        jitter: largest size of noise that is added to the words, relative to the embeddings.
    """
    where = {"generator": generator, "device": generator.device}
    is_word = is_audio & (ids != gap_id)  # (B, P)

    # 1. One fraction of other words for each item, zero outside the words.
    fraction = torch.rand(len(ids), 1, **where).to(ids.device)  # (B, 1)
    fraction = (most * fraction * is_word)[..., None]  # (B, P, 1)
    blurred = (1 - fraction) * lm.embed(ids)  # (B, P, D)

    # 2. A permutation of the batch's words says which other word each one is mixed with.
    used = ids[is_word].unique()
    for _ in range(N_OTHERS):
        other = torch.arange(lm.config.vocab, device=ids.device)  # (V,)
        other[used] = used[torch.randperm(len(used), **where).to(ids.device)]
        blurred = blurred + fraction / N_OTHERS * lm.embed(other[ids])

    # 3. Noise at the silences, and some of it on the words.
    rms = lm.embedding.weight.detach().pow(2).mean().sqrt()
    noise = torch.randn(blurred.shape, **where).to(ids.device) * rms
    if jitter:
        size = jitter * torch.rand(len(ids), 1, **where).to(ids.device)  # (B, 1)
        blurred = blurred + (size * is_word)[..., None] * noise
    return torch.where((is_audio & ~is_word)[..., None], noise, blurred)
