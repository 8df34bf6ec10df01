"""The steps of an answer on a screen: one changing line of a terminal, or a line for each."""

import math
import os
import sys
import time
import unicodedata

from checkpoints.progress import is_quiet
from evaluation.trace import Step

BROKEN = "\N{REPLACEMENT CHARACTER}"  # decodes bytes that are no whole character
SECONDS_A_STEP = 0.15  # a terminal shows the steps slowly enough to be watched


def token_texts(tokenizer, ids: list[int], mask_id: int, end_id: int) -> list[str]:
    """Text of each token for people: an underscore for a mask, nothing for the end.

    A character that takes several tokens is the text of its last one, once all are there; a part of
    one is not shown.
    """
    texts = []
    run = []  # tokens since the last mask
    done = ""  # their text so far
    for token in ids:
        if token in (mask_id, end_id):
            texts.append("_" if token == mask_id else "")
            run = []
            done = ""
            continue
        run.append(token)
        text = tokenizer.decode(run)
        if text.endswith(BROKEN):
            texts.append("")
        else:
            texts.append(text[len(done) :].replace(BROKEN, ""))
            done = text
    return texts


def joined(texts: list[str]) -> str:
    """The texts of tokens as one line, with spaces around masks and without control characters."""
    spaced = "".join(f" {text} " if text == "_" else text for text in texts)
    return "".join(filter(str.isprintable, " ".join(spaced.split())))


def one_line(texts: list[str], columns: float) -> str:
    """What fits of the line into so many columns of a terminal, the first mask included."""

    def width(text: str) -> int:
        drawn = [c for c in text if not unicodedata.combining(c)]
        return len(drawn) + sum(unicodedata.east_asian_width(c) in "WF" for c in drawn)

    line = joined(texts)
    if width(line) >= columns and "_" in texts:
        filled = joined(texts[: texts.index("_")])
        line = line[max(len(filled) - columns // 3, 0) :]
    while width(line) >= columns:
        line = line[:-1]
    return line


class Screen:
    """Where the steps are shown: on one changing line of a terminal, else a line for each."""

    def __init__(self):
        self.file = sys.stdout if sys.stdout.isatty() else sys.stderr
        self.is_live = self.file.isatty()

    def show(self, step: Step) -> None:
        """Show one step."""
        if is_quiet():
            return
        if self.is_live:
            columns = os.get_terminal_size(self.file.fileno()).columns or 80
            print(f"\r\033[K{one_line(step.texts, columns)}", end="", file=self.file, flush=True)
            time.sleep(SECONDS_A_STEP)
        else:
            print(one_line(step.texts, math.inf), file=self.file, flush=True)

    def clear(self) -> None:
        """Remove the line that was shown last."""
        if self.is_live and not is_quiet():
            print("\r\033[K", end="", file=self.file, flush=True)
