"""What all commands share: the options by which they find a model, and errors in one line."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser, adapters_default: str) -> None:
    """Add the options that give the model's files; the defaults are the toy run's.

    Args:
        adapters_default: of --adapters, which differs between commands.
    """
    add = parser.add_argument

    # The model's files.
    add("--whisper", default="runs/toy/whisper", help="directory (hub format), or OpenAI's .pt")
    add("--llm", default="runs/toy/llada", help="LLaDA or Qwen3-diffusion directory (hub format)")
    add("--adapters", default=adapters_default, help="directory, or the release's file")

    # Where and how it runs.
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    usual = "the LM as in its file, the encoder float32"
    add("--dtype", choices=DTYPES, help=f"of the frozen encoder and LM (default: {usual})")

    # What deviates from the published model.
    window = "a window of the encoder that is shorter than Whisper's 30 s"
    add("--audio-context", type=float, metavar="SECONDS", help=window)
    random = "random frozen parts, such as small+llada-8b: to measure speed and memory"
    add("--random-weights", metavar="SIZE", help=random)


def model_options(args: argparse.Namespace) -> dict:
    """The parsed options, except the three paths, as arguments of load_diffa."""
    return {
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "audio_context": args.audio_context,
        "random_weights": args.random_weights,
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
