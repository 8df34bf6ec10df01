"""The page of the sampler's steps."""

from evaluation.trace import write_trace


def test_write_trace_has_a_row_a_step_and_escapes_the_words(tmp_path):
    rows = [(["_", "<b>"], [0.0, 0.5]), (["x", "<b>"], [0.9, 0.5])]
    write_trace(tmp_path / "t.html", "a < b?", rows)
    page = (tmp_path / "t.html").read_text()
    assert page.count("<tr>") == 2 and page.count("<td") == 4
    assert "&lt;b&gt;" in page and "<b>" not in page and "a &lt; b?" in page
