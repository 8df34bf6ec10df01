"""Text that looks like sound: what the stand-in LM is taught on, before any adapter exists.

A prompt in which words stand where the audio will go: attribute words, then the sentence, half of the time stretched as
speech is. An LM that reads these can be frozen, and adapters learn to say to it what such words say.

Shapes: B batch, P prompt positions, D LM width, V vocabulary.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from toy import grammar
from checkpoints.tokenizer import HEADER, HEADER_END, MASK, START, TEXT_END, TURN_END, Prompt, SentencePieceTokenizer, build_prompt
from diffusion_lm import DiffusionLM

OTHERS = 3  # words that have a share in another's embedding; below 0.75 in all, its own share stays the largest
GAP = "~"  # stands between stretched words, for the silence between spoken ones


def train_tokenizer(path: Path, seed: int) -> SentencePieceTokenizer:
    """A tokenizer in which the grammar's words are single pieces."""
    rng, lines = random.Random(seed), []
    for _ in range(4000):
        sentence = grammar.random_sentence(rng, held_out=False)
        lines += [grammar.TRANSCRIBE]
        for question, answer in grammar.instructions(sentence, grammar.random_attributes(rng), rng).values():
            lines += [question, answer]
    return tokenizer_of_lines(path, lines, size=1100)


def tokenizer_of_lines(path: Path, lines: list[str], size: int) -> SentencePieceTokenizer:
    """A sentencepiece BPE model of at most `size` pieces in which markers are single ones and no character is lost."""
    # What stands in every prompt, often enough that each of its words becomes one piece: short prompts are quick ones.
    roles = [f"{HEADER}{role}{HEADER_END}" for role in ("system", "user", "assistant")]
    lines = [*roles, "You are a helpful voice assistant.", "This is the audio:", " <audio>. "] * 400 + lines
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=size,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_by_unicode_script=False, minloglevel=2, num_threads=1,
        user_defined_symbols=[START, HEADER, HEADER_END, TURN_END, TEXT_END, MASK, GAP, "\n\n"],
    )  # fmt: skip
    return SentencePieceTokenizer(path)


def words_as_sound(tokenizer, text: str, pace: float | None, rng: random.Random) -> list[int]:
    """Ids of a sentence's words that stand where its sound would be: each once, or `pace` times for each of its letters."""
    gap, region = tokenizer.id(GAP), []
    for word in text.split():
        ids = tokenizer.encode(word)
        if pace is not None:  # about as many semantic embeddings as eSpeak's words last, and hardly a silence between them
            lasts = max(1, round(len(word) * pace + rng.uniform(-0.7, 0.7)))
            region += [token for token in ids for _ in range(lasts)] + [gap] * rng.choice((0, 0, 0, 1))
        else:
            region += ids
    return region


def text_prompt(tokenizer, sentence, attributes, instruction: str, rng: random.Random, stretched: bool, voiced: bool) -> tuple[Prompt, list[int]]:
    """A prompt, and the ids of words that stand where its sound would be: attributes (if voiced), then the sentence."""
    gap, pace = tokenizer.id(GAP), rng.uniform(0.4, 1.0)
    known = [[gap] * rng.randint(0, 2) + tokenizer.encode(value) for value in vars(attributes).values()]
    rng.shuffle(known)
    region = [token for ids in known for token in ids] if voiced else [gap] * rng.randint(0, 10)
    region += words_as_sound(tokenizer, sentence.text, pace if stretched else None, rng)
    return build_prompt(tokenizer, instruction), region


KIND_WEIGHTS = {  # of a sentence's possible questions; what few sentences have, and counting, which takes the most practice, is asked the more often
    "transcribe": 5, "repeat": 1, "caption": 2, "count": 5, **dict.fromkeys(grammar.ATTRIBUTES, 1.25),
    "name": 0.75, "animal": 0.75, "number": 2, "colour": 2, "place": 2,
}  # fmt: skip


def draw_item(tokenizer, rng: random.Random, held_out: bool, kind: str | None = None, stretched: bool | None = None) -> tuple[tuple[Prompt, list[int]], str]:
    """A prompt, the words in the place of its sound, and the answer; of one kind of question, or of any."""
    while True:
        sentence, attributes = grammar.random_sentence(rng, held_out=held_out), grammar.random_attributes(rng)
        items = grammar.instructions(sentence, attributes, rng) | {"transcribe": (grammar.TRANSCRIBE, sentence.text)}
        if kind is None or kind in items:  # not every sentence has a number, say: draw until one has what is asked
            break
    kinds = list(items) if kind is None else [kind]
    chosen = rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
    question, answer = items[chosen]
    voiced = chosen in (*grammar.ATTRIBUTES, "caption") or rng.random() < 0.5  # stage 1 hears no voice
    stretched = rng.random() < 0.5 if stretched is None else stretched
    return text_prompt(tokenizer, sentence, attributes, question, rng, stretched, voiced), answer


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch of prompts in which words stand for sound."""

    ids: Tensor  # (B, P)
    mask: Tensor  # (B, P) true where a position is real
    is_sound: Tensor  # (B, P) true where a word stands for sound


def pad_prompts(lm: DiffusionLM, prompts: list[tuple[Prompt, list[int]]], device: str) -> Prompts:
    """One tensor of many prompts."""
    rows = [(prompt.before, region, prompt.after) for prompt, region in prompts]
    P = max(sum(map(len, row)) for row in rows)
    pads = [P - sum(map(len, row)) for row in rows]
    ids = [[lm.config.end_id] * n + a + b + c for n, (a, b, c) in zip(pads, rows)]
    sound = [[False] * (n + len(a)) + [True] * len(b) + [False] * len(c) for n, (a, b, c) in zip(pads, rows)]
    mask = [[False] * n + [True] * (P - n) for n in pads]
    return Prompts(*(torch.tensor(value, device=device) for value in (ids, mask, sound)))


def as_heard(lm: DiffusionLM, prompts: Prompts, gap: int, mixed: float, generator: torch.Generator) -> Tensor:
    """Embeddings (B, P, D) of prompts as adapters that still learn would say them: in each word up to `mixed` of others.

    An adapter first says a mean of the words that it cannot tell apart yet. An LM that read clean words alone answers such
    means by chance; one that read mixtures answers the right word the surer the more of it there is, and along that slope
    stage 1 finds its way. Where the region holds no word (silence, stage-1 prompts), what an adapter says is not known
    beforehand: noise of the embeddings' size, which the LM learns to take no notice of.
    """
    words = prompts.is_sound & (prompts.ids != gap)  # (B, P)
    used, device = prompts.ids[words].unique(), words.device
    share = (mixed * torch.rand(len(words), 1, generator=generator).to(device) * words)[..., None]  # (B, P, 1) of the others
    heard = (1 - share) * lm.embed(prompts.ids)  # (B, P, D)
    for _ in range(OTHERS):
        other = torch.arange(lm.config.vocab, device=device)  # (V,) the word that each is mixed with, one for the whole batch
        other[used] = used[torch.randperm(len(used), generator=generator).to(device)]
        heard = heard + share / OTHERS * lm.embed(other[prompts.ids])
    noise = torch.randn(heard.shape, generator=generator).to(device) * lm.embedding.weight.detach().pow(2).mean().sqrt()
    return torch.where((prompts.is_sound & ~words)[..., None], noise, heard)
