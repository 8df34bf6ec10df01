"""Text of a closed vocabulary, and a tiny LM that can quote it: what human.py needs for speech that the toy's grammar cannot say.

A sentence is a training prompt, or made of runs of words out of the training prompts and of words of the vocabulary drawn one
by one, so that every word stands in every company. The sentences of the test are never drawn. The LM is trained as pretrain.py
trains the toy's: words stand in the place of sound, and it learns to write them down.

    python -m lab.human lm --run runs/human

Shapes: B batch, P prompt positions, D LM width, G answer tokens.
"""

import functools
import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data import word_error_rate
from diffusion_lm import SIZES, DiffusionLM, diffusion_loss, next_token_loss, noise, noise_levels
from toy.grammar import ANSWER_LENGTH as G
from toy.grammar import TRANSCRIBE
from toy.imitation import GAP, Prompts, as_heard, pad_prompts, tokenizer_of_lines, words_as_sound
from toy.pretrain import AIM, LM_T_MIN, ask_text, new_lm, phases
from checkpoints.tokenizer import MASK, TEXT_END, Prompt, Tokenizer, build_prompt, encode_answers
from training.loop import TrainConfig, fit
from checkpoints.weights import save_llada

DIGITS = "zero one two three four five six seven eight nine".split()
WHOLE_SHARE = 0.15  # how often a sentence is a training prompt
RUN_SHARE = 0.35  # how often another goes on with a run of words, and not with one word; the latter teach rare ones
LONGER = 3  # times the toy's steps in both phases: with six times its words and hardly a grammar, copying is found late
MIXED = 0.3  # as the toy's, but less: no grammar says here which word it may be
N_CHECK = 200  # sentences for the LM's copy error


# ---- sentences
def plain_words(transcript: str) -> str:
    """A transcript as it is read out: lower case, without punctuation, digits and the keys * and # as words."""
    text = transcript.lower().replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\b(de|re|un)-", r"\1", text)  # re-enter is one word, call-forward two
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text))


@dataclass(frozen=True)
class Text:
    """All that may be said: the sentences of the training prompts, those of the test, and the words of both."""

    vocabulary: list[str]
    sentences: list[str]
    held_out: list[str]


def draw_sentence(text: Text, rng: random.Random) -> str:
    """A sentence of the vocabulary's words, up to as long as the longest training prompt, that no test prompt equals."""
    longest = max(len(sentence.split()) for sentence in text.sentences)
    while True:
        length, words = rng.randint(1, longest), []
        while len(words) < length:
            source = rng.choice(text.sentences).split()
            start, n = rng.randrange(len(source)), rng.randint(2, 4)
            words += source[start : start + n] if rng.random() < RUN_SHARE else [rng.choice(text.vocabulary)]
        sentence = rng.choice(text.sentences) if rng.random() < WHOLE_SHARE else " ".join(words[:length])
        if sentence not in text.held_out:
            return sentence


# ---- the language model
def train_tokenizer(path: Path, text: Text) -> Tokenizer:
    """A tokenizer in which the vocabulary's words are single pieces, so that an answer is as long as its words are many."""
    lines = [TRANSCRIBE] * 4000 + [" ".join(text.vocabulary)] * 50
    return tokenizer_of_lines(path, lines, size=1000 + 6 * len(text.vocabulary))


def draw_item(tokenizer: Tokenizer, sentence: str, rng: random.Random, stretched: bool) -> tuple[tuple[Prompt, list[int]], str]:
    """A prompt, the words in the place of its sound with silence around them, and the answer: the words."""
    region = words_as_sound(tokenizer, sentence, rng.uniform(0.4, 1.0) if stretched else None, rng)
    before, after = ([tokenizer.id(GAP)] * rng.randint(0, most) for most in (20, 5))  # stage 1's learned prompts stand before
    return (build_prompt(tokenizer, TRANSCRIBE), before + region + after), sentence


def train_lm(run: Path, text: Text, seed: int, device: str) -> dict:
    """Train and save RUN/llada as pretrain.py does the toy's, on this text; returns its copy errors in percent, steps, losses.

    Next-token first, then masked diffusion, then rounds of more until it quotes as it should.
    """
    tokenizer = train_tokenizer(run / "llada" / "tokenizer.model", text)
    config = replace(SIZES["toy"], vocab=tokenizer.size, mask_id=tokenizer.id(MASK), end_id=tokenizer.id(TEXT_END))
    lm = new_lm(replace(config, causal=True), seed, device)

    def batch_of(step: int, training: TrainConfig) -> tuple[Prompts, Tensor]:
        rng = random.Random(f"{training.seed} {step}")
        # Plain and stretched prompts take turns: a batch of one sort is padded less.
        items = [draw_item(tokenizer, draw_sentence(text, rng), rng, stretched=step % 2 == 1) for _ in range(training.batch)]
        answers = encode_answers(tokenizer, [sentence for _, sentence in items], G).to(device)  # (B, G)
        return pad_prompts(lm, [prompt for prompt, _ in items], device), answers

    def next_token(step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(step, first)
        return next_token_loss(lm, lm.embed(prompts.ids), prompts.mask, answers, answers.numel())

    def masked(training: TrainConfig, step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(step, training)
        embeddings = as_heard(lm, prompts, tokenizer.id(GAP), MIXED, generator)  # (B, P, D)
        t = noise_levels(len(answers), generator, t_min=LM_T_MIN, stratified=True)
        noisy = noise(answers, t, config.mask_id, generator)
        return diffusion_loss(lm, embeddings, prompts.mask, answers, noisy, t, answers.numel())

    read = hashlib.sha256(json.dumps(asdict(text)).encode()).hexdigest()[:16]

    def phase(name: str, loss, training: TrainConfig) -> list[float]:
        path = run / "checkpoints" / f"{name}.pt"
        return fit(dict(lm.named_parameters()), loss, training, path, f"LM, {name}", identity={"text": read})

    first, second, *more = phases(seed)
    first, second = (replace(training, steps=LONGER * training.steps) for training in (first, second))
    losses = phase("next_token", next_token, first)
    lm.config = config
    losses += phase("diffusion", functools.partial(masked, second), second)
    result = copy_errors(lm, tokenizer, text, seed, device)
    for n, third in enumerate(more):
        if result["copy_error"] <= AIM["copy_error"]:
            break
        losses += phase(f"more{n + 1}", functools.partial(masked, third), third)
        result = copy_errors(lm, tokenizer, text, seed, device)
    save_llada(lm, run / "llada")
    return result | {"steps": len(losses), "losses": losses}


def copy_errors(lm: DiffusionLM, tokenizer: Tokenizer, text: Text, seed: int, device: str) -> dict:
    """How wrong the LM quotes text that stands where sound would: drawn sentences, and those of the test. Percent of words."""
    rng, result = random.Random(f"check {seed}"), {}
    for name, sentences in (("copy_error", [draw_sentence(text, rng) for _ in range(N_CHECK)]), ("copy_error_test", text.held_out)):
        items = [draw_item(tokenizer, sentence, rng, stretched=True) for sentence in sentences]
        result[name] = word_error_rate(ask_text(lm, tokenizer, items, device), sentences)
    return result
