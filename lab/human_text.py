"""Text of a closed vocabulary, and what the LM of lab/human.py learns from it.

A sentence is a training prompt, or it is made of runs of words out of the training prompts and of
single words of the vocabulary, so that every word occurs beside every other. The test prompts are
never drawn. The LM learns as the toy's does (toy/pretrain_lm.py): it copies words that stand where
the audio embeddings will go.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints.files import read_json
from checkpoints.tokenizer import Tokenizer
from data import TRANSCRIBE, build_prompt
from diffusion_lm import DiffusionLM
from evaluation.wer import word_error_rate
from sampler import generate
from toy.imitation import GAP, PACE, ImitationItem, imitate_words, tokenizer_of_lines
from toy.pretrain_lm import Decode, answer_text, phases, pretrain_lm

DIGITS = "zero one two three four five six seven eight nine".split()
WHOLE = 0.15  # fraction of sentences that are a training prompt
RUNS = 0.35  # probability that another continues with a run of words; single words teach rare ones
LONGER = 3  # times the toy's steps: with six times its words and no grammar, copying comes late
BLUR = 0.3  # less than the toy's, since no grammar says which word may stand here
N_COPIED = 200  # sentences that measure the LM's copy error


# ---- sentences
def plain_words(transcript: str) -> str:
    """A transcript as it is read aloud: lower case, no punctuation; digits, * and # as words."""
    text = transcript.lower().replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\b(de|re|un)-", r"\1", text)  # re-enter is one word, call-forward two
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text))


@dataclass(frozen=True)
class Text:
    """The sentences of the training prompts, those of the test, and the words of both."""

    vocabulary: list[str]
    sentences: list[str]
    held_out: list[str]


def draw_sentence(text: Text, rng: random.Random) -> str:
    """A sentence of the vocabulary, no longer than the longest training prompt, not held out."""
    longest = max(len(sentence.split()) for sentence in text.sentences)
    while True:
        length = rng.randint(1, longest)
        words = []
        while len(words) < length:
            source = rng.choice(text.sentences).split()
            start = rng.randrange(len(source))
            n = rng.randint(2, 4)
            if rng.random() < RUNS:
                words += source[start : start + n]
            else:
                words.append(rng.choice(text.vocabulary))

        whole = rng.random() < WHOLE
        sentence = rng.choice(text.sentences) if whole else " ".join(words[:length])
        if sentence not in text.held_out:
            return sentence


# ---- the language model
def train_word_tokenizer(path: Path, text: Text) -> Tokenizer:
    """A tokenizer with a piece for every word, so that an answer has as many tokens as words."""
    lines = [TRANSCRIBE] * 4000 + [" ".join(text.vocabulary)] * 50
    return tokenizer_of_lines(path, lines, size=1000 + 6 * len(text.vocabulary))


@dataclass(frozen=True)
class ClosedText:
    """A TextSource (toy/pretrain_lm.py) that asks for transcripts of sentences of a Text."""

    tokenizer: Tokenizer
    text: Text
    seed: int
    blur: float = BLUR

    def item(self, sentence: str, rng: random.Random, stretched: bool) -> ImitationItem:
        """A sentence in the place of its audio, with silence around it."""
        pace = rng.uniform(*PACE) if stretched else None
        words = imitate_words(self.tokenizer, sentence, pace, rng)
        # Before the words there is room for stage 1's learned prompts.
        gap_id = self.tokenizer.id(GAP)
        before = [gap_id] * rng.randint(0, 20)
        after = [gap_id] * rng.randint(0, 5)
        return ImitationItem(
            prompt=build_prompt(self.tokenizer, TRANSCRIBE),
            audio_ids=before + words + after,
            answer=sentence,
        )

    def draw(
        self, rng: random.Random, n: int, stretched: bool, wanted: Sequence[str]
    ) -> list[ImitationItem]:
        """Draw n items. There is one kind of question, so `wanted` changes nothing."""
        return [self.item(draw_sentence(self.text, rng), rng, stretched) for _ in range(n)]

    def examine(self, lm: DiffusionLM, decode: Decode = generate) -> dict:
        """WER in percent of copying drawn sentences, and of copying those of the test."""
        rng = random.Random(f"check {self.seed}")
        drawn = [draw_sentence(self.text, rng) for _ in range(N_COPIED)]
        result = {}
        for name, sentences in (("copy_error", drawn), ("copy_error_test", self.text.held_out)):
            items = [self.item(sentence, rng, stretched=True) for sentence in sentences]
            predictions = answer_text(lm, self.tokenizer, items, decode)
            result[name] = word_error_rate(predictions, sentences)
        return result


def train_lm(run: Path, seed: int, device: str) -> dict:
    """Train RUN/llada on RUN/corpus/text.json; returns what toy.pretrain_lm.pretrain_lm does."""
    text = Text(**read_json(run / "corpus/text.json"))
    tokenizer = train_word_tokenizer(run / "llada/tokenizer.model", text)
    source = ClosedText(tokenizer, text, seed)

    # A run may only resume with the same text.
    digest = hashlib.sha256(json.dumps(asdict(text)).encode()).hexdigest()[:16]
    training = phases(seed, longer=LONGER)
    return pretrain_lm(source, run, training, device, identity={"text": digest})
