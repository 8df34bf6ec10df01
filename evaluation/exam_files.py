"""Published items and predictions on disk: read, checked, resumed, written."""

import json
import os
from pathlib import Path

from checkpoints.files import whole_file
from evaluation.exam_rules import EXAMS, Exam, ExamError


def load_items(path: Path, exam: Exam, answered: bool = False) -> list[dict]:
    """Items of an exam's file, a JSON list or JSONL; answered: of a file of predictions.

    Raises ExamError: no such file, not JSON, no item, or bad items, all of which are listed.
    """
    if not path.is_file():
        raise ExamError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return parse_items(path, path.read_bytes(), exam, answered)


def parse_items(path: Path, content: bytes, exam: Exam, answered: bool) -> list[dict]:
    """Items in the content of a file; raises ExamError as `load_items`."""
    items = parse_json(path, content)

    # Every item is checked, so that one run lists all problems.
    problems = []
    ids = set()
    for i, item in enumerate(items):
        problem = question_problem(item, exam, answered)
        if not problem and item[exam.id_field] in ids:
            problem = f"a second item with this {exam.id_field}"
        if not problem:
            ids.add(item[exam.id_field])
            continue
        name = "no object"
        if isinstance(item, dict):
            name = item.get(exam.id_field, f"no {exam.id_field}")
        problems.append(f"item {i} ({name}): {problem}")

    # A file of which nothing fits may be another exam's.
    if len(problems) == len(items):
        for other in EXAMS.values():
            if other.name != exam.name and not question_problem(items[0], other, answered):
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


def question_problem(item: object, exam: Exam, answered: bool) -> str:
    """Why an item cannot be used, "" when it can. answered: it must hold a reply."""
    if not isinstance(item, dict):
        return "not an object"

    # Each field is there. A reply in one of the exam's reply fields is enough.
    required = tuple(dict.fromkeys((exam.id_field, exam.audio_field, *exam.text_fields)))
    absent = [field for field in required if field not in item]
    if answered and not any(field in item for field in exam.reply_fields):
        absent.append(" or ".join(exam.reply_fields))
    if absent:
        return f"lacks {', '.join(absent)}"

    # Each field is text, but "choices" is a list of texts and an id may be a number.
    not_text = []
    for field in required + (exam.reply_fields if answered else ()):
        value = item.get(field, "")
        if field == "choices":
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                return "choices is not a list of texts"
        elif not isinstance(value, str | int if field == "id" else str):
            not_text.append(field)
    if not_text:
        return f"{', '.join(not_text)} is not text"

    # It can be written and marked. Better to know now than after hours of answering.
    try:
        json.dumps(item, ensure_ascii=False).encode()
        if exam.mark:
            exam.mark(item, "")
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate such as \\ud83d)"
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


# ---- predictions
def without_reply(item: dict, exam: Exam) -> dict:
    """The item as it was published."""
    return {field: value for field, value in item.items() if field not in exam.reply_fields}


def resume_predictions(path: Path, exam: Exam, items: list[dict]) -> dict[str | int, dict]:
    """Predictions by id that a stopped run left in a JSONL; an unfinished last line is cut off.

    Raises ExamError: they are predictions of other items.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = parse_items(path, whole, exam, answered=True) if whole else []

    published = {item[exam.id_field]: without_reply(item, exam) for item in items}
    done = {}
    for i, row in enumerate(rows):
        name = row[exam.id_field]
        if published.get(name) != without_reply(row, exam):
            raise ExamError(
                f"{path}: item {i} ({name}) is not an item of the exam's file; "
                "give another --out, or delete it"
            )
        done[name] = row

    # Only now, after all checks: the file may be something else than predictions.
    os.truncate(path, len(whole))
    return done


def write_predictions(path: Path, exam: Exam, rows: list[dict]) -> None:
    """Write predictions in the exam's order and format, as a whole or not at all."""
    lines = [json.dumps(row) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if exam.as_list else "\n".join(lines) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
