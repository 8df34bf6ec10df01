"""Targets from seed transcripts, in the paper's three ways, and what is dropped on the way."""

import functools
import json
import os
import sys

import pytest

from checkpoints.chats import TURN_END
from corpora import targets
from data import TEXT_END, load_manifest
from diffa import DIFFA
from sampler import SamplerConfig, answer, generate

ANSWER = "A woman says that two red birds sing."


@pytest.fixture
def manifest(tone, tmp_path):
    item = {
        "input": "",
        "transcription": "",
        "target": "",
        "dataset": "tones",
        "duration": 0.5,
        "audio_filepath": tone().name,
    }
    items = [
        item
        | {"audio_id": f"clip{i}", "seed_transcript": f"[00:00:00 - 00:00:01] two birds (Age: {i})"}
        for i in range(6)
    ]
    (tmp_path / "m.json").write_text(json.dumps(items))
    return tmp_path / "m.json"


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["targets", *map(str, arguments)])
    targets.main()


def answers_file(tmp_path, answers):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"clip{i}", "answer": answer}) + "\n" for i, answer in answers.items()
        )
    )
    return path


@pytest.mark.parametrize("answer, problem", [
    (ANSWER, ""), ("Yes.", ""), ("A man asks: \"Why?\"", ""),
    ("", "empty"), (" ...\n", "empty"),
    ("A woman says that two red", "truncated"),
    ("It is very very very very loud.", "repeating"),
    ("He says that he says that he says that he is late.", "repeating"),
    ("A man says that he is tired. Later the man says that he is well.", ""),
])  # fmt: skip
def test_filters(answer, problem):
    assert targets.target_problem(answer) == problem


def test_a_model_s_own_end_decides_whether_an_answer_is_cut_off():
    assert (
        targets.target_problem("two red birds", cut_off=False) == ""
        and targets.target_problem(ANSWER, cut_off=True) == "truncated"
    )


def test_prompts_hold_the_seed_transcript_and_the_question(manifest, tmp_path, monkeypatch):
    command(monkeypatch, "prompts", manifest, "--out", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"clip{i}" for i in range(6)]
    assert "two birds (Age: 3)" in rows[3]["prompt"] and rows[3]["prompt"].endswith(
        targets.QUESTION
    )


def test_external_answers_become_targets_and_the_rest_is_counted(
    manifest, tmp_path, monkeypatch, capsys
):
    bad = {1: "", 2: "A woman says", 3: "no no no no no."}
    command(
        monkeypatch,
        "external",
        manifest,
        "--answers",
        answers_file(tmp_path, {0: f" {ANSWER}\n", 5: ANSWER, **bad}),
        "--out",
        tmp_path / "t.json",
    )
    items = load_manifest(tmp_path / "t.json")
    assert [(i["audio_id"], i["input"], i["target"]) for i in items] == [
        (n, targets.QUESTION, ANSWER) for n in ("clip0", "clip5")
    ]
    printed = capsys.readouterr().out
    assert "2 items" in printed and all(
        f"1 {why}" in printed for why in ("empty", "truncated", "repeating", "without an answer")
    )


def test_an_id_is_that_of_one_clip(manifest, tmp_path, monkeypatch, capsys):
    items = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([*items, items[0] | {"input": "Another question?"}]))
    answers = answers_file(tmp_path, {i: ANSWER for i in range(6)})
    command(monkeypatch, "external", manifest, "--answers", answers, "--out", tmp_path / "t.json")
    assert "7 items about 6 clips" in capsys.readouterr().out
    assert len(load_manifest(tmp_path / "t.json")) == 6

    manifest.write_text(json.dumps([*items, items[0] | {"seed_transcript": "three birds"}]))
    with pytest.raises(SystemExit, match="audio_id 'clip0' has two of seed_transcript, .*three"):
        command(monkeypatch, "prompts", manifest, "--out", tmp_path / "p.jsonl")


def test_when_no_answer_can_be_used_nothing_is_written(manifest, tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match="no item has a usable answer; dropped: 1 empty, 5 without an answer"
    ):
        command(
            monkeypatch,
            "external",
            manifest,
            "--answers",
            answers_file(tmp_path, {0: ""}),
            "--out",
            tmp_path / "t.json",
        )
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "clip0"}', '{"id": "clip0", "answer": 3}'])
def test_a_bad_line_of_answers_is_named(manifest, tmp_path, monkeypatch, line):
    (tmp_path / "a.jsonl").write_text(f'{{"id": "clip1", "answer": "Yes."}}\n\n{line}\n')
    with pytest.raises(SystemExit, match="a.jsonl: line 3 is not"):
        command(
            monkeypatch,
            "external",
            manifest,
            "--answers",
            tmp_path / "a.jsonl",
            "--out",
            tmp_path / "t.json",
        )


@pytest.mark.parametrize("way", ["self", "rewrite"])
def test_the_lm_answers_each_item_through_the_sampler(
    manifest, tmp_path, monkeypatch, toy_dirs, way, capsys
):
    asked = []
    tokenizer = DIFFA.from_pretrained(**toy_dirs).tokenizer

    def decode(lm, prompt, config, on_step=None):
        asked.append(prompt)
        out = generate(lm, prompt, config, on_step)
        out.ids = out.ids.clone()
        for marker in (TEXT_END, TURN_END):
            out.ids[out.ids == tokenizer.id(marker)] = tokenizer.encode("birds")[-1]
        out.ids[0, -1] = lm.config.end_id  # as if the LM had ended the first answer, and only that
        return out

    monkeypatch.setattr(targets, "answer", functools.partial(answer, decode=decode))
    (
        monkeypatch.setattr(targets, "ASK", "{seed} {question}"),
        monkeypatch.setattr(targets, "REWRITE", "{seed} {question} {answer}"),
    )
    given = (
        ["--answers", answers_file(tmp_path, {i: ANSWER for i in range(5)})]
        if way == "rewrite"
        else []
    )
    options = [
        "--llm",
        toy_dirs["llm"],
        "--length",
        6,
        "--batch",
        2,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--question",
        "Who?",
    ]
    command(monkeypatch, way, manifest, *given, *options, "--out", tmp_path / "t.json")
    items = load_manifest(tmp_path / "t.json")
    assert [i["audio_id"] for i in items] == [
        "clip0",
        "clip2",
        "clip4",
    ]  # the first of each batch; the others were cut off
    assert all(item["target"] and item["input"] == "Who?" for item in items) and len(asked) == 3
    assert ("1 without an answer" in capsys.readouterr().out) == (way == "rewrite")


def test_an_answer_does_not_depend_on_its_neighbours(toy):
    config = SamplerConfig(length=6, block_length=6, steps=6)
    texts = {"a": "two birds", "b": "What is said? two red birds sing", "c": "sing"}
    together = targets.lm_answers(toy.lm, toy.tokenizer, texts, config, batch=3)
    alone = targets.lm_answers(toy.lm, toy.tokenizer, texts, config, batch=1)
    assert together == alone


def test_a_text_that_is_too_long_for_the_lm_is_left_out_and_counted(toy, capsys):
    config = SamplerConfig(length=6)
    texts = {"a": "two birds", "b": "sing " * 300}
    assert targets.lm_answers(toy.lm, toy.tokenizer, texts, config, batch=2).keys() == {"a"}
    assert "1 of 2 prompts are longer than the 250 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exceed the LM's context of 256"):
        targets.lm_answers(toy.lm, toy.tokenizer, {"b": texts["b"]}, config, batch=2)


# ---- damaged and odd files
def test_answers_keep_every_character_after_a_byte_order_mark(manifest, tmp_path, monkeypatch):
    answer = "A caf\u00e9 \u2028 opens \u2029 at \x85 six."
    row = json.dumps({"id": "clip1", "answer": answer}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n".encode())
    files = ["--answers", tmp_path / "a.jsonl", "--out", tmp_path / "t.json"]
    command(monkeypatch, "external", manifest, *files)
    assert [item["target"] for item in load_manifest(tmp_path / "t.json")] == [answer]


@pytest.mark.parametrize("content, problem", [
    (b'{"id": "a", "answer": "Yes."}\n{"id": "a", "answer": "No."}', "line 2 is a second"),
    (b"[" * 10**5, "line 1 is not"),
    (b'{"id": ' + b"1" * 5000 + b"}", "line 1 is not"),
    (b'{"id": [], "answer": "Yes."}', "line 1 is not"),
    (b'{"id": "a", "answer": null}', "line 1 is not"),
    (b'{"id": "a", "answer": "\\ud83d."}', "line 1 is not"),
    (b"\xff\xfe\x00", "not UTF-8 text"),
    (None, "not a file"),
])  # fmt: skip
def test_answers_that_cannot_be_used_are_named(manifest, tmp_path, monkeypatch, content, problem):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"a.jsonl: {problem}"):
        command(monkeypatch, "external", manifest, "--answers", path, "--out", tmp_path / "t.json")


def test_what_cannot_work_is_known_before_the_lm_loads(manifest, tmp_path, monkeypatch, capsys):
    def load(*arguments):
        raise AssertionError("an LM is loaded")

    monkeypatch.setattr(targets, "load_lm", load)
    before = manifest.read_bytes()
    empty = answers_file(tmp_path, {0: ""})
    options = ["--llm", tmp_path, "--answers", empty]
    (tmp_path / "folder").mkdir()
    for out, problem in (
        (manifest, "is read by this command; give another file"),
        (empty, "is read by this command; give another file"),
        (tmp_path / "folder", "cannot be saved"),
        (manifest / "t.json", "File exists|Not a directory"),
        (tmp_path / "t.json", "no item has a usable answer; dropped: 1 empty"),
    ):
        with pytest.raises(SystemExit, match=problem):
            command(monkeypatch, "rewrite", manifest, *options, "--out", out)
    assert manifest.read_bytes() == before
    for option in ("--length", "--batch"):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, "rewrite", manifest, *options, "--out", out, option, "0")
        assert "must be a whole number of 1 or more" in capsys.readouterr().err
