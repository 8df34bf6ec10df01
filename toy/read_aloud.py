"""eSpeak NG reads sentences aloud: the speech that a real Whisper and an adapted LM train on.

    python -m toy.read_aloud texts/train.txt texts/test.txt --out spoken --clips 20000

The files hold a sentence a line (corpora/texts.py). Training and test share no voice. Writes
OUT/audio/{train,test}/*.wav and, in the format of every manifest (data.py),

    asr_{train,test}.json        transcribe the clip
    instruct_{train,test}.json   a question about it (training/questions.py); its kind in `kind`

--recorded adds the clips of a manifest to asr_train.json, their transcripts in plain words.
"""

import argparse
import functools
import random
import tempfile
from pathlib import Path

from checkpoints.command_line import count, one_line_errors, seconds, seed
from checkpoints.digests import file_digest
from checkpoints.files import check_writable, read_json, write_json
from corpora.manifests import transcription_item, write_manifest
from corpora.measure import seed_transcript
from corpora.workers import map_in_processes
from data import TRANSCRIBE, ManifestError, load_manifest
from toy import speech
from training.questions import (
    QUESTIONS,
    draw_attributes,
    draw_kind,
    draw_question,
    plain_words,
    spoken_lines,
)

RATES = {"slowly": (130, 165), "fast": (195, 240)}  # words a minute
PITCHES = {"low": (15, 40), "high": (60, 85)}  # of eSpeak's 0 to 99
GENDERS = {"woman": "female", "man": "male"}
TRIES = 50  # sentences, before a window is called too short
STRIDE = 7919  # from a sentence that is too long to the next one


def read_sentence(
    index: int, split: str, lines: list[str], window: float, seed: int, out: Path, data: Path
) -> list[dict]:
    """Speak and write one clip, in a voice that the seed, the split and the index determine.

    window: seconds that the clip may last. data: the folder of speech.prepare_espeak.

    Returns its items: of the asr manifest, then of the instruct manifest. Raises ManifestError: no
    sentence is short enough.
    """
    rng = random.Random(f"{seed}/{split}/{index}")  # so that no clip depends on their number
    attributes = draw_attributes(rng)
    voice = rng.choice(speech.VOICES[split, GENDERS[attributes["gender"]]])
    rate = rng.randint(*RATES[attributes["speed"]])
    pitch = rng.randint(*PITCHES[attributes["pitch"]])

    # A sentence that takes too long is replaced.
    for attempt in range(TRIES):
        words = plain_words(lines[(index + attempt * STRIDE) % len(lines)])
        samples, _ = speech.speak(words, f"en-us+{voice}", rate, pitch, data)
        samples = speech.without_silence(samples)
        if len(samples) <= (window - 0.01) * speech.ESPEAK_RATE:
            break
    else:
        raise ManifestError(f"none of {TRIES} sentences lasts {window:g} s; take more --seconds")

    path = f"audio/{split}/{index:06d}.wav"
    lasts = speech.write_clip(out / path, samples, rng)
    item = transcription_item(
        audio_id=f"spoken-{split}-{index:06d}",
        path=path,
        words=words,
        dataset="espeak",
        seconds=lasts,
        seed=seed_transcript(words, {"Gender": GENDERS[attributes["gender"]]}, lasts),
    )

    # One question of a random kind to train on, one of each kind to test on.
    other = plain_words(rng.choice(lines))
    kinds = [draw_kind(rng)] if split == "train" else list(QUESTIONS)
    asked = []
    for kind in kinds:
        question, answer = draw_question(kind, words, attributes, other, rng)
        asked.append(item | {"input": question, "target": answer, "kind": kind})
    return [item, *asked]


def recorded(manifest: Path) -> list[dict]:
    """The items of a manifest of recordings, with their transcripts as plain words."""
    items = []
    for item in load_manifest(manifest):
        words = plain_words(item["transcription"])
        if words:
            items.append(item | {"transcription": words, "target": words, "input": TRANSCRIBE})
    return items


def make_speech(
    texts: dict[str, Path],
    out: Path,
    *,
    clips: dict[str, int],
    window: float,
    seed: int,
    recordings: Path | None,
    repeat: int,
) -> None:
    """Write the manifests and clips described above, unless they are there already.

    Args:
        texts, clips: of each split. recordings: a manifest, or None. repeat: copies of its items.
    Raises:
        FileExistsError: the folder holds another corpus. ManifestError: see read_sentence.
        ValueError: both splits read the same text.
    """
    if texts["train"].resolve() == texts["test"].resolve():
        raise ValueError(f"{texts['train']}: is the text of both splits; give another to test")
    settings = {"texts": {k: file_digest(v) for k, v in texts.items()}, "clips": clips}
    settings |= {"seed": seed, "seconds": window, "repeat": repeat}
    settings["recordings"] = str(recordings and file_digest(recordings))
    record = out / "corpus.json"  # written last: it says that all the rest is complete
    if record.exists():
        found = read_json(record)
        if found != settings:
            changed = [name for name in settings if found.get(name) != settings[name]]
            raise FileExistsError(
                f"{out} holds another corpus, of other {', '.join(changed)}; take another --out"
            )
        print(f"{out} holds this corpus already.")
        return

    # Before long work: can everything be read and written?
    lines = {split: spoken_lines(path) for split, path in texts.items()}
    more = recorded(recordings) * repeat if recordings else []
    for split in texts:
        (out / "audio" / split).mkdir(parents=True, exist_ok=True)
    check_writable(record)

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        speech.prepare_espeak(data)
        for split in texts:
            random.Random(seed).shuffle(lines[split])
            options = {"lines": lines[split], "window": window, "seed": seed}
            options |= {"split": split, "out": out, "data": data}
            clip = functools.partial(read_sentence, **options)
            made = map_in_processes(clip, range(clips[split]), f"speaking {split}")

            asked = [item for items in made for item in items[1:]]
            spoken = [items[0] for items in made] + (more if split == "train" else [])
            write_manifest(out / f"asr_{split}.json", spoken)
            write_manifest(out / f"instruct_{split}.json", asked)
    write_json(record, settings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="eSpeak NG reads sentences aloud.")
    option = parser.add_argument
    option("train", type=Path, help="file of sentences, one a line")
    option("test", type=Path, help="file of other sentences")
    option("--out", type=Path, required=True, help="folder of the manifests and clips")
    option("--clips", type=count, default=20_000, help="training clips (default 20000)")
    option("--test-clips", type=count, default=400, help="(default 400)")
    option("--seconds", type=seconds, default=8.0, help="longest clip (default 8)")
    option("--seed", type=seed, default=0, help="same seed, same files (default 0)")
    option("--recorded", type=Path, help="manifest of recordings for asr_train.json")
    option("--repeat", type=count, help="copies of each recording (default 1)")
    args = parser.parse_args(arguments)
    if args.repeat and not args.recorded:
        parser.error("--repeat has no effect without --recorded MANIFEST")

    with one_line_errors("python -m toy.read_aloud"):
        make_speech(
            {"train": args.train, "test": args.test},
            args.out,
            clips={"train": args.clips, "test": args.test_clips},
            window=args.seconds,
            seed=args.seed,
            recordings=args.recorded,
            repeat=args.repeat or 1,
        )


if __name__ == "__main__":
    main()
