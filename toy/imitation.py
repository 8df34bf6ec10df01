"""Text that imitates audio embeddings: what the toy's LM learns from, before any adapter exists.

Token embeddings stand where the audio embeddings will go: words for the speaker's attributes, then
the sentence, half of the time stretched as speech is. The LM learns to answer from them and is then
frozen. Afterwards an adapter only has to learn audio embeddings that resemble those of the words
(training/imitation.py).
"""

import random
from pathlib import Path

import sentencepiece

from checkpoints.chats import HEADER, HEADER_END, MASK, START, TURN_END
from checkpoints.tokenizer import SentencePieceTokenizer, Tokenizer
from data import SYSTEM, TEXT_END, TRANSCRIBE, build_prompt
from toy import grammar
from training.imitation import ImitationItem

# A piece of its own: the silence between two stretched words.
GAP = "~"

# Positions for each letter of a stretched word, as eSpeak's words last.
PACE = (0.4, 1.0)

# How often each kind of question is drawn, of those a sentence allows. Kinds that few sentences
# have are drawn more often, and so is counting, which takes the most practice. Attributes that are
# asked for too seldom stay at chance; captions name all of them.
KIND_WEIGHTS = {
    "transcribe": 5,
    "repeat": 1,
    "caption": 5,
    "count": 7,
    **dict.fromkeys(grammar.ATTRIBUTES, 2.5),
    "name": 0.75,
    "animal": 0.75,
    "number": 2,
    "colour": 2,
    "place": 2,
}


# ---- the tokenizer
def train_tokenizer(path: Path, seed: int) -> SentencePieceTokenizer:
    """Train and save a tokenizer in which each word of the grammar is a single piece.

    It is a BPE model that loses no character and keeps each marker whole.
    """
    rng = random.Random(seed)
    lines = []
    for _ in range(4000):
        sentence = grammar.random_sentence(rng, held_out=False)
        lines.append(TRANSCRIBE)
        attributes = grammar.random_attributes(rng)
        for question, answer in grammar.instructions(sentence, attributes, rng).values():
            lines += [question, answer]

    # The text of every prompt occurs often enough that each word of it becomes one piece:
    # short prompts make fast steps.
    frame = [f"{HEADER}{role}{HEADER_END}" for role in ("system", "user", "assistant")]
    frame += [SYSTEM, "This is the audio:", " <audio>. "]
    lines = frame * 400 + lines

    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=1100,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        minloglevel=2,
        num_threads=1,
        user_defined_symbols=[START, HEADER, HEADER_END, TURN_END, TEXT_END, MASK, GAP, "\n\n"],
    )
    return SentencePieceTokenizer(path)


# ---- items
def imitate_words(
    tokenizer: Tokenizer, text: str, pace: float | None, rng: random.Random
) -> list[int]:
    """Token ids that imitate the audio of a text.

    Args:
        pace: positions for each letter of a word; None: each word stands once, without gaps.
    """
    gap_id = tokenizer.id(GAP)
    ids = []
    for word in text.split():
        if pace is None:
            ids += tokenizer.encode(word)
            continue

        # About as many positions as eSpeak's word has semantic embeddings, and few silences.
        repeats = max(1, round(len(word) * pace + rng.uniform(-0.7, 0.7)))
        ids += [token for token in tokenizer.encode(word) for _ in range(repeats)]
        ids += [gap_id] * rng.choice((0, 0, 0, 1))
    return ids


def imitate_clip(
    tokenizer: Tokenizer,
    text: str,
    attributes: grammar.Attributes,
    rng: random.Random,
    *,
    stretched: bool,
    voiced: bool,
) -> list[int]:
    """Token ids that imitate a whole clip: its attributes in random order, then its text.

    Args:
        stretched: repeat the words as often as speech would. voiced: with the attributes; without
            them a silence stands there, as in stage 1, which has no acoustic adapter.
    """
    gap_id = tokenizer.id(GAP)
    pace = rng.uniform(*PACE)

    # 1. How it is spoken.
    values = vars(attributes).values()
    spoken = [[gap_id] * rng.randint(0, 2) + tokenizer.encode(value) for value in values]
    rng.shuffle(spoken)
    ids = sum(spoken, []) if voiced else [gap_id] * rng.randint(0, 10)

    # 2. What is spoken.
    return ids + imitate_words(tokenizer, text, pace if stretched else None, rng)


def draw_question(
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    held_out: bool,
    stretched: bool,
    kind: str | None = None,
) -> ImitationItem:
    """Draw a sentence, its attributes and a question about them, of one kind or of any."""
    # Not every sentence has a number, for example: draw until one allows this kind.
    while True:
        sentence = grammar.random_sentence(rng, held_out=held_out)
        attributes = grammar.random_attributes(rng)
        questions = grammar.instructions(sentence, attributes, rng)
        questions["transcribe"] = (TRANSCRIBE, sentence.text)
        if kind is None or kind in questions:
            break

    kinds = [kind] if kind else list(questions)
    chosen = rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
    question, answer = questions[chosen]

    # Half of the questions that need no attributes come without, since stage 1 provides none.
    voiced = chosen in (*grammar.ATTRIBUTES, "caption") or rng.random() < 0.5
    options = {"stretched": stretched, "voiced": voiced}
    return ImitationItem(
        prompt=build_prompt(tokenizer, question),
        audio_ids=imitate_clip(tokenizer, sentence.text, attributes, rng, **options),
        answer=answer,
    )
