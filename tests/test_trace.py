"""The page of the sampler's steps: one file, whose parts are read back."""

import base64
import io
import re

import pytest
import soundfile
import torch

from checkpoints.sizes import LM_SIZES
from checkpoints.tokenizer import ByteTokenizer
from evaluation import trace
from evaluation.screen import token_texts
from evaluation.trace import END, MASK, TEXT, Step, write_trace

STEPS = [
    Step(["_", "<b>", "", "_"], [0.0, 0.5, 0.3, 0.0], [MASK, TEXT, TEXT, MASK]),
    Step(["x\n", "<b>", "日", ""], [0.9, 0.5, 0.3, 0.0], [TEXT, TEXT, TEXT, END]),
]


@pytest.fixture
def page(tmp_path):
    waveform = 0.5 * torch.sin(torch.arange(8000) / 5)
    write_trace(tmp_path / "t.html", "a < b? \u202e", "x <b>日", "2 calls", waveform, STEPS)
    return (tmp_path / "t.html").read_text("utf-8")


def cells(row: str) -> list[tuple[str, str]]:
    """Class and content of each token in HTML."""
    return re.findall(r'<bdi class="t ([a-z ]+)"[^>]*>(.*?)</bdi>', row)


def test_the_trace_is_one_file_without_outside_resources(page):
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert 'name="viewport"' in page and "mask</span>" in page  # for phones; the legend


def test_the_trace_holds_the_sound_and_its_log_mel(page):
    sound, picture = (
        base64.b64decode(re.search(f'"data:{kind};base64,([^"]+)"', page)[1])
        for kind in ("audio/wav", "image/png")
    )
    samples, rate = soundfile.read(io.BytesIO(sound))
    assert rate == 16_000 and len(samples) == 8000 and abs(samples[3] - 0.282) < 1e-3
    width, height = (int.from_bytes(picture[i : i + 4]) for i in (16, 20))
    assert (width, height) == (50, 80) and "<audio controls" in page


def test_the_trace_has_a_row_a_step_with_its_calls_and_escapes_the_words(page):
    assert page.count("<section>") == 2 and len(cells(page)) == 8
    assert "1 model call so far · 2 new · 2 of 4 positions" in page
    assert "2 model calls so far · 2 new · 4 of 4 positions" in page
    assert "&lt;b&gt;" in page and "<b>日" not in page and "a &lt; b? \\u202e" in page


def test_a_token_shows_its_kind_and_whether_it_is_new():
    first, second = cells(trace.token_row(STEPS, 0)), cells(trace.token_row(STEPS, 1))
    assert [kind for kind, _ in first] == ["mask", "text new", "text new", "mask"]
    assert [kind for kind, _ in second] == ["text new", "text", "text", "end new unasked"]
    assert [text.split("<")[0] for _, text in first] == ["", "&lt;b&gt;", "…", ""]
    assert [text.split("<")[0] for _, text in second] == ["x⏎", "&lt;b&gt;", "日", "end"]


def test_characters_of_several_tokens_and_markers_show_right():
    tokenizer = ByteTokenizer(LM_SIZES["llada-8b"])
    ids = tokenizer.encode("né日<|eot_id|>🙂")
    texts = token_texts(tokenizer, ids, 126_336, 126_081)
    row = trace.token_row([Step(texts, [0.5] * len(ids), [TEXT] * len(ids))], 0)
    shown = [text.split("<small>")[0] for _, text in cells(row)]
    expected = ["n", "…", "é", "…", "…", "日"]
    expected += ["&lt;|eot_id|&gt;", "…", "…", "…", "🙂"]
    assert shown == expected


def test_white_text_has_contrast_on_every_colour():
    def luminance(hex_colour):
        channels = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert trace.colour(0.0) == "#9a4500" and trace.colour(1.0) == "#166a3e"
    for n in range(11):
        assert luminance("#e6edf3") + 0.05 >= 4.5 * (luminance(trace.colour(n / 10)) + 0.05)
