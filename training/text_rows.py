"""The batches of text that adapt a causal LM to masked diffusion and to audio (adapt_lm.py).

Each row is a prompt and its answer, of one of three kinds:

  audio   DIFFA's own prompt, with text that imitates audio embeddings in the place of the audio
  chat    a user's turn of text: a question and the sentence that it is about
  plain   no prompt: the LM restores an ordinary sentence

Batches of plain text and of prompts take turns, since rows of one sort are padded less.

Shapes: B batch, P prompt positions, G answer tokens.
"""

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from checkpoints.tokenizer import Tokenizer
from data import Prompt, build_prompt, build_text_prompt, encode_answers
from diffusion_lm import LMConfig
from training.imitation import ImitationItem, pad_items
from training.questions import (
    ABOUT_VOICE,
    QUESTIONS,
    draw_attributes,
    draw_kind,
    draw_question,
    plain_words,
)
from training.states import PREFETCH

# Positions for each letter of a stretched word: about as long as eSpeak's words last.
PACE = (0.4, 1.0)
# Most silences before the words, where stage 1 has its prompts, and after them.
SILENCES = (20, 5)
SEEN = 1000  # lines that are tried against the answers' length
TRIES = 10_000  # rows that are drawn until one fits
ABOUT_WORDS = tuple(kind for kind in QUESTIONS if kind not in ABOUT_VOICE)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the batches are made of.

    batch: prompts of a step. answer_length: tokens, G. chat: fraction of the prompts that are chat
    turns; the others imitate audio. plain_every: one of so many steps has plain text, with
    plain_rows times as many rows, which are short.
    """

    batch: int
    answer_length: int = 32
    chat: float = 0.12
    plain_every: int = 4
    plain_rows: int = 2


def length_of(item: ImitationItem) -> int:
    """Positions of a row's prompt."""
    return len(item.prompt.before) + len(item.audio_ids) + len(item.prompt.after)


class TextRows(Dataset):
    """The rows of every step, by its number: they follow from (seed, step) alone."""

    def __init__(
        self, tokenizer: Tokenizer, lines: list[str], mixture: Mixture, config: LMConfig, seed: int
    ):
        """lines: sentences with a word. config: of the LM, whose context limits the rows.

        Raises ValueError: hardly a sentence fits the answers, so rows would be drawn for ever.
        """
        self.tokenizer = tokenizer
        self.lines = lines
        self.mixture = mixture
        self.gap_id = config.mask_id  # stands for a silence; it is not embedded
        self.room = config.max_length - mixture.answer_length  # positions of a prompt
        self.seed = seed
        self.prompt_of = functools.cache(functools.partial(build_prompt, tokenizer))
        self.pieces = functools.lru_cache(1 << 16)(self.pieces_of)

        # Lines by their number of words. Each number is drawn as often as any other: where most
        # answers are short, an LM that fills in all tokens at once ends the long ones early. A word
        # has at least one token, so more words than the answer's tokens never fit.
        by_length = defaultdict(list)
        for line in lines:
            by_length[len(plain_words(line).split())].append(line)
        self.by_length = [ls for n, ls in by_length.items() if n < mixture.answer_length]

        # Some lines, evenly spaced, stand for all of them.
        some = lines[:: -(-len(lines) // SEEN)]
        fitting = [len(tokenizer.encode_text(line)) < mixture.answer_length for line in some]
        if 100 * sum(fitting) < len(some):
            raise ValueError(
                f"{sum(fitting)} of {len(some)} sentences fit an answer of {mixture.answer_length} "
                "tokens; take a larger --answer-length, or shorter sentences"
            )
        if not self.by_length:
            raise ValueError(
                f"every sentence has {mixture.answer_length} words or more; take a larger "
                "--answer-length, or shorter sentences"
            )

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """ids, mask and is_audio (B, P), answer_ids (B, G), and is_plain (), on the CPU."""
        rng = random.Random(f"{self.seed} {step}")
        every = self.mixture.plain_every
        is_plain = step % every == every - 1

        # Words once and stretched words take turns too.
        if is_plain:
            n = self.mixture.plain_rows * self.mixture.batch
            items = [self.fitting(self.plain, rng) for _ in range(n)]
        else:
            stretched = (step - step // every) % 2 == 1
            prompt = functools.partial(self.prompt, stretched=stretched)
            items = [self.fitting(prompt, rng) for _ in range(self.mixture.batch)]

        # Parts of a batch are padded less when rows of similar length are neighbours.
        items.sort(key=length_of)
        ids, mask, is_audio = pad_items(items, torch.device("cpu"))
        answers = [item.answer for item in items]
        return {
            "ids": ids,
            "mask": mask,
            "is_audio": is_audio,
            "answer_ids": encode_answers(self.tokenizer, answers, self.mixture.answer_length),
            "is_plain": torch.tensor(is_plain),
        }

    def batches(self, steps: range, workers: int, pin: bool) -> Iterator[dict[str, Tensor]]:
        """The rows of each step in turn, made by `workers` processes ahead."""
        options = {"num_workers": workers, "pin_memory": pin, "generator": torch.Generator()}
        if workers:
            options["prefetch_factor"] = PREFETCH
        return iter(DataLoader(self, batch_size=None, sampler=steps, **options))

    # Rows

    def fitting(self, draw: Callable, rng: random.Random) -> ImitationItem:
        """A row that draw(line, rng=rng) makes of a random line; prompt, answer and its end fit.

        Raises ValueError: none is found.
        """
        for _ in range(TRIES):
            item = draw(rng.choice(rng.choice(self.by_length)), rng=rng)
            if self.fits(item):
                return item
        raise ValueError(
            f"no prompt of {self.room} positions with an answer of {self.mixture.answer_length} "
            f"tokens is found in {TRIES:,} tries; take shorter sentences, or an LM with a longer "
            "context"
        )

    def fits(self, item: ImitationItem) -> bool:
        """Whether an answer and its end fit its length, and the prompt what the context leaves."""
        n_answer = len(self.tokenizer.encode_text(item.answer))
        return n_answer < self.mixture.answer_length and length_of(item) <= self.room

    def plain(self, line: str, rng: random.Random) -> ImitationItem:
        """A sentence without a prompt, after the token that separates texts."""
        start = self.tokenizer.id(self.tokenizer.chat.text_end)
        return ImitationItem(prompt=Prompt([start], []), audio_ids=[], answer=line)

    def prompt(self, line: str, stretched: bool, rng: random.Random) -> ImitationItem:
        """A question about a sentence that is written, or that imitates audio."""
        if rng.random() < self.mixture.chat:
            return self.chat(line, draw_kind(rng, ABOUT_WORDS), rng)
        return self.audio(line, draw_kind(rng), stretched, rng)

    def chat(self, line: str, kind: str, rng: random.Random) -> ImitationItem:
        """A question about a sentence, both as text."""
        words = plain_words(line)
        other = plain_words(rng.choice(self.lines))
        question, answer = draw_question(kind, words, {}, other, rng)
        prompt = build_text_prompt(self.tokenizer, f"{question}\n{words}")
        return ImitationItem(prompt=prompt, audio_ids=[], answer=answer)

    def audio(self, line: str, kind: str, stretched: bool, rng: random.Random) -> ImitationItem:
        """A question about a clip, whose audio is imitated."""
        words = plain_words(line)
        attributes = draw_attributes(rng)
        other = plain_words(rng.choice(self.lines))
        question, answer = draw_question(kind, words, attributes, other, rng)

        # Half of the questions that need no attributes come without, since stage 1 provides none.
        voiced = kind in ABOUT_VOICE or rng.random() < 0.5
        front = self.voice(attributes if voiced else {}, rng)
        spoken = self.stretched(words, rng) if stretched else self.once(words)
        after = [self.gap_id] * rng.randint(0, SILENCES[1])
        return ImitationItem(
            prompt=self.prompt_of(question), audio_ids=front + spoken + after, answer=answer
        )

    # What imitates audio

    def pieces_of(self, word: str, is_first: bool = False) -> list[tuple[int, int]]:
        """The tokens of a word inside a text, and how many letters each of them has.

        is_first: of the text. Many tokenizers have other tokens there, for no space is before it.
        The warm-up (align.py) spells the tokens of transcripts, so that these are imitated too.
        """
        ids = self.tokenizer.encode_text(word) if is_first else self.tokenizer.encode(f" {word}")
        return [(i, len(self.tokenizer.decode([i]).strip())) for i in ids]

    def voice(self, attributes: dict[str, str], rng: random.Random) -> list[int]:
        """Silences, with the words of the attributes somewhere among them."""
        spoken = [[i for i, _ in self.pieces(value)] for value in attributes.values()]
        spoken += [[self.gap_id]] * rng.randint(0, SILENCES[0])
        rng.shuffle(spoken)
        return sum(spoken, [])

    def once(self, words: str) -> list[int]:
        """Each token once, without silence."""
        spoken = enumerate(words.split())
        return [i for n, word in spoken for i, _ in self.pieces(word, is_first=n == 0)]

    def stretched(self, words: str, rng: random.Random) -> list[int]:
        """Each token as often as it would sound; in half of the rows, most of it is silence.

        The warm-up by CTC (align.py) leads to adapters that say each token only once.
        """
        pace = rng.uniform(*PACE)
        silence = rng.choice((0.0, rng.uniform(0.0, 0.9)))
        ids = []
        for position, word in enumerate(words.split()):
            for token, letters in self.pieces(word, is_first=position == 0):
                n = max(1, round(letters * pace + rng.uniform(-0.7, 0.7)))
                kept = rng.randrange(n)
                ids += [
                    self.gap_id if k != kept and rng.random() < silence else token for k in range(n)
                ]
            ids += [self.gap_id] * rng.choice((0, 0, 0, 1))
        return ids
