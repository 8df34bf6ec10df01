"""The paper's exams, from their published files to a score: MMSU, MMAU test-mini and VoiceBench.

    python -m evaluation.exams mmsu MMSU.jsonl --audio DIR --out runs/exams/mmsu.jsonl
    python -m evaluation.exams mmau mmau-test-mini.json --audio DIR --out runs/exams/mmau.json
    python -m evaluation.exams voicebench advbench.jsonl --subset advbench --audio DIR --out ...
    python -m evaluation.exams score mmsu runs/exams/mmsu.jsonl     scores predictions, no model

--whisper, --llm and --adapters as in sampler.py. MMSU is a JSONL, MMAU a JSON list. VoiceBench is
published as a data set that holds the audio: save each clip to a file, and write a JSONL of the
items with the file's path in `audio_path`. Paths are relative to --audio; where nothing is found,
the file name alone is tried.

OUT holds the exam's items with the model's replies, as the exam's own scorer reads them. Each reply
is written at once: the same command resumes a stopped run and ends with the same file. OUT.made_by
records the model, so that no other model resumes. OUT.lines holds MMAU's replies until its list is
complete.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from checkpoints.command_line import add_model_arguments, count, model_options, one_line_errors
from checkpoints.files import check_writable, read_json, write_json
from checkpoints.model import load_diffa
from data import AudioError, build_prompt, read_audio
from diffa import DIFFA
from encoder import SAMPLE_RATE
from evaluation.clips import hear_clips
from evaluation.exam_files import load_items, resume_predictions, write_predictions
from evaluation.exam_rules import EXAMS, SUBSETS, Exam, ExamError, find_exam
from evaluation.exam_scores import score_lines
from sampler import answer


@dataclass(frozen=True, kw_only=True)
class ExamClip:
    """A sound file of an exam."""

    path: Path
    waveform: Tensor  # (S,) at 16 kHz, at most LONGEST of them


# Samples that are kept of a clip: more than any Whisper hears, so that longer ones are known.
LONGEST = 30 * SAMPLE_RATE + 1


def read_clips(items: list[dict], exam: Exam, folder: Path) -> list[ExamClip]:
    """The clip of each item. Raises ExamError: files that are absent or unreadable, all of them.

    Each file is read once, and stays in memory: 64 kB a second, about 2 GB for MMSU.
    """
    # The path below the folder comes first, then the file name alone.
    paths = []
    for item in items:
        path = folder / item[exam.audio_field]
        by_name = folder / path.name
        paths.append(by_name if isfile(by_name) and not isfile(path) else path)

    # They are read before the model is loaded: a bad clip is known now, not after hours.
    clips = {}
    problems = []
    for path in tqdm(dict.fromkeys(paths), "reading clips", leave=False, disable=None):
        try:
            clips[path] = ExamClip(path=path, waveform=read_audio(path, LONGEST / SAMPLE_RATE))
        except AudioError as error:
            problems.append(str(error))
    if problems:
        heading = f"{len(problems)} clips cannot be used; is --audio {folder} correct?"
        raise ExamError("\n  ".join([heading, *problems]))
    return [clips[path] for path in paths]


def answer_items(
    model: DIFFA,
    exam: Exam,
    items: list[dict],
    clips: list[ExamClip],
    done: dict,
    lines: Path,
    batch: int,
) -> None:
    """Answer the items that are not done yet.

    Args:
        done: predictions by id; each new one is added. lines: a JSONL to which it is appended.
        batch: items answered at once. Clips longer than the encoder's window are cut to it.
    Raises:
        ExamError: a question does not fit the LM; the items of its batch are named.
    """
    # Batches depend on the items alone, not on what is done: in low precision an answer may change
    # with its neighbours. A batch that is not complete is answered as a whole.
    order = sorted(range(len(items)), key=lambda i: (len(clips[i].waveform), i))
    pending = []
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        if not all(items[i][exam.id_field] in done for i in indices):
            pending += indices

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        heard = [clips[i] for i in pending[rows]]
        names = [str(clip.path) for clip in heard]
        return hear_clips(model, [clip.waveform for clip in heard], names, cut=True)

    prompts = [build_prompt(model.tokenizer, exam.prompt(items[i])) for i in pending]
    replies = answer(model.lm, model.tokenizer, prompts, hear, exam.sampler, batch=batch)

    # Replies are appended as they come, those already there excepted.
    n_answered = 0
    bar = tqdm(total=len(items), initial=len(done), desc=exam.name, unit=" items", disable=None)
    with bar, open(lines, "a", encoding="utf-8") as file:
        try:
            for i, reply in zip(pending, replies):
                n_answered += 1
                name = items[i][exam.id_field]
                if name in done:
                    continue
                done[name] = items[i] | dict.fromkeys(exam.reply_fields, reply.text)
                file.write(json.dumps(done[name]) + "\n")
                file.flush()
                bar.update()
        except ValueError as error:
            failed = pending[n_answered : n_answered + batch]
            names = ", ".join(str(items[i][exam.id_field]) for i in failed)
            raise ExamError(f"among items {names}: {error}") from None


def check_made_by(out: Path, made_by: dict[str, str]) -> None:
    """Raise ExamError when the predictions in `out` were begun with another model."""
    record = Path(f"{out}.made_by")
    if not record.is_file():
        raise ExamError(
            f"{out}: holds replies, but {record} is missing, which says by which model; "
            "give another --out, or delete it"
        )

    # Each setting that differs is named.
    before = read_json(record)
    changes = []
    for name, value in made_by.items():
        if before.get(name, value) != value:  # an older record may lack it
            changes.append(f"{name} {before[name]}, now {value}")
    if changes:
        changed = ", ".join(changes)
        raise ExamError(f"{out}: was begun with {changed}; give another --out, or delete it")


def adapters_digest(model: DIFFA) -> str:
    """Identifies trained adapters by the numbers of the semantic one, which every stage trains."""
    numbers = [p.detach().float().cpu().numpy() for p in model.semantic.parameters()]
    return hashlib.sha256(b"".join(array.tobytes() for array in numbers)).hexdigest()[:16]


def take_exam(
    exam: Exam,
    *,
    questions: Path,
    audio: Path,
    out: Path,
    batch: int,
    load_model: Callable[[], DIFFA],
    made_by: dict[str, str],
) -> list[dict]:
    """Answer an exam and write its file of predictions; resumes a stopped run.

    Args:
        questions: the published file. audio: folder of its clips. out: file of predictions.
        load_model: called only when something is left to answer. made_by: settings that identify
            the model, recorded beside `out`.
    Returns:
        the items with their replies, in the exam's order.
    Raises:
        ExamError: files that cannot be used, or an `out` of other items or another model.
    """
    items = load_items(questions, exam)

    # What an earlier run left. A JSON list cannot grow line by line, so its replies stand apart.
    lines = Path(f"{out}.lines") if exam.as_list else out
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (out, lines):
        check_writable(path)
    if exam.as_list and out.exists() and not lines.exists():
        raise ExamError(
            f"{out}: exists, but not {lines}, from which it could resume; "
            "give another --out, or delete it"
        )
    done = resume_predictions(lines, exam, items)

    # A complete exam needs neither clips nor a model.
    if done:
        check_made_by(out, made_by)
    if len(done) < len(items):
        clips = read_clips(items, exam, audio)
        model = load_model()

        # Adapters may have been trained again since, in the same folder.
        made_by = made_by | {"adapters_digest": adapters_digest(model)}
        if done:
            check_made_by(out, made_by)

        # Whisper hears no more than its window.
        window = model.encoder.config.n_samples
        n_cut = sum(len(clip.waveform) > window for clip in clips)
        if n_cut:
            print(
                f"{n_cut} of {len(items)} clips are longer than the encoder's window: "
                f"only the first {window / SAMPLE_RATE:g} s are heard",
                file=sys.stderr,
            )

        write_json(Path(f"{out}.made_by"), made_by)
        answer_items(model, exam, items, clips, done, lines, batch)

    rows = [done[item[exam.id_field]] for item in items]
    write_predictions(out, exam, rows)
    return rows


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.exams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")

    for name in EXAMS:
        command = commands.add_parser(name, help="take the exam and score it")
        command.add_argument("questions", type=Path, help="the published file of items")
        command.add_argument("--audio", type=Path, required=True, help="folder of the clips")
        command.add_argument("--out", type=Path, required=True, help="file of predictions")
        command.add_argument("--batch", type=count, default=8, help="items at once (default 8)")
        add_model_arguments(command, "runs/toy/stage2")
    commands.choices["voicebench"].add_argument("--subset", required=True, help=", ".join(SUBSETS))

    command = commands.add_parser("score", help="score a file of predictions")
    command.add_argument("exam", choices=EXAMS)
    command.add_argument("file", type=Path, help="by this command, or another in the same format")
    command.add_argument("--subset", help="of voicebench")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    subset = getattr(args, "subset", None)
    with one_line_errors("python -m evaluation.exams"):
        # Predictions are read, or made first.
        if args.command == "score":
            exam = find_exam(args.exam, subset)
            file = args.file
            rows = load_items(file, exam, answered=True)
        else:
            exam = find_exam(args.command, subset)
            file = args.out

            # The model is loaded only when an item is left to answer.
            weights = (args.whisper, args.llm, args.adapters)
            settings = ("whisper", "llm", "adapters", "dtype", "audio_context", "random_weights")
            rows = take_exam(
                exam,
                questions=args.questions,
                audio=args.audio,
                out=args.out,
                batch=args.batch,
                load_model=lambda: load_diffa(*weights, **model_options(args)).eval(),
                made_by={name: str(getattr(args, name)) for name in settings},
            )
        print("\n".join(score_lines(exam, rows, file)))


if __name__ == "__main__":
    main()
