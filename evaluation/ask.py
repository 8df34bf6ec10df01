"""The command of sampler.py: ask a question about an audio file and watch the masks fill.

    python sampler.py CLIP "QUESTION"                     answers, showing each denoising step
    python sampler.py CLIP "QUESTION" --trace out.html    also writes a page with all steps

The answer goes to the standard output. Where that is a terminal, the steps are one changing line of
it; elsewhere they go to the standard error, so that a script reads the answer alone.

Shapes: B clips, A audio embeddings, D LM width, S samples.
"""

import argparse
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from checkpoints.command_line import add_model_arguments, model_options, one_line_errors
from checkpoints.files import check_writable
from data import build_prompt, pad_waveforms, read_audio
from diffa import AUDIO_PARTS, DIFFA
from encoder import SAMPLE_RATE, EncoderConfig
from evaluation.trace import END, MASK, TEXT, Step, write_trace
from sampler import CHOICES, Answer, Generation, SamplerConfig, answer, generate

BROKEN = "\N{REPLACEMENT CHARACTER}"  # decodes bytes that are no whole character
SECONDS_A_STEP = 0.15  # a terminal shows the steps slowly enough to be watched
USUAL_LENGTH = 24  # tokens of an answer, where the adapters do not record theirs
RULE_OF = {"steps": "count", "threshold": "threshold", "factor": "factor"}  # who uses the option


def hear_clips(
    model: DIFFA, waveforms: list[Tensor], names: list[str], cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Audio embeddings (B, A, D) and mask (B, A) of clips (S,) at 16 kHz.

    names: of the clips, for errors. cut: shorten clips that are too long. Raises AudioError: a clip
    is longer than the encoder's window, and cut is false.
    """
    n_samples = model.encoder.config.n_samples
    padded, lengths = pad_waveforms(waveforms, n_samples, names, cut)
    return model.hear(*model.encode(padded.to(model.device), lengths.to(model.device)))


def token_texts(tokenizer, ids: list[int], mask_id: int, end_id: int) -> list[str]:
    """Text of each token for people: an underscore for a mask, nothing for the end.

    A character that takes several tokens is the text of its last one, once all are there; a part of
    one is not shown.
    """
    texts = []
    run = []  # tokens since the last mask
    done = ""  # their text so far
    for token in ids:
        if token in (mask_id, end_id):
            texts.append("_" if token == mask_id else "")
            run = []
            done = ""
            continue
        run.append(token)
        text = tokenizer.decode(run)
        if text.endswith(BROKEN):
            texts.append("")
        else:
            texts.append(text[len(done) :].replace(BROKEN, ""))
            done = text
    return texts


def joined(texts: list[str]) -> str:
    """The texts of tokens as one line, with spaces around masks and without control characters."""
    spaced = "".join(f" {text} " if text == "_" else text for text in texts)
    return "".join(filter(str.isprintable, " ".join(spaced.split())))


def one_line(texts: list[str], columns: float) -> str:
    """What fits of the line into so many columns of a terminal, the first mask included."""

    def width(text: str) -> int:
        drawn = [c for c in text if not unicodedata.combining(c)]
        return len(drawn) + sum(unicodedata.east_asian_width(c) in "WF" for c in drawn)

    line = joined(texts)
    if width(line) >= columns and "_" in texts:
        filled = joined(texts[: texts.index("_")])
        line = line[max(len(filled) - columns // 3, 0) :]
    while width(line) >= columns:
        line = line[:-1]
    return line


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description="Ask a question about an audio file.")
    option = parser.add_argument
    option("clip", help="WAV, FLAC, OGG or MP3; any rate; mono or stereo")
    option("question", help="in quotes")
    add_model_arguments(parser, "runs/toy/stage2")
    option("--stage", choices=AUDIO_PARTS, help="parts in the prompt (default: the adapters' own)")

    # How the answer is filled in.
    default = "(default: %(default)s)"
    trained = "as the adapters were trained with"
    option("--length", type=int, help=f"tokens of the answer (default: {trained})")
    option("--block-length", type=int, help="tokens of a block (default: the whole answer)")
    option("--rule", default="threshold", choices=CHOICES["rule"], help=default)
    option("--steps", type=int, help="of the count rule (default: one a token)")
    option("--threshold", type=float, help="of the threshold rule (default: 0.9)")
    option("--factor", type=float, help="of the factor rule (default: 1)")
    last = "of the factor rule: as in DIFFA-2, one that fails alone stays"
    option("--last-candidate", action="store_true", help=last)
    option("--temperature", type=float, default=0.0, help=f"of Gumbel noise, 0: none {default}")
    option("--remasking", default="low_confidence", choices=CHOICES["remasking"], help=default)
    option("--cfg-scale", type=float, default=0.0, help=f"of the guidance, 0: none {default}")
    option("--seed", type=int, default=0, help=f"of temperature and random remasking {default}")
    option("--cache", default="none", choices=CHOICES["cache"], help=default)
    option("--compile", action="store_true", help="torch.compile; pays off for many answers only")
    option("--cut", action="store_true", help="use only the start of a clip that is too long")
    return parser


def sampler_config(args: argparse.Namespace, length: int) -> SamplerConfig:
    """The sampler's settings; the length counts where the options give none.

    Raises ValueError: an impossible setting, or one that the rule does not use.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in RULE_OF.keys() & given.keys():
        if args.rule != RULE_OF[name]:
            raise ValueError(
                f"--{name} does nothing under --rule {args.rule}; add --rule {RULE_OF[name]}"
            )
    names = {field.name for field in fields(SamplerConfig)} & given.keys()
    return SamplerConfig(**{"length": length, **{name: given[name] for name in names}})


def answer_in_steps(
    model: DIFFA,
    waveform: Tensor,
    name: str,
    question: str,
    config: SamplerConfig,
    *,
    cut: bool = False,
    show: Callable[[Step], None] | None = None,
    decode: Callable[..., Generation] = generate,
) -> tuple[Answer, list[Step]]:
    """Answer a question about a clip (S,) at 16 kHz, and keep each step.

    name: of the clip, for errors. cut: shorten a clip that is too long. show: called after each
    step. decode: as of `answer`. Raises ValueError: something cannot be used.
    """
    lm_config = model.lm.config
    kinds = {lm_config.mask_id: MASK, lm_config.end_id: END}
    steps = []

    def on_step(ids: Tensor, confidence: Tensor) -> None:
        row = ids[0].tolist()
        texts = token_texts(model.tokenizer, row, lm_config.mask_id, lm_config.end_id)
        steps.append(Step(texts, confidence[0].tolist(), [kinds.get(i, TEXT) for i in row]))
        if show:
            show(steps[-1])

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        return hear_clips(model, [waveform], [name], cut)

    prompt = build_prompt(model.tokenizer, question)
    (result,) = answer(
        model.lm, model.tokenizer, [prompt], hear, config, decode=decode, on_step=on_step
    )
    return result, steps


def ask(
    args: argparse.Namespace, show: Callable[[list[str]], None]
) -> tuple[Answer, list[Step], Tensor]:
    """Answer the question of the command line.

    Args:
        show: called after each step with the texts of the answer's G tokens.
    Returns:
        the answer; its steps; and what was heard, (S,) at 16 kHz.
    Raises:
        ValueError or OSError: something cannot be used.
    """
    # Settings and the clip are checked before weights are read. The adapters' length is unknown:
    # this one allows any number of steps.
    sampler_config(args, length=max(args.steps or 0, 0) or USUAL_LENGTH)
    longest = EncoderConfig().n_samples / SAMPLE_RATE  # of every Whisper: 30 s
    waveform = read_audio(args.clip, seconds=longest if args.cut else None)
    options = model_options(args)
    model = DIFFA.from_pretrained(
        args.whisper, args.llm, args.adapters, stage=args.stage, **options
    ).eval()

    # In answers of another length than in their training the adapters make more errors.
    trained = model.answer_length
    if not (args.length or trained):
        unknown = "the adapters do not record the length of their answers"
        print(f"({unknown}: --length {USUAL_LENGTH})", file=sys.stderr)
    config = sampler_config(args, length=trained or USUAL_LENGTH)

    def show_texts(step: Step) -> None:
        show(step.texts)

    result, steps = answer_in_steps(
        model, waveform, args.clip, args.question, config, cut=args.cut, show=show_texts
    )
    return result, steps, waveform[: model.encoder.config.n_samples]


def answer_clip(args: argparse.Namespace) -> None:
    """Print the answer to the question of the command line, and each step."""
    if args.trace:
        check_writable(args.trace)

    # A terminal shows all steps on one line, a file or pipe a line for each.
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    live = screen.isatty()

    def show(texts: list[str]) -> None:
        if live:
            columns = os.get_terminal_size(screen.fileno()).columns or 80
            print(f"\r\033[K{one_line(texts, columns)}", end="", file=screen, flush=True)
            time.sleep(SECONDS_A_STEP)
        else:
            print(one_line(texts, math.inf), file=screen, flush=True)

    try:
        result, steps, heard = ask(args, show)
    finally:
        if live:
            print("\r\033[K", end="", file=screen, flush=True)
    print(result.text, flush=True)
    calls = f"{result.calls} model calls for {len(result.ids)} positions"
    counts = f"{calls}, {result.n_tokens} of them text"
    print(f"({counts})", file=sys.stderr)
    if args.trace:
        write_trace(args.trace, args.question, result.text, counts, heard, steps)


def main() -> None:
    parser = make_parser()
    parser.add_argument("--trace", type=Path, help="also write the steps as an HTML page, here")
    args = parser.parse_args()

    # An old terminal may lack characters of the answer.
    sys.stdout.reconfigure(errors="backslashreplace")
    with one_line_errors("sampler.py"):
        answer_clip(args)
