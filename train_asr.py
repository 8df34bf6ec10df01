"""Stage 1: teach the semantic adapter to carry words (DIFFA, figure 2).

Encoder and LM are frozen. The semantic adapter and 20 learned prompts train on transcripts. Given
the instruction to transcribe, the LM must recover the words from the audio embeddings alone. The
prompts announce these embeddings to the LM; stage 2 drops them.

    python train_asr.py --train runs/toy/corpus/asr_train.json --out runs/toy/stage1

A run that was stopped or killed resumes when the same command is run again.

Shapes: B batch, b clips of one part, A audio embeddings, P prompt positions, G answer tokens,
D LM width.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from diffa import DIFFA, splice
from diffusion_lm import diffusion_loss, noise, noise_levels
from training.batches import Batch
from training.optimizers import TrainConfig
from training.recipe import Execution, Recipe, add_training_arguments
from training.run import Stage
from training.stage import run_command

# Where each value comes from: the paper (arXiv 2507.18452), its release, LLaDA (arXiv 2502.09992),
# or ours.
RECIPES = {
    "paper": Recipe(
        train=TrainConfig(
            # paper: of LibriSpeech's 960 hours, 21,970 steps.
            epochs=10,
            batch=128,  # paper: over all GPUs
            lr=1e-4,  # paper: at its peak
            warmup=1000,  # paper: steps
            schedule="linear",  # release: down to 0; stage 2 has a cosine
            weight_decay=0.05,  # paper
            clip=1.0,  # paper: of the gradient's norm
            optimizer="adamw",  # paper
        ),
        # ours: a transcript of more tokens is left out.
        answer_length=128,
        # LLaDA: t ~ U(0, 1], drawn for each clip by itself.
        t_min=0.0,
        stratified=False,
        # paper: new adapters start as PyTorch draws them, in AdapterConfig's default shapes.
        match_embedding_scale=False,
        shapes={},
        # paper: of the frozen parts and the arithmetic. The adapters' own weights are float32.
        dtype="bfloat16",
        # ours: clips of similar length in a batch, so that little is padded.
        bucket_by_length=True,
        # ours: the encoder's states of 960 hours do not fit in memory, so 8 processes read audio
        # ahead. The activations of LLaDA-8B take the most memory: they are computed again.
        execution=Execution(workers=8, cache="none", recompute=True),
    ),
    "toy": Recipe(
        train=TrainConfig(
            steps=550,  # ours: 2.9 epochs
            batch=32,  # ours
            lr=2e-3,  # ours: small models take larger steps
            warmup=50,  # ours
            schedule="cosine",  # ours
            weight_decay=0.05,  # paper
            clip=1.0,  # paper
            # ours: a step of the same size in every direction of a matrix, so few steps suffice
            # (training/muon.py). Its learning rates do not compare with AdamW's.
            optimizer="muon",
        ),
        # ours: the longest sentence of the toy's grammar and its end fit.
        answer_length=18,
        # ours: in a small batch, the weight 1/t of small t is too noisy.
        t_min=0.5,
        stratified=True,
        # ours: so few steps do not find the scale of the LM's embeddings.
        match_embedding_scale=True,
        # ours: small adapters for small models. This stage trains no acoustic adapter, which these
        # shape; stage 2 has its own.
        shapes={"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0},
        bucket_by_length=True,  # ours
    ),
}


def transcript_loss(
    model: DIFFA, batch: Batch, generator: torch.Generator, recipe: Recipe
) -> Iterator[Tensor]:
    """The losses of a batch's parts, which add up to the loss of the batch (LLaDA, equation 5)."""
    # Forward process, for the whole batch at once: the noise does not depend on how it is cut.
    t = noise_levels(len(batch.answer_ids), generator, recipe.t_min, recipe.stratified)  # (B,)
    noisy_ids = noise(batch.answer_ids, t, model.lm.config.mask_id, generator)  # (B, G)

    for part in batch.parts():
        # Encoder states -> adapters -> the middle of the prompt.
        audio, audio_mask = part.hear()  # (b, A, D), (b, A)
        prompt = splice(model.lm, part.prompts, audio, audio_mask)  # (b, P, D)

        # A clip that could not be read is not noised: an answer without a mask has no loss.
        answer_ids = part.take(batch.answer_ids)  # (b, G)
        noisy = torch.where(part.readable[:, None], part.take(noisy_ids), answer_ids)  # (b, G)

        # Cross-entropy of the masked tokens, weighted by 1/t, over all tokens of the whole batch.
        inputs = (prompt.embeddings, prompt.mask, answer_ids, noisy, part.take(t))
        yield diffusion_loss(model.lm, *inputs, n_tokens=batch.answer_ids.numel())


STAGE = Stage(parts="stage1", target="transcription", loss=transcript_loss, title="stage 1")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Stage 1: learn to transcribe.")

    # The defaults are the toy's; --preset and the other options choose the recipe.
    add_training_arguments(
        parser, train="runs/toy/corpus/asr_train.json", out="runs/toy/stage1", adapters=""
    )
    args = parser.parse_args(arguments)

    run_command("train_asr.py", STAGE, RECIPES, vars(args))


if __name__ == "__main__":
    main()
