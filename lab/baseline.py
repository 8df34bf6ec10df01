"""Train the autoregressive baseline of a run's language model (toy/autoregressive.py).

    python -m lab.baseline --run runs/toy      writes RUN/baseline and RUN/baseline.json

It starts from the same random weights as the run's diffusion LM (`python -m toy.pretrain lm`) and
reads the same batches for as many steps, but learns to predict the next token. Only its learning
rate differs: one cosine over all steps, where the diffusion LM has one for each phase.
lab/ablations.py trains adapters on it.
"""

import argparse
import bisect
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.command_line import one_line_errors
from checkpoints.files import read_json, write_json
from checkpoints.lm import read_lm_config, save_lm
from checkpoints.tokenizer import load_tokenizer
from diffa import DIFFA
from toy.autoregressive import CausalLM, greedy
from toy.pretrain_lm import GATE, GrammarText, new_lm, phases, short_of, text_loss
from training.loop import fit
from training.run_files import minutes_of


def existing(path: Path) -> Path:
    """`path`, or its name in earlier runs ("twin" for "baseline") if only that exists."""
    old = path.with_name(path.name.replace("baseline", "twin"))
    return old if old.exists() and not path.exists() else path


def load_baseline(run: Path, **options) -> DIFFA | None:
    """The baseline of a run with its first seed's adapters; None if lab.ablations made none.

    options: of checkpoints.model.load_diffa.
    """
    lm = existing(run / "baseline")
    adapters = existing(run / "ablations/baseline-0")
    if not (lm.is_dir() and adapters.is_dir()):
        return None
    options["lm_class"] = CausalLM
    return DIFFA.from_pretrained(run / "whisper", lm, adapters, **options).eval()


def pretrain_baseline(run: Path, seed: int, device: str) -> dict:
    """Train and save RUN/baseline; returns the figures that toy.pretrain_lm returns of RUN/llada.

    Args:
        seed: the one that the run's LM was trained with; another one gives other text.
    Raises:
        ValueError: the run has no diffusion LM, or one with other phases than toy/pretrain_lm.py's.
    """
    # The record of the diffusion LM determines the steps and what was trained in each phase.
    if not (run / "lm.json").is_file():
        raise ValueError(
            f"{run / 'lm.json'}: no such file; it records the baseline's steps. "
            f"Run python -m toy.pretrain lm --out {run}"
        )
    record = read_json(run / "lm.json")
    steps = record["steps"]
    wanted = [[], [], *record["asked"]]
    training = phases(seed)
    ends = list(itertools.accumulate(phase.steps for phase in training))
    if steps not in ends:
        raise ValueError(
            f"{run / 'lm.json'}: its LM took {steps} steps, but the phases of toy.pretrain_lm "
            f"end after {ends}; train that LM again"
        )

    config = read_lm_config(run / "llada")
    text = GrammarText(load_tokenizer(run / "llada", config), seed)
    lm = new_lm(CausalLM, config, seed, device)

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        # The same batch as in the diffusion LM's phase; only its first phase read clean embeddings.
        number = bisect.bisect_right(ends, step)
        phase = training[number]
        step -= ends[number] - phase.steps
        options = {"wanted": wanted[number], "blurred": number > 0}
        return text_loss(lm, text, phase, step, generator, **options)

    # The recipe of the diffusion phase, over all steps.
    recipe = replace(training[1], steps=steps, seed=seed)
    checkpoint = run / "checkpoints" / "baseline.pt"
    losses = fit(dict(lm.named_parameters()), loss_of_step, recipe, checkpoint, "baseline LM")
    result = text.examine(lm, greedy)

    save_lm(lm, run / "baseline", causal=True)
    shutil.copy(run / "llada/tokenizer.model", run / "baseline/tokenizer.model")
    minutes = minutes_of(checkpoint.parent, [checkpoint.stem])
    return result | {
        "steps": steps,
        "asked": record["asked"],
        "losses": losses,
        "minutes": minutes,
    }


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.baseline"
    parser = argparse.ArgumentParser(prog=name, description="Train a run's baseline LM.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=int, default=0, help="the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    with one_line_errors(name):
        result = pretrain_baseline(args.run, args.seed, args.device)
    write_json(args.run / "baseline.json", result)
    tqdm.write(json.dumps({k: v for k, v in result.items() if k != "losses"}))

    # Only a warning: how well it reads is one of the things that are compared.
    short = short_of(GATE, result)
    if short:
        tqdm.write(f"warning: below what a diffusion LM needs to be trained on: {short}")


if __name__ == "__main__":
    main()
