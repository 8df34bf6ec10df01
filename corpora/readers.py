"""Public corpora as they lie on disk once unpacked: one function a corpus.

Each takes the corpus's folder, ROOT, and yields a `Clip` for every recording that it finds there.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torchaudio

GENDERS = {"M": "male", "F": "female"}


@dataclass(frozen=True)
class Clip:
    """A recording and what the corpus says of it; words and values of attributes are "" if unknown.

    speaker: who must not be in both training and test. attributes: such as {"Gender": "female"}.
    """

    id: str
    path: Path
    speaker: str
    words: str
    attributes: dict[str, str]


class CorpusError(ValueError):
    """A folder that is not laid out as the corpus is; the message says what was looked for."""


def need(path: Path) -> Path:
    """The path, if it exists. Raises CorpusError."""
    if not path.exists():
        raise CorpusError(
            f"{path} is not there: ROOT should be the folder that the corpus unpacks to, "
            "as --help shows it"
        )
    return path


def read_text(path: Path) -> str:
    """A file's text, whatever the locale: UTF-8, UTF-16 with its mark, or Windows-1252.

    Older corpora hold single bytes of Windows-1252. Raises CorpusError: no such file.
    """
    if not need(path).is_file():
        raise CorpusError(f"{path} is not a file")
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank, without spaces around them.

    Not splitlines, which also breaks at characters that belong to a text.
    """
    lines = read_text(path).replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def text_of(row: dict, field: str) -> str:
    """A field of a row of metadata, "" where it is absent or not text."""
    value = row.get(field)
    return value.strip() if isinstance(value, str) else ""


def librispeech(root: Path, subset: str, download: bool) -> Iterator[Clip]:
    """ROOT/LibriSpeech/{SPEAKERS.TXT, SUBSET/SPEAKER/CHAPTER/{S-C.trans.txt, S-C-0000.flac}}."""
    # torchaudio's class verifies the archive's checksum.
    if download:
        root.mkdir(parents=True, exist_ok=True)
        try:
            torchaudio.datasets.LIBRISPEECH(root, url=subset, download=True)
        except Exception as error:  # of the network, the archive or the subset
            advice = f"remove {root / subset}.tar.gz, if it is there, and try again"
            raise CorpusError(f"--subset {subset} cannot be fetched ({error}); {advice}") from None
    home = need(root / "LibriSpeech")
    if not (home / subset).is_dir():
        found = ", ".join(sorted(path.name for path in home.iterdir() if path.is_dir()))
        raise CorpusError(f"--subset {subset} is not in {home}, which holds {found or 'no folder'}")

    # Rows such as "14 | F | dev-clean | 25.03 | NAME"; comments begin with a semicolon.
    genders = {}
    for line in read_lines(home / "SPEAKERS.TXT"):
        if "|" in line and not line.startswith(";"):
            speaker, gender, *_ = line.split("|")
            genders[speaker.strip()] = GENDERS.get(gender.strip(), "")

    # Rows such as "14-208-0000 THE WORDS".
    for transcripts in sorted((home / subset).glob("*/*/*.trans.txt")):
        speaker = transcripts.parts[-3]
        for line in read_lines(transcripts):
            name, *words = line.split()
            audio = transcripts.parent / f"{name}.flac"
            attributes = {"Gender": genders.get(speaker, "")}
            yield Clip(name, audio, speaker, " ".join(words).lower(), attributes)


def vctk(root: Path) -> Iterator[Clip]:
    """ROOT/{speaker-info.txt, txt/p225/ID.txt, wav48_silence_trimmed/p225/ID_mic1.flac}.

    Release 0.80 has wav48/p225/ID.wav instead. An ID is such as p225_001.
    """
    # Rows such as "p225  23  F  English  Southern  England". Release 0.80 writes 225.
    speakers = {}
    for line in read_lines(root / "speaker-info.txt"):
        name, age, gender, accent, *_ = [*line.split(), "", "", "", ""]
        speakers[f"p{name}" if name.isdecimal() else name] = {
            "Gender": GENDERS.get(gender, ""),
            "Age": age,
            "Accent": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", accent),
        }

    # The first microphone of release 0.92, or the one of 0.80. A few texts were never recorded.
    for text in sorted(need(root / "txt").glob("*/*.txt")):
        speaker = text.parent.name
        audio = root / "wav48_silence_trimmed" / speaker / f"{text.stem}_mic1.flac"
        if not audio.is_file():
            audio = root / "wav48" / speaker / f"{text.stem}.wav"
        if audio.is_file():
            words = " ".join(read_text(text).split())
            yield Clip(text.stem, audio, speaker, words, speakers.get(speaker, {}))


def accentdb(root: Path) -> Iterator[Clip]:
    """ROOT/data/ACCENT/SPEAKER/*.wav; it comes without words."""
    for audio in sorted(need(root / "data").glob("*/*/*.wav")):
        accent = audio.parts[-3]
        speaker = f"{accent}-{audio.parts[-2]}"
        attributes = {"Accent": accent.replace("_", " ")}
        yield Clip(f"{speaker}-{audio.stem}", audio, speaker, "", attributes)


# "oth" and "xxx", on which the raters did not agree, are not among them.
IEMOCAP_EMOTIONS = {
    "ang": "angry", "hap": "happy", "sad": "sad", "neu": "neutral", "fru": "frustrated",
    "exc": "excited", "fea": "fearful", "sur": "surprised", "dis": "disgusted",
}  # fmt: skip


def iemocap(root: Path) -> Iterator[Clip]:
    """ROOT/SessionN/{sentences/wav/NAME/ID.wav, dialog/{EmoEvaluation,transcriptions}/NAME.txt}.

    A clip has no emotion where the raters did not agree.
    """
    need(root / "Session1")
    for rated in sorted(root.glob("Session[1-5]/dialog/EmoEvaluation/Ses*.txt")):
        session = rated.parents[2]
        transcripts = read_text(session / "dialog" / "transcriptions" / rated.name)

        # Lines such as "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me."
        spoken = re.findall(r"^(Ses\S+) \[[\d.\s-]+\]: *(.*)$", transcripts, re.MULTILINE)
        words = dict(spoken)

        # Lines such as "[6.2901 - 8.2357] Ses01F_impro01_F000 neu [2.5, 2.5, 2.5]", with tabs. The
        # turn, F000, says which of the session's two speakers it is.
        turn = r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t"
        for name, emotion in re.findall(turn, read_text(rated), re.MULTILINE):
            gender = name.split("_")[-1][:1]
            yield Clip(
                id=name,
                path=session / "sentences" / "wav" / rated.stem / f"{name}.wav",
                speaker=f"{session.name}{gender}",
                words=words.get(name, "").strip(),
                attributes={
                    "Gender": GENDERS.get(gender, ""),
                    "Emotion": IEMOCAP_EMOTIONS.get(emotion, ""),
                },
            )


def dailytalk(root: Path) -> Iterator[Clip]:
    """ROOT/{metadata.json, data/DIALOG/TURN_SPEAKER_dDIALOG.wav}.

    All dialogues have the same two speakers, so it is dialogues that are held out.
    """
    metadata = root / "metadata.json"
    try:
        dialogs = json.loads(read_text(metadata))
        turns = [
            (dialog, number, turn)
            for dialog in sorted(dialogs, key=int)
            for number, turn in sorted(dialogs[dialog].items(), key=lambda pair: int(pair[0]))
        ]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorpusError(
            f"{metadata} does not hold numbered turns by number of dialog ({error})"
        ) from None

    # A turn without a field has no recording, or a fact less.
    for dialog, number, turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        name = f"{number}_{turn.get('speaker')}_d{dialog}"
        audio = root / "data" / dialog / f"{name}.wav"
        emotion = text_of(turn, "emotion").replace("no emotion", "neutral")
        attributes = {"Emotion": emotion, "Intent": text_of(turn, "act")}
        yield Clip(name, audio, f"dialog {dialog}", text_of(turn, "text"), attributes)


def voxceleb1(root: Path) -> Iterator[Clip]:
    """ROOT/{vox1_meta.csv, [dev/ or test/]wav/idNNNNN/VIDEO/00001.wav}; it comes without words."""
    # Tab-separated, with a header.
    header, *lines = [line.split("\t") for line in read_lines(root / "vox1_meta.csv")] or [[]]
    if not {"VoxCeleb1 ID", "Gender", "Nationality"} <= set(header):
        raise CorpusError(f"{root / 'vox1_meta.csv'} lacks VoxCeleb1 ID, Gender or Nationality")
    speakers = {}
    for line in lines:
        row = dict(zip(header, line))
        speakers[row["VoxCeleb1 ID"]] = {
            "Gender": GENDERS.get(text_of(row, "Gender").upper(), ""),
            "Nationality": text_of(row, "Nationality"),
        }

    for audio in sorted(root.glob("**/wav/id*/*/*.wav")):
        speaker, video = audio.parts[-3:-1]
        name = f"{speaker}-{video}-{audio.stem}"
        yield Clip(name, audio, speaker, "", speakers.get(speaker, {}))


READERS = (librispeech, vctk, accentdb, iemocap, dailytalk, voxceleb1)
