"""The autoregressive baseline: greedy answers from a cache, its loss in both stages, its LM."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import edit_config
from test_parity import llama_and_ours
from test_stage import alike, manifest, result  # noqa: F401
from torch import nn
from torch.nn import functional as F

import train_asr
import train_instruct
from checkpoints.lm import load_lm
from checkpoints.model import load_diffa
from data import build_prompt, load_manifest
from diffa import Spliced, splice
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss
from lab import baseline
from sampler import SamplerConfig, generate
from toy import pretrain, pretrain_lm
from toy.autoregressive import CausalLM, causal, greedy, next_token_loss
from toy.evaluate import answers_to, mean_calls
from training.run import Run
from training.stage import run_stage
from training.states import StateCache

SHAPES = [{}, {"n_kv_heads": 2, "head_dim": 6, "qk_norm": True, "tied": True, "family": "qwen3"}]


SIZE = {"width": 24, "n_layers": 3, "n_heads": 4, "ffn": 40, "vocab": 40, "max_length": 64}


def random_lm(lm_class=CausalLM, **shapes):
    torch.manual_seed(5)
    lm = lm_class(LMConfig(**SIZE, mask_id=38, end_id=39, **shapes)).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.5)  # far from uniform: every answer another
    return lm


def spliced(*lengths, width=24):
    """Random prompts of these lengths, left-padded with what must not be read."""
    P = max(lengths)
    mask = torch.tensor([[False] * (P - n) + [True] * n for n in lengths], dtype=torch.bool)
    x = torch.randn(len(lengths), P, width, generator=torch.Generator().manual_seed(P))
    x = torch.where(mask[..., None], x, 7.0)
    return Spliced(embeddings=x, mask=mask, is_text=mask)


def without_cache(lm, prompt, length):
    """Greedy decoding of one prompt (P, D) without a cache: each token reads everything again."""
    ids, x = [], prompt[None]
    while len(ids) < length and lm.config.end_id not in ids:
        ids.append(lm.head(lm(x))[0, -1].argmax().item())
        x = torch.cat([x, lm.embedding(torch.tensor([ids[-1:]]))], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("shapes", SHAPES)
def test_greedy_answers_of_unequal_prompts_are_those_of_a_loop_without_a_cache(shapes):
    lm, prompt, length = random_lm(**shapes), spliced(7, 1, 12, 4), 10
    middle = without_cache(lm, prompt.embeddings[2], length)[4]
    lm.config = replace(lm.config, end_id=middle)  # so that items end at different calls
    out = greedy(lm, prompt, SamplerConfig(length=length))
    expected = [
        without_cache(lm, row[real], length) for row, real in zip(prompt.embeddings, prompt.mask)
    ]
    assert len({len(ids) for ids in expected}) > 1
    assert out.ids.tolist() == [ids + [middle] * (length - len(ids)) for ids in expected]
    assert out.calls.tolist() == [len(ids) for ids in expected]
    assert out.text_tokens.tolist() == [len(ids) - (ids[-1] == middle) for ids in expected]


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers():
    theirs, ours = llama_and_ours(causal=True)
    ids, mask = torch.randint(58, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[2, :7] = False

    def llama(length, end):
        options = {
            "do_sample": False,
            "max_new_tokens": length,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        return theirs.generate(ids, attention_mask=mask.long(), **options)[:, 9:]

    end = llama(5, 59)[1, -1].item()  # so that an answer ends in its middle
    ours.config, expected = replace(ours.config, end_id=end), llama(12, end)
    prompt = Spliced(embeddings=ours.embed(ids), mask=mask, is_text=mask)
    out = greedy(ours, prompt, SamplerConfig(length=12)).ids
    assert (
        out[:, : expected.shape[1]].tolist() == expected.tolist()
        and (out[:, expected.shape[1] :] == end).all()
    )


@torch.no_grad()
def test_the_prompt_is_read_once_and_then_one_position_a_call(monkeypatch):
    lm, read = random_lm(), []
    forward = lm.forward
    monkeypatch.setattr(
        lm,
        "forward",
        lambda x, *rest, **named: (read.append(tuple(x.shape[:2])), forward(x, *rest, **named))[1],
    )
    lm.config = replace(lm.config, end_id=-1)  # never
    greedy(lm, spliced(5, 3), SamplerConfig(length=4))
    assert read == [(2, 5), (2, 1), (2, 1), (2, 1)]
    first = greedy(lm, spliced(5, 3), SamplerConfig(length=1)).ids[0].item()
    lm.config, read[:] = replace(lm.config, end_id=first), []
    greedy(lm, spliced(5, 3), SamplerConfig(length=4))
    assert read[:2] == [(2, 5), (1, 1)]  # an item that is done is not read any more


@torch.no_grad()
@pytest.mark.parametrize("shapes", SHAPES)
def test_a_causal_lm_sees_the_same_with_a_cache_as_without(shapes):
    lm, whole = random_lm(**shapes), spliced(11, 6, 9)
    expected, cache = lm(whole.embeddings, whole.mask), lm.new_cache(3, 11)
    for keys, values in cache:
        keys.fill_(float("nan")), values.fill_(float("nan"))  # what is not filled is not looked at
    for start, end in ((0, 4), (4, 5), (5, 11)):
        filled = [(keys[:, :, :end], values[:, :, :end]) for keys, values in cache]
        hidden = lm(
            whole.embeddings[:, start:end], whole.mask[:, :end], filled, torch.arange(start, end)
        )
        real = whole.mask[:, start:end]
        assert torch.allclose(hidden[real], expected[:, start:end][real], atol=1e-5)
    some = torch.tensor([2, 10])
    assert torch.allclose(lm(whole.embeddings[:1], output_rows=some), expected[:1, some], atol=1e-5)


@torch.no_grad()
def test_the_next_token_loss_is_cross_entropy_and_the_parts_of_a_batch_add_up():
    lm, prompt, answers = random_lm(), spliced(7, 3, 5), torch.randint(0, 38, (3, 6))
    losses = []
    for row, real, ids in zip(prompt.embeddings, prompt.mask, answers):
        logits = lm.head(lm(torch.cat([row[real], lm.embed(ids)])[None]))[0]
        losses.append(F.cross_entropy(logits[int(real.sum()) - 1 : -1], ids, reduction="sum"))
    whole = next_token_loss(lm, prompt.embeddings, prompt.mask, answers, answers.numel())
    assert torch.allclose(whole, sum(losses) / 18, atol=1e-5)
    parts = [
        next_token_loss(lm, prompt.embeddings[i], prompt.mask[i], answers[i], answers.numel())
        for i in (slice(0, 1), slice(1, 3))
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-5)
    counted = torch.tensor([True, False, True])[:, None].expand(3, 6)
    left_out = next_token_loss(
        lm, prompt.embeddings, prompt.mask, answers, answers.numel(), counted
    )
    assert torch.allclose(left_out, (losses[0] + losses[2]) / 18, atol=1e-5)


@pytest.fixture
def baseline_dirs(dirs):
    """The tiny directories, the LM a causal one."""
    edit_config(dirs["llm"], causal=True)
    return dirs


def train_baseline(module, dirs, out, path, steps=4, adapters=None, **execution):
    """A stage on a causal LM; returns the trained weights by name and the losses."""
    recipe = module.RECIPES["toy"]
    train = replace(recipe.train, steps=steps, batch=8, lr=1e-4)
    execution = replace(recipe.execution, **execution)
    run_stage(
        causal(module.STAGE),
        replace(recipe, train=train, execution=execution),
        Run(**dirs, adapters=adapters, train=path, out=out, lm_class=CausalLM),
    )
    return result(out)


def test_both_stages_train_on_a_causal_lm_whatever_the_parts(
    baseline_dirs,
    manifest,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.delenv("DIFFA_QUIET", raising=False)
    whole = train_baseline(train_asr, baseline_dirs, tmp_path / "whole", manifest())
    assert "a training clip" in capsys.readouterr().err  # answered greedily
    parts = train_baseline(train_asr, baseline_dirs, tmp_path / "parts", manifest(), accumulate=4)
    alike(parts, whole)
    assert whole[1][-1] < whole[1][0]
    stage2 = tmp_path / "stage2"
    _, losses = train_baseline(
        train_instruct, baseline_dirs, stage2, manifest(), adapters=tmp_path / "whole"
    )
    model = load_diffa(**baseline_dirs, adapters=stage2, lm_class=CausalLM)
    assert len(losses) == 4 and model.stage == "stage2" and isinstance(model.lm, CausalLM)


def test_a_corrupt_clip_costs_a_causal_lm_its_own_loss_and_no_more(
    baseline_dirs,
    manifest,  # noqa: F811
    tmp_path,
):
    # The clip is a part by itself.
    options = {"steps": 1, "cache": "none", "accumulate": 8}
    path = manifest()
    _, whole = train_baseline(train_asr, baseline_dirs, tmp_path / "whole", path, **options)
    (tmp_path / "5.wav").write_bytes(b"RIFF")
    _, less = train_baseline(train_asr, baseline_dirs, tmp_path / "less", path, **options)
    assert 0.5 * whole[0] < less[0] < whole[0]


@torch.no_grad()
def test_evaluation_asks_a_causal_lm_greedily(baseline_dirs, manifest):  # noqa: F811
    model = load_diffa(**baseline_dirs, lm_class=CausalLM).eval()
    items, config = load_manifest(manifest()), SamplerConfig(length=6)
    answers = answers_to(model, StateCache(model, items), items, config)
    one_by_one = []
    for item in items:
        audio, mask = model.hear(*StateCache(model, [item])([item]))
        prompt = splice(model.lm, [build_prompt(model.tokenizer, item["input"])], audio, mask)
        one_by_one.append(greedy(model.lm, prompt, config))
    texts = []
    for out in one_by_one:
        ids = [i for i in out.ids[0].tolist() if i != model.lm.config.end_id]
        texts.append(model.tokenizer.decode(ids).strip())
    assert [answer.text for answer in answers] == texts
    assert mean_calls(answers) == sum(out.calls.item() for out in one_by_one) / len(items)


@pytest.fixture
def few_steps(monkeypatch):
    """Pretraining of 2 + 2 + 1 steps, and a list that gets the answers (B, G) of each."""
    for name, steps in (("NEXT_TOKEN", 2), ("DIFFUSION", 2), ("MORE", 1)):
        few = replace(getattr(pretrain_lm, name), steps=steps, batch=3)
        monkeypatch.setattr(pretrain_lm, name, few)
    monkeypatch.setattr(pretrain_lm, "ROUNDS", 1)
    monkeypatch.setattr(pretrain_lm, "N_CHECK", 2)
    # Five steps teach nothing.
    monkeypatch.setattr(pretrain, "GATE", {"copy_error": float("inf"), "oracle": 0.0})
    seen, real = [], pretrain_lm.encode_answers

    def encode(*arguments):
        seen.append(real(*arguments).tolist())
        return real(*arguments)

    monkeypatch.setattr(pretrain_lm, "encode_answers", encode)
    return seen


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(
        sys, "argv", [f"{module.__name__}.py", "--device", "cpu", *map(str, arguments)]
    )
    module.main()


@pytest.mark.long
def test_the_baseline_has_the_same_start_text_and_steps(tmp_path, few_steps, monkeypatch):
    command(monkeypatch, pretrain, "lm", "--out", tmp_path, "--seed", 3)
    lm = json.loads((tmp_path / "lm.json").read_text())
    text, few_steps[:] = list(few_steps), []
    command(monkeypatch, baseline, "--run", tmp_path, "--seed", 3)
    made = json.loads((tmp_path / "baseline.json").read_text())
    assert few_steps == text and len(text) == 5
    assert made["steps"] == lm["steps"] == 5
    # Both begin with next tokens, of clean words, from the same weights.
    assert made["losses"][0] == lm["losses"][0]
    assert made.keys() == lm.keys() and made["oracle"].keys() == lm["oracle"].keys()
    config = load_lm(tmp_path / "baseline", lm_class=CausalLM).config
    assert config == load_lm(tmp_path / "llada").config
    tokenizers = [tmp_path / name / "tokenizer.model" for name in ("baseline", "llada")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    # Resumed from its last checkpoint, nothing is left to train.
    few_steps.clear()
    command(monkeypatch, baseline, "--run", tmp_path, "--seed", 3)
    again = json.loads((tmp_path / "baseline.json").read_text())
    assert few_steps == [] and again["losses"] == made["losses"]


def test_what_belongs_to_the_other_kind_of_lm_is_refused():
    causal, other, prompt = random_lm(), random_lm(DiffusionLM), spliced(5, 3)
    ids, masks = torch.randint(0, 38, (2, 4)), torch.full((2, 4), 38)
    with pytest.raises(ValueError, match="autoregressive.greedy answers"):
        generate(causal, prompt, SamplerConfig(length=4))
    with pytest.raises(ValueError, match="sampler.generate answers"):
        greedy(other, prompt, SamplerConfig(length=4))
    with pytest.raises(ValueError, match="its loss is next_token_loss"):
        diffusion_loss(causal, prompt.embeddings, prompt.mask, ids, masks, torch.ones(2), 8)
    with pytest.raises(ValueError, match="its loss is diffusion_loss"):
        next_token_loss(other, prompt.embeddings, prompt.mask, ids, 8)


@torch.no_grad()
def test_a_predicted_mask_is_a_token_like_any_other():
    lm = random_lm()
    lm.embedding.weight[:, 0] = 0
    lm.unembedding.weight.zero_()
    lm.unembedding.weight[38] = 1.0
    nn.init.ones_(lm.norm.weight)
    out = greedy(lm, spliced(5, 3), SamplerConfig(length=4))
    assert out.ids.shape == (2, 4) and (out.calls >= 1).all()


@torch.no_grad()
def test_each_step_shows_the_tokens_so_far_and_their_confidence():
    lm, shown = random_lm(), []
    lm.config = replace(lm.config, end_id=-1)  # never
    out = greedy(
        lm,
        spliced(5, 3),
        SamplerConfig(length=3),
        lambda ids, confidence: shown.append((ids.clone(), confidence.clone())),
    )
    for n, (ids, confidence) in enumerate(shown, 1):
        assert torch.equal(ids[:, :n], out.ids[:, :n])
        assert (confidence[:, :n] > 0).all() and (confidence[:, n:] == 0).all()
    assert len(shown) == 3


def test_prompts_that_cannot_be_answered_are_refused():
    lm = random_lm()
    with pytest.raises(ValueError, match="exceed the LM's context of 64"):
        greedy(lm, spliced(60, 5), SamplerConfig(length=5))
    config = SamplerConfig(length=4)
    assert greedy(lm, spliced(60, 5), config).ids.shape == (2, 4)
    for empty in (spliced(5, 0), spliced(0)):
        with pytest.raises(ValueError, match="is it empty, or padded on the right"):
            greedy(lm, empty, config)


def test_a_run_without_its_diffusion_lm_is_told_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="lm.json: no such file.*Run python -m toy.pretrain lm"):
        command(monkeypatch, baseline, "--run", tmp_path)
    (tmp_path / "lm.json").write_text('{"steps": 7, "asked": []}')
    with pytest.raises(SystemExit, match="its LM took 7 steps, but the phases of .* end after"):
        command(monkeypatch, baseline, "--run", tmp_path)
