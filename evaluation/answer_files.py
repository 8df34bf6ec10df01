"""Answers on disk: a JSONL that grows by one line an answer, so that a stopped command resumes.

`answer_missing` is all of it for a command with one answer a question; the exams, whose files have
formats of their own, use the functions above it.

OUT.made_by records what makes the answers, so that nothing else resumes them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from checkpoints.files import check_writable, parse_json, read_json, whole_file, write_json
from checkpoints.progress import Phase
from diffa import DIFFA

# Options that older records lack, and what their answers were made with.
LATER = {"weights": "None", "deliberate": "None", "block_length": "None", "no_lora": "False"}


def whole_lines(path: Path) -> bytes:
    """The finished lines of a JSONL; a killed process may leave part of a line after them."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def read_answers(path: Path, names: Sequence[str | int]) -> dict[str | int, dict]:
    """Answers by `id` that a stopped run left in a JSONL, {} without one; nothing is changed.

    names: the ids of all questions. Raises ValueError: a line is no answer to one of them, or a
    second one. Raises WeightsError: a line is not JSON.
    """
    # Not splitlines, which breaks at characters that JSON allows within a text.
    known = set(names)
    done = {}
    try:
        lines = whole_lines(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from None

    # Each line answers one of the questions, and no other line the same.
    for number, line in enumerate(lines[:-1], start=1):
        row = parse_json(line, f"{path}: line {number}")
        name = row.get("id") if isinstance(row, dict) else None
        problem = ""
        if not isinstance(name, str | int) or name not in known:
            problem = "not an answer to a question here:"
        elif name in done:
            problem = "a second answer to"
        if problem:
            advice = "give another --out, or delete it"
            raise ValueError(f"{path}: line {number} is {problem} {str(name)[:80]!r}; {advice}")
        done[name] = row
    return done


@contextmanager
def appending(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yields append(row), which adds one line and hands it to the system at once.

    An unfinished last line is cut off first.
    """
    n_bytes = len(whole_lines(path))
    with open(path, "a", encoding="utf-8") as file:
        os.truncate(path, n_bytes)

        def append(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield append


def write_answers(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSONL, as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def pending_batches(order: Sequence[int], is_done: Sequence[bool], batch: int) -> list[int]:
    """The questions of `order` whose batch is not complete.

    Batches depend on `order` alone, not on what is done: in low precision an answer may change with
    its neighbours, so a batch is answered as a whole or not at all.
    """
    pending = []
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        if not all(is_done[i] for i in indices):
            pending += indices
    return pending


def check_made_by(out: Path, made_by: dict[str, str]) -> None:
    """Raise ValueError when the answers in `out` were begun with other settings than these."""
    record = Path(f"{out}.made_by")
    if not record.is_file():
        raise ValueError(
            f"{out}: holds replies, but {record} is missing, which says by which model; "
            "give another --out, or delete it"
        )

    # Each setting that differs is named.
    before = read_json(record)
    changes = []
    for name, value in made_by.items():
        # An older record may lack it, or have None for the models that the adapters record.
        recorded = before.get(name, LATER.get(name, value))
        unknown = name in ("whisper", "llm") and recorded == "None"
        if recorded != value and not unknown:
            changes.append(f"{name} {recorded}, now {value}")
    if changes:
        changed = ", ".join(changes)
        raise ValueError(f"{out}: was begun with {changed}; give another --out, or delete it")


def adapters_digest(model: DIFFA) -> str:
    """Identifies trained adapters by all their numbers."""
    parts = model.trained_parts()
    trained = [p for name, p in model.named_parameters() if name.split(".")[0] in parts]
    numbers = [p.detach().float().cpu().numpy() for p in trained]
    return hashlib.sha256(b"".join(array.tobytes() for array in numbers)).hexdigest()[:16]


def answer_missing(
    out: Path,
    names: Sequence[str | int],
    order: Sequence[int],
    batch: int,
    *,
    made_by: dict[str, str],
    load_model: Callable[[], DIFFA],
    answer_rows: Callable[[DIFFA, list[int]], Iterable[dict]],
) -> list[dict]:
    """Answer the questions that a file lacks; it ends the same, however often it was stopped.

    Args:
        names: the id of each question, all different. order: in which they are answered, as
            indices into `names`. batch: questions answered at once.
        made_by: settings that decide the answers, recorded beside `out`.
        load_model: called only when a question is left.
        answer_rows: gives a row with the question's `id` for each of the indices, in their order,
            answered in batches of `batch`.
    Returns:
        the rows in the order of `names`, as `out` now holds them.
    Raises:
        ValueError: `out` holds answers to other questions, or was begun with other settings.
        OSError: it cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)

    # What an earlier run left, and whether it was of this model.
    done = read_answers(out, names)
    is_begun = out.is_file() and out.stat().st_size > 0
    if is_begun:
        check_made_by(out, made_by)

    if len(done) < len(names):
        # Adapters may have been trained again since, in the same folder.
        model = load_model()
        made_by = made_by | {"adapters_digest": adapters_digest(model)}
        if is_begun:
            check_made_by(out, made_by)
        write_json(Path(f"{out}.made_by"), made_by)

        # Each answer is written as it comes, unless it is there already.
        pending = pending_batches(order, [name in done for name in names], batch)
        phase = Phase(out.name, len(names), unit=" answers", done=len(done))
        with phase, appending(out) as append:
            for i, row in zip(pending, answer_rows(model, pending), strict=True):
                if names[i] not in done:
                    done[names[i]] = row
                    append(row)
                    phase.update()

    # From the order of answering to that of the questions.
    rows = [done[name] for name in names]
    write_answers(out, rows)
    return rows
