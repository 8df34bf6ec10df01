"""An SVG animation of a real answer: masks become tokens, coloured by their confidence.

    python -m lab.animation CLIP QUESTION --out docs/unmasking.svg     (options as in sampler.py)

The file holds CSS keyframes and no script, so that it plays inside an <img> tag. Its own dark panel
makes it readable on light and dark pages. With animations switched off, it shows the whole answer.

Shapes: G answer tokens.
"""

import html
from pathlib import Path

from checkpoints.command_line import one_line_errors
from checkpoints.files import whole_file
from evaluation.ask import ask, make_parser
from evaluation.trace import MASK, Step, colour

# Pixels. Text is stretched to its cell, so that the layout does not depend on the reader's font.
WIDTH = 720
EDGE = 20
CHARACTER = 9.6
PADDING = 7
LINE_HEIGHT = 38

STEP_SECONDS = 0.8
LAST_SECONDS = 3.0  # for which the finished answer stays

PANEL = "#161b22"
TEXT = "#e6edf3"
MASK_FILL = "#3d444d"


def commit_steps(steps: list[Step]) -> list[int | None]:
    """The step (from 0) at which each of the G positions stops being a mask; None: it stays one."""
    found: list[int | None] = [None] * len(steps[0].kinds)
    for number, step in enumerate(steps):
        for i, kind in enumerate(step.kinds):
            if found[i] is None and kind != MASK:
                found[i] = number

    return found


def keyframes(n_steps: int) -> str:
    """CSS that shows an element of class t3 from step 3 on; the last step stays longer."""
    seconds = n_steps * STEP_SECONDS + LAST_SECONDS
    # Without motion all steps are visible, which is the finished answer.
    rules = f".t{{animation:{seconds:g}s linear infinite}}"
    rules += "@media(prefers-reduced-motion:reduce){.t{animation:none!important}}"

    for k in range(n_steps):
        start = 100 * (k + 1) * STEP_SECONDS / seconds  # first, all masks for one step's time
        shown = f"0%,{start:.1f}%{{opacity:0}}{start + 1:.1f}%{{opacity:1}}"
        rules += f"@keyframes t{k}{{{shown}}}.t{k}{{animation-name:t{k}}}"
    return rules


def cell(x: float, y: float, text: str, fill: str, width: float | None = None) -> str:
    """A text on a rectangle that is as wide as the text or as `width`."""
    text_width = CHARACTER * len(text)
    width = width or text_width + 2 * PADDING
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="30" rx="5" fill="{fill}"/>'
        f'<text x="{x + PADDING:g}" y="{y + 20:g}" textLength="{text_width:g}">'
        f"{html.escape(text)}</text>"
    )


def unmasking_svg(question: str, steps: list[Step]) -> str:
    """An SVG document that plays the steps of an answer in a loop.

    Args:
        question: shown above the answer.
        steps: one or more (evaluation/trace.py).
    """
    body = [cell(EDGE, EDGE, question, PANEL)]
    x = EDGE
    y = EDGE + LINE_HEIGHT

    for text, confidence, number in zip(
        steps[-1].texts, steps[-1].confidences, commit_steps(steps)
    ):
        # A cell is as wide as the token that it will hold. Cells wrap like words.
        text = text.strip() or " "
        width = CHARACTER * len(text) + 2 * PADDING
        if x + width > WIDTH - EDGE:
            x = EDGE
            y += LINE_HEIGHT

        # The mask lies below; the token covers it from its step on.
        body.append(cell(x, y, "", MASK_FILL, width))
        if number is not None:
            fill = colour(confidence) if confidence > 0 else PANEL
            body.append(f'<g class="t t{number}">{cell(x, y, text, fill)}</g>')
        x += width + 6

    # The last line: the step, each covering the one before, and the colours of both ends.
    y += LINE_HEIGHT + 6
    for k in range(len(steps)):
        label = cell(EDGE, y, f"step {k + 1} of {len(steps)}", PANEL)
        body.append(f'<g class="t t{k}">{label}</g>')
    body.append(cell(WIDTH - 310, y, "confidence 0", colour(0)))
    body.append(cell(WIDTH - 170, y, "confidence 1", colour(1)))

    height = y + LINE_HEIGHT + EDGE
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" \
font-family="ui-monospace,Menlo,Consolas,monospace" font-size="16" fill="{TEXT}">
<style>{keyframes(len(steps))}</style>
<rect width="{WIDTH}" height="{height}" rx="10" fill="{PANEL}"/>"""
    return "\n".join([head, *body, "</svg>\n"])


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    parser.prog = "python -m lab.animation"
    parser.description = "Animate how an answer is unmasked."
    parser.add_argument("--out", type=Path, default=Path("docs/unmasking.svg"))
    args = parser.parse_args(arguments)

    with one_line_errors(parser.prog):
        _, steps, _ = ask(args, lambda texts: None)
        with whole_file(args.out) as temporary:
            temporary.write_text(unmasking_svg(args.question, steps), "utf-8")
    print(f"{args.out}: {len(steps)} steps")


if __name__ == "__main__":
    main()
