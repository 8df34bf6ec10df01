"""Curves of one run or several, laid over each other: loss, validation, learning rate, gradient norm, speed.

    python -m lab.curves runs/toy/stage1 runs/other/stage1 --out curves.png

reads each run's metrics.jsonl, also while it is being written.
"""

import argparse
from pathlib import Path

import matplotlib

from training.loop import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = [
    ("loss", "training loss", "log"),
    ("validation", "validation loss, fixed noise", "log"),
    ("gradient_norm", "gradient norm", "log"),
    ("lr", "learning rate", "linear"),
    ("audio_hours_an_hour", "hours of audio an hour", "linear"),
]


def series(records: list[dict], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a field; of a validation, its loss."""
    found = [(r["step"], r[field]["loss"] if field == "validation" else r[field]) for r in records if field in r]
    return [step for step, _ in found], [value for _, value in found]


def plot(runs: list[Path], out: Path) -> None:
    """Draw the runs' curves into a PNG file. Raises ValueError: a run without metrics."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        if not records:
            raise ValueError(f"{run}: holds no metrics.jsonl with records; train_asr.py and train_instruct.py write one every 10 steps")
        for axis, (field, _, _) in zip(axes, PANELS):
            axis.plot(*series(records, field), "o-" if field == "validation" else "-", ms=3, lw=1, label=str(run))
    for axis, (_, title, scale) in zip(axes, PANELS):
        axis.set(title=title, xlabel="step", yscale=scale)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the curves of runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    try:
        plot(args.runs, args.out)
    except ValueError as error:
        raise SystemExit(f"curves.py: {error}") from None
    print(args.out)


if __name__ == "__main__":
    main()
