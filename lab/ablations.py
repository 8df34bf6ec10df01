"""The paper's findings at tiny scale: each part of the method left out or exchanged, several seeds each, one report.

    python -m lab.ablations --run runs/toy                on top of a finished `make demo`

Four stage-2 models are trained for each seed, on the same clips and questions, in the same batches, for the same steps:

  both      both adapters, as in the demo
  semantic  the semantic adapter alone (paper: 47.70 / 52.88 on MMAU / MMSU, both 49.71 / 56.04)
  self      both adapters; the targets are what the frozen LM itself answers when it reads what is known of the clip
  twin      both adapters on the autoregressive twin of the LM (paper: LLaMA-3.1 28.40 / 38.40, LLaDA 51.71 / 54.72)

The first three start from RUN/stage1's adapters, the twin from a stage 1 of its own. `both` is asked again with other
sampler settings and, at the end, timed against the twin. All of it lies in RUN/ablations: a folder for each training, a JSON
file for each part that is done, report.md and its figures. Killed or stopped, the same command goes on.

On a CPU several processes of one thread each share the work, since matrices as small as the toy's gain little from a second
core. What each training prints, its progress bars too, goes to RUN/ablations/*.log.
"""

import argparse
import contextlib
import functools
import hashlib
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lab import robustness
import train_asr
import train_instruct
from toy.autoregressive import pretrain_twin
from training.clips import StateCache
from checkpoints.files import read_json, write_json
from data import AudioError, ManifestError, load_manifest, word_error_rate, write_manifest
from diffa import DIFFA
from toy.evaluate import answer, questions
from lab.findings import write_report
from toy.grammar import ANSWER_LENGTH as G
from toy.grammar import ATTRIBUTES, Attributes, Sentence
from toy.imitation import text_prompt
from toy.pretrain import ask_text
from sampler import SamplerConfig
from checkpoints.tokenizer import load_tokenizer
from checkpoints.weights import load_lm

SWEEP = {f"count {n}": SamplerConfig(G, G, n) for n in (G, G // 2, G // 3, G // 6, 1)}
SWEEP |= {f"threshold {tau}": SamplerConfig(G, G, G, "threshold", tau) for tau in (0.99, 0.9, 0.7, 0.5)}
SWEEP |= {f"factor {f}": SamplerConfig(G, G, G, "factor", factor=f) for f in (0.5, 1, 2)}
RACE = {name: SWEEP[name] for name in (f"count {G}", f"count {G // 3}", "threshold 0.9", "threshold 0.7")}
SWEEP_CLIPS = 100  # twelve settings make 48 calls of each question
RACE_CLIPS = 100
MOST_PROCESSES = 4  # each holds the encoder's states of all training clips, about 1 GB


# ---- what is measured
def sweep(model: DIFFA, heard: StateCache, items: list[dict]) -> dict:
    """Quality by sampler setting on the first clips: means in percent, and over all questions calls and tokens an answer."""
    clips = list(dict.fromkeys(item["audio_filepath"] for item in items))[:SWEEP_CLIPS]
    items, result = [item for item in items if item["audio_filepath"] in set(clips)], {"clips": len(clips)}
    for name, config in tqdm(SWEEP.items(), "sampler settings", leave=False):
        table = questions(model, heard, items, config)
        rows = [row for row in table.values() if isinstance(row, dict)]
        n = sum(row["items"] for row in rows)
        result[name] = {
            "content_mean": table["content_mean"], "voice_mean": table["voice_mean"],
            "repeat": table["repeat"]["word_error_rate"], "caption": table["caption"]["word_error_rate"],
            "calls": sum(row["calls"] * row["items"] for row in rows) / n,
            "tokens": sum(row["tokens"] * row["items"] for row in rows) / n,
        }  # fmt: skip
    return result


def race(model: DIFFA, heard: StateCache, items: list[dict]) -> dict:
    """Model calls and seconds an answer, alone and in one batch; from the encoder's states to the text."""
    result = {}
    settings = {"greedy": SamplerConfig(G, G, G)} if model.lm.config.causal else RACE
    for name, config in settings.items():
        answer(model, heard, items[:1], config)  # warms up
        started = time.perf_counter()
        said = [answer(model, heard, [item], config)[0][0] for item in tqdm(items, name, leave=False)]
        alone, started = time.perf_counter() - started, time.perf_counter()
        _, calls = answer(model, heard, items, config)
        result[name] = {
            "calls": calls, "seconds": alone / len(items), "seconds_batched": (time.perf_counter() - started) / len(items),
            "word_error_rate": word_error_rate(said, [item["target"] for item in items]), "items": len(items),
        }  # fmt: skip
    return result


def self_targets(run: Path, path: Path, device: str) -> dict:
    """Write stage 2's manifest with the frozen LM's own answers as targets; returns how many differ from the templates'.

    The paper's LLM answers from a seed transcript. This one reads what it was taught to read: attribute words and the
    sentence, in the place of the audio.
    """
    lm = load_lm(run / "llada", device=device).eval().requires_grad_(False)
    tokenizer, rng, prompts, said = load_tokenizer(run / "llada", lm.config), random.Random(0), [], []
    spoken = {item["audio_id"]: item["attributes"] for item in load_manifest(run / "corpus/asr_train.json")}
    items = load_manifest(run / "corpus/instruct_train.json")
    for item in items:
        sentence = Sentence(item["transcription"], {})
        attributes = Attributes(**{name: spoken[item["audio_id"]][name] for name in ATTRIBUTES})
        prompts.append((text_prompt(tokenizer, sentence, attributes, item["input"], rng, stretched=False, voiced=True), item["target"]))
    for start in tqdm(range(0, len(prompts), 100), "the LM answers", leave=False):
        said += ask_text(lm, tokenizer, prompts[start : start + 100], device)
    differ: dict[str, int] = {}
    for item, text in zip(items, said):
        differ[item["kind"]] = differ.get(item["kind"], 0) + (text != item["target"])
    write_manifest(path, [item | {"target": text} for item, text in zip(items, said)])
    # As stage.usable judges them: what is empty or has no end is left out of the training.
    unusable = sum(not text.strip() or len(tokenizer.encode(text)) >= G for text in said)
    return {"items": len(items), "differ": sum(differ.values()), "differ_by_kind": differ, "unusable": unusable}


# ---- what is trained
def done(path: Path, make: Callable[[], dict]) -> dict:
    """The result of a part: from its file if there is one, else made now and written, with the minutes that it took."""
    if not path.is_file():
        started = time.perf_counter()
        write_json(path, make() | {"minutes": (time.perf_counter() - started) / 60})
    return read_json(path)


def train(command: Callable[[list[str]], None], out: Path, *options: object) -> Path:
    """Run a stage's command line into `out`, unless it has ended before: training.json is the last thing that it writes."""
    if not (out / "training.json").is_file():
        print(f"---- {out}")
        command([str(option) for option in (*options, "--out", out)])
    return out


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    run: Path  # what `make demo` wrote
    seeds: list[int]
    steps: int  # of every stage 2
    stage1_steps: int  # of the twin's stage 1
    device: str


def trained(plan: Plan, arm: str, seed: int) -> DIFFA:
    """The model of an arm and a seed; it is trained, and what it stands on is made, where that has not been done."""
    run, out = plan.run, plan.run / "ablations"
    where = ["--whisper", run / "whisper", "--device", plan.device]
    llm, adapters, manifest = run / "llada", run / "stage1", run / "corpus/instruct_train.json"
    if arm == "self":
        manifest = out / "instruct_self.json"
        done(out / "self_targets.json", lambda: self_targets(run, manifest, plan.device))
    if arm == "twin":
        llm, seed_of_run = run / "twin", read_json(run / "corpus/corpus.json")["seed"]
        done(run / "twin.json", lambda: pretrain_twin(run, seed_of_run, plan.device))
        transcripts = ["--train", run / "corpus/asr_train.json", "--steps", plan.stage1_steps, "--seed", plan.seeds[0]]
        adapters = train(train_asr.main, out / "twin-stage1", *where, "--llm", llm, *transcripts)
    options = ["--llm", llm, "--adapters", adapters, "--train", manifest, "--steps", plan.steps, "--seed", seed]
    options += ["--audio", "semantic"] if arm == "semantic" else []
    adapters = train(train_instruct.main, out / f"{arm}-{seed}", *where, *options)
    return DIFFA.from_pretrained(run / "whisper", llm, adapters, device=plan.device).eval()


PARTS = {"both": (questions, sweep), "semantic": (questions,), "self": (questions,), "twin": (questions,)}
TIMED = ("both", "twin")


def result_file(plan: Plan, part: Callable, arm: str, seed: int) -> Path:
    """Where the result of a part is kept."""
    return plan.run / "ablations" / f"{part.__name__}-{arm}-{seed}.json"


def ask(plan: Plan, arm: str, seeds: list[int]) -> None:
    """Train and measure an arm for some seeds, but for what is done; the bars and lines of that go to a file."""
    items = load_manifest(plan.run / "corpus/instruct_test.json")
    with open(plan.run / "ablations" / f"{arm}-{seeds[0]}.log", "a", 1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for seed in seeds:
            load = functools.cache(functools.partial(trained, plan, arm, seed))  # the parts of a seed share its model
            heard = functools.cache(lambda load=load: StateCache(load(), items))
            for part in PARTS[arm]:
                done(result_file(plan, part, arm, seed), lambda: part(load(), heard(), items))


def timed(plan: Plan, arm: str, seed: int, items: list[dict]) -> dict:
    """`race` of what `ask` has trained."""
    model = trained(plan, arm, seed)
    return race(model, StateCache(model, items), items)


def worse_recordings(plan: Plan) -> dict:
    """`robustness.measure` of the run itself; its bar goes to a file, as those of `ask` do."""
    out = plan.run / "ablations"
    with open(out / "robustness.log", "a", 1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return robustness.measure(plan.run, out / "robustness.json", plan.device)


def ask_all(plan: Plan) -> None:
    """Train and measure every arm and seed, and the run's own models on worse recordings; in several processes on a CPU."""
    # The longest first, the shortest last. What the seeds of `twin` and of `self` share is made once, so one process does them all.
    arms = [("twin", plan.seeds), ("self", plan.seeds)] + [(arm, [seed]) for arm in ("both", "semantic") for seed in plan.seeds]
    arms = [(arm, seeds) for arm, seeds in arms if not all(result_file(plan, part, arm, s).is_file() for part in PARTS[arm] for s in seeds)]
    tasks = [functools.partial(ask, plan, *arm) for arm in arms] + [functools.partial(worse_recordings, plan)]
    processes = min(torch.get_num_threads(), MOST_PROCESSES, len(tasks)) if plan.device == "cpu" else 1
    if processes <= 1:
        for task in tqdm(tasks, "arms"):
            task()
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            for one in tqdm(as_completed([pool.submit(task) for task in tasks]), "arms", len(tasks)):
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is begun


def ablate(plan: Plan) -> dict:
    """Do every part that is not done yet.

    Returns:
        {"questions": {arm: [a table for each seed]}, "sweep": ..., "race": ...} as the functions of these names return them;
        and once: {"self_targets", "lm", "twin", "robustness"}.
    Raises:
        ValueError: the run is not finished, or its ablations were made with other steps or rates or on another stage 1.
    """
    run, out = plan.run, plan.run / "ablations"
    absent = [str(file) for stage in ("stage1", "stage2") if not (file := run / stage / "adapters.safetensors").is_file()]
    if absent:
        raise ValueError(f"{', '.join(absent)}: no such file; `make demo RUN={run}` makes it")
    out.mkdir(exist_ok=True)
    stage1 = hashlib.sha256((run / "stage1/adapters.safetensors").read_bytes()).hexdigest()[:16]
    recipe = train_instruct.PRESETS["toy"].train
    settings = {"steps": plan.steps, "lr": recipe.lr, "optimizer": recipe.optimizer, "stage1_steps": plan.stage1_steps, "stage1": stage1}
    if not (out / "settings.json").is_file():
        write_json(out / "settings.json", settings)
    made_with = read_json(out / "settings.json")
    for name, value in settings.items():
        if made_with.get(name) != value:
            raise ValueError(f"{out}: was made with {name} {made_with.get(name)}, and now it is {value}; remove it, or ask for the same again")
    ask_all(plan)
    results: dict = {"questions": {}, "sweep": {}, "race": {}}
    for arm, parts in PARTS.items():
        for part in parts:
            results[part.__name__][arm] = [read_json(result_file(plan, part, arm, seed)) for seed in plan.seeds]
    captions = [item for item in load_manifest(run / "corpus/instruct_test.json") if item["kind"] == "caption"][:RACE_CLIPS]
    for arm in TIMED:  # now that nothing else runs
        results["race"][arm] = [done(result_file(plan, race, arm, s), functools.partial(timed, plan, arm, s, captions)) for s in plan.seeds]
    for name, file in (("self_targets", out / "self_targets.json"), ("lm", run / "lm.json"), ("twin", run / "twin.json")):
        results[name] = read_json(file)
    return results | {"robustness": worse_recordings(plan)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The paper's ablations on a finished run.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="what `make demo` wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every training (default 0 1 2)")
    parser.add_argument("--steps", type=int, default=400, help="of every stage 2 (default 400)")
    of_the_demo = train_asr.PRESETS["toy"].train.steps
    parser.add_argument("--stage1-steps", type=int, default=of_the_demo, help=f"of the twin's stage 1 (default {of_the_demo}, the demo's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    seeds = list(dict.fromkeys(args.seeds))
    try:
        results = ablate(Plan(args.run, seeds, args.steps, args.stage1_steps, args.device))
    except (AudioError, ManifestError, ValueError, OSError) as error:
        raise SystemExit(f"ablations.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("ablations.py: stopped; run the same command to go on") from None
    command = f"python -m lab.ablations --run {args.run} --seeds {' '.join(map(str, seeds))} --steps {args.steps}"
    command += f" --stage1-steps {args.stage1_steps}"
    print(write_report(args.run / "ablations", results, seeds, command, args.device))


if __name__ == "__main__":
    main()
