"""The experiment with DIFFA-2's later stages runs from manifests to its table."""

import json
import sys

import pytest

from lab import later_stages


@pytest.fixture
def run_command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["later_stages", *map(str, arguments)])
        later_stages.main()

    return run


def test_a_new_question_for_each_clip_pairs_of_own_mistakes_and_a_table(
    tiny_run, tmp_path, run_command, capsys
):
    run_command("corpus", "--run", tiny_run, "--out", tmp_path, "--clips", 3, "--test-clips", 2)
    items = json.loads((tmp_path / "train.json").read_text())
    new = [item for item in items if item["kind"] == later_stages.NEW_KIND]
    assert len(new) == len({item["audio_id"] for item in items}) == 3
    assert all(item["transcription"].split()[-1] == item["target"] for item in new)

    # A random model is nearly always wrong, and never says the target where it is.
    where = ["--device", "cpu"]
    pairs = ["--adapters", tiny_run / "stage2", "--train", tmp_path / "train.json"]
    run_command("pairs", *where, *pairs, "--out", tmp_path / "pairs.json", "--questions", 8)
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert 0 < len(found) <= 8
    assert all(item["rejected"] and item["rejected"] != item["target"] for item in found)

    capsys.readouterr()
    run_command("report", *where, "--test", tmp_path / "test.json", "--of", tiny_run / "stage2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| question | {tiny_run / 'stage2'} |"
    assert lines[-1].startswith("| known kinds | ")
    assert any(line.startswith("| last word | ") for line in lines)
