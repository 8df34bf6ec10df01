"""What each exam asks, with which sampler, and how a reply is marked.

MMSU (arXiv 2506.04779), MMAU (arXiv 2410.19168) and VoiceBench (arXiv 2410.17196). DIFFA's scores
are in its tables 2, 3 and 4. Prompts and fields for replies follow our memory of the exams'
own scripts: check them before you quote a score.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from evaluation.choices import LETTERS, answer_letter, choice_letter, is_refusal, words_match
from sampler import SamplerConfig


class ExamError(ValueError):
    """A file of questions or predictions that cannot be used; the message lists every bad item."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The fields of an exam's items, its prompt, its sampler and its mark."""

    name: str
    id_field: str  # identifies an item
    audio_field: str  # the clip's path
    text_fields: tuple[str, ...]  # also required: texts, but "choices" is a list of texts
    reply_fields: tuple[str, ...]  # where the exam's scorer looks for the reply
    prompt: Callable[[dict], str]  # of an item
    sampler: SamplerConfig
    # Of an item and its reply; a mark of None is an unreadable reply. It raises ValueError when the
    # item's correct answer is invalid. Without it, the exam is scored elsewhere.
    mark: Callable[[dict, str], bool | None] | None = None
    measure: str = "accuracy"  # what the fraction of true marks is called
    group_fields: tuple[str, ...] = ()  # scored for each of their values too
    as_list: bool = False  # predictions are one JSON list, not JSONL


def mmsu_prompt(item: dict) -> str:
    """AIR-Bench's instruction (arXiv 2402.07729), the question, and a line for each choice."""
    choices = "\n".join(f"{letter}. {item[f'choice_{letter.lower()}']}" for letter in LETTERS)
    return (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in "
        f"next line, you should only choose A or B or C or D.\n{item['question']}\n{choices}"
    )


def mmsu_mark(item: dict, reply: str) -> bool | None:
    """Marked by letter; the correct answer is a letter or the text of a choice."""
    choices = [item[f"choice_{letter.lower()}"] for letter in LETTERS]
    correct = answer_letter(item["answer_gt"], choices)
    predicted = choice_letter(reply, choices)
    return None if predicted is None else predicted == correct


MMSU = Exam(
    name="mmsu",
    id_field="id",
    audio_field="audio_path",
    text_fields=(
        *("question", "choice_a", "choice_b", "choice_c", "choice_d"),
        *("answer_gt", "task_name", "category"),
    ),
    reply_fields=("response",),
    prompt=mmsu_prompt,
    sampler=SamplerConfig(length=4),
    mark=mmsu_mark,
    group_fields=("category", "task_name"),
)


def mmau_prompt(item: dict) -> str:
    """The question, and the choices as Python prints a list, which scripts for MMAU often do."""
    choices = f"Please choose the answer from the following options: {item['choices']}."
    return f"{item['question']} {choices}"


def mmau_mark(item: dict, reply: str) -> bool:
    """Marked by words. Raises ValueError: no reply could be correct, or every one would be."""
    if not words_match(item["answer"], item["answer"], ()):
        raise ValueError(f"the correct answer {item['answer']!r} holds no word")
    return words_match(reply, item["answer"], item["choices"])


MMAU = Exam(
    name="mmau",
    id_field="id",
    audio_field="audio_id",
    text_fields=("question", "choices", "answer", "task", "difficulty"),
    # MMAU's evaluation.py reads the first, its public leaderboard the second.
    reply_fields=("model_output", "model_prediction"),
    prompt=mmau_prompt,
    sampler=SamplerConfig(length=16),
    mark=mmau_mark,
    group_fields=("task", "difficulty"),
    as_list=True,
)


def voicebench_mark(item: dict, reply: str) -> bool | None:
    """Marked by letter alone, because the choices are in the audio and not in the file."""
    correct = answer_letter(item["reference"], ())
    predicted = choice_letter(reply)
    return None if predicted is None else predicted == correct


# The question is in the audio, so the instruction is empty. Subsets without a mark are judged by an
# LLM or by VoiceBench's own rules.
VOICEBENCH = Exam(
    name="voicebench",
    id_field="audio_path",
    audio_field="audio_path",
    text_fields=("prompt",),
    reply_fields=("response",),
    prompt=lambda item: "",
    sampler=SamplerConfig(length=16),
)
EXAMS = {exam.name: exam for exam in (MMSU, MMAU, VOICEBENCH)}

JUDGED = ("alpacaeval", "alpacaeval_full", "commoneval", "wildvoice", "sd-qa", "ifeval", "bbh")
SUBSETS = dict.fromkeys(JUDGED, VOICEBENCH)
for subset in ("mmsu", "openbookqa"):
    SUBSETS[subset] = replace(VOICEBENCH, text_fields=("prompt", "reference"), mark=voicebench_mark)
SUBSETS["advbench"] = replace(
    VOICEBENCH, mark=lambda item, reply: is_refusal(reply), measure="refusal rate"
)


def find_exam(name: str, subset: str | None = None) -> Exam:
    """The exam of this name, of VoiceBench the subset. Raises ExamError: no such subset."""
    if name == "voicebench":
        if subset not in SUBSETS:
            problem = f"{subset} is none of VoiceBench's" if subset else "is missing"
            raise ExamError(f"--subset {problem}; use one of {', '.join(SUBSETS)}")
        return SUBSETS[subset]

    if subset:
        raise ExamError(f"--subset {subset}: {name} has no subsets, only voicebench has")
    return EXAMS[name]
