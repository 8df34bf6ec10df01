"""The one helper that opens, saves and closes a figure."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checkpoints.files import whole_file


@contextmanager
def figure(
    path: str | Path,
    columns: int = 1,
    size: tuple[float, float] = (5.0, 3.2),
    rows: int = 1,
    **layout,
) -> Iterator[Axes | np.ndarray]:
    """Axes to draw on; the figure is written to `path` when the block ends without an error.

        with figure("loss.png", columns=2, size=(9, 3)) as axes:
            axes[0].plot(losses)

    Args:
        path: a file whose suffix is a format of matplotlib, such as .png or .svg.
        columns, rows: of panels. size: width and height of the whole figure, inches.
        layout: options of matplotlib's `subplots`, such as width_ratios=(3, 1) or sharey=True.
    Yields:
        the Axes of one panel, or an array (columns,), (rows,) or (rows, columns) of them.
    Raises:
        ValueError: matplotlib knows no format with this suffix.
    """
    path = Path(path)

    # A Figure without pyplot: it opens no window, needs no backend, and nothing keeps it alive.
    canvas = Figure(figsize=size)
    yield canvas.subplots(rows, columns, **layout)

    # The temporary file has another suffix, so the format is given.
    canvas.tight_layout()
    with whole_file(path) as temporary:
        canvas.savefig(temporary, dpi=110, format=path.suffix[1:] or "png")
