"""A page that shows how an answer was filled in, for --trace: one file without outside resources.

From top to bottom: the question, the answer, the clip with its log-mel and a play button, a legend,
and one row of tokens for each step of the sampler. `token_row` also serves lab/page.py.

Shapes: G answer tokens, S samples.
"""

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch.nn.functional as F
from matplotlib.image import imsave
from torch import Tensor

from checkpoints.files import whole_file
from encoder import N_FFT, SAMPLE_RATE, log_mel

MASK = "mask"
END = "end"
TEXT = "text"

# White text is readable on both and on every mixture of the two (contrast 4.5 to 1 or more).
UNSURE = (0x9A, 0x45, 0x00)
CONFIDENT = (0x16, 0x6A, 0x3E)


class Step(NamedTuple):
    """The answer after one step of the sampler."""

    texts: list[str]  # G, as token_texts gives them
    confidences: list[float]  # G, of each token when it was committed, 0 without a prediction
    kinds: list[str]  # G: MASK, END or TEXT


def colour(confidence: float) -> str:
    """A colour between orange (confidence 0) and green (1), as #rrggbb."""
    mixed = (a + confidence * (b - a) for a, b in zip(UNSURE, CONFIDENT))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


# Rules for what `token_row` and `LEGEND` write; lab/page.py uses them too.
STYLE = f"""
.tokens{{display:flex;flex-wrap:wrap;gap:5px}}
.t{{display:inline-block;box-sizing:content-box;padding:3px 7px;border-radius:5px;color:#fff;
  min-height:2.2em;border:2px solid transparent;text-align:center;line-height:1.4;
  white-space:pre-wrap;overflow-wrap:anywhere}}
.t small{{display:block;color:inherit;font-size:.65em;line-height:1.1;opacity:.9}}
.mask{{border:2px dashed #8b949e88}}
.unasked{{background:#8b949e44;color:inherit}}
.end{{font-style:italic}}
.new{{border-color:#58a6ff}}
.legend{{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:.85em;align-items:center}}
.legend .t{{min-height:0;min-width:1em;vertical-align:middle;font-size:.9em}}
.scale{{display:inline-block;width:7em;height:.8em;border-radius:4px;vertical-align:middle;
  background:linear-gradient(90deg,{colour(0)},{colour(1)})}}
"""

LEGEND = f"""<p class="legend"><span>confidence 0 <span class="scale"></span> 1, also in %</span>
<span><span class="t mask">&nbsp;</span> mask</span>
<span><span class="t new" style="background:{colour(1)}">new</span> committed by this step</span>
<span><span class="t end unasked">end</span> end of the text; grey: filled in after it</span>
<span><span class="t unasked">…</span> part of the next character</span></p>
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{question}</title>
<style>
:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:12px}}
h1{{font-size:1.3rem;margin:.3em 0}} h2{{font-size:1rem;margin:1.1em 0 .3em}}
h2 span{{font-weight:normal;opacity:.7}}
.clip{{position:relative}}
.clip img{{display:block;width:100%;height:120px;border-radius:6px}}
#head{{position:absolute;top:0;bottom:0;width:2px;background:#58a6ff;transition:left .25s linear}}
audio{{width:100%;margin-top:6px}}
{style}</style>
<h1 dir="auto">{question}</h1>
<p dir="auto"><b>{answer}</b></p>
<p>{summary}</p>
<div class="clip"><img src="{picture}" alt="log-mel spectrogram of the clip, low pitches below">\
<div id="head" style="left:0"></div></div>
<audio controls src="{sound}"></audio>
{legend}
{steps}<script>
const sound = document.querySelector("audio"), head = document.getElementById("head");
sound.ontimeupdate = () => head.style.left = 100 * sound.currentTime / sound.duration + "%";
</script></html>
"""


def visible(text: str) -> str:
    """The text in HTML: escaped, and with what cannot be seen, such as a newline, written out."""
    shown = text.replace("\n", "⏎")
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown)
    return html.escape(shown)


def token_row(steps: list[Step], number: int) -> str:
    """The G tokens of step `number` (from 0) in HTML; those that it committed are marked."""
    cells = []
    last = steps[-1].texts
    old_kinds = steps[number - 1].kinds if number else [MASK] * len(last)
    for i, (text, confidence, kind, old) in enumerate(zip(*steps[number], old_kinds)):
        # A cell is as wide as its last text, so that no token moves from step to step.
        title = f"position {i + 1}"
        style = f"min-width:{len(last[i]) or 3}ch"
        if kind == MASK:
            cells.append(f'<bdi class="t mask" title="{title}" style="{style}"></bdi>')
            continue

        # An empty text is the end, or a part of a character that is complete further on.
        label = visible(text) or ("end" if kind == END else "…")
        classes = f"t {kind}"
        if old == MASK:
            classes += " new"

        # After the end of the text, tokens are filled in without a prediction.
        if confidence > 0:
            style += f";background:{colour(confidence)}"
            title += f", confidence {confidence:.3f}"
            label += f"<small>{100 * confidence:.0f}</small>"
        else:
            classes += " unasked"
        cells.append(f'<bdi class="{classes}" title="{title}" style="{style}">{label}</bdi>')
    return f'<div class="tokens">{"".join(cells)}</div>'


def step_heading(steps: list[Step], number: int) -> str:
    """What step `number` (from 0) did, in HTML. For one clip, each step is one model call."""
    filled = [sum(kind != MASK for kind in step.kinds) for step in steps[: number + 1]]
    new = filled[-1] - (filled[-2] if number else 0)
    calls = f"{number + 1} model call" + "s" * (number > 0)
    positions = f"{filled[-1]} of {len(steps[0].kinds)} positions"
    return f"Step {number + 1} <span>· {calls} so far · {new} new · {positions}</span>"


def data_link(kind: str, content: bytes) -> str:
    """A link that holds the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_of(waveform: Tensor) -> bytes:
    """The log-mel of a waveform (S,) at 16 kHz as a PNG, one pixel for 10 ms."""
    padded = F.pad(waveform, (0, max(N_FFT - len(waveform), 0)))  # the filters need 25 ms
    file = io.BytesIO()
    imsave(file, log_mel(padded).numpy(), cmap="magma", origin="lower", format="png")
    return file.getvalue()


def sound_of(waveform: Tensor) -> bytes:
    """A waveform (S,) at 16 kHz as a WAV file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, waveform.clamp(-1, 1).numpy(), SAMPLE_RATE, "PCM_16", format="WAV")
    return file.getvalue()


def write_trace(
    path: Path, question: str, answer: str, summary: str, waveform: Tensor, steps: list[Step]
) -> None:
    """Write the page.

    Args:
        path: the HTML file. question, answer: texts. summary: one line about what it cost.
        waveform: (S,) at 16 kHz, what the model heard. steps: in their order.
    """
    rows = []
    for number in range(len(steps)):
        heading = step_heading(steps, number)
        rows.append(f"<section><h2>{heading}</h2>\n{token_row(steps, number)}</section>\n")

    page = PAGE.format(
        question=visible(question),
        answer=visible(answer),
        summary=visible(summary),
        picture=data_link("image/png", picture_of(waveform)),
        sound=data_link("audio/wav", sound_of(waveform)),
        style=STYLE,
        legend=LEGEND,
        steps="".join(rows),
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
