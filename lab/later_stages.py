"""What DIFFA-2's later stages gain at toy scale: LoRA in the LM (stage 3), preference (stage 4).

The frozen LM of a toy run never saw a question about the last word of a sentence. Stage 3 trains on
a mixture of the known questions and this new one, with LoRA or, as its control, without. Stage 4
trains on pairs of a correct answer and a wrong one that stage 3 itself gave.

    python -m lab.later_stages corpus --run runs/toy --out runs/later        manifests
    python train_instruct.py --lora 8 --adapters runs/toy/stage2 --train runs/later/train.json ...
    python -m lab.later_stages pairs --adapters runs/later/lora --out runs/later/pairs.json
    python -m training.preference --adapters runs/later/lora --train runs/later/pairs.json ...
    python -m lab.later_stages report --of runs/later/lora ... --test runs/later/test.json

docs/diffa-2.md has the whole commands and what was measured.
"""

import argparse
import random
from pathlib import Path

from checkpoints.command_line import add_model_arguments, count, model_options, one_line_errors
from checkpoints.command_line import seed as seed_option
from checkpoints.files import write_json
from checkpoints.model import load_diffa
from data import ManifestError, load_manifest
from evaluation.wer import word_error_rate
from sampler import SamplerConfig
from toy.evaluate import answers_to
from toy.pretrain_lm import THRESHOLD, accuracy
from training.states import StateCache

NAME = "python -m lab.later_stages"
NEW_KIND = "last word"
QUESTIONS = ("What is the last word?", "Which word comes last?", "Say the last word.")
SENTENCE_KINDS = ("repeat", "caption")  # scored by words; all others must be exact


def with_new_questions(items: list[dict], rng: random.Random) -> list[dict]:
    """The items, and for each clip one question about its last word."""
    clips = {item["audio_id"]: item for item in items}
    asked = [
        item
        | {
            "input": rng.choice(QUESTIONS),
            "target": item["transcription"].split()[-1],
            "kind": NEW_KIND,
        }
        for item in clips.values()
    ]
    return items + asked


def make_corpus(run: Path, out: Path, clips: int, test_clips: int, seed: int) -> None:
    """Write OUT/train.json and OUT/test.json of some of the run's clips, drawn by the seed."""
    for split, n in (("train", clips), ("test", test_clips)):
        items = load_manifest(run / f"corpus/instruct_{split}.json")
        names = sorted({item["audio_id"] for item in items})
        rng = random.Random(seed)
        chosen = set(rng.sample(names, min(n, len(names))))

        items = with_new_questions([item for item in items if item["audio_id"] in chosen], rng)
        write_json(out / f"{split}.json", items)
        print(f"{out / split}.json: {len(items):,} questions about {len(chosen)} clips")


def make_pairs(model, manifest: Path, out: Path, n: int, config: SamplerConfig) -> None:
    """Write those of n items that the model answers wrongly, its answer as `rejected`.

    config: also its seed, which draws the items. Raises ManifestError: every answer is right.
    """
    items = load_manifest(manifest)
    items = random.Random(config.seed).sample(items, min(n, len(items)))
    states = StateCache(model, items)
    answers = answers_to(model, states, items, config)
    pairs = [
        item | {"rejected": answer.text}
        for item, answer in zip(items, answers, strict=True)
        if answer.text.strip() and answer.text != item["target"]
    ]
    if not pairs:
        raise ManifestError(f"{manifest}: every answer is right; raise --temperature")
    write_json(out, pairs)
    print(f"{out}: {len(pairs):,} pairs of {len(items):,} questions")


def results(model, states: StateCache, items: list[dict]) -> dict[str, float]:
    """Percent by kind of question: accuracy, for whole sentences 100 - WER; and their mean."""
    table = {}
    for kind in dict.fromkeys(item["kind"] for item in items):
        chosen = [item for item in items if item["kind"] == kind]
        predictions = [a.text for a in answers_to(model, states, chosen, THRESHOLD)]
        targets = [item["target"] for item in chosen]
        if kind in SENTENCE_KINDS:
            table[kind] = 100 - word_error_rate(predictions, targets)
        else:
            table[kind] = accuracy(predictions, targets)

    # Every kind has the same weight; the new one stands by itself.
    known = [value for kind, value in table.items() if kind != NEW_KIND]
    return table | {"known kinds": sum(known) / len(known)}


def report(paths: list[Path], test: Path, options: dict) -> None:
    """Print a table: a column for each adapters directory, a row for each kind of question."""
    items = load_manifest(test)
    states = None
    tables = []
    for path in paths:
        model = load_diffa(adapters=path, **options).eval()
        states = states or StateCache(model, items)
        tables.append(results(model, states, items))

    # The same layout as the tables in docs/.
    names = [str(path) for path in paths]
    print("| question | " + " | ".join(names) + " |")
    print("| --- " * (len(names) + 1) + "|")
    for kind in tables[0]:
        print(f"| {kind} | " + " | ".join(f"{table[kind]:.1f}" for table in tables) + " |")


def make_parser() -> argparse.ArgumentParser:
    """The options of the three commands."""
    parser = argparse.ArgumentParser(prog=NAME, description="DIFFA-2's later stages, toy scale.")
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("corpus", help="manifests with a new kind of question").add_argument
    add("--run", type=Path, default=Path("runs/toy"))
    add("--out", type=Path, default=Path("runs/later"))
    add("--clips", type=count, default=1000)
    add("--test-clips", type=count, default=200)
    add("--seed", type=seed_option, default=0)

    pairs = commands.add_parser("pairs", help="a model's own wrong answers, as rejected ones")
    add_model_arguments(pairs, "runs/later/lora")
    pairs.add_argument("--train", type=Path, default=Path("runs/later/train.json"))
    pairs.add_argument("--out", type=Path, default=Path("runs/later/pairs.json"))
    pairs.add_argument("--questions", type=count, default=2000, help="of them (default 2000)")
    pairs.add_argument("--temperature", type=float, default=1.0, help="of the answers (default 1)")
    pairs.add_argument("--seed", type=seed_option, default=0)

    table = commands.add_parser("report", help="accuracy of several adapters, by kind")
    add_model_arguments(table, "")
    table.add_argument("--test", type=Path, default=Path("runs/later/test.json"))
    table.add_argument("--of", type=Path, nargs="+", required=True, help="adapters' directories")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.command == "report" and (args.adapters or args.random_weights):
        parser.error("report compares the adapters of --of; leave out other weights")

    with one_line_errors(NAME):
        if args.command == "corpus":
            make_corpus(args.run, args.out, args.clips, args.test_clips, args.seed)
        elif args.command == "pairs":
            sampling = {"temperature": args.temperature, "seed": args.seed}
            config = SamplerConfig(length=THRESHOLD.length, rule="threshold", **sampling)
            model = load_diffa(args.whisper, args.llm, args.adapters, **model_options(args))
            make_pairs(model.eval(), args.train, args.out, args.questions, config)
        else:
            options = model_options(args) | {"whisper": args.whisper, "llm": args.llm}
            report(args.of, args.test, options)


if __name__ == "__main__":
    main()
