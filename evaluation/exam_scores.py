"""The scores of an exam, counted from its predictions: by its own rule first, ours beside it."""

from dataclasses import dataclass

from evaluation.exam_files import reply_of
from evaluation.exam_rules import Exam, Rule


@dataclass(frozen=True, kw_only=True)
class Score:
    """The marks of some replies by one rule."""

    points: float  # replies marked true, and what unreadable ones count
    counted: int  # the denominator
    unreadable: int

    def __str__(self) -> str:
        if not self.counted:
            return "       - of 0"
        return f"{100 * self.points / self.counted:6.2f} % of {self.counted}"


def score(rule: Rule, marks: list[bool | None]) -> Score:
    """The score of marks, None among them for unreadable replies."""
    n_unreadable = marks.count(None)
    n_left_out = n_unreadable if rule.unreadable is None else 0
    points = marks.count(True) + n_unreadable * (rule.unreadable or 0)
    return Score(points=points, counted=len(marks) - n_left_out, unreadable=n_unreadable)


def group_name(row: dict, fields: tuple[str, ...]) -> str:
    """The values of some fields of an item as one text; a value may be a list or absent."""
    values = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        values.append("-" if value in (None, "") else str(value))
    return " / ".join(values)


def unreadable_words(rule: Rule, n: int) -> str:
    """What becomes of n unreadable replies, as words."""
    if rule.unreadable is None:
        return f"{n} unreadable replies are left out"
    if rule.unreadable == 0:
        return f"{n} unreadable replies count as wrong"
    return f"{n} unreadable replies count as {rule.unreadable:g} each, the mean of a random guess"


def table_lines(marks: dict[Rule, list[bool | None]], names: list[str]) -> list[str]:
    """A line for each group, with its score by each rule. names: the group of each reply."""
    lines = []
    width = max(map(len, names))
    for name in sorted(set(names)):
        cells = []
        for rule, all_marks in marks.items():
            group = [mark for mark, other in zip(all_marks, names) if other == name]
            cells.append(str(score(rule, group)))
        lines.append(f"  {name:<{width}}  " + "  ".join(cells))
    return lines


def score_lines(exam: Exam, rows: list[dict], files: list[str] | None = None) -> list[str]:
    """The scores of predictions as lines of text, or who can score them.

    files: the file that each row comes from, where there are several.
    """
    replies = [reply_of(row, exam) for row in rows]
    lines = []

    # What cannot be scored comes first.
    if None in replies:
        n = replies.count(None)
        lines.append(f"replies that are null or absent, marked like empty ones: {n}")
    if not exam.rules:
        judges = "VoiceBench's own api_judge.py and evaluate.py"
        return [*lines, f"not scored here: this subset is for {judges}"]

    # By each rule, over all items.
    marks = {}
    for rule in exam.rules:
        marks[rule] = [rule.mark(row, reply or "") for row, reply in zip(rows, replies)]
        found = score(rule, marks[rule])
        words = rule.name
        if found.unreadable or rule.unreadable != 0:
            words += f"; {unreadable_words(rule, found.unreadable)}"
        lines.append(f"{exam.measure} {found} by {words}")

    # By each rule, for each value of the groups.
    tables = {
        " and ".join(fields): [group_name(row, fields) for row in rows] for fields in exam.groups
    }
    if files:
        tables["file"] = files
    for title, names in tables.items():
        lines.append(f"by {title}" + "; the rules as above" * (len(exam.rules) > 1))
        lines += table_lines(marks, names)
    return lines
