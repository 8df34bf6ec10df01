"""Public corpora as they lie on disk once unpacked: one function a corpus.

Each takes the corpus's folder, ROOT (or the folder above it), and yields a `Clip` for every
recording that it finds there, and a `Missing` for what should be there and is not.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torchaudio

from checkpoints.files import refuse_twice
from corpora.layout import (
    Clip,
    CorpusError,
    Missing,
    find_home,
    read_lines,
    read_text,
    text_of,
    visible,
)
from corpora.vocabulary import attributes_of

LIBRISPEECH_SUBSETS = (
    "dev-clean", "dev-other", "test-clean", "test-other",
    "train-clean-100", "train-clean-360", "train-other-500",
)  # fmt: skip
IEMOCAP_CLIPS = 10_039  # rated ones of the whole corpus

Found = Iterator[Clip | Missing]


def librispeech(root: Path, subset: str, download: bool) -> Found:
    """ROOT/LibriSpeech/{SPEAKERS.TXT, SUBSET/SPEAKER/CHAPTER/{S-C.trans.txt, S-C-0000.flac}}."""
    # torchaudio's class verifies the archive's checksum.
    known = f"the subsets of LibriSpeech are {', '.join(LIBRISPEECH_SUBSETS)}"
    if download:
        if subset not in LIBRISPEECH_SUBSETS:
            raise CorpusError(f"--subset {subset} cannot be fetched; {known}")
        root.mkdir(parents=True, exist_ok=True)
        try:
            torchaudio.datasets.LIBRISPEECH(root, url=subset, download=True)
        except Exception as error:  # of the network or the archive
            advice = f"remove {root / subset}.tar.gz, if it is there, and try again"
            raise CorpusError(f"--subset {subset} cannot be fetched ({error}); {advice}") from None
    home = root / "LibriSpeech"
    if not home.exists():
        home = find_home(root, "SPEAKERS.TXT")
    if not (home / subset).is_dir():
        found = ", ".join(sorted(path.name for path in home.iterdir() if path.is_dir()))
        holds = f"--subset {subset} is not in {home}, which holds {found or 'no folder'}"
        raise CorpusError(f"{holds}; {known}")

    # Rows such as "14 | F | dev-clean | 25.03 | NAME"; comments begin with a semicolon.
    genders = {}
    for line in read_lines(home / "SPEAKERS.TXT"):
        if "|" in line and not line.startswith(";"):
            speaker, gender, *_ = line.split("|")
            genders[speaker.strip()] = gender.strip()

    # Rows such as "14-208-0000 THE WORDS".
    for transcripts in visible(home / subset, "*/*/*.trans.txt"):
        speaker = transcripts.parts[-3]
        attributes = attributes_of(Gender=genders.get(speaker, ""))
        for line in read_lines(transcripts):
            name, *words = line.split()
            yield Clip(
                id=name,
                path=transcripts.parent / f"{name}.flac",
                speaker=speaker,
                words=" ".join(words).lower(),
                attributes=attributes,
            )


def vctk(root: Path) -> Found:
    """ROOT/{speaker-info.txt, txt/p225/ID.txt, wav48_silence_trimmed/p225/ID_mic1.flac}.

    Release 0.80 has wav48/p225/ID.wav instead. An ID is such as p225_001. A clip without a text,
    as all of p315, is one without words.
    """
    # Rows such as "p225  23  F  English  Southern  England", maybe with a header before them.
    # Release 0.80 writes 225.
    home = find_home(root, "speaker-info.txt")
    speakers = {}
    for line in read_lines(home / "speaker-info.txt"):
        name, age, gender, accent, *_ = [*line.split(), "", "", "", ""]
        speaker = f"p{name}" if name.isdecimal() else name
        speakers[speaker] = attributes_of(Gender=gender, Age=age, Accent=accent)

    # Of two microphones the first is taken; some clips have the second alone.
    sounds = {}
    for path in visible(home, "wav48_silence_trimmed/*/*.flac") + visible(home, "wav48/*/*.wav"):
        sounds.setdefault((path.parent.name, re.sub(r"_mic\d$", "", path.stem)), path)
    texts = {(path.parent.name, path.stem): path for path in visible(home, "txt/*/*.txt")}

    # Sounds decide what is a clip.
    for speaker, name in sorted(sounds.keys() | texts.keys()):
        key = (speaker, name)
        if key not in sounds:
            yield Missing("a text without sound", name)
            continue
        if key not in texts:
            yield Missing("a sound without text, kept as a clip without words", name)
        yield Clip(
            id=name,
            path=sounds[key],
            speaker=speaker,
            words=" ".join(read_text(texts[key]).split()) if key in texts else "",
            attributes=speakers.get(speaker, {}),
        )


def accentdb(root: Path) -> Found:
    """ROOT/data/ACCENT/SPEAKER/*.wav; it comes without words."""
    for audio in visible(find_home(root, "data") / "data", "*/*/*.wav"):
        accent = audio.parts[-3]
        speaker = f"{accent}-{audio.parts[-2]}"
        yield Clip(
            id=f"{speaker}-{audio.stem}",
            path=audio,
            speaker=speaker,
            words="",
            attributes=attributes_of(Accent=accent),
        )


def iemocap(root: Path) -> Found:
    """ROOT/SessionN/{sentences/wav/NAME/ID.wav, dialog/{EmoEvaluation,transcriptions}/NAME.txt}.

    A clip has no emotion where the raters did not agree. The two speakers of a session talk to each
    other, so it is sessions that are held out.
    """
    home = find_home(root, "Session1")
    n_clips = 0
    for rated in visible(home, "Session[1-5]/dialog/EmoEvaluation/Ses*.txt"):
        session = rated.parents[2]
        transcripts = session / "dialog" / "transcriptions" / rated.name
        words = {}
        if transcripts.is_file():
            # Lines such as "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me. [LAUGHTER]", where
            # tags are no words.
            spoken = r"^(Ses\S+) \[[\d.\s-]+\]: *(.*)$"
            for name, text in re.findall(spoken, read_text(transcripts), re.MULTILINE):
                words[name] = " ".join(re.sub(r"\[[^\]]*\]", " ", text).split())
        else:
            yield Missing("a file of transcripts; its clips are without words", str(transcripts))

        # Lines such as "[6.2901 - 8.2357] Ses01F_impro01_F000 neu [2.5, 2.5, 2.5]", with tabs. The
        # turn, F000, says which of the session's two speakers it is.
        turn = r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t"
        for name, emotion in re.findall(turn, read_text(rated), re.MULTILINE):
            gender = name.split("_")[-1][:1]
            n_clips += 1
            yield Clip(
                id=name,
                path=session / "sentences" / "wav" / rated.stem / f"{name}.wav",
                speaker=f"{session.name}{gender}",
                words=words.get(name, ""),
                attributes=attributes_of(Gender=gender, Emotion=emotion),
                held_out_with=session.name,
            )
    print(f"iemocap: {n_clips:,} rated clips; the whole corpus has {IEMOCAP_CLIPS:,}")


def dailytalk(root: Path) -> Found:
    """ROOT/{metadata.json, data/DIALOG/TURN_SPEAKER_dDIALOG.wav}.

    All dialogues have the same two speakers, so it is dialogues that are held out.
    """
    home = find_home(root, "metadata.json")
    metadata = home / "metadata.json"
    try:
        dialogs = json.loads(read_text(metadata), object_pairs_hook=refuse_twice)
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
        speaker = turn.get("speaker")
        name = f"{number}_{speaker}_d{dialog}"
        emotion = text_of(turn, "emotion")
        yield Clip(
            id=name,
            path=home / "data" / dialog / f"{name}.wav",
            speaker=f"speaker {speaker}",
            words=text_of(turn, "text"),
            attributes=attributes_of(Emotion=emotion, Intent=text_of(turn, "act")),
            held_out_with=f"dialog {dialog}",
        )


def voxceleb1(root: Path) -> Found:
    """ROOT/{vox1_meta.csv, ANY FOLDERS/idNNNNN/VIDEO/00001.wav}; it comes without words.

    Folders may be links. Speakers lie in ROOT or up to three folders below, such as dev/wav.
    """
    # Tabs as published, or commas as in copies of it; with a header.
    home = find_home(root, "vox1_meta.csv")
    lines = read_lines(home / "vox1_meta.csv")
    separator = "\t" if lines and "\t" in lines[0] else ","
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    try:
        header, *rows = list(csv.reader(lines, delimiter=separator, quoting=quoting)) or [[]]
    except csv.Error as error:
        raise CorpusError(f"{home / 'vox1_meta.csv'}: no table ({error})") from None
    header = [cell.strip() for cell in header]
    if not {"VoxCeleb1 ID", "Gender", "Nationality"} <= set(header):
        raise CorpusError(f"{home / 'vox1_meta.csv'} lacks VoxCeleb1 ID, Gender or Nationality")

    # What is known of each speaker.
    speakers = {}
    for row in rows:
        row = dict(zip(header, row))
        speakers[text_of(row, "VoxCeleb1 ID")] = attributes_of(
            Gender=text_of(row, "Gender"), Nationality=text_of(row, "Nationality")
        )

    # A pattern of single folders follows links; "**" would not.
    for depth in range(4):
        for audio in visible(home, "*/" * depth + "id*/*/*.wav"):
            speaker, video = audio.parts[-3:-1]
            if re.fullmatch(r"id\d+", speaker):
                yield Clip(
                    id=f"{speaker}-{video}-{audio.stem}",
                    path=audio,
                    speaker=speaker,
                    words="",
                    attributes=speakers.get(speaker, {}),
                )


READERS = (librispeech, vctk, accentdb, iemocap, dailytalk, voxceleb1)
