"""A step of stage 1 by this code, and with the logits of all positions as in the release.

    export MALLOC_MMAP_THRESHOLD_=65536
    python -m lab.measure_stage1                      2 of LLaDA-8B's 32 blocks, float32, on a CPU
    python -m lab.measure_stage1 --layers 32 --batch 8 --dtype bfloat16 --device cuda

Both ways run in one process, on random weights and noise: Whisper small, new adapters, LLaDA-8B in
full width. Only the loss differs. A step is forward and backward, without the optimizer. On a CPU
the peak is that of the resident memory, which never falls: the way that needs less comes first.

Shapes: B clips, G answer tokens, V vocabulary.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from checkpoints.command_line import DTYPES, count, one_line_errors
from checkpoints.model import load_for_training
from diffa import DIFFA, splice
from diffusion_lm import DiffusionLM, LMConfig, noise, noise_levels
from lab.findings import markdown
from lab.gpu_training import SECONDS, random_batch
from lab.measure_step import loss_everywhere, peak_memory
from train_asr import RECIPES, transcript_loss
from training.batches import Batch
from training.execution import prepare
from training.recipe import Recipe

NAME = "python -m lab.measure_stage1"


def release_loss(
    model: DIFFA, batch: Batch, generator: torch.Generator, recipe: Recipe
) -> Iterator[Tensor]:
    """train_asr.transcript_loss, but the logits (B, L, V) of all positions are made and kept.

    Clips are equally long and readable, as in `random_batch`.
    """
    t = noise_levels(len(batch.answer_ids), generator, recipe.t_min, recipe.stratified)  # (B,)
    noisy_ids = noise(batch.answer_ids, t, model.lm.config.mask_id, generator)  # (B, G)
    for part in batch.parts():
        prompt = splice(model.lm, part.prompts, *part.hear()).embeddings  # (B, P, D)
        answer_ids = part.take(batch.answer_ids)
        inputs = (prompt, answer_ids, part.take(noisy_ids), part.take(t))

        # The logits live until the backward pass is over.
        loss, logits = loss_everywhere(model.lm, *inputs)
        yield loss
        del logits


WAYS = {"logits at the masked positions": transcript_loss, "at all positions": release_loss}


def step(model: DIFFA, batch: Batch, recipe: Recipe, loss_of: Callable) -> float:
    """Forward and backward once, with the noise of seed 0; gradients stay. Returns the loss."""
    total = 0.0
    for loss in loss_of(model, batch, torch.Generator().manual_seed(0), recipe):
        loss.backward()
        total += loss.item()  # waits for the device
    return total


def compare_ways(model: DIFFA, batch: Batch, recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table: each way's loss, peak memory and seconds."""
    rows = []
    for name, loss_of in WAYS.items():
        step(model, batch, recipe, loss_of)  # warms up
        model.zero_grad()
        started = time.perf_counter()
        loss = step(model, batch, recipe, loss_of)
        seconds = time.perf_counter() - started
        model.zero_grad()
        rows.append([name, f"{loss:.4f}", f"{peak_memory(model.device):.2f}", f"{seconds:.1f}"])
    return ["way", "loss", "peak, GiB", "s a step"], rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="A step of stage 1, in two ways.")
    add = parser.add_argument
    add("--layers", type=count, default=2, help="blocks of the LM (default: %(default)s of 32)")
    add("--batch", type=count, default=2, help="clips (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args(arguments)

    def shallow(config: LMConfig) -> DiffusionLM:
        return DiffusionLM(replace(config, n_layers=args.layers))

    with one_line_errors(NAME):
        torch.manual_seed(0)
        model = load_for_training(
            stage="stage1",
            dtype=DTYPES[args.dtype],
            device=args.device,
            random_weights="small+llada-8b",
            lm_class=shallow,
        ).model
        recipe = replace(RECIPES["paper"], dtype=args.dtype)
        prepare(model, replace(recipe.execution, recompute=False), args.device)
        batch, positions = random_batch(model, args.batch, SECONDS["stage1"], recipe)

        shape = f"{args.layers} blocks, {args.dtype}, {args.device}, {torch.get_num_threads()}"
        L = int(positions.max()) + recipe.answer_length
        print(f"{shape} threads; {args.batch} clips of {SECONDS['stage1']} s, {L} positions each\n")
        print(markdown(*compare_ways(model, batch, recipe)))


if __name__ == "__main__":
    main()
