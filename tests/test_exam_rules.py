"""Real and odd items of the exams: what is asked of them, and how replies to them are marked."""

import json
from pathlib import Path

import pytest

from evaluation.exam_clips import find_clip
from evaluation.exam_files import load_items
from evaluation.exam_rules import EXAMS, MMAU, MMSU, SUBSETS, fill_template, find_exam
from evaluation.exam_scores import score_lines

MMAU_EXCERPT = Path(__file__).parent / "exams/mmau-excerpt.json"  # 12 real items
MMSU_ITEM = {
    "id": 7,
    "task_name": "pitch",
    "audio_path": "/audio/7.wav",
    "question": "Who talks?",
    "category": "Perception",
}


@pytest.mark.parametrize("choices, answer, lines", [
    ({"a": None, "b": "male", "c": None, "d": "female"}, "female", "B. male\nD. female"),
    ({"a": "rising", "b": "falling"}, "falling", "A. rising\nB. falling"),
    ({"a": "rising", "b": "falling", "c": "", "d": ""}, "rising", "A. rising\nB. falling"),
    ({"a": 2, "b": 3.5, "c": "4", "d": None}, 3.5, "A. 2\nB. 3.5\nC. 4"),
])  # fmt: skip
def test_mmsu_asks_only_the_choices_that_are_there_under_their_own_letters(
    choices, answer, lines, tmp_path
):
    item = MMSU_ITEM | {f"choice_{letter}": text for letter, text in choices.items()}
    item["answer_gt"] = answer
    (tmp_path / "mmsu.jsonl").write_text(json.dumps(item))
    assert load_items(tmp_path / "mmsu.jsonl", MMSU) == [item]
    assert fill_template(MMSU.template, item, MMSU).endswith(f"Question: Who talks?\n\n{lines}")
    assert MMSU.candidates(item) == [line[0] for line in lines.split("\n")]

    # The letter of the field is right, by every rule; a letter without a choice is wrong.
    letter = next(letter.upper() for letter, text in choices.items() if text == answer)
    for rule in MMSU.rules:
        assert rule.mark(item, f"{letter}.") is True
        wrong = next(other for other in "ABCD" if other != letter)
        assert rule.mark(item, f"{wrong}.") is False


def test_an_answer_that_names_a_choice_of_null_is_an_error():
    item = MMSU_ITEM | {"choice_a": "yes", "choice_b": "no", "choice_c": None, "answer_gt": "C"}
    with pytest.raises(ValueError, match="'C' names a choice that is null or absent"):
        MMSU.check(item)


def test_of_two_equal_choices_both_are_right():
    item = dict(zip(("choice_a", "choice_b", "choice_c"), ("same", "same", "other")))
    item |= {"answer_gt": "same"}
    for reply, right in (("A", True), ("B", True), ("C", False)):
        assert [rule.mark(item, reply) for rule in MMSU.rules] == [right] * 3


def test_audio_is_found_below_the_folder_even_if_its_path_begins_with_a_slash(tmp_path):
    (tmp_path / "audio").mkdir()
    below = tmp_path / "audio/7.wav"
    alone = tmp_path / "8.wav"
    for file in (below, alone):
        file.write_bytes(b"")
    assert find_clip("/audio/7.wav", tmp_path) == find_clip("audio/7.wav", tmp_path) == below
    assert find_clip("./audio/7.wav", tmp_path) == below
    assert find_clip(str(below), tmp_path / "elsewhere") == below
    assert find_clip("/audio/8.wav", tmp_path) == alone
    assert find_clip("/audio/9.wav", tmp_path) == tmp_path / "audio/9.wav"


def test_real_items_of_mmau_are_asked_with_all_their_choices_and_marked():
    items = load_items(MMAU_EXCERPT, MMAU)
    assert {len(item["choices"]) for item in items} == {2, 4, 5, 8}
    for item in items:
        prompt = fill_template(MMAU.template, item, MMAU)
        lines = [f"{letter}. {text}" for letter, text in zip("ABCDEFGH", item["choices"])]
        assert prompt.endswith("\nChoices:\n" + "\n".join([*lines, "Answer:"]))
        assert f"\n\nQuestion: {item['question']}\n\n" in prompt

    # The right texts are right. Behind their letter, MMAU's own rule takes the letter for a word.
    lettered = []
    for item in items:
        correct = item["choices"].index(item["answer"])
        lettered.append(item | {"model_output": f"{'ABCDEFGH'[correct]}. {item['answer']}"})
        for rule in MMAU.rules:
            assert rule.mark(item, item["answer"]) is True
            assert rule.mark(item, item["choices"][correct - 1]) is False
    own, stripped = score_lines(MMAU, lettered)[:2]
    assert " 83.33 % of 12 by MMAU's own rule" in own
    assert "100.00 % of 12 by the same, once a leading letter is cut off" in stripped


def test_a_template_takes_any_field_of_an_item_and_nothing_else():
    item = {"question": "Why {choices}?", "choices": ["x", "y"], "sub-category": "z", "id": 3}
    template = "{id} {sub-category} {question} {{}} { }\n{choices}"
    assert fill_template(template, item, MMAU) == "3 z Why {choices}? {{}} { }\nA. x\nB. y"
    with pytest.raises(ValueError, match=r"a field \{answr\}, the item only choices, id, question"):
        fill_template("{answr}", item, MMAU)


def test_voicebench_s_instruction_is_one_block_and_never_empty():
    for subset in SUBSETS.values():
        prompt = fill_template(subset.template, {"audio_path": "x.wav", "prompt": "Why?"}, subset)
        lines = prompt.split("\n")
        assert lines[:2] == ["", "### Instruction:"]
        assert [line[:2] for line in lines[3:5]] == ["1.", "2."]
        assert lines[5:] == ["", "### Response:", ""]


def test_exams_use_the_release_s_samplers():
    lengths = {name: exam.sampler.length for name, exam in EXAMS.items()}
    assert lengths == {"mmsu": 4, "mmau": 16, "voicebench": 16}
    for exam in (*EXAMS.values(), *SUBSETS.values()):
        sampler = exam.sampler
        assert sampler.steps == sampler.block_length == sampler.length
        assert (sampler.rule, sampler.temperature, sampler.cfg_scale) == ("count", 0, 0)


def test_mtbench_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="mtbench has several turns, which are not asked here"):
        find_exam("voicebench", "mtbench")
