"""The animation is one small SVG without scripts; each token appears at its step, in its colour."""

import xml.etree.ElementTree as ElementTree

import pytest

from evaluation.trace import END, MASK, TEXT, Step, colour
from lab import animation

SVG = "{http://www.w3.org/2000/svg}"
STEPS = [
    Step(["two", "_", "_", "_"], [0.9, 0.0, 0.0, 0.0], [TEXT, MASK, MASK, MASK]),
    # The last follows the end of the text.
    Step(["two", "<red> &", "", ""], [0.9, 0.25, 1.0, 0.0], [TEXT, TEXT, END, END]),
]


def test_each_token_appears_at_the_step_that_commits_it():
    assert animation.commit_steps(STEPS) == [0, 1, 1, 1]
    assert animation.commit_steps(STEPS[:1]) == [0, None, None, None]
    # The token itself may be an underscore.
    assert animation.commit_steps([Step(["_"], [0.4], [TEXT])]) == [0]


def test_the_svg_is_well_formed_small_and_without_scripts():
    svg = animation.unmasking_svg("a < b?", STEPS)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and "script" not in svg and len(svg) < 4000
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a < b?" in texts and "two" in texts and "<red> &" in texts
    assert "step 1 of 2" in texts and "step 2 of 2" in texts


def test_every_token_has_the_class_of_its_step_and_the_colour_of_its_confidence():
    root = ElementTree.fromstring(animation.unmasking_svg("What?", STEPS))
    tokens = [(g.get("class"), g.find(f"{SVG}rect").get("fill")) for g in root.iter(f"{SVG}g")]
    fills = [colour(0.9), colour(0.25), colour(1.0), animation.PANEL]
    expected = list(zip(["t t0", "t t1", "t t1", "t t1"], fills, strict=True))
    assert (
        tokens[:4] == expected and len(tokens) == 4 + 2
    )  # and the number of each of the two steps


def test_it_loops_and_ends_with_the_whole_answer():
    style = ElementTree.fromstring(animation.unmasking_svg("What?", STEPS)).find(f"{SVG}style").text
    assert "infinite" in style and "prefers-reduced-motion" in style
    assert all(f"@keyframes t{k}" in style and f".t{k}{{" in style for k in range(2))


def test_a_long_answer_wraps_inside_the_panel():
    texts = ["unconditionally"] * 18
    root = ElementTree.fromstring(
        animation.unmasking_svg("What?", [Step(texts, [0.5] * 18, [TEXT] * 18)])
    )
    cells = [rect for g in root.iter(f"{SVG}g") for rect in g.iter(f"{SVG}rect")]
    assert max(float(c.get("x")) + float(c.get("width")) for c in cells) <= animation.WIDTH
    assert len({c.get("y") for c in cells}) > 3 and float(root.get("viewBox").split()[3]) > 200


def test_the_command_animates_the_steps_of_a_real_answer(toy, toy_dirs, tone, tmp_path):
    from checkpoints.model import save_trained

    save_trained(toy, tmp_path / "adapters", toy_dirs["whisper"], toy_dirs["llm"])
    where = ["--whisper", toy_dirs["whisper"], "--llm", toy_dirs["llm"], "--device", "cpu"]
    where += ["--adapters", tmp_path / "adapters", "--out", tmp_path / "out" / "a.svg"]
    count = ["--length", 6, "--rule", "count", "--steps", 3]
    animation.main([str(value) for value in (tone(), "What is said?", *where, *count)])
    svg = (tmp_path / "out" / "a.svg").read_text()
    assert "step 3 of 3" in svg and svg.count('<g class="t ') == 6 + 3

    with pytest.raises(SystemExit, match="python -m lab.animation: .*no such audio file"):
        animation.main([str(value) for value in (tmp_path / "none.wav", "What?", *where)])
