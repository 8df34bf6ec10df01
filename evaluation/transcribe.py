"""Transcripts of manifests and their word error rate (WER), by any model of stage 1 or 2.

    python -m evaluation.transcribe M.json [M.json ...] --out runs/wer/test.jsonl
    python -m evaluation.transcribe M.json --out O.jsonl --adapters DIR --question "Repeat it."

--whisper, --llm and --adapters as in sampler.py. Each clip of the manifests is transcribed once.
OUT holds a line a clip: `id` (its path), `audio_id`, `speaker`, `duration`, `reference`, `text`,
`calls` and `tokens` of the answer, `ended` (false: it filled its length) and `cut` (true: only the
first seconds were heard). For a clip that cannot be read, `text` is null and `problem` says why.
Lines are written as they come: the same command resumes a stopped run and ends with the same file.
Run again when all is done, it prints the figures without a model.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints.command_line import (
    add_model_arguments,
    count,
    model_options,
    one_line_errors,
    question_text,
    settings_of,
)
from checkpoints.model import load_diffa
from checkpoints.progress import add_quiet
from data import TRANSCRIBE, AudioError, ManifestError, build_prompt, is_too_long, load_manifest
from diffa import AUDIO_PARTS, DIFFA
from encoder import SAMPLE_RATE
from evaluation.answer_files import answer_missing
from evaluation.ask import DELIBERATE, sampler_config
from evaluation.clips import USUAL_LENGTH, answers_or_errors
from evaluation.wer_report import report_lines
from sampler import Answer
from speed.checks import CHOICES
from training.states import Read, read_padded

# Reads some clips, by their indices, for a window of so many samples.
ReadClips = Callable[[list[int], int], Read]


@dataclass(kw_only=True)
class Speed:
    """What answering took in this run, without loading the model."""

    clips: int = 0
    audio: float = 0.0  # seconds that were heard
    seconds: float = 0.0

    def line(self) -> str:
        """The real-time factor: seconds of work for a second of audio."""
        if not self.clips:
            return "real-time factor: not measured, for all clips were answered before"
        factor = self.seconds / self.audio
        took = f"{self.seconds:.1f} s for {self.audio:.1f} s of audio in {self.clips} clips"
        return f"real-time factor {factor:.3g} ({took}; loading the model not counted)"


def clips_of(manifests: list[Path]) -> list[dict]:
    """A row for each clip of some manifests: what is known of it, in the manifests' order.

    A clip of several items is one row. Raises ManifestError: a manifest cannot be used, or gives a
    clip two transcripts.
    """
    # A path names a clip, because an `audio_id` may be in several manifests.
    clips = {}
    for manifest in manifests:
        for item in load_manifest(manifest):
            path = item["audio_filepath"]
            speaker = item.get("speaker")
            row = {
                "id": path,
                "audio_id": item["audio_id"],
                "speaker": speaker if isinstance(speaker, str) else "",
                "duration": item["duration"],
                "reference": item["transcription"],
            }
            known = clips.setdefault(path, row)["reference"]
            if known != row["reference"]:
                both = f"{known[:60]!r} and {row['reference'][:60]!r}"
                raise ManifestError(f"{manifest}: {path} has two transcripts, {both}; keep one")
    return list(clips.values())


def transcript(reply: Answer | str, length: int) -> dict:
    """{"text", "calls", "tokens", "ended"} of an answer of `length` tokens, or what went wrong.

    reply: a text is the error of a clip that cannot be read. `tokens` counts those before the end.
    """
    if isinstance(reply, str):
        return {"text": None, "problem": reply}
    counts = {"calls": reply.calls, "tokens": reply.n_tokens}
    return {"text": reply.text} | counts | {"ended": reply.n_tokens < length}


def answer_all(
    args: argparse.Namespace, clips: list[dict], read: ReadClips, about: str
) -> tuple[list[dict], Speed]:
    """Answer the question of the command about each clip; write `args.out`.

    Args:
        clips: rows with `id` and `duration`. about: identifies them; no other clips resume.
    Returns:
        the rows as they are written, and how fast those of this run were answered.
    Raises:
        ValueError: settings or files that cannot be used.
    """
    # Impossible options are refused before weights are read.
    sampler_config(args, args.length or max(args.steps or 0, USUAL_LENGTH))
    settings = "stage question length block_length rule steps threshold deliberate".split()
    made_by = settings_of(args) | {name: str(getattr(args, name)) for name in settings}
    speed = Speed()

    def load_model() -> DIFFA:
        paths = (args.whisper, args.llm, args.adapters)
        return load_diffa(*paths, stage=args.stage, **model_options(args)).eval()

    def answer_rows(model: DIFFA, indices: list[int]) -> Iterator[dict]:
        config = sampler_config(args, args.length or model.answer_length or USUAL_LENGTH)
        window = model.encoder.config.n_samples
        started = time.perf_counter()

        def read_rows(rows: slice, n_samples: int) -> Read:
            return read(indices[rows], n_samples)

        prompts = [build_prompt(model.tokenizer, args.question)] * len(indices)
        replies = answers_or_errors(model, prompts, read_rows, config, args.batch)
        for i, reply in zip(indices, replies, strict=True):
            seconds = clips[i]["duration"]
            speed.clips += 1
            speed.audio += min(seconds, window / SAMPLE_RATE)
            speed.seconds = time.perf_counter() - started
            cut = is_too_long(seconds * SAMPLE_RATE, window)
            yield clips[i] | transcript(reply, config.length) | {"cut": cut}

    # Clips of a batch are about equally long, and so are their transcripts.
    order = sorted(range(len(clips)), key=lambda i: (clips[i]["duration"], i))
    rows = answer_missing(
        args.out,
        [clip["id"] for clip in clips],
        order,
        args.batch,
        made_by=made_by | {"clips": about},
        load_model=load_model,
        answer_rows=answer_rows,
    )

    for clip, row in zip(clips, rows):
        row |= clip
    check_rows(args.out, rows)
    return rows, speed


def check_rows(out: Path, rows: list[dict]) -> None:
    """Check the rows of OUT: what a stopped run left may have been edited since.

    Raises:
        ValueError: a row without a text. AudioError: no clip at all could be read.
    """
    for row in rows:
        if not isinstance(row.get("text", False), str | None):
            raise ValueError(f"{out}: {row['id']}: `text` must be text or null; delete it")
    if all(row["text"] is None for row in rows):
        why = rows[0].get("problem")
        raise AudioError(f"none of {len(rows)} clips could be read, the first for: {why}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that asks one question about many clips."""
    option = parser.add_argument
    option("--out", type=Path, required=True, help="JSONL of the answers")
    option("--question", type=question_text, default=TRANSCRIBE, help="(default: %(default)s)")
    option("--batch", type=count, default=16, help="clips at once (default: %(default)s)")
    add_model_arguments(parser, "runs/toy/stage1")
    option("--stage", choices=AUDIO_PARTS, help="parts in the prompt (default: the adapters' own)")

    # How the answers are filled in.
    trained = "as the adapters were trained with"
    option("--length", type=count, help=f"tokens of an answer (default: {trained})")
    option("--block-length", type=count, help="tokens of a block (default: one block)")
    option("--rule", default="threshold", choices=CHOICES["rule"], help="(default: %(default)s)")
    option("--steps", type=count, help="of the count rule (default: one a token)")
    option("--threshold", type=float, help="of the threshold rule (default: 0.9)")
    option("--deliberate", type=float, help=DELIBERATE)
    add_quiet(parser)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifests", type=Path, nargs="+", metavar="MANIFEST")
    add_arguments(parser)
    args = parser.parse_args()

    with one_line_errors("python -m evaluation.transcribe"):
        clips = clips_of(args.manifests)

        # Manifests that changed since are others.
        digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in args.manifests]

        def read(indices: list[int], n_samples: int) -> Read:
            return read_padded([clips[i]["id"] for i in indices], n_samples, cut=True)

        rows, speed = answer_all(args, clips, read, about=" ".join(digests))
        print("\n".join([*report_lines(rows), speed.line()]))


if __name__ == "__main__":
    main()
