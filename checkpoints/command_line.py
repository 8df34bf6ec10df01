"""What all commands share: the options by which they find a model, and errors in one line."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds(text: str) -> float:
    """An option's number of seconds. Raises ArgumentTypeError: not above 0, or not finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds above 0, not {text!r}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, adapters_default: str) -> None:
    """Add the options that give the model's files; the defaults are the toy run's.

    Args:
        adapters_default: of --adapters, which differs between commands.
    """
    add = parser.add_argument

    # The model's files.
    trained = "the one that the adapters were trained with; else the toy run's"
    add("--whisper", help=f"directory (hub format), or OpenAI's .pt (default: {trained})")
    add("--llm", help=f"LLaDA or Qwen3-diffusion directory (hub format; default: {trained})")
    add("--adapters", default=adapters_default, help="directory, or the release's file")

    # Where and how it runs.
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    usual = "the LM as in its file, the encoder float32"
    add("--dtype", choices=DTYPES, help=f"of the frozen encoder and LM (default: {usual})")

    # What deviates from the published model.
    window = "a window of the encoder that is shorter than Whisper's 30 s"
    add("--audio-context", type=seconds, metavar="SECONDS", help=window)
    other = "take another encoder, LM, tokenizer or window than the adapters were trained with"
    add("--force-parts", dest="allow_other_parts", action="store_true", help=other)
    random = "random frozen parts, such as small+llada-8b: to measure speed and memory"
    add("--random-weights", metavar="SIZE", help=random)


def model_options(args: argparse.Namespace) -> dict:
    """The parsed options, except the three paths, as arguments of load_diffa."""
    return {
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "audio_context": args.audio_context,
        "random_weights": args.random_weights,
        "allow_other_parts": args.allow_other_parts,
    }


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn the errors that a user can cause into one line and exit code 1.

    Args:
        name: of the command, which begins the line: "sampler.py", "python -m lab.benchmark".
    Raises:
        SystemExit: for OSError, ValueError (such as AudioError, ManifestError and WeightsError)
            and Ctrl-C.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{name}: stopped; run the same command to resume") from None
