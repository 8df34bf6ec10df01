"""The toy corpus: what it promises about its sentences, voices, answers and files."""

import json
import os
import random
import sys
import tempfile
from collections import Counter

import pytest
import soundfile

import toy.corpus
from toy import grammar, speech
from toy.corpus import MAX_SECONDS, make_toy

TRAIN, TEST = 24, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tiny corpus: its folder and its four manifests."""
    out = tmp_path_factory.mktemp("corpus")
    make_toy(out, seed=3, train=TRAIN, test=TEST)
    return out, {
        name: json.loads((out / f"{name}.json").read_text())
        for name in ("asr_train", "asr_test", "instruct_train", "instruct_test")
    }


def sentences(n, **options):
    rng = random.Random(0)
    return [grammar.random_sentence(rng, **options) for _ in range(n)]


def test_grammar_is_even_and_within_its_words():
    drawn = sentences(3000)
    lengths = Counter(len(s.text.split()) for s in drawn)
    assert set(lengths) == set(grammar.NUMBER_WORDS) and min(lengths.values()) > 400
    assert {word for s in drawn for word in s.text.split()} == set(grammar.WORDS)
    assert all(len(words) <= 8 for words in grammar.CATEGORIES.values())
    assert all(s.slots for s in drawn)


def test_held_out_sentences_never_train():
    assert all(not grammar.is_held_out(s.text) for s in sentences(1000, held_out=False))
    assert all(grammar.is_held_out(s.text) for s in sentences(300, held_out=True))
    share = sum(grammar.is_held_out(s.text) for s in sentences(3000)) / 3000
    assert 0.07 < share < 0.13
    assert grammar.is_held_out("oscar found the zebra") == grammar.is_held_out(
        "oscar found the zebra"
    )


def test_train_and_test_share_neither_sentence_nor_voice(corpus):
    _, manifests = corpus
    train, test = manifests["asr_train"], manifests["asr_test"]
    assert len(train) == TRAIN and len(test) == TEST
    assert not {i["transcription"] for i in train} & {i["transcription"] for i in test}
    assert not {i["attributes"]["voice"] for i in train} & {i["attributes"]["voice"] for i in test}
    voices = [voice for group in speech.VOICES.values() for voice in group]
    assert len(voices) == len(set(voices)) == 67 + 252  # none belongs to two groups
    assert (
        len(voices) + 13 < 349 and max(map(len, voices)) <= 15
    )  # eSpeak counts 13 languages too and reads no more; it breaks down on longer names


def test_audio_and_alignment(corpus):
    out, manifests = corpus
    for item in manifests["asr_train"] + manifests["asr_test"]:
        waveform, rate = soundfile.read(out / item["audio_filepath"])
        assert rate == 16_000 and waveform.ndim == 1 and len(waveform) / rate <= MAX_SECONDS + 0.001
        assert item["duration"] == pytest.approx(len(waveform) / rate, abs=0.001)
        assert (
            0.02 < (waveform**2).mean() ** 0.5 < 0.065 and abs(waveform).max() < 0.999
        )  # level, and no clipping
        assert (
            " ".join(word for word, _, _ in item["words"])
            == item["transcription"]
            == item["target"]
        )
        times = [time for _, start, end in item["words"] for time in (start, end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= item["duration"]
        assert all(end - start > 0.03 for _, start, end in item["words"])
        assert item["duration"] - times[-1] < 0.1  # the silence at the end is trimmed


def test_words_are_where_the_alignment_says(corpus):
    """A word's span in one clip holds sound: louder than the clip's silence after the last word."""
    out, manifests = corpus
    for item in manifests["asr_test"]:
        waveform, rate = soundfile.read(out / item["audio_filepath"])
        for _, start, end in item["words"]:
            assert (
                abs(waveform[int(start * rate) : int(end * rate)]).max() > 0.1 * abs(waveform).max()
            )


def test_attributes_are_balanced_and_independent():
    rng = random.Random(0)
    drawn = [grammar.random_attributes(rng) for _ in range(6400)]
    joint = Counter((a.gender, a.accent, a.speed, a.pitch) for a in drawn)  # 32 cells of 200
    assert len(joint) == 32 and min(joint.values()) > 140 and max(joint.values()) < 260


def test_attributes_are_what_was_spoken(corpus):
    _, manifests = corpus
    for item in manifests["asr_train"] + manifests["asr_test"]:
        a = item["attributes"]
        low, high = grammar.SPEEDS[a["speed"]]
        assert low <= a["rate"] <= high
        low, high = grammar.PITCHES[a["pitch"]]
        assert low <= a["pitch_parameter"] <= high
        split = item["audio_filepath"].split("/")[1]
        assert a["voice"] in speech.VOICES[split, a["gender"]]
        assert f"Accent: {a['accent']}" in item["seed_transcript"]
    seconds = {
        speed: sorted(
            item["duration"] / len(item["words"])
            for item in manifests["asr_train"]
            if item["attributes"]["speed"] == speed
        )
        for speed in grammar.SPEEDS
    }
    assert (
        seconds["slow"][len(seconds["slow"]) // 2]
        > 1.2 * seconds["fast"][len(seconds["fast"]) // 2]
    )


def test_same_seed_same_bytes(corpus, tmp_path):
    """A clip depends neither on how many there are nor on those spoken before it."""
    out, manifests = corpus
    make_toy(tmp_path / "again", seed=3, train=5, test=2)
    for path in sorted((tmp_path / "again" / "audio").rglob("*.wav")):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "again")).read_bytes(), path
    assert (
        json.loads((tmp_path / "again" / "asr_train.json").read_text())
        == manifests["asr_train"][:5]
    )
    make_toy(tmp_path / "other", seed=4, train=5, test=0)
    assert (
        json.loads((tmp_path / "other" / "asr_train.json").read_text())
        != manifests["asr_train"][:5]
    )


def test_every_real_voice_speaks_alike_each_time(tmp_path):
    speech.prepare_espeak(tmp_path)
    for voice in (voice for group in speech.REAL_VOICES.values() for voice in group):
        first, second = (
            speech.speak("arthur painted", f"en-us+{voice}", 240, 50, tmp_path) for _ in range(2)
        )
        assert (first[0].shape, first[1]) == (second[0].shape, second[1]) and (
            first[0] == second[0]
        ).all(), voice


def test_finished_corpus_is_skipped_and_others_left_alone(corpus, capsys):
    out, _ = corpus
    before = (out / "asr_train.json").stat().st_mtime_ns
    make_toy(out, seed=3, train=TRAIN, test=TEST)
    assert "already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="another corpus"):
        make_toy(out, seed=4, train=TRAIN, test=TEST)
    assert (out / "asr_train.json").stat().st_mtime_ns == before


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path, monkeypatch):
    """eSpeak is C: it can crash. Nothing may wait for it or take half a corpus for a whole one."""
    monkeypatch.setattr(toy.corpus, "speak", lambda *_: os._exit(1))
    with pytest.raises(ChildProcessError, match="died, or memory ran out"):
        make_toy(tmp_path, seed=5, train=1, test=1)
    assert not (tmp_path / "corpus.json").exists()


def test_unfinished_corpus_is_made_again(tmp_path):
    make_toy(tmp_path, seed=5, train=1, test=1)
    (tmp_path / "corpus.json").unlink()
    (tmp_path / "asr_test.json").unlink()
    make_toy(tmp_path, seed=5, train=1, test=1)
    assert len(json.loads((tmp_path / "asr_test.json").read_text())) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_corpus_of_another_version_or_a_damaged_record_is_named(tmp_path, monkeypatch):
    make_toy(tmp_path, seed=5, train=1, test=1)
    record = tmp_path / "corpus.json"
    whole = json.loads(record.read_text())

    # An older record holds the arguments alone.
    record.write_text(json.dumps({"corpus": "toy", "seed": 5, "train": 1, "test": 1}))
    make_toy(tmp_path, seed=5, train=1, test=1)
    for change in ({"tables": 1}, {"espeak": "0"}, {"seed": 6}):
        record.write_text(json.dumps(whole | change))
        with pytest.raises(
            FileExistsError, match="another corpus.*Choose another --out, or remove"
        ):
            make_toy(tmp_path, seed=5, train=1, test=1)
    for damage in ("", "{", "[]"):
        record.write_text(damage)
        with pytest.raises(ValueError, match="corpus.json: not .*; remove it, and the"):
            make_toy(tmp_path, seed=5, train=1, test=1)

    # A manifest that is gone is made again.
    record.write_text(json.dumps(whole))
    (tmp_path / "asr_test.json").unlink()
    make_toy(tmp_path, seed=5, train=1, test=1)
    assert (tmp_path / "asr_test.json").is_file()


def test_a_killed_run_of_another_seed_leaves_no_manifest_of_the_clips_before(tmp_path, monkeypatch):
    make_toy(tmp_path, seed=5, train=1, test=1)
    (tmp_path / "corpus.json").unlink()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy.corpus, "map_in_processes", killed)
    with pytest.raises(KeyboardInterrupt):
        make_toy(tmp_path, seed=6, train=1, test=1)
    assert not list(tmp_path.glob("*.json"))


def test_a_long_temporary_folder_is_named(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OSError, match="set TMPDIR to a shorter folder, such as /tmp"):
        make_toy(tmp_path / "out", seed=5, train=1, test=1)


def test_speech_in_the_longest_path_is_the_same(tmp_path):
    short = tmp_path / "short"
    long = tmp_path / ("x" * (speech.LONGEST_PATH - len(str(tmp_path)) - 1))
    for folder in (short, long):
        folder.mkdir()
        speech.prepare_espeak(folder)
    spoken = [speech.speak("oscar heard", "en-us+f2", 200, 50, folder) for folder in (short, long)]
    assert (spoken[0][0] == spoken[1][0]).all()


def test_answers_agree_with_the_sentence():
    rng = random.Random(1)
    for sentence in sentences(500):
        a = grammar.random_attributes(rng)
        pairs = grammar.instructions(sentence, a, rng)
        words = sentence.text.split()
        assert list(pairs) == [k for k in grammar.KINDS if k in pairs]
        assert {k for k in pairs if k in grammar.SLOTS} == set(sentence.slots)
        for kind in sentence.slots:
            assert pairs[kind][1] in words and pairs[kind][1] in grammar.CATEGORIES[kind]
            assert sum(word in grammar.CATEGORIES[kind] for word in words) == 1  # one right answer
        assert (
            pairs["count"][1]
            == "zero one two three four five six seven eight nine".split()[len(words)]
        )
        assert pairs["repeat"][1] == sentence.text
        for kind in grammar.VOICE_KINDS:
            assert pairs[kind][1] == getattr(a, kind)
        head, said = pairs["caption"][1].split(": ")
        assert said == sentence.text and len(head.split()) == 7
        assert {a.accent, a.speed, a.pitch, "woman" if a.gender == "female" else "man"} < set(
            head.split()
        )


def test_questions_have_several_short_wordings():
    assert (
        set(grammar.QUESTIONS)
        == set(grammar.KINDS)
        == {*grammar.CONTENT_KINDS, *grammar.VOICE_KINDS, "caption"}
    )
    wordings = [question for questions in grammar.QUESTIONS.values() for question in questions]
    assert len(set(wordings)) == len(wordings)  # none is asked of two kinds
    for questions in grammar.QUESTIONS.values():
        assert len(questions) >= 4
    assert all(q[0].isupper() and q[-1] in "?." and len(q.split()) <= 10 for q in wordings)


def test_instruction_manifests(corpus):
    out, manifests = corpus
    train, test = manifests["instruct_train"], manifests["instruct_test"]
    assert len(train) == 5 * TRAIN
    per_clip = Counter((item["audio_id"], item["kind"]) for item in train)
    assert max(per_clip.values()) == 1
    voice = sum(item["kind"] in (*grammar.VOICE_KINDS, "caption") for item in train)
    assert all(2 * TRAIN <= n <= 3 * TRAIN for n in (voice, len(train) - voice))
    for clip in manifests["asr_test"]:
        kinds = {item["kind"] for item in test if item["audio_id"] == clip["audio_id"]}
        slots = {
            k
            for k in grammar.SLOTS
            if set(grammar.CATEGORIES[k]) & set(clip["transcription"].split())
        }
        assert kinds == slots | {"count", "repeat", "caption", *grammar.VOICE_KINDS}
    facts = {i["audio_id"]: i["attributes"] for i in manifests["asr_train"] + manifests["asr_test"]}
    for item in train + test:
        assert (
            item["input"] in grammar.QUESTIONS[item["kind"]]
            and (out / item["audio_filepath"]).exists()
        )
        if item["kind"] in grammar.VOICE_KINDS:
            assert item["target"] == facts[item["audio_id"]][item["kind"]]


def test_seed_transcripts_name_the_words_and_the_voice(corpus):
    _, manifests = corpus
    for item in manifests["asr_test"] + manifests["instruct_train"]:
        assert item["seed_transcript"].startswith(
            f"[00:00:00 - 00:00:0{int(item['duration']) + 1}] {item['transcription']} ("
        )
    for item in manifests["asr_test"]:
        a = item["attributes"]
        assert item["seed_transcript"].endswith(
            f"(Gender: {a['gender']}, Accent: {a['accent']}, "
            f"Speaking speed: {a['speed']}, Pitch: {a['pitch']})"
        )


def test_synthetic_voices_tell_the_genders_apart():
    def pitch(gender, i):
        text = speech.synthetic_voice(f"train-{gender}-{i:02d}", gender)
        assert f"gender {gender}\n" in text
        return int(next(line for line in text.splitlines() if line.startswith("pitch")).split()[1])

    assert (
        max(pitch("male", i) for i in range(50))
        <= 120
        < 165
        <= min(pitch("female", i) for i in range(50))
    )
    assert (
        speech.synthetic_voice("a", "male")
        == speech.synthetic_voice("a", "male")
        != speech.synthetic_voice("b", "male")
    )


def test_the_command_says_in_one_line_what_stops_it(corpus, monkeypatch):
    out, _ = corpus
    monkeypatch.setattr(sys, "argv", ["corpus", "--out", str(out), "--seed", "4"])
    with pytest.raises(
        SystemExit, match="python -m toy.corpus: .* holds another corpus.*Choose another --out"
    ):
        toy.corpus.main()
    for option, value in (("--train", "0"), ("--test", "-1"), ("--train", str(10**18))):
        monkeypatch.setattr(sys, "argv", ["corpus", "--out", str(out), option, value])
        with pytest.raises(SystemExit, match="2"):
            toy.corpus.main()
    (out / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["corpus", "--out", str(out / "file")])
    with pytest.raises(SystemExit, match="python -m toy.corpus: .*(Not a directory|File exists)"):
        toy.corpus.main()


def test_missing_espeak_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # as if not installed
    with pytest.raises(OSError, match="pip install espeakng-loader"):
        speech.prepare_espeak(tmp_path)
