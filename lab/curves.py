"""Training curves of runs, overlaid: loss, validation, learning rate, gradient norm, speed.

    python -m lab.curves runs/toy/stage1 runs/other/stage1 --out curves.png

reads each run's metrics.jsonl, also while it is being written.
"""

import argparse
from pathlib import Path

from checkpoints.command_line import one_line_errors
from evaluation.figure import figure
from training.run_files import read_metrics

PANELS = [
    ("loss", "training loss", "log"),
    ("validation", "validation loss, fixed noise", "log"),
    ("gradient_norm", "gradient norm", "log"),
    ("lr", "learning rate", "linear"),
    ("audio_hours_an_hour", "hours of audio an hour", "linear"),
]


def series(records: list[dict], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field in the records that have it; for a validation, its loss."""
    found = [record for record in records if field in record]
    values = [record[field] for record in found]
    if field == "validation":
        values = [value["loss"] for value in values]
    return [record["step"] for record in found], values


def plot_curves(runs: list[Path], out: Path) -> None:
    """Draw the curves of run folders into a figure. Raises ValueError: a run without metrics."""
    with figure(out, columns=len(PANELS), size=(4 * len(PANELS), 3.2)) as axes:
        for run in runs:
            records = read_metrics(run / "metrics.jsonl")
            if not records:
                raise ValueError(
                    f"{run}: holds no metrics.jsonl with records; a run adds one every 10 steps"
                )
            for axis, (field, title, scale) in zip(axes, PANELS):
                style = "o-" if field == "validation" else "-"
                axis.plot(*series(records, field), style, ms=3, lw=1, label=str(run))
                axis.set(title=title, xlabel="step", yscale=scale)
        axes[0].legend(fontsize=7)


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.curves"
    parser = argparse.ArgumentParser(prog=name, description="Plot training curves.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args(arguments)

    with one_line_errors(name):
        plot_curves(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
