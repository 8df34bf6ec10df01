"""Progress that a person reads: one line a phase, with what is done, the time left and the loss.

In a terminal the line changes, and stays when a long phase ends. A file or pipe gets plain lines
without control characters: one a minute, and one at the end of a long phase. `--quiet`, or
DIFFA_QUIET=1 in the environment, turns all of it off; results, warnings and errors remain.
"""

import argparse
import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

QUIET = "DIFFA_QUIET"  # in the environment, so that processes started by this one know it
LINE_EVERY = 60  # seconds, in a file or pipe
FORMAT = "{desc}: {percentage:3.0f} %|{bar:20}| {n_fmt} of {total_fmt}{unit}, {remaining} left"

Item = TypeVar("Item")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet; it takes effect when it is parsed."""

    class Quiet(argparse.Action):
        def __call__(self, parser, namespace, values, option=None):
            os.environ[QUIET] = "1"

    parser.add_argument("--quiet", action=Quiet, nargs=0, help="no progress, only results")


def is_quiet() -> bool:
    """Whether no progress is to be shown."""
    return os.environ.get(QUIET, "") not in ("", "0")


def is_hidden() -> bool:
    """Whether no line may change: progress is off, or the standard error is no terminal."""
    return is_quiet() or not sys.stderr.isatty()


def say(text: str) -> None:
    """A line of progress on the standard error, above the lines that change."""
    if not is_quiet():
        tqdm.write(text, file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours if there are any."""
    return tqdm.format_interval(max(seconds, 0))


class Phase:
    """The line of one phase; use it in a `with` block.

    with Phase("stage 1", total=600, unit=" steps") as phase:
        phase.update(note="loss 0.123")
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "",
        done: int = 0,
        stays: bool = True,
        shown: bool = True,
    ):
        """done: of the total, before this run. stays: the line remains when the phase ends.
        shown: False: nothing is printed, as in all processes but the first."""
        self.title = title
        self.total = total
        self.unit = unit
        self.done = done
        self.first = done
        self.stays = stays
        self.note = ""
        self.shown = shown and not is_quiet()
        self.started = self.printed = time.monotonic()

        # A terminal: tqdm draws, and knows of other lines below or above.
        self.bar = None
        if self.shown and not is_hidden():
            layout = {"bar_format": FORMAT + "{postfix}", "dynamic_ncols": True}
            self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, leave=stays, **layout)

    def __enter__(self) -> Self:
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more; note: shown at the end of the line from now on, such as the loss."""
        self.done += n
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.printed > LINE_EVERY:
            self.printed = time.monotonic()
            speed = (self.done - self.first) / (self.printed - self.started)
            self.line(f"{clock((self.total - self.done) / speed)} left")

    def line(self, time_text: str) -> None:
        """Print one plain line."""
        counts = f"{self.done} of {self.total}{self.unit}"
        text = ", ".join(filter(None, (counts, time_text, self.note)))
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def __exit__(self, error: type | None, *details) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown and self.stays and error is None:
            self.line(f"{clock(time.monotonic() - self.started)} taken")


def progress(
    items: Collection[Item], title: str, *, unit: str = "", stays: bool = False, shown: bool = True
) -> Iterator[Item]:
    """The items in turn, as a phase; arguments as for Phase."""
    with Phase(title, len(items), unit=unit, stays=stays, shown=shown) as phase:
        for item in items:
            yield item
            phase.update()
