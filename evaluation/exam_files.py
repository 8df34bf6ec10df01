"""Published items and predictions on disk: read, checked, resumed, written."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from checkpoints.files import whole_file
from evaluation.answer_files import whole_lines
from evaluation.exam_rules import EXAMS, Exam, ExamError


def load_items(path: Path, exam: Exam, answered: bool = False) -> list[dict]:
    """Items of an exam's file, a JSON list or JSONL; answered: of a file of predictions.

    Raises ExamError: no such file, not JSON, no item, or bad items, all of which are listed.
    """
    if not path.is_file():
        raise ExamError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return parse_items(path, path.read_bytes(), exam, answered)


def join_items(paths: Sequence[Path], exam: Exam) -> list[dict]:
    """The questions of one or several files. Raises ExamError: as load_items, or an id twice."""
    items = []
    origin = {}
    for path in paths:
        for item in load_items(path, exam):
            name = item[exam.id_field]
            if name in origin:
                raise ExamError(f"{path}: {exam.id_field} {name} is also in {origin[name]}")
            items.append(item)
        origin |= {item[exam.id_field]: path for item in items}
    return items


def refuse_shared(paths: Sequence[Path], parts: list[list[dict]], exam: Exam) -> None:
    """Raise ExamError when files of predictions would count one twice.

    That is the same file, or an id in two. VoiceBench has no ids: the paths of its clips may be the
    same in several splits.
    """
    origin = {}
    for path, part in zip(paths, parts, strict=True):
        names = {f"all ({file_hash(path)})"}
        if exam.id_field != exam.audio_field:
            names |= {
                f"{exam.id_field} {row[exam.id_field]}" for row in part if exam.id_field in row
            }
        shared = sorted(names & origin.keys())
        if shared:
            also = f"{shared[0]} is also in {origin[shared[0]]}"
            raise ExamError(f"{path}: {also}; score each item once")
        origin |= dict.fromkeys(names, path)


def file_hash(path: Path) -> str:
    """The first 16 digits of a file's SHA-256, which name the version of an exam."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def parse_items(path: Path, content: bytes, exam: Exam, answered: bool) -> list[dict]:
    """Items in the content of a file; raises ExamError as `load_items`."""
    items = parse_json(path, content)

    # Every item is checked, so that one run lists all problems.
    problems = []
    ids = set()
    for i, item in enumerate(items):
        problem = item_problem(item, exam, answered)
        if not problem and exam.id_field in item:
            if item[exam.id_field] in ids:
                problem = f"a second item with this {exam.id_field}"
            ids.add(item[exam.id_field])
        if problem:
            name = "no object"
            if isinstance(item, dict):
                name = item.get(exam.id_field, f"no {exam.id_field}")
            problems.append(f"item {i} ({name}): {problem}")

    # One reply that is missing is counted; a file without any holds questions.
    fields = exam.reply_fields
    if answered and not problems and not any(f in item for item in items for f in fields):
        problems.append(f"no item has a reply; each lacks {' and '.join(fields)}")

    # A file of which nothing fits may be another exam's.
    if len(problems) == len(items):
        for other in EXAMS.values():
            if other.name != exam.name and not item_problem(items[0], other, answered):
                problems.append(f"this looks like a file of {other.name}")
                break
    if problems:
        raise ExamError(f"{path}: cannot be used as {exam.name}\n  " + "\n  ".join(problems))
    return items


def parse_json(path: Path, content: bytes) -> list:
    """Values of a JSON list or of a JSONL's lines. Raises ExamError: not JSON, or no value."""
    values = []
    place = ""
    try:
        text = content.decode("utf-8-sig")  # whatever the locale; a byte order mark is left out
        if text.lstrip().startswith("["):
            values = json.loads(text)
        else:
            # Not splitlines, which breaks at characters that JSON allows within a text.
            for number, line in enumerate(text.split("\n"), start=1):
                place = f"line {number} is "
                if line.strip():
                    values.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise ExamError(f"{path}: not a text file in UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise ExamError(f"{path}: {place}not valid JSON ({error})") from None

    if not values:
        raise ExamError(f"{path}: holds no item")
    return values


def is_text(value: object) -> bool:
    """Whether a value is text, or a number, which exams write in place of text."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def item_problem(item: object, exam: Exam, answered: bool) -> str:
    """Why an item cannot be used, "" when it can. answered: it is only marked."""
    if not isinstance(item, dict):
        return "not an object"

    # Each field is there. What was answered elsewhere may lack its sound and its id.
    required = exam.text_fields
    if not answered:
        required = (*dict.fromkeys((exam.id_field, exam.audio_field)), *required)
    absent = [field for field in required if field not in item]
    if absent:
        return f"lacks {', '.join(absent)}"

    # Each field is text, but "choices" is a list of texts, and a reply may be null.
    checked = {field: item[field] for field in (*required, exam.id_field) if field in item}
    for field in exam.reply_fields if answered else ():
        if item.get(field) is not None and not isinstance(item[field], str):
            return f"{field} is not text"
    choices = checked.pop("choices", [])
    if not isinstance(choices, list) or not all(map(is_text, choices)):
        return "choices is not a list of texts"
    not_text = [field for field, value in checked.items() if not is_text(value)]
    if not isinstance(item.get(exam.audio_field, ""), str) and exam.audio_field not in not_text:
        not_text.append(exam.audio_field)
    if not_text:
        return f"{', '.join(not_text)} is not text"

    # It can be written and marked. Better to know now than after hours of answering.
    try:
        json.dumps(item, ensure_ascii=False).encode()
        exam.check(item)
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate such as \\ud83d)"
    except (ValueError, RecursionError) as error:
        return str(error)
    return "has no choice" if exam.choices and not answered and not exam.choices(item) else ""


# ---- predictions
def reply_of(row: dict, exam: Exam) -> str | None:
    """The reply, in the first of the exam's reply fields that has one; None: null or absent."""
    replies = [row[field] for field in exam.reply_fields if row.get(field) is not None]
    return replies[0] if replies else None


def without_reply(item: dict, exam: Exam) -> dict:
    """The item as it was published."""
    return {field: value for field, value in item.items() if field not in exam.reply_fields}


def resume_predictions(path: Path, exam: Exam, items: list[dict]) -> dict[str | int, dict]:
    """Predictions by id that a stopped run left in a JSONL, those of skipped items left out.

    Raises ExamError: they are predictions of other items.
    """
    whole = whole_lines(path)
    rows = parse_items(path, whole, exam, answered=True) if whole else []

    published = {item[exam.id_field]: without_reply(item, exam) for item in items}
    done = {}
    for i, row in enumerate(rows):
        name = row.get(exam.id_field)
        if published.get(name) != without_reply(row, exam):
            raise ExamError(
                f"{path}: item {i} ({name}) is not an item of the exam's file; "
                "give another --out, or delete it"
            )
        if reply_of(row, exam) is not None:
            done[name] = row
    return done


def write_predictions(path: Path, exam: Exam, rows: list[dict]) -> None:
    """Write predictions in the exam's order and format, as a whole or not at all."""
    lines = [json.dumps(row) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if exam.as_list else "\n".join(lines) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
