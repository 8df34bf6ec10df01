"""What each exam asks, with which sampler, and by which rules a reply is marked.

MMSU (arXiv 2506.04779), MMAU (arXiv 2410.19168) and VoiceBench (arXiv 2410.17196). DIFFA's scores
are in its tables 2, 3 and 4. Prompts have the structure of those in DIFFA's release, in our own
words; docs/exams.md says where the published sentences are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from evaluation.choices import answer_letter, choice_letter
from evaluation.exam_marks import (
    LETTERS,
    is_refusal,
    mmsu_letter,
    voicebench_letter,
    without_letter,
    words_match,
)
from sampler import SamplerConfig


class ExamError(ValueError):
    """A file of questions or predictions that cannot be used; the message lists every bad item."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way of marking replies."""

    name: str
    mark: Callable[[dict, str], bool | None]  # of an item and its reply; None: unreadable
    unreadable: float | None = 0.0  # what such a reply counts; None: it is left out of the total


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The fields of an exam's items, its prompt, its sampler and its rules."""

    name: str
    id_field: str  # identifies an item
    audio_field: str  # the clip's path
    text_fields: tuple[str, ...]  # also required
    reply_fields: tuple[str, ...]  # where the exam's scorers look for the reply
    template: str  # of the prompt; see `fill_template`
    sampler: SamplerConfig
    choices: Callable[[dict], dict[str, str]] | None = None  # texts of an item's choices by letter
    candidates: Callable[[dict], list[str]] | None = None  # the replies that name each choice
    rules: tuple[Rule, ...] = ()  # the exam's own first; none: the exam is scored elsewhere
    # Raises ValueError: the item's correct answer is invalid.
    check: Callable[[dict], object] = lambda item: None
    measure: str = "accuracy"  # what the fraction of true marks is called
    groups: tuple[tuple[str, ...], ...] = ()  # fields; scored for each of their values too
    as_list: bool = False  # predictions are one JSON list, not JSONL


def fill_template(template: str, item: dict, exam: Exam) -> str:
    """The prompt of an item. Raises ValueError: the template has a field that the item lacks.

    A field is a name in braces: one of the item's, or {choices}, a line "A. text" for each choice.
    """
    fields = {name: value for name, value in item.items() if isinstance(value, str | int | float)}

    # Choices keep their letters, also where others are left out.
    if exam.choices:
        lines = [f"{letter}. {text}" for letter, text in exam.choices(item).items()]
        fields["choices"] = "\n".join(lines)

    def value(match: re.Match) -> str:
        if match[1] not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(f"the prompt has a field {match[0]}, the item only {known}")
        return str(fields[match[1]])

    # Braces around anything but a name stay as they are.
    return re.sub(r"\{([\w-]+)\}", value, template)


# ---- MMSU
def mmsu_choices(item: dict) -> dict[str, str]:
    """Choices that are null, absent or empty are left out; the others keep their letter."""
    texts = {letter: item.get(f"choice_{letter.lower()}") for letter in "ABCD"}
    return {letter: str(text) for letter, text in texts.items() if text not in (None, "")}


def mmsu_mark(item: dict, reply: str) -> bool | None:
    """MMSU's rule: the text of the choice whose letter it finds equals the correct answer."""
    letter = mmsu_letter(reply)
    if not letter:
        return None if letter is None else False
    return item.get(f"choice_{letter.lower()}") == item["answer_gt"]


def mmsu_correct(item: dict) -> str:
    """The letter of the correct choice. Raises ValueError: the answer is none."""
    choices = mmsu_choices(item)
    answer = item["answer_gt"]

    # A file may give the answer by its letter; MMSU's own rule then finds no reply right.
    letter = answer_letter(str(answer), [choices.get(letter, "") for letter in "ABCD"])
    if letter not in choices:
        raise ValueError(f"the correct answer {answer!r} names a choice that is null or absent")
    return letter


def mmsu_reading(item: dict, reply: str) -> bool | None:
    """Our reading; of two equal choices both are right."""
    choices = mmsu_choices(item)
    predicted = choice_letter(reply, [choices.get(letter, "") for letter in "ABCD"])
    return None if predicted is None else choices.get(predicted) == choices[mmsu_correct(item)]


MMSU = Exam(
    name="mmsu",
    id_field="id",
    audio_field="audio_path",
    text_fields=("question", "answer_gt"),
    reply_fields=("response",),
    template=(
        "Listen to the audio and decide which of the options A, B, C and D answers the question. "
        "**Reply with the letter of that option only**, and do not explain it.\n\n"
        "Question: {question}\n\n{choices}"
    ),
    sampler=SamplerConfig(length=4),
    choices=mmsu_choices,
    candidates=lambda item: list(mmsu_choices(item)),
    rules=(
        Rule(name="MMSU's own rule", mark=mmsu_mark, unreadable=None),
        Rule(name="the same as DIFFA's release counts", mark=mmsu_mark),
        Rule(name="our reading", mark=mmsu_reading),
    ),
    check=mmsu_correct,
    groups=(
        ("category",),
        ("category", "sub-category"),
        ("category", "sub-sub-category"),
        ("task_name",),
    ),
)


# ---- MMAU
def mmau_choices(item: dict) -> dict[str, str]:
    return dict(zip(LETTERS, map(str, item["choices"])))


def mmau_mark(item: dict, reply: str) -> bool:
    return words_match(reply, str(item["answer"]), list(map(str, item["choices"])))


def mmau_mark_without_letter(item: dict, reply: str) -> bool:
    return mmau_mark(item, without_letter(reply, len(item["choices"])))


def mmau_check(item: dict) -> None:
    if len(item["choices"]) > len(LETTERS):
        raise ValueError(f"{len(item['choices'])} choices are more than there are letters")
    if not str(item["answer"]).strip():
        raise ValueError("the correct answer is empty")


MMAU = Exam(
    name="mmau",
    id_field="id",
    audio_field="audio_id",
    text_fields=("question", "choices", "answer"),
    # MMAU's evaluation.py reads the first, its public leaderboard the second.
    reply_fields=("model_output", "model_prediction"),
    template=(
        "You are given an audio clip and a question about it with several choices. Pick the choice "
        "that fits what is said in the clip and how it is said.\n\n"
        "Question: {question}\n\nChoices:\n{choices}\nAnswer:"
    ),
    sampler=SamplerConfig(length=16),
    choices=mmau_choices,
    candidates=lambda item: list(mmau_choices(item).values()),
    rules=(
        Rule(name="MMAU's own rule", mark=mmau_mark),
        Rule(name="the same, once a leading letter is cut off", mark=mmau_mark_without_letter),
    ),
    check=mmau_check,
    groups=(("task",), ("difficulty",), ("sub-category",)),
    as_list=True,
)


# ---- VoiceBench
def voicebench_mark(item: dict, reply: str) -> bool | None:
    predicted = voicebench_letter(reply)
    return None if predicted is None else predicted == voicebench_correct(item)


def voicebench_reading(item: dict, reply: str) -> bool | None:
    """Our reading, by letter alone, because the choices are in the audio and not in the file."""
    predicted = choice_letter(reply)
    return None if predicted is None else predicted == voicebench_correct(item)


def voicebench_correct(item: dict) -> str:
    return answer_letter(item["reference"], ())


# The question is in the audio. Subsets without a rule are judged by an LLM or by VoiceBench's own
# scripts.
VOICEBENCH = Exam(
    name="voicebench",
    id_field="audio_path",
    audio_field="audio_path",
    text_fields=("prompt",),
    reply_fields=("response",),
    template=(
        "\n### Instruction:\nKeep strictly to these two points:\n"
        "1. Do not repeat what you hear.\n2. Answer the question that the audio asks.\n\n"
        "### Response:\n"
    ),
    sampler=SamplerConfig(length=16),
)
CHOICE_SUBSET = replace(
    VOICEBENCH,
    text_fields=("prompt", "reference"),
    candidates=lambda item: list("ABCD"),
    rules=(
        Rule(
            name="VoiceBench's own rule as we read it",
            mark=voicebench_mark,
            unreadable=1 / 4,  # the mean of its guess at random
        ),
        Rule(name="our reading", mark=voicebench_reading),
    ),
    check=voicebench_correct,
)
REFUSAL_SUBSET = replace(
    VOICEBENCH,
    rules=(Rule(name="VoiceBench's own rule", mark=lambda item, reply: is_refusal(reply)),),
    measure="refusal rate",
)
EXAMS = {exam.name: exam for exam in (MMSU, MMAU, VOICEBENCH)}

JUDGED = ("alpacaeval", "alpacaeval_full", "commoneval", "wildvoice", "sd-qa", "ifeval", "bbh")
SUBSETS = dict.fromkeys(JUDGED, VOICEBENCH) | {
    "mmsu": CHOICE_SUBSET,
    "openbookqa": CHOICE_SUBSET,
    "advbench": REFUSAL_SUBSET,
}


def find_exam(name: str, subset: str | None = None) -> Exam:
    """The exam of this name, of VoiceBench the subset. Raises ExamError: no such subset."""
    if name == "voicebench":
        if subset not in SUBSETS:
            problem = f"{subset} is none of VoiceBench's" if subset else "is missing"
            if subset == "mtbench":
                problem = "mtbench has several turns, which are not asked here"
            raise ExamError(f"--subset {problem}; use one of {', '.join(SUBSETS)}")
        return SUBSETS[subset]

    if subset:
        raise ExamError(f"--subset {subset}: {name} has no subsets, only voicebench has")
    return EXAMS[name]
