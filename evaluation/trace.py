"""A page that shows how an answer was filled in."""

import html
from pathlib import Path

from checkpoints.files import whole_file

HEAD = """<!doctype html><meta charset=utf-8>
<style>body{font:16px sans-serif} td{padding:4px 8px;min-width:1em} th{color:#888}</style>
<h1>%s</h1><p>One row a step. The greener a token, the more confident the model.</p>
"""
CELL = '<td style="background:rgba(40,160,90,{1:.2f})" title="{1:.3f}">{0}</td>'


def write_trace(path: Path, question: str, rows: list[tuple[list[str], list[float]]]) -> None:
    """Write an HTML page with one row for each step of the sampler.

    Args:
        path: the page. question: its heading.
        rows: for each step, the G texts of the answer's tokens and their G confidences in [0, 1].
    """
    lines = []
    for step, (texts, confidences) in enumerate(rows, start=1):
        cells = [CELL.format(html.escape(text), p) for text, p in zip(texts, confidences)]
        lines.append(f"<tr><th>{step}</th>{''.join(cells)}</tr>\n")

    with whole_file(path) as temporary:
        page = f"{HEAD % html.escape(question)}<table>\n{''.join(lines)}</table>\n"
        temporary.write_text(page, encoding="utf-8")
