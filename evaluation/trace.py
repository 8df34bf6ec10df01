"""A page that shows how an answer was filled in."""

import html
from pathlib import Path

from checkpoints.files import whole_file

STYLE = "body{font:16px sans-serif} td{padding:4px 8px;min-width:1em} th{color:#888}"


def write_trace(path: Path, question: str, rows: list[tuple[list[str], list[float]]]) -> None:
    """Write an HTML page with one row for each step of the sampler.

    Args:
        path: the page. question: its heading.
        rows: for each step, the G texts of the answer's tokens and their G confidences in [0, 1].
    """
    # A token stands on green, which is as opaque as the token is confident.
    lines = []
    for step, (texts, confidences) in enumerate(rows, start=1):
        line = f"<tr><th>{step}</th>"
        for text, confidence in zip(texts, confidences, strict=True):
            color = f"rgba(40,160,90,{confidence:.2f})"
            title = f"{confidence:.3f}"
            line += f'<td style="background:{color}" title="{title}">{html.escape(text)}</td>'
        lines.append(line + "</tr>")

    heading = f"<h1>{html.escape(question)}</h1>"
    legend = "<p>One row a step. The greener a token, the more confident the model.</p>"
    page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{heading}{legend}"
    with whole_file(path) as temporary:
        temporary.write_text(f"{page}<table>{''.join(lines)}</table>\n", encoding="utf-8")
