"""Human speech: a tiny folder goes through every command of `make human`; the test is held out."""

import json
import random
from dataclasses import replace

import pytest
import soundfile

import train_asr
from data import load_manifest
from lab import human, human_text
from lab.human_text import Text, draw_sentence, plain_words
from toy import pretrain_lm

SECONDS = 0.75  # the tiny encoder of conftest.py hears 0.8
TRAIN = {
    "Press 1.": 0.5,
    "Press * or #": 0.6,
    "one": 0.3,
    "Re-enter it!": 0.5,
    "Go on": 2.0,
}  # seconds of each prompt
TEST = {"One": 0.4, "press it": 0.5, "Or 1": 0.6, "Press one, or re-enter it, for now.": 3.0}


@pytest.fixture
def folder(tmp_path, tone):
    """FOLDER with train.json and test.json; the prompts are tones."""
    for split, prompts in (("train", TRAIN), ("test", TEST)):
        items = []
        for i, (words, seconds) in enumerate(prompts.items()):
            told = {
                "audio_id": f"{split}-{i}",
                "audio_filepath": f"{split}{i}.flac",
                "input": "Repeat it.",
                "duration": seconds,
            }
            items.append(
                told
                | {
                    "transcription": words,
                    "target": words,
                    "dataset": "prompts",
                    "seed_transcript": words,
                }
            )
            tone(f"{split}{i}.flac", seconds)
        (tmp_path / f"{split}.json").write_text(json.dumps(items))
    return tmp_path


def make(folder, name="corpus", **changed):
    settings = {"seconds": SECONDS, "seed": 0, "spoken": 12, "repeat": 3} | changed
    human.make_corpus(folder, folder / name, **settings)
    return folder / name


def command(module, *arguments):
    module.main(list(map(str, arguments)))


def test_a_transcript_becomes_the_words_that_are_read_out():
    plain = "press one then star or pound that's all"
    assert plain_words("Press 1, then * or #: that's ALL.") == plain
    plain = "call forward on busy reenter it at three d"
    assert plain_words("Call-Forward on Busy. Re-enter 'it' at 3D") == plain
    assert plain_words("...") == ""


def test_drawn_sentences_are_of_the_vocabulary_and_never_a_test_sentence():
    text = Text(["go", "on", "now"], ["go on", "now go on"], ["go", "go on now", "now on"])
    drawn = {draw_sentence(text, random.Random(i)) for i in range(500)}
    everything = {draw_sentence(replace(text, held_out=[]), random.Random(i)) for i in range(500)}
    assert set(text.held_out) <= everything  # they would be drawn if they were not held out
    assert not drawn & set(text.held_out)
    assert {word for sentence in drawn for word in sentence.split()} == set(text.vocabulary)


def test_the_corpus_leaves_out_what_is_too_long_or_a_test_sentence(folder):
    out = make(folder)
    train = load_manifest(out / "asr_train.json")
    test = load_manifest(out / "asr_test.json")
    recorded = [item["transcription"] for item in train if item["dataset"] == "human"]
    # "one" is a test sentence, "go on" is too long.
    assert sorted(recorded) == sorted(3 * ["press one", "press star or pound", "reenter it"])
    assert [item["transcription"] for item in test] == ["one", "press it", "or one"]
    record = json.loads((out / "corpus.json").read_text())
    assert record["train_left_out"] == {"too long": 1, "a test sentence": 1}
    assert record["test_too_long"] == ["press one or reenter it for now"]
    assert record["vocabulary"] == 7


def test_no_test_sentence_is_in_the_training_text(folder):
    out = make(folder, spoken=60)
    said = {item["transcription"] for item in load_manifest(out / "asr_train.json")}
    text = Text(**json.loads((out / "text.json").read_text()))
    assert len(said) > 20 and text.held_out == ["one", "or one", "press it"]
    assert not (said | set(text.sentences)) & set(text.held_out)


def test_synthetic_clips_fit_the_window_and_do_not_depend_on_their_number(folder):
    few, many = (
        load_manifest(make(folder, f"corpus{n}", spoken=n) / "asr_train.json") for n in (4, 9)
    )
    assert all(soundfile.info(item["audio_filepath"]).duration <= SECONDS for item in many)
    for a, b in zip(few[:4], many):
        assert a["transcription"] == b["transcription"]
        samples = [soundfile.read(item["audio_filepath"])[0] for item in (a, b)]
        assert (samples[0] == samples[1]).all()


def test_a_finished_corpus_is_kept_and_another_left_alone(folder, capsys):
    manifest = make(folder) / "asr_train.json"
    before = manifest.stat().st_mtime_ns
    make(folder)
    assert manifest.stat().st_mtime_ns == before and "already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="another corpus"):
        make(folder, repeat=1)


def test_bad_folders_are_named(folder, monkeypatch):
    where = ["corpus", folder, "--out", folder / "corpus"]
    with pytest.raises(SystemExit, match="none of its 5 clips has 1 to 17 words in 0.1 s or less"):
        command(human, *where, "--seconds", 0.1)
    sentence = "press one or press star or press pound"
    monkeypatch.setattr(human, "draw_sentence", lambda text, rng: sentence)
    with pytest.raises(SystemExit, match="cannot say any of 200 sentences in 0.75 s; choose long"):
        command(human, *where, "--seconds", SECONDS, "--spoken", 1)
    (folder / "test.json").unlink()
    with pytest.raises(SystemExit, match="test.json: no such manifest"):
        command(human, *where)


def test_the_commands_fit_together_and_the_lm_reads_no_test_sentence(folder, toy_dirs, monkeypatch):
    for name, steps in (("NEXT_TOKEN", 2), ("DIFFUSION", 2), ("MORE", 1)):
        small = replace(getattr(pretrain_lm, name), steps=steps, batch=8)
        monkeypatch.setattr(pretrain_lm, name, small)
    monkeypatch.setattr(pretrain_lm, "ROUNDS", 1)
    monkeypatch.setattr(human_text, "N_COPIED", 4)
    monkeypatch.setattr(human_text, "LONGER", 1)
    taught = []
    encode = pretrain_lm.encode_answers

    def encode_and_note(tokenizer, answers, length):
        taught.extend(answers)
        return encode(tokenizer, answers, length)

    monkeypatch.setattr(pretrain_lm, "encode_answers", encode_and_note)
    run = folder / "run"
    make(folder, "run/corpus")
    command(human, "lm", "--run", run, "--device", "cpu")
    text = Text(**json.loads((run / "corpus/text.json").read_text()))
    assert len(taught) == 5 * 8 and not set(taught) & set(text.held_out)
    where = ["--whisper", toy_dirs["whisper"], "--llm", run / "llada", "--device", "cpu"]
    where += ["--train", run / "corpus/asr_train.json", "--out", run / "stage1"]
    command(train_asr, *where, "--audio-context", SECONDS + 0.01, "--steps", 2, "--batch", 4)
    command(human, "report", "--run", run, "--whisper", toy_dirs["whisper"], "--device", "cpu")
    report = json.loads((run / "report.json").read_text())
    assert [pair["target"] for pair in report["answers"]] == ["one", "press it", "or one"]
    assert report["items"] == 3 and report["whisper"] == str(toy_dirs["whisper"])
    # Each of the 7 words of the prompt that was too long counts as wrong.
    wrong = round(report["word_error_rate"] * 5 / 100)
    assert round(report["with_too_long"] * 12 / 100) == wrong + 7


def test_each_word_of_the_vocabulary_is_one_piece(tmp_path):
    text = Text(
        ["a", "i'm", "unconditional", "weasels", "o'clock", "mgcp", "we", "wednesday"], ["we"], []
    )
    tokenizer = human_text.train_word_tokenizer(tmp_path / "tokenizer.model", text)
    assert [len(tokenizer.encode(word)) for word in text.vocabulary] == [1] * 8
    assert tokenizer.decode(tokenizer.encode("weasels i'm a mgcp")) == "weasels i'm a mgcp"
