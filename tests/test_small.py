"""A small LM on a CPU is called with fewer operations: same answers, and only where it is plain."""

from dataclasses import replace

import pytest
import torch

from diffa import Spliced
from diffusion_lm import DiffusionLM, LMConfig
from sampler import SamplerConfig, generate, refine
from speed import canvas, small
from speed.joined import join

CONFIG = LMConfig(
    width=16, n_layers=3, n_heads=4, ffn=24, vocab=40, max_length=96, mask_id=39, end_id=19
)


def random_lm(**changes) -> DiffusionLM:
    torch.manual_seed(0)
    lm = DiffusionLM(replace(CONFIG, **changes)).requires_grad_(False)
    for parameter in lm.parameters():
        parameter.mul_(3)
    return lm


@pytest.mark.parametrize("groups", [{}, {"n_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("lengths", [[9], [9, 4, 7]], ids=str)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_answers_and_confidence_are_those_of_the_plain_forward(monkeypatch, groups, lengths, cache):
    lm = random_lm(**groups)
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    prompt = Spliced(embeddings=torch.randn(len(lengths), 9, 16), mask=mask, is_text=mask)
    config = SamplerConfig(
        length=12, block_length=5, rule="threshold", threshold=0.9, cache=cache, cfg_scale=0.5
    )

    def traced(step_of):
        monkeypatch.setattr(canvas, "small_step", step_of)
        kept = []
        out = generate(lm, prompt, config, lambda ids, confidence: kept.append(confidence.clone()))
        return out, kept

    plain, plain_kept = traced(lambda lm: refine)
    monkeypatch.undo()
    calls, forward = [], small.SmallLM.__call__
    monkeypatch.setattr(
        small.SmallLM, "__call__", lambda *given: (calls.append(None), forward(*given))[1]
    )
    fast, fast_kept = traced(small.small_step)
    assert torch.equal(fast.ids, plain.ids) and torch.equal(fast.calls, plain.calls)
    assert len(calls) == len(plain_kept) > 3
    assert torch.allclose(torch.stack(fast_kept), torch.stack(plain_kept), atol=1e-5)


def test_the_weights_stay_one_copy_and_new_numbers_are_used():
    lm = random_lm()
    names = list(lm.state_dict())
    for scale in (1, 2):
        lm.load_state_dict({name: scale * weight for name, weight in lm.state_dict().items()})
        weights = small.weights_of(lm.blocks[0])
        attn = lm.blocks[0].attn
        assert torch.equal(
            weights.qkv.t(), torch.cat([attn.query.weight, attn.key.weight, attn.value.weight])
        )
        assert weights.qkv.data_ptr() == attn.query.weight.data_ptr()
    assert list(lm.state_dict()) == names
    join(lm)  # for compiled steps too
    assert small.weights_of(lm.blocks[0]).qkv.data_ptr() == weights.qkv.data_ptr()


def test_after_an_answer_in_inference_mode_gradients_flow_as_before():
    lm = random_lm()
    x = torch.randn(1, 5, 16, requires_grad=True)
    before = torch.autograd.grad(lm(x).sum(), x)[0]
    with torch.inference_mode():
        assert small.small_step(lm) is not refine
    assert torch.equal(torch.autograd.grad(lm(x).sum(), x)[0], before)
    with torch.inference_mode():
        assert small.small_step(random_lm()) is refine  # its weights are of inference mode


def test_an_lm_that_computes_anything_else_runs_its_own_forward():
    class Other(DiffusionLM):
        pass

    hooked = random_lm()
    hooked.blocks[1].mlp.up.register_forward_hook(lambda *given: None)
    recorded = random_lm()
    recorded.register_forward_pre_hook(lambda *given: None)
    patched = random_lm()
    patched.blocks[0].forward = patched.blocks[0].forward
    others = [
        random_lm(qk_norm=True),
        random_lm(qkv_bias=True),
        random_lm(shifted=True),
        random_lm(width=1024, ffn=1024),
        random_lm().double(),
        random_lm().requires_grad_(True),
        Other(CONFIG).requires_grad_(False),
        hooked,
        recorded,
        patched,
    ]
    assert all(small.small_step(lm) is refine for lm in others)
    assert small.small_step(random_lm()) is not refine
