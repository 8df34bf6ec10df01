"""Public corpora: small trees laid out as the real ones become manifests that training reads."""

import json
import sys

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
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


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
        ("odiya", "odiya-speaker_01"),
        ("welsh", "welsh-speaker_02"),
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
        ("happiness", "inform"),
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
    printed = capsys.readouterr().out
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
