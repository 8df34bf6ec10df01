"""Audio files, manifests, prompts and answers as token ids.

A manifest is a JSON list with one object an item, in the format of the DIFFA release: `audio_id`,
`audio_filepath`, `input` (the instruction), `transcription`, `target` (stage 2's answer),
`dataset`, `duration` (seconds), `seed_transcript` (one line with all that is known of the clip).

Shapes: B batch, S samples, P prompt positions, G answer tokens.
"""

import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import resample

from audio.decode import AudioError, decode
from encoder import SAMPLE_RATE

MANIFEST_FIELDS = (
    "audio_id", "audio_filepath", "input", "transcription",
    "target", "dataset", "duration", "seed_transcript",
)  # fmt: skip
SYSTEM = "You are a helpful voice assistant."
TRANSCRIBE = "Please transcribe the speech."  # stage 1's instruction, where a corpus brings none
TEXT_END = "<|endoftext|>"  # ends an answer and pads it, in most families of LMs


class ManifestError(ValueError):
    """A manifest that cannot be used; the message lists every bad item."""


# Audio


def read_audio(path: str | Path, seconds: float | None = None) -> Tensor:
    """A WAV, FLAC, OGG or MP3 file as mono float samples (S,), about in [-1, 1], at 16 kHz.

    seconds: read only so much from the start; by default all, at most an hour. Raises AudioError:
    absent, not audio, incomplete, empty, silent, far too loud, or holds NaN.
    """
    limit = None if seconds is None else seconds + 0.01  # the filter needs samples after the end

    # Mono samples at the file's own rate.
    samples, rate = decode(path, limit)
    waveform = torch.from_numpy(samples)  # (S,)

    # A rate without a short ratio to 16 kHz would need a filter of gigabytes. The nearest ratio
    # with a denominator up to 640, or less above 48 kHz, changes the speed by less than 0.1 %.
    if rate != SAMPLE_RATE:
        ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(640 * 48_000 // max(rate, 48_000))
        waveform = resample(waveform, ratio.numerator, ratio.denominator)
    return waveform if seconds is None else waveform[: int(seconds * SAMPLE_RATE)]


def is_too_long(n_samples: float, context: int) -> bool:
    """Whether a clip of n_samples exceeds the encoder's context, in samples.

    An excess of up to 10 ms is allowed, since manifests round durations; pad_waveforms cuts it off.
    """
    return n_samples > context + SAMPLE_RATE // 100


def pad_waveforms(
    waveforms: list[Tensor], n_samples: int, names: list[str], cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Clips (S,) as one batch (B, n_samples), padded with zeros, and their real lengths (B,).

    n_samples: the encoder's context. names: of the clips, for errors. cut: shorten longer clips;
    otherwise they are an AudioError (`is_too_long`).
    """
    batch = torch.zeros(len(waveforms), n_samples)
    for row, waveform, name in zip(batch, waveforms, names, strict=True):
        if is_too_long(len(waveform), n_samples) and not cut:
            raise AudioError(
                f"{name}: {len(waveform) / SAMPLE_RATE:.2f} s is longer than the encoder's context "
                f"of {n_samples / SAMPLE_RATE:.2f} s; shorten it (sampler.py --cut keeps its start)"
            )
        row[: len(waveform)] = waveform[:n_samples]
    return batch, torch.tensor([min(len(waveform), n_samples) for waveform in waveforms])


# Manifests


def item_problem(item: object, folder: Path) -> str:
    """What is wrong with one item of a manifest in `folder`, or ""."""
    if not isinstance(item, dict):
        return "not an object"
    absent = [field for field in MANIFEST_FIELDS if field not in item]
    if absent:
        return f"lacks {', '.join(absent)}"

    # Every field but the duration is text that can be written as UTF-8.
    texts = [field for field in MANIFEST_FIELDS if field != "duration"]
    wrong = [field for field in texts if not isinstance(item[field], str)]
    if wrong:
        return f"{', '.join(wrong)} must be text"
    spoken = "".join(item[field] for field in texts if field != "audio_filepath")
    if any("\ud800" <= letter <= "\udfff" for letter in spoken):
        return "holds half a character (a surrogate without its pair)"

    # Also refuses NaN, infinity and numbers without end.
    seconds = item["duration"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
        return f"duration must be seconds above 0, not {str(seconds)[:20]!r}"

    file = folder / item["audio_filepath"]
    return "" if os.path.isfile(file) else f"no such file {file}"


def load_manifest(path: str | Path) -> list[dict]:
    """Items of a manifest; `audio_filepath`, relative to the manifest's folder, is made absolute.

    Raises ManifestError: not a JSON list, empty, a field twice in an item, or bad fields or absent
    files (all listed).
    """
    from checkpoints.files import refuse_twice

    path = Path(path).absolute()
    if not os.path.isfile(path):
        advice = "`make demo` makes the toy's, python -m corpora.manifests others"
        raise ManifestError(f"{path}: no such manifest; {advice}")

    # A field that stands twice in an item would silently lose a value.
    try:
        text = path.read_text(encoding="utf-8-sig")
        items = json.loads(text, object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON in UTF-8 ({error})") from error
    if not isinstance(items, list) or not items:
        raise ManifestError(f"{path}: not a JSON list with at least one item")

    # All bad items are reported at once, before long work starts.
    lines = []
    for i, item in enumerate(items):
        problem = item_problem(item, path.parent)
        if problem:
            name = f" ({item.get('audio_id', 'no audio_id')})" if isinstance(item, dict) else ""
            line = f"item {i}{name}: {problem}"
            lines.append(line.encode(errors="backslashreplace").decode())
    if lines:
        raise ManifestError(f"{path}: {len(lines)} bad items\n  " + "\n  ".join(lines))

    return [item | {"audio_filepath": str(path.parent / item["audio_filepath"])} for item in items]


# Prompts


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt on both sides of the place where the audio goes."""

    before: list[int]
    after: list[int]


def build_prompt(tokenizer, instruction: str) -> Prompt:
    """The prompt of DIFFA, the same in training and inference, in the chat format of its LM.

    With LLaDA's format (a header, two newlines, the text and `<|eot_id|>` for each turn):

        <|startoftext|> system: You are a helpful voice assistant.
        user: This is the audio:[audio embeddings] <audio>. INSTRUCTION
        assistant:

    Each half is encoded by itself, as in the release: no token may join the text on both sides of
    the audio. The literal " <audio>. " after the embeddings is a quirk of the release that its
    weights expect. The assistant's header belongs to the prompt; the release noised and scored it
    as part of the answer in training, but not in inference.

    tokenizer: with the `chat` format of its LM (checkpoints/tokenizer.py).
    """
    chat = tokenizer.chat
    before = chat.opening.replace("{system}", SYSTEM) + "This is the audio:"
    after = tokenizer.encode_text(instruction, " <audio>. ", chat.answer)
    return Prompt(tokenizer.encode(before), after)


def build_text_prompt(tokenizer, text: str) -> Prompt:
    """A user's turn of text without audio, up to where the assistant begins; `after` is empty."""
    chat = tokenizer.chat
    before = chat.opening.replace("{system}", SYSTEM)
    return Prompt(tokenizer.encode_text(text, before, chat.answer), [])


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (P_i, ...) as one batch (B, P, ...), zeros on the left, and its mask (B, P).

    With padding on the left, all prompts end, and all answers begin, at the same position.
    """
    # F.pad counts dimensions from the last one; only the first, positions, grows.
    P = max(len(row) for row in rows)
    padded = []
    for row in rows:
        other_dimensions = (0, 0) * (row.ndim - 1)
        padded.append(F.pad(row, (*other_dimensions, P - len(row), 0)))  # (P, ...)

    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)  # (B,)
    mask = torch.arange(P, device=rows[0].device) >= P - lengths[:, None]  # (B, P)
    return torch.stack(padded), mask


# Answers


def encode_answers(tokenizer, answers: list[str], length: int) -> Tensor:
    """Answers as ids (B, length), padded with end tokens; ValueError: one leaves no room for them.

    The end tokens are noised and scored like words: predicting them is how the LM learns where to
    stop (LLaDA, appendix B.1).
    """
    end = tokenizer.id(tokenizer.chat.text_end)
    rows = []
    for answer in answers:
        ids = tokenizer.encode_text(answer)
        if len(ids) >= length:
            raise ValueError(
                f"answer of {len(ids)} tokens does not fit {length} with its end: {answer[:60]!r}"
            )
        rows.append(ids + [end] * (length - len(ids)))
    return torch.tensor(rows)


def decode_answer(tokenizer, ids: list[int]) -> str:
    """Text of generated ids up to the first end of turn or of text."""
    ends = {tokenizer.id(tokenizer.chat.text_end), tokenizer.id(tokenizer.chat.turn_end)}
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(list(ids[:stop])).strip()
