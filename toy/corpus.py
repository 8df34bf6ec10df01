"""The toy corpus, made from nothing: eSpeak NG (speech.py) speaks a small grammar (grammar.py).

    python -m toy.corpus --out runs/toy/corpus --seed 0 --train 6000 --test 400

It has many voices, accents, speeds and pitches. Training and test share neither a sentence nor a
voice.

Writes OUT/audio/{train,test}/*.wav (16 kHz) and four manifests: asr_{train,test}.json (transcribe
the clip) and instruct_{train,test}.json (answer a question about it).
"""

import argparse
import functools
import json
import random
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from checkpoints.command_line import count, one_line_errors
from checkpoints.files import WeightsError, check_writable, read_json, whole_file
from checkpoints.progress import add_quiet
from corpora.manifests import transcription_item, write_manifest
from corpora.measure import describe_clip
from corpora.workers import map_in_processes
from toy import grammar
from toy.speech import (
    ESPEAK_RATE,
    VOICE_RANGES,
    VOICES,
    espeak_release,
    prepare_espeak,
    speak,
    without_silence,
    write_clip,
)

# The longest clip; the toy encoder's window is 3.2 s.
MAX_SECONDS = 3.15
MAX_CLIPS = 1_000_000  # their names have six digits
SPLITS = ("train", "test")
MANIFESTS = ("asr", "instruct")


def spoken_sentence(
    rng: random.Random, split: str, attributes: grammar.Attributes, data: Path
) -> tuple[grammar.Sentence, dict, np.ndarray, list[int]]:
    """Draw a sentence and a voice with these attributes until the clip is short enough.

    data: the folder of `prepare_espeak`. Returns the sentence, all that was drawn for the voice,
    and what `speak` returned. Raises OSError: no clip is short enough, or eSpeak counts other
    words.
    """
    voices = VOICES[split, attributes.gender]
    length = rng.choice(list(grammar.TEMPLATES))

    # A clip that is too long gets other words and another rate of the same range, in the end
    # another voice. Its number of words and its attributes stay: else the speed would reveal the
    # count.
    for attempt in range(200):
        if attempt % 20 == 0:
            voice = rng.choice(voices)
        sentence = grammar.random_sentence(rng, held_out=split == "test", length=length)
        rate = rng.randint(*grammar.SPEEDS[attributes.speed])
        pitch = rng.randint(*grammar.PITCHES[attributes.pitch])

        name = f"{grammar.ACCENTS[attributes.accent]}+{voice}"
        samples, marks = speak(sentence.text, name, rate, pitch, data)
        if len(marks) != length + 1:
            raise OSError(f"eSpeak NG marked {len(marks) - 1} words in: {sentence.text}")

        samples = without_silence(samples)
        if len(samples) <= MAX_SECONDS * ESPEAK_RATE:
            drawn = {"voice": voice, "rate": rate, "pitch_parameter": pitch}
            return sentence, asdict(attributes) | drawn, samples, marks
    raise OSError(f"no {attributes.gender} voice can say {length} words in {MAX_SECONDS} s")


def toy_clip(index: int, split: str, out: Path, seed: int, data: Path) -> tuple[dict, list[dict]]:
    """Draw, speak and write clip number `index` of a split.

    Returns its item for the asr manifest and its items for the instruct manifest.
    """
    # A generator of its own, so that no clip depends on how many there are.
    rng = random.Random(f"{seed}/{split}/{index}")
    attributes = grammar.random_attributes(rng)
    sentence, drawn, samples, marks = spoken_sentence(rng, split, attributes, data)
    path = f"audio/{split}/{index:06d}.wav"
    seconds = write_clip(out / path, samples, rng)

    # What all items of the clip have in common.
    facts = {
        "Gender": attributes.gender,
        "Accent": attributes.accent,
        "Speaking speed": attributes.speed,
        "Pitch": attributes.pitch,
    }
    item = transcription_item(
        audio_id=f"toy-{split}-{index:06d}",
        path=path,
        words=sentence.text,
        dataset="toy",
        seconds=seconds,
        seed=describe_clip(sentence.text, facts, int(seconds) + 1),
    )

    # For recognition: how the clip was spoken, and when each word begins and ends.
    times = [round(min(mark / ESPEAK_RATE, seconds), 3) for mark in marks]
    spans = list(zip(sentence.text.split(), times, times[1:]))
    asr = item | {"attributes": drawn, "words": spans}

    # For instruction: a few of its questions to train on, all of them to test on.
    pairs = grammar.instructions(sentence, attributes, rng)
    instruct = []
    for kind in grammar.training_kinds(pairs, rng) if split == "train" else pairs:
        question, target = pairs[kind]
        instruct.append(item | {"input": question, "target": target, "kind": kind})
    return asr, instruct


def made_by() -> dict:
    """What the clips depend on beside the arguments: tables of words and voices, and eSpeak."""
    words = (grammar.CATEGORIES, grammar.TEMPLATES, grammar.ACCENTS, grammar.WEIGHTS)
    tables = (VOICES, VOICE_RANGES, *words, grammar.SPEEDS, grammar.PITCHES, grammar.QUESTIONS)
    return {"tables": zlib.crc32(repr(tables).encode()), "espeak": espeak_release()}


def make_toy(out: Path, seed: int, train: int, test: int) -> None:
    """Make the toy corpus in the folder `out`, unless it is there already.

    The same seed gives the same files, bit for bit. train, test: numbers of clips. Raises
    FileExistsError: the folder holds another corpus, which is left alone.
    """
    wanted = {"corpus": "toy", "seed": seed, "train": train, "test": test} | made_by()
    record = out / "corpus.json"
    manifests = [out / f"{name}_{split}.json" for name in MANIFESTS for split in SPLITS]
    if record.exists():
        # Older records hold the arguments alone.
        try:
            found = read_json(record)
        except WeightsError as error:
            raise ValueError(f"{error}; remove it, and the corpus is made again") from None
        if made_by() | found != wanted:
            raise FileExistsError(
                f"{out} holds another corpus, {found} and not {wanted}. Choose another --out, "
                "or remove it."
            )
        if all(path.is_file() for path in manifests):
            print(f"{out} holds this corpus already.")
            return

    # What an unfinished corpus left may be of another seed: no manifest before its clips.
    for path in (record, *manifests):
        path.unlink(missing_ok=True)
    for split in SPLITS:
        (out / "audio" / split).mkdir(parents=True, exist_ok=True)
    check_writable(record)

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        prepare_espeak(data)
        for split in SPLITS:
            clip = functools.partial(toy_clip, split=split, out=out, seed=seed, data=data)
            clips = map_in_processes(clip, range(wanted[split]), f"speaking {split}")
            instruct = [item for _, items in clips for item in items]
            write_manifest(out / f"asr_{split}.json", [item for item, _ in clips])
            write_manifest(out / f"instruct_{split}.json", instruct)

    # Last comes the record, which says that all the rest is complete.
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(wanted) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder of the corpus")
    option("--seed", type=int, default=0, help="same seed, same files (default 0)")
    option("--train", type=count, default=6000, help="training clips (default 6000)")
    option("--test", type=count, default=400, help="test clips (default 400)")
    add_quiet(parser)
    args = parser.parse_args()
    if max(args.train, args.test) > MAX_CLIPS:
        parser.error(f"--train and --test: at most {MAX_CLIPS:,} clips")

    with one_line_errors("python -m toy.corpus"):
        make_toy(args.out, args.seed, args.train, args.test)


if __name__ == "__main__":
    main()
