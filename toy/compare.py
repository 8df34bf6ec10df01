"""What differs between two evaluated runs: their settings, and their figures."""

from pathlib import Path

from checkpoints.files import read_json
from toy.report import figures, table_in
from training.run_files import load_newest

# Where a run keeps its settings: files, and checkpoints, which hold those of the training.
CONFIGS = ("corpus/corpus.json", "whisper/config.json", "llada/config.json")
CHECKPOINTS = ("checkpoints/encoder.pt", "checkpoints/next_token.pt", "checkpoints/lm.pt")
STAGES = ("stage1", "stage2", "semantic")


def flat(value: object, name: str) -> dict[str, object]:
    """The values in nested objects, by their path, such as "stage1/adapters/n_queries"."""
    if not isinstance(value, dict):
        return {name: value}
    rows = {}
    for key, inner in value.items():
        rows |= flat(inner, f"{name}/{key}" if name else key)
    return rows


def settings(run: Path, report: dict) -> dict[str, object]:
    """All settings of a run that its files hold, by path."""
    rows = flat(table_in(report, "parts"), "parts")
    rows |= {name: report[name] for name in ("seed", "commit") if name in report}
    for file in (*CONFIGS, *(f"{stage}/config.json" for stage in STAGES)):
        if (run / file).is_file():
            rows |= flat(read_json(run / file), file.partition("/config")[0])

    # Shapes are those of the configs.
    for file in (*CHECKPOINTS, *(f"{stage}/checkpoint.pt" for stage in STAGES)):
        saved = load_newest(run / file) or {"run": {}}
        kept = {k: v for k, v in saved["run"].items() if not k.startswith("shape of ")}
        rows |= flat(kept, f"training of {file.removesuffix('.pt').removesuffix('/checkpoint')}")
    return rows


def cell(value: object) -> str:
    """A value as it can stand in a table: one line, at most 80 characters."""
    return " ".join(str(value).split()).replace("|", "\\|")[:80]


def differences(first: dict, second: dict) -> list[tuple[str, float, float]]:
    """The figures that both reports have and that differ: name and both values."""
    others = figures(second)
    return [
        (name, value, others[name][0])
        for name, (value, _) in figures(first).items()
        if name in others and others[name][0] != value
    ]


def compare(first: Path, second: Path) -> list[str]:
    """Lines of two Markdown tables: settings that differ, figures that differ.

    Raises WeightsError: a run has no report.json, or a file in it is damaged.
    """
    reports = [read_json(run / "report.json") for run in (first, second)]
    rows = [settings(run, report) for run, report in zip((first, second), reports, strict=True)]
    lines = [f"| setting | {first} | {second} |", "| --- | --- | --- |"]
    for name in dict.fromkeys((*rows[0], *rows[1])):
        values = [str(row.get(name, "unknown")) for row in rows]
        if values[0] != values[1]:
            lines.append(f"| {name} | {cell(values[0])} | {cell(values[1])} |")

    lines += ["", f"| figure | {first} | {second} | change |", "| --- | --- | --- | --- |"]
    for name, before, after in differences(*reports):
        lines.append(f"| {name} | {before:.2f} | {after:.2f} | {after - before:+.2f} |")

    # A figure that only one of them has.
    known = [figures(report) for report in reports]
    lines += [
        f"| {name} | {before} | {after} | |"
        for name in dict.fromkeys((*known[0], *known[1]))
        for before, after in [[f"{k[name][0]:.2f}" if name in k else "unknown" for k in known]]
        if "unknown" in (before, after)
    ]
    return lines
