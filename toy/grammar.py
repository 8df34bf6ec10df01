"""What the toy corpus says: sentences of a small grammar, how they are spoken, questions.

There is no sound here. The sentences are drawn from a grammar, so every answer is known: the
animal, the number of words, who speaks and how. A hash of the text holds out a tenth of all
sentences for testing. A number word of a sentence is never the answer to "how many words": else a
model could learn to answer with the number that it hears.
"""

import random
import zlib
from dataclasses import asdict, dataclass

# ---- the grammar
# No two words of a category sound similar. Most words hold a sound that differs between accents:
# an r after a vowel (tiger), the o of fox and of goat, the a of calf, a t between vowels (turtle),
# the th of arthur.
CATEGORIES = {
    "name": "arthur laura oscar peter hannah rosa judith marcus".split(),
    "number": "two three ten eleven twelve thirty fifty eighty".split(),
    "colour": "purple orange silver scarlet golden brown yellow blue".split(),
    "animal": "fox horse tiger parrot calf goat turtle zebra".split(),
    "place": "castle market church forest river tower school lake".split(),
    "did": "heard chased painted watched followed carried asked found".split(),
    "the": "the my every another".split(),
    "near": "near across past over under behind".split(),
    "often": "often never always slowly quickly softly".split(),
    "little": "little old poor clever".split(),
    "later": "later today yesterday again".split(),
}

# The categories that questions are about.
SLOTS = ("name", "number", "colour", "animal", "place")

# Sentence forms by number of words. A category's name stands for any of its words, "at" and "times"
# for themselves. Each category is in a fifth of the sentences or more: a model learns to tell the
# words of a rare category apart long after the others.
TEMPLATES = {
    4: "name did the animal; the little animal did; the colour animal did; the animal did later",
    5: """name did the colour animal; the little animal did name; name often did the animal;
        the animal did name later""",
    6: """name did the animal at number; the animal did name number times;
        the little animal often did name; name did the colour animal later""",
    7: """name did the animal near the place; the animal near the place did name;
        name often did the animal at number; the little animal did name number times""",
    8: """name did the colour animal near the place; the little animal did name near the place;
        near the place the animal did name later; name often did the colour animal at number""",
    9: """name did the animal near the place at number;
        the little colour animal did name number times later;
        name often did the animal near the place later;
        the colour animal near the place often did name""",
}

# The answers to "how many words".
NUMBER_WORDS = dict(zip(TEMPLATES, "four five six seven eight nine".split()))

# Every word of the grammar.
WORDS = sorted({"at", "times"}.union(*CATEGORIES.values()))


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower case without punctuation, and its words by slot: {"animal": "fox"}."""

    text: str
    slots: dict[str, str]


def is_held_out(text: str) -> bool:
    """True for the tenth of all sentences that is never trained on, as sound or as text."""
    return zlib.crc32(text.encode()) % 10 == 0


def random_sentence(
    rng: random.Random, held_out: bool | None = None, length: int | None = None
) -> Sentence:
    """Draw a sentence.

    Args:
        held_out: False for a training sentence, True for a test sentence, None for any.
        length: number of words, 4 to 9; None draws it evenly.
    """
    n_words = length or rng.choice(list(TEMPLATES))

    while True:
        # Draw a form, then a word for each category in it.
        parts = rng.choice(TEMPLATES[n_words].split(";")).split()
        words = [rng.choice(CATEGORIES[part]) if part in CATEGORIES else part for part in parts]

        # A sentence of the other split is rejected.
        text = " ".join(words)
        if held_out in (None, is_held_out(text)):
            return Sentence(text, {part: word for part, word in zip(parts, words) if part in SLOTS})


# ---- how it is spoken
# Of eSpeak's English accents, the four that differ most on this grammar. "english" is the West
# Midlands' accent: its vowels differ more from the other three than those of standard British.
ACCENTS = {
    "american": "en-us",
    "caribbean": "en-029",
    "english": "en-gb-x-gbcwmd",
    "scottish": "en-gb-scotland",
}

# In words a minute, by eSpeak's count.
SPEEDS = {"slow": (155, 175), "fast": (240, 290)}

# From 0 to 99 in eSpeak, relative to the voice's own pitch.
PITCHES = {"low": (12, 30), "high": (70, 88)}

ATTRIBUTES = {
    "gender": ["female", "male"],
    "accent": list(ACCENTS),
    "speed": list(SPEEDS),
    "pitch": list(PITCHES),
}


@dataclass(frozen=True)
class Attributes:
    """How a clip is spoken; each field is one of its words in ATTRIBUTES."""

    gender: str
    accent: str
    speed: str
    pitch: str


def random_attributes(rng: random.Random) -> Attributes:
    """Draw each attribute evenly and independently of the others."""
    return Attributes(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})


# ---- questions and answers
# A training clip has five questions: two or three from each table, drawn with these weights.
WEIGHTS = {
    "content": {
        "animal": 1, "colour": 1, "name": 1, "number": 1.5, "place": 1.5, "count": 2, "repeat": 2,
    },
    "voice": {"gender": 1, "accent": 1.5, "speed": 1, "pitch": 1.5, "caption": 1},
}  # fmt: skip
CONTENT_KINDS = tuple(WEIGHTS["content"])
VOICE_KINDS = tuple(ATTRIBUTES)
KINDS = (*CONTENT_KINDS, *WEIGHTS["voice"])

# The wordings of each kind of question.
SLOT_QUESTIONS = ("Which {} is in it?", "What {} do you hear?", "Say the {}.", "What is the {}?")
ATTRIBUTE_QUESTIONS = (
    "What is the {} of the speaker?", "Which {} do you hear?", "Describe the {}.", "Name the {}.",
)  # fmt: skip
QUESTIONS = {
    **{kind: [question.format(kind) for question in SLOT_QUESTIONS] for kind in SLOTS},
    **{kind: [question.format(kind) for question in ATTRIBUTE_QUESTIONS] for kind in ATTRIBUTES},
    "count": [
        "How many words do you hear?", "How many words are in it?", "Count the words.",
        "How many words?",
    ],
    "repeat": ["Repeat the sentence.", "What do you hear?", "Say it again.", "Write the sentence."],
    "caption": [
        "Describe the speech.", "Who speaks, how, and what?", "Describe what you hear.",
        "Describe it all.",
    ],
}  # fmt: skip


def instructions(
    sentence: Sentence, attributes: Attributes, rng: random.Random
) -> dict[str, tuple[str, str]]:
    """Questions about a clip, {kind: (question, answer)}, with wordings drawn from rng."""
    # The caption, such as "an english woman says slow and low: laura found the fox".
    speaker = f"{attributes.accent} {'woman' if attributes.gender == 'female' else 'man'}"
    article = "an" if speaker[0] in "aeiou" else "a"
    manner = f"{attributes.speed} and {attributes.pitch}"

    answers = {
        **sentence.slots,
        **asdict(attributes),
        "count": NUMBER_WORDS[len(sentence.text.split())],
        "repeat": sentence.text,
        "caption": f"{article} {speaker} says {manner}: {sentence.text}",
    }
    return {kind: (rng.choice(QUESTIONS[kind]), answers[kind]) for kind in KINDS if kind in answers}


def training_kinds(available: dict, rng: random.Random) -> list[str]:
    """Draw five different kinds of question out of a clip's, on average half about the voice."""
    n_voice = rng.choice((2, 3))

    kinds = []
    for table, n in (("voice", n_voice), ("content", 5 - n_voice)):
        # A weighted draw without repeats: the n largest of u^(1/weight), with u uniform in [0, 1).
        weights = {kind: weight for kind, weight in WEIGHTS[table].items() if kind in available}
        keys = {kind: rng.random() ** (1 / weight) for kind, weight in weights.items()}
        kinds += sorted(keys, key=keys.get, reverse=True)[:n]
    return kinds
