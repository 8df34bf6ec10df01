"""The animation is one small SVG without scripts; each token appears at its step, in its colour."""

import xml.etree.ElementTree as ElementTree

import pytest

from lab import animation

SVG = "{http://www.w3.org/2000/svg}"
STEPS = [
    (["two", "_", "_", "_"], [0.9, 0.0, 0.0, 0.0]),
    (["two", "<red> &", "", ""], [0.9, 0.25, 1.0, 0.0]),  # the last follows the end of the text
]


def test_each_token_appears_at_the_step_that_commits_it():
    assert animation.commit_steps(STEPS) == [0, 1, 1, 1]
    assert animation.commit_steps(STEPS[:1]) == [0, None, None, None]
    assert animation.commit_steps([(["_"], [0.4])]) == [0]  # the token itself may be an underscore


def test_colours_run_from_the_least_to_the_greatest_confidence():
    assert animation.colour(0.0) == "#9a4500" and animation.colour(1.0) == "#166a3e"
    assert len({animation.colour(n / 10) for n in range(11)}) == 11


def test_the_text_has_contrast_on_every_colour():
    def luminance(hex_colour):
        channels = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = luminance(animation.TEXT) + 0.05
    for n in range(11):
        assert text / (luminance(animation.colour(n / 10)) + 0.05) >= 4.5  # WCAG's AA


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
    fills = [animation.colour(0.9), animation.colour(0.25), animation.colour(1.0), animation.PANEL]
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
    root = ElementTree.fromstring(animation.unmasking_svg("What?", [(texts, [0.5] * 18)]))
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
