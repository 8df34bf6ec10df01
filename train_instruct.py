"""Stage 2: teach both adapters to answer instructions about speech (DIFFA, figure 2).

Encoder and LM stay frozen. The semantic adapter resumes from stage 1. In the prompt, a new acoustic
adapter, which carries how a voice sounds, stands where stage 1's learned prompts stood. The paper
trains on 127 hours of VCTK, AccentDB, IEMOCAP, DailyTalk and VoxCeleb1. A text LLM wrote the
answers from a seed transcript of each clip (corpora/targets.py). The ablation `--audio semantic`
leaves the acoustic adapter out, with all else equal (table 5).

    python train_instruct.py --train runs/toy/corpus/instruct_train.json \\
        --adapters runs/toy/stage1 --out runs/toy/stage2

A run that was stopped or killed resumes when the same command is run again.

Shapes: B batch, b clips of one part, A audio embeddings, P prompt positions, G answer tokens,
D LM width.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from checkpoints.command_line import number
from checkpoints.lora import MOST_RANK
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
            # release: of 127 hours, 30,270 steps.
            epochs=10,
            batch=32,  # release: over all GPUs; the paper has 64
            lr=5e-5,  # paper: at its peak
            warmup=2000,  # paper: steps
            schedule="cosine",  # paper: down to 0
            weight_decay=0.05,  # paper
            clip=1.0,  # paper: of the gradient's norm
            optimizer="adamw",  # paper
        ),
        # ours: an answer of more tokens is left out.
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
        whiten=False,  # paper: the acoustic adapter reads the states as they are
        # ours: the encoder's states of 127 hours do not fit in memory, so 8 processes read audio
        # ahead. The activations of LLaDA-8B take the most memory: they are computed again.
        execution=Execution(workers=8, cache="none", recompute=True),
    ),
    "toy": Recipe(
        train=TrainConfig(
            steps=650,  # ours: two thirds of an epoch, since a clip has five questions
            batch=32,  # ours
            lr=1e-3,  # ours: half of stage 1's, as in the paper
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
        # ours: small adapters for small models.
        shapes={"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0},
        bucket_by_length=True,  # ours
        # ours: only the states of a real Whisper need it (`make real-encoder`).
        whiten=False,
    ),
}


def answer_loss(
    model: DIFFA, batch: Batch, generator: torch.Generator, recipe: Recipe
) -> Iterator[Tensor]:
    """The losses of a batch's parts, which add up to the loss of the batch (LLaDA, equation 5).

    The same lines as stage 1's, so that each script can be read alone.
    """
    # Forward process, for the whole batch at once: the noise does not depend on how it is cut.
    t = noise_levels(len(batch.answer_ids), generator, recipe.t_min, recipe.stratified)  # (B,)
    noisy_ids = noise(batch.answer_ids, t, model.lm.config.mask_id, generator)  # (B, G)

    for part in batch.parts():
        # Encoder states -> the stage's adapters -> the middle of the prompt.
        audio, audio_mask = part.hear()  # (b, A, D), (b, A)
        prompt = splice(model.lm, part.prompts, audio, audio_mask)  # (b, P, D)

        # A clip that could not be read is not noised: an answer without a mask has no loss.
        answer_ids = part.take(batch.answer_ids)  # (b, G)
        noisy = torch.where(part.readable[:, None], part.take(noisy_ids), answer_ids)  # (b, G)

        # Cross-entropy of the masked tokens, weighted by 1/t, over all tokens of the whole batch.
        inputs = (prompt.embeddings, prompt.mask, answer_ids, noisy, part.take(t))
        yield diffusion_loss(model.lm, *inputs, n_tokens=batch.answer_ids.numel())


STAGE = Stage(parts="stage2", target="target", loss=answer_loss, title="stage 2")
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
    lora = "stage 3: also train LoRA of this rank in the LM (DIFFA-2; 8 in its release)"
    rank = functools.partial(number, kind=int, least=1, most=MOST_RANK)
    parser.add_argument("--lora", type=rank, metavar="RANK", help=lora)
    parser.add_argument("--audio", choices=["both", "semantic"], default="both", help="adapters")
    args = parser.parse_args(arguments)

    stage = STAGE if args.audio == "both" else SEMANTIC_ALONE
    run_command("train_instruct.py", stage, RECIPES, vars(args))


if __name__ == "__main__":
    main()
