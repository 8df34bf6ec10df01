"""What a toy run's report.json promises and shows: bounds, tables, report.md, figures."""

from pathlib import Path
from statistics import mean

import torch

from checkpoints.files import read_json, whole_file
from evaluation.figure import figure
from toy.grammar import CONTENT_KINDS, SLOTS, VOICE_KINDS
from train_asr import RECIPES

# The sampler setting that commits one token a call.
COUNT_RULE = f"{RECIPES['toy'].answer_length} steps"

# What `make demo` promises: path in the report, "min" or "max", bound in percent.
PROMISES = [
    ("encoder/word_error_rate", "max", 2.5),
    ("lm/copy_error", "max", 2),
    ("lm/oracle/gender", "min", 98),
    ("lm/oracle/number", "min", 98),
    (f"stage1/by_sampler/{COUNT_RULE}/word_error_rate", "max", 3),
    ("stage2/content_mean", "min", 96),
    ("stage2/voice_mean", "min", 94),
    ("stage2/gender/accuracy", "min", 95),
    ("stage2/count/accuracy", "min", 94),
    ("stage2/caption/word_error_rate", "max", 5.5),
]

# Files that `plot` writes.
PLOTS = {
    "losses.png": "Loss of each phase against its steps",
    "steps.png": "Stage 1: WER against model calls",
    "questions.png": "Stage 2: accuracy by kind of question",
}

# Titles of the loss curves, and the file in a run that holds each.
LOSSES = {
    "encoder": "encoder.json",
    "language model": "lm.json",
    "stage 1": "stage1/training.json",
    "stage 2": "stage2/training.json",
}


def look_up(report: dict, path: str) -> tuple[float | None, int | None]:
    """The figure at a path such as "lm/copy_error", and the number of items it was measured on.

    None: the report does not have it.
    """
    items = None
    for key in path.split("/"):
        if not isinstance(report, dict) or key not in report:
            return None, None
        n = report.get("items")
        items = n if isinstance(n, int) else items
        report = report[key]
    return (report if isinstance(report, int | float) else None), items


def table_in(report: dict, name: str) -> dict:
    """The table of this name in a report, {} if it has none."""
    found = report.get(name)
    return found if isinstance(found, dict) else {}


def broken_promises(report: dict) -> list[str]:
    """A line for each figure that misses its bound in PROMISES, or was not measured."""
    lines = []
    for path, kind, bound in PROMISES:
        # Adapters of one stage only leave the other out.
        value, _ = look_up(report, path)
        if value is None:
            lines.append(f"{path} was not measured")
        elif kind == "min" and not value >= bound:
            lines.append(f"{path} is {value:.2f}, promised at least {bound}")
        elif kind == "max" and not value <= bound:
            lines.append(f"{path} is {value:.2f}, promised at most {bound}")
    return lines


# ---- tables
def with_worst_kind(report: dict) -> dict:
    """The report with `worst` in "lm", its accuracy on the kind of question that it knows least."""
    lm = table_in(report, "lm")
    known = [v for v in table_in(lm, "oracle").values() if isinstance(v, int | float)]
    return report | {"lm": lm | {"kinds": len(known), "worst": min(known, default=None)}}


def figures(report: dict) -> dict[str, tuple[float, int | None]]:
    """The figures of one report by their names in the tables, each with its number of items."""
    ready = with_worst_kind(report)
    found = {name: look_up(ready, path) for name, path in summary_rows([ready]).items()}
    return {name: (value, n) for name, (value, n) in found.items() if value is not None}


def summary_rows(reports: list[dict]) -> dict[str, str]:
    """The table's rows: their names, and the paths of their figures in a report."""
    # Encoder, LM, and stage 1 by two sampler settings.
    fast = "stage1/by_sampler/threshold 0.9"
    n_kinds = max(report["lm"]["kinds"] for report in reports)
    rows = {
        "encoder, WER (%)": "encoder/word_error_rate",
        "LM copying a sentence of its prompt, WER (%)": "lm/copy_error",
        f"LM answering from text, worst of {n_kinds} kinds of question (%)": "lm/worst",
        f"stage 1, {COUNT_RULE}, WER (%)": f"stage1/by_sampler/{COUNT_RULE}/word_error_rate",
        "stage 1, threshold 0.9, WER (%)": f"{fast}/word_error_rate",
        "stage 1, threshold 0.9, model calls a clip": f"{fast}/calls",
    }

    # Stage 2: exact answers by kind, their means, then answers that are sentences.
    for kind in (*SLOTS, "count", *VOICE_KINDS):
        rows[f"stage 2: {kind}, accuracy (%)"] = f"stage2/{kind}/accuracy"
    for name, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        rows[f"stage 2: mean of {', '.join(kinds)} (%)"] = f"stage2/{name}"
    for kind in ("repeat", "caption"):
        rows[f"stage 2: {kind}, WER (%)"] = f"stage2/{kind}/word_error_rate"

    names = {name: None for report in reports for name in table_in(report, "minutes")}
    return rows | {f"minutes: {name}": f"minutes/{name}" for name in names}


def summary(reports: list[dict]) -> list[str]:
    """Lines of a Markdown table over the reports of runs that differ in their seed.

    A figure that only some runs have says how many. Raises ValueError: no run has any.
    """
    ready = [with_worst_kind(report) for report in reports]
    lines = []
    for name, path in summary_rows(ready).items():
        # One figure a run.
        found = [look_up(report, path) for report in ready]
        values = [value for value, _ in found if value is not None]
        if not values:
            continue
        span = f"{min(values):.1f} to {max(values):.1f}"
        runs = f" ({len(values)} of {len(ready)} runs)" if len(values) < len(ready) else ""

        # Runs may differ in their items: the least and the most of them.
        counts = sorted({n for _, n in found if n})
        n_items = " to ".join(str(n) for n in sorted({*counts[:1], *counts[-1:]}))
        lines.append(f"| {name}{runs} | {mean(values):.1f} | {span} | {n_items} |")
    if not lines:
        raise ValueError(
            "these reports hold no figure of a toy run; python -m toy.evaluate makes them"
        )
    return [
        "| held-out sentences and voices | mean | range | items a run |",
        "| --- | --- | --- | --- |",
        *lines,
    ]


def write_markdown(report: dict, run: Path) -> None:
    """Write RUN/report.md: the figures as a table, broken promises, examples, and the plots."""
    sources = ", ".join(f"{name} {value}" for name, value in report["parts"].items())
    lines = [f"# Evaluation of {run}", "", f"Held-out sentences in held-out voices. {sources}.", ""]

    # Every figure, then those that miss what `make demo` promises.
    lines += ["| figure | value | items |", "| --- | --- | --- |"]
    lines += [f"| {name} | {v:.2f} | {n or ''} |" for name, (v, n) in figures(report).items()]
    broken = [line for line in broken_promises(report) if "not measured" not in line]
    lines += ["", *(f"- missed: {line}" for line in broken)]

    # Some of the plots may be those of an earlier evaluation.
    examples = table_in(report, "stage1").get("examples", [])
    if examples:
        lines += ["", "| target | prediction of stage 1 |", "| --- | --- |"]
        lines += [f"| {example['target']} | {example['prediction']} |" for example in examples]
    plots = [name for name in PLOTS if (run / name).is_file()]
    lines += ["", *(f"![{PLOTS[name]}]({name})\n" for name in plots)]

    with whole_file(run / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- plots
def plot(report: dict, run: Path) -> None:
    """Write PLOTS of what was measured into the run."""
    plot_losses(run)
    if "stage1" in report:
        plot_steps(report["stage1"]["by_sampler"], run / "steps.png")
    if "stage2" in report:
        tables = {"both": report["stage2"], "semantic alone": report.get("semantic")}
        plot_questions({name: t for name, t in tables.items() if t}, run / "questions.png")


def plot_losses(run: Path) -> None:
    """Loss curves of whatever has been trained in the run, means over 20 steps."""
    with figure(run / "losses.png", columns=len(LOSSES), size=(13, 2.8)) as axes:
        for axis, (title, file) in zip(axes, LOSSES.items(), strict=True):
            if (run / file).is_file():
                losses = torch.tensor(read_json(run / file).get("losses") or [torch.nan])
                axis.plot(losses.unfold(0, min(20, len(losses)), 1).mean(dim=1), lw=1)
            axis.set(title=title, xlabel="step", yscale="log")
        axes[0].set_ylabel("loss")


def plot_steps(by_sampler: dict, path: Path) -> None:
    """Word error rate against model calls, a line for each rule."""
    with figure(path, size=(5, 3.2)) as axis:
        # Names of settings begin with their rule, or end with it.
        for rule, style in (("steps", "o-"), ("threshold", "s--"), ("left to right", "^")):
            rows = [row for name, row in by_sampler.items() if rule in name]
            points = sorted((row["calls"], row["word_error_rate"]) for row in rows)
            if points:
                axis.plot(*zip(*points, strict=True), style, label=rule)
        axis.set(xlabel="model calls a clip", ylabel="WER (%)", xscale="log", ylim=(0, None))
        axis.legend()


def plot_questions(tables: dict[str, dict], path: Path) -> None:
    """Accuracy by kind of question; tables: of each choice of adapters, by name."""
    kinds = [
        kind
        for kind in (*CONTENT_KINDS, *VOICE_KINDS)
        if all("accuracy" in table.get(kind, {}) for table in tables.values())
    ]
    with figure(path, size=(9, 3.2)) as axis:
        # Two bars a kind, on both sides of its tick.
        for n, (name, table) in enumerate(tables.items()):
            places = [i + 0.4 * n - 0.2 for i in range(len(kinds))]
            axis.bar(places, [table[kind]["accuracy"] for kind in kinds], 0.4, label=name)
        axis.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="accuracy (%)", ylim=(0, 100))
        axis.legend(title="adapters", loc="lower right")
