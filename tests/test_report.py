"""Reports and their table say what was measured and what was not, whatever a run lacks."""

import json
import shutil
import sys

import pytest
from conftest import damage_norms

from toy import evaluate, report
from toy.grammar import SLOTS
from training.run_files import save_checkpoint


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def questions(accuracy, kinds=SLOTS):
    return {kind: {"accuracy": accuracy, "items": 7} for kind in kinds}


PARTS = {
    "stage1": {"stage1": {"items": 5, "by_sampler": {"18 steps": {"word_error_rate": 3.0}}}},
    "stage2": {"stage2": questions(50.0), "minutes": {"stage2": None}},
    "some questions": {"stage2": questions(50.0, SLOTS[:2]), "minutes": {"evaluate": 2.0}},
    "lm": {"lm": {"copy_error": 1.0}},
    "encoder": {"encoder": {"word_error_rate": 1}, "lm": {"oracle": {}}},
}


@pytest.mark.parametrize("part", PARTS)
def test_the_table_shows_what_there_is_and_in_how_many_runs(part):
    found = report.summary([PARTS[part]])
    assert len(found) > 2 and all(" runs)" not in line for line in found)
    rows = report.summary([PARTS[part], {}, {"minutes": {}}])[2:]
    assert all("(1 of 3 runs) | " in row for row in rows)


def test_figures_are_averaged_over_the_runs_that_have_them():
    other = {"stage2": questions(70.0)}
    (row,) = (row for row in report.summary([PARTS["stage2"], other]) if "colour, acc" in row)
    assert row == "| stage 2: colour, accuracy (%) | 60.0 | 50.0 to 70.0 | 7 |"


def test_reports_without_any_figure_are_refused(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text('{"parts": {}}')
    with pytest.raises(SystemExit, match="hold no figure of a toy run"):
        command(monkeypatch, "--summary", tmp_path)
    (tmp_path / "report.json").write_text('{"lm": ')
    with pytest.raises(SystemExit, match="report.json: not valid JSON"):
        command(monkeypatch, "--summary", tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(SystemExit, match="report.json: no such file"):
        command(monkeypatch, "--summary", tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_promises_about_what_was_not_measured_are_named_and_nan_breaks_them(part):
    lines = report.broken_promises(PARTS[part])
    assert "stage2/caption/word_error_rate was not measured" in lines
    nan = {"encoder": {"word_error_rate": float("nan")}}
    assert "encoder/word_error_rate is nan, promised at most 2.5" in report.broken_promises(nan)


def test_questions_are_drawn_of_the_kinds_that_were_asked(tmp_path):
    report.plot(PARTS["some questions"], tmp_path)
    assert (tmp_path / "questions.png").stat().st_size > 1000


def test_the_report_for_people_holds_the_figures_and_what_was_missed(tmp_path):
    examples = [{"target": "two birds", "prediction": "two words"}]
    stage1 = PARTS["stage1"]["stage1"] | {"examples": examples}
    stage1["by_sampler"] = {"18 steps": {"word_error_rate": 3.25, "calls": 18}}
    found = {"parts": {"llm": "here"}, "stage1": stage1}
    report.plot(found, tmp_path)
    report.write_markdown(found, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| stage 1, 18 steps, WER (%) | 3.25 | 5 |" in lines
    assert "| two birds | two words |" in lines
    missed = "stage1/by_sampler/18 steps/word_error_rate is 3.25, promised at most 3"
    assert f"- missed: {missed}" in lines
    assert any("(steps.png)" in line for line in lines)
    assert not any("(questions.png)" in line for line in lines)


def test_runs_are_compared_by_settings_and_figures(tmp_path, monkeypatch, capsys):
    for name, seed, error in (("one", 0, 3.0), ("two", 1, 2.5)):
        run = tmp_path / name
        (run / "corpus").mkdir(parents=True)
        (run / "corpus/corpus.json").write_text(json.dumps({"corpus": "toy", "seed": seed}))
        rates = {"18 steps": {"word_error_rate": error}, "threshold 0.9": {"word_error_rate": 1}}
        written = {"stage1": {"by_sampler": rates}, "parts": {"audio_context": 3.2}}
        (run / "report.json").write_text(json.dumps(written))
    state = {"run": {"steps": 600, "shape of w": [1]}, "optimizers": []}
    (tmp_path / "two/stage1").mkdir()
    save_checkpoint(state, tmp_path / "two/stage1/checkpoint.pt", 600, 1)

    command(monkeypatch, "--compare", tmp_path / "one", tmp_path / "two")
    lines = capsys.readouterr().out.splitlines()
    assert "| corpus/corpus.json/seed | 0 | 1 |" in lines
    assert "| training of stage1/steps | unknown | 600 |" in lines
    assert "| stage 1, 18 steps, WER (%) | 3.00 | 2.50 | -0.50 |" in lines
    text = "\n".join(lines)
    assert all(same not in text for same in ("audio_context", "threshold 0.9", "shape of"))


# ---- what cannot be evaluated
@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """A run directory that a test may spoil; loading a model of it fails."""

    def load(*arguments, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(evaluate, "load_diffa", load)
    return shutil.copytree(tiny_run, tmp_path / "run")


def spoil(path, **fields):
    items = json.loads(path.read_text())
    path.write_text(json.dumps([item | fields for item in items]))


@pytest.mark.parametrize("manifest, fields, problem", [
    ("instruct_test", {"kind": None}, "no item has a `kind` of question that is known"),
    ("instruct_test", {"kind": ["name"]}, "no item has a `kind` of question that is known"),
    ("instruct_test", {"kind": "colours"}, "no item has a `kind` of question that is known"),
    ("asr_test", {"transcription": " "}, "asr_test.json: no item has a word to compare with"),
])  # fmt: skip
def test_items_that_cannot_be_scored_are_known_before_models_load(
    run, monkeypatch, manifest, fields, problem
):
    spoil(run / f"corpus/{manifest}.json", **fields)
    with pytest.raises(SystemExit, match=problem):
        command(monkeypatch, "--run", run)


def test_a_report_that_cannot_be_written_is_known_before_models_load(run, monkeypatch):
    parts = [run / "whisper", "--llm", run / "llada", "--corpus", run / "corpus"]
    options = ["--whisper", *parts, "--adapters", run / "stage1"]
    with pytest.raises(SystemExit, match="File exists|Not a directory"):
        command(monkeypatch, "--run", run / "corpus/corpus.json", *options)
    (run / "report.json").mkdir()
    with pytest.raises(SystemExit, match="report.json: cannot be saved"):
        command(monkeypatch, "--run", run)


def test_items_without_a_kind_are_left_out_and_counted(run, capsys):
    items = json.loads((run / "corpus/instruct_test.json").read_text())
    kinds = [dict(item) for item in items]
    del kinds[0]["kind"]
    assert evaluate.asked_items(kinds, run) == items[1:]
    assert f"1 of {len(items)} items have no known `kind`" in capsys.readouterr().err


def test_an_lm_with_damaged_weights_is_not_scored(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    damage_norms(run / "llada", 1e38)
    with pytest.raises(SystemExit, match="logits are NaN or infinite"):
        command(monkeypatch, "--run", run, "--device", "cpu", "--force-parts")
    assert not (run / "report.json").exists()
