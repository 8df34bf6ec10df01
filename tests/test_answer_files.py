"""A file of answers grows by whole lines, and is the same however often its command was killed."""

import json
from types import SimpleNamespace

import pytest
import torch

from evaluation.answer_files import answer_missing, pending_batches

NAMES = ["a", "b", 3, "d", "e\u2028"]
ORDER = [4, 0, 2, 1, 3]
PARTS = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("prompts", "semantic.norm")}
MODEL = SimpleNamespace(
    trained_parts=lambda: {"prompts": None, "semantic": None},
    named_parameters=lambda: [*PARTS.items(), ("lm.norm", torch.randn(1))],
)


def run(out, stop_after=None, names=NAMES, made_by=None):
    """Answer in batches of 2; returns the indices that were asked."""
    asked = []

    def rows(model, pending):
        for i in pending:
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(i)
            yield {"id": names[i], "text": f"answer\u2028{i}"}

    settings = {"made_by": made_by or {"llm": "x"}, "load_model": lambda: MODEL}
    answer_missing(out, names, ORDER, 2, answer_rows=rows, **settings)
    return asked


@pytest.mark.parametrize("stop_after", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("tail", ["", '{"id": "d', "{"])
def test_a_killed_command_resumes_and_gives_the_same_file(tmp_path, stop_after, tail):
    assert run(tmp_path / "whole") == ORDER
    rows = [json.loads(line) for line in (tmp_path / "whole").read_text().split("\n")[:-1]]
    assert [row["id"] for row in rows] == NAMES

    out = tmp_path / "out"
    if stop_after < len(NAMES):
        with pytest.raises(KeyboardInterrupt):
            run(out, stop_after)
    else:
        run(out, stop_after)
    with open(out, "a") as file:
        file.write(tail)

    # Whole batches are answered again, and complete ones are not.
    n_whole = stop_after // 2 * 2 if stop_after < len(NAMES) else len(NAMES)
    assert run(out) == ORDER[n_whole:]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert run(out) == []


def test_answers_of_another_model_or_other_questions_are_neither_resumed_nor_lost(tmp_path):
    out = tmp_path / "out"
    run(out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="begun with llm x, now y"):
        run(out, made_by={"llm": "y"})
    with pytest.raises(ValueError, match="line 1 is not an answer to a question here: 'a'"):
        run(out, names=["x", "b", 3, "d", "e"])
    assert out.read_bytes() == before

    # A record of before there was an option: made without it.
    for option in ("deliberate", "weights"):
        assert run(out, made_by={"llm": "x", option: "None"}) == []
        with pytest.raises(ValueError, match=f"begun with {option} None, now 0.9"):
            run(out, made_by={"llm": "x", option: "0.9"})

    assert run(out, made_by={"llm": "x", "no_lora": "False"}) == []
    with pytest.raises(ValueError, match="begun with no_lora False, now True"):
        run(out, made_by={"llm": "x", "no_lora": "True"})

    for content in ("one line without an end", '{"id": "a"}\n'):
        other = tmp_path / "other"
        other.write_text(content)
        with pytest.raises(ValueError, match="other.made_by is missing"):
            run(other)
        assert other.read_text() == content


@pytest.mark.parametrize("part", PARTS)
def test_answers_of_adapters_that_trained_further_are_not_resumed(tmp_path, monkeypatch, part):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=2)
    monkeypatch.setitem(PARTS, part, torch.ones(1))
    with pytest.raises(ValueError, match="begun with adapters_digest"):
        run(tmp_path / "out")


@pytest.mark.parametrize("line, problem", [
    ('{"id": "a"}\n{"id": "a"}', "line 2 is a second answer to 'a'"),
    ('{"id": ["a"]}', "line 1 is not an answer"),
    ("[]", "line 1 is not an answer"),
    ("{", "line 1: not valid JSON"),
    ("\ufffd".encode("utf-16").decode("latin-1"), "not a text file in UTF-8|not valid JSON"),
])  # fmt: skip
def test_what_is_no_file_of_answers_is_named(tmp_path, line, problem):
    (tmp_path / "out").write_bytes(f"{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=problem):
        run(tmp_path / "out")


def test_batches_do_not_depend_on_what_is_done():
    assert pending_batches([3, 1, 0, 2, 4], [True, True, False, True, True], 2) == [0, 2]
    assert pending_batches([3, 1, 0, 2, 4], [True] * 5, 2) == []
