"""The report of the ablations: tables, a figure, and which findings of the paper reproduce.

A finding is a difference between two models of the same seed. It reproduces if the difference has
the paper's sign for every seed. Our questions are not the paper's benchmarks, so signs are compared
and not sizes. A list of tables has one table for each seed; lab/ablations.py measures them.
"""

import os
import platform
from datetime import date
from pathlib import Path
from statistics import mean

import torch

from evaluation.figure import figure
from toy.grammar import CONTENT_KINDS, VOICE_KINDS
from toy.pretrain_lm import ANSWER_LENGTH

FULL = f"count {ANSWER_LENGTH}"  # one call for each token
FAST = "threshold 0.9"  # the usual threshold
TOLERANCE = 1.0  # points: a smaller loss counts as none

ARMS = {
    "both": "both adapters",
    "semantic": "semantic alone",
    "self": "own targets",
    "baseline": "autoregressive",
}
# Questions that are scored by accuracy. The others, repeat and caption, have a WER.
SCORED_KINDS = [kind for kind in (*CONTENT_KINDS, *VOICE_KINDS) if kind != "repeat"]

# DIFFA (arXiv 2507.18452): percent of the lesser model, then of the full one.
PAPER = {
    "table 5": {"MMAU": (47.70, 49.71), "MMSU": (52.88, 56.04)},  # semantic alone, both adapters
    "tables 5 and 6": {"MMAU": (28.40, 51.71), "MMSU": (38.40, 54.72)},  # LLaMA 3.1, LLaDA
    "table 6": {  # targets: Qwen3's, LLaDA's own
        "MMAU": (49.71, 51.31),
        "MMSU": (56.04, 56.18),
        "VoiceBench": (48.22, 43.52),
    },
}


# ---- numbers
def spread(numbers: list[float], digits: int = 1, sign: str = "") -> str:
    """Mean and range over seeds, "91.2 (90.1 to 92.3)"; sign="+" also marks positive numbers."""
    three = (mean(numbers), min(numbers), max(numbers))
    middle, low, high = (f"{number:{sign}.{digits}f}" for number in three)
    return f"{middle} ({low} to {high})"


def values(tables: list[dict], *path: str) -> list[float]:
    """The number at `path` in each table."""
    found = []
    for table in tables:
        for key in path:
            table = table[key]
        found.append(table)
    return found


def mean_accuracy(tables: list[dict]) -> list[float]:
    """Mean accuracy over SCORED_KINDS in percent, of each table."""
    return [mean(table[kind]["accuracy"] for kind in SCORED_KINDS) for table in tables]


def minus(a: list[float], b: list[float]) -> list[float]:
    """Differences of two models, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


# ---- findings
def verdict(holds: list[bool]) -> str:
    """Whether a finding reproduces, given for which seeds it holds."""
    if all(holds):
        return f"Reproduces (for {len(holds)} of {len(holds)} seeds)."
    return f"Does not reproduce (it holds for {sum(holds)} of {len(holds)} seeds)."


def paper(where: str) -> str:
    """The paper's differences, from the lesser model to the full one."""
    gains = (f"{full - lesser:+.2f} on {name}" for name, (lesser, full) in PAPER[where].items())
    return f"Paper ({where}): {', '.join(gains)}."


def model_findings(tables: dict[str, list[dict]], targets: dict) -> list[str]:
    """What adapters, backbone and targets are worth. tables: those of each arm."""
    both = tables["both"]
    voice = minus(values(both, "voice_mean"), values(tables["semantic"], "voice_mean"))
    content = minus(values(both, "content_mean"), values(tables["semantic"], "content_mean"))
    backbone = minus(mean_accuracy(both), mean_accuracy(tables["baseline"]))
    own = minus(mean_accuracy(tables["self"]), mean_accuracy(both))

    kinds = ", ".join(f"{kind} {n}" for kind, n in targets["differ_by_kind"].items() if n)
    return [
        "The acoustic adapter carries how something is said. Both adapters minus semantic alone: "
        f"{spread(voice, sign='+')} points on voice, {spread(content, sign='+')} on content. "
        f"{paper('table 5')} {verdict([d > 0 for d in voice])}",
        "A diffusion LM listens better than an autoregressive one. Diffusion minus baseline: "
        f"{spread(backbone, sign='+')} points over all questions. {paper('tables 5 and 6')} "
        "LLaMA 3.1's 28.40 and 38.40 are near chance, so a small autoregressive baseline that "
        "listens as well does not contradict the paper. "
        f"{verdict([d > 0 for d in backbone])}",
        "Targets that the LM writes itself serve as well as given ones. Own minus templates: "
        f"{spread(own, sign='+')} points over all questions; {targets['differ']} of "
        f"{targets['items']} targets differ ({kinds}). {paper('table 6')} "
        f"{verdict([d > -TOLERANCE for d in own])}",
    ]


def step_findings(sweep: list[dict]) -> list[str]:
    """What it costs to commit several tokens in a step."""
    content = minus(values(sweep, FAST, "content_mean"), values(sweep, FULL, "content_mean"))
    voice = minus(values(sweep, FAST, "voice_mean"), values(sweep, FULL, "voice_mean"))
    at_once = minus(values(sweep, "count 1", "repeat"), values(sweep, FULL, "repeat"))

    return [
        f"Committing all confident tokens at once costs nothing. {FAST} minus {FULL}: "
        f"{spread(content, sign='+')} points on content, {spread(voice, sign='+')} on voice. Found "
        "by Fast-dLLM (arXiv 2505.22618). "
        f"{verdict([min(pair) > -TOLERANCE for pair in zip(content, voice)])}",
        f"Committing unconfident tokens at once costs quality. count 1 minus {FULL}: "
        f"{spread(at_once, sign='+')} points of WER in repeating a sentence. LLaDA's samples "
        f"improve with more steps. {verdict([d > TOLERANCE for d in at_once])}",
    ]


def speed_findings(timed: dict[str, list[dict]]) -> list[str]:
    """Seconds a caption of the diffusion LM, relative to the autoregressive baseline."""
    greedy = values(timed["baseline"], "greedy", "seconds")
    full = [a / b for a, b in zip(values(timed["both"], FULL, "seconds"), greedy)]
    fast = [a / b for a, b in zip(values(timed["both"], FAST, "seconds"), greedy)]

    return [
        f"Token by token, diffusion is slower than autoregression. {FULL} takes "
        f"{spread(full, 2)} times the baseline's seconds, one caption at a time. The release says "
        f"so without a figure. {verdict([ratio > 1 for ratio in full])}",
        f"Committing all confident tokens at once makes it faster. {FAST} takes {spread(fast, 2)} "
        "times the baseline's seconds. Whisper-LLaDA: 0.23 times, for transcription. "
        f"{verdict([ratio < 1 for ratio in fast])}",
    ]


def findings(results: dict) -> list[str]:
    """A paragraph for each finding: ours, the paper's, the verdict. results: from ablate."""
    return [
        *model_findings(results["questions"], results["self_targets"]),
        *step_findings(results["sweep"]["both"]),
        *speed_findings(results["race"]),
    ]


# ---- tables and the figure
def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def question_table(tables: dict[str, list[dict]]) -> str:
    """Accuracy or WER by kind of question and arm, and means over kinds."""
    paths = {kind: (kind, "accuracy") for kind in SCORED_KINDS}
    paths |= {f"{kind}, WER": (kind, "word_error_rate") for kind in ("repeat", "caption")}
    paths |= {"mean of content": ("content_mean",), "mean of voice": ("voice_mean",)}
    rows = [
        [name, *(spread(values(tables[arm], *path)) for arm in ARMS)]
        for name, path in paths.items()
    ]
    return markdown(["%", *ARMS.values()], rows)


def setting_table(tables: dict[str, list[dict]], fields: dict[str, tuple[str, float]]) -> str:
    """One row for each arm and sampler setting. fields: a column's head: its field and factor."""
    rows = []
    for arm, of_seeds in tables.items():
        for name in (name for name, row in of_seeds[0].items() if isinstance(row, dict)):
            cells = [
                spread([factor * value for value in values(of_seeds, name, field)])
                for field, factor in fields.values()
            ]
            rows.append([f"{ARMS[arm]}, {name}", *cells])
    return markdown(["setting", *fields], rows)


def plot_arms(tables: dict[str, list[dict]], path: Path) -> None:
    """Accuracy by kind of question and arm: means over seeds."""
    with figure(path, size=(10, 3.4)) as axis:
        for shift, (arm, label) in enumerate(ARMS.items()):
            x = [i + 0.2 * shift for i in range(len(SCORED_KINDS))]
            means = [mean(values(tables[arm], kind, "accuracy")) for kind in SCORED_KINDS]
            axis.bar(x, means, 0.2, label=label)
        axis.set(
            xticks=range(len(SCORED_KINDS)),
            xticklabels=SCORED_KINDS,
            ylabel="accuracy (%)",
            ylim=(0, 100),
        )
        axis.legend(loc="lower center", fontsize=7, ncols=len(ARMS))


# ---- the report
def reading(lm: dict) -> str:
    """How well a language model reads text. lm: from lm.json or baseline.json."""
    accuracy = mean(lm["oracle"].values())
    return f"{lm['copy_error']:.1f} % WER, {accuracy:.1f} % accuracy, {lm['steps']} steps"


def write_report(out: Path, results: dict, command: str) -> Path:
    """Write report.md and ablations.png into `out`; returns the report's path."""
    plot_arms(results["questions"], out / "ablations.png")
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"
    quality = {
        "calls": ("calls", 1),
        "content %": ("content_mean", 1),
        "voice %": ("voice_mean", 1),
        "repeat, WER %": ("repeat", 1),
        "caption, WER %": ("caption", 1),
    }
    speed = {
        "calls": ("calls", 1),
        "ms, one at a time": ("seconds", 1000),
        "ms, in one batch": ("seconds_batched", 1000),
        "WER %": ("word_error_rate", 1),
    }

    sections = [
        "# Ablations at tiny scale",
        f"`{command}`, {date.today()}; {machine}. Mean (lowest to highest) of the seeds. A seed "
        "draws new adapters, the order of the clips and the noise; the rest is shared. Differences "
        f"of less than {TOLERANCE:g} point count as none where quality is kept.",
        "\n".join(f"- {sentence}" for sentence in findings(results)),
        "## Adapters, backbone, targets",
        "![Accuracy by kind of question](ablations.png)",
        question_table(results["questions"]),
        f"The LMs on text alone, before any adapter: diffusion {reading(results['lm'])}; "
        f"autoregressive baseline {reading(results['baseline'])}.",
        "## Sampler steps: means over all questions",
        setting_table(results["sweep"], quality),
        "## Speed: one caption, from the encoder's states to the text",
        "Diffusion runs without a cache; the baseline keeps keys and values.",
        setting_table(results["race"], speed),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n", "utf-8")
    return path
