"""Odd cases of the public corpora: small trees with the exceptions of the published ones."""

import json
import re
import zlib

import pytest
from test_corpora import items_of, text, voice  # noqa: F401 (a fixture)

from corpora import manifests
from corpora.vocabulary import one_spelling


@pytest.fixture
def made(tmp_path, voice, monkeypatch):  # noqa: F811
    """made(corpus, *options) -> items by manifest; made.sounds(names), made.texts({name: text})."""

    def map_here(function, items, label):  # a pool of processes takes a second
        return [function(item) for item in items]

    monkeypatch.setattr(manifests, "map_in_processes", map_here)

    class Made:
        def __call__(self, corpus, *options):
            return items_of(monkeypatch, tmp_path, corpus, *options)

        def sounds(self, *names):
            for name in names:
                voice(name, seconds=0.1)

        def texts(self, contents):
            for name, content in contents.items():
                text(tmp_path, name, content)

    return Made()


def by_id(items, corpus):
    return {item["audio_id"].removeprefix(f"{corpus}-"): item for item in items}


# ---- LibriSpeech
def test_librispeech_speakers_of_unknown_gender_or_unlisted(made, tmp_path):
    made.texts({
        "LibriSpeech/SPEAKERS.TXT": "1 | X | dev-clean | 1 | A\n2 | f | dev-clean | 1 | B\n",
        "LibriSpeech/dev-clean/1/1/1-1.trans.txt": "1-1-0000 ONE\n\n1-1-0001\n",
        "LibriSpeech/dev-clean/2/1/2-1.trans.txt": "2-1-0000 TWO\n2-1-0001 GONE\n",
        "LibriSpeech/dev-clean/2/1/._2-1.trans.txt": "\0\1\2 nonsense\n",
        "LibriSpeech/dev-clean/3/1/3-1.trans.txt": "3-1-0000 THREE\n",
    })  # fmt: skip
    names = ("1/1/1-1-0000", "1/1/1-1-0001", "2/1/2-1-0000", "3/1/3-1-0000")
    made.sounds(*(f"LibriSpeech/dev-clean/{name}.flac" for name in names))
    (items,) = made("librispeech", "--subset", "dev-clean").values()
    assert [item["transcription"] for item in items] == ["one", "", "two", "three"]
    genders = [item["attributes"].get("Gender") for item in items]
    assert genders == [None, None, "female", None]


def test_librispeech_in_windows_1252_and_below_another_root(made, tmp_path, voice):  # noqa: F811
    folder = tmp_path / "unpacked/dev-clean/1/1"
    folder.mkdir(parents=True)
    (folder / "1-1.trans.txt").write_bytes("1-1-0000 CAF\u00c9\n".encode("cp1252"))
    made.texts({"unpacked/SPEAKERS.TXT": "1 | M | dev-clean | 1 | A\n"})
    made.sounds("unpacked/dev-clean/1/1/1-1-0000.flac")
    (items,) = made("librispeech", "--subset", "dev-clean").values()
    assert items[0]["transcription"] == "caf\u00e9"


@pytest.mark.parametrize("options", [[], ["--download"]])
def test_librispeech_lists_its_subsets_for_an_unknown_one(made, options, monkeypatch):
    made.texts({"LibriSpeech/SPEAKERS.TXT": "", "LibriSpeech/dev-clean/README": ""})
    monkeypatch.setattr("torchaudio.datasets.LIBRISPEECH", None)  # nothing is fetched
    with pytest.raises(SystemExit, match="dev-clean, dev-other, test-clean, .*train-other-500"):
        made("librispeech", "--subset", "test-claen", *options)


# ---- VCTK
SPEAKERS = """p225  23  F    English    Southern  England
p280  25  F    Unknown    France
p315  18  M    American   New  England  (no text)
p362  29  F    NewZealand
"""


@pytest.mark.parametrize("header", ["", "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\n"])
@pytest.mark.parametrize("above", ["", "VCTK-Corpus-0.92/"])
def test_vctk_0_92(made, header, above, capsys):
    made.texts({
        f"{above}speaker-info.txt": header + SPEAKERS,
        f"{above}txt/p225/p225_001.txt": "Please call Stella.\n",
        f"{above}txt/p225/p225_002.txt": "Never recorded.\n",
        f"{above}txt/p225/p225_003.txt": "Never recorded either.\n",
        f"{above}txt/p280/p280_001.txt": "Ask her.\n",
        f"{above}txt/p362/p362_001.txt": "Six spoons.\n",
    })  # fmt: skip
    sounds = ("p225/p225_001_mic1", "p225/p225_001_mic2", "p280/p280_001_mic1")
    sounds += ("p315/p315_001_mic1", "p315/p315_001_mic2", "p362/p362_001_mic2")
    made.sounds(*(f"{above}wav48_silence_trimmed/{sound}.flac" for sound in sounds))
    (items,) = made("vctk").values()
    items = by_id(items, "vctk")

    assert list(items) == ["p225_001", "p280_001", "p315_001", "p362_001"]
    words = [item["transcription"] for item in items.values()]
    assert words == ["Please call Stella.", "Ask her.", "", "Six spoons."]
    accents = [item["attributes"].get("Accent") for item in items.values()]
    assert accents == ["English", None, "American", "New Zealand"]
    files = [item["audio_filepath"][-9:] for item in items.values()]
    assert files == ["mic1.flac"] * 3 + ["mic2.flac"]

    printed = capsys.readouterr().out
    assert "  2: a text without sound, such as p225_002" in printed
    assert "  1: a sound without text, kept as a clip without words, such as p315_001" in printed


# ---- IEMOCAP
def iemocap(made, dialogs, transcribed):
    for dialog in dialogs:
        session = f"Session{int(dialog[3:5])}"
        turns = [f"{dialog}_F000", f"{dialog}_M000"]
        rated = "".join(f"[1.0 - 2.0]\t{turn}\thap\t[2, 2, 2]\n" for turn in turns)
        made.texts({f"{session}/dialog/EmoEvaluation/{dialog}.txt": rated})
        made.sounds(*(f"{session}/sentences/wav/{dialog}/{turn}.wav" for turn in turns))
        if dialog in transcribed:
            said = f"{turns[0]} [001.0-002.0]: [LAUGHTER] Oh [BREATHING] yes. [LAUGHTER]\n"
            said += f"{turns[1]} [001.0-002.0]: [LAUGHTER]\n"
            made.texts({f"{session}/dialog/transcriptions/{dialog}.txt": said})


def test_iemocap_with_tags_an_absent_file_and_odd_bytes(made, tmp_path, capsys):
    iemocap(made, ["Ses01F_impro01", "Ses01M_impro02"], ["Ses01F_impro01"])
    rated = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    rated.write_bytes(b"% caf\xe9\x81\n" + rated.read_bytes())
    (items,) = made("iemocap").values()
    assert [item["transcription"] for item in items] == ["Oh yes.", "", "", ""]
    assert {item["attributes"]["Emotion"] for item in items} == {"happy"}
    printed = capsys.readouterr().out
    assert "4 rated clips; the whole corpus has 10,039" in printed
    assert re.search("  1: a file of transcripts.* such as .*Ses01M_impro02.txt", printed)


def test_iemocap_holds_out_whole_sessions(made):
    dialogs = [f"Ses0{i}F_impro01" for i in range(1, 6)]
    iemocap(made, dialogs, dialogs)
    items = made("iemocap", "--held-out", "20")
    test, train = ({i["speaker"] for i in items[f"iemocap_{p}"]} for p in ("test", "train"))
    sessions = {speaker[:-1] for speaker in test}
    assert test == {f"{session}{gender}" for session in sessions for gender in "FM"}
    assert sessions and len(test) + len(train) == 10 and not test & train


# ---- VoxCeleb1
@pytest.mark.parametrize("separator", ["\t", ","])
def test_voxceleb1_with_links_other_folders_and_either_separator(made, tmp_path, separator):
    rows = (("VoxCeleb1 ID", "VGGFace1 ID", "Gender", "Nationality", "Set"),)
    rows += (("id10001", "A", "m", "Ireland", "dev"), ("id10002", "B", "f", "USA", "dev"))
    made.texts({"vox1_meta.csv": "".join(separator.join(row) + "\n" for row in rows)})
    made.sounds("disk/id10001/v/00001.wav", "vox1_dev_wav/x/id10002/v/00001.wav")
    made.sounds("id10003/v/00001.wav", "vox1_dev_wav/x/other/v/00001.wav")
    (tmp_path / "dev").mkdir()
    (tmp_path / "disk").rename(tmp_path.parent / f"{tmp_path.name}-disk")
    (tmp_path / "dev/wav").symlink_to(tmp_path.parent / f"{tmp_path.name}-disk")
    (items,) = made("voxceleb1").values()
    found = {item["speaker"]: item["attributes"].get("Nationality") for item in items}
    assert found == {"id10001": "Ireland", "id10002": "USA", "id10003": None}


def test_a_quote_in_voxceleb1_s_table_is_a_character(made):
    rows = 'VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\nid1\t"A\tm\tPeru\nid2\tB\tf\tUSA\n'
    made.texts({"vox1_meta.csv": rows})
    made.sounds("wav/id1/v/1.wav", "wav/id2/v/1.wav")
    (items,) = made("voxceleb1").values()
    found = {item["speaker"]: item["attributes"].get("Nationality") for item in items}
    assert found == {"id1": "Peru", "id2": "USA"}


def test_a_clip_that_is_found_twice_is_taken_once(made, tmp_path, capsys):
    made.texts({"vox1_meta.csv": "VoxCeleb1 ID\tGender\tNationality\nid1\tm\tPeru\n"})
    made.sounds("dev/wav/id1/v/1.wav")
    (tmp_path / "wav").symlink_to(tmp_path / "dev/wav")
    (items,) = made("voxceleb1").values()
    assert len(items) == 1
    assert "  1: a second clip with the id of another" in capsys.readouterr().out


# ---- AccentDB, DailyTalk
def test_accentdb_without_the_files_that_macos_leaves(made, capsys):
    made.sounds("data/welsh/s1/1.wav")
    made.texts({"data/welsh/s1/._1.wav": "Mac OS X", "data/welsh/._s2/2.wav": ""})
    (items,) = made("accentdb").values()
    assert len(items) == 1 and "0 clips skipped" in capsys.readouterr().out


def test_dailytalk_keeps_the_turns_of_a_dialogue_together(made):
    turns = {str(i): {"text": "Hi.", "speaker": i, "emotion": "anger"} for i in range(2)}
    made.texts({"metadata.json": json.dumps({str(i): turns for i in range(12)})})
    made.sounds(*(f"data/{d}/{i}_{i}_d{d}.wav" for d in range(12) for i in range(2)))
    items = made("dailytalk", "--held-out", "40")
    test, train = (
        {item["audio_id"].split("_d")[1] for item in items[f"dailytalk_{part}"]}
        for part in ("test", "train")
    )
    assert test and train and not test & train
    assert test == {str(i) for i in range(12) if zlib.crc32(f"dialog {i}".encode()) % 1000 < 400}


# ---- all
def test_what_was_skipped_is_counted_by_reason(made, tmp_path, capsys):
    made.sounds("data/welsh/s1/1.wav")
    for i in range(3):
        made.texts({f"data/welsh/s1/bad{i}.wav": f"no sound {i}"})
    made.texts({"data/welsh/s2/empty.wav": ""})
    (tmp_path / "data/welsh/s2/folder.wav").mkdir()
    made("accentdb")
    printed = capsys.readouterr().out
    assert "accentdb: 5 clips skipped" in printed
    assert re.search("  4: cannot be read as WAV, FLAC, OGG or MP3, such as .*bad0.wav", printed)
    assert re.search("  1: is a folder or device, not an audio file, such as", printed)


def test_a_held_out_part_that_takes_everybody_or_nobody_says_what_would_work(made):
    for speaker in ("s1", "s2"):
        made.sounds(f"data/welsh/{speaker}/1.wav")
    ranks = sorted(zlib.crc32(f"welsh-{s}".encode()) % 1000 / 10 for s in ("s1", "s2"))
    with pytest.raises(SystemExit, match=f"above {ranks[0]:g}, and at most {ranks[1]:g}"):
        made("accentdb", "--held-out", "0.1")
    with pytest.raises(SystemExit, match="takes all speakers to accentdb_test"):
        made("accentdb", "--held-out", "100")
    assert len(made("accentdb", "--held-out", f"{ranks[1]:g}")) == 2


def test_one_corpus_in_each_of_two_folders_is_a_question(made):
    made.sounds("a/data/welsh/s1/1.wav", "b/data/welsh/s1/1.wav")
    with pytest.raises(SystemExit, match="several such corpora; choose one as ROOT: .*a, .*b"):
        made("accentdb")


@pytest.mark.parametrize("name, spellings, value", [
    ("Emotion", "hap happiness Happy happy joy", "happy"),
    ("Emotion", "sad sadness Sad", "sad"),
    ("Emotion", "ang anger angry", "angry"),
    ("Emotion", "fea fear fearful", "fearful"),
    ("Emotion", "sur surprise surprised", "surprised"),
    ("Emotion", "dis disgust disgusted", "disgusted"),
    ("Emotion", "neu neutral no_emotion", "neutral"),
    ("Emotion", "oth xxx unknown", ""),
    ("Accent", "american American", "American"),
    ("Accent", "NewZealand new_zealand New_Zealand", "New Zealand"),
    ("Accent", "Unknown unknown none", ""),
    ("Gender", "M m male Male", "male"),
    ("Gender", "F f female", "female"),
    ("Gender", "x ? other", ""),
    ("Intent", "inform Inform", "inform"),
    ("Age", "x -", ""),
])  # fmt: skip
def test_a_value_has_one_spelling_in_all_corpora(name, spellings, value):
    assert {one_spelling(name, spelling) for spelling in spellings.split()} == {value}
