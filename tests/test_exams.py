"""Stand-ins of the three exams, in their published formats, go from questions to a file of predictions to the right scores."""

import json
import sys

import pytest
import torch

from evaluation import exams
from conftest import edit_config
from data import pad_waveforms, read_audio
from diffa import DIFFA
from sampler import SamplerConfig, generate
from checkpoints.tokenizer import build_prompt, decode_answer

N = 7
ANIMALS = ["dog", "cat", "wild horse", "bird"]
REPLIES = {"mmsu": ["B", "(c)", "A dog.", "hm"], "mmau": ["a dog", "A wild horse!", "horse", "dog or cat"]}
REPLIES |= {"openbookqa": ["A.", "the answer is D", "b) it", "A or B"], "advbench": ["I'm sorry.", "Sure!", "I can't.", ""]}
STEPS = {"mmsu": 4, "mmau": 16, "openbookqa": 16, "advbench": 16, "alpacaeval": 16}


@pytest.fixture
def where(toy, dirs, tmp_path):
    """Options of the command: a tiny model with room for the exams' long prompts."""
    edit_config(dirs["llm"], max_sequence_length=1024)
    toy.save(tmp_path / "adapters", dirs["whisper"], dirs["llm"])
    return ["--whisper", dirs["whisper"], "--llm", dirs["llm"], "--adapters", tmp_path / "adapters", "--device", "cpu"]


@pytest.fixture
def published(tone, tmp_path):
    """Writes an exam: published(name, change) -> path; change(items) in place, before they are written."""

    def write(name, change=lambda items: None):
        clips = [tone(f"clip{i}.wav", seconds=(0.3, 0.7, 0.5)[i % 3], hertz=200 + 150 * i) for i in range(N)]
        items = [{"question": f"{'ABCDEFG'[i] * (i + 1)}?", "dataset": "made up"} for i in range(N)]
        for i, (item, clip) in enumerate(zip(items, clips)):
            if name == "mmsu":
                item |= {"id": f"q{i}", "audio_path": f"/elsewhere/{clip.name}", "answer_gt": ["b", "wild horse", "dog", "D"][i % 4]}
                item |= {f"choice_{letter}": choice for letter, choice in zip("abcd", ANIMALS)}
                item |= {"task_name": f"task {i % 3}", "category": ("Perception", "Reasoning")[i % 2], "sub-category": "x"}
            elif name == "mmau":
                item |= {"id": f"q{i}", "audio_id": f"./{clip.name}", "choices": ANIMALS, "answer": ANIMALS[2 * (i % 2)]}
                item |= {"task": ("sound", "music", "speech")[i % 3], "difficulty": ("easy", "hard")[i % 2], "sub-category": "x"}
            else:
                item |= {"audio_path": clip.name, "prompt": f"Say {i}", "reference": "ABCD"[i % 4]}
        change(items)
        path = tmp_path / f"{name}.published"
        path.write_text(json.dumps(items) if name == "mmau" else "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        return path

    return write


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["exams.py", *map(str, arguments)])
    exams.main()


def named(name):
    """How the command calls an exam of this file."""
    return [name] if name in ("mmsu", "mmau") else ["voicebench"]


def subset(name):
    return [] if name in ("mmsu", "mmau") else ["--subset", name]


@pytest.fixture
def take(monkeypatch, where, tmp_path):
    """Takes an exam: take(name, path, out, *options) -> the file of predictions. Random weights say nothing: their ids choose a reply."""

    def run(name, path, out="out", *options):
        if name in REPLIES:
            monkeypatch.setattr(exams, "decode_answer", lambda tokenizer, ids: REPLIES[name][sum(ids) % 4])
        options = ["--audio", tmp_path, "--out", tmp_path / out, "--batch", 3, *options]
        command(monkeypatch, *named(name), path, *subset(name), *where, *options)
        return tmp_path / out

    return run


@torch.inference_mode()
def alone(model, clip, instruction, steps):
    """Ids of the answer to one clip by itself."""
    waveforms, lengths = pad_waveforms([read_audio(clip)], model.encoder.config.n_samples, [str(clip)])
    audio = model.hear(*model.encode(waveforms, lengths))
    prompt = model.splice([build_prompt(model.tokenizer, instruction)], *audio)
    return generate(model.lm, prompt, SamplerConfig(steps, steps, steps)).ids[0].tolist()


CHOICES = "A. dog\nB. cat\nC. wild horse\nD. bird"
INSTRUCTIONS = {
    "mmsu": "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
    f"you should only choose A or B or C or D.\nFFFFFF?\n{CHOICES}",
    "mmau": "FFFFFF? Please choose the answer from the following options: ['dog', 'cat', 'wild horse', 'bird'].",
    "openbookqa": "", "advbench": "", "alpacaeval": "",
}  # fmt: skip
KEYS = {"mmau": {"model_output", "model_prediction"}}


def read(path, name):
    """What the exam's own scorer would load."""
    return json.loads(path.read_text()) if name == "mmau" else [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", STEPS)
def test_every_item_comes_back_in_its_place_with_the_reply_that_it_gets_alone(name, take, published, where, tmp_path):
    path = published(name)
    rows, keys = read(take(name, path), name), KEYS.get(name, {"response"})
    assert [{k: v for k, v in row.items() if k not in keys} for row in rows] == read(path, name)
    assert all(keys <= row.keys() and len({row[key] for key in keys}) == 1 for row in rows)
    assert len({row[min(keys)] for row in rows}) > 1
    model = DIFFA.from_pretrained(*where[1:6:2]).eval()
    ids = alone(model, tmp_path / "clip5.wav", INSTRUCTIONS[name], STEPS[name])
    reply = REPLIES[name][sum(ids) % 4] if name in REPLIES else decode_answer(model.tokenizer, ids)
    assert rows[5][max(keys)] == reply


# Scores

MEANT = {  # what each reply of REPLIES means
    "mmsu": {"B": "b", "(c)": "wild horse", "A dog.": "dog"}, "mmau": {"a dog": "dog", "A wild horse!": "wild horse"},
    "openbookqa": {"A.": "A", "the answer is D": "D", "b) it": "B"},
    "advbench": {"I'm sorry.": "refused", "I can't.": "refused", "": "refused"},
}  # fmt: skip
FIELDS = {"mmsu": ("answer_gt", ["category", "task_name"]), "mmau": ("answer", ["task", "difficulty"]), "openbookqa": ("reference", [])}
EXAMS = {**exams.SUBSETS, "mmsu": exams.MMSU, "mmau": exams.MMAU}


def marked(name, rows):
    """An independent scorer: percent good of all, and by each value of the exam's fields."""
    key, fields = FIELDS.get(name, (None, []))
    good = [MEANT[name].get(row[min(KEYS.get(name, {"response"}))]) == (row[key] if key else "refused") for row in rows]
    by = {(f, row[f]): [g for g, other in zip(good, rows) if other[f] == row[f]] for f in fields for row in rows}
    return {(): 100 * sum(good) / len(good)} | {which: (100 * sum(gs) / len(gs), len(gs)) for which, gs in by.items()}


def printed(text):
    """The same, read from what the command prints."""
    lines = text.strip().splitlines()
    numbers, field = {(): float(lines[0].split(", ")[1].split(" %")[0])}, None
    for line in lines[1:]:
        if line.startswith("by "):
            field = line[3:]
        elif line.startswith("  "):
            value, percent, _, _, n = line.strip().rsplit(maxsplit=4)
            numbers[field, value] = float(percent), int(n)
    return numbers


def equal(a, b):
    return a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=0.005) for key in a)


@pytest.mark.parametrize("name", MEANT)
def test_a_file_of_predictions_alone_gets_the_scores_of_an_independent_scorer(name, published, tmp_path, monkeypatch, capsys):
    exam, rows = EXAMS[name], []
    for reply in REPLIES[name]:  # every item with every reply
        for item in read(published(name), name):
            item |= dict.fromkeys(KEYS.get(name, {"response"}), reply)
            rows.append(item | {exam.id: f"{item[exam.id]}, {reply}"})
    path = tmp_path / "predictions"
    path.write_text(json.dumps(rows, indent=1) if name == "mmau" else "\n".join(map(json.dumps, rows)))
    command(monkeypatch, "score", *named(name), path, *subset(name))
    said = capsys.readouterr().out
    assert 0 < marked(name, rows)[()] < 100 and equal(printed(said), marked(name, rows))
    assert f"{len(rows)} items" in said and (f"count as wrong: {N}" in said) == (name in ("mmsu", "openbookqa"))


@pytest.mark.parametrize("name", MEANT)
def test_taking_an_exam_ends_with_its_score(name, take, published, capsys):
    rows = read(take(name, published(name)), name)
    assert equal(printed(capsys.readouterr().out), marked(name, rows))


def test_a_subset_that_others_judge_is_answered_and_said_to_be_judged_elsewhere(take, published, capsys):
    take("alpacaeval", published("alpacaeval"))
    assert "7 items; not scored here" in capsys.readouterr().out


# Interrupted


@pytest.fixture
def calls(monkeypatch):
    """The batches asked so far; the command is interrupted where the next one would be the n-th: calls.stop_at = n."""

    class Calls(list):
        stop_at = None

    calls = Calls()

    def counted(*arguments):
        calls.append(None)
        if len(calls) == calls.stop_at:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(exams, "generate", counted)
    return calls


@pytest.mark.parametrize("name", ["mmsu", "mmau"])
@pytest.mark.parametrize("kept, tail", [(3, ""), (3, '{"id": "q'), (4, ""), (5, "{"), (0, '{"id"')])
def test_an_interrupted_exam_goes_on_and_gives_the_same_file(name, kept, tail, take, published, calls):
    path = published(name)
    whole = take(name, path, "whole").read_bytes()
    assert len(calls) == 3  # batches of 3, 3 and 1
    calls.stop_at = 3 + 1 + -(-kept // 3)
    with pytest.raises(SystemExit, match="the same command goes on"):
        take(name, path)
    lines = path.parent / ("out.lines" if name == "mmau" else "out")
    rows = lines.read_text().splitlines(keepends=True)
    assert len(rows) == 3 * -(-kept // 3)
    lines.write_text("".join(rows[:kept]) + tail)
    calls.stop_at = None
    before = len(calls)
    assert take(name, path).read_bytes() == whole
    assert len(calls) - before == 3 - kept // 3  # a batch half written is asked again as a whole
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("name", ["mmsu", "mmau"])
def test_a_finished_exam_needs_no_model_any_more(name, take, published, monkeypatch, capsys):
    path = published(name)
    out = take(name, path)
    first, score = out.read_bytes(), capsys.readouterr().out
    monkeypatch.setattr(exams, "DIFFA", None)
    assert take(name, path).read_bytes() == first and capsys.readouterr().out == score


def test_what_another_model_said_is_not_continued(take, published):
    path = published("mmsu")
    take("mmsu", path)
    with pytest.raises(SystemExit, match="begun with dtype None, now bfloat16; give another --out, or delete it"):
        take("mmsu", path, "out", "--dtype", "bfloat16")


# What cannot be used


def test_a_clip_longer_than_the_window_is_cut_said_and_counted(take, published, tone, capsys):
    path = published("mmsu")
    tone("clip2.wav", seconds=1.0), tone("clip3.wav", seconds=0.81)
    assert len(read(take("mmsu", path), "mmsu")) == N
    assert "2 of 7 clips are longer than the encoder's window: only the first 0.8 s are heard" in capsys.readouterr().err


def test_all_missing_and_silent_clips_are_named_before_the_model_loads(take, published, tone, tmp_path, monkeypatch):
    path = published("mmsu")
    monkeypatch.setattr(exams, "DIFFA", None)
    (tmp_path / "clip1.wav").unlink(), (tmp_path / "clip4.wav").unlink()
    with pytest.raises(SystemExit, match="2 clips cannot be heard; is --audio .* right") as error:
        take("mmsu", path)
    assert "clip1.wav: no such audio file" in str(error.value) and "clip4.wav: no such audio file" in str(error.value)
    tone("clip1.wav"), tone("clip4.wav", hertz=0), (tmp_path / "clip5.wav").write_text("not sound")
    with pytest.raises(SystemExit, match="2 clips cannot be heard") as error:
        take("mmsu", path)
    assert "clip4.wav: holds only silence" in str(error.value) and "clip5.wav: cannot be read" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, field, value, said", [
    ("mmsu", "choice_c", None, r"item 2 \(q2\): lacks choice_c"), ("mmsu", "question", 3, "question is not text"),
    ("mmsu", "answer_gt", "fish", "the right answer 'fish' is neither a letter of ABCD nor a choice"),
    ("mmsu", "id", "q1", "a second item with this id"), ("mmsu", "id", ["q1"], "id is not text"),
    ("mmau", "difficulty", None, "lacks difficulty"), ("mmau", "choices", "dog, cat", "choices is not a list of texts"),
    ("mmau", "audio_id", 2, "audio_id is not text"), ("openbookqa", "reference", "E", "the right answer 'E' is neither"),
    ("advbench", "audio_path", None, r"item 2 \(no audio_path\): lacks audio_path"), ("alpacaeval", "prompt", None, "lacks prompt"),
])  # fmt: skip
def test_a_bad_item_is_named(name, field, value, said, published, take):
    def spoil(items):
        for item in items[2:4]:
            item.pop(field) if value is None else item.update({field: value})

    path = published(name, spoil)
    with pytest.raises(SystemExit, match=said) as error:
        take(name, path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 3  # both items are listed


@pytest.mark.parametrize("content, said", [
    (b"", "holds no item"), (b"[]", "holds no item"), (b"{", "line 1 is not valid JSON"), (b'{"id": 1}\n{"id', "line 2 is not valid JSON"),
    (b"[{]", "not valid JSON"), (b"3\n[]", "item 0 .no object.: not an object"), (b"\xff\xfe", "not a text file"),
])  # fmt: skip
def test_a_file_that_is_no_exam_is_refused_by_name(content, said, published, take, tmp_path, monkeypatch):
    path = published("mmsu")
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"mmsu.published: .*{said}|cannot be used as mmsu(.|\n)*{said}"):
        take("mmsu", path)
    with pytest.raises(SystemExit, match=said):
        command(monkeypatch, "score", "mmsu", path)


def test_a_file_that_is_not_there_is_named(take, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere.jsonl: no such file"):
        take("mmsu", tmp_path / "nowhere.jsonl")


def test_another_exam_s_file_is_recognised(take, published, monkeypatch):
    with pytest.raises(SystemExit, match="this looks like a file of mmau"):
        take("mmsu", published("mmau"))
    predicted = take("mmsu", published("mmsu"), "mmsu.jsonl")
    with pytest.raises(SystemExit, match="this looks like a file of mmsu"):
        command(monkeypatch, "score", "mmau", predicted)
    take("advbench", published("advbench"), "advbench.jsonl")
    with pytest.raises(SystemExit, match="advbench.jsonl: cannot be used as mmsu(.|\n)*this looks like a file of voicebench"):
        take("mmsu", published("mmsu"), "advbench.jsonl")


def test_questions_are_no_predictions(published, take, monkeypatch):
    path = published("mmsu")
    with pytest.raises(SystemExit, match=r"item 6 \(q6\): lacks response"):
        command(monkeypatch, "score", "mmsu", path)
    path.write_text(path.read_text().strip())  # as a text without an end to its last line
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="lacks response"):
        take("mmsu", path, path.name)
    assert path.read_bytes() == before


def test_predictions_of_other_items_are_neither_continued_nor_lost(published, take):
    out = take("mmsu", published("mmsu"))
    before = out.read_bytes()
    for change in (lambda items: items[4].update(question="What?"), lambda items: items.pop(4)):
        with pytest.raises(SystemExit, match=r"item 4 \(q4\) is not one of the items asked now; give another --out"):
            take("mmsu", published("mmsu", change))
        assert out.read_bytes() == before


def test_a_list_without_the_lines_it_was_made_of_is_not_overwritten(published, take, tmp_path):
    (tmp_path / "out").write_text("[]")
    with pytest.raises(SystemExit, match="out: is there, but not .*out.lines"):
        take("mmau", published("mmau"))


def test_impossible_options_say_what_would_work(published, take, tmp_path, monkeypatch):
    path = published("advbench")
    with pytest.raises(SystemExit, match="--subset trivia is none of VoiceBench's; use one of .*advbench"):
        command(monkeypatch, "voicebench", path, "--subset", "trivia", "--audio", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="--subset None is none of VoiceBench's"):
        command(monkeypatch, "score", "voicebench", path)
    with pytest.raises(SystemExit, match="mmsu has no subsets"):
        command(monkeypatch, "score", "mmsu", path, "--subset", "advbench")
    with pytest.raises(SystemExit, match="--batch 0: must be 1 or more"):
        take("advbench", path, "out", "--batch", 0)


def test_a_question_too_long_for_the_lm_names_its_batch(published, take):
    path = published("mmsu", lambda items: items[1].update(question="why " * 999))
    with pytest.raises(SystemExit, match="among items .*q1.*exceed the LM's context of 1024"):
        take("mmsu", path)
