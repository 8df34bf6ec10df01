"""A model answers the questions of an exam, batch by batch; each reply is written at once."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data import build_prompt
from diffa import DIFFA
from encoder import SAMPLE_RATE
from evaluation.answer_files import appending, pending_batches
from evaluation.clips import hear_clips
from evaluation.exam_clips import ExamClip
from evaluation.exam_rules import Exam, ExamError
from evaluation.likelihood import MEASURES, choose
from sampler import answer


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """How an exam is taken."""

    template: str  # of the prompts
    by: str = "generation"  # or one of MEASURES: how a choice is made
    batch: int = 8  # items at once
    skip_missing: bool = False  # go on without the items whose clip cannot be used


@dataclass(frozen=True, kw_only=True)
class Question:
    """An item that is put to the model."""

    name: str | int
    item: dict
    prompt: str
    clip: ExamClip


def replies(model: DIFFA, exam: Exam, questions: list[Question], sitting: Sitting) -> Iterator[str]:
    """The model's reply to each question. Clips longer than the encoder's window are cut to it."""

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        clips = [question.clip for question in questions[rows]]
        names = [str(clip.path) for clip in clips]
        return hear_clips(model, [clip.waveform for clip in clips], names, cut=True)

    prompts = [build_prompt(model.tokenizer, question.prompt) for question in questions]
    inputs = (model.lm, model.tokenizer, prompts, hear)
    if sitting.by in MEASURES:
        candidates = [exam.candidates(question.item) for question in questions]
        yield from choose(*inputs, candidates, sitting.by, batch=sitting.batch)
    else:
        for reply in answer(*inputs, exam.sampler, batch=sitting.batch):
            yield reply.text


def answer_questions(
    model: DIFFA, exam: Exam, questions: list[Question], done: dict, lines: Path, sitting: Sitting
) -> None:
    """Answer the questions that are not done yet.

    Args:
        done: predictions by id; each new one is added. lines: a JSONL to which it is appended.
    Raises:
        ExamError: a question does not fit the LM; the items of its batch are named.
    """
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].clip.waveform), i))
    is_done = [question.name in done for question in questions]
    pending = [questions[i] for i in pending_batches(order, is_done, sitting.batch)]

    # Replies are appended as they come, those already there excepted.
    n_answered = 0
    bar = tqdm(
        total=len(questions), initial=sum(is_done), desc=exam.name, unit=" items", disable=None
    )
    with bar, appending(lines) as append:
        try:
            for question, reply in zip(pending, replies(model, exam, pending, sitting)):
                n_answered += 1
                if question.name in done:
                    continue
                row = question.item | dict.fromkeys(exam.reply_fields, reply)
                append(row)
                done[question.name] = row
                bar.update()
        except ValueError as error:
            failed = pending[n_answered : n_answered + sitting.batch]
            names = ", ".join(str(question.name) for question in failed)
            raise ExamError(f"among items {names}: {error}") from None


def report_cut(model: DIFFA, questions: list[Question]) -> None:
    """Say how many clips are cut: Whisper hears no more than its window."""
    window = model.encoder.config.n_samples
    n_cut = sum(len(question.clip.waveform) > window for question in questions)
    if n_cut:
        print(
            f"{n_cut} of {len(questions)} clips are longer than the encoder's window: "
            f"only the first {window / SAMPLE_RATE:g} s are heard",
            file=sys.stderr,
        )
