"""diffa.splice: the audio between the halves of each prompt, a few operations for a whole batch."""

import torch

from data import Prompt
from diffa import splice
from diffusion_lm import DiffusionLM, LMConfig

D = 8
LM = LMConfig(width=D, n_layers=1, n_heads=2, ffn=16, vocab=40, mask_id=38, end_id=39)


def batch(B, A=6):
    """An LM, B prompts of different lengths, and their audio with gaps in its mask."""
    torch.manual_seed(B)
    prompts = [Prompt([1, 2, 3][: i % 4], list(range(4, 5 + i % 5))) for i in range(B)]
    mask = torch.rand(B, A) < 0.6
    mask[0] = False  # a clip of which nothing is heard
    return DiffusionLM(LM), prompts, torch.randn(B, A, D, requires_grad=True), mask


def test_each_item_is_its_text_around_its_audio():
    lm, prompts, audio, mask = batch(5)
    spliced = splice(lm, prompts, audio, mask)
    for i, prompt in enumerate(prompts):
        before, after = (
            lm.embed(torch.tensor(ids).long()) for ids in (prompt.before, prompt.after)
        )
        expected = torch.cat([before, audio[i][mask[i]], after])  # (P_i, D)
        kinds = [True] * len(before) + [False] * int(mask[i].sum()) + [True] * len(after)

        # On the left, padding is zero, and is neither real nor text.
        n = spliced.mask.shape[1] - len(expected)
        assert torch.equal(spliced.embeddings[i, n:], expected)
        assert not spliced.embeddings[i, :n].any()
        assert spliced.mask[i].tolist() == [False] * n + [True] * len(expected)
        assert spliced.is_text[i].tolist() == [False] * n + kinds


def test_the_gradient_reaches_the_real_audio_and_nothing_else():
    _, _, audio, mask = inputs = batch(5)
    weights = torch.randn(D)
    (splice(*inputs).embeddings @ weights).sum().backward()
    assert torch.equal(audio.grad, mask[..., None] * weights.expand_as(audio))


def test_prompts_of_text_alone_have_no_audio():
    lm, prompts, _, _ = batch(3)
    spliced = splice(lm, prompts, None, None)
    assert torch.equal(spliced.mask, spliced.is_text)
    assert spliced.mask.sum(dim=1).tolist() == [len(p.before) + len(p.after) for p in prompts]


def test_the_backward_pass_has_as_many_operations_for_many_clips_as_for_few():
    """One copy for each item would cost time with the square of their number."""

    def nodes(B):
        waiting = [splice(*batch(B)).embeddings.grad_fn]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [parent for parent, _ in node.next_functions]
        return len(seen)

    assert nodes(2) == nodes(20)
