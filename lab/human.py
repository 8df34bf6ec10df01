"""The method on human speech: recorded prompts, synthetic speech of their words, an LM, a report.

A few minutes of one person's speech are too little for an adapter to learn all words and their
order. So eSpeak NG speaks sentences of the same words (lab/human_text.py), and each recorded prompt
occurs among them several times. The vocabulary is closed and includes the words of the test
prompts, some of which no human says in training. The test sentences are held out: no training
sentence equals one.

FOLDER holds two manifests (data.py) of English clips, train.json and test.json. `make human` runs

    python -m lab.human corpus FOLDER --out runs/human/corpus --seconds 4
    python -m lab.human lm --run runs/human
    python train_asr.py --whisper WHISPER --llm runs/human/llada --audio-context 4 \\
        --train runs/human/corpus/asr_train.json --out runs/human/stage1
    python -m lab.human report --run runs/human --whisper WHISPER
"""

import argparse
import functools
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoints.command_line import add_force_parts, one_line_errors
from checkpoints.files import read_json, write_json
from corpora.manifests import transcription_item, write_manifest
from corpora.measure import seed_transcript
from corpora.workers import map_in_processes
from data import TRANSCRIBE, ManifestError, load_manifest
from diffa import DIFFA
from evaluation.wer import word_error_rate
from lab.human_text import Text, draw_sentence, plain_words, train_lm
from toy import speech
from toy.evaluate import answers_to
from toy.pretrain_lm import ANSWER_LENGTH, THRESHOLD
from training.states import StateCache

HUMAN_RATES = (140, 230)  # words a minute
HUMAN_PITCHES = (20, 80)  # of eSpeak's 0 to 99


# ---- the corpus
def spoken_clip(index: int, text: Text, seconds: float, seed: int, out: Path, data: Path) -> dict:
    """Draw a sentence that lasts at most so many seconds, and write its clip; returns the item.

    Raises ManifestError: no sentence is short enough.
    """
    rng = random.Random(f"{seed}/{index}")  # so that no clip depends on their number
    for _ in range(200):
        gender = rng.choice(("female", "male"))
        sentence = draw_sentence(text, rng)
        voice = rng.choice(speech.VOICES["train", gender])
        rate = rng.randint(*HUMAN_RATES)
        pitch = rng.randint(*HUMAN_PITCHES)
        samples, _ = speech.speak(sentence, f"en-us+{voice}", rate, pitch, data)
        samples = speech.without_silence(samples)
        if len(samples) <= (seconds - 0.01) * speech.ESPEAK_RATE:
            break
    else:
        raise ManifestError(
            f"eSpeak cannot say any of 200 sentences in {seconds:g} s; choose longer --seconds"
        )

    path = f"audio/{index:06d}.wav"
    lasts = speech.write_clip(out / path, samples, rng)
    return transcription_item(
        audio_id=f"spoken-{index:06d}",
        path=path,
        words=sentence,
        dataset="espeak",
        seconds=lasts,
        seed=seed_transcript(sentence, {"Gender": gender}, lasts),
    )


def recorded(manifest: Path, seconds: float) -> tuple[list[dict], list[str]]:
    """A manifest's prompts in plain words that fit window and answer; the words of the others.

    Raises ManifestError: no prompt fits.
    """
    kept = []
    left_out = []
    for item in load_manifest(manifest):
        words = plain_words(item["transcription"])
        if item["duration"] > seconds or not 0 < len(words.split()) < ANSWER_LENGTH:
            left_out.append(words)
            continue
        seed = seed_transcript(words, {}, item["duration"])
        changed = {"transcription": words, "target": words, "seed_transcript": seed}
        kept.append(item | changed | {"input": TRANSCRIBE, "dataset": "human"})

    if not kept:
        raise ManifestError(
            f"{manifest}: none of its {len(left_out)} clips has 1 to {ANSWER_LENGTH - 1} words in "
            f"{seconds:g} s or less; choose longer --seconds"
        )
    return kept, left_out


def make_corpus(
    folder: Path, out: Path, *, seconds: float, seed: int, spoken: int, repeat: int
) -> None:
    """Write OUT/{asr_train,asr_test,text}.json and the clips that eSpeak speaks.

    Args:
        folder: holds train.json and test.json. seconds: of the encoder's window.
        spoken: synthetic clips. repeat: copies of each recorded prompt in asr_train.json.
    Raises:
        ManifestError: manifests that cannot be used. FileExistsError: `out` holds another corpus.
    """
    settings = {
        "folder": str(folder.resolve()),
        "seconds": seconds,
        "seed": seed,
        "spoken": spoken,
        "repeat": repeat,
    }
    record = out / "corpus.json"  # written last: it says that all the rest is complete
    if record.exists():
        if not settings.items() <= read_json(record).items():
            raise FileExistsError(
                f"{out} holds another corpus, {read_json(record)}. Choose another --out."
            )
        print(f"{out} holds this corpus already.")
        return

    # 1. The recorded prompts. Training prompts that equal a test sentence are left out.
    fit, train_long = recorded(folder / "train.json", seconds)
    test, test_long = recorded(folder / "test.json", seconds)
    held_out = sorted({item["transcription"] for item in test})
    train = [item for item in fit if item["transcription"] not in held_out]
    if not train:
        raise ManifestError(f"{folder / 'train.json'}: each of its sentences is a test sentence")

    # 2. Synthetic speech of the same words.
    words = {word for item in fit + test for word in item["transcription"].split()}
    text = Text(sorted(words), sorted({item["transcription"] for item in train}), held_out)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        speech.prepare_espeak(data)
        options = {"text": text, "seconds": seconds, "seed": seed, "out": out, "data": data}
        clip = functools.partial(spoken_clip, **options)
        clips = map_in_processes(clip, range(spoken), "speaking")

    # 3. Manifests, text, and the record.
    write_manifest(out / "asr_train.json", clips + train * repeat)
    write_manifest(out / "asr_test.json", test)
    write_json(out / "text.json", asdict(text))
    left_out = {"too long": len(train_long), "a test sentence": len(fit) - len(train)}
    counts = {"train": len(train), "test": len(test), "vocabulary": len(words)}
    counts |= {"train_left_out": left_out, "test_too_long": test_long}
    write_json(record, settings | counts)


# ---- the report
def transcribe_prompts(run: Path, whisper: Path, **options) -> dict:
    """WER in percent of RUN/stage1 on the recorded test prompts, and every answer.

    options: of load_diffa.
    """
    model = DIFFA.from_pretrained(whisper, run / "llada", run / "stage1", **options).eval()
    items = load_manifest(run / "corpus/asr_test.json")
    replies = answers_to(model, StateCache(model, items), items, THRESHOLD)
    targets = [item["transcription"] for item in items]
    texts = [reply.text for reply in replies]

    # Prompts that were too long for the test count as wrong in every word.
    too_long = read_json(run / "corpus/corpus.json")["test_too_long"]
    silent = [""] * len(too_long)
    return {
        "whisper": str(whisper),
        "items": len(items),
        "word_error_rate": word_error_rate(texts, targets),
        "with_too_long": word_error_rate(texts + silent, targets + too_long),
        "answers": [{"target": t, "prediction": p} for t, p in zip(targets, texts)],
    }


# ---- the command
def human_parser() -> argparse.ArgumentParser:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m lab.human", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    corpus = commands.add_parser("corpus", help="make manifests and synthetic speech")
    corpus.add_argument("folder", type=Path, help="holds train.json and test.json")
    corpus.add_argument("--out", type=Path, default=Path("runs/human/corpus"))
    corpus.add_argument("--seconds", type=float, default=4.0, help="the encoder's window")
    corpus.add_argument("--spoken", type=int, default=6000, help="clips that eSpeak speaks")
    corpus.add_argument("--repeat", type=int, default=6, help="copies of each recorded prompt")
    lm = commands.add_parser("lm", help="train the LM")
    report = commands.add_parser("report", help="measure the WER")
    report.add_argument("--whisper", type=Path, required=True, help="of stage 1")
    add_force_parts(report)
    for command in (corpus, lm):
        command.add_argument("--seed", type=int, default=0)
    for command in (lm, report):
        command.add_argument("--run", type=Path, default=Path("runs/human"))
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = vars(human_parser().parse_args(arguments))
    command = options.pop("command")
    started = time.perf_counter()

    with one_line_errors("python -m lab.human"):
        if command == "corpus":
            make_corpus(**options)
            return
        if command == "lm":
            result = train_lm(**options)
        else:
            result = transcribe_prompts(**options)

    result["minutes"] = (time.perf_counter() - started) / 60
    write_json(options["run"] / f"{command}.json", result)
    print({k: v for k, v in result.items() if k not in ("losses", "answers")})


if __name__ == "__main__":
    main()
