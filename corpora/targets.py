"""Stage 2's targets: what a text model that only reads a clip's seed transcript would answer (paper, section 3.3).

Three ways were compared by the paper:

    python -m corpora.targets prompts M.json --out prompts.jsonl                    for an external LLM: {"id", "prompt"} a line
    python -m corpora.targets external M.json --answers answers.jsonl --out T.json  its answers: {"id", "answer"} a line
    python -m corpora.targets self M.json --llm DIR --out T.json                    the diffusion LM answers by itself
    python -m corpora.targets rewrite M.json --answers answers.jsonl --llm DIR --out T.json     it rewrites the external answer

T.json is M.json with `input` the question and `target` the answer. Answers that are empty, cut off, or repeat themselves
are dropped, and so are items without one; it says how many of each.
"""

import argparse
import collections
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import ManifestError, load_manifest, write_manifest
from checkpoints.tokenizer import TEXT_END, Tokenizer, decode_answer, load_tokenizer, text_prompt
from diffa import Spliced
from diffusion_lm import DiffusionLM
from sampler import SamplerConfig, generate
from checkpoints.weights import load_lm

QUESTION = "What can you hear from the audio?"
ASK = """Below is a description of an audio clip that you have just listened to. Answer the question as if you had heard it yourself, \
in one or two sentences, and do not mention the description.

{seed}

Question: {question}"""
REWRITE = """Below are a description of an audio clip and an answer to a question about it. Write the answer again in your own words. \
Keep every fact, and add none.

{seed}

Question: {question}
Answer: {answer}"""
ENDS = tuple(".!?\"')]}。！？”")  # what a finished answer closes with


def wrong_with(answer: str, cut_off: bool | None = None) -> str:
    """Why an answer cannot be a target: "empty", "truncated", "repeating"; "" when it can.

    cut_off: whether the model had no room to end, where that is known; else an answer without a closing mark counts.
    """
    words = answer.lower().split()
    if not any(character.isalnum() for character in answer):
        return "empty"
    if not answer.rstrip().endswith(ENDS) if cut_off is None else cut_off:
        return "truncated"
    # One word four times in a row, or three or more words that come three times: what a model says when it is lost.
    if any(len(set(words[i : i + 4])) == 1 for i in range(len(words) - 3)):
        return "repeating"
    counts = collections.Counter(tuple(words[i : i + 3]) for i in range(len(words) - 2))
    return "repeating" if counts and counts.most_common(1)[0][1] >= 3 else ""


def read_answers(path: Path) -> dict[str, str]:
    """An external model's answers by id, from a JSONL file. Raises ManifestError: a line that is not {"id", "answer"}."""
    answers = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers[row["id"]] = row["answer"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f'{path}: line {number} is not {{"id": ..., "answer": "..."}} ({error!r}): {line[:80]}') from None
    return answers


def ask(lm: DiffusionLM, tokenizer: Tokenizer, texts: list[str], config: SamplerConfig, batch: int = 16) -> Iterator[tuple[str, bool]]:
    """The diffusion LM's answer to each text, and whether it was cut off: no end of text within its length."""
    end, device = tokenizer.id(TEXT_END), lm.embedding.weight.device
    for start in tqdm(range(0, len(texts), batch), desc="answering", leave=False):
        prompts = [text_prompt(tokenizer, text) for text in texts[start : start + batch]]
        P = max(map(len, prompts))
        ids = torch.tensor([[end] * (P - len(p)) + p for p in prompts], device=device)  # (B, P)
        real = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
        for row in generate(lm, Spliced(lm.embed(ids), real, real), config).ids.tolist():
            yield decode_answer(tokenizer, row), not {end, tokenizer.id(tokenizer.chat.turn_end)} & set(row)


def with_targets(items: list[dict], answers: dict[str, str], cut_off: dict[str, bool], question: str) -> tuple[list[dict], collections.Counter]:
    """Items with the answers as targets, and how many were dropped for what."""
    kept, dropped = [], collections.Counter()
    for item in items:
        name = item["audio_id"]
        problem = wrong_with(answers[name], cut_off.get(name)) if name in answers else "without an answer"
        if problem:
            dropped[problem] += 1
        else:
            kept.append(item | {"input": question, "target": answers[name]})
    return kept, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="way")
    for way in ("prompts", "external", "self", "rewrite"):
        command = commands.add_parser(way)
        command.add_argument("manifest", type=Path)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--question", default=QUESTION, help=f"default: {QUESTION}")
        if way in ("external", "rewrite"):
            command.add_argument("--answers", type=Path, required=True, help='JSONL of {"id", "answer"}')
        if way in ("self", "rewrite"):
            command.add_argument("--llm", required=True, help="LLaDA or Qwen3-diffusion directory (hub format)")
            command.add_argument("--length", type=int, default=128, help="tokens of an answer (default 128)")
            command.add_argument("--batch", type=int, default=16)
            command.add_argument("--dtype", default="bfloat16")
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        items = load_manifest(args.manifest)
        if args.way == "prompts":
            lines = [{"id": i["audio_id"], "prompt": ASK.format(seed=i["seed_transcript"], question=args.question)} for i in items]
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
            print(f"{len(lines)} prompts in {args.out}")
            return
        answers = read_answers(args.answers) if args.way in ("external", "rewrite") else {}
        cut_off: dict[str, bool] = {}
        dropped = collections.Counter()
        if args.way in ("self", "rewrite"):
            if args.way == "rewrite":  # what is not fit to be a target is not fit to be rewritten
                items, dropped = with_targets(items, answers, {}, args.question)
            lm = load_lm(args.llm, getattr(torch, args.dtype), args.device).eval()
            template = ASK if args.way == "self" else REWRITE
            texts = [template.format(seed=i["seed_transcript"], question=args.question, answer=i["target"]) for i in items]
            config = SamplerConfig(length=args.length, block_length=min(32, args.length), steps=args.length, rule="threshold")
            said = list(ask(lm, load_tokenizer(args.llm, lm.config), texts, config, args.batch))
            answers = {item["audio_id"]: answer for item, (answer, _) in zip(items, said)}
            cut_off = {item["audio_id"]: cut for item, (_, cut) in zip(items, said)}
        items, more = with_targets(items, answers, cut_off, args.question)
    except (ManifestError, OSError, ValueError) as error:
        raise SystemExit(f"targets.py: {error}") from None
    dropped += more
    told = ", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"
    if not items:
        raise SystemExit(f"targets.py: no item has a usable answer; dropped: {told}")
    write_manifest(args.out, [item | {"audio_filepath": str(Path(item["audio_filepath"]).resolve())} for item in items])
    print(f"{len(items)} items in {args.out}; dropped: {told}")


if __name__ == "__main__":
    main()
