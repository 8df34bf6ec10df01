"""Likelihoods of a tiny LM, against sums over every possible mask."""

import itertools
import math
import sys

import pytest
import torch

from checkpoints.lm import load_lm
from checkpoints.tokenizer import load_tokenizer
from data import Prompt
from diffa import splice
from evaluation import likelihood
from evaluation.likelihood import (
    confidence_scores,
    log_likelihood,
    log_probabilities,
    pseudo_perplexity,
)

BEFORE = [40, 41]
AFTER = [42, 43, 44]


@pytest.fixture
def lm(toy_dirs):
    return load_lm(toy_dirs["llm"]).eval()


@pytest.fixture
def prompt(lm):
    """A prompt with three embeddings of audio."""
    audio = torch.randn(1, 3, lm.config.width, generator=torch.Generator().manual_seed(0))
    return splice(lm, [Prompt(BEFORE, AFTER)], audio, torch.ones(1, 3, dtype=torch.bool))


def log_p(lm, embeddings, noisy, place, token):
    """log p of one token after embeddings (P, D), by a whole pass."""
    x = torch.cat([embeddings, lm.embed(torch.tensor(noisy))])[None]
    return torch.log_softmax(lm.head(lm(x))[0, len(embeddings) + place], dim=-1)[token].item()


@torch.no_grad()
def test_log_probabilities_next_to_zero_keep_their_digits(lm, prompt):
    lm.unembedding.weight.mul_(15)
    noisy = torch.full((1, 6), lm.config.mask_id)
    x = torch.cat([prompt.embeddings, lm.embed(noisy)], dim=1)
    logits = lm.head(lm(x))[:, -6:].double()  # (1, 6, V)
    expected, ids = logits.log_softmax(dim=-1).max(dim=-1)
    assert (expected > -1e-7).any() and (expected < -1e-20).all()
    found = log_probabilities(lm, prompt, noisy, ids)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=0)


@torch.no_grad()
def enumerated(lm, prompt, answer, scale=0.0):
    """Equation 6 over all masks instead of a sample; guided logits where the scale is not 0."""
    G = len(answer)
    blank = prompt.embeddings[0].clone()
    blank[prompt.is_text[0]] = lm.embed(torch.tensor(lm.config.mask_id))
    total = 0.0
    for n in range(1, G + 1):
        subsets = list(itertools.combinations(range(G), n))
        for masked in subsets:
            noisy = [lm.config.mask_id if i in masked else token for i, token in enumerate(answer)]
            answers = lm.embed(torch.tensor(noisy))
            logits = [
                lm.head(lm(torch.cat([x, answers])[None]))[0, -G:]
                for x in (prompt.embeddings[0], blank)
            ]
            guided = logits[1] + (scale + 1) * (logits[0] - logits[1])
            found = torch.log_softmax(guided, dim=-1)
            terms = [found[i, answer[i]].item() for i in masked]
            total += G / n * sum(terms) / len(subsets) / G
    return total


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_equation_6_agrees_with_the_sum_over_all_masks(lm, prompt, scale):
    answer = [50, 61, 72]
    expected = enumerated(lm, prompt, answer, scale)
    generator = torch.Generator().manual_seed(0)
    options = {"samples": 300, "batch": 30, "cfg_scale": scale, "generator": generator}
    found = [log_likelihood(lm, prompt, answer, **options) for _ in range(8)]
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert abs(sum(found) / len(found) - expected) < 4 * error + 1e-4
    assert error < 0.02 * abs(expected)


def test_a_batch_of_as_many_rows_as_tokens_masks_each_number_once(lm, prompt, monkeypatch):
    counts = []

    def counted(lm, prompt, noisy, ids, **options):
        counts.append(sorted((noisy == lm.config.mask_id).sum(dim=1).tolist()))
        return torch.zeros(noisy.shape)

    monkeypatch.setattr(likelihood, "log_probabilities", counted)
    log_likelihood(lm, prompt, [50, 61, 72, 83], samples=12, batch=4)
    assert counts == [[1, 2, 3, 4]] * 3


def test_one_token_is_scored_once_and_exactly(lm, prompt):
    expected = log_p(lm, prompt.embeddings[0], [lm.config.mask_id], 0, 50)
    assert log_likelihood(lm, prompt, [50]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_confidence_writes_the_most_probable_true_token_first(lm, prompt):
    answers = [[50, 61, 72], [83], [51, 52]]
    expected = []
    for answer in answers:
        noisy = [lm.config.mask_id] * len(answer)
        score = 0.0
        while lm.config.mask_id in noisy:
            waiting = [i for i, token in enumerate(noisy) if token == lm.config.mask_id]
            found = {i: log_p(lm, prompt.embeddings[0], noisy, i, answer[i]) for i in waiting}
            best = max(found, key=found.get)
            score += found[best]
            noisy[best] = answer[best]
        expected.append(score)
    assert confidence_scores(lm, prompt, answers) == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_pseudo_perplexity_masks_each_token_alone(lm):
    ids = list(range(50, 61))  # windows of 4, 4 and 3 tokens
    terms = []
    for part in (ids[:4], ids[4:8], ids[8:]):
        for i, token in enumerate(part):
            noisy = [*part[:i], lm.config.mask_id, *part[i + 1 :]]
            terms.append(log_p(lm, lm.embed(torch.tensor([], dtype=torch.long)), noisy, i, token))
    found = pseudo_perplexity(lm, ids, window=4, batch=3)
    assert found == pytest.approx(math.exp(-sum(terms) / len(terms)), rel=1e-4)


def test_what_has_no_likelihood_says_so(lm, prompt):
    with pytest.raises(ValueError, match="without a token has no likelihood"):
        log_likelihood(lm, prompt, [])
    with pytest.raises(ValueError, match="candidate without a token"):
        confidence_scores(lm, prompt, [[50], []])
    with pytest.raises(ValueError, match="without a token has no perplexity"):
        pseudo_perplexity(lm, [])
    with pytest.raises(ValueError, match="128 samples do not divide into batches of 48"):
        log_likelihood(lm, prompt, [50, 51], batch=48)
    with pytest.raises(ValueError, match="answer of 300 exceed the LM's context of 256"):
        log_likelihood(lm, prompt, [50] * 300)


def test_the_command_prints_the_pseudo_perplexity_of_each_file(
    toy_dirs, lm, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "text.txt"
    file.write_text("two red birds sing")
    tokenizer = load_tokenizer(toy_dirs["llm"], lm.config)
    ids = tokenizer.encode_text("two red birds sing")
    options = ["--llm", str(toy_dirs["llm"]), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["likelihood", str(file), *options])
    likelihood.main()
    expected = f"{file}: {len(ids)} tokens, pseudo-perplexity {pseudo_perplexity(lm, ids):.2f}\n"
    assert capsys.readouterr().out == expected

    for content, problem in ((b"\xff\xfe", "UTF-8"), (b"", "holds no text")):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match=problem):
            likelihood.main()
