"""Stage 4: prefer the better of two answers (VRPO; DIFFA-2, arXiv 2601.23161).

Both adapters and the LoRA of stage 3 train on; a frozen copy of stage 3 is the reference. Each item
of the manifest has a better answer, `target`, and a worse one, `rejected`. The loss wants the
likelihood of the better one to rise more over the reference than that of the worse one. A diffusion
LM only has a bound of its likelihood (ELBO), estimated on masked answers. Policy and reference are
scored on the same masks, so most of the estimate's noise cancels.

    python -m training.preference --train runs/later/pairs.json --adapters runs/later/lora \\
        --out runs/later/preference

A run that was stopped or killed resumes when the same command is run again.

Shapes: B batch, b clips of one part, S samples, A audio embeddings, P prompt positions, G answer
tokens.
"""

import argparse
import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.command_line import number
from checkpoints.fill import Unfilled, assign
from checkpoints.lora import attach
from diffa import DIFFA, Spliced, splice
from diffusion_lm import T_MIN, DiffusionLM, weighted_losses
from training.batches import Batch, Part
from training.optimizers import TrainConfig
from training.recipe import Execution, Recipe, add_training_arguments
from training.run import Stage
from training.stage import run_command

# Where each value comes from: DIFFA-2's release, or ours.
RECIPES = {
    "paper": Recipe(
        train=TrainConfig(
            epochs=10,  # release
            batch=16,  # release: over all GPUs
            lr=5e-5,  # release: at its peak
            warmup=1000,  # release: steps
            schedule="cosine",  # release: its script's setting
            weight_decay=0.05,  # release
            clip=1.0,  # release
            optimizer="adamw",  # release
        ),
        answer_length=128,  # ours: an answer of more tokens is left out
        match_embedding_scale=False,  # no part is new
        shapes={},
        dtype="bfloat16",  # release
        bucket_by_length=True,  # ours
        execution=Execution(workers=8, cache="none", recompute=True),  # ours
    ),
    "toy": Recipe(
        train=TrainConfig(
            steps=40,  # ours
            batch=8,  # ours
            lr=2e-4,  # ours
            warmup=10,  # ours
            schedule="cosine",  # release
            weight_decay=0.05,  # release
            clip=1.0,  # release
            optimizer="adamw",  # release
        ),
        answer_length=18,  # ours: as in the other stages
        match_embedding_scale=False,  # no part is new
        shapes={},
        bucket_by_length=True,  # ours
    ),
}


BETA = 0.2  # release: scale of the margin
SAMPLES = 4  # release: masked versions of an answer


def draw_masks(
    answer_ids: Tensor, n_samples: int, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise of exactly k tokens: k uniform in 1 to G, then k positions, uniformly.

    Args:
        answer_ids: (B, G) on the CPU.
    Returns:
        noisy ids (S, B, G), and the masked fraction t = k / G of each, (S, B), at least T_MIN.
    """
    B, G = answer_ids.shape
    k = torch.randint(1, G + 1, (n_samples, B), generator=generator)

    # The k smallest of G random numbers are at k random positions.
    u = torch.rand(n_samples, B, G, generator=generator)
    rank = u.argsort(dim=-1).argsort(dim=-1)  # (S, B, G)
    noisy_ids = torch.where(rank < k[..., None], mask_id, answer_ids)
    return noisy_ids, (k / G).clamp(min=T_MIN)


def elbo(
    lm: DiffusionLM, prompt: Spliced, answer_ids: Tensor, noisy_ids: Tensor, t: Tensor
) -> Tensor:
    """Estimated bounds (B,) of the log-likelihoods of answers (B, G), by their masked versions.

    Minus the mean over samples of the summed cross-entropy / t; not divided by the length.

    noisy_ids: (S, B, G). t: (S, B), the masked fractions.
    """
    total = torch.zeros(len(answer_ids), device=answer_ids.device)
    for noisy, level in zip(noisy_ids, t, strict=True):
        inputs = (prompt.embeddings, prompt.mask, answer_ids, noisy, level)
        losses, rows = weighted_losses(lm, *inputs)  # (n,), (n,)
        total = total.index_add(0, rows, losses)  # (B,)
    return -total / len(noisy_ids)


def vrpo_loss(policy: list[Tensor], reference: list[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """Losses (B,) and their argument s (B,): -log sigmoid(s), s beta times the margin's growth.

    policy, reference: the ELBO (B,) of the better answers, then that of the worse ones.
    """
    better = policy[0] - reference[0]
    worse = policy[1] - reference[1]
    s = beta * (better - worse)
    return -F.logsigmoid(s), s


def frozen_copy(model: DIFFA) -> DIFFA:
    """The model as it is now, as a reference: own adapters and LoRA, the same weights of the LM."""
    with torch.device("meta"), Unfilled():
        lm = type(model.lm)(model.lm.config)
    assign(lm, dict(model.lm.named_parameters(remove_duplicate=False)))

    parts = copy.deepcopy(model.trained_parts())
    if model.lora is not None:
        attach(lm, parts["lora"])
    pieces = (model.encoder, lm, model.tokenizer, model.config, parts)
    return DIFFA(*pieces).eval().requires_grad_(False)


def preference_loss(
    model: DIFFA,
    batch: Batch,
    generator: torch.Generator,
    recipe: Recipe,
    reference: DIFFA,
    beta: float,
    samples: int,
) -> Iterator[Tensor]:
    """The losses of a batch's parts, which add up to the mean loss of its pairs."""
    # Masks for the whole batch at once; better and worse answers draw apart.
    mask_id = model.lm.config.mask_id
    answers = [batch.answer_ids, batch.rejected_ids]  # (B, G) each
    masks = [draw_masks(ids, samples, mask_id, generator) for ids in answers]

    def elbos(listener: DIFFA, part: Part, audio: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Those of both answers, (b,) each, by the policy or the reference."""
        prompt = splice(listener.lm, part.prompts, *audio)  # (b, P, D)
        found = []
        for ids, (noisy_ids, t) in zip(answers, masks):
            noisy = torch.stack([part.take(sample) for sample in noisy_ids])  # (S, b, G)
            levels = torch.stack([part.take(sample) for sample in t])  # (S, b)
            found.append(elbo(listener.lm, prompt, part.take(ids), noisy, levels))
        return found

    passes = len(answers) * samples
    for part in batch.parts():
        # Policy and reference hear with their own adapters, and see the same masks.
        policy = elbos(model, part, part.hear(passes=passes))
        with torch.no_grad():
            fixed = elbos(reference, part, part.hear(reference.hear, passes=passes))

        # A clip that could not be read has no loss.
        losses, _ = vrpo_loss(policy, fixed, beta)  # (b,)
        yield (losses * part.readable).sum() / len(batch.answer_ids)


STAGE = Stage(
    parts="stage2",
    target="target",
    loss=preference_loss,
    title="stage 4",
    trains_lora=True,
    rejected="rejected",
    reference=frozen_copy,
    settings={"beta": BETA, "samples": SAMPLES},
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    name = "python -m training.preference"
    parser = argparse.ArgumentParser(prog=name, description="Stage 4: prefer the better answer.")
    add_training_arguments(
        parser,
        train="runs/later/pairs.json",
        out="runs/later/preference",
        adapters="runs/later/lora",
    )
    positive = functools.partial(number, kind=float, least=1e-6, most=1000.0)
    few = functools.partial(number, kind=int, least=1, most=1024)
    parser.add_argument(
        "--beta", type=positive, default=BETA, help="scale of the margin (default 0.2)"
    )
    parser.add_argument(
        "--samples", type=few, default=SAMPLES, help="masked versions of an answer (default 4)"
    )
    args = parser.parse_args(arguments)

    if args.t_min is not None:
        parser.error("--t-min has no effect: this stage draws how many tokens are masked")
    if args.shard:
        parser.error("--shard: the reference needs the LM's weights whole in every process")
    settings = {"beta": args.beta, "samples": args.samples}
    run_command(name, replace(STAGE, settings=settings), RECIPES, vars(args))


if __name__ == "__main__":
    main()
