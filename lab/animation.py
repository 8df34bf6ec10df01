"""An SVG animation of a real answer: masks become tokens, step by step, coloured by their confidence.

    python -m lab.animation CLIP QUESTION --out docs/unmasking.svg

The file holds CSS keyframes and no script, so that it plays inside an <img> tag. It brings its own dark panel and is
readable on a light and on a dark page. Where animations are switched off, it shows the finished answer.

Shapes: G answer tokens.
"""

import argparse
import html
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.command_line import add_model_arguments, model_options, one_line_errors
from checkpoints.files import whole_file
from data import build_prompt, pad_waveforms, read_audio
from diffa import DIFFA
from sampler import CHOICES, SamplerConfig, answer, token_texts

Step = tuple[
    list[str], list[float]
]  # after a step: G texts, "_" for a mask and "" for the end; G confidences

# Pixels. Text is stretched to its cell, so that the layout does not depend on the reader's font.
WIDTH = 720
MARGIN = 20
CHARACTER = 9.6
PADDING = 7
CELL_HEIGHT = 30
LINE_HEIGHT = 38

STEP_SECONDS = 0.8
LAST_SECONDS = 3.0  # for which the finished answer stays

PANEL = "#161b22"
TEXT = "#e6edf3"
MASK = "#3d444d"
# TEXT is readable on both and on every mixture of the two (contrast 4.5 to 1 or more).
UNSURE = (0x9A, 0x45, 0x00)
CONFIDENT = (0x16, 0x6A, 0x3E)


def colour(confidence: float) -> str:
    """A colour between orange (confidence 0) and green (1), as #rrggbb."""
    mixed = (a + confidence * (b - a) for a, b in zip(UNSURE, CONFIDENT, strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def commit_steps(steps: list[Step]) -> list[int | None]:
    """The step (from 0) at which each of the G positions stops being a mask; None: it stays one."""
    found: list[int | None] = [None] * len(steps[0][0])

    for number, (texts, confidences) in enumerate(steps):
        for i, (text, confidence) in enumerate(zip(texts, confidences, strict=True)):
            # A position that follows the end of the text is filled without a confidence.
            if found[i] is None and (text != "_" or confidence > 0):
                found[i] = number

    return found


def keyframes(n_steps: int) -> str:
    """CSS that shows an element of class t3 from step 3 on; the last step stays longer."""
    seconds = n_steps * STEP_SECONDS + LAST_SECONDS
    # Without motion all steps are visible, which is the finished answer.
    rules = [
        f".t{{animation:{seconds:g}s linear infinite}}",
        "@media(prefers-reduced-motion:reduce){.t{animation:none!important}}",
    ]

    for k in range(n_steps):
        start = 100 * (k + 1) * STEP_SECONDS / seconds  # first, all masks for one step's time
        rules.append(
            f"@keyframes t{k}{{0%,{start:.1f}%{{opacity:0}}{start + 1:.1f}%{{opacity:1}}}}"
        )
        rules.append(f".t{k}{{animation-name:t{k}}}")

    return "".join(rules)


def text_at(x: float, y: float, text: str, fill: str = TEXT) -> str:
    """An SVG text, stretched to its number of characters."""
    length = f"{CHARACTER * len(text):g}"
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{fill}" textLength="{length}">{html.escape(text)}</text>'
    )


def box(x: float, y: float, width: float, fill: str) -> str:
    """An SVG rectangle as high as a cell."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL_HEIGHT}" rx="5" fill="{fill}"/>'
    )


def unmasking_svg(question: str, steps: list[Step]) -> str:
    """An SVG document that plays the steps of an answer in a loop.

    Args:
        question: shown above the answer.
        steps: one or more, as collected by the sampler's on_step (see Step).
    """
    body = [text_at(MARGIN, MARGIN + 18, question)]
    x = MARGIN
    y = MARGIN + LINE_HEIGHT

    for text, confidence, number in zip(*steps[-1], commit_steps(steps), strict=True):
        # A cell is as wide as the token that it will hold. Cells wrap like words.
        text = text.strip() or " "
        width = CHARACTER * len(text) + 2 * PADDING
        if x + width > WIDTH - MARGIN:
            x = MARGIN
            y += LINE_HEIGHT

        # The mask lies below; the token covers it from its step on.
        body.append(box(x, y, width, MASK))
        if number is not None:
            token = box(x, y, width, colour(confidence) if confidence > 0 else PANEL)
            token += text_at(x + PADDING, y + 20, text)
            body.append(f'<g class="t t{number}">{token}</g>')
        x += width + 6

    # The last line: each step's number covers that of the step before; and the scale of colours.
    y += LINE_HEIGHT + 6
    for k in range(len(steps)):
        label = box(MARGIN, y, 200, PANEL) + text_at(
            MARGIN, y + 20, f"step {k + 1} of {len(steps)}"
        )
        body.append(f'<g class="t t{k}">{label}</g>')
    scale = text_at(WIDTH - 270, y + 20, "confidence 0") + text_at(WIDTH - 30, y + 20, "1")
    body.append(scale + box(WIDTH - 144, y, 104, "url(#scale)"))

    height = y + CELL_HEIGHT + MARGIN
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" \
font-family="ui-monospace,Menlo,Consolas,monospace" font-size="16">
<style>{keyframes(len(steps))}</style>
<linearGradient id="scale"><stop stop-color="{colour(0)}"/>\
<stop offset="1" stop-color="{colour(1)}"/></linearGradient>
<rect width="{WIDTH}" height="{height}" rx="10" fill="{PANEL}"/>"""
    return "\n".join([head, *body, "</svg>\n"])


def steps_of_answer(model: DIFFA, clip: Path, question: str, config: SamplerConfig) -> list[Step]:
    """Answer a question about a clip; returns what the sampler held after each step."""
    waveforms, n_samples = pad_waveforms(
        [read_audio(clip)], model.encoder.config.n_samples, [str(clip)]
    )
    lm_config = model.lm.config
    steps = []

    def audio(rows: slice) -> tuple[Tensor, Tensor]:
        states = model.encode(waveforms.to(model.device), n_samples.to(model.device))
        return model.hear(*states)

    def collect(ids: Tensor, confidence: Tensor) -> None:
        texts = token_texts(model.tokenizer, ids[0].tolist(), lm_config.mask_id, lm_config.end_id)
        steps.append((texts, confidence[0].tolist()))

    prompt = build_prompt(model.tokenizer, question)
    with torch.inference_mode():
        list(answer(model.lm, model.tokenizer, [prompt], audio, config, on_step=collect))
    return steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.animation", description="Animate how an answer is unmasked."
    )
    parser.add_argument("clip", type=Path)
    parser.add_argument("question")
    parser.add_argument("--out", type=Path, default=Path("docs/unmasking.svg"))
    parser.add_argument("--length", type=int, default=18, help="tokens of the answer")
    parser.add_argument("--rule", default="threshold", choices=CHOICES["rule"])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--steps", type=int, help="of the count rule (default: one for each token)")
    add_model_arguments(parser, "runs/toy/stage2")
    args = parser.parse_args(arguments)

    with one_line_errors("python -m lab.animation"):
        config = SamplerConfig(
            length=args.length, rule=args.rule, threshold=args.threshold, steps=args.steps
        )
        model = DIFFA.from_pretrained(
            args.whisper, args.llm, args.adapters, **model_options(args)
        ).eval()
        steps = steps_of_answer(model, args.clip, args.question, config)
        with whole_file(args.out) as temporary:
            temporary.write_text(unmasking_svg(args.question, steps))

    print(f"{args.out}: {len(steps)} steps")


if __name__ == "__main__":
    main()
