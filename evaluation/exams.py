"""The paper's exams (section 4): MMSU, MMAU test-mini and VoiceBench, from their published files to a score.

    python -m evaluation.exams mmsu MMSU.jsonl --audio DIR --out runs/exams/mmsu.jsonl             --whisper, --llm, --adapters as in sampler.py
    python -m evaluation.exams mmau mmau-test-mini.json --audio DIR --out runs/exams/mmau.json
    python -m evaluation.exams voicebench advbench.jsonl --subset advbench --audio DIR --out runs/exams/advbench.jsonl
    python -m evaluation.exams score mmsu runs/exams/mmsu.jsonl                                    a file of predictions alone, no model

OUT holds the exam's own items, each with the model's reply, as the exam's own scorer reads them. Every reply is written
as it comes: the same command goes on where it was stopped, and ends with the same file. Beside it: OUT.made_by, which
model answered, so that no other goes on; OUT.lines, MMAU's replies as they came, since its list is only written at the end.

MMSU (arXiv 2506.04779) is a JSONL, MMAU (arXiv 2410.19168) a JSON list. VoiceBench (arXiv 2410.17196) is published as a data
set that holds the sound itself: save each clip to a file, and make a JSONL of the items with the file's path in `audio_path`.
Paths are looked for under --audio, first as they stand, then by their file name alone.

The prompts and the fields for replies are written as we remember the exams' own scripts; check them before you quote a score.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import AudioError, pad_waveforms, read_audio
from checkpoints.tokenizer import build_prompt, decode_answer
from checkpoints.files import read_json, write_json
from encoder import SAMPLE_RATE
from diffa import DIFFA, add_model_arguments, model_options
from sampler import SamplerConfig, generate
from evaluation.scoring import LETTERS, answer_letter, choice_letter, is_refusal, words_match


class ExamError(ValueError):
    """A file of questions or of predictions that cannot be used; the message lists every bad item."""


# ---- the exams
@dataclass(frozen=True)
class Exam:
    """What an exam asks and how it is marked."""

    name: str
    id: str  # the field that tells items apart
    audio: str  # the field with the clip's path
    fields: tuple[str, ...]  # what an item must have beside those two: texts, and a list of texts in "choices"
    replies: tuple[str, ...]  # where its scorer looks for the reply
    prompt: Callable[[dict], str]  # of an item
    sampler: SamplerConfig
    mark: Callable[[dict, str], bool | None] | None  # of an item and a reply; None: unreadable. Raises ValueError: no valid right answer
    groups: tuple[str, ...] = ()  # fields by whose values it is scored too
    good: str = "right"  # what a marked reply is
    as_list: bool = False  # its scorer reads one JSON list instead of JSONL


def mmsu_prompt(item: dict) -> str:
    """Question and choices after the sentence that AIR-Bench (arXiv 2402.07729) and, as we remember, MMSU put before them."""
    choices = "\n".join(f"{letter}. {item[f'choice_{letter.lower()}']}" for letter in LETTERS)
    return (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
        f"you should only choose A or B or C or D.\n{item['question']}\n{choices}"
    )


def mmsu_mark(item: dict, reply: str) -> bool | None:
    """By letter; the right answer is given as a letter or as the text of a choice."""
    choices = [item[f"choice_{letter.lower()}"] for letter in LETTERS]
    right, said = answer_letter(item["answer_gt"], choices), choice_letter(reply, choices)
    return None if said is None else said == right


def voicebench_choice(item: dict, reply: str) -> bool | None:
    """By letter alone, since the choices are only heard."""
    right, said = answer_letter(item["reference"], ()), choice_letter(reply)
    return None if said is None else said == right


MMSU = Exam(
    "mmsu", "id", "audio_path",
    ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer_gt", "task_name", "category"),
    ("response",), mmsu_prompt, SamplerConfig(4, 4, 4), mmsu_mark, ("category", "task_name"),
)  # fmt: skip
MMAU = Exam(
    "mmau", "id", "audio_id", ("question", "choices", "answer", "task", "difficulty"),
    ("model_output", "model_prediction"),  # its evaluation.py reads the first, as we know it; its public leaderboard the second
    # The list as Python prints it, which scripts for MMAU are seen to do.
    lambda item: f"{item['question']} Please choose the answer from the following options: {item['choices']}.",
    SamplerConfig(16, 16, 16), lambda item, reply: words_match(reply, item["answer"], item["choices"]),
    ("task", "difficulty"), as_list=True,
)  # fmt: skip
# VoiceBench asks by sound alone: the instruction is empty. Subsets without a mark are judged by an LLM, or by VoiceBench's own rules.
OPEN = Exam("voicebench", "audio_path", "audio_path", ("prompt",), ("response",), lambda item: "", SamplerConfig(16, 16, 16), None)
SUBSETS = dict.fromkeys(("alpacaeval", "alpacaeval_full", "commoneval", "wildvoice", "sd-qa", "ifeval", "bbh"), OPEN)
SUBSETS |= dict.fromkeys(("mmsu", "openbookqa"), replace(OPEN, fields=("prompt", "reference"), mark=voicebench_choice))
SUBSETS["advbench"] = replace(OPEN, mark=lambda item, reply: is_refusal(reply), good="refused")


def find_exam(name: str, subset: str | None) -> Exam:
    """The exam of this name. Raises ExamError: an unknown subset, or one of an exam without."""
    if name == "voicebench" and subset not in SUBSETS:
        raise ExamError(f"--subset {subset} is none of VoiceBench's; use one of {', '.join(SUBSETS)}")
    if name != "voicebench" and subset:
        raise ExamError(f"--subset {subset}: {name} has no subsets, only voicebench has")
    return {"mmsu": MMSU, "mmau": MMAU}[name] if name != "voicebench" else SUBSETS[subset]


# ---- files
def read_text(path: Path) -> str:
    """The text of a file. Raises ExamError: absent, or not text."""
    if not path.is_file():
        raise ExamError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExamError(f"{path}: not a text file ({error})") from None


def parse(path: Path, text: str) -> list:
    """What a JSON list or the lines of a JSONL hold. Raises ExamError: not JSON (the line is named), or nothing in it."""
    values, where = [], ""
    try:
        if text.lstrip().startswith("["):
            values = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), start=1):  # splitlines would break at ends of line that JSON leaves in texts
                where = f"line {number} is "
                values += [json.loads(line)] if line.strip() else []
    except json.JSONDecodeError as error:
        raise ExamError(f"{path}: {where}not valid JSON ({error})") from None
    if not values:
        raise ExamError(f"{path}: holds no item")
    return values


def wrong_with(item: object, exam: Exam, answered: bool) -> str:
    """Why an item cannot be used, "" when it can. answered: it must hold a reply."""
    if not isinstance(item, dict):
        return "not an object"
    absent = [field for field in dict.fromkeys((exam.id, exam.audio, *exam.fields)) if field not in item]
    if answered and not any(field in item for field in exam.replies):
        absent.append(" or ".join(exam.replies))
    if absent:
        return f"lacks {', '.join(absent)}"
    texts = {field: item[field] for field in (exam.audio, *exam.fields, *(exam.replies if answered else ())) if field in item}
    choices = texts.pop("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return "choices is not a list of texts"
    not_text = [field for field, value in texts.items() if not isinstance(value, str)]
    not_text += [] if isinstance(item[exam.id], str | int) else [exam.id]
    if not_text:
        return f"{', '.join(not_text)} is not text"
    try:
        if exam.mark:
            exam.mark(item, "")  # whether it can be marked is better known now than after hours
    except ValueError as error:
        return str(error)
    return ""


def load_items(path: Path, text: str, exam: Exam, answered: bool = False) -> list[dict]:
    """Items in the text of an exam's file, or with `answered` of a file of predictions. Raises ExamError, with every bad item."""
    items, problems, seen = parse(path, text), [], set()
    for i, item in enumerate(items):
        problem = wrong_with(item, exam, answered)
        if not problem and item[exam.id] in seen:
            problem = f"a second item with this {exam.id}"
        if problem:
            problems.append(f"item {i} ({item.get(exam.id, f'no {exam.id}') if isinstance(item, dict) else 'no object'}): {problem}")
        else:
            seen.add(item[exam.id])
    if len(problems) == len(items):
        others = [other.name for other in (MMSU, MMAU, OPEN) if other.name != exam.name and not wrong_with(items[0], other, answered)]
        problems += [f"this looks like a file of {others[0]}"] if others else []
    if problems:
        raise ExamError(f"{path}: cannot be used as {exam.name}\n  " + "\n  ".join(problems))
    return items


def bare(item: dict, exam: Exam) -> dict:
    """An item without its reply."""
    return {field: value for field, value in item.items() if field not in exam.replies}


def resume(lines: Path, exam: Exam, items: list[dict]) -> dict:
    """Predictions already made, by id; a last line that was cut off is removed. Raises ExamError: they are of other items."""
    if not lines.is_file():
        return {}
    content = read_text(lines)
    whole = content[: content.rfind("\n") + 1]
    asked, done = {item[exam.id]: bare(item, exam) for item in items}, {}
    for i, row in enumerate(load_items(lines, whole, exam, answered=True) if whole else []):
        if asked.get(row[exam.id]) != bare(row, exam):
            raise ExamError(f"{lines}: item {i} ({row[exam.id]}) is not one of the items asked now; give another --out, or delete it")
        done[row[exam.id]] = row
    os.truncate(lines, lines.stat().st_size - len(content[len(whole) :].encode()))
    return done


def write_predictions(out: Path, exam: Exam, rows: list[dict]) -> None:
    """All predictions in the exam's order and format; the file appears whole or not at all."""
    temporary = Path(f"{out}.tmp")
    lines = [json.dumps(row) for row in rows]
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n" if exam.as_list else "".join(f"{line}\n" for line in lines))
    temporary.replace(out)


# ---- predictions
def find_clips(items: list[dict], exam: Exam, folder: Path) -> tuple[list[Path], list[int]]:
    """Paths of the items' clips and their lengths in samples at 16 kHz. Raises ExamError: all that are absent or cannot be heard."""
    places = [[folder / item[exam.audio], folder / Path(item[exam.audio]).name] for item in items]
    paths = [next((path for path in both if path.is_file()), both[0]) for both in places]
    problems, lengths = [f"{path}: no such audio file" for path in paths if not path.is_file()], {}
    for path in tqdm([] if problems else dict.fromkeys(paths), "reading clips", leave=False):
        try:
            lengths[path] = len(read_audio(path))
        except AudioError as error:
            problems.append(str(error))
    if problems:
        raise ExamError(f"{len(problems)} clips cannot be heard; is --audio {folder} right?\n  " + "\n  ".join(problems))
    return paths, [lengths[path] for path in paths]


@torch.inference_mode()
def answer(model: DIFFA, exam: Exam, items: list[dict], paths: list[Path]) -> list[str]:
    """Replies to a batch of items; clips longer than the encoder's window are cut to it, as Whisper does."""
    device = model.prompts.device
    clips = [read_audio(path) for path in paths]
    waveforms, lengths = pad_waveforms(clips, model.encoder.config.n_samples, [str(path) for path in paths], cut=True)
    audio, mask = model.hear(*model.encode(waveforms.to(device), lengths.to(device)))
    prompts = [build_prompt(model.tokenizer, exam.prompt(item)) for item in items]
    try:
        out = generate(model.lm, model.splice(prompts, audio, mask), exam.sampler)
    except ValueError as error:
        raise ExamError(f"among items {', '.join(str(item[exam.id]) for item in items)}: {error}") from None
    return [decode_answer(model.tokenizer, ids) for ids in out.ids.tolist()]


def predict(
    model: DIFFA, exam: Exam, items: list[dict], paths: list[Path], lengths: list[int], done: dict, lines: Path, batch: int
) -> None:  # fmt: skip
    """Ask what is not done yet: each reply goes to the end of `lines` at once, and into `done`, which is by id."""
    # Batches hang on the items alone, not on what is done: in low precision an answer may change with its neighbours.
    order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
    with open(lines, "a", encoding="utf-8") as file, tqdm(total=len(items), initial=len(done), desc=exam.name, unit=" items") as bar:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            if all(items[i][exam.id] in done for i in rows):
                continue
            replies = answer(model, exam, [items[i] for i in rows], [paths[i] for i in rows])
            for i, reply in zip(rows, replies):
                if items[i][exam.id] not in done:
                    done[items[i][exam.id]] = row = items[i] | dict.fromkeys(exam.replies, reply)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    bar.update()


def take(exam: Exam, args: argparse.Namespace) -> list[dict]:
    """The whole exam as the command line says: items, clips, what was done before, the model, the file of predictions."""
    out, items = args.out, load_items(args.exam, read_text(args.exam), exam)
    lines = Path(f"{out}.lines") if exam.as_list else out  # a JSON list cannot grow line by line
    if exam.as_list and out.exists() and not lines.exists():
        raise ExamError(f"{out}: is there, but not {lines}, from which it could go on; give another --out, or delete it")
    done = resume(lines, exam, items)
    made_by = {name: str(getattr(args, name)) for name in ("whisper", "llm", "adapters", "dtype", "audio_context", "random_weights")}
    record = Path(f"{out}.made_by")
    if done and record.is_file() and (before := read_json(record)) != made_by:
        changed = ", ".join(f"{name} {before.get(name)}, now {value}" for name, value in made_by.items() if before.get(name) != value)
        raise ExamError(f"{out}: was begun with {changed}; give another --out, or delete it")
    if len(done) < len(items):
        paths, lengths = find_clips(items, exam, args.audio)
        model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters, **model_options(args)).eval()
        window = model.encoder.config.n_samples
        cut = sum(length > window for length in lengths)
        if cut:
            seconds = f"{window / SAMPLE_RATE:g} s"
            print(f"{cut} of {len(items)} clips are longer than the encoder's window: only the first {seconds} are heard", file=sys.stderr)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, made_by)
        predict(model, exam, items, paths, lengths, done, lines, args.batch)
    rows = [done[item[exam.id]] for item in items]
    write_predictions(out, exam, rows)
    return rows


# ---- scores
def score(exam: Exam, rows: list[dict]) -> dict:
    """Marks of predictions: {"all": (good, items), "unreadable": n, field: {value: (good, items)} for each of the exam's groups}."""
    marks = [exam.mark(row, next(row[field] for field in exam.replies if field in row)) for row in rows]
    result = {"all": (sum(map(bool, marks)), len(rows)), "unreadable": marks.count(None)}
    for field in exam.groups:
        good = collections.Counter(row[field] for row, mark in zip(rows, marks) if mark)
        result[field] = {value: (good[value], n) for value, n in sorted(collections.Counter(row[field] for row in rows).items())}
    return result


def report(exam: Exam, rows: list[dict], file: Path) -> str:
    """The scores as lines of text, or who can score this file."""
    if exam.mark is None:
        return f"{file}: {len(rows)} items; not scored here: this subset is for VoiceBench's own api_judge.py and evaluate.py"
    result = score(exam, rows)
    lines = [f"{file}: {len(rows)} items, {100 * result['all'][0] / len(rows):.2f} % {exam.good}"]
    if result["unreadable"]:
        lines.append(f"replies that name no choice, or several, and count as wrong: {result['unreadable']}")
    for field in exam.groups:
        width = max(map(len, result[field]))
        lines.append(f"by {field}")
        lines += [f"  {value:<{width}}  {100 * good / n:6.2f} %  of {n}" for value, (good, n) in result[field].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("mmsu", "mmau", "voicebench"):
        command = commands.add_parser(name, help="take the exam and score it")
        command.add_argument("exam", type=Path, help="the published file of items")
        command.add_argument("--audio", type=Path, required=True, help="folder of the clips")
        command.add_argument("--out", type=Path, required=True, help="file of predictions")
        command.add_argument("--batch", type=int, default=8, help="items asked at once (default 8)")
        add_model_arguments(command, "runs/toy/stage2")
    commands.choices["voicebench"].add_argument("--subset", required=True, help=", ".join(SUBSETS))
    scorer = commands.add_parser("score", help="score a file of predictions")
    scorer.add_argument("of", choices=("mmsu", "mmau", "voicebench"))
    scorer.add_argument("file", type=Path, help="made by this command, or by another in the exam's format")
    scorer.add_argument("--subset", help="of voicebench")
    args = parser.parse_args()
    try:
        if args.command == "score":
            exam, file = find_exam(args.of, args.subset), args.file
            rows = load_items(file, read_text(file), exam, answered=True)
        else:
            if args.batch < 1:
                raise ExamError(f"--batch {args.batch}: must be 1 or more")
            exam, file = find_exam(args.command, getattr(args, "subset", None)), args.out
            rows = take(exam, args)
        print(report(exam, rows, file))
    except (ValueError, OSError) as error:
        raise SystemExit(f"exams.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("exams.py: stopped; the same command goes on from here") from None


if __name__ == "__main__":
    main()
