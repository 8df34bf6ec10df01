"""The paper's exams, from their published files to a score: MMSU, MMAU test-mini and VoiceBench.

    python -m evaluation.exams mmsu MMSU.jsonl --audio DIR --out runs/exams/mmsu.jsonl
    python -m evaluation.exams mmau mmau-test-mini.json --audio DIR --out runs/exams/mmau.json
    python -m evaluation.exams voicebench advbench.jsonl --subset advbench --audio DIR --out ...
    python -m evaluation.exams score mmsu runs/exams/mmsu.jsonl     scores predictions, no model

--whisper, --llm and --adapters as in sampler.py. MMSU is a JSONL, MMAU a JSON list. VoiceBench is
published as a data set that holds the audio: save each clip to a file, and write a JSONL of the
items with the file's path in `audio_path`. Several files, such as the splits of a subset, are taken
as one exam. Paths are relative to --audio; where nothing is found, the file name alone is tried.

OUT holds the exam's items with the model's replies, as the exam's own scorer reads them. Each reply
is written at once: the same command resumes a stopped run and ends with the same file. OUT.made_by
records the model and the prompt, so that nothing else resumes. OUT.lines holds MMAU's replies until
its list is complete.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from checkpoints.command_line import (
    add_model_arguments,
    count,
    is_blank,
    model_options,
    one_line_errors,
    settings_of,
)
from checkpoints.files import check_writable, read_json, read_text, write_json
from checkpoints.model import load_diffa
from diffa import DIFFA
from evaluation.answer_files import adapters_digest, check_made_by, write_answers
from evaluation.exam_answers import Question, Sitting, answer_questions, report_cut
from evaluation.exam_clips import usable_clips
from evaluation.exam_files import (
    file_hash,
    join_items,
    load_items,
    refuse_shared,
    resume_predictions,
    write_predictions,
)
from evaluation.exam_rules import EXAMS, SUBSETS, Exam, ExamError, fill_template, find_exam
from evaluation.exam_scores import score_lines
from evaluation.likelihood import MEASURES


def fill_prompts(exam: Exam, template: str, items: list[dict]) -> list[str]:
    """The prompt of each item. Raises ExamError: the template does not fit an item."""
    prompts = []
    for item in items:
        try:
            prompts.append(fill_template(template, item, exam))
        except ValueError as error:
            raise ExamError(f"item {item[exam.id_field]}: {error}") from None
    return prompts


def prepare_output(out: Path, exam: Exam) -> Path:
    """The JSONL to which replies are appended: a JSON list cannot grow, so its replies stand apart.

    Raises OSError: a file cannot be written. Raises ExamError: a list without its JSONL.
    """
    lines = Path(f"{out}.lines") if exam.as_list else out
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (out, lines):
        check_writable(path)
    if out.exists() and not lines.exists():
        missing = f"{out}: exists, but not {lines}, from which it could resume"
        raise ExamError(f"{missing}; give another --out, or delete it")
    return lines


def take_exam(
    exam: Exam,
    sitting: Sitting,
    *,
    files: list[Path],
    audio: Path,
    out: Path,
    load_model: Callable[[], DIFFA],
    made_by: dict[str, str],
) -> list[dict]:
    """Answer an exam and write its file of predictions; resumes a stopped run.

    Args:
        files: published. audio: folder of the clips. out: file of predictions.
        load_model: called only when something is left to answer. made_by: settings that decide the
            replies, recorded beside `out`.
    Returns:
        the items with their replies, in the exam's order; null where one was skipped.
    Raises:
        ExamError: files that cannot be used. ValueError: an `out` of another model.
    """
    items = join_items(files, exam)
    names = [item[exam.id_field] for item in items]
    prompts = fill_prompts(exam, sitting.template, items)

    # What an earlier run left.
    lines = prepare_output(out, exam)
    done = resume_predictions(lines, exam, items)
    if done:
        check_made_by(out, made_by)

    # A complete exam needs neither clips nor a model.
    questions = []
    if len(done) < len(items):
        clips = usable_clips(items, exam, audio, sitting.skip_missing)
        for name, item, prompt, clip in zip(names, items, prompts, clips):
            if clip:
                questions.append(Question(name=name, item=item, prompt=prompt, clip=clip))

    if any(question.name not in done for question in questions):
        model = load_model()
        report_cut(model, questions)

        # Adapters may have been trained again since, in the same folder.
        made_by = made_by | {"adapters_digest": adapters_digest(model)}
        if done:
            check_made_by(out, made_by)
        hashes = ", ".join(f"{path.name} sha256 {file_hash(path)}" for path in files)
        write_json(Path(f"{out}.made_by"), made_by | {"questions": hashes})

        # Items without a reply may have a clip by now.
        write_answers(lines, done.values())
        answer_questions(model, exam, questions, done, lines, sitting)

    no_reply = dict.fromkeys(exam.reply_fields)
    rows = [done.get(name, item | no_reply) for name, item in zip(names, items)]
    write_predictions(out, exam, rows)
    return rows


def header(file: Path, n_items: int) -> str:
    """What a score was computed from: the predictions, and its questions if known."""
    line = f"{file}: {n_items} items, sha256 {file_hash(file)}"
    record = Path(f"{file}.made_by")
    questions = read_json(record).get("questions") if record.is_file() else None
    return f"{line}; questions: {questions}" if questions else line


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
        option = command.add_argument
        option("questions", type=Path, nargs="+", help="the published files of items")
        option("--audio", type=Path, required=True, help="folder of the clips")
        option("--out", type=Path, required=True, help="file of predictions")
        option("--batch", type=count, default=8, help="items at once (default 8)")
        template = "a template of the prompts, with fields such as {question} and {choices}"
        option("--prompt", type=Path, metavar="FILE", help=template)
        by = "how a choice is made (default: the reply is generated)"
        option("--by", choices=("generation", *MEASURES), default="generation", help=by)
        skip = "go on without the items whose clip is absent, damaged or silent"
        option("--skip-missing", action="store_true", help=skip)
        add_model_arguments(command, "runs/toy/stage2")
    commands.choices["voicebench"].add_argument("--subset", required=True, help=", ".join(SUBSETS))

    command = commands.add_parser("score", help="score files of predictions")
    command.add_argument("exam", choices=EXAMS)
    theirs = "by this command, or another in the same format; several are scored as one exam"
    command.add_argument("files", type=Path, nargs="+", help=theirs)
    command.add_argument("--subset", help="of voicebench")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    subset = getattr(args, "subset", None)
    with one_line_errors("python -m evaluation.exams"):
        # Predictions are read.
        if args.command == "score":
            exam = find_exam(args.exam, subset)
            parts = [load_items(file, exam, answered=True) for file in args.files]
            refuse_shared(args.files, parts, exam)
            rows = []
            files = []
            for file, part in zip(args.files, parts):
                rows += part
                files += [str(file)] * len(part)
                print(header(file, len(part)))
            print("\n".join(score_lines(exam, rows, files if len(args.files) > 1 else None)))
            return

        # Or they are made.
        exam = find_exam(args.command, subset)
        if args.by in MEASURES and not exam.candidates:
            raise ExamError(f"--by {args.by}: this exam has no choices")
        template = exam.template
        if args.prompt:
            template = read_text(args.prompt).removesuffix("\n")  # which editors add
            if is_blank(template) or (exam.choices and "{" not in template):
                needed = "fields such as {question}" if exam.choices else "some text"
                raise ExamError(f"{args.prompt}: asks nothing; the prompt needs {needed}")

        # The model is loaded only when an item is left to answer.
        weights = (args.whisper, args.llm, args.adapters)
        sitting = Sitting(
            template=template, by=args.by, batch=args.batch, skip_missing=args.skip_missing
        )
        rows = take_exam(
            exam,
            sitting,
            files=args.questions,
            audio=args.audio,
            out=args.out,
            load_model=lambda: load_diffa(*weights, **model_options(args)).eval(),
            made_by=settings_of(args) | {"by": args.by, "prompt": template},
        )
        print(header(args.out, len(rows)))
        print("\n".join(score_lines(exam, rows)))


if __name__ == "__main__":
    main()
