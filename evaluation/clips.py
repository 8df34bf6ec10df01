"""Answers about many clips: in Python (DIFFA.answer), and as a JSONL that grows and resumes.

Shapes: B clips, A audio embeddings, D LM width, S samples.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from checkpoints.command_line import is_blank, settings_of
from data import Prompt, build_prompt, load_manifest, pad_waveforms, read_audio
from diffa import DIFFA
from evaluation.answer_files import answer_missing
from sampler import Answer, SamplerConfig, answer
from training.states import Read, read_padded

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")  # of audio files in a folder
USUAL_LENGTH = 24  # tokens of an answer, where the adapters do not record theirs
# The rule that uses an option.
RULE_OF = {"steps": "count"} | {name: name for name in ("threshold", "factor", "frechet")}
OWN = "-"  # as a question: the `input` of each item of a manifest

# Options that do not decide an answer, and so may change when a file of answers is resumed.
NO_SETTINGS = ("clip", "question", "also", "out", "trace", "device", "batch", "compile")


def hear_clips(
    model: DIFFA, waveforms: list[Tensor], names: list[str], cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Audio embeddings (B, A, D) and mask (B, A) of clips (S,) at 16 kHz.

    names: of the clips, for errors. cut: shorten clips that are too long. Raises AudioError: a clip
    is longer than the encoder's window, and cut is false.
    """
    n_samples = model.encoder.config.n_samples
    padded, lengths = pad_waveforms(waveforms, n_samples, names, cut)
    return model.hear(*model.encode(padded.to(model.device), lengths.to(model.device)))


def answer_clips(
    model: DIFFA,
    clips: str | Path | Tensor | Sequence[str | Path | Tensor],
    questions: str | Sequence[str],
    *,
    batch: int = 16,
    cut: bool = False,
    **settings,
) -> list[str]:
    """The answer to a question about each clip, as text, in the order of the clips.

    Args:
        clips: paths of audio files, or waveforms: float (S,), mono at 16 kHz, about in [-1, 1].
        questions: one for all clips, or one for each.
        batch: clips answered at once. cut: use the start of clips that are too long.
        settings: fields of SamplerConfig. By default the threshold rule, or the rule of the setting
            that is given, and the length of the answers that the adapters were trained with.
    Raises:
        AudioError: a clip cannot be read, or is too long. ValueError: unequal numbers of clips and
        questions, an empty question, or an impossible setting.
    """
    clips = [clips] if isinstance(clips, str | Path | Tensor) else list(clips)
    questions = [questions] * len(clips) if isinstance(questions, str) else list(questions)
    if len(clips) != len(questions):
        raise ValueError(f"{len(clips)} clips and {len(questions)} questions; give one for each")
    if any(map(is_blank, questions)):
        raise ValueError("a question is empty")
    rule = next((rule for name, rule in RULE_OF.items() if name in settings), "threshold")
    length = model.answer_length or USUAL_LENGTH
    config = SamplerConfig(**({"length": length, "rule": rule} | settings))

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        names = [
            f"clip {i}" if isinstance(clip, Tensor) else str(clip) for i, clip in enumerate(clips)
        ]
        waveforms = [
            clip.float() if isinstance(clip, Tensor) else read_audio(clip) for clip in clips[rows]
        ]
        return hear_clips(model, waveforms, names[rows], cut)

    prompts = [build_prompt(model.tokenizer, question) for question in questions]
    answers = answer(model.lm, model.tokenizer, prompts, hear, config, batch=batch)
    return [a.text for a in answers]


# A file of answers


@dataclass(frozen=True)
class Question:
    """A question about the audio file `clip`."""

    clip: str
    question: str

    @property
    def id(self) -> str:
        return f"{self.clip}: {self.question}"


def find_questions(paths: list[str], questions: list[str]) -> list[Question]:
    """Each question about each clip, once.

    Args:
        paths: audio files; folders, for all audio files below them by name; manifests (.json).
        questions: OWN stands for the `input` of each item of the manifests.
    Raises:
        ManifestError: a manifest that cannot be used. ValueError: a folder without audio files, or
        OWN without a manifest.
    """
    found = []
    for path in paths:
        # Clips, each with the question of its own.
        if path.endswith(".json"):
            clips = [(item["audio_filepath"], item["input"]) for item in load_manifest(path)]
        elif Path(path).is_dir():
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            clips = [(str(file), "") for file in files if file.suffix.lower() in SUFFIXES]
            if not clips:
                raise ValueError(f"{path}: holds no audio file ({', '.join(SUFFIXES)})")
        else:
            clips = [(path, "")]

        for clip, own in clips:
            for question in questions:
                if question == OWN and is_blank(own):
                    problem = "asks a manifest's questions"
                    if path.endswith(".json"):
                        problem = "has nothing to ask, for the `input` of an item is empty"
                    raise ValueError(f"{path}: {OWN!r} {problem}; ask your own")
                found.append(Question(clip, own if question == OWN else question))
    return list(dict.fromkeys(found))


def answers_or_errors(
    model: DIFFA,
    prompts: list[Prompt],
    read: Callable[[slice, int], Read],
    config: SamplerConfig,
    batch: int,
) -> Iterator[Answer | str]:
    """The answer to each prompt about its clip, or why the clip cannot be read, in their order.

    read: (rows of the prompts, samples of the encoder's window) -> their clips, as
    training.states.read_padded gives them. The sound of a batch is read when its turn comes.
    """
    errors: list[str] = []  # of the clips heard so far

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        waveforms, n_samples, found = read(rows, model.encoder.config.n_samples)
        errors.extend(found)
        return model.hear(*model.encode(waveforms.to(model.device), n_samples.to(model.device)))

    replies = answer(model.lm, model.tokenizer, prompts, hear, config, batch=batch)
    for i, reply in enumerate(replies):
        yield errors[i] or reply


def answered_rows(
    model: DIFFA, questions: list[Question], config: SamplerConfig, batch: int, cut: bool
) -> Iterator[dict]:
    """A row with the answer to each question; where a clip cannot be read, with the error."""

    def read(rows: slice, n_samples: int) -> Read:
        return read_padded([question.clip for question in questions[rows]], n_samples, cut)

    prompts = [build_prompt(model.tokenizer, question.question) for question in questions]
    replies = answers_or_errors(model, prompts, read, config, batch)
    for asked, reply in zip(questions, replies, strict=True):
        row = {"id": asked.id, "clip": asked.clip, "question": asked.question}
        if isinstance(reply, str):
            yield row | {"error": reply}
        else:
            counts = {"calls": reply.calls, "tokens": reply.n_tokens}
            yield row | {"answer": reply.text} | counts


def answer_to_file(
    args: argparse.Namespace,
    questions: list[Question],
    load_model: Callable[[], tuple[DIFFA, SamplerConfig]],
) -> int:
    """Append the answers that the JSONL `args.out` lacks; see evaluation/answer_files.py.

    load_model: called only when an answer is missing. Returns the number of clips that could not be
    read. Raises ValueError: the file holds other answers, or was made with other settings.
    """
    config = None

    def load() -> DIFFA:
        nonlocal config
        model, config = load_model()
        return model

    def answer_rows(model: DIFFA, indices: list[int]) -> Iterator[dict]:
        pending = [questions[i] for i in indices]
        return answered_rows(model, pending, config, args.batch, args.cut)

    made_by = {name: str(value) for name, value in vars(args).items() if name not in NO_SETTINGS}
    made_by |= settings_of(args)
    made_by["append"] = str(bool(args.append))  # older records have False for the LM's own way
    rows = answer_missing(
        args.out,
        [question.id for question in questions],
        range(len(questions)),
        args.batch,
        made_by=made_by,
        load_model=load,
        answer_rows=answer_rows,
    )
    return len({row["clip"] for row in rows if "error" in row})
