"""A page on this machine: hear a clip, ask about it, and watch the masks fill.

    python -m lab.page                               with the weights in toy/weights
    python -m lab.page --adapters RUN/stage2         with a run; model options as in sampler.py

A clip is uploaded, recorded, or a sentence that eSpeak speaks in a voice of the toy's test set.
Where the run has the autoregressive baseline of lab/ablations.py, its answer stands below for
contrast. The page listens on loopback only, unless --host says otherwise.
"""

import argparse
import functools
import random
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from checkpoints.command_line import add_model_arguments, model_options, number, one_line_errors
from data import read_audio
from diffa import DIFFA
from encoder import SAMPLE_RATE
from evaluation.ask import answer_in_steps
from evaluation.clips import RULE_OF, USUAL_LENGTH
from evaluation.trace import LEGEND, MASK, STYLE, Step, step_heading, token_row, visible
from lab.baseline import load_baseline
from sampler import SamplerConfig
from speed.checks import CHOICES
from toy.autoregressive import greedy
from toy.grammar import ACCENTS, QUESTIONS, random_sentence
from toy.speech import VOICES, prepare_espeak, speak, to_waveform, without_silence

LONGEST_SENTENCE = 200  # characters
SECONDS_A_STEP = 0.15  # a step stays so long at least, to be watched
AT_ONCE = 4  # answers that are computed at the same time


def load_models(args: argparse.Namespace) -> tuple[DIFFA, DIFFA | None]:
    """The model of the options, and the autoregressive baseline of its run if there is one."""
    options = model_options(args)
    model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters, **options).eval()
    if args.random_weights:
        return model, None
    return model, load_baseline(Path(args.adapters).parent, **options)


def config_of(
    length: int, rule: str, steps: int, threshold: float, factor: float, cache: str, block: int
) -> SamplerConfig:
    """The sampler's settings; of steps, threshold and factor only the rule's own counts.

    The Frechet rule has its default. block: tokens of a block, 0: one block. Raises ValueError: an
    impossible setting.
    """
    numbers = {"steps": int(steps), "threshold": threshold, "factor": factor}
    own = {name: number for name, number in numbers.items() if RULE_OF[name] == rule}
    block_length = int(block) or None
    return SamplerConfig(length=length, rule=rule, cache=cache, block_length=block_length, **own)


def shown(steps: list[Step], number: int) -> str:
    """Step `number` (from 1) of an answer in HTML, the last one if there are fewer."""
    at = min(int(number), len(steps)) - 1
    return f"<b>{step_heading(steps, at)}</b>{token_row(steps, at)}" if steps else ""


def answer_file(
    model: DIFFA, baseline: DIFFA | None, clip: str | None, question: str, *settings
) -> tuple[str, str, list[Step], list[Step]]:
    """Answer a question about the file `clip`; settings: of config_of, after the length.

    Returns the answer, what it cost, its steps, and those of the autoregressive baseline (none
    without one). Raises ValueError or OSError: as the command line's.
    """
    if not clip:
        raise ValueError("there is no clip: upload one, record one, or let eSpeak speak one")
    if not question.strip():
        raise ValueError("there is no question: type one")
    name = Path(clip).name
    config = config_of(model.answer_length or USUAL_LENGTH, *settings)

    # The clock runs from the file to the text.
    started = time.perf_counter()
    waveform = read_audio(clip)
    result, steps = answer_in_steps(model, waveform, name, question, config)
    seconds = time.perf_counter() - started
    calls = f"{result.calls} model call{'s' * (result.calls > 1)} for {len(result.ids)} positions"
    costs = f"{calls}, {result.n_tokens} of them text · {seconds:.2f} s"

    # The baseline writes from left to right. What it has not written yet has no confidence.
    other = []
    if baseline is not None:
        config = SamplerConfig(length=baseline.answer_length or USUAL_LENGTH)
        asked = (baseline, waveform, name, question, config)
        for step in answer_in_steps(*asked, decode=greedy)[1]:
            kinds = [kind if c else MASK for kind, c in zip(step.kinds, step.confidences)]
            other.append(step._replace(kinds=kinds))
        costs += f" · autoregressive baseline: {len(other)} calls"
    return result.text, costs, steps, other


def say(text: str, accent: str, voice: str, rate: int, pitch: int, data: Path):
    """What eSpeak says: rate and samples (S,) of 16 bits. Raises ValueError: no or long text."""
    text = "".join(filter(str.isprintable, text)).strip()
    if not 0 < len(text) <= LONGEST_SENTENCE:
        raise ValueError(f"the sentence needs 1 to {LONGEST_SENTENCE} characters")
    samples, _ = speak(text, f"{ACCENTS[accent]}+{voice}", int(rate), int(pitch), data)
    waveform = to_waveform(without_silence(samples))
    return SAMPLE_RATE, (waveform * 32767).astype(np.int16)


def errors_in_page(function: Callable) -> Callable:
    """The generator function, with the command line's errors as messages of the page."""
    import gradio

    @functools.wraps(function)
    def wrapped(*values):
        try:
            with one_line_errors("page"):
                yield from function(*values)
        except SystemExit as error:
            # A visitor sees the name of a file, not where the server keeps it.
            message = str(error).removeprefix("page: ")
            for value in values:
                if isinstance(value, str) and value.startswith("/"):
                    message = message.replace(value, Path(value).name)
            raise gradio.Error(visible(message), duration=None) from None

    return wrapped


def draw() -> str:
    """A sentence of the grammar, none of those that the toy was trained on."""
    return random_sentence(random.Random(), held_out=True).text


def clip_inputs(gr, data: Path) -> tuple:
    """The left column: the clip, and how eSpeak may speak one. gr: gradio."""

    def on_speak(*values):
        yield say(*values, data)

    clip = gr.Audio(label="Clip", type="filepath", elem_id="clip")
    sentence = gr.Textbox(label="Sentence for eSpeak")
    with gr.Row():
        drawing = gr.Button("Draw a sentence")
        speaking = gr.Button("Speak it")

    # The voices are those of the test set, which the toy was not trained on.
    voices = VOICES["test", "female"] + VOICES["test", "male"]
    with gr.Row():
        voice = [
            gr.Dropdown(list(ACCENTS), label="Accent"),
            gr.Dropdown(voices, label="Voice"),
            gr.Slider(100, 350, 200, step=1, label="Words a minute"),
            gr.Slider(0, 99, 50, step=1, label="Pitch"),
        ]

    # eSpeak can say one sentence at a time, and gradio runs an event's function once at a time.
    drawing.click(draw, None, sentence, api_name="draw")
    speaking.click(errors_in_page(on_speak), [sentence, *voice], clip, api_name="speak")
    return clip, sentence


def question_inputs(gr) -> list:
    """The right column: the question, and the settings in the order of config_of. gr: gradio."""
    usual = [wordings[0] for wordings in QUESTIONS.values()]
    question = gr.Dropdown(usual[::-1], label="Question", allow_custom_value=True)
    with gr.Row():
        rule = gr.Radio(CHOICES["rule"], value="threshold", label="Rule")
        cache = gr.Radio(CHOICES["cache"], value="none", label="Cache")

    # The numbers of three rules, of which one counts.
    with gr.Row():
        threshold = gr.Slider(0.05, 1, 0.9, step=0.01, label="Threshold")
        steps = gr.Slider(1, 128, 6, step=1, label="Steps (count)")
        factor = gr.Slider(0.1, 4, 1, step=0.1, label="Factor")
        block = gr.Slider(0, 128, 0, step=1, label="Block (0: one)")
    return [question, rule, steps, threshold, factor, cache, block]


def build_page(model: DIFFA, baseline: DIFFA | None, data: Path):
    """The page as gradio.Blocks. data: eSpeak's folder, from toy.speech.prepare_espeak."""
    import gradio as gr

    with gr.Blocks(title="DIFFA", analytics_enabled=False) as page:
        gr.Markdown("## DIFFA: ask a diffusion language model about a clip")
        with gr.Row():
            with gr.Column():
                clip, sentence = clip_inputs(gr, data)
            with gr.Column():
                settings = question_inputs(gr)
                asking = gr.Button("Ask", variant="primary")

        # The answer. Its steps are kept for each visitor, so that the slider can show them again.
        kept = gr.State(([], []))
        text = gr.Textbox(label="Answer", elem_id="answer")
        slider = gr.Slider(1, 2, 1, step=1, label="Step")
        row = gr.HTML(elem_id="steps")
        gr.HTML(LEGEND)
        costs = gr.Markdown(elem_id="costs")
        contrast = gr.HTML(label="Autoregressive baseline", visible=baseline is not None)

        def on_ask(*values):
            answer, cost, own, other = answer_file(model, baseline, *values)
            for n in range(1, max(len(own), len(other)) + 1):
                moved = gr.Slider(maximum=max(n, 2), value=n)
                yield answer, cost, moved, shown(own, n), shown(other, n), (own, other)
                time.sleep(SECONDS_A_STEP)

        def on_step(both, number):
            return [shown(one, number) for one in both]

        # No function keeps anything of a visitor.
        page.load(draw, None, sentence, api_name=False)
        ask = errors_in_page(on_ask)
        results = [text, costs, slider, row, contrast, kept]
        asking.click(ask, [clip, *settings], results, api_name="ask", concurrency_limit=AT_ONCE)
        slider.release(on_step, [kept, slider], [row, contrast], api_name="step")
    return page


def launch(page, host: str, port: int, wait: bool) -> None:
    """Serve a page of build_page; returns when it ends, or without `wait` as soon as it is up."""
    import gradio as gr

    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        quiet=True,
        share=False,
        _frontend=False,  # no check whether the page answers in 3 s: a busy machine would fail
        max_file_size="100mb",
        css=STYLE,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.page"
    parser = argparse.ArgumentParser(prog=name, description="A page that answers about clips.")
    add_model_arguments(parser, "toy/weights/stage2")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: loopback only)")
    port = functools.partial(number, kind=int, least=1, most=65_535)
    parser.add_argument("--port", type=port, default=7860, help="(default: %(default)s)")
    args = parser.parse_args(arguments)

    with one_line_errors(name):
        if find_spec("gradio") is None:
            raise ValueError("the page needs gradio; install it: pip install -e '.[page]'")
        with tempfile.TemporaryDirectory() as temporary:
            prepare_espeak(Path(temporary))
            page = build_page(*load_models(args), Path(temporary))
            print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
            launch(page, args.host, args.port, wait=True)


if __name__ == "__main__":
    main()
