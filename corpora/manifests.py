"""Makes manifests: of the toy corpus (espeak.py), and of public corpora as they lie on disk once unpacked.

    python -m corpora.manifests toy --out runs/toy/corpus
    python -m corpora.manifests librispeech ROOT --subset train-clean-100 --out runs/manifests [--download]
    python -m corpora.manifests vctk ROOT --out runs/manifests --held-out 5

writes OUT/NAME.json, or with --held-out OUT/NAME_train.json and OUT/NAME_test.json with that share of the speakers in the
test. Each item has a *seed transcript*: one line with all that is known of the clip. Where the corpus does not say how a
voice sounds, it is measured: pitch, volume, speaking speed.

A reader below is a function of the corpus's folder that yields a `Clip` for each recording it finds there.
"""

import argparse
import collections
import csv
import functools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from toy import speech as espeak
from data import AudioError, read_audio, write_manifest
from encoder import SAMPLE_RATE
from toy.grammar import TRANSCRIBE

GENDERS = {"M": "male", "F": "female", "m": "male", "f": "female"}


@dataclass(frozen=True)
class Clip:
    """A recording and what the corpus tells about it, attributes such as {"Gender": "female"}; words "" when not told."""

    id: str
    path: Path
    speaker: str
    words: str
    attributes: dict[str, str]


class CorpusError(ValueError):
    """A folder that is not laid out as the corpus is; the message says what was looked for."""


def need(path: Path, corpus: str) -> Path:
    """The path, if it is there."""
    if not path.exists():
        raise CorpusError(f"{path} is not there: ROOT should be the folder that {corpus} unpacks to (see its function in corpora.py)")
    return path


# ---- the corpora
def librispeech(root: Path, subset: str) -> Iterator[Clip]:
    """ROOT/LibriSpeech/{SPEAKERS.TXT, SUBSET/SPEAKER/CHAPTER/{S-C.trans.txt, S-C-0000.flac}}."""
    home = need(root / "LibriSpeech", "LibriSpeech")
    rows = [line.split("|") for line in need(home / "SPEAKERS.TXT", "LibriSpeech").read_text().splitlines() if not line.startswith(";")]
    genders = {row[0].strip(): GENDERS[row[1].strip()] for row in rows if len(row) > 1}
    for transcripts in sorted(need(home / subset, "LibriSpeech").glob("*/*/*.trans.txt")):
        speaker = transcripts.parts[-3]
        for line in transcripts.read_text().splitlines():
            name, words = line.split(maxsplit=1)
            yield Clip(name, transcripts.parent / f"{name}.flac", speaker, words.lower(), {"Gender": genders[speaker]})


def download_librispeech(root: Path, subset: str) -> None:
    """Fetch a subset into ROOT/LibriSpeech with torchaudio's class, which checks the archive's sum."""
    from torchaudio.datasets import LIBRISPEECH

    root.mkdir(parents=True, exist_ok=True)
    LIBRISPEECH(root, url=subset, download=True)


def vctk(root: Path) -> Iterator[Clip]:
    """ROOT/{speaker-info.txt, txt/p225/p225_001.txt, wav48_silence_trimmed/p225/p225_001_mic1.flac}; or 0.80's wav48/*.wav."""
    speakers = {}
    for line in need(root / "speaker-info.txt", "VCTK").read_text().splitlines()[1:]:
        name, age, gender, accent, *_ = [*line.split(), "", "", ""]
        if name:
            told = {"Gender": GENDERS.get(gender, ""), "Age": age, "Accent": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", accent)}
            speakers[name if name[0].isalpha() else f"p{name}"] = {k: v for k, v in told.items() if v}
    for text in sorted(need(root / "txt", "VCTK").glob("*/*.txt")):
        speaker, name = text.parent.name, text.stem
        files = [root / "wav48_silence_trimmed" / speaker / f"{name}_mic1.flac", root / "wav48" / speaker / f"{name}.wav"]
        audio = next((file for file in files if file.is_file()), None)
        if audio:  # a few texts were never recorded
            yield Clip(name, audio, speaker, " ".join(text.read_text().split()), speakers.get(speaker, {}))


def accentdb(root: Path) -> Iterator[Clip]:
    """ROOT/data/ACCENT/SPEAKER/*.wav; it comes without words."""
    for audio in sorted(need(root / "data", "AccentDB").glob("*/*/*.wav")):
        accent, speaker = audio.parts[-3], audio.parts[-2]
        yield Clip(f"{accent}-{speaker}-{audio.stem}", audio, f"{accent}-{speaker}", "", {"Accent": accent.replace("_", " ")})


IEMOCAP_EMOTIONS = {
    "ang": "angry", "hap": "happy", "sad": "sad", "neu": "neutral", "fru": "frustrated", "exc": "excited", "fea": "fearful",
    "sur": "surprised", "dis": "disgusted",
}  # fmt: skip; "oth" and "xxx", on which the raters did not agree, are not told


def iemocap(root: Path) -> Iterator[Clip]:
    """ROOT/SessionN/{sentences/wav/DIALOG/ID.wav, dialog/EmoEvaluation/DIALOG.txt, dialog/transcriptions/DIALOG.txt}."""
    for session in sorted(need(root / "Session1", "IEMOCAP").parent.glob("Session[1-5]")):
        for rated in sorted((session / "dialog" / "EmoEvaluation").glob("Ses*.txt")):
            spoken = need(session / "dialog" / "transcriptions" / rated.name, "IEMOCAP").read_text(errors="replace")
            words = dict(re.findall(r"^(Ses\S+) \[[\d.\s-]+\]: *(.*)$", spoken, re.MULTILINE))
            for name, emotion in re.findall(r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t", rated.read_text(), re.MULTILINE):
                gender = name.split("_")[-1][0]  # Ses01F_impro01_M003: turn 3 of the man of session 1
                told = {"Gender": GENDERS[gender], "Emotion": IEMOCAP_EMOTIONS.get(emotion, "")}
                audio = session / "sentences" / "wav" / rated.stem / f"{name}.wav"
                yield Clip(name, audio, f"{session.name}{gender}", words.get(name, "").strip(), {k: v for k, v in told.items() if v})


def dailytalk(root: Path) -> Iterator[Clip]:
    """ROOT/{metadata.json, data/DIALOG/TURN_SPEAKER_dDIALOG.wav}; the same two speakers in all dialogues."""
    dialogs = json.loads(need(root / "metadata.json", "DailyTalk").read_text())
    for dialog, turns in sorted(dialogs.items(), key=lambda pair: int(pair[0])):
        for turn, told in sorted(turns.items(), key=lambda pair: int(pair[0])):
            name = f"{turn}_{told['speaker']}_d{dialog}"
            emotion = "neutral" if told["emotion"] == "no emotion" else told["emotion"]
            attributes = {"Emotion": emotion, "Intent": told["act"]}
            # Two voices only: what is held out is dialogues.
            yield Clip(name, root / "data" / dialog / f"{name}.wav", f"dialog {dialog}", told["text"].strip(), attributes)


def voxceleb1(root: Path) -> Iterator[Clip]:
    """ROOT/{vox1_meta.csv, [dev/ or test/]wav/idNNNNN/VIDEO/00001.wav}; it comes without words."""
    with open(need(root / "vox1_meta.csv", "VoxCeleb1"), newline="") as file:
        told = {row["VoxCeleb1 ID"]: {"Gender": GENDERS[row["Gender"]], "Nationality": row["Nationality"]} for row in csv.DictReader(file, delimiter="\t")}
    for audio in sorted(root.glob("**/wav/id*/*/*.wav")):
        speaker, video = audio.parts[-3], audio.parts[-2]
        yield Clip(f"{speaker}-{video}-{audio.stem}", audio, speaker, "", told.get(speaker, {}))


# ---- what can be measured. Bounds between low, normal and high; chosen by us, the paper names none.
PITCH = {"male": (100, 140), "female": (180, 230), "": (130, 210)}  # Hz
VOLUME = (-32, -18)  # dB below full scale, of the frames with sound
SPEED = (2.0, 3.3)  # words a second


def pitch(waveform: Tensor, low: float = 60.0, high: float = 400.0) -> float | None:
    """The median fundamental frequency in Hz of a clip (S,) by autocorrelation; None when nothing is voiced."""
    window, hop = SAMPLE_RATE // 20, SAMPLE_RATE // 50  # 50 ms hold three periods of the lowest voice
    if len(waveform) < window:
        return None
    frames = waveform.unfold(0, window, hop)  # (n, window)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames[frames.pow(2).mean(dim=1) > 0.1 * waveform.pow(2).mean()]
    spectrum = torch.fft.rfft(frames * torch.hann_window(window), 2 * window)
    correlation = torch.fft.irfft(spectrum.abs() ** 2)[:, :window]
    # The window itself fades with the lag; divided out, or high voices would win.
    fading = torch.fft.irfft(torch.fft.rfft(torch.hann_window(window), 2 * window).abs() ** 2)[:window]
    shape = correlation / correlation[:, :1].clamp(min=1e-12) / (fading / fading[0]).clamp(min=1e-3)
    first, last = int(SAMPLE_RATE / high), int(SAMPLE_RATE / low)
    best = shape[:, first:last].max(dim=1, keepdim=True).values
    # The first peak that is nearly the highest: the others are its multiples, octaves too low.
    near = (shape[:, first:last] > 0.9 * best) & (shape[:, first:last] >= shape[:, first - 1 : last - 1]) & (shape[:, first:last] >= shape[:, first + 1 : last + 1])
    lag = first + near.float().argmax(dim=1)
    voiced = (best[:, 0] > 0.5) & near.any(dim=1)
    return SAMPLE_RATE / lag[voiced].float().median().item() if voiced.any() else None


def volume(waveform: Tensor) -> float:
    """Loudness in dB below full scale of the frames that hold sound."""
    power = F.avg_pool1d(waveform.pow(2)[None], min(400, len(waveform)))[0]
    return 10 * power[power > 0.01 * power.max()].mean().clamp(min=1e-12).log10().item()


def in_words(value: float, bounds: tuple[float, float], names: tuple[str, str, str]) -> str:
    """The name of the range that a value falls in."""
    return names[(value > bounds[0]) + (value > bounds[1])]


def measured(waveform: Tensor, words: str, gender: str) -> dict[str, str]:
    """Attributes of a clip (S,) taken from its signal."""
    found, hertz = {"Volume": in_words(volume(waveform), VOLUME, ("low", "normal", "high"))}, pitch(waveform)
    if hertz is not None:
        found["Pitch"] = in_words(hertz, PITCH[gender], ("low", "normal", "high"))
    if words:
        found["Speaking speed"] = in_words(len(words.split()) / (len(waveform) / SAMPLE_RATE), SPEED, ("slow", "normal", "fast"))
    return found


def seed_transcript(words: str, attributes: dict[str, str], seconds: float) -> str:
    """One line with all that is known of a clip: time span, words, attributes."""
    end = -int(-seconds // 1)  # rounded up
    told = ", ".join(f"{name}: {value}" for name, value in {**attributes, "Duration": f"{seconds:.1f} s"}.items())
    return f"[00:00:00 - {end // 3600:02d}:{end // 60 % 60:02d}:{end % 60:02d}] {words} ({told})".replace("]  (", "] (")


# ---- manifests
def item_of(clip: Clip, corpus: str) -> dict | str:
    """A clip's manifest item; when it cannot be read, why."""
    try:
        waveform = read_audio(clip.path)
    except AudioError as error:
        return str(error)
    seconds = len(waveform) / SAMPLE_RATE
    attributes = {**measured(waveform, clip.words, clip.attributes.get("Gender", "")), **clip.attributes}
    return {
        "audio_id": f"{corpus}-{clip.id}", "audio_filepath": str(clip.path.resolve()), "input": TRANSCRIBE,
        "transcription": clip.words, "target": clip.words, "dataset": corpus, "duration": round(seconds, 3),
        "seed_transcript": seed_transcript(clip.words, attributes, seconds), "speaker": clip.speaker, "attributes": attributes,
    }  # fmt: skip


def make_manifests(clips: Iterator[Clip], corpus: str, out: Path, held_out: float = 0.0) -> dict[str, int]:
    """Write the manifests of a corpus's clips; returns how many items each file got, and says which clips were skipped."""
    with espeak.processes() as pool:
        results = list(tqdm(pool.map(functools.partial(item_of, corpus=corpus), clips, chunksize=16), corpus, unit=" clips"))
    skipped = [result for result in results if isinstance(result, str)]
    files = collections.defaultdict(list)
    for item in results:
        if isinstance(item, dict):
            test = zlib.crc32(item["speaker"].encode()) % 1000 < 10 * held_out  # the speaker decides, so no voice is in both
            files[f"{corpus}{('_test' if test else '_train') if held_out else ''}.json"].append(item)
    for line in skipped[:20]:
        print(f"skipped: {line}")
    if not files:
        raise CorpusError(f"{corpus}: no clip found" + (f"; {len(skipped)} cannot be read" if skipped else " where its layout has them"))
    out.mkdir(parents=True, exist_ok=True)
    for name, items in files.items():
        write_manifest(out / name, items)
    counts = {name: len(items) for name, items in files.items()}
    print(f"{corpus}: " + ", ".join(f"{n} items in {out / name}" for name, n in counts.items()) + f"; {len(skipped)} clips skipped")
    return counts


READERS = (librispeech, vctk, accentdb, iemocap, dailytalk, voxceleb1)


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="corpus")
    toy = commands.add_parser("toy", help="a small grammar, spoken by eSpeak NG")
    toy.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    for name, default, text in (("--seed", 0, "same seed, same files"), ("--train", 6000, "training clips"),
                                ("--test", 400, "test clips")):  # fmt: skip
        toy.add_argument(name, type=int, default=default, help=f"{text} (default {default})")
    for reader in READERS:
        command = commands.add_parser(reader.__name__, help=reader.__doc__)
        command.add_argument("root", type=Path, metavar="ROOT", help=reader.__doc__)
        command.add_argument("--out", type=Path, required=True, help="folder of the manifests")
        command.add_argument("--held-out", type=float, default=0.0, help="percent of the speakers to keep for a test")
        if reader is librispeech:
            command.add_argument("--subset", default="train-clean-100", help="dev-clean, test-clean, train-clean-100, ...")
            command.add_argument("--download", action="store_true", help="fetch it first")
    args = parser.parse_args()
    if args.corpus == "toy":
        espeak.make_toy(args.out, args.seed, args.train, args.test)
        return
    reader, name = globals()[args.corpus], args.corpus
    try:
        if reader is librispeech:
            if args.download:
                download_librispeech(args.root, args.subset)
            reader, name = functools.partial(librispeech, subset=args.subset), f"librispeech-{args.subset}"
        make_manifests(reader(args.root), name, args.out, args.held_out)
    except CorpusError as error:
        raise SystemExit(f"corpora.py: {error}") from None


if __name__ == "__main__":
    main()
