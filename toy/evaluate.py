"""How well does a toy run hear? Word error rates, accuracies and figures, in RUN/report.json.

    python -m toy.evaluate --run runs/toy            writes runs/toy/report.json, report.md, figures
    python -m toy.evaluate --run runs/toy --check    and fails when a promised figure is missed
    python -m toy.evaluate --run runs/toy --every-sampler    stage 1 by ten settings, not two
    python -m toy.evaluate --summary RUN RUN ...     a table of evaluated runs: mean and range
    python -m toy.evaluate --compare RUN RUN         what differs in their settings and figures
    python -m toy.evaluate --run runs/toy/real --whisper DIR --llm runs/toy/llada \\
        --corpus runs/toy/corpus

RUN holds the adapters (stage1, stage2, and semantic if the control was trained) and their encoder,
LM and test clips (whisper, llada, corpus). Options name others; the report records which were used.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import torch

from checkpoints.command_line import DTYPES, add_force_parts, one_line_errors
from checkpoints.files import check_writable, read_json, write_json
from checkpoints.model import load_diffa
from checkpoints.progress import add_quiet, progress
from data import ManifestError, build_prompt, load_manifest
from diffa import AUDIO_PARTS, DIFFA
from encoder import FRAMES_PER_SECOND
from evaluation.wer import word_error_rate
from sampler import Answer, SamplerConfig, answer, generate
from toy.autoregressive import CausalLM, greedy
from toy.compare import compare
from toy.grammar import CONTENT_KINDS, KINDS, SLOTS, VOICE_KINDS
from toy.pretrain_lm import ANSWER_LENGTH as G
from toy.pretrain_lm import THRESHOLD, accuracy
from toy.report import (
    COUNT_RULE,
    broken_promises,
    figures,
    plot,
    summary,
    write_markdown,
)
from training.states import StateCache

NAME = "python -m toy.evaluate"

# The sampler settings that stage 1 can be measured with. Every position is filled, so that the
# calls compare the rules and nothing else. Without --every-sampler only the USUAL ones count.
FILLED = {"length": G, "stop_at_end": False}
STAGE1_SETTINGS = {
    f"{n} steps": SamplerConfig(steps=n, **FILLED) for n in (G, G // 2, G // 3, 4, 2, 1)
}
for tau in (0.99, 0.9, 0.7):
    STAGE1_SETTINGS[f"threshold {tau}"] = SamplerConfig(rule="threshold", threshold=tau, **FILLED)
STAGE1_SETTINGS["left to right"] = SamplerConfig(block_length=1, **FILLED)
USUAL = (COUNT_RULE, "threshold 0.9")


def answers_to(
    model: DIFFA, states: StateCache, items: list[dict], config: SamplerConfig
) -> list[Answer]:
    """Answers to the `input` of manifest items; the autoregressive baseline answers greedily."""
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]

    def audio(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return model.hear(*states(items[rows]))

    # A causal LM cannot fill in masks.
    decode = greedy if isinstance(model.lm, CausalLM) else generate
    answers = answer(model.lm, model.tokenizer, prompts, audio, config, batch=100, decode=decode)
    return list(answers)


def mean_calls(answers: list[Answer]) -> float:
    """Model calls of a mean answer."""
    return mean(a.calls for a in answers)


def transcription(
    model: DIFFA, states: StateCache, items: list[dict], names: Iterable[str] = USUAL
) -> dict:
    """Word error rate, calls and seconds of a stage-1 model, and examples.

    names: of the sampler settings, keys of STAGE1_SETTINGS.
    """
    targets = [item["transcription"] for item in items]
    table = {}
    examples = []
    for name in progress(names, "stage 1, sampler settings"):
        # The clock runs from the encoder's states to the text.
        started = time.perf_counter()
        answers = answers_to(model, states, items, STAGE1_SETTINGS[name])
        texts = [a.text for a in answers]
        table[name] = {
            "word_error_rate": word_error_rate(texts, targets),
            "calls": mean_calls(answers),
            "seconds_a_clip": (time.perf_counter() - started) / len(items),
        }

        # The first setting is the published rule, one token a step.
        examples = examples or [{"target": t, "prediction": p} for t, p in zip(targets[:5], texts)]
    return {"items": len(items), "by_sampler": table, "examples": examples}


def questions(
    model: DIFFA, states: StateCache, items: list[dict], config: SamplerConfig = THRESHOLD
) -> dict:
    """Results of a stage-2 model by kind of question, in percent.

    Returns:
        for each kind of question its accuracy (exact answers; word error rate for `repeat` and
        `caption`), its items, and calls and tokens (end of text included) of a mean answer. Also
        the mean accuracies `content_mean` of the slots and `voice_mean` of the attributes.
    """
    table = {}
    for kind in progress((*CONTENT_KINDS, *VOICE_KINDS, "caption"), "stage 2, kinds of question"):
        # Each question of this kind, once.
        chosen = [item for item in items if item["kind"] == kind]
        if not chosen:
            continue
        answers = answers_to(model, states, chosen, config)
        predictions = [a.text for a in answers]
        targets = [item["target"] for item in chosen]

        # A sentence is scored by its words, any other answer must be exact.
        if kind in ("repeat", "caption"):
            table[kind] = {"word_error_rate": word_error_rate(predictions, targets)}
        else:
            table[kind] = {"accuracy": accuracy(predictions, targets)}

        # What a mean answer costs.
        lengths = [len(model.tokenizer.encode(text)) + 1 for text in predictions]
        table[kind]["items"] = len(chosen)
        table[kind]["calls"] = mean_calls(answers)
        table[kind]["tokens"] = mean(min(n, config.length) for n in lengths)

    # Every kind has the same weight, however many questions it has.
    for name, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        if not table.keys() >= set(kinds):
            continue  # a mean of some would look like the mean of all
        table[name] = mean(table[kind]["accuracy"] for kind in kinds)
    return table


def asked_items(items: list[dict], corpus: Path) -> list[dict]:
    """The items of a known kind of question. Raises ManifestError: there is none."""
    asked = [item for item in items if item.get("kind") in KINDS]
    file = corpus / "instruct_test.json"
    if not asked:
        kinds = ", ".join(KINDS)
        raise ManifestError(f"{file}: no item has a `kind` of question that is known ({kinds})")
    if len(asked) < len(items):
        rest = f"{len(items) - len(asked)} of {len(items)} items"
        print(f"{file}: {rest} have no known `kind` of question and are left out", file=sys.stderr)
    return asked


def pretrained_figures(whisper: Path, llm: Path) -> dict:
    """What toy.pretrain measured of the frozen parts; those made elsewhere have no such file."""
    files = (whisper.parent / "encoder.json", llm.parent / "lm.json")
    return {
        file.stem: {k: v for k, v in read_json(file).items() if k != "losses"}
        for file in files
        if file.is_file()
    }


def window_of_all(models: list[DIFFA], adapters: list[Path]) -> float:
    """The encoder's window of all models, in seconds. Raises ValueError: they differ."""
    windows = {model.encoder.config.context / FRAMES_PER_SECOND for model in models}
    if len(windows) > 1:
        names = ", ".join(str(folder) for folder in adapters)
        raise ValueError(
            f"{names}: trained with different windows of {sorted(windows)} s; train them with the "
            "same --audio-context"
        )
    return windows.pop()


def evaluate(
    run: Path,
    whisper: Path,
    llm: Path,
    corpus: Path,
    adapters: list[Path],
    *,
    settings: Iterable[str] = USUAL,
    **options,
) -> dict:
    """Measure adapters on the test clips; write RUN/report.json, RUN/report.md and its figures.

    Args:
        whisper, llm, adapters: directories, or the release's files. settings: of the sampler, see
            `transcription`. options: of load_diffa.
    Returns:
        the report.
    Raises:
        ValueError: no adapters, or some that were trained with different windows.
        AudioError, ManifestError, WeightsError: files that cannot be used.
    """
    started = time.perf_counter()
    if not adapters:
        raise ValueError(f"{run}: holds no trained adapters; train them first, or pass --adapters")
    run.mkdir(parents=True, exist_ok=True)
    check_writable(run / "report.json")
    asr = load_manifest(corpus / "asr_test.json")
    if not any(item["transcription"].split() for item in asr):
        raise ManifestError(f"{corpus / 'asr_test.json'}: no item has a word to compare with")
    instruct = asked_items(load_manifest(corpus / "instruct_test.json"), corpus)

    # 1. What toy.pretrain measured of the frozen parts.
    report = pretrained_figures(whisper, llm)
    minutes = {name: result.get("minutes") for name, result in report.items()}

    # 2. The models. One pass of the encoder serves all of them, if their windows are the same.
    models = [load_diffa(whisper, llm, folder, **options).eval() for folder in adapters]
    window = window_of_all(models, adapters)
    states = StateCache(models[0], asr + instruct)

    # 3. Each of them on its stage's test; minutes come from its training, if that was here.
    for model, folder in zip(models, adapters, strict=True):
        if model.stage == "stage1":
            report["stage1"] = transcription(model, states, asr, settings)
        else:
            report[model.stage] = questions(model, states, instruct)
        if model.stage != "semantic" and (folder / "training.json").is_file():
            minutes[model.stage] = read_json(folder / "training.json").get("minutes")

    # 4. Sources and minutes; `make demo` writes RUN/started when it begins.
    parts = {"whisper": str(whisper), "llm": str(llm), "corpus": str(corpus)}
    report["parts"] = parts | {"audio_context": window}
    report["minutes"] = minutes | {"evaluate": (time.perf_counter() - started) / 60}
    if (run / "started").is_file():
        report["minutes"]["all"] = (time.time() - (run / "started").stat().st_mtime) / 60

    write_json(run / "report.json", report)
    plot(report, run)
    write_markdown(report, run)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Evaluate a run directory.")
    add = parser.add_argument
    only = parser.add_mutually_exclusive_group().add_argument
    only("--summary", type=Path, nargs="+", metavar="RUN", help="only a table of evaluated runs")
    differing = "only what differs between two evaluated runs"
    only("--compare", type=Path, nargs=2, metavar="RUN", help=differing)
    add("--run", type=Path, default=Path("runs/toy"))
    for name, folder in (("whisper", "whisper"), ("llm", "llada"), ("corpus", "corpus")):
        add(f"--{name}", type=Path, help=f"default: RUN/{folder}")
    adapters = "directories or the release's files; default: RUN/stage1, RUN/stage2, RUN/semantic"
    add("--adapters", type=Path, nargs="+", help=adapters)
    dtype = "of the frozen encoder and LM (default: the LM as in its file, the encoder float32)"
    add("--dtype", choices=DTYPES, help=dtype)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_force_parts(parser)
    add("--check", action="store_true", help="fail when a promise is broken")
    every = f"measure stage 1 by all {len(STAGE1_SETTINGS)} sampler settings"
    add("--every-sampler", action="store_true", help=f"{every} (default: {' and '.join(USUAL)})")
    add_quiet(parser)
    args = parser.parse_args()
    for name in ("whisper", "llm", "corpus", "adapters", "dtype", "check", "every_sampler"):
        if getattr(args, name) and (args.summary or args.compare):
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} has no effect: --summary and --compare only read reports")

    # What the options do not name lies in the run.
    run = args.run
    stages = [run / stage for stage in AUDIO_PARTS]
    trained = [path for path in stages if (path / "adapters.safetensors").is_file()]
    with one_line_errors(NAME):
        if args.summary:
            print("\n".join(summary([read_json(path / "report.json") for path in args.summary])))
            return
        if args.compare:
            print("\n".join(compare(*args.compare)))
            return
        report = evaluate(
            run,
            args.whisper or run / "whisper",
            args.llm or run / "llada",
            args.corpus or run / "corpus",
            args.adapters or trained,
            settings=STAGE1_SETTINGS if args.every_sampler else USUAL,
            dtype=DTYPES.get(args.dtype),
            device=args.device,
            allow_other_parts=args.allow_other_parts,
        )

        # `make demo` must fail when a promise is broken.
        print(f"{run / 'report.md'}: the figures; {run / 'report.json'} holds them as JSON")
        for name, (value, _) in figures(report).items():
            print(f"{value:8.2f}  {name}")
        broken = broken_promises(report) if args.check else []
        if broken:
            raise SystemExit("\n".join(f"missed: {line}" for line in broken))


if __name__ == "__main__":
    main()
