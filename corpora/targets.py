"""Stage 2's targets: what a text model that only reads a clip's seed transcript answers.

DIFFA compares targets from different models (table 6): an external LLM's answers, the diffusion
LM's own, and the external answers rewritten by the diffusion LM.

    python -m corpora.targets prompts M.json --out prompts.jsonl
    python -m corpora.targets external M.json --answers answers.jsonl --out T.json
    python -m corpora.targets self M.json --llm DIR --out T.json
    python -m corpora.targets rewrite M.json --answers answers.jsonl --llm DIR --out T.json

prompts.jsonl holds {"id", "prompt"} a line, answers.jsonl {"id", "answer"}. T.json has one item of
each clip in M.json, with `input` the question and `target` the answer. Answers that are empty, cut
off or repeat themselves are dropped, and so are items without an answer; their number is printed.
"""

import argparse
import collections
import json
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.command_line import (
    DTYPES,
    add_weights,
    count,
    one_line_errors,
    question_text,
)
from checkpoints.files import check_writable, read_text, refuse_twice, whole_file
from checkpoints.lm import load_lm
from checkpoints.tokenizer import Tokenizer, load_tokenizer
from corpora.manifests import write_manifest
from data import ManifestError, build_text_prompt, load_manifest
from diffusion_lm import DiffusionLM
from sampler import SamplerConfig, answer

QUESTION = "What can you hear from the audio?"
ASK = """Below is a description of an audio clip that you have just listened to. \
Answer the question as if you had heard it yourself, in one or two sentences, \
and do not mention the description.

{seed}

Question: {question}"""
REWRITE = """Below are a description of an audio clip and an answer to a question about it. \
Write the answer again in your own words. Keep every fact, and add none.

{seed}

Question: {question}
Answer: {answer}"""

# How a finished answer closes.
ENDS = tuple(".!?\"')]}。！？”")

# By audio_id: an answer, and whether it was cut off (None where that is unknown).
Answers = dict[str, tuple[str, bool | None]]


def target_problem(text: str, cut_off: bool | None = None) -> str:
    """Why an answer cannot be a target: "empty", "truncated", "repeating"; "" if it can.

    cut_off: whether the model had no room to end. None where that is unknown: then an answer
    without a closing mark counts as cut off.
    """
    # Nothing to read, or an end in the middle of a sentence.
    if not any(character.isalnum() for character in text):
        return "empty"
    if not text.rstrip().endswith(ENDS) if cut_off is None else cut_off:
        return "truncated"

    # A degenerate model says one word four times in a row, or three words in a row three times.
    words = text.lower().split()
    if any(len(set(words[i : i + 4])) == 1 for i in range(len(words) - 3)):
        return "repeating"
    counts = collections.Counter(zip(words, words[1:], words[2:]))
    return "repeating" if max(counts.values(), default=0) >= 3 else ""


def one_item_a_clip(items: list[dict], source: Path) -> list[dict]:
    """The first item of each audio_id: a clip gets one answer, whatever its items ask.

    Raises ManifestError: an audio_id names two clips.
    """
    first = {}
    for item in items:
        known = first.setdefault(item["audio_id"], item)
        for name in ("audio_filepath", "seed_transcript"):
            if item.get(name) != known.get(name):
                both = f"{known.get(name)!r} and {item.get(name)!r}"
                problem = f"audio_id {item['audio_id']!r} has two of {name}, {both}"
                raise ManifestError(f"{source}: {problem}; give each clip an id of its own")
    if len(first) < len(items):
        print(f"{source}: {len(items)} items about {len(first)} clips; one of each clip is kept")
    return list(first.values())


def prompts_about(items: list[dict], template: str, question: str) -> dict[str, str]:
    """A text model's prompts by audio_id. template: ASK, or REWRITE for the items' targets."""
    return {
        item["audio_id"]: template.format(
            seed=item["seed_transcript"], question=question, answer=item["target"]
        )
        for item in items
    }


def read_answers(path: Path) -> Answers:
    """An external model's answers, from a JSONL file.

    Raises ManifestError: a line that is not {"id", "answer"}, or a second one of an id. Raises
    WeightsError: no text file.
    """
    # Not splitlines, which breaks at characters that JSON allows within a text.
    answers = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=refuse_twice)
            name = row["id"]
            answer = row["answer"].strip()
            answer.encode()  # half a character cannot be trained on
            is_second = name in answers
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            expected = '{"id": ..., "answer": "..."}'
            raise ManifestError(
                f"{path}: line {number} is not {expected} ({error!r}): {line[:80]}"
            ) from None

        # Which of the two would count?
        if is_second:
            raise ManifestError(f"{path}: line {number} is a second answer for {name!r}")
        answers[name] = (answer, None)
    return answers


def lm_answers(
    lm: DiffusionLM, tokenizer: Tokenizer, texts: dict[str, str], config: SamplerConfig, batch: int
) -> Answers:
    """The diffusion LM's answers to texts by audio_id. One without an end of text was cut off.

    Texts that are too long for it are left out. Raises ValueError: all are.
    """
    prompts = {name: build_text_prompt(tokenizer, text) for name, text in texts.items()}
    room = lm.config.max_length - config.length
    fitting = {name: prompt for name, prompt in prompts.items() if len(prompt.before) <= room}
    if len(fitting) < len(prompts):
        left_out = f"{len(prompts) - len(fitting)} of {len(prompts)} prompts"
        print(f"{left_out} are longer than the {room} tokens that the LM has room for")
    prompts = fitting or prompts  # if none fits, the sampler says why

    answers = answer(lm, tokenizer, list(prompts.values()), None, config, batch=batch)
    ends = {tokenizer.id(tokenizer.chat.text_end), tokenizer.id(tokenizer.chat.turn_end)}

    # An answer with no end token filled its whole length.
    replies = tqdm(zip(prompts, answers), "answering", len(prompts), leave=False, disable=None)
    return {name: (reply.text, ends.isdisjoint(reply.ids)) for name, reply in replies}


def with_targets(
    items: list[dict], answers: Answers, question: str
) -> tuple[list[dict], collections.Counter]:
    """Items with the answers as targets, and how many were dropped for each reason."""
    kept = []
    dropped = collections.Counter()
    for item in items:
        name = item["audio_id"]
        problem = target_problem(*answers[name]) if name in answers else "without an answer"
        if problem:
            dropped[problem] += 1
        else:
            kept.append(item | {"input": question, "target": answers[name][0]})
    return kept, dropped


def check_items(items: list[dict], dropped: collections.Counter) -> str:
    """Why items were dropped, as text. Raises ManifestError: none is left."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    if not items:
        raise ManifestError(f"no item has a usable answer; dropped: {reasons}")
    return reasons


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    # A subcommand for each way, with the options of what it reads and of the LM that it runs.
    parser.set_defaults(answers=None, llm=None)
    commands = parser.add_subparsers(required=True, dest="way")
    for way in ("prompts", "external", "self", "rewrite"):
        command = commands.add_parser(way)
        option = command.add_argument
        option("manifest", type=Path)
        option("--out", type=Path, required=True)
        option("--question", type=question_text, default=QUESTION, help=f"default: {QUESTION}")
        if way in ("external", "rewrite"):
            option("--answers", type=Path, required=True, help='JSONL of {"id", "answer"}')
        if way in ("self", "rewrite"):
            option("--llm", required=True, help="directory of a diffusion LM (hub format)")
            option("--length", type=count, default=128, help="tokens of an answer (default 128)")
            option("--batch", type=count, default=16, help="prompts at once (default 16)")
            option("--dtype", choices=DTYPES, default="bfloat16")
            add_weights(command)
            option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with one_line_errors("python -m corpora.targets"):
        # What can be checked is checked before long work.
        items = one_item_a_clip(load_manifest(args.manifest), args.manifest)
        if args.out.exists() and any(
            path and args.out.samefile(path) for path in (args.manifest, args.answers)
        ):
            raise ManifestError(f"--out {args.out}: is read by this command; give another file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.out)

        if args.way == "prompts":
            prompts = prompts_about(items, ASK, args.question)
            rows = [{"id": name, "prompt": text} for name, text in prompts.items()]
            with whole_file(args.out) as temporary:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                temporary.write_text(lines, "utf-8")
            print(f"{len(rows)} prompts in {args.out}")
            return

        # External answers first: what cannot be a target is not worth rewriting either.
        dropped = collections.Counter()
        if args.answers:
            items, dropped = with_targets(items, read_answers(args.answers), args.question)
            check_items(items, dropped)

        # The diffusion LM's own answers, or its rewriting of the external ones.
        if args.llm:
            prompts = prompts_about(items, REWRITE if args.answers else ASK, args.question)
            block_length = min(32, args.length)
            config = SamplerConfig(length=args.length, block_length=block_length, rule="threshold")
            eight = args.weights == "int8"
            lm = load_lm(args.llm, DTYPES[args.dtype], args.device, int8=eight).eval()
            tokenizer = load_tokenizer(args.llm, lm.config)
            answers = lm_answers(lm, tokenizer, prompts, config, args.batch)
            items, more = with_targets(items, answers, args.question)
            dropped += more

        # Say what was dropped, also when nothing is left.
        reasons = check_items(items, dropped)
        write_manifest(args.out, items)
        print(f"{len(items)} items in {args.out}; dropped: {reasons}")


if __name__ == "__main__":
    main()
