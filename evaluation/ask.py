"""The command of sampler.py: ask a question about an audio file and watch the masks fill.

    python sampler.py CLIP "QUESTION"                     answers, showing each denoising step
    python sampler.py CLIP "QUESTION" --trace out.html    also writes a page with a row a step

Shapes: B clips, A audio embeddings, D LM width, S samples.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from checkpoints.command_line import add_model_arguments, model_options, one_line_errors
from data import build_prompt, pad_waveforms, read_audio
from diffa import AUDIO_PARTS, DIFFA
from evaluation.trace import write_trace
from sampler import CHOICES, SamplerConfig, answer

SECONDS_A_STEP = 0.15  # a terminal shows the steps slowly enough to be watched


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
    """Text of each token for people: an underscore for a mask, nothing for the end."""
    special = {mask_id: "_", end_id: ""}
    return [special[token] if token in special else tokenizer.decode([token]) for token in ids]


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description="Ask a question about an audio file.")
    option = parser.add_argument
    option("clip", help="WAV, FLAC, OGG or MP3; any rate; mono or stereo")
    option("question")
    add_model_arguments(parser, "runs/toy/stage2")
    option("--stage", choices=AUDIO_PARTS, help="parts in the prompt (default: the adapters' own)")
    option("--length", type=int, default=24, help="tokens of the answer (default 24)")
    option("--block-length", type=int, help="tokens of a block (default: the whole answer)")
    option("--steps", type=int, help="steps of the count rule (default: one a token)")
    option("--rule", default="threshold", choices=CHOICES["rule"], help="default: threshold")
    option("--threshold", type=float, default=0.9, help="of the threshold rule (default 0.9)")
    option("--factor", type=float, default=1.0, help="of the factor rule (default 1)")
    option("--temperature", type=float, default=0.0, help="of Gumbel noise (default 0: none)")
    option("--remasking", default="low_confidence", choices=CHOICES["remasking"])
    option("--cfg-scale", type=float, default=0.0, help="of the guidance (default 0: none)")
    option("--seed", type=int, default=0, help="of temperature and random remasking (default 0)")
    option("--cache", default="none", choices=CHOICES["cache"], help="default: none")
    option("--compile", action="store_true", help="torch.compile; pays off for many answers only")
    option("--cut", action="store_true", help="use only the start of a clip that is too long")
    option("--trace", type=Path, help="also write the steps as an HTML page, here")
    return parser


def answer_clip(args: argparse.Namespace) -> None:
    """Answer the question of the command line, showing each step."""
    # Settings and the clip are checked before weights are read.
    names = [field.name for field in fields(SamplerConfig)]
    config = SamplerConfig(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    waveform = read_audio(args.clip)
    options = model_options(args)
    model = DIFFA.from_pretrained(
        args.whisper, args.llm, args.adapters, stage=args.stage, **options
    ).eval()

    # A terminal shows all steps on one line, a file or pipe a line for each.
    live = sys.stdout.isatty()
    lm_config = model.lm.config
    steps = []

    def show(ids: Tensor, confidence: Tensor) -> None:
        texts = token_texts(model.tokenizer, ids[0].tolist(), lm_config.mask_id, lm_config.end_id)
        steps.append((texts, confidence[0].tolist()))
        line = " ".join(texts).strip()
        if live:
            print(f"\r\033[K{line}", end="", flush=True)
            time.sleep(SECONDS_A_STEP)
        else:
            print(line, flush=True)

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        return hear_clips(model, [waveform], [args.clip], args.cut)

    prompt = build_prompt(model.tokenizer, args.question)
    (result,) = answer(model.lm, model.tokenizer, [prompt], hear, config, on_step=show)
    print(f"\r\033[K{result.text}" if live else result.text)
    counts = f"{result.calls} model calls for {config.length} positions"
    print(f"({counts}, {result.n_tokens} of them text)", file=sys.stderr)
    if args.trace:
        write_trace(args.trace, args.question, steps)


def main() -> None:
    args = make_parser().parse_args()
    with one_line_errors("sampler.py"):
        answer_clip(args)
