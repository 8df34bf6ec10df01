"""What the toy corpus says: sentences of a small grammar, how each is spoken, and questions about both with their answers.

No sound here. Because the sentences are made, every answer is known: the animal, the number of words, who speaks and how.
A tenth of all sentences is held out by a hash of the text, for testing; a number word of a sentence is never the answer to
"how many words", or a model would learn to overhear it.
"""

import random
import zlib
from dataclasses import asdict, dataclass

# ---- the grammar. Inside a category no two words sound alike, and most words hold a sound on which accents disagree:
# an r after a vowel (tiger), the o of fox and of goat, the a of calf, a t between vowels (turtle), the th of arthur.
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
SLOTS = ("name", "number", "colour", "animal", "place")  # the categories that questions ask about
TEMPLATES = {  # by number of words; a word that names a category stands for any of its words, others for themselves.
    # Each category is in a fifth of the sentences or more: the words of a rare one are told apart long after the others.
    4: "name did the animal; the little animal did; the colour animal did; the animal did later",
    5: "name did the colour animal; the little animal did name; name often did the animal; the animal did name later",
    6: "name did the animal at number; the animal did name number times; the little animal often did name; "
       "name did the colour animal later",
    7: "name did the animal near the place; the animal near the place did name; name often did the animal at number; "
       "the little animal did name number times",
    8: "name did the colour animal near the place; the little animal did name near the place; "
       "near the place the animal did name later; name often did the colour animal at number",
    9: "name did the animal near the place at number; the little colour animal did name number times later; "
       "name often did the animal near the place later; the colour animal near the place often did name",
}
NUMBER_WORDS = {4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}  # the answers to "how many words"
ANSWER_LENGTH = 18  # tokens: the longest caption and the end of text
WORDS = sorted({"at", "times"}.union(*CATEGORIES.values()))  # every word form


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower case without punctuation, and the words in its slots, {"animal": "fox", ...}."""

    text: str
    slots: dict[str, str]


def is_held_out(text: str) -> bool:
    """True for the tenth of all sentences that nothing is ever trained on, neither with sound nor as bare text."""
    return zlib.crc32(text.encode()) % 10 == 0


def random_sentence(rng: random.Random, held_out: bool | None = None, length: int | None = None) -> Sentence:
    """Draws a sentence of 4 to 9 words, by default evenly; held_out: False for training, True to test, None for all."""
    length = length or rng.choice(list(TEMPLATES))
    while True:
        parts = rng.choice(TEMPLATES[length].split("; ")).split()
        words = [rng.choice(CATEGORIES[part]) if part in CATEGORIES else part for part in parts]
        text = " ".join(words)
        if held_out in (None, is_held_out(text)):
            return Sentence(text, {part: word for part, word in zip(parts, words) if part in SLOTS})


# ---- how it is spoken. The accents are the four of eSpeak's English ones that differ most on this grammar; "english"
# is the West Midlands' one, whose vowels are further from the other three than those of eSpeak's standard British.
ACCENTS = {"american": "en-us", "caribbean": "en-029", "english": "en-gb-x-gbcwmd", "scottish": "en-gb-scotland"}
SPEEDS = {"slow": (155, 175), "fast": (240, 290)}  # words a minute, by eSpeak's count
PITCHES = {"low": (12, 30), "high": (70, 88)}  # eSpeak's 0 to 99, relative to the voice's own pitch
ATTRIBUTES = {"gender": ["female", "male"], "accent": list(ACCENTS), "speed": list(SPEEDS), "pitch": list(PITCHES)}


@dataclass(frozen=True)
class Attributes:
    """How a clip is spoken; each field is one of the words in ATTRIBUTES."""

    gender: str
    accent: str
    speed: str
    pitch: str


def random_attributes(rng: random.Random) -> Attributes:
    """Draws each attribute evenly and independently of the others."""
    return Attributes(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})


# ---- questions and answers
TRANSCRIBE = "Please transcribe the speech."
WEIGHTS = {  # a training clip's five questions: two or three from each table, drawn with these weights
    "content": {"animal": 1, "colour": 1, "name": 1, "number": 1.5, "place": 1.5, "count": 2, "repeat": 2},
    "voice": {"gender": 1, "accent": 1.5, "speed": 1, "pitch": 1.5, "caption": 1},
}
KINDS = tuple(kind for table in WEIGHTS.values() for kind in table)
CONTENT_KINDS, VOICE_KINDS = tuple(WEIGHTS["content"]), tuple(ATTRIBUTES)
QUESTIONS = {
    **{k: [f"Which {k} is in it?", f"What {k} do you hear?", f"Say the {k}.", f"What is the {k}?"] for k in SLOTS},
    **{k: [f"What is the {k} of the speaker?", f"Which {k} do you hear?", f"Describe the {k}.", f"Name the {k}."]
       for k in ATTRIBUTES},
    "count": ["How many words do you hear?", "How many words are in it?", "Count the words.", "How many words?"],
    "repeat": ["Repeat the sentence.", "What do you hear?", "Say it again.", "Write the sentence."],
    "caption": ["Describe the speech.", "Who speaks, how, and what?", "Describe what you hear.", "Describe it all."],
}


def seed_transcript(sentence: Sentence, attributes: Attributes, seconds: float) -> str:
    """One line with all that is known of a clip of this many seconds, under an hour: time span, words, attributes."""
    end = int(seconds) + 1
    return (f"[00:00:00 - 00:{end // 60:02d}:{end % 60:02d}] {sentence.text} (Gender: {attributes.gender}, "
            f"Accent: {attributes.accent}, Speaking speed: {attributes.speed}, Pitch: {attributes.pitch})")


def instructions(sentence: Sentence, attributes: Attributes, rng: random.Random) -> dict[str, tuple[str, str]]:
    """Questions about a clip: {kind: (question, answer)} for every kind it has; rng picks the wordings."""
    speaker = f"{attributes.accent} {'woman' if attributes.gender == 'female' else 'man'}"
    article, manner = "an" if speaker[0] in "aeiou" else "a", f"{attributes.speed} and {attributes.pitch}"
    answers = {**sentence.slots, **asdict(attributes), "count": NUMBER_WORDS[len(sentence.text.split())],
               "repeat": sentence.text, "caption": f"{article} {speaker} says {manner}: {sentence.text}"}
    return {kind: (rng.choice(QUESTIONS[kind]), answers[kind]) for kind in KINDS if kind in answers}


def training_kinds(available: dict, rng: random.Random) -> list[str]:
    """Five different kinds for a training clip out of those it has, on average half of them about the voice."""
    voice, kinds = rng.choice((2, 3)), []
    for table, n in (("voice", voice), ("content", 5 - voice)):  # largest u^(1/weight): weighted, no repeats
        keys = {kind: rng.random() ** (1 / weight) for kind, weight in WEIGHTS[table].items() if kind in available}
        kinds += sorted(keys, key=keys.get, reverse=True)[:n]
    return kinds
