"""The paper's ablations at tiny scale: each part of the method left out or exchanged, several seeds each, one report.

    python -m lab.ablations --run runs/toy                on top of a finished `make demo`

Four stage-2 models ("arms") are trained for each seed, on the same clips and questions, in the same batches, for as many steps:

  both      both adapters, as in the demo
  semantic  the semantic adapter alone (table 5 of the paper)
  self      both adapters; the targets are the frozen LM's own answers from what is known of each clip (table 6)
  baseline  both adapters on the autoregressive baseline of the LM (lab/baseline.py; table 5)

The first three start from RUN/stage1's adapters, the baseline from a stage 1 of its own. `both` is also measured with other
sampler settings and, at the end, timed against the baseline. All of it lies in RUN/ablations: a folder for each training, a
JSON file for each measurement, report.md and its figure. The same command resumes a run that was stopped.

On a CPU several processes of one thread share the work. What they print goes to RUN/ablations/*.log.
"""

import argparse
import contextlib
import functools
import hashlib
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import train_asr
import train_instruct
from checkpoints.command_line import one_line_errors
from checkpoints.files import read_json, write_json
from checkpoints.lm import load_lm
from checkpoints.model import load_diffa
from checkpoints.tokenizer import load_tokenizer
from corpora.manifests import write_manifest
from data import build_prompt, load_manifest
from diffa import DIFFA
from diffusion_lm import DiffusionLM
from evaluation.wer import word_error_rate
from lab import robustness
from lab.ablation_report import write_report
from lab.baseline import existing, pretrain_baseline
from lab.findings import ANSWER_LENGTH, ARMS
from sampler import SamplerConfig
from toy.autoregressive import CausalLM, next_token_stage_loss
from toy.evaluate import answers_to, mean_calls, questions
from toy.grammar import ATTRIBUTES, Attributes
from toy.imitation import ImitationItem, imitate_clip
from toy.pretrain_lm import answer_text
from training.recipe import Recipe
from training.stage import Run, Stage, run_stage
from training.states import StateCache

SETTINGS = {
    f"count {n}": SamplerConfig(length=ANSWER_LENGTH, steps=n)
    for n in (ANSWER_LENGTH, ANSWER_LENGTH // 2, ANSWER_LENGTH // 3, ANSWER_LENGTH // 6, 1)
}
for tau in (0.99, 0.9, 0.7, 0.5):
    SETTINGS[f"threshold {tau}"] = SamplerConfig(
        length=ANSWER_LENGTH, rule="threshold", threshold=tau
    )
for factor in (0.5, 1, 2):
    SETTINGS[f"factor {factor}"] = SamplerConfig(length=ANSWER_LENGTH, rule="factor", factor=factor)
TIMED = (f"count {ANSWER_LENGTH}", f"count {ANSWER_LENGTH // 3}", "threshold 0.9", "threshold 0.7")
SWEEP_CLIPS = 100  # twelve settings make 48 calls for each question
TIMED_CLIPS = 100
MAX_PROCESSES = 4  # each holds the encoder's states of all training clips, about 1 GB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, on top of which run."""

    run: Path  # written by `make demo`
    seeds: list[int]
    steps: int  # of every stage 2
    stage1_steps: int  # of the baseline's stage 1
    device: str

    @property
    def out(self) -> Path:
        return self.run / "ablations"


# ---- measurements
def sweep(model: DIFFA, states: StateCache, items: list[dict]) -> dict:
    """Quality in percent by sampler setting, on the first clips; calls and tokens of a mean answer."""
    clips = list(dict.fromkeys(item["audio_filepath"] for item in items))[:SWEEP_CLIPS]
    items = [item for item in items if item["audio_filepath"] in set(clips)]

    result = {"clips": len(clips)}
    for name, config in tqdm(SETTINGS.items(), "sampler settings", leave=False):
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
    if isinstance(model.lm, CausalLM):
        settings = {"greedy": SamplerConfig(length=ANSWER_LENGTH)}
    else:
        settings = {name: SETTINGS[name] for name in TIMED}

    result = {}
    for name, config in settings.items():
        answers_to(model, states, items[:1], config)  # warms up
        started = time.perf_counter()
        replies = [answers_to(model, states, [item], config)[0] for item in items]
        alone = time.perf_counter() - started

        started = time.perf_counter()
        together = answers_to(model, states, items, config)
        batched = time.perf_counter() - started

        texts = [reply.text for reply in replies]
        result[name] = {
            "calls": mean_calls(together),
            "seconds": alone / len(items),
            "seconds_batched": batched / len(items),
            "word_error_rate": word_error_rate(texts, [item["target"] for item in items]),
            "items": len(items),
        }
    return result


MEASURES = {"questions": questions, "sweep": sweep}
MEASURES_OF_ARM = {arm: ("questions", "sweep") if arm == "both" else ("questions",) for arm in ARMS}


# ---- training
def write_self_targets(run: Path, path: Path, device: str) -> dict:
    """Write stage 2's manifest with the frozen LM's own answers as targets.

    The paper's LLM answers from a seed transcript. This one reads what it was trained to read:
    attribute words and the sentence, in the place of the audio.

    Returns:
        how many targets differ from the templates', in all and by kind, and how many are unusable.
    """
    lm = load_lm(run / "llada", device=device).requires_grad_(False)
    tokenizer = load_tokenizer(run / "llada", lm.config)
    asr = load_manifest(run / "corpus/asr_train.json")
    spoken = {item["audio_id"]: item["attributes"] for item in asr}
    items = load_manifest(run / "corpus/instruct_train.json")

    # Each question, over text that imitates its clip.
    rng = random.Random(0)
    asked = []
    for item in items:
        known = spoken[item["audio_id"]]
        attributes = Attributes(**{name: known[name] for name in ATTRIBUTES})
        words = item["transcription"]
        audio_ids = imitate_clip(tokenizer, words, attributes, rng, stretched=False, voiced=True)
        prompt = build_prompt(tokenizer, item["input"])
        asked.append(ImitationItem(prompt=prompt, audio_ids=audio_ids, answer=item["target"]))
    texts = answer_text(lm, tokenizer, asked)

    own = [item | {"target": text} for item, text in zip(items, texts, strict=True)]
    write_manifest(path, own)
    kinds = Counter({item["kind"]: 0 for item in items})
    kinds.update(a["kind"] for a, b in zip(items, own) if a["target"] != b["target"])
    lengths = [len(tokenizer.encode(text)) if text.strip() else ANSWER_LENGTH for text in texts]
    return {
        "items": len(items),
        "differ": kinds.total(),
        "differ_by_kind": dict(kinds),
        # Stage 2 leaves out answers that are empty or have no room for an end token.
        "unusable": sum(length >= ANSWER_LENGTH for length in lengths),
    }


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The result in a JSON file; made and written now if there is none."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def train_once(stage: Stage, recipe: Recipe, steps: int, seed: int, run: Run) -> Path:
    """Run a stage unless it has ended before; returns its folder."""
    if not (run.out / "training.json").is_file():  # the last thing that it writes
        print(f"---- {run.out}")
        train = replace(recipe.train, steps=steps, seed=seed)
        run_stage(stage, replace(recipe, train=train), run)
    return run.out


def trained_model(plan: Plan, arm: str, seed: int) -> DIFFA:
    """The model of an arm and a seed; whatever it needs and does not exist yet is trained."""
    run = plan.run
    parts = "semantic" if arm == "semantic" else "stage2"
    stage = train_instruct.STAGES[parts]
    train = run / "corpus/instruct_train.json"
    models = {"whisper": run / "whisper", "llm": run / "llada", "device": plan.device}
    adapters = run / "stage1"

    if arm == "self":
        train = plan.out / "instruct_self.json"
        once(plan.out / "self_targets.json", lambda: write_self_targets(run, train, plan.device))

    if arm == "baseline":
        # The baseline has its own LM, stage 1 and loss.
        corpus_seed = read_json(run / "corpus/corpus.json")["seed"]
        record = existing(run / "baseline.json")
        once(record, lambda: pretrain_baseline(run, corpus_seed, plan.device))
        models |= {"llm": existing(run / "baseline"), "lm_class": CausalLM}
        adapters = train_once(
            replace(train_asr.STAGE, loss=next_token_stage_loss),
            train_asr.RECIPES["toy"],
            plan.stage1_steps,
            plan.seeds[0],
            Run(
                train=run / "corpus/asr_train.json",
                out=existing(plan.out / "baseline-stage1"),
                **models,
            ),
        )
        stage = replace(stage, loss=next_token_stage_loss)

    out = existing(plan.out / f"{arm}-{seed}")
    recipe = train_instruct.RECIPES["toy"]
    train_once(
        stage, recipe, plan.steps, seed, Run(adapters=adapters, train=train, out=out, **models)
    )
    lm_class = models.get("lm_class", DiffusionLM)
    return load_diffa(
        run / "whisper", models["llm"], out, device=plan.device, lm_class=lm_class
    ).eval()


# ---- all arms
@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """What is printed in the block, progress bars too, is appended to a file."""
    with (
        open(path, "a", 1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def result_file(plan: Plan, measure: str, arm: str, seed: int) -> Path:
    """Where the result of a measurement is kept."""
    return existing(plan.out / f"{measure}-{arm}-{seed}.json")


def measure_arm(plan: Plan, arm: str, seeds: list[int]) -> None:
    """Train and measure an arm for some seeds, except what is done."""
    with printed_to(plan.out / f"{arm}-{seeds[0]}.log"):
        for seed in seeds:
            files = {name: result_file(plan, name, arm, seed) for name in MEASURES_OF_ARM[arm]}
            missing = [name for name, file in files.items() if not file.is_file()]
            if not missing:
                continue

            model = trained_model(plan, arm, seed)
            items = load_manifest(plan.run / "corpus/instruct_test.json")
            states = StateCache(model, items)
            for name in missing:
                write_json(files[name], MEASURES[name](model, states, items))


def measure_robustness(plan: Plan) -> dict:
    """robustness.measure of the run itself."""
    with printed_to(plan.out / "robustness.log"):
        return robustness.measure(plan.run, plan.out / "robustness.json", plan.device)


def measure_all(plan: Plan) -> None:
    """Train and measure every arm and seed, and the robustness; on a CPU in several processes."""
    # The longest come first. What the seeds of an arm share is made once, in one process.
    tasks = [functools.partial(measure_arm, plan, arm, plan.seeds) for arm in ("baseline", "self")]
    for arm in ("both", "semantic"):
        tasks += [functools.partial(measure_arm, plan, arm, [seed]) for seed in plan.seeds]
    tasks.append(functools.partial(measure_robustness, plan))

    processes = 1
    if plan.device == "cpu":
        processes = min(torch.get_num_threads(), MAX_PROCESSES)
    if processes <= 1:
        for task in tqdm(tasks, "arms"):
            task()
        return

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            futures = [pool.submit(task) for task in tasks]
            for future in tqdm(as_completed(futures), "arms", len(futures)):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is started


def check_settings(plan: Plan) -> None:
    """Record what the ablations are made with. Raises ValueError: they were made with something else."""
    stages = [plan.run / stage / "adapters.safetensors" for stage in ("stage1", "stage2")]
    missing = [str(file) for file in stages if not file.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no such file; `make demo RUN={plan.run}` makes it")

    recipe = train_instruct.RECIPES["toy"].train
    settings = {
        "steps": plan.steps,
        "lr": recipe.lr,
        "optimizer": recipe.optimizer,
        "stage1_steps": plan.stage1_steps,
        "stage1": hashlib.sha256(stages[0].read_bytes()).hexdigest()[:16],
    }
    made_with = once(plan.out / "settings.json", lambda: settings)
    for name, value in settings.items():
        if made_with.get(name) != value:
            raise ValueError(
                f"{plan.out}: was made with {name} {made_with.get(name)}, and now it is {value}; "
                "remove it, or ask for the same again"
            )


def ablate(plan: Plan) -> dict:
    """Train and measure whatever is not done yet.

    Returns:
        {"questions", "sweep", "race"}: {arm: a table for each seed}, and, once for all seeds,
        {"self_targets", "lm", "baseline", "robustness"}.
    Raises:
        ValueError: the run is not finished, or its ablations were made with other settings.
    """
    plan.out.mkdir(exist_ok=True) if plan.run.is_dir() else None
    check_settings(plan)
    measure_all(plan)

    results: dict = {"questions": {}, "sweep": {}, "race": {}}
    for arm, measures in MEASURES_OF_ARM.items():
        for name in measures:
            files = [result_file(plan, name, arm, seed) for seed in plan.seeds]
            results[name][arm] = [read_json(file) for file in files]

    # Timed now, when nothing else runs.
    items = load_manifest(plan.run / "corpus/instruct_test.json")
    captions = [item for item in items if item["kind"] == "caption"][:TIMED_CLIPS]
    for arm in ("both", "baseline"):
        results["race"][arm] = [
            once(
                result_file(plan, "race", arm, seed),
                lambda: time_captions(trained_model(plan, arm, seed), captions),
            )
            for seed in plan.seeds
        ]

    results["self_targets"] = read_json(plan.out / "self_targets.json")
    results["lm"] = read_json(plan.run / "lm.json")
    results["baseline"] = read_json(existing(plan.run / "baseline.json"))
    results["robustness"] = measure_robustness(plan)
    return results


def main(arguments: list[str] | None = None) -> None:
    stage1_steps = train_asr.RECIPES["toy"].train.steps
    parser = argparse.ArgumentParser(
        prog="python -m lab.ablations", description="The paper's ablations on a finished run."
    )
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="from `make demo`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every training")
    parser.add_argument("--steps", type=int, default=400, help="of every stage 2 (default 400)")
    parser.add_argument(
        "--stage1-steps",
        type=int,
        default=stage1_steps,
        help=f"of the baseline's stage 1 (default {stage1_steps}, as in the demo)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    seeds = list(dict.fromkeys(args.seeds))
    options = {"steps": args.steps, "stage1_steps": args.stage1_steps, "device": args.device}
    with one_line_errors("python -m lab.ablations"):
        results = ablate(Plan(run=args.run, seeds=seeds, **options))

    command = (
        f"python -m lab.ablations --run {args.run} --seeds {' '.join(map(str, seeds))} "
        f"--steps {args.steps} --stage1-steps {args.stage1_steps}"
    )
    print(write_report(args.run / "ablations", results, seeds, command, args.device))


if __name__ == "__main__":
    main()
