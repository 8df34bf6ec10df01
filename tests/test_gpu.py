"""The script for a GPU measures every part on a CPU too, and one part's failure loses no other."""

import json
import sys

import pytest
from torch import nn

from lab import gpu, roofline
from sampler import refine
from speed import compiled
from training import flops


@pytest.fixture(autouse=True)
def fast_measurements(monkeypatch):
    """Small matrices, short answers, nothing compiled."""
    monkeypatch.setattr(roofline, "BYTES_READ", {"cpu": 2**20})
    monkeypatch.setattr(flops, "MATRIX_SIZE", {"cpu": 64})
    monkeypatch.setattr(compiled, "compiled_refine", lambda device: refine)
    monkeypatch.setattr(nn.Module, "compile", lambda block: None)


def test_sampling_is_measured_against_floors_with_a_profile(tmp_path):
    gpu.main(["--tiny", "--parts", "qwen3-0.6b", "--only", str(tmp_path / "part.json")])
    tables = {table["title"]: table for table in json.loads((tmp_path / "part.json").read_text())}
    assert list(tables) == [
        "rates",
        "one answer",
        "compilation",
        "one call",
        "profile of a full pass",
        "profile of a block step",
        "batch",
    ]
    names = [row[0] for row in tables["one answer"]["rows"]]
    assert names[0] == "generate_plain, 16 steps" and names[-1].endswith("dual, compiled")
    assert [row[0] for row in tables["one call"]["rows"]] == ["full pass", "block step"]
    total = tables["profile of a block step"]["rows"][-1]
    assert total[0] == "all kernels" and float(total[2]) > 0


def test_joined_products_are_compared_with_the_layers_own(tmp_path):
    gpu.main(["--tiny", "--parts", "joined", "--only", str(tmp_path / "part.json")])
    (table,) = json.loads((tmp_path / "part.json").read_text())
    kinds = [row[:2] for row in table["rows"]]
    assert kinds == [[k, w] for w in ("apart", "joined") for k in ("full pass", "block step")]
    assert table["rows"][0][-1] == table["rows"][2][-1]


@pytest.mark.parametrize("name", gpu.STAGES)
def test_a_step_of_each_stage_is_timed_in_three_ways(name, tmp_path):
    gpu.main(["--tiny", "--parts", name, "--only", str(tmp_path / "part.json")])
    (table,) = json.loads((tmp_path / "part.json").read_text())
    assert [row[0].split(",")[0] for row in table["rows"]] == [
        "blocks recomputed (the recipe)",
        "all kept",
        "all kept",
    ]
    assert all(float(row[1]) > 0 for row in table["rows"])


@pytest.mark.long
def test_a_part_that_fails_or_hangs_keeps_its_tables_and_the_others(tmp_path, monkeypatch, capsys):
    written = json.dumps([{"title": "rates", "heads": ["a"], "rows": [["1.5"]]}])
    endings = {
        "stage1": r"raise ValueError('too hot\nAsk why.')",
        "stage2": "time.sleep(60)",
        "llada-8b": "",
    }

    def command(name, path, tiny):
        code = f"import time; open({str(path)!r}, 'w').write({written!r}); {endings[name]}"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(gpu, "command_of", command)
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys([*endings, "qwen3-0.6b"], 4))
    monkeypatch.setattr(gpu, "LEAST", 0)
    gpu.main(["--tiny", "--out", str(tmp_path / "page.md"), "--parts", *endings])

    parts = json.loads((tmp_path / "page.json").read_text())["parts"]
    failures = [part["failure"] for part in parts.values()]
    assert failures == ["ValueError: too hot", "stopped after 4 s", ""]
    page = (tmp_path / "page.md").read_text()
    assert page.count("| 1.5 |") == 3 and "Not finished: ValueError: too hot" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.json", "page.md"]
