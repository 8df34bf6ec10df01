"""The method on human speech: a corpus of recorded prompts and of speech made for their words, an LM that knows these words, a report.

A few minutes of a person's speech teach an adapter neither all its words nor how they follow each other. So eSpeak NG
speaks sentences made of the same words (human_text.py), and the recorded prompts stand among them several times. The vocabulary
is closed: it has the words of the test prompts too, some of which no human says before the test. Their sentences are held out:
no sentence of the training equals one.

FOLDER holds two manifests (data.py), train.json and test.json, of clips in English. `make human` runs

    python -m lab.human corpus FOLDER --out runs/human/corpus --seconds 4
    python -m lab.human lm --run runs/human
    python train_asr.py --whisper WHISPER --llm runs/human/llada --audio-context 4 \\
        --train runs/human/corpus/asr_train.json --out runs/human/stage1
    python -m lab.human report --run runs/human --whisper WHISPER

Shapes: G answer tokens.
"""

import argparse
import functools
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from toy import speech as espeak
from training.clips import StateCache
from checkpoints.files import read_json, write_json
from corpora.manifests import seed_transcript
from data import ManifestError, load_manifest, word_error_rate, write_manifest
from diffa import DIFFA
from toy.evaluate import answer, transcription
from toy.grammar import ANSWER_LENGTH as G
from toy.grammar import TRANSCRIBE
from lab.human_text import Text, draw_sentence, plain_words, train_lm
from sampler import SamplerConfig

RATES, PITCHES = (140, 230), (20, 80)  # words a minute, and eSpeak's 0 to 99: about as people speak


# ---- the corpus
def spoken_clip(index: int, text: Text, seconds: float, out: Path, seed: int, library: str, data: Path) -> dict:
    """Draws a sentence that lasts at most so many seconds, speaks it, writes the clip; returns its manifest item.

    Raises ManifestError: no sentence is short enough.
    """
    rng = random.Random(f"{seed}/{index}")  # its own, so no clip depends on how many there are
    for _ in range(200):
        gender, sentence = rng.choice(("female", "male")), draw_sentence(text, rng)
        voice = rng.choice(espeak.REAL_VOICES["train", gender].split() + espeak.MADE_VOICES["train", gender])
        samples, _ = espeak.speak(sentence, f"en-us+{voice}", rng.randint(*RATES), rng.randint(*PITCHES), library, data)
        samples = espeak.without_silence(samples)
        if len(samples) <= (seconds - 0.01) * espeak.ESPEAK_RATE:
            break
    else:
        raise ManifestError(f"of 200 sentences eSpeak can say none in {seconds:g} s; choose longer --seconds")
    path = f"audio/{index:06d}.wav"
    lasts = espeak.write_clip(out / path, samples, rng)
    return item_of(path, sentence, f"spoken-{index:06d}", "espeak", lasts, {"Gender": gender})


def item_of(path: str, words: str, name: str, dataset: str, seconds: float, attributes: dict) -> dict:
    """A manifest item whose answer is its words."""
    return {
        "audio_id": name, "audio_filepath": path, "input": TRANSCRIBE, "transcription": words, "target": words, "dataset": dataset,
        "duration": seconds, "seed_transcript": seed_transcript(words, attributes, seconds),
    }  # fmt: skip


def recorded(manifest: Path, seconds: float) -> tuple[list[dict], list[str]]:
    """The prompts of a manifest, their words made plain, that fit the window and an answer of G tokens; and the words of the others."""
    items = load_manifest(manifest)
    plain = [item_of(i["audio_filepath"], plain_words(i["transcription"]), i["audio_id"], "human", i["duration"], {}) for i in items]
    kept = [item for item in plain if item["duration"] <= seconds and 0 < len(item["transcription"].split()) < G]
    if not kept:
        what = f"none of its {len(items)} clips has 1 to {G - 1} words in {seconds:g} s or less"
        raise ManifestError(f"{manifest}: {what}; choose longer --seconds")
    return kept, [item["transcription"] for item in plain if item not in kept]


def make_corpus(folder: Path, out: Path, seconds: float, seed: int, spoken: int, repeat: int) -> None:
    """Write OUT/{asr_train,asr_test,text}.json and the clips that eSpeak speaks.

    Args:
        folder: holds train.json and test.json. seconds: of the encoder's window; longer prompts are left out.
        spoken: clips to make. repeat: how many times each recorded training prompt stands in asr_train.json.
    Raises:
        ManifestError: manifests that cannot be used; SystemExit: `out` holds another corpus, which is left alone.
    """
    arguments = {"folder": str(folder.resolve()), "seconds": seconds, "seed": seed, "spoken": spoken, "repeat": repeat}
    record = out / "corpus.json"  # written last, so it says that all the rest is complete
    if record.exists():
        made = json.loads(record.read_text())
        if {name: made.get(name) for name in arguments} != arguments:
            raise SystemExit(f"human.py: {out} holds another corpus, {record.read_text().strip()}. Choose another --out.")
        print(f"{out} holds this corpus already.")
        return
    (train, train_long), (test, test_long) = recorded(folder / "train.json", seconds), recorded(folder / "test.json", seconds)
    held_out = sorted({item["transcription"] for item in test})
    alike = [item for item in train if item["transcription"] in held_out]
    vocabulary = sorted({word for item in train + test for word in item["transcription"].split()})
    train = [item for item in train if item not in alike]
    if not train:
        raise ManifestError(f"{folder / 'train.json'}: each of its sentences is a test sentence")
    text = Text(vocabulary, sorted({item["transcription"] for item in train}), held_out)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    with espeak.processes() as pool, tempfile.TemporaryDirectory() as temporary:
        library, data = espeak.prepare_espeak(Path(temporary))
        clip = functools.partial(spoken_clip, text=text, seconds=seconds, out=out, seed=seed, library=library, data=data)
        made = list(tqdm(pool.map(clip, range(spoken), chunksize=8), "speaking", spoken, unit=" clips"))
    heard = {word for item in train for word in item["transcription"].split()}
    write_manifest(out / "asr_train.json", made + train * repeat)
    write_manifest(out / "asr_test.json", test)
    write_json(out / "text.json", asdict(text))
    counts = {
        "train": len(train), "train_left_out": {"too long": len(train_long), "a test sentence": len(alike)},
        "test": len(test), "test_too_long": test_long,
        "vocabulary": len(vocabulary), "vocabulary_not_in_train": sum(word not in heard for word in vocabulary),
    }  # fmt: skip
    write_json(record, arguments | counts)
    print(json.dumps(counts))


# ---- the report
def report(run: Path, whisper: Path, device: str) -> dict:
    """Word error rates of RUN/stage1 on the recorded prompts, and every answer to a test prompt.

    Of the test, "known_words" are the prompts whose every word a human says in training, "new_words" the others; in
    "with_too_long" those that were left out of the test are wrong in every word. Raises ValueError: a part that is missing,
    or that does not fit the others.
    """
    model = DIFFA.from_pretrained(whisper, run / "llada", run / "stage1", device=device).eval()
    test, train = load_manifest(run / "corpus" / "asr_test.json"), load_manifest(run / "corpus" / "asr_train.json")
    train = list({item["audio_id"]: item for item in train if item["dataset"] == "human"}.values())
    heard, config = StateCache(model, test + train), SamplerConfig(G, G, G, "threshold", 0.9)
    familiar = {word for item in train for word in item["transcription"].split()}
    said, _ = answer(model, heard, test, config)
    pairs = list(zip((item["transcription"] for item in test), said))

    def errors(chosen: list[tuple[str, str]]) -> dict:
        meant, heard_as = [meant for meant, _ in chosen], [words for _, words in chosen]
        return {"word_error_rate": word_error_rate(heard_as, meant) if chosen else None, "items": len(chosen)}

    unheard = [(words, "") for words in read_json(run / "corpus" / "corpus.json")["test_too_long"]]
    recited, _ = answer(model, heard, train, config)
    lm = read_json(run / "lm.json")
    return {
        "parts": {"whisper": str(whisper), "llm": f"{run}/llada", "adapters": f"{run}/stage1", "audio_context": model.audio_context},
        "corpus": read_json(run / "corpus" / "corpus.json"),
        "lm": {k: v for k, v in lm.items() if k != "losses"},
        "sampler": f"threshold {config.threshold}",
        "test": {
            "all": errors(pairs),
            "with_too_long": errors(pairs + unheard),
            "known_words": errors([pair for pair in pairs if set(pair[0].split()) <= familiar]),
            "new_words": errors([pair for pair in pairs if not set(pair[0].split()) <= familiar]),
            "one_word": errors([pair for pair in pairs if len(pair[0].split()) == 1]),
            "several_words": errors([pair for pair in pairs if len(pair[0].split()) > 1]),
        },
        "train": errors(list(zip((item["transcription"] for item in train), recited))),
        "by_sampler": transcription(model, heard, test)["by_sampler"],
        "minutes": {"lm": lm["minutes"], "stage1": read_json(run / "stage1" / "training.json")["minutes"]},
        "answers": [{"said": meant, "heard": words} for meant, words in pairs],
    }


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Stage 1 on human speech.")
    commands = parser.add_subparsers(required=True, dest="command")
    corpus = commands.add_parser("corpus", help="make the manifests and speak the made-up sentences")
    corpus.add_argument("folder", type=Path, help="holds train.json and test.json")
    corpus.add_argument("--out", type=Path, default=Path("runs/human/corpus"))
    corpus.add_argument("--seconds", type=float, default=4.0, help="the encoder's window; longer prompts are left out")
    corpus.add_argument("--spoken", type=int, default=6000, help="clips that eSpeak speaks")
    corpus.add_argument("--repeat", type=int, default=6, help="times that a recorded prompt stands in the training manifest")
    lm, evaluation = commands.add_parser("lm", help="train the LM"), commands.add_parser("report", help="word error rates")
    evaluation.add_argument("--whisper", type=Path, required=True, help="the directory that stage 1 was trained with")
    for command in (lm, evaluation):
        command.add_argument("--run", type=Path, default=Path("runs/human"))
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for command in (corpus, lm):
        command.add_argument("--seed", type=int, default=0)
    args, started = parser.parse_args(), time.perf_counter()
    try:
        if args.command == "corpus":
            make_corpus(args.folder, args.out, args.seconds, args.seed, args.spoken, args.repeat)
            return
        if args.command == "lm":
            result = train_lm(args.run, Text(**read_json(args.run / "corpus" / "text.json")), args.seed, args.device)
            result["minutes"] = (time.perf_counter() - started) / 60
        else:
            result = report(args.run, args.whisper, args.device)
            result["minutes"]["report"] = (time.perf_counter() - started) / 60
    except ValueError as error:
        raise SystemExit(f"human.py: {error}") from None
    write_json(args.run / f"{args.command}.json", result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("losses", "answers")}, indent=1))


if __name__ == "__main__":
    main()
