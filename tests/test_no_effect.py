"""What asks nothing, counts twice or has no effect is refused before anything is loaded."""

import json
import sys
from pathlib import Path

import pytest

import train_asr
import train_instruct
from checkpoints.files import WeightsError, read_sentences
from corpora import texts
from data import ManifestError
from evaluation import ask, exams, likelihood, no_speech, transcribe
from evaluation.clips import answer_clips, find_questions
from evaluation.exam_files import load_items
from evaluation.exam_rules import MMAU
from lab import gpu
from toy import evaluate, read_aloud
from training import adapt_lm, align, preference

STAGE1 = Path(__file__).parent.parent / "toy/weights/stage1"


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(main, *words): what a command says that ends with an error."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code not in (0, None)
        return f"{ended.value.code} {capsys.readouterr().err}"

    return run


@pytest.mark.parametrize("blank", ["", " \n", "\u200b", "\u2028\ufeff"])
def test_an_empty_question_is_no_question(refused, toy, tone, tmp_path, blank):
    assert "question is empty" in refused(ask.main, tone(), blank)
    assert "question is empty" in refused(ask.main, tone(), "What?", "--also", blank)
    words = ("--out", tmp_path / "out.jsonl", "--question", blank)
    assert "question is empty" in refused(no_speech.main, *words)
    with pytest.raises(ValueError, match="a question is empty"):
        answer_clips(toy, [tone(), tone()], ["What?", blank])


def item(clip, **fields):
    names = "audio_id input transcription target dataset seed_transcript".split()
    return dict.fromkeys(names, "x") | {"audio_filepath": str(clip), "duration": 0.5} | fields


def test_an_item_without_a_question_and_a_clip_with_two_transcripts_are_errors(tone, tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps([item(tone(), input=" ")]))
    with pytest.raises(ValueError, match="`input` of an item is empty"):
        find_questions([str(manifest)], ["-"])
    manifest.write_text(json.dumps([item(tone()), item(tone(), transcription="y")]))
    with pytest.raises(ManifestError, match="two transcripts, 'x' and 'y'"):
        transcribe.clips_of([manifest])


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--append"], "--append does nothing"),
        (["--cache", "dual", "--refresh", 2], "--refresh does nothing"),
        (["--append", "--length", 8, "--block-length", 8], "--append does nothing"),
        (["--trace", "CLIP"], "is read by this command"),
        (["--seed", 5], "--seed does nothing"),
        (["--batch", 4], "--batch does nothing"),
    ],
)
def test_an_option_of_the_sampler_that_does_nothing_is_refused(refused, tone, words, problem):
    clip = tone()
    words = [clip if word == "CLIP" else word for word in words]
    assert problem in refused(ask.main, clip, "What?", *words)


@pytest.mark.parametrize(
    "main, words, problem",
    [
        (align.main, ["--train", "m.json", "--t-min", 0.5], "--t-min has no effect"),
        (align.main, ["--train", "m.json", "--recompute"], "--recompute has no effect"),
        (adapt_lm.main, [*"--lm a --text b --out c --validate-every 5".split()], "no effect"),
        (adapt_lm.main, [*"--lm a --text b --out c --validation-items 5".split()], "no effect"),
        (adapt_lm.main, [*"--lm a --text b --out ./a".split()], "would be overwritten"),
        (texts.main, [*"o/train.txt --out o".split()], "would be overwritten by --out o"),
        (train_asr.main, ["--no-lora"], "--no-lora has no effect without --adapters"),
        (train_asr.main, ["--force-parts"], "--force-parts has no effect without --adapters"),
        (train_instruct.main, [*"--adapters a --out ./a".split()], "would be overwritten"),
        (train_asr.main, ["--out", STAGE1], "stage1 holds adapters, but no run to resume"),
        (train_asr.main, ["--out", STAGE1.parent / "llada"], "llada holds a model"),
        (read_aloud.main, [*"a b --out c --repeat 2".split()], "--repeat has no effect"),
        (evaluate.main, ["--compare", "a", "b", "--check"], "--check has no effect"),
        (evaluate.main, ["--compare", "a", "b", "--summary", "a"], "not allowed with"),
        (gpu.main, ["--tiny", "--out", "none/x.md"], "make it first"),
        (gpu.main, ["--tiny", "--out", "x.json"], "the report is Markdown"),
        (train_instruct.main, ["--lora", 10**7], "from 1 to 4096"),
        (preference.main, ["--samples", 10**20], "from 1 to 1024"),
        (no_speech.main, ["--out", "o", "--clips", 10**10], "from 1 to 10000"),
        (no_speech.main, ["--out", "o", "--longest", 0.1], "from 0.5 to 3600"),
        (likelihood.main, ["a", "--batch", 10**20], "a whole number from 1 to"),
    ],
)
def test_an_option_without_effect_or_beyond_reason_is_refused(
    refused, tmp_path, monkeypatch, main, words, problem
):
    monkeypatch.chdir(tmp_path)
    assert problem in refused(main, *words)


def test_texts_of_lines_without_a_word_are_refused_and_u2028_ends_no_line(refused, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes("\ufeffone\u2028two\r\n\n?!\nthree\x85four".encode())
    assert read_sentences(text) == ["one\u2028two", "three\x85four"]

    blank = tmp_path / "blank.txt"
    for content in ("", " \n\n", "?!\n..."):
        blank.write_text(content)
        with pytest.raises(WeightsError, match="blank.txt: no line of text"):
            read_sentences(blank)
        assert "no line" in refused(read_aloud.main, text, blank, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    blank.write_text(" \n")
    assert "holds no text" in refused(likelihood.main, blank)


def test_no_prediction_is_scored_twice_and_no_prompt_asks_nothing(refused, tmp_path):
    choices = {"choice_a": "dog", "choice_b": "cat"}
    row = {"id": "q0", "audio_path": "0.wav", "question": "?", "answer_gt": "dog"} | choices
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, reply in zip(files, "AB"):
        file.write_text(json.dumps(row | {"response": reply}) + "\n")
    assert "id q0 is also in" in refused(exams.main, "score", "mmsu", *files)
    assert "is also in" in refused(exams.main, "score", "mmsu", files[0], files[0])

    prompt = tmp_path / "prompt.txt"
    for text in ("", " \n", "Choose one."):
        prompt.write_text(text)
        words = ("mmsu", files[0], "--audio", tmp_path, "--out", tmp_path / "o", "--prompt", prompt)
        assert "prompt.txt: asks nothing" in refused(exams.main, *words)

    row = {"id": "m0", "audio_id": "0.wav", "question": "?", "choices": [], "answer": "dog"}
    files[0].write_text(json.dumps([row]))
    with pytest.raises(exams.ExamError, match="has no choice"):
        load_items(files[0], MMAU)
