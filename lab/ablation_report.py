"""The report of the ablations: tables, a figure, and the findings (lab/findings.py).

`results` are what ablations.ablate returns. A list of tables has one table for each seed.
"""

import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

from evaluation.figure import figure
from lab.findings import ARMS, FULL, KINDS, PAPER, findings, markdown, mean_accuracy, spread, values
from toy.grammar import SLOTS, VOICE_KINDS


# ---- tables
def question_table(tables: dict[str, list[dict]]) -> str:
    """Accuracy or WER by kind of question and arm, and below them the paper's benchmarks."""
    rows = []
    for kind in (*KINDS, "repeat", "caption"):
        measure = "accuracy" if kind in KINDS else "word_error_rate"
        name = kind if kind in KINDS else f"{kind}, WER"
        rows.append([name, *(spread(values(tables[arm], kind, measure)) for arm in ARMS)])

    # Means over the kinds.
    for name, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        cells = [spread(values(tables[arm], name)) for arm in ARMS]
        rows.append([f"mean of {', '.join(kinds)}", *cells])
    cells = [spread(mean_accuracy(tables[arm])) for arm in ARMS]
    rows.append([f"mean of all {len(KINDS)} scored by accuracy", *cells])

    # The paper's figures, in the columns of the arms that they correspond to.
    for i, benchmark in enumerate(("MMAU", "MMSU")):
        semantic, both = (f"{pair[i]:.2f}" for pair in PAPER["adapters"].values())
        llama, llada = (f"{pair[i]:.2f}" for pair in PAPER["backbone"].values())
        rows.append([f"paper: {benchmark}, adapters", both, semantic, "-", "-"])
        rows.append([f"paper: {benchmark}, backbone", llada, "-", "-", llama])
    return markdown(["%", *ARMS.values()], rows)


def speed_table(timed: dict[str, list[dict]]) -> str:
    """Calls and milliseconds a caption: the diffusion LM by sampler setting, and the baseline."""
    rows = []
    for arm, tables in timed.items():
        for name in (name for name, row in tables[0].items() if isinstance(row, dict)):
            cells = [spread(values(tables, name, "calls"))]
            for field in ("seconds", "seconds_batched"):
                cells.append(spread([1000 * s for s in values(tables, name, field)]))
            cells.append(spread(values(tables, name, "word_error_rate")))
            rows.append([f"{ARMS[arm]}, {name}", *cells])

    return markdown(["setting", "calls", "ms, one at a time", "ms, in one batch", "WER %"], rows)


def sweep_table(tables: list[dict]) -> str:
    """Quality by sampler setting, with the calls and tokens that it took."""
    rows = []
    for name in (name for name, row in tables[0].items() if isinstance(row, dict)):
        calls = values(tables, name, "calls")
        tokens = [n / c for n, c in zip(values(tables, name, "tokens"), calls)]
        fields = ("content_mean", "voice_mean", "repeat", "caption")
        quality = [spread(values(tables, name, field)) for field in fields]
        rows.append([name, spread(calls), spread(tokens, 2), *quality])

    heads = ["setting", "calls an answer", "tokens a call", "content %", "voice %"]
    return markdown([*heads, "repeat, WER %", "caption, WER %"], rows)


# ---- the figure
def bounds(seeds: list[float]) -> tuple[float, list[list[float]]]:
    """A mean, and how far the range reaches below and above it, as matplotlib's yerr (2, 1)."""
    mean = sum(seeds) / len(seeds)
    # The rounded mean of equal values can lie outside their range.
    return mean, [[max(mean - min(seeds), 0.0)], [max(max(seeds) - mean, 0.0)]]


def plot_arms(tables: dict[str, list[dict]], path: Path) -> None:
    """Accuracy by kind of question and arm, mean and range over seeds."""
    with figure(path, size=(10, 3.4)) as axis:
        for shift, (arm, label) in enumerate(ARMS.items()):
            for i, kind in enumerate(KINDS):
                mean, reach = bounds(values(tables[arm], kind, "accuracy"))
                x = i + 0.2 * shift - 0.3
                axis.bar(x, mean, 0.2, yerr=reach, color=f"C{shift}", label=None if i else label)

        axis.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylabel="accuracy (%)", ylim=(0, 100))
        axis.legend(loc="lower center", fontsize=7, ncols=len(ARMS), framealpha=1)


# ---- the report
def describe_machine(device: str) -> str:
    """Processor, number of cores, device and torch's version."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.*)", cpu.read_text()) if cpu.is_file() else []
    processor = (names or [platform.machine()])[0]
    return f"{processor}, {os.cpu_count()} cores, device {device}, torch {torch.__version__}"


def reading(lm: dict) -> str:
    """How well a language model reads text. lm: from lm.json or baseline.json."""
    mean = sum(lm["oracle"].values()) / len(lm["oracle"])
    return f"{lm['copy_error']:.1f} % WER, {mean:.1f} % accuracy, {lm['steps']} steps"


def write_report(out: Path, results: dict, command: str, device: str) -> Path:
    """Write report.md and ablations.png into `out`; returns the report's path."""
    sweep = results["sweep"]["both"]
    targets = results["self_targets"]
    plot_arms(results["questions"], out / "ablations.png")

    sections = [
        "# Ablations at tiny scale",
        f"`{command}`, {date.today()}; {describe_machine(device)}. Mean and range (lowest to "
        "highest) over the seeds. A seed draws new adapters, the order of the clips and the noise. "
        "Corpus, encoder, LM and stage 1 are shared.",
        "\n".join(f"- {sentence}" for sentence in findings(results)),
        "## Adapters, backbone, targets",
        "![Accuracy by kind of question](ablations.png)",
        question_table(results["questions"]),
        f"Own targets: {targets['unusable']} of them are empty or too long and left out.",
        f"The LMs on text alone, before any adapter: diffusion {reading(results['lm'])}; "
        f"autoregressive baseline {reading(results['baseline'])}.",
        "## Speed",
        f"Captions of {results['race']['both'][0][FULL]['items']} clips, from the encoder's states "
        "to the text. Diffusion runs without a cache; the baseline keeps keys and values.",
        speed_table(results["race"]),
        "## Sampler steps",
        f"`both` on {sweep[0]['clips']} clips, means over all questions. Most answers are one word "
        "and one end token.",
        sweep_table(sweep),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path
