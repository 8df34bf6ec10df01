"""The command that makes toy/weights: what `make ask` answers with, before anything is trained.

    python -m toy.bundle --run runs/toy --out toy/weights

It takes a run that `make demo` finished. OUT holds its encoder, LM and adapters in float16, three
test clips that stage 2 answers correctly, and report.json: the figures of these rounded weights,
where they come from, and a digest of each file. Figures that differ by more than 0.3 points from
those of the run are an error, and then no report is written.
"""

import argparse
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import soundfile
import torch

from checkpoints.command_line import one_line_errors
from checkpoints.digests import file_digest
from checkpoints.files import read_json, whole_file, write_json
from checkpoints.lm import save_lm
from checkpoints.model import load_diffa, save_trained
from checkpoints.whisper import save_whisper
from data import build_prompt, load_manifest, read_audio
from encoder import SAMPLE_RATE
from evaluation.clips import hear_clips
from sampler import answer
from toy.compare import differences
from toy.evaluate import evaluate
from toy.pretrain_lm import ANSWER_LENGTH, THRESHOLD

NAME = "python -m toy.bundle"
STAGES = ("stage1", "stage2")
N_CLIPS = 3
POINTS = 0.3  # by which a figure may change when weights are rounded


def save_weights(run: Path, out: Path) -> None:
    """Write a run's encoder, LM and adapters of both stages to `out` in float16.

    The adapters record `out` as the place of their encoder and LM. Raises WeightsError: a part of
    the run is missing or damaged.
    """
    for stage in STAGES:
        model = load_diffa(run / "whisper", run / "llada", run / stage).half()
        length = model.answer_length or ANSWER_LENGTH
        save_trained(model, out / stage, out / "whisper", out / "llada", answer_length=length)
    save_whisper(model.encoder, out / "whisper")
    save_lm(model.lm, out / "llada")
    shutil.copy(run / "llada/tokenizer.model", out / "llada")


def save_clips(corpus: Path, out: Path) -> list[dict]:
    """Write the first test clips whose questions stage 2 in `out` answers correctly, as FLAC.

    Returns:
        for each clip its "file" in `out`, its "transcription", and "answers" by question.
    Raises:
        ValueError: there are fewer than N_CLIPS such clips.
    """
    model = load_diffa(out / "whisper", out / "llada", out / "stage2").eval()
    questions = defaultdict(list)
    for item in load_manifest(corpus / "instruct_test.json"):
        questions[item["audio_filepath"]].append(item)

    clips = []
    for path, items in questions.items():
        # All of its questions at once.
        waveform = read_audio(path)
        prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]
        heard = hear_clips(model, [waveform] * len(items), [path] * len(items))
        answers = answer(
            model.lm, model.tokenizer, prompts, lambda rows, h=heard: h, THRESHOLD, batch=len(items)
        )
        if any(a.text != item["target"] for a, item in zip(answers, items, strict=True)):
            continue

        # Losslessly, in the 16 bits that it was spoken in.
        file = f"clips/{len(clips)}.flac"
        with whole_file(out / file) as temporary:
            soundfile.write(temporary, waveform.numpy(), SAMPLE_RATE, "PCM_16", format="FLAC")
        known = {"file": file, "transcription": items[0]["transcription"]}
        clips.append(known | {"answers": {item["input"]: item["target"] for item in items}})
        if len(clips) == N_CLIPS:
            return clips
    raise ValueError(f"{corpus}: only {len(clips)} test clips are answered without an error")


def measured(run: Path, out: Path) -> dict:
    """The report of toy.evaluate on the weights in `out`, and test clips of the run.

    What toy.pretrain measured of encoder and LM is the run's. Raises ValueError: a figure differs
    by more than POINTS from the run's.
    """
    of_run = read_json(run / "report.json")
    with tempfile.TemporaryDirectory() as folder:
        adapters = [out / stage for stage in STAGES]
        whisper = out / "whisper"
        report = evaluate(Path(folder), whisper, out / "llada", run / "corpus", adapters)
    report |= {name: of_run[name] for name in ("encoder", "lm") if name in of_run}
    report["parts"]["corpus"] = str(run / "corpus")
    del report["minutes"]

    changed = [row for row in differences(of_run, report) if abs(row[2] - row[1]) > POINTS]
    if changed:
        lines = [f"{name}: {before:.2f} became {after:.2f}" for name, before, after in changed]
        raise ValueError(f"{out}: rounding changes figures of {run}\n  " + "\n  ".join(lines))
    return report


def bundle(run: Path, out: Path, commit: str) -> dict:
    """Make `out` from a run; commit: of the code that trained it. Returns the report."""
    save_weights(run, out)
    clips = save_clips(run / "corpus", out)
    report = measured(run, out)
    seed = read_json(run / "corpus/corpus.json")["seed"]

    # Digests of everything but the report itself.
    files = sorted(path for path in out.rglob("*.*") if path.is_file() and path.parent != out)
    made = {"seed": seed, "commit": commit, "torch": torch.__version__, "clips": clips}
    made["files"] = {str(path.relative_to(out)): file_digest(path) for path in files}
    write_json(out / "report.json", made | report)
    return made | report


def main() -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Make the bundled weights of a run.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    parser.add_argument("--out", type=Path, default=Path("toy/weights"))
    trained = "of the code that trained the run (default: the present one)"
    parser.add_argument("--commit", help=trained)
    args = parser.parse_args()

    with one_line_errors(NAME):
        head = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = args.commit or subprocess.check_output(head, text=True).strip()
        report = bundle(args.run, args.out, commit)
        print(f"{args.out}: {len(report['files'])} files of seed {report['seed']}")


if __name__ == "__main__":
    main()
