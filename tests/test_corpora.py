"""Public corpora: small trees laid out as the real ones become manifests that training reads."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from corpora import manifests, measure
from corpora.readers import READERS
from data import load_manifest
from encoder import SAMPLE_RATE


@pytest.fixture
def voice(tmp_path):
    """Writes a buzz with a voice's overtones: voice("a/b.wav", hertz, seconds, loudness)."""

    def write(name, hertz=120.0, seconds=1.0, loudness=0.1, rate=SAMPLE_RATE):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, buzz(hertz, seconds, loudness, rate), rate)
        return path

    return write


def buzz(hertz, seconds=1.0, loudness=0.1, rate=SAMPLE_RATE):
    t = np.arange(int(seconds * rate)) / rate
    return loudness * sum(np.sin(2 * np.pi * k * hertz * t) / k for k in range(1, 9)).astype(
        np.float32
    )


def text(tmp_path, name, content):
    write(tmp_path / name, content.encode())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def items_of(monkeypatch, tmp_path, *arguments):
    """Run the command on tmp_path; returns the items of each manifest it writes, by file name."""
    out = tmp_path / "manifests"
    corpus, *options = arguments
    monkeypatch.setattr(
        sys, "argv", ["manifests", corpus, str(tmp_path), "--out", str(out), *options]
    )
    manifests.main()
    return {path.stem: load_manifest(path) for path in sorted(out.glob("*.json"))}


def test_librispeech(tmp_path, voice, monkeypatch):
    text(
        tmp_path,
        "LibriSpeech/SPEAKERS.TXT",
        "; comments\n;ID |SEX| SUBSET | MINUTES| NAME\n"
        "14   | F | dev-clean | 25.03 | A\n22 | M | dev-clean | 8 | B\n",
    )
    for speaker, n in (("14", 2), ("22", 1)):
        folder = f"LibriSpeech/dev-clean/{speaker}/208"
        text(
            tmp_path,
            f"{folder}/{speaker}-208.trans.txt",
            "".join(f"{speaker}-208-000{i} IT IS SAID AT LAST\n" for i in range(n)),
        )
        for i in range(n):
            voice(f"{folder}/{speaker}-208-000{i}.flac", 200 if speaker == "14" else 90)
    (items,) = items_of(monkeypatch, tmp_path, "librispeech", "--subset", "dev-clean").values()
    assert [item["audio_id"] for item in items] == [
        f"librispeech-dev-clean-{i}" for i in ("14-208-0000", "14-208-0001", "22-208-0000")
    ]
    assert items[0]["transcription"] == "it is said at last" and items[0]["duration"] == 1.0
    assert items[0]["seed_transcript"].startswith(
        "[00:00:00 - 00:00:01] it is said at last (Volume: "
    )
    for fact in ("Gender: female", "Pitch: normal", "Speaking speed: fast", "Duration: 1.0 s"):
        assert fact in items[0]["seed_transcript"]
    assert (
        "Gender: male" in items[2]["seed_transcript"]
        and "Pitch: low" in items[2]["seed_transcript"]
    )


def test_librispeech_is_fetched_by_torchaudio_s_class(tmp_path, voice, monkeypatch):
    import torchaudio.datasets

    def fetch(root, url, download):
        assert download and url == "dev-other"
        text(root, "LibriSpeech/SPEAKERS.TXT", "1 | F | dev-other | 1 | A\n")
        text(root, "LibriSpeech/dev-other/1/2/1-2.trans.txt", "1-2-0000 WORDS\n")
        voice("LibriSpeech/dev-other/1/2/1-2-0000.flac")

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", fetch)
    assert (
        len(
            items_of(monkeypatch, tmp_path, "librispeech", "--subset", "dev-other", "--download")[
                "librispeech-dev-other"
            ]
        )
        == 1
    )


@pytest.mark.parametrize(
    "id_prefix, audio",
    [("p", "wav48_silence_trimmed/{s}/{s}_001_mic1.flac"), ("", "wav48/{s}/{s}_001.wav")],
)
def test_vctk_in_both_releases(tmp_path, voice, monkeypatch, id_prefix, audio):
    lines = [
        "ID  AGE  GENDER  ACCENTS  REGION COMMENTS",
        f"{id_prefix}225  23  F    English    Southern  England",
        f"{id_prefix}238  22  F  NorthernIrish  Belfast",
    ]
    text(tmp_path, "speaker-info.txt", "\n".join(lines) + "\n")
    for speaker in ("p225", "p238"):
        text(tmp_path, f"txt/{speaker}/{speaker}_001.txt", "Please call Stella.\n")
        voice(audio.format(s=speaker), 210, rate=48_000)
    text(tmp_path, "txt/p225/p225_002.txt", "Never recorded.\n")
    (items,) = items_of(monkeypatch, tmp_path, "vctk").values()
    assert [item["transcription"] for item in items] == ["Please call Stella."] * 2
    attributes = [item["attributes"] for item in items]
    assert [(a["Age"], a["Accent"]) for a in attributes] == [
        ("23", "English"),
        ("22", "Northern Irish"),
    ]


def test_accentdb(tmp_path, voice, monkeypatch):
    voice("data/odiya/speaker_01/odiya_s01_001.wav")
    voice("data/welsh/speaker_02/welsh_s02_001.wav")
    (items,) = items_of(monkeypatch, tmp_path, "accentdb").values()
    assert [(i["attributes"]["Accent"], i["speaker"]) for i in items] == [
        ("Odiya", "odiya-speaker_01"),
        ("Welsh", "welsh-speaker_02"),
    ]
    assert items[0]["transcription"] == "" and items[0]["seed_transcript"].startswith(
        "[00:00:00 - 00:00:01] ("
    )
    assert "Speaking speed" not in items[0]["attributes"]  # nothing to count


def test_iemocap(tmp_path, voice, monkeypatch):
    dialog, session = "Ses01F_impro01", "Session1"
    rated = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    rated += f"[6.2901 - 8.2357]\t{dialog}_F000\tneu\t[2.5, 2.5, 2.5]\nC-E2:\tNeutral;\t()\n"
    rated += f"[9.1 - 10.2]\t{dialog}_M000\txxx\t[2, 3, 3]\n"
    text(tmp_path, f"{session}/dialog/EmoEvaluation/{dialog}.txt", rated)
    text(
        tmp_path,
        f"{session}/dialog/transcriptions/{dialog}.txt",
        f"{dialog}_F000 [006.2901-008.2357]: Excuse me.\n{dialog}_M000 [009.1000-010.2000]: Yes.\n",
    )
    for name in ("F000", "M000"):
        voice(f"{session}/sentences/wav/{dialog}/{dialog}_{name}.wav")
    (items,) = items_of(monkeypatch, tmp_path, "iemocap").values()
    first, second = (item["attributes"] for item in items)
    assert (first["Gender"], first["Emotion"], items[0]["transcription"]) == (
        "female",
        "neutral",
        "Excuse me.",
    )
    assert second["Gender"] == "male" and "Emotion" not in second  # the raters did not agree


def test_dailytalk(tmp_path, voice, monkeypatch):
    turns = {}
    for i, (emotion, act) in enumerate((("no emotion", "question"), ("happiness", "inform"))):
        turns[str(i)] = {"text": " Hello there. ", "speaker": i, "emotion": emotion, "act": act}
    text(tmp_path, "metadata.json", json.dumps({"10": turns, "2": turns}))
    for dialog in ("2", "10"):
        for i in range(2):
            voice(f"data/{dialog}/{i}_{i}_d{dialog}.wav")
    (items,) = items_of(monkeypatch, tmp_path, "dailytalk").values()
    assert [i["audio_id"] for i in items] == [
        f"dailytalk-{n}" for n in ("0_0_d2", "1_1_d2", "0_0_d10", "1_1_d10")
    ]
    assert [(i["attributes"]["Emotion"], i["attributes"]["Intent"]) for i in items[:2]] == [
        ("neutral", "question"),
        ("happy", "inform"),
    ]


@pytest.mark.parametrize("folder", ["", "dev/"])
def test_voxceleb1(tmp_path, voice, monkeypatch, folder):
    text(
        tmp_path,
        "vox1_meta.csv",
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
        "id10001\tA.J._Buckley\tm\tIreland\tdev\n",
    )
    voice(f"{folder}wav/id10001/1zcIwhmdeo4/00001.wav")
    (items,) = items_of(monkeypatch, tmp_path, "voxceleb1").values()
    assert items[0]["audio_id"] == "voxceleb1-id10001-1zcIwhmdeo4-00001"
    assert (items[0]["attributes"]["Gender"], items[0]["attributes"]["Nationality"]) == (
        "male",
        "Ireland",
    )


def test_held_out_speakers_are_in_no_other_manifest(tmp_path, voice, monkeypatch):
    for i in range(30):
        for accent in ("welsh", "indian"):
            voice(f"data/{accent}/s{i}/1.wav", seconds=0.1)
    items = items_of(monkeypatch, tmp_path, "accentdb", "--held-out", "20")
    train, test = ({i["speaker"] for i in items[f"accentdb_{part}"]} for part in ("train", "test"))
    assert not train & test and len(train | test) == 60 and 5 <= len(test) <= 20


def test_what_cannot_be_read_is_skipped_and_named(tmp_path, voice, monkeypatch, capsys):
    voice("data/welsh/s1/1.wav")
    voice("data/welsh/s1/2.wav").write_bytes(b"RIFF")
    (items,) = items_of(monkeypatch, tmp_path, "accentdb").values()
    printed = "".join(capsys.readouterr())
    assert len(items) == 1 and "2.wav: cannot be read" in printed and "1 clips skipped" in printed


@pytest.mark.parametrize("reader", [reader.__name__ for reader in READERS])
def test_a_folder_that_is_not_the_corpus_is_explained(tmp_path, monkeypatch, reader):
    with pytest.raises(
        SystemExit, match=f"python -m corpora.manifests: {tmp_path}.* is not there: ROOT should be"
    ):
        items_of(monkeypatch, tmp_path, reader)


def test_an_empty_corpus_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match="accentdb: no clip found"):
        items_of(monkeypatch, tmp_path, "accentdb")


@pytest.mark.parametrize("hertz", [75, 110, 180, 250, 350])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_pitch_is_heard_within_two_percent(hertz, noise):
    waveform = torch.from_numpy(buzz(hertz)) + noise * torch.randn(
        SAMPLE_RATE, generator=torch.Generator().manual_seed(0)
    )
    assert measure.pitch(waveform) == pytest.approx(hertz, rel=0.02)


def test_noise_and_scraps_have_no_pitch():
    assert (
        measure.pitch(torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0))) is None
    )
    assert measure.pitch(torch.ones(100)) is None


def test_volume_does_not_depend_on_the_silence_around():
    loud = torch.from_numpy(buzz(120, loudness=0.2))
    around = torch.cat([torch.zeros(2 * SAMPLE_RATE), loud, torch.zeros(SAMPLE_RATE)])
    assert measure.volume(around) == pytest.approx(measure.volume(loud), abs=0.3)
    assert measure.volume(loud) - measure.volume(loud / 10) == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    "words, speed",
    [("one", "slow"), ("one two three", "normal"), ("one two three four five", "fast")],
)
def test_speed_is_words_a_second(words, speed):
    assert measure.measured(torch.from_numpy(buzz(120)), words, "male")["Speaking speed"] == speed


def test_a_long_clip_s_time_span():
    assert (
        measure.seed_transcript("a b", {"Gender": "male"}, 3725.2)
        == "[00:00:00 - 01:02:06] a b (Gender: male, Duration: 3725.2 s)"
    )


# ---- damaged and odd files
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_are_read_in_their_encoding(tmp_path, voice, monkeypatch, encoding):
    voice("wav48/p1/p1_001.wav")
    voice("wav48/p2/p2_001.wav")  # p2 is in no table
    table = "\n\nID AGE GENDER ACCENTS\n\n1 23 F Qu\u00e9b\u00e9cois x\n"
    write(tmp_path / "speaker-info.txt", table.encode(encoding))
    for speaker in ("p1", "p2"):
        words = "Un caf\u00e9\u2026\r\n" if encoding == "cp1252" else "Un caf\u00e9\u2026\u2028\n"
        write(tmp_path / f"txt/{speaker}/{speaker}_001.txt", words.encode(encoding))
    (items,) = items_of(monkeypatch, tmp_path, "vctk").values()
    assert [item["transcription"] for item in items] == ["Un caf\u00e9\u2026"] * 2
    assert items[0]["attributes"]["Accent"] == "Qu\u00e9b\u00e9cois"
    assert "Accent" not in items[1]["attributes"]


@pytest.mark.long
def test_the_locale_does_not_matter(tmp_path, voice):
    voice("wav48/p1/p1_001.wav")
    write(tmp_path / "speaker-info.txt", "1 23 F Qu\u00e9b\u00e9cois x\n".encode())
    write(tmp_path / "txt/p1/p1_001.txt", "Un caf\u00e9".encode())
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "corpora.manifests", "vctk", tmp_path, "--out", tmp_path]
    root = Path(manifests.__file__).parents[1]
    subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True)
    assert load_manifest(tmp_path / "vctk.json")[0]["transcription"] == "Un caf\u00e9"


def test_librispeech_with_blank_lines_and_unlisted_speakers(tmp_path, voice, monkeypatch):
    text(tmp_path, "LibriSpeech/SPEAKERS.TXT", "\n1 | ? | x\n\n2\n|\n")
    folder = "LibriSpeech/s/1/2"
    text(tmp_path, f"{folder}/1-2.trans.txt", "\n1-2-0000 ONE\u2028TWO\n  \n1-2-0001\n\n")
    text(tmp_path, "LibriSpeech/s/3/4/3-4.trans.txt", "3-4-0000 WORDS\n")
    for name in ("1/2/1-2-0000", "1/2/1-2-0001", "3/4/3-4-0000"):
        voice(f"LibriSpeech/s/{name}.flac")
    (items,) = items_of(monkeypatch, tmp_path, "librispeech", "--subset", "s").values()
    assert [item["transcription"] for item in items] == ["one two", "", "words"]
    assert all("Gender" not in item["attributes"] for item in items)


def test_voxceleb1_and_dailytalk_with_fields_missing(tmp_path, voice, monkeypatch, capsys):
    table = "VoxCeleb1 ID\tGender\tNationality\n\nid1\tm\nid2\tx\tPeru\nid3\n"
    text(tmp_path, "vox1_meta.csv", table)
    for i in range(1, 5):
        voice(f"wav/id{i}/video/1.wav")
    (items,) = items_of(monkeypatch, tmp_path, "voxceleb1").values()
    known = [{k: a[k] for k in ("Gender", "Nationality") if k in a} for a in attributes_of(items)]
    assert known == [{"Gender": "male"}, {"Nationality": "Peru"}, {}, {}]

    turns = {"0": {"speaker": 0, "text": None, "emotion": 3}, "1": None, "2": {"text": "Hi"}}
    text(tmp_path, "metadata.json", json.dumps({"1": turns}))
    voice("data/1/0_0_d1.wav")
    items = items_of(monkeypatch, tmp_path, "dailytalk")["dailytalk"]
    assert [item["transcription"] for item in items] == [""]
    assert "1_None_d1.wav: no such audio file" in capsys.readouterr().err


def attributes_of(items):
    return [item["attributes"] for item in items]


@pytest.mark.parametrize("corpus, file, content, problem", [
    ("dailytalk", "metadata.json", "{", "does not hold numbered turns"),
    ("dailytalk", "metadata.json", "[" * 10**5, "does not hold numbered turns"),
    ("dailytalk", "metadata.json", "[]", "no clip found"),
    ("dailytalk", "metadata.json", "3", "does not hold numbered turns"),
    ("dailytalk", "metadata.json", '{"a": {}}', "does not hold numbered turns"),
    ("dailytalk", "metadata.json", '{"1": null}', "does not hold numbered turns"),
    ("voxceleb1", "vox1_meta.csv", "", "lacks VoxCeleb1 ID"),
    ("voxceleb1", "vox1_meta.csv", "VoxCeleb1 ID,Gender,Nationality\n", "no clip found"),
    ("voxceleb1", "vox1_meta.csv", "\0\0", "lacks VoxCeleb1 ID"),
])  # fmt: skip
def test_a_damaged_table_is_named(tmp_path, monkeypatch, corpus, file, content, problem):
    text(tmp_path, file, content)
    with pytest.raises(SystemExit, match=f"({file}|{corpus}).*{problem}"):
        items_of(monkeypatch, tmp_path, corpus)


def test_a_folder_or_pipe_in_place_of_a_table_is_named(tmp_path, monkeypatch):
    (tmp_path / "metadata.json").mkdir()
    os.mkfifo(tmp_path / "vox1_meta.csv")
    for corpus in ("dailytalk", "voxceleb1"):
        with pytest.raises(SystemExit, match="(metadata.json|vox1_meta.csv) is not a file"):
            items_of(monkeypatch, tmp_path, corpus)


def test_what_cannot_work_is_known_before_clips_are_read(tmp_path, voice, monkeypatch, capsys):
    for i in range(2):
        voice(f"data/welsh/s{i}/1.wav", seconds=0.1)
    text(tmp_path, "LibriSpeech/dev-clean/README", "")
    (tmp_path / "file").write_text("")

    def read(*arguments):
        raise AssertionError("clips are read")

    monkeypatch.setattr(manifests, "map_in_processes", read)
    unknown = "--subset dev-cleen is not in .*, which holds dev-clean"
    with pytest.raises(SystemExit, match=unknown):
        items_of(monkeypatch, tmp_path, "librispeech", "--subset", "dev-cleen")
    nobody = "--held-out 0.1 takes all speakers to accentdb_train; choose a percentage above"
    with pytest.raises(SystemExit, match=nobody):
        items_of(monkeypatch, tmp_path, "accentdb", "--held-out", "0.1")
    with pytest.raises(SystemExit, match="File exists|Not a directory"):
        items_of(monkeypatch, tmp_path, "accentdb", "--out", str(tmp_path / "file"))
    (tmp_path / "taken/accentdb.json").mkdir(parents=True)
    with pytest.raises(SystemExit, match="accentdb.json: cannot be saved"):
        items_of(monkeypatch, tmp_path, "accentdb", "--out", str(tmp_path / "taken"))
    for percent in ("-1", "101", "nan", "five"):
        with pytest.raises(SystemExit, match="2"):
            items_of(monkeypatch, tmp_path, "accentdb", "--held-out", percent)
        assert f"must be 0 to 100, not '{percent}'" in capsys.readouterr().err


SLOW = """
import sys, time
from checkpoints.command_line import one_line_errors
from corpora.workers import map_in_processes

def work(i):
    print(i, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    with one_line_errors("slow"):
        map_in_processes(work, range(99), "working")
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_made_them(number):
    """Nothing is left that holds the output open, and Ctrl-C gives one line."""
    root = Path(manifests.__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    made = subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=root, start_new_session=True, **pipes, **restored
    )
    made.stdout.readline()  # a process works
    send = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches all of them
    send(made.pid, number)
    _, errors = made.communicate(timeout=20)  # ends when no process holds the output
    if number == signal.SIGINT:
        assert made.returncode == 130
        assert b"Traceback" not in errors and b"slow: stopped" in errors


def test_a_clip_whose_name_is_not_utf_8_is_skipped_or_read_but_ends_nothing(
    tmp_path, voice, monkeypatch
):
    voice("data/welsh/s1/1.wav")
    voice("data/welsh/s1/2.wav").rename(
        os.fsdecode(os.fsencode(tmp_path) + b"/data/welsh/s1/\xe9.wav")
    )
    (items,) = items_of(monkeypatch, tmp_path, "accentdb").values()
    assert items[0]["audio_id"] == "accentdb-welsh-s1-1"
