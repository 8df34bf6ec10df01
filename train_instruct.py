"""Stage 2: teach both adapters to answer instructions about speech (DIFFA, figure 2).

Encoder and LM stay frozen. The semantic adapter resumes from stage 1. A new acoustic adapter, which
carries how a voice sounds, takes the place of stage 1's prompts: now the instruction says what to
do. The ablation `--audio semantic` leaves the acoustic adapter out, with all else equal (table 5).

    python train_instruct.py --train runs/toy/corpus/instruct_train.json \\
        --adapters runs/toy/stage1 --out runs/toy/stage2

A run that was stopped or killed resumes when the same command is run again.

Shapes: B batch, b clips of one part, A audio embeddings, P prompt positions, G answer tokens,
D LM width.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffa import DIFFA, splice
from diffusion_lm import diffusion_loss, noise, noise_levels
from training.batches import Batch
from training.optimizers import TrainConfig
from training.recipe import Execution, Recipe, add_training_arguments
from training.stage import Stage, run_command

# Where a value comes from: the paper (arXiv 2507.18452), its release, LLaDA, or ours.
RECIPES = {
    "paper": Recipe(
        train=TrainConfig(
            steps=10 * (96_874 // 32),  # release: 30,270 steps, 10 epochs of 127 hours
            batch=32,  # release: clips of a step, over all GPUs; the paper's text says 64
            lr=5e-5,  # paper: peak learning rate, half of stage 1's
            warmup=2000,  # paper: steps to the peak
            schedule="cosine",  # paper: then by a cosine to 0
            weight_decay=0.05,  # paper
            clip=1.0,  # paper: norm of the gradient
            optimizer="adamw",  # paper
        ),
        answer_length=128,  # ours: tokens; a longer answer is left out
        t_min=0.0,  # LLaDA: t ~ U(0, 1]
        stratified=False,  # LLaDA: the noise levels of a batch are independent
        match_embedding_scale=False,  # paper: new parts start as PyTorch draws them
        shapes={},  # paper: AdapterConfig's defaults
        dtype="bfloat16",  # paper: frozen parts and arithmetic; weights of adapters are float32
        bucket_by_length=True,  # ours: clips of similar length in a batch, so little is padded
        whiten=False,  # paper: the acoustic adapter reads the states as they are
        execution=Execution(
            workers=8,  # ours: processes that read audio ahead
            cache="none",  # ours: the encoder's states of 127 hours do not fit in memory
            recompute=True,  # ours: a card of 80 GB does not hold all activations of LLaDA-8B
        ),
    ),
    "toy": Recipe(
        train=TrainConfig(
            steps=600,  # ours: 3 minutes on 2 CPU cores
            batch=32,  # ours
            lr=1e-3,  # ours: half of stage 1's, as in the paper
            warmup=50,  # ours
            schedule="cosine",  # paper
            weight_decay=0.05,  # paper
            clip=1.0,  # paper
            optimizer="muon",  # ours: learns to copy in fewer steps than AdamW
        ),
        answer_length=18,  # ours: tokens; the toy's longest sentence and its end fit
        t_min=0.5,  # ours: the weight 1/t of small t is too noisy in a small batch
        stratified=True,  # ours: the same reason
        match_embedding_scale=True,  # ours: tiny runs do not have the steps to find the scale
        shapes={"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0},  # ours: smaller
        bucket_by_length=True,  # ours: as above
        whiten=False,  # ours: a real Whisper needs it (`make real-encoder`), the toy's does not
    ),
}


def answer_loss(
    model: DIFFA, batch: Batch, generator: torch.Generator, recipe: Recipe
) -> Iterator[Tensor]:
    """The losses of a batch's parts, which add up to the loss of the batch (LLaDA, equation 5)."""
    # Forward process, for the whole batch at once: the noise does not depend on how it is cut.
    t = noise_levels(len(batch.answer_ids), generator, recipe.t_min, recipe.stratified)  # (B,)
    noisy_ids = noise(batch.answer_ids, t, model.lm.config.mask_id, generator)  # (B, G)

    for part in batch.parts():
        # Encoder states -> both adapters -> the middle of the prompt.
        audio, audio_mask = part.hear()  # (b, A, D), (b, A)
        prompt = splice(model.lm, part.prompts, audio, audio_mask)  # (b, P, D)

        # A clip that could not be read is not noised: an answer without a mask has no loss.
        answer_ids = part.take(batch.answer_ids)  # (b, G)
        noisy = torch.where(part.readable[:, None], part.take(noisy_ids), answer_ids)  # (b, G)

        # Cross-entropy of the masked tokens, weighted by 1/t, over all tokens of the whole batch.
        n_tokens = batch.answer_ids.numel()
        yield diffusion_loss(
            model.lm, prompt.embeddings, prompt.mask, answer_ids, noisy, part.take(t), n_tokens
        )


STAGE = Stage(parts="stage2", target="target", loss=answer_loss, title="4/4 stage 2")
SEMANTIC_ALONE = replace(STAGE, parts="semantic")  # the ablation


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Stage 2: learn to answer.")

    # The defaults are the toy's; --preset and the other options choose the recipe.
    add_training_arguments(
        parser,
        train="runs/toy/corpus/instruct_train.json",
        out="runs/toy/stage2",
        adapters="runs/toy/stage1",
    )
    parser.add_argument("--audio", choices=["both", "semantic"], default="both", help="adapters")
    args = parser.parse_args(arguments)

    stage = STAGE if args.audio == "both" else SEMANTIC_ALONE
    run_command("train_instruct.py", stage, RECIPES, vars(args))


if __name__ == "__main__":
    main()
