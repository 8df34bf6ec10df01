"""Questions about a clip whose words and voice are known, with their answers.

What an LM is adapted to (adapt_lm.py), before any audio, and what stage 2 trains on where eSpeak
speaks the clips (toy/read_aloud.py). A voice is described by `attributes`: a value for each key of
VALUES.
"""

import random
import re
from pathlib import Path

from checkpoints.files import read_sentences
from data import TRANSCRIBE

DIGITS = "zero one two three four five six seven eight nine".split()

# Attributes of a voice, and their values.
VALUES = {"gender": ("woman", "man"), "speed": ("slowly", "fast"), "pitch": ("high", "low")}

# Wordings of each kind of question; "{}" is a word.
QUESTIONS = {
    "transcribe": (TRANSCRIBE,),
    "repeat": ("Repeat what is said.", "What does the speaker say?", "Repeat the sentence."),
    "gender": ("Is the speaker a man or a woman?", "Who is speaking, a woman or a man?"),
    "speed": ("Does the speaker talk slowly or fast?", "How fast does the speaker talk?"),
    "pitch": ("Is the voice high or low?", "How high is the voice of the speaker?"),
    "first": ("What is the first word?", "Which word comes first?"),
    "last": ("What is the last word?", "Which word comes last?"),
    "says": ('Does the speaker say the word "{}"?', 'Can you hear the word "{}"?'),
    "describe": ("What can you hear from the audio?", "Describe the speech."),
}
ABOUT_VOICE = ("gender", "speed", "pitch", "describe")  # need the attributes

# How often each kind is drawn.
WEIGHTS = {"transcribe": 6, "repeat": 2, "describe": 2, "says": 1.5}


def plain_words(text: str) -> str:
    """A text as it is read aloud: lower case, no punctuation; digits, * and # as words."""
    text = text.lower().replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\b(de|re|un)-", r"\1", text)  # re-enter is one word, call-forward two
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text))


def spoken_lines(path: Path) -> list[str]:
    """The lines of a text file that hold a word to speak. Raises ValueError: there are none."""
    lines = [line for line in read_sentences(path) if plain_words(line)]
    if not lines:
        raise ValueError(f"{path}: no line holds a word in English letters")
    return lines


def draw_attributes(rng: random.Random) -> dict[str, str]:
    """A random value of each attribute."""
    return {name: rng.choice(values) for name, values in VALUES.items()}


def draw_kind(rng: random.Random, kinds: tuple[str, ...] = tuple(QUESTIONS)) -> str:
    """One of the kinds, the important ones more often."""
    return rng.choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds])[0]


def draw_question(
    kind: str, words: str, attributes: dict[str, str], other: str, rng: random.Random
) -> tuple[str, str]:
    """A question of a kind, and its answer.

    Args:
        words: the sentence in plain words. attributes: of the voice; unused by kinds that are not
            in ABOUT_VOICE. other: a sentence in plain words, for words that are not said.
    """
    spoken = words.split()
    question = rng.choice(QUESTIONS[kind])
    if kind == "says":
        word = rng.choice(rng.choice((spoken, other.split())))
        return question.format(word), "yes" if word in spoken else "no"
    if kind == "first":
        return question, spoken[0]
    if kind == "last":
        return question, spoken[-1]
    if kind == "gender":
        return question, f"a {attributes['gender']}"
    if kind in VALUES:
        return question, attributes[kind]
    if kind == "describe":
        who = f"a {attributes['gender']} with a {attributes['pitch']} voice"
        return question, f"{who} says {attributes['speed']}: {words}"
    return question, words
