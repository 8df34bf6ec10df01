"""A figure is written as a whole or not at all, and leaves nothing open."""

import sys

import pytest

from evaluation.figure import figure


def test_a_figure_has_its_panels_and_is_written_in_the_format_of_its_name(tmp_path):
    with figure(tmp_path / "new/one.png", size=(2, 1)) as axes:
        axes.plot([1, 2])
    with figure(tmp_path / "three.svg", columns=3, size=(6, 2), width_ratios=(3, 1, 1)) as axes:
        assert axes.shape == (3,)
        for axis in axes:
            axis.plot([1, 2])
    assert (tmp_path / "new/one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "three.svg").read_text()
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_a_figure_whose_drawing_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "loss.png"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), figure(path):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="supported formats"), figure(tmp_path / "loss.pgn"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert path.read_text() == "old"
