"""Which findings of the paper reproduce, from the measurements of lab/ablations.py.

A finding is a difference between two models of the same seed. It reproduces if the difference has
the paper's sign for every seed. Our questions are not the paper's benchmarks, so signs are compared
and not sizes. A list of tables has one table for each seed.
"""

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
KINDS = [k for k in (*CONTENT_KINDS, *VOICE_KINDS) if k != "repeat"]  # those scored by accuracy

# DIFFA (arXiv 2507.18452), tables 5 and 6: percent of the lesser model, then of the full one.
BENCHMARKS = ("MMAU", "MMSU", "VoiceBench")
PAPER = {
    "adapters": {"semantic": (47.70, 52.88), "both": (49.71, 56.04)},
    "backbone": {"LLaMA 3.1": (28.40, 38.40), "LLaDA": (51.71, 54.72)},
    "targets": {"Qwen3's": (49.71, 56.04, 48.22), "its own": (51.31, 56.18, 43.52)},
}


# ---- numbers
def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """Mean and range over seeds, "91.2 (90.1 to 92.3)"; sign="+" also marks positive numbers."""
    numbers = (sum(values) / len(values), min(values), max(values))
    mean, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{mean} ({low} to {high})"


def values(tables: list[dict], *path: str) -> list[float]:
    """The number at `path` in each table."""
    found = []
    for table in tables:
        for key in path:
            table = table[key]
        found.append(table)
    return found


def mean_accuracy(tables: list[dict]) -> list[float]:
    """Mean accuracy over KINDS in percent, of each table."""
    return [sum(table[kind]["accuracy"] for kind in KINDS) / len(KINDS) for table in tables]


def minus(a: list[float], b: list[float]) -> list[float]:
    """Differences of two models, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def verdict(holds: list[bool]) -> str:
    """Whether a finding reproduces, given for which seeds it holds."""
    if all(holds):
        return f"Reproduces (for {len(holds)} of {len(holds)} seeds)."
    return f"Does not reproduce (it holds for {sum(holds)} of {len(holds)} seeds)."


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- sentences
def paper(part: str, tables: str) -> str:
    """The paper's differences for one ablation, from the lesser model to the full one."""
    lesser, full = PAPER[part].values()
    gains = (f"{b - a:+.2f} on {name}" for a, b, name in zip(lesser, full, BENCHMARKS))
    return f"Paper ({tables}): {', '.join(gains)}."


def model_findings(tables: dict[str, list[dict]], targets: dict) -> list[str]:
    """What adapters, backbone and targets are worth. tables: those of each arm."""
    both = tables["both"]
    voice = minus(values(both, "voice_mean"), values(tables["semantic"], "voice_mean"))
    content = minus(values(both, "content_mean"), values(tables["semantic"], "content_mean"))
    backbone = minus(mean_accuracy(both), mean_accuracy(tables["baseline"]))
    own = minus(mean_accuracy(tables["self"]), mean_accuracy(both))

    return [
        "The acoustic adapter carries how something is said. Both adapters minus semantic alone: "
        f"{spread(voice, sign='+')} points on voice, {spread(content, sign='+')} on content. "
        f"{paper('adapters', 'table 5')} {verdict([d > 0 for d in voice])}",
        "A diffusion LM listens better than an autoregressive one. Diffusion minus baseline: "
        f"{spread(backbone, sign='+')} points over all questions. "
        f"{paper('backbone', 'tables 5 and 6')} LLaMA 3.1's 28.40 and 38.40 are near chance, so a "
        "small autoregressive baseline that listens as well does not contradict the paper. "
        f"{verdict([d > 0 for d in backbone])}",
        "Targets that the LM writes itself serve as well as given ones. Own minus templates: "
        f"{spread(own, sign='+')} points over all questions; {targets['differ']} of "
        f"{targets['items']} targets differ. {paper('targets', 'table 6')} A loss below "
        f"{TOLERANCE:g} point counts as none. {verdict([d > -TOLERANCE for d in own])}",
    ]


def step_findings(sweep: list[dict]) -> list[str]:
    """What it costs to commit several tokens in a step."""
    content = minus(values(sweep, FAST, "content_mean"), values(sweep, FULL, "content_mean"))
    voice = minus(values(sweep, FAST, "voice_mean"), values(sweep, FULL, "voice_mean"))
    calls = {name: spread(values(sweep, name, "calls")) for name in (FAST, FULL)}
    at_once = minus(values(sweep, "count 1", "repeat"), values(sweep, FULL, "repeat"))

    return [
        f"Committing all confident tokens at once costs nothing. {FAST} minus {FULL}: "
        f"{spread(content, sign='+')} points on content, {spread(voice, sign='+')} on voice, with "
        f"{calls[FAST]} calls an answer in place of {calls[FULL]}. A loss below {TOLERANCE:g} "
        "point counts as none. Found by Fast-dLLM (arXiv 2505.22618). "
        f"{verdict([min(pair) > -TOLERANCE for pair in zip(content, voice)])}",
        f"Committing unconfident tokens at once costs quality. count 1 minus {FULL}: "
        f"{spread(at_once, sign='+')} points of WER in repeating a sentence; up to {TOLERANCE:g} "
        "counts as no cost. LLaDA's samples improve with more steps. "
        f"{verdict([d > TOLERANCE for d in at_once])}",
    ]


def speed_findings(timed: dict[str, list[dict]]) -> list[str]:
    """Seconds a caption of the diffusion LM, relative to the autoregressive baseline."""
    greedy = values(timed["baseline"], "greedy", "seconds")
    full = [a / b for a, b in zip(values(timed["both"], FULL, "seconds"), greedy)]
    fast = [a / b for a, b in zip(values(timed["both"], FAST, "seconds"), greedy)]

    return [
        f"Token by token, diffusion is slower than autoregression. {FULL} takes "
        f"{spread(full, 2)} times the baseline's seconds, one caption at a time. The release's "
        f"README says so without a figure. {verdict([ratio > 1 for ratio in full])}",
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
