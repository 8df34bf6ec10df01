"""The weights in the repository are what their report says, and answer the bundled clips."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.digests import file_digest
from diffa import DIFFA
from toy import bundle
from toy.report import broken_promises

WEIGHTS = Path(__file__).parents[1] / "toy/weights"
REPORT = json.loads((WEIGHTS / "report.json").read_text())


def test_every_file_has_the_digest_in_the_report_and_all_are_small():
    files = [path for path in WEIGHTS.rglob("*.*") if path.is_file()]
    names = {str(path.relative_to(WEIGHTS)) for path in files} - {"report.json"}
    assert names == set(REPORT["files"])
    assert {name: file_digest(WEIGHTS / name) for name in names} == REPORT["files"]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20


def test_all_weights_are_float16_and_their_source_is_known():
    for file in WEIGHTS.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, file
    assert isinstance(REPORT["seed"], int) and len(REPORT["commit"]) >= 7


def test_the_figures_keep_every_promise():
    assert broken_promises(REPORT) == []


def test_the_bundled_clips_are_answered_correctly_by_paths_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = DIFFA.from_pretrained(adapters=WEIGHTS / "stage2")
    assert len(REPORT["clips"]) == 3
    rows = [(clip["file"], q, a) for clip in REPORT["clips"] for q, a in clip["answers"].items()]
    files, questions, answers = zip(*rows, strict=True)
    assert model.answer([WEIGHTS / file for file in files], questions) == list(answers)

    first = DIFFA.from_pretrained(adapters=WEIGHTS / "stage1")
    clip = REPORT["clips"][0]
    words = first.answer(WEIGHTS / clip["file"], "Please transcribe the speech.")
    assert words == [clip["transcription"]]


def test_rounding_that_changes_a_figure_is_an_error(tmp_path, monkeypatch):
    of_run = {"parts": {}, "minutes": {}, "stage2": {"repeat": {"word_error_rate": 2.0}}}
    (tmp_path / "report.json").write_text(json.dumps(of_run))
    rounded = copy.deepcopy(of_run)
    monkeypatch.setattr(bundle, "evaluate", lambda *given: copy.deepcopy(rounded))
    rounded["stage2"]["repeat"]["word_error_rate"] = 2.2
    assert bundle.measured(tmp_path, tmp_path)["stage2"] == rounded["stage2"]
    rounded["stage2"]["repeat"]["word_error_rate"] = 2.4
    with pytest.raises(ValueError, match="stage 2: repeat, WER .*: 2.00 became 2.40"):
        bundle.measured(tmp_path, tmp_path)
