"""Many clips: which are found, their answers in Python and in a file that resumes."""

import json
import shutil
import sys

import pytest
from conftest import SHAPES

import sampler
from checkpoints.model import save_trained
from corpora.manifests import write_manifest
from data import AudioError, build_prompt, decode_answer, read_audio
from diffa import DIFFA, splice
from evaluation import ask
from evaluation.clips import Question, find_questions, hear_clips
from sampler import SamplerConfig, generate


@pytest.fixture
def clips(tone):
    """Three clips of different lengths."""
    return [tone(f"{i}.wav", 0.3 + 0.1 * i, 200 + 90 * i) for i in range(3)]


def alone(model, waveform, question, **settings):
    """What `generate` answers about one clip by itself."""
    prompt = build_prompt(model.tokenizer, question)
    spliced = splice(model.lm, [prompt], *hear_clips(model, [waveform], ["clip"]))
    out = generate(model.lm, spliced, SamplerConfig(**settings))
    return decode_answer(model.tokenizer, out.ids[0].tolist())


# In Python


def test_a_model_answers_paths_and_waveforms_as_each_alone(toy, clips):
    waveforms = [read_audio(clip) for clip in clips]
    questions = ["What is said?", "Repeat what is said.", "Is it loud?"]
    settings = {"length": 6, "rule": "threshold"}
    expected = [alone(toy, w, q, **settings) for w, q in zip(waveforms, questions)]
    assert len(set(expected)) > 1
    mixed = [clips[0], waveforms[1], str(clips[2])]
    assert toy.answer(mixed, questions, length=6, batch=2) == expected
    assert toy.answer(clips[1], questions[1], length=6) == [expected[1]]


def test_a_setting_chooses_its_rule_and_the_adapters_the_length(toy, clips, monkeypatch):
    used = []

    def decode(lm, prompt, config, on_step):
        used.append(config)
        return generate(lm, prompt, config)

    monkeypatch.setitem(sampler.answer.__kwdefaults__, "decode", decode)
    toy.answer_length = 5
    toy.answer(clips[0], "What?", steps=2)
    toy.answer(clips[0], "What?")
    assert [(c.rule, c.steps, c.length) for c in used] == [("count", 2, 5), ("threshold", 5, 5)]


def test_what_cannot_be_answered_is_named(toy, clips, tone):
    with pytest.raises(ValueError, match="3 clips and 2 questions"):
        toy.answer(clips, ["a", "b"])
    with pytest.raises(AudioError, match="long.wav: 1.00 s is longer"):
        toy.answer([clips[0], tone("long.wav", 1.0)], "What is said?", length=4)
    with pytest.raises(AudioError, match="no such audio file"):
        toy.answer("nowhere.wav", "What?")


def test_a_loaded_model_is_ready_to_answer(toy_dirs):
    model = DIFFA.from_pretrained(**toy_dirs, stage="stage2", **SHAPES, dropout=0.5)
    assert not any(part.training for part in model.modules())


# Which clips


def item(clip, question):
    fields = ("audio_id", "transcription", "target", "dataset", "seed_transcript")
    known = dict.fromkeys(fields, "x") | {"duration": 0.3}
    return known | {"audio_filepath": clip.name, "input": question}


def test_files_folders_and_manifests_become_questions_once(clips, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio")
    every = [Question(str(clip), "What?") for clip in clips]
    assert find_questions([str(tmp_path), str(clips[1])], ["What?"]) == every
    write_manifest(tmp_path / "m.json", [item(clips[2], "Who?"), item(clips[0], "Where?")])
    own = [Question(str(clips[2]), "Who?"), Question(str(clips[0]), "Where?")]
    assert find_questions([str(tmp_path / "m.json")], ["-"]) == own
    assert len(find_questions([str(tmp_path / "m.json")], ["-", "What?"])) == 4


def test_a_folder_without_clips_and_a_question_of_no_manifest_are_errors(clips, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no audio file"):
        find_questions([str(tmp_path / "empty")], ["What?"])
    with pytest.raises(ValueError, match="'-' asks a manifest's questions"):
        find_questions([str(clips[0])], ["-"])


# The command


@pytest.fixture
def command(toy, toy_dirs, tmp_path, monkeypatch):
    """command(*words) runs sampler.py on the toy."""
    save_trained(toy, tmp_path / "adapters", toy_dirs["whisper"], toy_dirs["llm"], answer_length=6)

    def run(*words):
        places = ["--adapters", tmp_path / "adapters", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sampler.py", *map(str, [*words, *places])])
        ask.main()

    return run


def test_several_questions_about_several_clips_take_one_process(toy, command, clips, capsys):
    command(*clips, "What is said?", "--also", "Is it loud?")
    printed = capsys.readouterr()
    settings = {"length": 6, "rule": "threshold"}
    answers = [
        alone(toy, read_audio(clip), question, **settings)
        for clip in clips
        for question in ("What is said?", "Is it loud?")
    ]
    assert printed.out == "".join(f"{text}\n" for text in answers)
    assert f"{clips[2]}: Is it loud?" in printed.err
    command(*clips, "What is said?", "--also", "Is it loud?", "--quiet")
    assert capsys.readouterr().out == printed.out


def test_answers_are_written_as_json_lines_and_a_stopped_command_resumes(
    toy, command, clips, tmp_path, monkeypatch
):
    out = tmp_path / "answers.jsonl"
    words = (tmp_path, "What is said?", "--out", out, "--batch", 2)
    command(*words)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["clip"] for row in rows] == list(map(str, clips))
    assert [row["answer"] for row in rows] == toy.answer(clips, "What is said?", length=6)

    # A kill within the second line; nothing is loaded once all is answered.
    whole = out.read_text()
    out.write_text(whole[: whole.index("\n") + 20])
    command(*words)
    assert out.read_text() == whole
    monkeypatch.setattr(DIFFA, "from_pretrained", None)
    command(*words)

    with pytest.raises(SystemExit, match="begun with threshold None, now 0.5"):
        command(*words, "--threshold", 0.5)


def test_a_clip_that_cannot_be_read_costs_only_itself_and_the_exit_code(command, clips, tmp_path):
    clips[1].write_text("no audio")
    out = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit, match="1 clips could not be read: see `error`"):
        command(*clips, "What is said?", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["answer" in row for row in rows] == [True, False, True]
    assert "1.wav" in rows[1]["error"]


def test_what_does_not_go_together_is_refused_before_weights_are_read(
    command, clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(DIFFA, "from_pretrained", None)
    trace = tmp_path / "t.html"
    with pytest.raises(SystemExit, match="--trace shows one answer, and 2 are asked for"):
        command(*clips[:2], "What?", "--trace", trace)
    with pytest.raises(SystemExit, match="--trace and --out exclude each other"):
        command(clips[0], "What?", "--trace", trace, "--out", tmp_path / "o.jsonl")
    with pytest.raises(SystemExit, match="gone.wav: no such audio file"):
        command(clips[0], tmp_path / "gone.wav", "What?", "--out", tmp_path / "o.jsonl")


# The bundled weights


def test_bundled_weights_answer_only_where_no_run_is_and_none_is_named(
    toy, toy_dirs, clips, tmp_path, monkeypatch, capsys
):
    save_trained(toy, tmp_path / "bundled", toy_dirs["whisper"], toy_dirs["llm"], answer_length=6)
    monkeypatch.setattr(ask, "BUNDLED", tmp_path / "bundled")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*options):
        words = ["sampler.py", str(clips[0]), "What is said?", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", words)
        ask.main()
        return capsys.readouterr().err

    assert "the bundled toy/weights answer" in run()
    with pytest.raises(SystemExit, match="runs/toy/stage2"):
        run("--adapters", "runs/toy/stage2")
    shutil.copytree(tmp_path / "bundled", "runs/toy/stage2")
    assert "bundled" not in run()
