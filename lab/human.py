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
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from checkpoints.command_line import one_line_errors
from checkpoints.files import read_json, write_json
from corpora.manifests import transcription_item, write_manifest
from corpora.measure import seed_transcript
from corpora.workers import map_in_processes
from data import TRANSCRIBE, ManifestError, load_manifest
from diffa import DIFFA
from encoder import FRAMES_PER_SECOND
from evaluation.wer import word_error_rate
from lab.human_text import Text, draw_sentence, plain_words, train_lm
from toy import speech
from toy.evaluate import answers_to, transcription
from toy.pretrain_lm import ANSWER_LENGTH, THRESHOLD
from training.states import StateCache

RATES = (140, 230)  # words a minute
PITCHES = (20, 80)  # of eSpeak's 0 to 99


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What determines a corpus; recorded in its corpus.json."""

    folder: str  # holds train.json and test.json
    seconds: float  # the encoder's window; longer prompts are left out
    seed: int
    spoken: int  # clips that eSpeak speaks
    repeat: int  # how often each recorded training prompt occurs in asr_train.json


# ---- the corpus
def spoken_clip(index: int, text: Text, settings: CorpusSettings, out: Path, data: Path) -> dict:
    """Draw a sentence, let eSpeak speak it, write the clip; returns its manifest item.

    Raises ManifestError: no sentence is short enough.
    """
    rng = random.Random(f"{settings.seed}/{index}")  # so that no clip depends on their number
    most = (settings.seconds - 0.01) * speech.ESPEAK_RATE

    for _ in range(200):
        gender = rng.choice(("female", "male"))
        sentence = draw_sentence(text, rng)
        voice = rng.choice(speech.VOICES["train", gender])
        rate = rng.randint(*RATES)
        pitch = rng.randint(*PITCHES)
        samples, _ = speech.speak(sentence, f"en-us+{voice}", rate, pitch, data)
        samples = speech.without_silence(samples)
        if len(samples) <= most:
            break
    else:
        raise ManifestError(
            f"eSpeak cannot say any of 200 sentences in {settings.seconds:g} s; "
            "choose longer --seconds"
        )

    path = f"audio/{index:06d}.wav"
    seconds = speech.write_clip(out / path, samples, rng)
    return transcription_item(
        audio_id=f"spoken-{index:06d}",
        path=path,
        words=sentence,
        dataset="espeak",
        seconds=seconds,
        seed=seed_transcript(sentence, {"Gender": gender}, seconds),
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


def make_corpus(out: Path, settings: CorpusSettings) -> None:
    """Write OUT/{asr_train,asr_test,text}.json and the clips that eSpeak speaks.

    Raises:
        ManifestError: manifests that cannot be used. FileExistsError: `out` holds another corpus.
    """
    record = out / "corpus.json"  # written last: it says that all the rest is complete
    if record.exists():
        made = read_json(record)
        if {name: made.get(name) for name in asdict(settings)} != asdict(settings):
            raise FileExistsError(
                f"{out} holds another corpus, {record.read_text().strip()}. Choose another --out."
            )
        print(f"{out} holds this corpus already.")
        return

    # 1. The recorded prompts. Training prompts that equal a test sentence are left out.
    folder = Path(settings.folder)
    train, train_long = recorded(folder / "train.json", settings.seconds)
    test, test_long = recorded(folder / "test.json", settings.seconds)
    words = sorted({word for item in train + test for word in item["transcription"].split()})
    held_out = sorted({item["transcription"] for item in test})
    n_recorded = len(train)
    train = [item for item in train if item["transcription"] not in held_out]
    if not train:
        raise ManifestError(f"{folder / 'train.json'}: each of its sentences is a test sentence")

    # 2. Synthetic speech of the same words.
    text = Text(words, sorted({item["transcription"] for item in train}), held_out)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        speech.prepare_espeak(data)
        clip = functools.partial(spoken_clip, text=text, settings=settings, out=out, data=data)
        spoken = map_in_processes(clip, range(settings.spoken), "speaking")

    # 3. Manifests, text, and the record.
    write_manifest(out / "asr_train.json", spoken + train * settings.repeat)
    write_manifest(out / "asr_test.json", test)
    write_json(out / "text.json", asdict(text))
    familiar = {word for item in train for word in item["transcription"].split()}
    n_equal = n_recorded - len(train)
    counts = {
        "train": len(train),
        "train_left_out": {"too long": len(train_long), "a test sentence": n_equal},
        "test": len(test),
        "test_too_long": test_long,
        "vocabulary": len(words),
        "vocabulary_not_in_train": sum(word not in familiar for word in words),
    }
    write_json(record, asdict(settings) | counts)
    print(json.dumps(counts))


# ---- the report
def wer(pairs: list[tuple[str, str]]) -> dict:
    """WER in percent of pairs of target and prediction, None without any; and how many they are."""
    if not pairs:
        return {"word_error_rate": None, "items": 0}
    targets, predictions = zip(*pairs)
    rate = word_error_rate(list(predictions), list(targets))
    return {"word_error_rate": rate, "items": len(pairs)}


def transcribe(model: DIFFA, states: StateCache, items: list[dict]) -> list[tuple[str, str]]:
    """Target and prediction of each item."""
    replies = answers_to(model, states, items, THRESHOLD)
    return [(item["transcription"], reply.text) for item, reply in zip(items, replies)]


def measure_stage1(run: Path, whisper: Path, device: str) -> dict:
    """WER of RUN/stage1 on the recorded prompts, and every answer to a test prompt.

    Raises ValueError: a part is missing or does not fit the others.
    """
    llm = run / "llada"
    model = DIFFA.from_pretrained(whisper, llm, run / "stage1", device=device).eval()
    record = read_json(run / "corpus/corpus.json")
    test = load_manifest(run / "corpus/asr_test.json")
    train = load_manifest(run / "corpus/asr_train.json")
    train = list({i["audio_id"]: i for i in train if i["dataset"] == "human"}.values())
    states = StateCache(model, test + train)

    # Test prompts, by what they contain. Those that were too long count as wrong in every word.
    pairs = transcribe(model, states, test)
    too_long = [(words, "") for words in record["test_too_long"]]
    familiar = {word for item in train for word in item["transcription"].split()}
    known = [pair for pair in pairs if set(pair[0].split()) <= familiar]
    one_word = [pair for pair in pairs if len(pair[0].split()) == 1]
    table = {
        "all": wer(pairs),
        "with_too_long": wer(pairs + too_long),
        "known_words": wer(known),  # a human says every one of them in training
        "new_words": wer([pair for pair in pairs if pair not in known]),
        "one_word": wer(one_word),
        "several_words": wer([pair for pair in pairs if pair not in one_word]),
    }

    lm = read_json(run / "lm.json")
    minutes = read_json(run / "stage1/training.json")["minutes"]
    window = model.encoder.config.context / FRAMES_PER_SECOND  # seconds
    return {
        "parts": {
            "whisper": str(whisper),
            "llm": str(llm),
            "adapters": f"{run}/stage1",
            "audio_context": window,
        },
        "corpus": record,
        "lm": {name: value for name, value in lm.items() if name != "losses"},
        "sampler": f"threshold {THRESHOLD.threshold}",
        "test": table,
        "train": wer(transcribe(model, states, train)),
        "by_sampler": transcription(model, states, test)["by_sampler"],
        "minutes": {"lm": lm["minutes"], "stage1": minutes},
        "answers": [{"said": target, "heard": prediction} for target, prediction in pairs],
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.human", description="Stage 1 on human speech."
    )
    commands = parser.add_subparsers(required=True, dest="command")

    corpus = commands.add_parser("corpus", help="make manifests and synthetic speech")
    corpus.add_argument("folder", type=Path, help="holds train.json and test.json")
    corpus.add_argument("--out", type=Path, default=Path("runs/human/corpus"))
    corpus.add_argument("--seconds", type=float, default=4.0, help="the encoder's window")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--spoken", type=int, default=6000, help="clips that eSpeak speaks")
    corpus.add_argument("--repeat", type=int, default=6, help="copies of each recorded prompt")

    lm = commands.add_parser("lm", help="train the LM")
    lm.add_argument("--seed", type=int, default=0)
    report = commands.add_parser("report", help="measure the WER")
    report.add_argument("--whisper", type=Path, required=True, help="of stage 1")
    for command in (lm, report):
        command.add_argument("--run", type=Path, default=Path("runs/human"))
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    started = time.perf_counter()

    with one_line_errors("python -m lab.human"):
        if args.command == "corpus":
            given = {name: getattr(args, name) for name in ("seconds", "seed", "spoken", "repeat")}
            make_corpus(args.out, CorpusSettings(folder=str(args.folder.resolve()), **given))
            return
        if args.command == "lm":
            text = Text(**read_json(args.run / "corpus/text.json"))
            result = train_lm(args.run, text, args.seed, args.device)
            result["minutes"] = (time.perf_counter() - started) / 60
        else:
            result = measure_stage1(args.run, args.whisper, args.device)
            result["minutes"]["report"] = (time.perf_counter() - started) / 60

    write_json(args.run / f"{args.command}.json", result)
    shown = {name: value for name, value in result.items() if name not in ("losses", "answers")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
