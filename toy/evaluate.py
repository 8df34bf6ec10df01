"""How well does it hear? Word error rate, accuracy per question type, error against sampler steps; JSON and figures.

    python -m toy.evaluate --run runs/toy            writes runs/toy/report.json and figures beside it
    python -m toy.evaluate --run runs/toy --check    and fails when a promised figure is missed
    python -m toy.evaluate --summary RUN RUN ...     a table of finished runs: mean, and from the least to the greatest
    python -m toy.evaluate --run runs/toy/real --whisper DIR --llm runs/toy/llada --corpus runs/toy/corpus

RUN holds the adapters (stage1, stage2, and semantic if the control was trained), and their encoder, LM and test clips
(whisper, llada, corpus). Options bring others in their place; report.json, which is written to RUN, says which.

Shapes: B batch, G answer tokens.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from toy.autoregressive import greedy
from toy.grammar import ANSWER_LENGTH as G
from toy.grammar import CONTENT_KINDS, SLOTS, VOICE_KINDS
from training.clips import StateCache
from data import AudioError, ManifestError, load_manifest, word_error_rate
from checkpoints.tokenizer import build_prompt, decode_answer
from diffa import AUDIO_PARTS, DIFFA, DTYPES
from sampler import SamplerConfig, generate
from checkpoints.weights import read_json, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCH = 100
THRESHOLD = SamplerConfig(G, G, G, "threshold", 0.9)

# What the README promises of `make demo`: (path in the report, "min" or "max", bound).
PROMISES = [
    ("encoder/word_error_rate", "max", 2.5),
    ("lm/copy_error", "max", 2),
    ("lm/oracle/gender", "min", 98),
    ("lm/oracle/number", "min", 98),
    ("stage1/by_sampler/18 steps/word_error_rate", "max", 3),
    ("stage2/content_mean", "min", 96),
    ("stage2/voice_mean", "min", 94),
    ("stage2/gender/accuracy", "min", 95),
    ("stage2/count/accuracy", "min", 94),
    ("stage2/caption/word_error_rate", "max", 5.5),
]


def answer(model: DIFFA, heard: StateCache, items: list[dict], config: SamplerConfig) -> tuple[list[str], float]:
    """Answers to manifest items by their `input`, and the mean number of model calls an item took; a causal LM answers greedily."""
    said, calls = [], 0
    with torch.inference_mode():
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            prompts = [build_prompt(model.tokenizer, item["input"]) for item in batch]
            prompt, causal = model.splice(prompts, *model.hear(*heard(batch))), model.lm.config.causal
            out = greedy(model.lm, prompt, config.length) if causal else generate(model.lm, prompt, config)
            said += [decode_answer(model.tokenizer, ids) for ids in out.ids.tolist()]
            calls += int(out.steps.sum())
    return said, calls / len(items)


def transcription(model: DIFFA, heard: StateCache, items: list[dict]) -> dict:
    """Word error rate of a stage-1 model, by sampler setting."""
    meant = [item["transcription"] for item in items]
    whole = {"stop_at_end": False}  # every position is filled, so that calls compare the rules and nothing else
    settings = {f"{n} steps": SamplerConfig(G, G, n, **whole) for n in (G, G // 2, G // 3, 4, 2, 1)}
    settings |= {f"threshold {tau}": SamplerConfig(G, G, G, "threshold", tau, **whole) for tau in (0.99, 0.9, 0.7)}
    settings["left to right"] = SamplerConfig(G, 1, G, **whole)
    table = {}
    for name, config in tqdm(settings.items(), desc="sampler settings", leave=False):
        started = time.perf_counter()
        said, calls = answer(model, heard, items, config)
        seconds = (time.perf_counter() - started) / len(items)
        table[name] = {"word_error_rate": word_error_rate(said, meant), "calls": calls, "seconds_a_clip": seconds}
        if name == f"{G} steps":
            examples = [{"said": m, "heard": s} for m, s in zip(meant[:5], said[:5])]
    return {"items": len(items), "by_sampler": table, "examples": examples}


def questions(model: DIFFA, heard: StateCache, items: list[dict], config: SamplerConfig = THRESHOLD) -> dict:
    """Accuracy in percent per kind (exact answers), word error rate for `repeat` and `caption`.

    Each with its items, and with the model calls and the tokens (the end of text included) of a mean answer.
    """
    table = {}
    for kind in tqdm((*CONTENT_KINDS, *VOICE_KINDS, "caption"), desc="questions", leave=False):
        mine = [item for item in items if item["kind"] == kind]
        said, calls = answer(model, heard, mine, config)
        meant = [item["target"] for item in mine]
        if kind in ("repeat", "caption"):
            table[kind] = {"word_error_rate": word_error_rate(said, meant)}
        else:
            table[kind] = {"accuracy": 100 * sum(s == m for s, m in zip(said, meant)) / len(mine)}
        tokens = sum(min(len(model.tokenizer.encode(text)) + 1, config.length) for text in said) / len(mine)
        table[kind] |= {"items": len(mine), "calls": calls, "tokens": tokens}
    table["content_mean"] = sum(table[k]["accuracy"] for k in SLOTS) / len(SLOTS)
    table["voice_mean"] = sum(table[k]["accuracy"] for k in VOICE_KINDS) / len(VOICE_KINDS)
    return table


def plot_losses(run: Path, path: Path) -> None:
    """Loss curves of whatever has been trained in the run, smoothed over 20 steps."""
    sources = {"encoder": "encoder.json", "language model": "lm.json", "stage 1": "stage1/training.json", "stage 2": "stage2/training.json"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.8))
    for axis, (title, file) in zip(axes, sources.items()):
        if (run / file).is_file():
            losses = torch.tensor(read_json(run / file)["losses"])
            axis.plot(losses.unfold(0, min(20, len(losses)), 1).mean(dim=1), lw=1)
        axis.set(title=title, xlabel="step", yscale="log")
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_steps(table: dict, path: Path) -> None:
    """Word error rate against model calls."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for prefix, marker in (("steps", "o-"), ("threshold", "s--"), ("left", "^")):
        rows = [(v["calls"], v["word_error_rate"]) for k, v in table.items() if prefix in k]
        axis.plot(*zip(*sorted(rows)), marker, label="fixed steps" if prefix == "steps" else "left to right" if prefix == "left" else prefix)
    axis.set(xlabel="model calls a clip", ylabel="word error rate (%)", xscale="log", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_questions(both: dict, semantic: dict | None, path: Path) -> None:
    """Accuracy per question type, with both adapters and with the semantic one alone."""
    kinds = [k for k in (*CONTENT_KINDS, *VOICE_KINDS) if "accuracy" in both[k]]
    figure, axis = plt.subplots(figsize=(9, 3.2))
    for shift, name, table in ((-0.2, "both adapters", both), (0.2, "semantic alone", semantic)):
        if table:
            axis.bar([i + shift for i in range(len(kinds))], [table[k]["accuracy"] for k in kinds], 0.4, label=name)
    axis.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="right answers (%)", ylim=(0, 100))
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def broken_promises(report: dict) -> list[str]:
    """A line for each figure that falls short of PROMISES."""
    lines = []
    for path, kind, bound in PROMISES:
        if path.split("/")[0] not in report:
            lines.append(f"{path} was not measured")
            continue
        value = look_up(report, path)
        if (value < bound) if kind == "min" else (value > bound):
            lines.append(f"{path} is {value:.2f}, promised {'at least' if kind == 'min' else 'at most'} {bound}")
    return lines


def summary(reports: list[dict]) -> list[str]:
    """Lines of a Markdown table over the reports of runs that differ in their seed."""
    reports = [report | {"worst": min(report["lm"]["oracle"].values())} for report in reports]
    rule, fast = f"stage1/by_sampler/{G} steps", "stage1/by_sampler/threshold 0.9"
    rows = [("encoder, word error rate (%)", "encoder/word_error_rate", "encoder/items"),
            ("LM quoting a sentence of its prompt, word error rate (%)", "lm/copy_error", "lm/items"),
            (f"LM answering from text, the worst of {len(reports[0]['lm']['oracle'])} kinds of question (% right)", "worst", "lm/items"),
            (f"stage 1, word error rate, {G} calls (%)", f"{rule}/word_error_rate", "stage1/items"),
            ("stage 1, word error rate, threshold 0.9 (%)", f"{fast}/word_error_rate", "stage1/items"),
            ("its model calls a clip", f"{fast}/calls", "stage1/items")]  # fmt: skip
    for kind in (*SLOTS, "count", *VOICE_KINDS):
        rows.append((f"stage 2: {kind} (% right)", f"stage2/{kind}/accuracy", f"stage2/{kind}/items"))
    rows += [(f"stage 2: mean of {', '.join(SLOTS)} (% right)", "stage2/content_mean", None),
             (f"stage 2: mean of {', '.join(VOICE_KINDS)} (% right)", "stage2/voice_mean", None)]  # fmt: skip
    rows += [(f"stage 2: {k}, word error rate (%)", f"stage2/{k}/word_error_rate", f"stage2/{k}/items") for k in ("repeat", "caption")]
    rows += [(f"minutes: {name}", f"minutes/{name}", None) for name in reports[0]["minutes"]]
    lines = ["| held-out sentences and voices | mean | least to greatest | items a run |", "| --- | --- | --- | --- |"]
    for name, path, items in rows:
        values = [look_up(report, path) for report in reports]
        counts = sorted({look_up(report, items) for report in reports}) if items else []
        span = f"{min(values):.1f} to {max(values):.1f}"
        lines.append(f"| {name} | {sum(values) / len(values):.1f} | {span} | {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} |")
    return lines


def look_up(report: dict, path: str):
    """What stands in a report at a path such as "lm/copy_error"."""
    for key in path.split("/"):
        report = report[key]
    return report


def evaluate(args: argparse.Namespace) -> None:
    """Measure a run, write report.json and the figures, print the report.

    Raises SystemExit: a promise is broken; ValueError: no adapters, or stages that were trained with different windows.
    """
    run, started = args.run, time.perf_counter()
    where = {"whisper": args.whisper or run / "whisper", "llm": args.llm or run / "llada"}
    options = {"device": args.device, "dtype": DTYPES[args.dtype] if args.dtype else None}
    adapters = args.adapters or [run / name for name in AUDIO_PARTS if (run / name / "adapters.safetensors").is_file()]
    if not adapters:
        raise ValueError(f"{run}: holds no trained adapters (stage1, stage2); train them first, or pass --adapters")
    corpus = args.corpus or run / "corpus"
    asr, instruct = load_manifest(corpus / "asr_test.json"), load_manifest(corpus / "instruct_test.json")
    # pretrain.py leaves what it measured beside the models it makes; other models come without.
    measured = {name: where[part].parent / f"{name}.json" for name, part in (("encoder", "whisper"), ("lm", "llm"))}
    report = {name: {k: v for k, v in read_json(file).items() if k != "losses"} for name, file in measured.items() if file.is_file()}
    minutes = {name: facts["minutes"] for name, facts in report.items()}
    report["parts"] = {name: str(path) for name, path in where.items()} | {"corpus": str(corpus)}
    for folder in adapters:
        model = DIFFA.from_pretrained(adapters=folder, **where, **options).eval()
        if folder == adapters[0]:
            heard = StateCache(model, asr)  # encoded once, for all of them
            report["parts"]["audio_context"] = model.audio_context
        elif model.audio_context != report["parts"]["audio_context"]:
            raise ValueError(f"{adapters[0]} and {folder} were trained with different windows; give both the same --audio-context")
        report[model.stage] = transcription(model, heard, asr) if model.stage == "stage1" else questions(model, heard, instruct)
        if model.stage != "semantic" and (folder / "training.json").is_file():
            minutes[model.stage] = read_json(folder / "training.json")["minutes"]
    report["minutes"] = minutes | {"evaluate": (time.perf_counter() - started) / 60}
    if (run / "started").is_file():  # written by `make demo` when it begins
        report["minutes"]["all"] = (time.time() - (run / "started").stat().st_mtime) / 60
    plot_losses(run, run / "losses.png")
    if "stage1" in report:
        plot_steps(report["stage1"]["by_sampler"], run / "steps.png")
    if "stage2" in report:
        plot_questions(report["stage2"], report.get("semantic"), run / "questions.png")
    write_json(run / "report.json", report)
    print(json.dumps(report, indent=1))
    broken = broken_promises(report) if args.check else []
    for line in broken:
        print(f"missed: {line}")
    if broken:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a run directory.")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="RUN", help="only show a table of these evaluated runs")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    for name, folder in (("whisper", "whisper"), ("llm", "llada"), ("corpus", "corpus")):
        parser.add_argument(f"--{name}", type=Path, help=f"default: RUN/{folder}")
    parser.add_argument("--adapters", type=Path, nargs="+", help="directories, or the release's files; default: RUN/stage1, RUN/stage2, RUN/semantic")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen encoder and LM (default: the LM as in its file, the encoder float32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="fail when a promised figure is missed")
    args = parser.parse_args()
    try:
        if args.summary:
            print("\n".join(summary([read_json(run / "report.json") for run in args.summary])))
        else:
            evaluate(args)
    except (AudioError, ManifestError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from None


if __name__ == "__main__":
    main()
