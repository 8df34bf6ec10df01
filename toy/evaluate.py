"""How well does a toy run hear? Word error rates, accuracies and figures, in RUN/report.json.

    python -m toy.evaluate --run runs/toy            writes runs/toy/report.json and its figures
    python -m toy.evaluate --run runs/toy --check    and fails when a promised figure is missed
    python -m toy.evaluate --summary RUN RUN ...     a table of evaluated runs: mean and range
    python -m toy.evaluate --run runs/toy/real --whisper DIR --llm runs/toy/llada \\
        --corpus runs/toy/corpus

RUN holds the adapters (stage1, stage2, and semantic if the control was trained) and their encoder,
LM and test clips (whisper, llada, corpus). Options name others; the report records which were used.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from checkpoints.command_line import DTYPES, one_line_errors
from checkpoints.files import read_json, write_json
from checkpoints.model import load_diffa
from data import build_prompt, load_manifest
from diffa import AUDIO_PARTS, DIFFA
from encoder import FRAMES_PER_SECOND
from evaluation.wer import word_error_rate
from sampler import Answer, SamplerConfig, answer, generate
from toy.autoregressive import CausalLM, greedy
from toy.grammar import CONTENT_KINDS, SLOTS, VOICE_KINDS
from toy.pretrain_lm import ANSWER_LENGTH as G
from toy.pretrain_lm import THRESHOLD, accuracy
from toy.report import broken_promises, plot_losses, plot_questions, plot_steps, summary
from training.states import StateCache

NAME = "python -m toy.evaluate"
BATCH = 100


def answers_to(
    model: DIFFA, states: StateCache, items: list[dict], config: SamplerConfig
) -> list[Answer]:
    """Answers to the `input` of manifest items; the autoregressive baseline answers greedily."""
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]

    def audio(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return model.hear(*states(items[rows]))

    decode = greedy if isinstance(model.lm, CausalLM) else generate
    answers = answer(model.lm, model.tokenizer, prompts, audio, config, batch=BATCH, decode=decode)
    return list(answers)


def mean_calls(answers: list[Answer]) -> float:
    """Model calls of a mean answer."""
    return mean(a.calls for a in answers)


def sampler_settings() -> dict[str, SamplerConfig]:
    """The settings that stage 1 is measured with, by name.

    Every position is filled, so that the calls compare the rules and nothing else.
    """
    settings = {}
    setting = partial(SamplerConfig, length=G, stop_at_end=False)
    for steps in (G, G // 2, G // 3, 4, 2, 1):
        settings[f"{steps} steps"] = setting(steps=steps)
    for tau in (0.99, 0.9, 0.7):
        settings[f"threshold {tau}"] = setting(rule="threshold", threshold=tau)
    settings["left to right"] = setting(block_length=1)
    return settings


def transcription(model: DIFFA, states: StateCache, items: list[dict]) -> dict:
    """Word error rate, calls and seconds of a stage-1 model by sampler setting, and examples."""
    targets = [item["transcription"] for item in items]
    table = {}
    texts = {}
    for name, config in tqdm(sampler_settings().items(), desc="sampler settings", leave=False):
        started = time.perf_counter()
        answers = answers_to(model, states, items, config)
        texts[name] = [a.text for a in answers]
        table[name] = {
            "word_error_rate": word_error_rate(texts[name], targets),
            "calls": mean_calls(answers),
            "seconds_a_clip": (time.perf_counter() - started) / len(items),
        }

    pairs = list(zip(targets, texts[f"{G} steps"]))[:5]
    examples = [{"said": target, "heard": prediction} for target, prediction in pairs]
    return {"items": len(items), "by_sampler": table, "examples": examples}


def questions(
    model: DIFFA, states: StateCache, items: list[dict], config: SamplerConfig = THRESHOLD
) -> dict:
    """Results of a stage-2 model by kind of question, in percent.

    Returns:
        for each kind its accuracy (exact answers; word error rate for `repeat` and `caption`), its
        items, and calls and tokens (end of text included) of a mean answer; and the mean accuracies
        `content_mean` of the slots and `voice_mean` of the attributes.
    """
    table = {}
    for kind in tqdm((*CONTENT_KINDS, *VOICE_KINDS, "caption"), desc="questions", leave=False):
        chosen = [item for item in items if item["kind"] == kind]
        answers = answers_to(model, states, chosen, config)
        predictions = [a.text for a in answers]
        targets = [item["target"] for item in chosen]

        if kind in ("repeat", "caption"):
            table[kind] = {"word_error_rate": word_error_rate(predictions, targets)}
        else:
            table[kind] = {"accuracy": accuracy(predictions, targets)}

        lengths = [len(model.tokenizer.encode(text)) + 1 for text in predictions]
        table[kind]["items"] = len(chosen)
        table[kind]["calls"] = mean_calls(answers)
        table[kind]["tokens"] = mean(min(n, config.length) for n in lengths)

    for name, kinds in (("content_mean", SLOTS), ("voice_mean", VOICE_KINDS)):
        table[name] = mean(table[kind]["accuracy"] for kind in kinds)
    return table


def pretraining_figures(whisper: Path, llm: Path) -> dict:
    """What toy.pretrain measured of an encoder and an LM; nothing for models made elsewhere."""
    files = {"encoder": whisper.parent / "encoder.json", "lm": llm.parent / "lm.json"}
    figures = {name: read_json(file) for name, file in files.items() if file.is_file()}
    for result in figures.values():
        del result["losses"]
    return figures


def evaluate(
    run: Path,
    *,
    whisper: Path | None = None,
    llm: Path | None = None,
    corpus: Path | None = None,
    adapters: list[Path] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict:
    """Measure each of a run's adapters on the test clips; write RUN/report.json and its figures.

    Args:
        run: receives the report. whisper, llm, corpus: directories; None: those of the run.
        adapters: directories or the release's files; None: the run's stage1, stage2, semantic.
        dtype: of the frozen encoder and LM; None: the LM's as in its file, the encoder's float32.
    Returns:
        the report.
    Raises:
        ValueError: no adapters, or stages that were trained with different windows.
        AudioError, ManifestError, WeightsError: files that cannot be used.
    """
    started = time.perf_counter()
    whisper = whisper or run / "whisper"
    llm = llm or run / "llada"
    corpus = corpus or run / "corpus"
    if not adapters:
        adapters = [run / name for name in AUDIO_PARTS]
        adapters = [path for path in adapters if (path / "adapters.safetensors").is_file()]
    if not adapters:
        raise ValueError(
            f"{run}: holds no trained adapters (stage1, stage2); train them first, or pass "
            "--adapters"
        )
    asr = load_manifest(corpus / "asr_test.json")
    instruct = load_manifest(corpus / "instruct_test.json")

    # 1. What is known of the frozen parts.
    report = pretraining_figures(whisper, llm)
    minutes = {name: result["minutes"] for name, result in report.items()}
    report["parts"] = {"whisper": str(whisper), "llm": str(llm), "corpus": str(corpus)}

    # 2. Each of the adapters; the clips are encoded once for all of them.
    states = None
    for folder in adapters:
        model = load_diffa(whisper, llm, folder, device=device, dtype=dtype).eval()
        window = model.encoder.config.context / FRAMES_PER_SECOND  # seconds
        if states is None:
            states = StateCache(model, asr)
            report["parts"]["audio_context"] = window
        elif window != report["parts"]["audio_context"]:
            raise ValueError(
                f"{adapters[0]} and {folder} were trained with different windows; "
                "give both the same --audio-context"
            )

        if model.stage == "stage1":
            report["stage1"] = transcription(model, states, asr)
        else:
            report[model.stage] = questions(model, states, instruct)
        if model.stage != "semantic" and (folder / "training.json").is_file():
            minutes[model.stage] = read_json(folder / "training.json")["minutes"]

    # 3. Minutes; `make demo` writes RUN/started when it begins.
    report["minutes"] = minutes | {"evaluate": (time.perf_counter() - started) / 60}
    if (run / "started").is_file():
        report["minutes"]["all"] = (time.time() - (run / "started").stat().st_mtime) / 60

    # 4. Figures and the report itself.
    plot_losses(run, run / "losses.png")
    if "stage1" in report:
        plot_steps(report["stage1"]["by_sampler"], run / "steps.png")
    if "stage2" in report:
        plot_questions(report["stage2"], report.get("semantic"), run / "questions.png")
    write_json(run / "report.json", report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Evaluate a run directory.")
    parser.add_argument(
        "--summary", type=Path, nargs="+", metavar="RUN", help="only a table of evaluated runs"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    for name, folder in (("whisper", "whisper"), ("llm", "llada"), ("corpus", "corpus")):
        parser.add_argument(f"--{name}", type=Path, help=f"default: RUN/{folder}")
    parser.add_argument(
        "--adapters",
        type=Path,
        nargs="+",
        help="directories, or the release's files; default: RUN/stage1, RUN/stage2, RUN/semantic",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the frozen encoder and LM (default: the LM as in its file, the encoder float32)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="fail when a promise is broken")
    args = parser.parse_args()

    with one_line_errors(NAME):
        if args.summary:
            print("\n".join(summary([read_json(run / "report.json") for run in args.summary])))
            return
        report = evaluate(
            args.run,
            whisper=args.whisper,
            llm=args.llm,
            corpus=args.corpus,
            adapters=args.adapters,
            dtype=DTYPES.get(args.dtype),
            device=args.device,
        )

    print(json.dumps(report, indent=1))
    broken = broken_promises(report) if args.check else []
    for line in broken:
        print(f"missed: {line}")
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
