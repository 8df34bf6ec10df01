"""What the pictures of the tour have in common: the model, spoken clips, tokens as a picture.

Shapes: S samples, T encoder frames, A audio embeddings, D LM width.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from data import pad_waveforms
from diffa import DIFFA
from evaluation.trace import colour
from toy import grammar
from toy.corpus import spoken_sentence
from toy.speech import ESPEAK_RATE, VOICES, speak, to_waveform, without_silence

GREY = "#d0d7de"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A spoken sentence."""

    sentence: grammar.Sentence
    attributes: grammar.Attributes
    voice: str
    rate: int  # words a minute, as eSpeak counts them
    pitch: int  # 0 to 99
    waveform: Tensor  # (S,) at 16 kHz
    words: list[tuple[str, float, float]]  # with start and end, seconds


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn."""

    model: DIFFA
    clip: Clip  # the one that the tour follows
    clips: list[Clip]  # others, for means
    data: Path  # eSpeak's


def new_clip(sentence, attributes, voice, rate, pitch, samples, marks) -> Clip:
    """A clip of what `speak` returned."""
    waveform = torch.from_numpy(to_waveform(without_silence(samples))).float()
    times = [mark / ESPEAK_RATE for mark in marks]
    words = list(zip(sentence.text.split(), times, times[1:]))
    return Clip(
        sentence=sentence,
        attributes=attributes,
        voice=voice,
        rate=rate,
        pitch=pitch,
        waveform=waveform,
        words=words,
    )


def random_clip(seed: str, data: Path) -> Clip:
    """A held-out sentence in a test voice, as in the toy corpus; the same seed, the same clip."""
    rng = random.Random(seed)
    attributes = grammar.random_attributes(rng)
    sentence, drawn, samples, marks = spoken_sentence(rng, "test", attributes, data)
    drawn = drawn["voice"], drawn["rate"], drawn["pitch_parameter"]
    return new_clip(sentence, attributes, *drawn, samples, marks)


def with_other(clip: Clip, name: str, data: Path) -> Clip:
    """A clip that differs in one attribute, or in its "words" alone; everything else stays.

    Another gender takes that gender's first test voice, which differs in more than its gender.
    Speed and pitch take the middle of their other range.
    """
    sentence = clip.sentence
    attributes = clip.attributes
    voice = clip.voice
    rate = clip.rate
    pitch = clip.pitch

    # What changes.
    if name == "words":
        n_words = len(sentence.text.split())
        sentence = grammar.random_sentence(random.Random(sentence.text), True, n_words)
    else:
        values = grammar.ATTRIBUTES[name]
        other = next(value for value in values if value != getattr(attributes, name))
        attributes = replace(attributes, **{name: other})

    # What eSpeak is given.
    if name == "gender":
        voice = VOICES["test", other][0]
    if name == "speed":
        rate = sum(grammar.SPEEDS[other]) // 2
    if name == "pitch":
        pitch = sum(grammar.PITCHES[other]) // 2
    accent = grammar.ACCENTS[attributes.accent]
    samples, marks = speak(sentence.text, f"{accent}+{voice}", rate, pitch, data)
    return new_clip(sentence, attributes, voice, rate, pitch, samples, marks)


def encode(model: DIFFA, clip: Clip) -> tuple[list[Tensor], Tensor]:
    """Hidden states (1, T, D_w) of the encoder and real frames (1,)."""
    padded, lengths = pad_waveforms(
        [clip.waveform], model.encoder.config.n_samples, [clip.sentence.text], cut=True
    )
    return model.encode(padded, lengths)


def nearest_words(model: DIFFA, clip: Clip) -> tuple[list[str], list[float]]:
    """The LM's token nearest to each semantic embedding of the clip (A), and the cosine."""
    states, frames = encode(model, clip)
    audio, mask = model.semantic(states[-1], frames)  # (1, A, D)
    tokens = torch.nn.functional.normalize(model.lm.embedding.weight, dim=-1)  # (V, D)
    heard = torch.nn.functional.normalize(audio[0, mask[0]], dim=-1)  # (A, D)
    cosines, ids = (heard @ tokens.T).max(dim=-1)
    words = [model.tokenizer.decode([i]).strip() for i in ids.tolist()]
    return words, cosines.tolist()


def mark_words(axis: Axes, clip: Clip, per_second: float, height: float) -> None:
    """Write the clip's words above an axis whose x is time, `per_second` units a second."""
    for word, start, end in clip.words:
        axis.axvline(start * per_second, color="white", lw=0.7, alpha=0.7)
        middle = (start + end) / 2 * per_second
        axis.text(middle, height, word, ha="center", va="bottom", fontsize=9)


def chip(axis: Axes, x: float, y: float, width: float, text: str, fill: str, **style) -> None:
    """A token: a text on a box (x to x + width, y to y + 1) of this colour."""
    box = FancyBboxPatch(
        (x + 0.12, y + 0.12), width - 0.24, 0.76, boxstyle="round,pad=0,rounding_size=0.15",
        fc=fill, ec="none", mutation_aspect=0.4,
    )  # fmt: skip
    axis.add_patch(box)
    style = {"color": "black" if fill == GREY else "white", "fontsize": 8} | style
    axis.text(x + width / 2, y + 0.47, text, ha="center", va="center", **style)


def chip_grid(axis: Axes, rows: list[tuple[str, list[tuple[str, str]]]], widths: list[float]):
    """Rows of tokens below each other: (label of the row, its (text, colour) in each column)."""
    for y, (label, cells) in enumerate(rows):
        axis.text(-0.4, y + 0.47, label, ha="right", va="center", fontsize=9)
        x = 0.0
        for (text, fill), width in zip(cells, widths):
            chip(axis, x, y, width, text, fill)
            x += width
    axis.set(xlim=(-0.2, sum(widths)), ylim=(len(rows), 0))
    axis.set_axis_off()


def widths_of(texts: list[str]) -> list[float]:
    """Widths of columns that hold these texts."""
    return [max(len(text), 2) * 0.42 + 0.7 for text in texts]


def confidence_colour(confidence: float) -> str:
    """As on the trace page; grey for a token that was filled in without a prediction."""
    return colour(confidence) if confidence > 0 else GREY
