"""The score of an exam, counted from its file of predictions."""

from collections import Counter
from pathlib import Path

from evaluation.exam_rules import Exam


def count_marks(exam: Exam, rows: list[dict]) -> dict:
    """Counts of true marks among predictions.

    Returns: {"all": (true, items), "unreadable": n}, and for each of the exam's group fields
    {value: (true, items)}.
    """
    # The reply stands in the first of the exam's reply fields that the row has.
    marks = []
    for row in rows:
        reply = next(row[field] for field in exam.reply_fields if field in row)
        marks.append(exam.mark(row, reply))

    # An unreadable reply counts as wrong.
    counts = {"all": (sum(map(bool, marks)), len(rows)), "unreadable": marks.count(None)}
    for field in exam.group_fields:
        n_items = Counter(row[field] for row in rows)
        n_true = Counter(row[field] for row, mark in zip(rows, marks) if mark)
        counts[field] = {value: (n_true[value], n) for value, n in sorted(n_items.items())}
    return counts


def score_lines(exam: Exam, rows: list[dict], file: Path) -> list[str]:
    """The scores of a file of predictions as lines of text, or who can score it."""
    if exam.mark is None:
        judges = "VoiceBench's own api_judge.py and evaluate.py"
        return [f"{file}: {len(rows)} items; not scored here: this subset is for {judges}"]

    counts = count_marks(exam, rows)
    n_true, n_items = counts["all"]
    lines = [f"{file}: {n_items} items, {exam.measure} {100 * n_true / n_items:.2f} %"]
    if counts["unreadable"]:
        n = counts["unreadable"]
        lines.append(f"replies that name no choice, or several, and count as wrong: {n}")

    for field in exam.group_fields:
        lines.append(f"by {field}")
        width = max(map(len, counts[field]))
        for value, (n_true, n_items) in counts[field].items():
            percent = 100 * n_true / n_items
            lines.append(f"  {value:<{width}}  {percent:6.2f} %  of {n_items}")
    return lines
