"""The autoregressive twin: greedy answers from a cache, the next-token loss in the stages, and how the twin is made."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toy import autoregressive
from toy import pretrain
import train_asr
import train_instruct
from checkpoints import weights
from toy.autoregressive import greedy
from training.clips import StateCache
from conftest import edit_config
from data import load_manifest
from diffa import DIFFA, Spliced
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss, next_token_loss
from toy.evaluate import answer
from sampler import SamplerConfig, generate
from test_parity import llama_and_ours
from test_stage import FEW, alike, manifest, train  # noqa: F401  (manifest is a fixture)
from checkpoints.tokenizer import build_prompt
from training.loop import read_metrics

SHAPES = [{}, {"n_kv_heads": 2, "head_dim": 6, "qk_norm": True, "tied": True, "family": "qwen3"}]


def random_lm(causal=True, **shapes):
    torch.manual_seed(5)
    lm = DiffusionLM(LMConfig(24, 3, 4, 40, vocab=40, max_length=64, mask_id=38, end_id=39, causal=causal, **shapes)).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.5)  # far from uniform: every answer another
    return lm


def spliced(*lengths, width=24):
    """Random prompts of these lengths, left-padded with what must not be read."""
    P = max(lengths)
    mask = torch.tensor([[False] * (P - n) + [True] * n for n in lengths], dtype=torch.bool)
    x = torch.randn(len(lengths), P, width, generator=torch.Generator().manual_seed(P))
    return Spliced(torch.where(mask[..., None], x, 7.0), mask, mask)


def without_cache(lm, prompt, length):
    """Greedy decoding of one prompt (P, D) as it is said in a sentence: all is read anew for each token."""
    ids, x = [], prompt[None]
    while len(ids) < length and lm.config.end_id not in ids:
        ids.append(lm.head(lm(x))[0, -1].argmax().item())
        x = torch.cat([x, lm.embed(torch.tensor([ids[-1:]]))], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("shapes", SHAPES)
def test_greedy_answers_of_unequal_prompts_are_those_of_a_loop_without_a_cache(shapes):
    lm, prompt, length = random_lm(**shapes), spliced(7, 1, 12, 4), 10
    middle = without_cache(lm, prompt.embeddings[2], length)[4]
    lm.config = replace(lm.config, end_id=middle)  # so that items end at different calls
    out = greedy(lm, prompt, length)
    expected = [without_cache(lm, row[real], length) for row, real in zip(prompt.embeddings, prompt.mask)]
    assert len({len(ids) for ids in expected}) > 1
    assert out.ids.tolist() == [ids + [middle] * (length - len(ids)) for ids in expected]
    assert out.steps.tolist() == [len(ids) for ids in expected]
    assert out.text_tokens.tolist() == [len(ids) - (ids[-1] == middle) for ids in expected]


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers():
    theirs, ours = llama_and_ours(causal=True)
    ids, mask = torch.randint(58, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[2, :7] = False

    def llama(length, end):
        options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": end, "pad_token_id": end}
        return theirs.generate(ids, attention_mask=mask.long(), **options)[:, 9:]

    end = llama(5, 59)[1, -1].item()  # so that an answer ends in its middle
    ours.config, expected = replace(ours.config, end_id=end), llama(12, end)
    out = greedy(ours, Spliced(ours.embed(ids), mask, mask), 12).ids
    assert out[:, : expected.shape[1]].tolist() == expected.tolist() and (out[:, expected.shape[1] :] == end).all()


@torch.no_grad()
def test_the_prompt_is_read_once_and_then_one_position_a_call(monkeypatch):
    lm, read = random_lm(), []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda x, *rest, **named: (read.append(tuple(x.shape[:2])), forward(x, *rest, **named))[1])
    lm.config = replace(lm.config, end_id=-1)  # never
    greedy(lm, spliced(5, 3), 4)
    assert read == [(2, 5), (2, 1), (2, 1), (2, 1)]
    first = greedy(lm, spliced(5, 3), 1).ids[0].item()
    lm.config, read[:] = replace(lm.config, end_id=first), []
    greedy(lm, spliced(5, 3), 4)
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
        hidden = lm(whole.embeddings[:, start:end], whole.mask[:, :end], filled, torch.arange(start, end))
        real = whole.mask[:, start:end]
        assert torch.allclose(hidden[real], expected[:, start:end][real], atol=1e-5)
    some = torch.tensor([2, 10])
    assert torch.allclose(lm(whole.embeddings[:1], wanted=some), expected[:1, some], atol=1e-5)


@torch.no_grad()
def test_the_next_token_loss_is_cross_entropy_and_the_parts_of_a_batch_add_up():
    lm, prompt, answers = random_lm(), spliced(7, 3, 5), torch.randint(0, 38, (3, 6))
    losses = []
    for row, real, ids in zip(prompt.embeddings, prompt.mask, answers):
        logits = lm.head(lm(torch.cat([row[real], lm.embed(ids)])[None]))[0]
        losses.append(F.cross_entropy(logits[int(real.sum()) - 1 : -1], ids, reduction="sum"))
    whole = next_token_loss(lm, prompt.embeddings, prompt.mask, answers, answers.numel())
    assert torch.allclose(whole, sum(losses) / 18, atol=1e-5)
    parts = [next_token_loss(lm, prompt.embeddings[i], prompt.mask[i], answers[i], answers.numel()) for i in (slice(0, 1), slice(1, 3))]
    assert torch.allclose(sum(parts), whole, atol=1e-5)
    counted = torch.tensor([True, False, True])[:, None].expand(3, 6)
    left_out = next_token_loss(lm, prompt.embeddings, prompt.mask, answers, answers.numel(), counted)
    assert torch.allclose(left_out, (losses[0] + losses[2]) / 18, atol=1e-5)


@pytest.fixture
def twin_dirs(dirs):
    """The tiny directories, the LM a causal one."""
    edit_config(dirs["llm"], causal=True)
    return dirs


def test_both_stages_train_on_a_causal_lm_whatever_the_parts(twin_dirs, manifest, tmp_path):  # noqa: F811
    held_out = ["--validation", manifest("held_out.json"), "--validate-every", 2]
    whole = train(train_asr, twin_dirs, tmp_path / "whole", manifest(), *FEW, *held_out)
    alike(train(train_asr, twin_dirs, tmp_path / "parts", manifest(), *FEW, "--accumulate", 4), whole)
    last = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["validation"]
    assert last.keys() == {"loss", "meant", "said"}
    # Every item is in every batch: the first step's loss is the validation's, before anything was learned.
    train(train_asr, twin_dirs, tmp_path / "unmoved", manifest(), "--steps", 1, "--batch", 8, "--lr", 0.0, *held_out)
    before = read_metrics(tmp_path / "unmoved" / "metrics.jsonl")[-1]["validation"]["loss"]
    assert whole[1][0] == pytest.approx(before, rel=1e-5) and whole[1][-1] < whole[1][0]
    _, losses = train(train_instruct, twin_dirs, tmp_path / "stage2", manifest(), *FEW, "--adapters", tmp_path / "whole")
    model = DIFFA.from_pretrained(**twin_dirs, adapters=tmp_path / "stage2")
    assert len(losses) == 4 and model.stage == "stage2" and model.lm.config.causal


def test_a_corrupt_clip_costs_a_causal_lm_its_own_loss_and_no_more(twin_dirs, manifest, tmp_path):  # noqa: F811
    options = ["--steps", 1, "--batch", 8, "--cache-encoder", "none", "--accumulate", 8]  # the clip is a part by itself
    path = manifest()
    _, whole = train(train_asr, twin_dirs, tmp_path / "whole", path, *options)
    (tmp_path / "5.wav").write_bytes(b"RIFF")
    _, less = train(train_asr, twin_dirs, tmp_path / "less", path, *options)
    assert 0.5 * whole[0] < less[0] < whole[0]


def test_evaluation_asks_a_causal_lm_greedily(twin_dirs, manifest):  # noqa: F811
    model, items = DIFFA.from_pretrained(**twin_dirs).eval(), load_manifest(manifest())
    said, calls = answer(model, StateCache(model, items), items, SamplerConfig(6, 6, 6))
    one_by_one = []
    for item in items:
        prompt = model.splice([build_prompt(model.tokenizer, item["input"])], *model.hear(*StateCache(model, [item])([item])))
        one_by_one.append(greedy(model.lm, prompt, 6))
    assert said == [model.tokenizer.decode([i for i in out.ids[0].tolist() if i != model.lm.config.end_id]).strip() for out in one_by_one]
    assert calls == sum(out.steps.item() for out in one_by_one) / len(items)


@pytest.fixture
def few_steps(monkeypatch):
    """Pretraining of 2 + 2 + 1 steps, and a list that gets the answers (B, G) of each."""
    for name, steps in (("NEXT_TOKEN", 2), ("DIFFUSION", 2), ("MORE", 1)):
        monkeypatch.setattr(pretrain, name, replace(getattr(pretrain, name), steps=steps, batch=3))
    monkeypatch.setattr(pretrain, "ROUNDS", 1)
    monkeypatch.setattr(pretrain, "N_CHECK", 2)
    monkeypatch.setattr(pretrain, "GATE", {"copy_error": float("inf"), "oracle": 0.0})  # five steps teach nothing
    seen, real = [], pretrain.encode_answers
    monkeypatch.setattr(pretrain, "encode_answers", lambda *a: (seen.append(real(*a).tolist()), real(*a))[1])
    return seen


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--device", "cpu", *map(str, arguments)])
    module.main()


def test_the_twin_is_made_of_the_same_start_text_and_steps(tmp_path, few_steps, monkeypatch):
    command(monkeypatch, pretrain, "lm", "--out", tmp_path, "--seed", 3)
    lm = json.loads((tmp_path / "lm.json").read_text())
    text, few_steps[:] = list(few_steps), []
    command(monkeypatch, autoregressive, "--run", tmp_path, "--seed", 3)
    twin = json.loads((tmp_path / "twin.json").read_text())
    assert few_steps == text and len(text) == 5
    assert twin["steps"] == lm["steps"] == 5
    assert twin["losses"][0] == lm["losses"][0]  # both begin with next tokens, of clean words, from the same weights
    assert twin.keys() == lm.keys() and twin["oracle"].keys() == lm["oracle"].keys()
    config = weights.load_lm(tmp_path / "twin").config
    assert config == replace(weights.load_lm(tmp_path / "llada").config, causal=True)
    assert (tmp_path / "twin/tokenizer.model").read_bytes() == (tmp_path / "llada/tokenizer.model").read_bytes()
    few_steps.clear()
    command(monkeypatch, autoregressive, "--run", tmp_path, "--seed", 3)  # goes on from its last checkpoint: nothing is left to train
    assert few_steps == [] and json.loads((tmp_path / "twin.json").read_text())["losses"] == twin["losses"]


def test_what_belongs_to_the_other_kind_of_lm_is_refused():
    causal, other, prompt = random_lm(), random_lm(causal=False), spliced(5, 3)
    ids = torch.randint(0, 38, (2, 4))
    with pytest.raises(ValueError, match="autoregressive.greedy answers"):
        generate(causal, prompt, SamplerConfig(4, 4, 4))
    with pytest.raises(ValueError, match="sampler.generate answers"):
        greedy(other, prompt, 4)
    with pytest.raises(ValueError, match="its loss is next_token_loss"):
        diffusion_loss(causal, prompt.embeddings, prompt.mask, ids, ids, torch.ones(2), 8)
    with pytest.raises(ValueError, match="has diffusion_loss"):
        next_token_loss(other, prompt.embeddings, prompt.mask, ids, 8)


def test_prompts_that_cannot_be_answered_are_refused():
    lm = random_lm()
    with pytest.raises(ValueError, match="exceed the LM's context of 64"):
        greedy(lm, spliced(60, 5), 5)
    assert greedy(lm, spliced(60, 5), 4).ids.shape == (2, 4)
    for empty in (spliced(5, 0), spliced(0)):
        with pytest.raises(ValueError, match="is it empty, or padded on the right"):
            greedy(lm, empty, 4)


def test_a_run_without_its_diffusion_lm_is_told_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="lm.json: no such file.*Run python -m toy.pretrain lm"):
        command(monkeypatch, autoregressive, "--run", tmp_path)
    (tmp_path / "lm.json").write_text('{"steps": 7, "asked": []}')
    with pytest.raises(SystemExit, match="its LM took 7 steps, but phases of pretrain.py end after"):
        command(monkeypatch, autoregressive, "--run", tmp_path)
