"""The command that makes the toy's stand-ins for the two downloads, in the formats of the hub.

    python -m toy.pretrain --corpus runs/toy/corpus --out runs/toy
    python -m toy.pretrain lm --out runs/toy                            only the LM

The first makes OUT/whisper and OUT/llada in two processes side by side. Figures of each are in
OUT/encoder.json and OUT/lm.json. Killed or stopped, the same command resumes.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.command_line import one_line_errors
from checkpoints.files import write_json
from checkpoints.progress import add_quiet, is_hidden, say
from toy.imitation import train_tokenizer
from toy.pretrain_encoder import pretrain_encoder
from toy.pretrain_lm import GATE, GrammarText, phases, pretrain_lm, short_of
from training.recipe import seed

NAME = "python -m toy.pretrain"


def make(which: str, corpus: Path, out: Path, seed: int, device: str, threads: int) -> None:
    """Train one of the two and write its figures to OUT/{which}.json.

    Raises SystemExit: files that cannot be used, or an LM that is too weak for adapters.
    """
    torch.set_num_threads(threads)
    with one_line_errors(NAME):
        # The model itself.
        if which == "encoder":
            result = pretrain_encoder(corpus, out, seed, device)
        else:
            tokenizer = train_tokenizer(out / "llada" / "tokenizer.model", seed)
            text = GrammarText(tokenizer, seed)
            result = pretrain_lm(text, out, phases(seed), device)

        # Its figures, with the losses in the file only.
        write_json(out / f"{which}.json", result)
        text = json.dumps({name: v for name, v in result.items() if name != "losses"})
        rounded = json.loads(text, parse_float=lambda number: round(float(number), 2))
        say(f"{which}: {json.dumps(rounded)}")

        # What the LM cannot read, no adapter can repair.
        missed = short_of(GATE, result) if which == "lm" else ""
        if missed:
            raise ValueError(
                f"the LM is not fit for the adapters: {missed}; "
                "train it longer (DIFFUSION in toy/pretrain_lm.py)"
            )


def make_below(*arguments) -> None:
    """`make` in a process of its own, its line of progress below that of the first process."""

    # A parent that was killed says nothing: this process then stops as by Ctrl-C, and saves.
    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    above = tqdm(
        delay=math.inf, leave=False, disable=is_hidden()
    )  # never shown, but it takes the first line
    make(*arguments)
    above.close()


def make_both(*arguments) -> None:
    """`make` the encoder and the LM side by side.

    Neither needs the other, and matrices as small as these gain little from a second core.
    """
    # Each has half of the cores.
    threads = torch.get_num_threads()
    lm = multiprocessing.get_context("spawn").Process(
        target=make_below, args=("lm", *arguments, max(threads // 2, 1)), daemon=True
    )
    lm.start()
    make("encoder", *arguments, threads - threads // 2)

    # The LM has printed its own error.
    lm.join()
    if lm.exitcode:
        raise SystemExit(f"{NAME}: no LM was made; its process ended with code {lm.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Make the tiny encoder and LM.")
    parser.add_argument("which", nargs="?", choices=["encoder", "lm", "both"], default="both")
    parser.add_argument("--corpus", type=Path, default=Path("runs/toy/corpus"))
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_quiet(parser)
    args = parser.parse_args()

    # A model alone has all cores.
    arguments = (args.corpus, args.out, args.seed, args.device)
    if args.which == "both":
        make_both(*arguments)
    else:
        make(args.which, *arguments, torch.get_num_threads())


if __name__ == "__main__":
    main()
