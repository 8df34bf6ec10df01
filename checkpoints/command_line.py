"""What all commands have: the options by which they find a model, and errors in one line."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpoints.adapters import read_info
from checkpoints.files import first_line
from checkpoints.origins import model_path

MOST = 2**31 - 1  # of a count; more is no number of anything here
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(text: str, kind: Callable, least: float, most: float = math.inf) -> float:
    """A finite number from `least` to `most`. Raises ArgumentTypeError: the text is none."""
    try:
        value = kind(text)
        is_good = math.isfinite(value) and least <= value <= most
        is_large = value > most
    except (ValueError, OverflowError):
        is_good = False
        is_large = False
    if not is_good:
        name = "a whole number" if kind is int else "a number"
        has_limit = most < MOST or is_large
        limits = f"from {least} to {most}" if has_limit else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"must be {name} {limits}, not {text!r}")
    return value


# Types of options: a wrong value is refused before anything is loaded.
count = functools.partial(number, kind=int, least=1, most=MOST)
count_or_zero = functools.partial(number, kind=int, least=0, most=MOST)
seed = functools.partial(number, kind=int, least=0, most=2**32 - 1)  # which all generators take
seconds = functools.partial(number, kind=float, least=0.01)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or all spaces and invisible characters."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def question_text(text: str) -> str:
    """A question as an option. Raises ArgumentTypeError: it is blank, and any answer would do."""
    if is_blank(text):
        raise argparse.ArgumentTypeError("the question is empty; type one")
    return text


def add_model_arguments(parser: argparse.ArgumentParser, adapters_default: str | None) -> None:
    """Add the options that give the model's files; the defaults are the toy run's.

    Args:
        adapters_default: of --adapters, which differs between commands. None: the command chooses
            between the toy run's and the bundled ones.
    """
    add = parser.add_argument

    # The model's files.
    default = "(default: %(default)s)"
    trained = "(default: the one that the adapters were trained with; else the toy run's)"
    add("--whisper", help=f"directory (hub format), or OpenAI's .pt {trained}")
    add("--llm", help=f"directory of a diffusion LM (hub format) {trained}")
    if adapters_default is None:
        default = "(default: runs/toy/stage2; without that run, the bundled toy/weights/stage2)"
    elif not adapters_default:
        default = "(default: none)"
    adapters = f"directory, or the release's file {default}"
    add("--adapters", default=adapters_default, action=Weights, help=adapters)
    default = "(default: %(default)s)"

    # Where and how it runs.
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=usual, help=f"such as cuda:1 {default}")
    usual = "the recipe's in training; else the LM as in its file, the encoder float32"
    add("--dtype", choices=DTYPES, help=f"of the frozen encoder and LM (default: {usual})")
    add_weights(parser)

    # What deviates from the published model.
    window = "the encoder's window, up to 30 (default: the one that the adapters were trained with)"
    add("--audio-context", type=seconds, metavar="SECONDS", help=window)
    add_force_parts(parser)
    default = "(default: merged into the LM; stage 4 trains it)"
    without = f"leave out the LoRA in the adapters' file {default}"
    add("--no-lora", action="store_true", help=without)
    random = "random frozen parts, such as small+llada-8b: to measure speed and memory"
    add("--random-weights", metavar="SIZE", action=Weights, help=random)


class Weights(argparse.Action):
    """An option that brings weights. Trained adapters do not fit random frozen parts."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)

        # Whichever of the two options comes last notices.
        if namespace.random_weights and namespace.adapters != parser.get_default("adapters"):
            parser.error("--random-weights draws new adapters: leave out --adapters")


def add_force_parts(parser: argparse.ArgumentParser) -> None:
    """Add the option by which adapters run with other parts than in their training."""
    other = "take another encoder, LM, tokenizer or window than the adapters were trained with"
    parser.add_argument("--force-parts", dest="allow_other_parts", action="store_true", help=other)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the option by which an LM fits a smaller card."""
    eight = "of the LM in 8 bits: half the memory, to answer but not to train (default: as --dtype)"
    parser.add_argument("--weights", choices=("int8",), help=eight)


def model_options(args: argparse.Namespace) -> dict:
    """The parsed options, except the three paths, as arguments of load_diffa."""
    return {
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "int8": args.weights == "int8",
        "audio_context": args.audio_context,
        "random_weights": args.random_weights,
        "allow_other_parts": args.allow_other_parts,
        "lora": "none" if args.no_lora else "merge",
    }


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What decides a model, by the parsed options, as text: with the paths that adapters record."""
    paths = ("whisper", "llm", "adapters")
    others = ("dtype", "weights", "no_lora", "audio_context", "random_weights")
    settings = {name: getattr(args, name) for name in paths + others}

    # Random weights have no paths.
    if not args.random_weights:
        info = read_info(args.adapters) if Path(args.adapters).exists() else {}
        for name in ("whisper", "llm"):
            settings[name] = model_path(name, settings[name], args.adapters, info)
    return {name: str(value) for name, value in settings.items()}


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn the errors that a user can cause into one line and exit code 1.

    Args:
        name: of the command, which begins the line: "sampler.py", "python -m lab.benchmark".
    Raises:
        SystemExit: for OSError, ValueError (such as AudioError, ManifestError and WeightsError),
            too little memory, Ctrl-C (exit code 130), and a reader of the output that is gone (141,
            without a line).
    """
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        # As after `| head -1`. Python's own flush at the end would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except (MemoryError, RuntimeError) as error:
        # For a CPU that is out of memory, PyTorch has no class of its own.
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and "allocate memory" not in str(error):
            raise
        advice = "take a smaller model or --batch, or --dtype bfloat16"
        raise SystemExit(f"{name}: too little memory ({first_line(error)}); {advice}") from None
    except KeyboardInterrupt:
        print(f"{name}: stopped; run the same command to resume", file=sys.stderr)
        raise SystemExit(130) from None
