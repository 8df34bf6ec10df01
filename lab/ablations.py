"""The paper's ablations at tiny scale: parts of the method left out or exchanged, and one report.

    python -m lab.ablations --run runs/toy                on top of a finished `make demo`

Four stage-2 models ("arms") are trained for each seed, on the same clips, questions and batches and
for as many steps:

  both      both adapters, as in the demo
  semantic  the semantic adapter alone (table 5 of the paper)
  self      both adapters; the targets are the frozen LM's own answers (table 6)
  baseline  both adapters on the autoregressive baseline of the LM (lab/baseline.py; table 5)

The first three start from RUN/stage1's adapters, the baseline from a stage 1 of its own. `both` is
also measured with other sampler settings and, at the end, timed against the baseline. RUN/ablations
gets a folder for each training, a JSON file for each measurement, report.md and its figure. The
same command resumes a run that was stopped.

On a CPU several processes of one thread share the work. What they print goes to *.log.
"""

import argparse
import contextlib
import functools
import hashlib
import multiprocessing
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import train_asr
import train_instruct
from checkpoints.command_line import add_force_parts, one_line_errors
from checkpoints.files import read_json, write_json
from checkpoints.lm import load_lm
from checkpoints.model import load_diffa
from checkpoints.tokenizer import load_tokenizer
from corpora.manifests import write_manifest
from data import build_prompt, load_manifest
from diffa import DIFFA
from evaluation.wer import word_error_rate
from lab.baseline import existing, pretrain_baseline
from lab.findings import ARMS, write_report
from sampler import SamplerConfig
from toy.autoregressive import CausalLM, causal
from toy.evaluate import answers_to, mean_calls, questions
from toy.grammar import ATTRIBUTES, Attributes
from toy.imitation import imitate_clip
from toy.pretrain_lm import ANSWER_LENGTH, answer_text
from training.imitation import ImitationItem
from training.recipe import Recipe
from training.run import Run, Stage
from training.stage import run_stage
from training.states import StateCache

config_of = functools.partial(SamplerConfig, length=ANSWER_LENGTH)
SETTINGS = {
    **{f"count {ANSWER_LENGTH // k}": config_of(steps=ANSWER_LENGTH // k) for k in (1, 2, 3, 6)},
    "count 1": config_of(steps=1),
    **{f"threshold {t}": config_of(rule="threshold", threshold=t) for t in (0.99, 0.9, 0.7, 0.5)},
    **{f"factor {f}": config_of(rule="factor", factor=f) for f in (0.5, 1, 2)},
}
TIMED = (f"count {ANSWER_LENGTH}", f"count {ANSWER_LENGTH // 3}", "threshold 0.9", "threshold 0.7")
MEASURED_CLIPS = 100  # of the sweep, which makes 48 calls for each question, and of the timing
MAX_PROCESSES = 4  # each holds the encoder's states of all training clips, about 1 GB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, on top of which run."""

    run: Path  # written by `make demo`
    seeds: list[int]
    steps: int  # of every stage 2
    device: str
    allow_other_parts: bool = False  # see load_diffa

    def file(self, name: str) -> Path:
        """A path in RUN/ablations."""
        return existing(self.run / "ablations" / name)

    def models(self, arm: str) -> dict:
        """The frozen parts of an arm, as arguments of Run and load_diffa."""
        models = {"whisper": self.run / "whisper", "llm": self.run / "llada"}
        if arm == "baseline":
            models |= {"llm": existing(self.run / "baseline"), "lm_class": CausalLM}
        return models | {"device": self.device, "allow_other_parts": self.allow_other_parts}

    def load(self, arm: str, seed: int) -> DIFFA:
        """The trained model of an arm and a seed."""
        return load_diffa(adapters=self.file(f"{arm}-{seed}"), **self.models(arm)).eval()


# ---- measurements
def sweep(model: DIFFA, states: StateCache, items: list[dict]) -> dict:
    """Quality in percent by sampler setting, with calls and tokens of a mean answer."""
    clips = list(dict.fromkeys(item["audio_filepath"] for item in items))[:MEASURED_CLIPS]
    items = [item for item in items if item["audio_filepath"] in set(clips)]

    result = {"clips": len(clips)}
    for name, config in tqdm(SETTINGS.items(), "sampler settings", leave=False, disable=None):
        table = questions(model, states, items, config)
        rows = [row for row in table.values() if isinstance(row, dict)]
        result[name] = {
            "content_mean": table["content_mean"],
            "voice_mean": table["voice_mean"],
            "repeat": table["repeat"]["word_error_rate"],
            "caption": table["caption"]["word_error_rate"],
            "calls": sum(row["calls"] * row["items"] for row in rows) / len(items),
            "tokens": sum(row["tokens"] * row["items"] for row in rows) / len(items),
        }
    return result


def time_captions(model: DIFFA, items: list[dict]) -> dict:
    """Calls and seconds an answer, one at a time and in one batch, from the encoder's states on."""
    states = StateCache(model, items)
    settings = {name: SETTINGS[name] for name in TIMED}
    if isinstance(model.lm, CausalLM):
        settings = {"greedy": SamplerConfig(length=ANSWER_LENGTH)}

    result = {}
    for name, config in settings.items():
        answers_to(model, states, items[:1], config)  # warms up
        started = time.perf_counter()
        texts = [answers_to(model, states, [item], config)[0].text for item in items]
        one_by_one = time.perf_counter() - started
        together = answers_to(model, states, items, config)
        result[name] = {
            "calls": mean_calls(together),
            "seconds": one_by_one / len(items),
            "seconds_batched": (time.perf_counter() - started - one_by_one) / len(items),
            "word_error_rate": word_error_rate(texts, [item["target"] for item in items]),
            "items": len(items),
        }
    return result


# ---- training
def write_own_targets(run: Path, path: Path, device: str) -> dict:
    """Write stage 2's manifest with the frozen LM's own answers as targets.

    The paper's LLM answers from a seed transcript. This one reads what it was trained to read:
    attribute words and the sentence, in the place of the audio.

    Returns:
        how many targets differ from the templates', also by kind of question, and how many
        stage 2 will leave out.
    """
    lm = load_lm(run / "llada", device=device).requires_grad_(False)
    tokenizer = load_tokenizer(run / "llada", lm.config)
    asr = load_manifest(run / "corpus/asr_train.json")
    spoken = {item["audio_id"]: item["attributes"] for item in asr}
    items = load_manifest(run / "corpus/instruct_train.json")

    # Each question, over text that imitates its clip.
    rng = random.Random(0)
    imitations = []
    for item in items:
        known = spoken[item["audio_id"]]
        attributes = Attributes(**{name: known[name] for name in ATTRIBUTES})
        words = item["transcription"]
        audio_ids = imitate_clip(tokenizer, words, attributes, rng, stretched=False, voiced=True)
        prompt = build_prompt(tokenizer, item["input"])
        imitations.append(ImitationItem(prompt=prompt, audio_ids=audio_ids, answer=item["target"]))

    texts = answer_text(lm, tokenizer, imitations)
    write_manifest(path, [item | {"target": text} for item, text in zip(items, texts)])
    differ = Counter(item["kind"] for item, text in zip(items, texts) if text != item["target"])
    lengths = [len(tokenizer.encode(text)) if text.strip() else ANSWER_LENGTH for text in texts]
    return {
        "items": len(items),
        "differ": sum(differ.values()),
        "differ_by_kind": differ,
        "unusable": sum(length >= ANSWER_LENGTH for length in lengths),  # no room for the end token
    }


def train_once(stage: Stage, recipe: Recipe, steps: int, seed: int, run: Run) -> None:
    """Run a stage unless it has ended before."""
    if not (run.out / "training.json").is_file():  # the last thing that it writes
        recipe = replace(recipe, train=replace(recipe.train, steps=steps, seed=seed))
        run_stage(stage, recipe, run)


def make_shared_parts(plan: Plan) -> None:
    """Make what all seeds use: own targets, the baseline's LM and its stage 1.

    Raises ValueError: the run is not finished, or its ablations were made with other settings.
    """
    run = plan.run
    stage1 = run / "stage1/adapters.safetensors"
    if not stage1.is_file():
        raise ValueError(f"{stage1}: no such file; `make demo RUN={run}` makes it")

    # Results of different settings must not be mixed.
    asr = train_asr.RECIPES["toy"]
    recipe = train_instruct.RECIPES["toy"].train
    settings = {
        "steps": plan.steps,
        "lr": recipe.lr,
        "optimizer": recipe.optimizer,
        "stage1_steps": asr.train.steps,
        "stage1": hashlib.sha256(stage1.read_bytes()).hexdigest()[:16],
    }
    file = plan.file("settings.json")
    if not file.is_file():
        write_json(file, settings)
    before = read_json(file)
    for name, value in settings.items():
        if before.get(name) != value:
            was = f"was made with {name} {before.get(name)}, and now it is {value}"
            raise ValueError(f"{file.parent}: {was}; remove it, or ask for the same again")

    file = plan.file("self_targets.json")
    if not file.is_file():
        write_json(file, write_own_targets(run, plan.file("instruct_self.json"), plan.device))

    file = existing(run / "baseline.json")
    if not file.is_file():
        seed = read_json(run / "corpus/corpus.json")["seed"]
        write_json(file, pretrain_baseline(run, seed, plan.device))
    where = {"train": run / "corpus/asr_train.json", "out": plan.file("baseline-stage1")}
    stage = causal(train_asr.STAGE)
    asr_run = Run(**where, **plan.models("baseline"))
    train_once(stage, asr, asr.train.steps, plan.seeds[0], asr_run)


def train_arm(plan: Plan, arm: str, seed: int) -> None:
    """Train stage 2 of an arm and a seed, unless that has been done."""
    stage = train_instruct.SEMANTIC_ALONE if arm == "semantic" else train_instruct.STAGE
    adapters = plan.run / "stage1"
    train = plan.run / "corpus/instruct_train.json"
    if arm == "self":
        train = plan.file("instruct_self.json")
    if arm == "baseline":
        stage = causal(stage)
        adapters = plan.file("baseline-stage1")

    out = plan.file(f"{arm}-{seed}")
    run = Run(adapters=adapters, train=train, out=out, **plan.models(arm))
    train_once(stage, train_instruct.RECIPES["toy"], plan.steps, seed, run)


# ---- all arms
def measure_arm(plan: Plan, arm: str, seed: int) -> None:
    """Train and measure an arm and a seed, except what is done; print to a file."""
    measures = {"questions": questions} | ({"sweep": sweep} if arm == "both" else {})
    files = {name: plan.file(f"{name}-{arm}-{seed}.json") for name in measures}
    missing = [name for name, file in files.items() if not file.is_file()]
    if not missing:
        return

    log = plan.file(f"{arm}-{seed}.log").open("a", 1, "utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train_arm(plan, arm, seed)
        model = plan.load(arm, seed)
        items = load_manifest(plan.run / "corpus/instruct_test.json")
        states = StateCache(model, items)
        for name in missing:
            write_json(files[name], measures[name](model, states, items))


def ablate(plan: Plan) -> dict:
    """Train and measure whatever is not done yet.

    Returns:
        {"questions", "sweep", "race"}: {arm: a table for each seed}; and, once for all seeds,
        "self_targets", "lm" and "baseline".
    Raises:
        ValueError: see `make_shared_parts`.
    """
    make_shared_parts(plan)

    # Side by side on a CPU: matrices as small as the toy's gain little from a second core.
    tasks = [(plan, arm, seed) for arm in ARMS for seed in plan.seeds]
    processes = min(torch.get_num_threads(), MAX_PROCESSES) if plan.device == "cpu" else 1
    if processes == 1:
        for task in tqdm(tasks, "arms", disable=None):
            measure_arm(*task)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
            list(tqdm(pool.map(measure_arm, *zip(*tasks)), "arms", len(tasks), disable=None))

    # Captions are timed when nothing else runs.
    items = load_manifest(plan.run / "corpus/instruct_test.json")
    captions = [item for item in items if item["kind"] == "caption"][:MEASURED_CLIPS]
    timed = ("both", "baseline")
    for arm in timed:
        for seed in plan.seeds:
            file = plan.file(f"race-{arm}-{seed}.json")
            if not file.is_file():
                write_json(file, time_captions(plan.load(arm, seed), captions))

    results = {
        name: {
            arm: [read_json(plan.file(f"{name}-{arm}-{seed}.json")) for seed in plan.seeds]
            for arm in arms
        }
        for name, arms in (("questions", ARMS), ("sweep", ("both",)), ("race", timed))
    }
    results["self_targets"] = read_json(plan.file("self_targets.json"))
    results["lm"] = read_json(plan.run / "lm.json")
    results["baseline"] = read_json(existing(plan.run / "baseline.json"))
    return results


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.ablations"
    parser = argparse.ArgumentParser(prog=name, description="The paper's ablations on a run.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="from `make demo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of every stage 2 (default 400)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_force_parts(parser)
    args = parser.parse_args(arguments)

    plan = Plan(**(vars(args) | {"seeds": list(dict.fromkeys(args.seeds))}))
    with one_line_errors(name):
        results = ablate(plan)
    seeds = " ".join(map(str, plan.seeds))
    command = f"{name} --run {plan.run} --seeds {seeds} --steps {plan.steps}"
    print(write_report(plan.run / "ablations", results, command))


if __name__ == "__main__":
    main()
