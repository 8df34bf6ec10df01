"""Progress: one line a phase in a terminal, plain lines elsewhere, nothing when quiet."""

import io
import sys

import pytest

from checkpoints import progress
from checkpoints.progress import Phase


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use(monkeypatch, stream):
    """Make `stream` the standard error. Within the test: pytest sets its own before it."""
    monkeypatch.delenv(progress.QUIET, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def run_phase(**options):
    with Phase("stage 1", 600, unit=" steps", **options) as phase:
        for n in range(600 - phase.done):
            phase.update(note=f"loss {n:.3f}")


def test_a_pipe_gets_one_plain_line_a_phase(monkeypatch):
    pipe = use(monkeypatch, io.StringIO())
    run_phase(done=590)
    assert pipe.getvalue() == "stage 1: 600 of 600 steps, 00:00 taken, loss 9.000\n"


def test_a_long_phase_says_now_and_then_how_long_it_takes(monkeypatch):
    pipe = use(monkeypatch, io.StringIO())
    seconds = iter(range(0, 10_000, 10))  # ten seconds a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    run_phase(done=586)
    lines = pipe.getvalue().splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    done, left = lines[0].removeprefix("stage 1: ").split(" of 600 steps, ")
    assert 590 < int(done) < 596 and left.split(" left, ")[0] > "01:00"
    assert lines[0].endswith(f"loss {int(done) - 587:.3f}")


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
    terminal = use(monkeypatch, Terminal())
    run_phase()
    text = terminal.getvalue()
    assert text.count("\n") == 1 and "\r" in text
    last = text.strip().split("\r")[-1]
    assert "stage 1: 100 %" in last and "600 of 600 steps" in last and "loss 599.000" in last


def test_quiet_shows_nothing_anywhere(monkeypatch):
    terminal = use(monkeypatch, Terminal())
    monkeypatch.setenv(progress.QUIET, "1")
    run_phase()
    progress.say("a line")
    assert list(progress.progress(range(3), "items")) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_short_phases_leave_no_line_in_a_pipe(monkeypatch):
    pipe = use(monkeypatch, io.StringIO())
    assert list(progress.progress(range(3), "items")) == [0, 1, 2]
    assert pipe.getvalue() == ""


def test_a_phase_that_fails_does_not_say_that_it_is_done(monkeypatch):
    pipe = use(monkeypatch, io.StringIO())
    with pytest.raises(ValueError), Phase("stage 1", 3):
        raise ValueError
    assert pipe.getvalue() == ""
