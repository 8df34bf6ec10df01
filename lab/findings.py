"""From numbers to sentences: mean and range over seeds, the ablations' tables and figures, and which finding of the paper reproduces.

A finding is a difference between two models of the same seed. It reproduces when the difference has the paper's sign for
every seed, and does not when it fails for one. Our questions are not the paper's benchmarks: signs are compared, not sizes.
ablations.py measures the numbers and calls `write_report`.
"""

import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import matplotlib
import torch

from toy.grammar import ANSWER_LENGTH, CONTENT_KINDS, SLOTS, VOICE_KINDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BENCHMARKS = ("MMAU", "MMSU")
PAPER = {  # right answers in percent on both (arXiv 2507.18452): the lesser model, then the full one, which is another in each ablation
    "adapters": {"semantic": (47.70, 52.88), "both": (49.71, 56.04)},
    "backbone": {"LLaMA-3.1": (28.40, 38.40), "LLaDA": (51.71, 54.72)},
}
ARMS = {"both": "both adapters", "semantic": "semantic alone", "self": "own targets", "twin": "autoregressive"}
KINDS = [kind for kind in (*CONTENT_KINDS, *VOICE_KINDS) if kind != "repeat"]  # those with one right answer
ALIKE = 1.0  # points: less is called no loss
FULL, FAST = f"count {ANSWER_LENGTH}", "threshold 0.9"  # a call for each token, and the usual bar of those that need fewer


# ---- numbers
def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """Mean and range of one value for each seed: "91.2 (90.1 to 92.3)"; sign "+" writes the sign of positive ones too."""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def values(tables: list[dict], *path: str) -> list[float]:
    """The number at `path` in the table of each seed."""
    found = []
    for table in tables:
        for key in path:
            table = table[key]
        found.append(table)
    return found


def accuracy(tables: list[dict]) -> list[float]:
    """Right answers in percent over all kinds of question that have one, of each seed."""
    return [sum(table[kind]["accuracy"] for kind in KINDS) / len(KINDS) for table in tables]


def minus(a: list[float], b: list[float]) -> list[float]:
    """Differences of two models, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def verdict(holds: list[bool]) -> str:
    """What to call a finding that holds for these seeds."""
    if all(holds):
        return f"Reproduces (for {len(holds)} of {len(holds)} seeds)."
    return f"Does not reproduce (it holds for {sum(holds)} of {len(holds)} seeds)."


# ---- sentences
def paper(part: str) -> str:
    """What an ablation gained in the paper, from the lesser model to the full one."""
    lesser, full = PAPER[part].values()
    return "Paper: " + ", ".join(f"{b - a:+.2f} on {name}" for a, b, name in zip(lesser, full, BENCHMARKS)) + "."


def findings(results: dict) -> list[str]:
    """A sentence or two for each finding: the paper's, ours, and whether it reproduces. results: from ablations.ablate."""
    of, sweep, race = results["questions"], results["sweep"]["both"], results["race"]
    voice, content = (minus(values(of["both"], name), values(of["semantic"], name)) for name in ("voice_mean", "content_mean"))
    backbone = minus(accuracy(of["both"]), accuracy(of["twin"]))
    kept = [minus(values(sweep, FAST, name), values(sweep, FULL, name)) for name in ("content_mean", "voice_mean")]
    calls = [values(sweep, name, "calls") for name in (FAST, FULL)]
    at_once = minus(values(sweep, "count 1", "repeat"), values(sweep, FULL, "repeat"))
    own, targets = minus(accuracy(of["self"]), accuracy(of["both"])), results["self_targets"]
    greedy = values(race["twin"], "greedy", "seconds")
    slow, quick = ([a / b for a, b in zip(values(race["both"], name, "seconds"), greedy, strict=True)] for name in (FULL, FAST))
    return [
        f"The acoustic adapter tells how it is said. Both minus semantic: {spread(voice, sign='+')} points on voice, "
        f"{spread(content, sign='+')} on content. {paper('adapters')} {verdict([d > 0 for d in voice])}",
        f"A diffusion LM listens better than an autoregressive one. Diffusion minus twin: {spread(backbone, sign='+')} points over all "
        f"kinds of question. {paper('backbone')} {verdict([d > 0 for d in backbone])}",
        f"Committing at once what is sure costs nothing. {FAST} minus {FULL}: {spread(kept[0], sign='+')} points on content, "
        f"{spread(kept[1], sign='+')} on voice, in {spread(calls[0])} calls an answer for {spread(calls[1])} (less than {ALIKE:g} point lost "
        f"counts as nothing). Fast-dLLM (arXiv 2505.22618) found it. {verdict([min(pair) > -ALIKE for pair in zip(*kept, strict=True)])}",
        f"Committing at once what is not sure costs quality. count 1 minus {FULL}: {spread(at_once, sign='+')} points of word errors in "
        f"repeating a sentence (more than {ALIKE:g} counts as a cost). LLaDA's samples gain from more steps. "
        f"{verdict([d > ALIKE for d in at_once])}",
        f"Targets that the LM makes itself serve as well as given ones. Own minus templates: {spread(own, sign='+')} points over all kinds of "
        f"question, with {targets['differ']} of {targets['items']} targets different (less than {ALIKE:g} point lost counts as nothing). The "
        f"paper compares the two; its figures are not at hand here. {verdict([d > -ALIKE for d in own])}",
        f"Token by token, diffusion is slower than autoregression. {FULL} takes {spread(slow, 2)} times the twin's seconds a caption, one at a "
        f"time. The release's README says it, without a figure. {verdict([ratio > 1 for ratio in slow])}",
        f"Committing at once what is sure makes it the faster one. {FAST} takes {spread(quick, 2)} times the twin's seconds. Others, "
        f"transcribing with Whisper and LLaDA: 0.23 times. {verdict([ratio < 1 for ratio in quick])}",
    ]  # fmt: skip


# ---- tables
def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def question_table(of: dict) -> str:
    """Right answers, or word errors, for each kind of question and model, beside the paper's benchmarks."""

    def row(name: str, numbers: Callable[[list[dict]], list[float]], items: str = "") -> list[str]:
        return [name, *(spread(numbers(of[arm])) for arm in ARMS), items]

    rows = []
    for kind in (*KINDS, "repeat", "caption"):
        measure = "accuracy" if kind in KINDS else "word_error_rate"
        name = kind if kind in KINDS else f"{kind}, word errors"
        rows.append(row(name, lambda tables, kind=kind, measure=measure: values(tables, kind, measure), str(of["both"][0][kind]["items"])))
    for mean, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        rows.append(row(f"mean of {', '.join(kinds)}", lambda tables, mean=mean: values(tables, mean)))
    rows.append(row(f"mean of all {len(KINDS)} with one right answer", accuracy))
    for i, benchmark in enumerate(BENCHMARKS):
        adapters, backbone = ({name: f"{pair[i]:.2f}" for name, pair in PAPER[part].items()} for part in ("adapters", "backbone"))
        rows.append([f"paper: {benchmark}, adapters", adapters["both"], adapters["semantic"], "-", "-", ""])
        rows.append([f"paper: {benchmark}, backbone", f"{backbone['LLaDA']} (LLaDA)", "-", "-", f"{backbone['LLaMA-3.1']} (LLaMA-3.1)", ""])
    return markdown(["% right", *ARMS.values(), "items"], rows)


def race_table(race: dict) -> str:
    """Calls and seconds a caption, of the diffusion LM by sampler setting and of its twin."""
    rows = []
    for arm, name in ((arm, name) for arm in ("both", "twin") for name in race[arm][0] if name != "minutes"):
        seconds = [[1000 * s for s in values(race[arm], name, field)] for field in ("seconds", "seconds_batched")]
        calls, errors = (values(race[arm], name, field) for field in ("calls", "word_error_rate"))
        rows.append([f"{ARMS[arm]}, {name}", spread(calls), *(spread(taken) for taken in seconds), spread(errors)])
    return markdown(["setting", "calls", "ms a caption, one at a time", "ms a caption, all in one batch", "word errors %"], rows)


def reader_table(lm: dict, twin: dict) -> str:
    """How well the two LMs read text alone, before any adapter."""
    rows = []
    for name, result in (("diffusion", lm), ("autoregressive twin", twin)):
        worst = min(result["oracle"], key=result["oracle"].get)
        mean = sum(result["oracle"].values()) / len(result["oracle"])
        rows.append([name, str(result["steps"]), f"{result['copy_error']:.1f}", f"{mean:.1f}", f"{result['oracle'][worst]:.1f} ({worst})"])
    return markdown(["LM", "steps", "copy error %", "answers from text, % right", "the worst kind"], rows)


def sweep_table(sweep: list[dict]) -> str:
    """Quality by sampler setting, and how many calls and tokens it took."""
    rows = []
    for name in (name for name, row in sweep[0].items() if isinstance(row, dict)):
        rate = [tokens / calls for tokens, calls in zip(values(sweep, name, "tokens"), values(sweep, name, "calls"), strict=True)]
        quality = (spread(values(sweep, name, field)) for field in ("content_mean", "voice_mean", "repeat", "caption"))
        rows.append([name, spread(values(sweep, name, "calls")), spread(rate, 2), *quality])
    qualities = ["content %", "voice %", "repeat, word errors %", "caption, word errors %"]
    return markdown(["setting", "calls an answer", "tokens a call", *qualities], rows)


def target_table(targets: dict) -> str:
    """How many of the LM's own answers differ from the templates', by kind of question."""
    return markdown(["kind", "targets that differ"], [[kind, str(n)] for kind, n in sorted(targets["differ_by_kind"].items())])


def robustness_table(rows: dict) -> str:
    """Error rates and accuracies by condition (robustness.measure)."""
    cells = [[name, f"{row['word_error_rate']:.1f}", f"{row['content_mean']:.1f}", f"{row['voice_mean']:.1f}",
              *(f"{row['accuracy'][kind]:.1f}" for kind in VOICE_KINDS), str(row["items"]), str(row["too_long"])]
             for name, row in rows.items()]  # fmt: skip
    return markdown(["condition", "word errors %", "content %", "voice %", *VOICE_KINDS, "clips", "left out, too long"], cells)


# ---- figures
def bounds(seeds: list[float]) -> tuple[float, list[list[float]]]:
    """A mean, and how far the range reaches below and above it, as matplotlib's yerr (2, 1)."""
    mean = sum(seeds) / len(seeds)
    # Of equal values, a rounded mean can lie outside.
    return mean, [[max(mean - min(seeds), 0.0)], [max(max(seeds) - mean, 0.0)]]


def plot_arms(of: dict, path: Path) -> None:
    """Right answers by kind of question and model, mean and range, beside the paper's two benchmarks."""
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(13, 3.4), width_ratios=(3, 1), sharey=True)
    for shift, (arm, label) in enumerate(ARMS.items()):
        for i, kind in enumerate(KINDS):
            mean, reach = bounds(values(of[arm], kind, "accuracy"))
            ours.bar(i + 0.2 * shift - 0.3, mean, 0.2, yerr=reach, color=f"C{shift}", error_kw={"lw": 1}, label=label if i == 0 else None)
    ours.set(title="here: mean and range over seeds", xticks=range(len(KINDS)), xticklabels=KINDS, ylabel="right answers (%)", ylim=(0, 100))
    ours.legend(loc="lower center", fontsize=7, ncols=len(ARMS), framealpha=1)
    bars = [(f"{name}\n({part})", pair) for part, table in PAPER.items() for name, pair in table.items()]
    for shift, benchmark in enumerate(BENCHMARKS):
        heights = [pair[shift] for _, pair in bars]
        theirs.bar([i + 0.4 * shift - 0.2 for i in range(len(bars))], heights, 0.4, color=f"C{7 + shift}", label=benchmark)
    theirs.set(title="the paper", xticks=range(len(bars)))
    theirs.set_xticklabels([name for name, _ in bars], fontsize=7)
    theirs.legend(fontsize=7)
    save(figure, path)


def plot_sweep(sweep: list[dict], path: Path) -> None:
    """Quality against model calls, a line for each rule, mean and range."""
    panels = {"content_mean": "content: right answers (%)", "voice_mean": "voice: right answers (%)",
              "repeat": "repeat: word error rate (%)", "caption": "caption: word error rate (%)"}  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2))
    for axis, (field, title) in zip(axes, panels.items()):
        for rule in ("count", "threshold", "factor"):
            names = [name for name in sweep[0] if name.startswith(rule)]
            calls = [bounds(values(sweep, name, "calls"))[0] for name in names]
            points = [bounds(values(sweep, name, field)) for name in names]
            reach = [[below for _, ((below,), _) in points], [above for _, (_, (above,)) in points]]
            axis.errorbar(calls, [mean for mean, _ in points], reach, fmt="o-", label=rule, lw=1, ms=3)
        axis.set(title=title, xlabel="model calls an answer", ylim=(None, 100) if field.endswith("_mean") else (0, None))
    axes[0].legend()
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the report
def machine(device: str) -> str:
    """The processor, how many cores of it are ours, and torch's version."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, device {device}, torch {torch.__version__}"


def write_report(out: Path, results: dict, seeds: list[int], command: str, device: str) -> Path:
    """Write report.md and its figures into `out`; returns the report's path. results: from ablations.ablate."""
    of, targets, robust = results["questions"], results["self_targets"], results["robustness"]
    sweep, race = results["sweep"]["both"], results["race"]
    plot_arms(of, out / "ablations.png")
    plot_sweep(sweep, out / "sweep.png")
    sections = [
        "# Ablations at tiny scale",
        f"`{command}`, seeds {', '.join(map(str, seeds))}, {date.today()}; {machine(device)}. Mean and range (lowest to highest) over the seeds. "
        "A seed draws new adapters, the order of the clips and the noise; corpus, encoder, LM and stage 1 are one of each.",
        "\n".join(f"- {line}" for line in findings(results)),
        "## Adapters, backbone, targets",
        "![Right answers by kind of question](ablations.png)",
        question_table(of),
        "## The two language models, on text alone",
        reader_table(results["lm"], results["twin"]),
        "## Speed",
        f"Captions of {race['both'][0][FULL]['items']} clips, from the encoder's states to the text; no cache for diffusion, keys and values "
        "kept for the twin.",
        race_table(race),
        "## Sampler steps",
        f"`both` on {sweep[0]['clips']} clips. Calls and tokens are means over all questions, most of which one word answers; an answer's tokens "
        "are its text and one end.",
        "![Quality against model calls](sweep.png)",
        sweep_table(sweep),
        "## Targets of the LM's own making",
        f"{targets['differ']} of {targets['items']} differ from the templates'; {targets['unusable']} are empty or too long and left out.",
        target_table(targets),
        "## Worse recordings",
        "`python -m lab.robustness`: the demo's stage 1 (word errors) and stage 2, by threshold 0.9. Noise is white, its level against the whole clip. "
        "Speed is changed by resampling, so that the pitch moves along. Telephone: 8 kHz, mu-law, 8 bits. The right answer stays the clean clip's.",
        robustness_table(robust),
    ]  # fmt: skip
    (out / "report.md").write_text("\n\n".join(sections) + "\n")
    return out / "report.md"
