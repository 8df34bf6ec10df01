"""Small exams in the three published formats, from questions to predictions to correct scores."""

import hashlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import damage_norms, edit_config, edit_tensors

from checkpoints.model import load_diffa, save_trained
from data import build_prompt, decode_answer, pad_waveforms, read_audio
from diffa import splice
from evaluation import exam_answers, exam_clips, exams
from evaluation.exam_rules import MMAU, MMSU, SUBSETS
from evaluation.likelihood import confidence_scores
from sampler import SamplerConfig, answer, generate

N = 7
BATCH = 3
NULL = object()  # stands for JSON's null
ANIMALS = ["dog", "cat", "wild horse", "bird"]
REPLIES = {
    "mmsu": ["B", "(c)", "A dog.", "hm"],
    "mmau": ["a dog", "A wild horse!", "horse", "dog or cat"],
    "openbookqa": ["A.", "the answer is D", "b) it", "A or B"],
    "advbench": ["I'm sorry.", "Sure!", "I can't.", ""],
}
STEPS = {"mmsu": 4, "mmau": 16, "openbookqa": 16, "advbench": 16, "alpacaeval": 16}
REPLY_FIELDS = {"mmau": {"model_output", "model_prediction"}}


@pytest.fixture
def model_options(toy, dirs, tmp_path):
    """Options of the command: a tiny model with room for the exams' long prompts."""
    edit_config(dirs["llm"], max_sequence_length=1024)
    save_trained(toy, tmp_path / "adapters", dirs["whisper"], dirs["llm"])
    paths = ["--whisper", dirs["whisper"], "--llm", dirs["llm"]]
    return [*paths, "--adapters", tmp_path / "adapters", "--device", "cpu"]


def published_items(name, clips):
    """Items of an exam in its published fields."""
    items = []
    for i, clip in enumerate(clips):
        item = {"question": f"{'ABCDEFG'[i] * (i + 1)}?", "dataset": "synthetic"}
        if name == "mmsu":
            item |= {"id": f"q{i}", "audio_path": f"/elsewhere/{clip.name}"}
            item |= {"answer_gt": ["b", "wild horse", "dog", "D"][i % 4]}
            item |= {f"choice_{letter}": choice for letter, choice in zip("abcd", ANIMALS)}
            item |= {"task_name": f"task {i % 3}", "category": ("Perception", "Reasoning")[i % 2]}
            item |= {"sub-category": "x"}
        elif name == "mmau":
            item |= {"id": f"q{i}", "audio_id": f"./{clip.name}", "choices": ANIMALS}
            item |= {"answer": ANIMALS[2 * (i % 2)], "task": ("sound", "music", "speech")[i % 3]}
            item |= {"difficulty": ("easy", "hard")[i % 2], "sub-category": "x"}
        else:
            item |= {"audio_path": clip.name, "prompt": f"Say {i}", "reference": "ABCD"[i % 4]}
        items.append(item)
    return items


@pytest.fixture
def published(tone, tmp_path):
    """Writes an exam: published(name, change) -> path; change(items) in place before writing."""

    def write(name, change=lambda items: None):
        lengths = (0.3, 0.7, 0.5)
        clips = [
            tone(f"clip{i}.wav", seconds=lengths[i % 3], hertz=200 + 150 * i) for i in range(N)
        ]
        items = published_items(name, clips)
        change(items)
        half = any("\ud83d" in str(item.get("question")) for item in items)  # only in escapes
        path = tmp_path / f"{name}.published"
        lines = "".join(json.dumps(item, ensure_ascii=half) + "\n" for item in items)
        path.write_text(json.dumps(items) if name == "mmau" else lines, "utf-8")
        return path

    return write


def read(path, name):
    """Items as the exam's own scorer would load them."""
    if name == "mmau":
        return json.loads(path.read_text())
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["exams", *map(str, arguments)])
    exams.main()


def named(name):
    """How the command calls an exam."""
    return name if name in ("mmsu", "mmau") else "voicebench"


def subset(name):
    return [] if name in ("mmsu", "mmau") else ["--subset", name]


@pytest.fixture
def batches(monkeypatch):
    """The batches answered so far; batches.stop_at = n interrupts before the n-th."""

    class Batches(list):
        stop_at = None
        replies = None  # chosen by the ids of an answer, because random weights give no sense

    batches = Batches()

    def counted(*arguments):
        batches.append(None)
        if len(batches) == batches.stop_at:
            raise KeyboardInterrupt
        return generate(*arguments)

    def answer_with_reply(*arguments, **options):
        for result in answer(*arguments, decode=counted, **options):
            replies = batches.replies
            text = replies[sum(result.ids) % len(replies)] if replies else result.text
            yield replace(result, text=text)

    monkeypatch.setattr(exam_answers, "answer", answer_with_reply)
    return batches


@pytest.fixture
def take(monkeypatch, model_options, batches, tmp_path):
    """Takes an exam: take(name, path or paths, out, *options) -> the file of predictions."""

    def run(name, path, out="out", *options):
        batches.replies = REPLIES.get(name)
        options = ["--audio", tmp_path, "--out", tmp_path / out, "--batch", BATCH, *options]
        paths = path if isinstance(path, list) else [path]
        command(monkeypatch, named(name), *paths, *subset(name), *model_options, *options)
        return tmp_path / out

    return run


def forbidden(*arguments, **options):
    raise AssertionError("long work has begun")


def forbid_models(monkeypatch):
    monkeypatch.setattr(exams, "load_diffa", forbidden)


# ---- predictions
@torch.inference_mode()
def spliced(model, clip, instruction):
    """The prompt of one clip by itself."""
    waveforms, n_samples = pad_waveforms(
        [read_audio(clip)], model.encoder.config.n_samples, [str(clip)]
    )
    audio, audio_mask = model.hear(*model.encode(waveforms, n_samples))
    return splice(model.lm, [build_prompt(model.tokenizer, instruction)], audio, audio_mask)


def ids_alone(model, clip, instruction, steps):
    """Ids of the answer to one clip by itself."""
    config = SamplerConfig(length=steps, block_length=steps, steps=steps)
    return generate(model.lm, spliced(model, clip, instruction), config).ids[0].tolist()


PROMPTS = {
    "mmsu": """Listen to the audio and decide which of the options A, B, C and D answers the \
question. **Reply with the letter of that option only**, and do not explain it.

Question: FFFFFF?

A. dog
B. cat
C. wild horse
D. bird""",
    "mmau": """You are given an audio clip and a question about it with several choices. Pick the \
choice that fits what is said in the clip and how it is said.

Question: FFFFFF?

Choices:
A. dog
B. cat
C. wild horse
D. bird
Answer:""",
}
VOICEBENCH_PROMPT = """
### Instruction:
Keep strictly to these two points:
1. Do not repeat what you hear.
2. Answer the question that the audio asks.

### Response:
"""


@pytest.mark.parametrize("name", STEPS)
def test_every_item_comes_back_in_its_place_with_the_reply_that_it_gets_alone(
    name, take, published, model_options, tmp_path
):
    path = published(name)
    rows = read(take(name, path), name)
    fields = REPLY_FIELDS.get(name, {"response"})
    without = [{k: v for k, v in row.items() if k not in fields} for row in rows]
    assert without == read(path, name)
    assert all(fields <= row.keys() and len({row[field] for field in fields}) == 1 for row in rows)
    assert len({row[min(fields)] for row in rows}) > 1

    whisper, llm, adapters = model_options[1:6:2]
    model = load_diffa(whisper, llm, adapters).eval()
    ids = ids_alone(
        model, tmp_path / "clip5.wav", PROMPTS.get(name, VOICEBENCH_PROMPT), STEPS[name]
    )
    if name in REPLIES:
        reply = REPLIES[name][sum(ids) % 4]
    else:
        reply = decode_answer(model.tokenizer, ids)
    assert rows[5][max(fields)] == reply


# ---- scores
# What each rule finds in each reply of REPLIES, what an unreadable one counts (None: it is left
# out), and which choice an answer means that is the text of none.
PUBLIC = {"B": "cat", "A dog.": "dog"}
LETTERS = {"A.": "A", "the answer is D": "D", "b) it": "B"}
WORDS = {"a dog": "dog", "A wild horse!": "wild horse"}
REFUSED = dict.fromkeys(["I'm sorry.", "I can't.", ""], "refused")
RULES = {
    "mmsu": [
        (PUBLIC, None, {}),
        (PUBLIC, 0, {}),
        (PUBLIC | {"(c)": "wild horse"}, 0, {"b": "cat", "D": "bird"}),
    ],
    "mmau": [(WORDS, 0, {}), (WORDS, 0, {})],
    "openbookqa": [(LETTERS, 0.25, {}), (LETTERS, 0, {})],
    "advbench": [(REFUSED, 0, {})],
}
ANSWER_FIELD = {"mmsu": "answer_gt", "mmau": "answer", "openbookqa": "reference"}
GROUPS = {
    "mmsu": ["category", "category and sub-category", "category and sub-sub-category", "task_name"],
    "mmau": ["task", "difficulty", "sub-category"],
}
EXAMS = {**SUBSETS, "mmsu": MMSU, "mmau": MMAU}


def scored(name, rows):
    """An independent scorer: (percent, denominator) by each rule."""
    cells = []
    for named, unreadable, meant in RULES[name]:
        marks = []
        for row in rows:
            reply = row[min(REPLY_FIELDS.get(name, {"response"}))]
            answer = row[ANSWER_FIELD[name]] if name in ANSWER_FIELD else "refused"
            right = named.get(reply) == meant.get(answer, answer)
            marks.append(int(right) if reply in named else unreadable)
        kept = [mark for mark in marks if mark is not None]
        cells.append((100 * sum(kept) / len(kept) if kept else None, len(kept)))
    return cells


def all_scored(name, rows):
    """The same for all rows, and for each value of the groups."""
    result = {(): scored(name, rows)}
    for title in GROUPS.get(name, []):
        groups = {}
        for row in rows:
            value = " / ".join(str(row.get(field, "-")) for field in title.split(" and "))
            groups.setdefault(value, []).append(row)
        result |= {(title, value): scored(name, group) for value, group in groups.items()}
    return result


def printed(text):
    """The same, read from what the command prints."""
    numbers = {(): []}
    title = None
    for line in text.strip().splitlines():
        cells = re.findall(r"([\d.]+ %|-) of (\d+)(?= |$)", line)
        cells = [(None if p == "-" else float(p[:-2]), int(n)) for p, n in cells]
        if line.startswith("by "):
            title = line[3:].split(";")[0]
        elif line.startswith("  "):
            numbers[title, re.split(r"  ", line.strip())[0]] = cells
        else:
            numbers[()] += cells
    return numbers


def assert_same_scores(text, name, rows):
    expected = all_scored(name, rows)
    found = printed(text)
    assert found.keys() == expected.keys()
    for key, cells in expected.items():
        assert [n for _, n in found[key]] == [n for _, n in cells]
        assert [p for p, _ in found[key]] == pytest.approx([p for p, _ in cells], abs=0.005)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RULES)
def test_a_file_of_predictions_alone_gets_the_scores_of_an_independent_scorer(
    name, published, tmp_path, monkeypatch, capsys
):
    # Every item with every reply.
    id_field = EXAMS[name].id_field
    rows = []
    for reply in REPLIES[name]:
        for item in read(published(name), name):
            item |= dict.fromkeys(REPLY_FIELDS.get(name, {"response"}), reply)
            rows.append(item | {id_field: f"{item[id_field]}, {reply}"})
    path = tmp_path / "predictions"
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(json.dumps(rows, indent=1) if name == "mmau" else lines)

    command(monkeypatch, "score", named(name), path, *subset(name))
    text = capsys.readouterr().out
    assert all(0 < percent < 100 for percent, _ in scored(name, rows))
    assert_same_scores(text, name, rows)
    assert f"{len(rows)} items, sha256 {sha256(path)[:16]}\n" in text
    assert ("refusal rate" if name == "advbench" else "accuracy") in text
    unreadable = {"mmsu": 2 * N, "openbookqa": N}.get(name, 0)
    assert (f"; {unreadable} unreadable replies" in text) == (unreadable > 0)


@pytest.mark.parametrize("name", RULES)
def test_taking_an_exam_ends_with_its_score_and_the_hash_of_its_questions(
    name, take, published, monkeypatch, capsys
):
    path = published(name)
    out = take(name, path)
    text = capsys.readouterr().out
    assert_same_scores(text, name, read(out, name))
    assert f"; questions: {path.name} sha256 {sha256(path)[:16]}\n" in text

    command(monkeypatch, "score", named(name), out, *subset(name))
    assert capsys.readouterr().out == text


def test_a_subset_that_others_judge_is_answered_and_the_judge_is_named(take, published, capsys):
    take("alpacaeval", published("alpacaeval"))
    text = capsys.readouterr().out
    assert "7 items" in text and "not scored here" in text and "api_judge.py" in text


@pytest.mark.parametrize("name", ["mmsu", "mmau", "openbookqa"])
def test_null_and_absent_replies_are_counted_and_marked_like_empty_ones(
    name, published, tmp_path, monkeypatch, capsys
):
    rows = read(published(name), name)
    field = min(REPLY_FIELDS.get(name, {"response"}))
    for row in rows[2:]:
        row[field] = None
    rows[1][field] = REPLIES[name][0]  # the first row has no such field
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(rows))
    command(monkeypatch, "score", named(name), path, *subset(name))
    text = capsys.readouterr().out
    assert f"replies that are null or absent, marked like empty ones: {N - 1}\n" in text
    assert text.count(f" % of {N} by ") == {"mmsu": 3}.get(name, 2)


def test_splits_are_scored_together_without_audio_paths(published, tmp_path, monkeypatch, capsys):
    rows = read(published("openbookqa"), "openbookqa")
    for i, row in enumerate(rows):
        del row["audio_path"]
        row["response"] = ["A.", "B."][i % 2]
    files = [tmp_path / "law.jsonl", tmp_path / "physics.jsonl"]
    for file, part in zip(files, (rows[:3], rows[3:])):
        file.write_text("\n".join(map(json.dumps, part)))

    command(monkeypatch, "score", "voicebench", *files, "--subset", "mmsu")
    found = printed(capsys.readouterr().out)
    for key, part in (
        ((), rows),
        *((("file", str(f)), p) for f, p in zip(files, (rows[:3], rows[3:]))),
    ):
        percent = 100 * sum(row["response"][0] == row["reference"] for row in part) / len(part)
        assert found[key] == [(pytest.approx(percent, abs=0.005), len(part))] * 2


# ---- interrupted
@pytest.mark.parametrize("name", ["mmsu", "mmau", "openbookqa"])
@pytest.mark.parametrize("kept, tail", [(3, ""), (3, '{"id": "q'), (4, ""), (5, "{"), (0, '{"id"')])
def test_an_interrupted_exam_resumes_and_gives_the_same_file(
    name, kept, tail, take, published, batches
):
    path = published(name)
    whole = take(name, path, "whole").read_bytes()
    n_batches = 3  # of 3, 3 and 1 items
    assert len(batches) == n_batches

    # Stopped after the batch in which the last kept item lies.
    n_done = -(-kept // BATCH)
    batches.stop_at = n_batches + n_done + 1
    with pytest.raises(SystemExit) as stopped:
        take(name, path)
    assert stopped.value.code == 130

    # Killed while it wrote.
    lines = path.parent / ("out.lines" if name == "mmau" else "out")
    rows = lines.read_text().splitlines(keepends=True)
    assert len(rows) == BATCH * n_done
    lines.write_text("".join(rows[:kept]) + tail)

    # A batch that is written in part is answered as a whole.
    batches.stop_at = None
    before = len(batches)
    assert take(name, path).read_bytes() == whole
    assert len(batches) - before == n_batches - kept // BATCH
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("name", ["mmsu", "mmau"])
def test_a_finished_exam_needs_no_model_any_more(name, take, published, monkeypatch, capsys):
    path = published(name)
    first = take(name, path).read_bytes()
    score = capsys.readouterr().out
    forbid_models(monkeypatch)
    assert take(name, path).read_bytes() == first
    assert capsys.readouterr().out == score


def test_the_predictions_of_another_model_are_not_resumed(take, published):
    path = published("mmsu")
    take("mmsu", path)
    problem = "begun with dtype None, now bfloat16; give another --out, or delete it"
    with pytest.raises(SystemExit, match=problem):
        take("mmsu", path, "out", "--dtype", "bfloat16")


def test_replies_of_adapters_before_more_training_are_not_resumed(take, published, tmp_path):
    path = published("mmsu")
    out = take("mmsu", path)
    rows = out.read_text().splitlines(keepends=True)
    out.write_text("".join(rows[:3]))
    edit_tensors(tmp_path / "adapters", lambda tensors: [t.mul_(2) for t in tensors.values()])
    with pytest.raises(SystemExit, match="begun with adapters_digest .*; give another --out"):
        take("mmsu", path)

    # A record of before there were digests counts as the same.
    record = json.loads((tmp_path / "out.made_by").read_text())
    del record["adapters_digest"]
    (tmp_path / "out.made_by").write_text(json.dumps(record))
    assert len(read(take("mmsu", path), "mmsu")) == N


def test_replies_of_an_unknown_model_are_not_resumed(take, published, tmp_path):
    path = published("mmsu")
    out = take("mmsu", path)
    (tmp_path / "out.made_by").unlink()
    with pytest.raises(SystemExit, match="out.made_by is missing, which says by which model"):
        take("mmsu", path)
    out.unlink()
    take("mmsu", path)
    (tmp_path / "out.made_by").write_text("{")
    with pytest.raises(SystemExit, match="out.made_by: not valid JSON"):
        take("mmsu", path)


# ---- what cannot be used
def test_clips_longer_than_the_window_are_cut_and_counted(take, published, tone, capsys):
    path = published("mmsu")
    tone("clip2.wav", seconds=1.0)
    tone("clip3.wav", seconds=0.81)
    assert len(read(take("mmsu", path), "mmsu")) == N
    warning = "2 of 7 clips are longer than the encoder's window: only the first 0.8 s are heard"
    assert warning in capsys.readouterr().err


def test_all_missing_and_silent_clips_are_named_before_the_model_loads(
    take, published, tone, tmp_path, monkeypatch
):
    path = published("mmsu")
    forbid_models(monkeypatch)
    (tmp_path / "clip1.wav").unlink()
    tone("clip4.wav", hertz=0)
    (tmp_path / "clip5.wav").write_text("not sound")
    with pytest.raises(
        SystemExit, match="3 clips, of 3 items, cannot be used; is --audio correct"
    ) as error:
        take("mmsu", path)
    assert "clip1.wav: no such audio file" in str(error.value)
    assert "clip4.wav: holds only silence" in str(error.value)
    assert "clip5.wav: cannot be read" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, field, value, problem", [
    ("mmsu", "question", None, r"item 2 \(q2\): lacks question"),
    ("mmsu", "question", [3], "question is not text"),
    ("mmsu", "answer_gt", True, "answer_gt is not text"),
    ("mmsu", "answer_gt", "fish", "the correct answer 'fish' is neither a letter of ABCD nor a"),
    ("mmsu", "id", "q1", "a second item with this id"),
    ("mmsu", "id", ["q1"], "id is not text"),
    ("mmau", "choices", "dog, cat", "choices is not a list of texts"),
    ("mmau", "audio_id", 2, "audio_id is not text"),
    ("openbookqa", "reference", "E", "the correct answer 'E' is neither"),
    ("advbench", "audio_path", None, r"item 2 \(no audio_path\): lacks audio_path"),
    ("advbench", "audio_path", 2, "audio_path is not text"),
    ("alpacaeval", "prompt", None, "lacks prompt"),
    ("mmsu", "question", NULL, "question is not text"),
    ("mmsu", "id", NULL, "id is not text"),
    ("mmau", "choices", NULL, "choices is not a list of texts"),
    ("mmau", "answer", " ", "the correct answer is empty"),
    ("mmau", "choices", ["x"] * 27, "27 choices are more than there are letters"),
    ("mmsu", "answer_gt", "", "the correct answer '' is neither"),
    ("openbookqa", "reference", "", "the correct answer '' is neither"),
    ("mmsu", "question", "\ud83d", "holds half a character"),
])  # fmt: skip
def test_bad_items_are_named(name, field, value, problem, published, take):
    def spoil(items):
        for item in items[2:4]:
            if value is None:
                del item[field]
            else:
                item[field] = None if value is NULL else value

    path = published(name, spoil)
    with pytest.raises(SystemExit, match=problem) as error:
        take(name, path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 3  # both items are listed


@pytest.mark.parametrize("content, problem", [
    (b"", "holds no item"),
    (b"[]", "holds no item"),
    (b"{", "line 1 is not valid JSON"),
    (b'{"id": 1}\n{"id', "line 2 is not valid JSON"),
    (b"[{]", "not valid JSON"),
    (b"3\n[]", "item 0 .no object.: not an object"),
    (b"\xff\xfe", "not a text file in UTF-8"),
    (b"[" * 10**5, "not valid JSON"),
    (b'{"id": ' * 10**5, "line 1 is not valid JSON"),
    (b'{"id": ' + b"1" * 5000 + b"}", "line 1 is not valid JSON"),
])  # fmt: skip
def test_a_file_that_is_no_exam_is_refused_by_name(content, problem, published, take, monkeypatch):
    path = published("mmsu")
    path.write_bytes(content)
    refusal = f"mmsu.published: .*{problem}|cannot be used as mmsu(.|\n)*{problem}"
    with pytest.raises(SystemExit, match=refusal):
        take("mmsu", path)
    with pytest.raises(SystemExit, match=problem):
        command(monkeypatch, "score", "mmsu", path)


def test_a_file_that_is_not_there_is_named(take, tmp_path):
    with pytest.raises(SystemExit, match="nowhere.jsonl: no such file"):
        take("mmsu", tmp_path / "nowhere.jsonl")


def test_a_folder_or_a_pipe_is_no_file(take, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(SystemExit, match=f"{path}: not a file"):
            take("mmsu", path)
        with pytest.raises(SystemExit, match=f"{path}: not a file"):
            command(monkeypatch, "score", "mmsu", path)


@pytest.mark.parametrize("out", ["folder", "pipe", "file/out", "lines"])
def test_an_out_that_cannot_be_written_is_refused_before_the_model_loads(
    out, take, published, tmp_path, monkeypatch
):
    path = published("mmau")
    forbid_models(monkeypatch)
    monkeypatch.setattr(exam_clips, "read_audio", forbidden)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    (tmp_path / "lines.lines").mkdir()
    with pytest.raises(SystemExit, match="cannot be saved|is a folder|File exists|Not a directory"):
        take("mmau", path, out)


def test_texts_keep_every_character_after_a_byte_order_mark(take, published):
    text = "caf\u00e9 \u2028 \u2029 \x85 \u65e5\u672c?"
    path = published("mmsu", lambda items: items[1].update(question=text))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = take("mmsu", path).read_text().split("\n")
    assert json.loads(rows[1])["question"] == text


def test_each_clip_is_read_once(take, published, monkeypatch):
    path = published("mmsu", lambda items: items[6].update(audio_path=items[5]["audio_path"]))
    read = []
    monkeypatch.setattr(
        exam_clips, "read_audio", lambda file, seconds: read.append(file) or read_audio(file)
    )
    take("mmsu", path)
    assert len(read) == len(set(read)) == N - 1


def test_another_exam_s_file_is_recognised(take, published, monkeypatch):
    with pytest.raises(SystemExit, match="this looks like a file of mmau"):
        take("mmsu", published("mmau"))
    predicted = take("mmsu", published("mmsu"), "mmsu.jsonl")
    with pytest.raises(SystemExit, match="this looks like a file of mmsu"):
        command(monkeypatch, "score", "mmau", predicted)

    take("advbench", published("advbench"), "advbench.jsonl")
    refusal = "advbench.jsonl: cannot be used as mmsu(.|\n)*this looks like a file of voicebench"
    with pytest.raises(SystemExit, match=refusal):
        take("mmsu", published("mmsu"), "advbench.jsonl")


def test_questions_are_no_predictions(published, take, monkeypatch):
    path = published("mmsu")
    with pytest.raises(SystemExit, match="no item has a reply; each lacks response"):
        command(monkeypatch, "score", "mmsu", path)

    # Nor are they resumed or cut, even as a text without an end to its last line.
    path.write_text(path.read_text().strip())
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="each lacks response"):
        take("mmsu", path, path.name)
    assert path.read_bytes() == before


def test_predictions_of_other_items_are_neither_resumed_nor_lost(published, take):
    out = take("mmsu", published("mmsu"))
    before = out.read_bytes()
    for change in (lambda items: items[4].update(question="What?"), lambda items: items.pop(4)):
        problem = r"item 4 \(q4\) is not an item of the exam's file; give another --out"
        with pytest.raises(SystemExit, match=problem):
            take("mmsu", published("mmsu", change))
        assert out.read_bytes() == before


def test_a_list_without_the_lines_it_was_made_of_is_not_overwritten(published, take, tmp_path):
    (tmp_path / "out").write_text("[]")
    with pytest.raises(SystemExit, match="out: exists, but not .*out.lines"):
        take("mmau", published("mmau"))
    assert (tmp_path / "out").read_text() == "[]"


def test_impossible_options_say_what_would_work(published, take, tmp_path, monkeypatch, capsys):
    path = published("advbench")
    folders = ["--audio", tmp_path, "--out", tmp_path / "out"]
    unknown = "--subset trivia is none of VoiceBench's; use one of .*advbench"
    with pytest.raises(SystemExit, match=unknown):
        command(monkeypatch, "voicebench", path, "--subset", "trivia", *folders)
    with pytest.raises(SystemExit, match="--subset is missing; use one of alpacaeval"):
        command(monkeypatch, "score", "voicebench", path)
    with pytest.raises(SystemExit, match="mmsu has no subsets"):
        command(monkeypatch, "score", "mmsu", path, "--subset", "advbench")
    for batch in ("0", "-3", "many"):
        with pytest.raises(SystemExit, match="2"):
            take("advbench", path, "out", "--batch", batch)
        assert f"must be a whole number of 1 or more, not '{batch}'" in capsys.readouterr().err


def test_an_lm_with_damaged_weights_gives_no_reply(take, published, dirs, tmp_path):
    damage_norms(dirs["llm"], 1e38)
    with pytest.raises(SystemExit, match="logits are NaN or infinite"):
        take("mmsu", published("mmsu"), "out", "--force-parts")
    assert (tmp_path / "out").read_text() == ""


def test_an_lm_with_nan_in_its_weights_is_refused_before_a_file_is_written(
    take, published, dirs, tmp_path
):
    damage_norms(dirs["llm"], float("nan"))
    for options in ((), ("--force-parts",)):
        with pytest.raises(SystemExit, match="attn_norm.weight: it holds NaN or infinity"):
            take("mmsu", published("mmsu"), "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_question_too_long_for_the_lm_names_its_batch(published, take):
    path = published("mmsu", lambda items: items[1].update(question="why " * 999))
    with pytest.raises(SystemExit, match="among items .*q1.*exceed the LM's context of 1024"):
        take("mmsu", path)


# ---- options
def test_a_skipped_clip_leaves_its_item_without_a_reply_until_it_is_there(
    take, published, tone, tmp_path, capsys
):
    path = published("mmau")
    whole = take("mmau", path, "whole").read_bytes()
    (tmp_path / "clip1.wav").unlink()
    tone("clip4.wav", hertz=0)
    capsys.readouterr()
    rows = read(take("mmau", path, "out", "--skip-missing"), "mmau")
    printed = capsys.readouterr()
    assert "2 clips, of 2 items, cannot be used and have no reply" in printed.err
    assert "clip1.wav: no such" in printed.err and "clip4.wav: holds only silence" in printed.err
    assert "replies that are null or absent, marked like empty ones: 2" in printed.out
    assert [i for i, row in enumerate(rows) if row["model_output"] is None] == [1, 4]

    # The same command without the option refuses; with the clips it ends as if nothing had been.
    with pytest.raises(SystemExit, match="2 clips, of 2 items, cannot be used; is --audio correct"):
        take("mmau", path)
    published("mmau")
    assert take("mmau", path).read_bytes() == whole


def test_an_exam_without_any_clip_is_an_error_even_if_clips_may_be_skipped(
    take, published, tmp_path, monkeypatch
):
    path = published("mmsu")
    forbid_models(monkeypatch)
    for clip in tmp_path.glob("clip*.wav"):
        clip.unlink()
    with pytest.raises(SystemExit, match="7 clips, of 7 items, cannot be used"):
        take("mmsu", path, "out", "--skip-missing")


def test_a_template_replaces_the_prompt_and_is_recorded(
    take, published, model_options, tmp_path, monkeypatch
):
    asked = []

    def recorded(tokenizer, text):
        asked.append(text)
        return build_prompt(tokenizer, text)

    monkeypatch.setattr(exam_answers, "build_prompt", recorded)
    path = published("mmsu")
    template = tmp_path / "prompt.txt"
    template.write_text("{task_name}: {question}\n{choices}\n\n")
    take("mmsu", path, "out", "--prompt", template)
    assert "task 2: FFFFFF?\nA. dog\nB. cat\nC. wild horse\nD. bird\n" in asked

    with pytest.raises(SystemExit, match="was begun with prompt"):
        take("mmsu", path)
    template.write_text("{title}")
    with pytest.raises(SystemExit, match=r"item q0: the prompt has a field \{title\}, the item"):
        take("mmsu", path, "new", "--prompt", template)


@torch.inference_mode()
def chosen(model, clip, instruction, texts):
    """The text of one token that the LM finds most probable, by a whole pass."""
    prompt = spliced(model, clip, instruction).embeddings
    mask = model.lm.embed(torch.tensor([[model.lm.config.mask_id]]))
    logits = model.lm.head(model.lm(torch.cat([prompt, mask], dim=1)))[0, -1]
    ids = [model.tokenizer.encode_text(text) for text in texts]
    assert all(len(found) == 1 for found in ids)
    return max(zip(texts, ids), key=lambda pair: logits[pair[1][0]])[0]


@pytest.mark.parametrize("name", ["mmsu", "openbookqa"])
def test_a_letter_is_chosen_by_its_likelihood_also_after_a_stop(
    name, take, published, model_options, tmp_path
):
    path = published(name)
    out = take(name, path, "out", "--by", "likelihood")
    rows = read(out, name)
    model = load_diffa(*model_options[1:6:2]).eval()
    instruction = PROMPTS.get(name, VOICEBENCH_PROMPT)
    assert rows[5]["response"] == chosen(model, tmp_path / "clip5.wav", instruction, list("ABCD"))

    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"id')
    assert take(name, path, "out", "--by", "likelihood").read_text() == whole
    with pytest.raises(SystemExit, match="begun with by likelihood, now generation"):
        take(name, path)


def test_a_choice_of_mmau_is_the_text_that_the_lm_would_fill_in_most_readily(
    take, published, model_options, tmp_path
):
    rows = read(take("mmau", published("mmau"), "out", "--by", "confidence"), "mmau")
    model = load_diffa(*model_options[1:6:2]).eval()
    prompt = spliced(model, tmp_path / "clip5.wav", PROMPTS["mmau"])
    end = model.lm.config.end_id
    scores = {}
    for text in ANIMALS:  # one by one, without padding
        ids = [*model.tokenizer.encode_text(text), end]
        (scores[text],) = confidence_scores(model.lm, prompt, [ids])
    assert rows[5]["model_output"] == max(scores, key=scores.get)
    assert len({row["model_output"] for row in rows} - set(ANIMALS)) == 0


def test_real_items_are_asked_answered_and_scored(take, tone, capsys):
    path = Path(__file__).parent / "exams/mmau-excerpt.json"
    for item in json.loads(path.read_text()):
        tone(Path(item["audio_id"]).name, seconds=0.3)
    rows = read(take("mmau", path), "mmau")
    text = capsys.readouterr().out
    assert [row["id"] for row in rows] == [item["id"] for item in json.loads(path.read_text())]
    assert all(isinstance(row["model_output"], str) for row in rows)
    assert " of 12 by MMAU's own rule\n" in text and "by sub-category; the rules as above" in text


def test_an_exam_that_others_judge_has_no_choices(take, published):
    with pytest.raises(SystemExit, match="--by confidence: this exam has no choices"):
        take("alpacaeval", published("alpacaeval"), "out", "--by", "confidence")


def test_splits_are_taken_as_one_exam(take, published, tmp_path):
    path = published("openbookqa")
    lines = path.read_text().splitlines(keepends=True)
    parts = [tmp_path / "law", tmp_path / "physics"]
    parts[0].write_text("".join(lines[:3]))
    parts[1].write_text("".join(lines[3:]))
    joined = take("openbookqa", parts).read_text()
    assert joined == take("openbookqa", path, "whole").read_text()

    parts[1].write_text("".join(lines[2:]))
    problem = f"{parts[1]}: audio_path clip2.wav is also in {parts[0]}"
    with pytest.raises(SystemExit, match=problem):
        take("openbookqa", parts, "new")
