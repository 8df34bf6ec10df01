"""The report of the ablations: tables, a figure, and the findings (lab/findings.py).

ablations.ablate returns the `results`. A list of tables has one for each seed.
"""

import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

from evaluation.figure import figure
from lab.findings import ARMS, BENCHMARKS, FULL, KINDS, PAPER
from lab.findings import accuracy, findings, markdown, spread, values
from lab.robustness import robustness_table
from toy.grammar import SLOTS, VOICE_KINDS


# ---- tables
def question_table(tables: dict) -> str:
    """Accuracy or WER for each kind of question and arm, and below them the paper's benchmarks."""
    rows = []
    for kind in (*KINDS, "repeat", "caption"):
        measure = "accuracy" if kind in KINDS else "word_error_rate"
        cells = [spread(values(tables[arm], kind, measure)) for arm in ARMS]
        name = kind if kind in KINDS else f"{kind}, WER"
        rows.append([name, *cells, str(tables["both"][0][kind]["items"])])

    # Means over the kinds.
    for name, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        cells = [spread(values(tables[arm], name)) for arm in ARMS]
        rows.append([f"mean of {', '.join(kinds)}", *cells, ""])
    cells = [spread(accuracy(tables[arm])) for arm in ARMS]
    rows.append([f"mean of all {len(KINDS)} scored by accuracy", *cells, ""])

    # The paper's figures, in the columns of the arms that they correspond to.
    for i, benchmark in enumerate(BENCHMARKS[:2]):
        semantic, both = (f"{pair[i]:.2f}" for pair in PAPER["adapters"].values())
        llama, llada = (f"{pair[i]:.2f}" for pair in PAPER["backbone"].values())
        rows.append([f"paper: {benchmark}, adapters", both, semantic, "-", "-", ""])
        rows.append([f"paper: {benchmark}, backbone", llada, "-", "-", f"{llama} (LLaMA 3.1)", ""])

    return markdown(["%", *ARMS.values(), "items"], rows)


def race_table(race: dict) -> str:
    """Calls and milliseconds a caption: the diffusion LM by sampler setting, and the baseline."""
    rows = []
    for arm in ("both", "baseline"):
        for name in race[arm][0]:
            if name == "minutes":
                continue
            calls, seconds, batched, wer = (
                values(race[arm], name, field)
                for field in ("calls", "seconds", "seconds_batched", "word_error_rate")
            )
            times = [spread([1000 * s for s in column]) for column in (seconds, batched)]
            rows.append([f"{ARMS[arm]}, {name}", spread(calls), *times, spread(wer)])

    heads = ["setting", "calls", "ms a caption, one at a time", "ms a caption, in one batch"]
    return markdown([*heads, "WER %"], rows)


def sweep_table(sweep: list[dict]) -> str:
    """Quality by sampler setting, with the calls and tokens that it took."""
    rows = []
    for name, first in sweep[0].items():
        if not isinstance(first, dict):
            continue
        calls = values(sweep, name, "calls")
        tokens = [n / c for n, c in zip(values(sweep, name, "tokens"), calls, strict=True)]
        fields = ("content_mean", "voice_mean", "repeat", "caption")
        quality = [spread(values(sweep, name, field)) for field in fields]
        rows.append([name, spread(calls), spread(tokens, 2), *quality])

    qualities = ["content %", "voice %", "repeat, WER %", "caption, WER %"]
    return markdown(["setting", "calls an answer", "tokens a call", *qualities], rows)


# ---- figures
def bounds(seeds: list[float]) -> tuple[float, list[list[float]]]:
    """A mean, and how far the range reaches below and above it, as matplotlib's yerr (2, 1)."""
    mean = sum(seeds) / len(seeds)
    # The rounded mean of equal values can lie outside their range.
    return mean, [[max(mean - min(seeds), 0.0)], [max(max(seeds) - mean, 0.0)]]


def plot_sweep(sweep: list[dict], path: Path) -> None:
    """Quality against model calls, one line for each rule, mean and range over seeds."""
    panels = {
        "content_mean": "content: accuracy (%)",
        "voice_mean": "voice: accuracy (%)",
        "repeat": "repeat: WER (%)",
        "caption": "caption: WER (%)",
    }
    with figure(path, columns=len(panels), size=(14, 3.2)) as axes:
        for axis, (field, title) in zip(axes, panels.items(), strict=True):
            for rule in ("count", "threshold", "factor"):
                names = [name for name in sweep[0] if name.startswith(rule)]
                calls = [bounds(values(sweep, name, "calls"))[0] for name in names]
                means, reaches = zip(*(bounds(values(sweep, name, field)) for name in names))
                reach = torch.tensor(reaches)[..., 0].T  # (2, settings)
                axis.errorbar(calls, means, reach, fmt="o-", label=rule, lw=1, ms=3)

            limits = (None, 100) if field.endswith("_mean") else (0, None)
            axis.set(title=title, xlabel="model calls an answer", ylim=limits)
        axes[0].legend()


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
    steps = lm["steps"]
    return f"{lm['copy_error']:.1f} % WER and {mean:.1f} % accuracy after {steps} steps"


def write_report(out: Path, results: dict, seeds: list[int], command: str, device: str) -> Path:
    """Write report.md and its figures into `out`; returns the report's path. results: from ablate."""
    tables = results["questions"]
    targets = results["self_targets"]
    sweep = results["sweep"]["both"]
    race = results["race"]
    plot_sweep(sweep, out / "sweep.png")
    by_kind = (f"{kind} {n}" for kind, n in sorted(targets["differ_by_kind"].items()) if n)

    sections = [
        "# Ablations at tiny scale",
        f"`{command}`, seeds {', '.join(map(str, seeds))}, {date.today()}; "
        f"{describe_machine(device)}. Mean and range (lowest to highest) over the seeds. A seed "
        "draws new adapters, the order of the clips and the noise. Corpus, encoder, LM and stage 1 "
        "are shared.",
        "\n".join(f"- {sentence}" for sentence in findings(results)),
        "## Adapters, backbone, targets",
        question_table(tables),
        f"Own targets: {targets['differ']} of {targets['items']} differ from the templates' "
        f"({', '.join(by_kind)}); {targets['unusable']} are empty or too long and left out.",
        "The two language models on text alone, before any adapter: diffusion "
        f"{reading(results['lm'])}; autoregressive baseline {reading(results['baseline'])}.",
        "## Speed",
        f"Captions of {race['both'][0][FULL]['items']} clips, from the encoder's states to the "
        "text. Diffusion runs without a cache; the baseline keeps keys and values.",
        race_table(race),
        "## Sampler steps",
        f"`both` on {sweep[0]['clips']} clips. Calls and tokens are means over all questions, most "
        "of which have an answer of one word. An answer's tokens are its text and one end token.",
        "![Quality against model calls](sweep.png)",
        sweep_table(sweep),
        "## Degraded recordings",
        "`python -m lab.robustness`: the demo's stage 1 (WER) and stage 2, threshold 0.9. Noise is "
        "white; its level is relative to the whole clip. Speed is changed by resampling, so the "
        "pitch changes too. Telephone: 8 kHz, mu-law, 8 bits. Targets are the clean clip's.",
        robustness_table(results["robustness"]),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path
