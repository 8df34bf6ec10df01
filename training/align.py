"""Warm-up of the semantic adapter: it learns to say words before an LM reads them. Ours.

    python -m training.align --llm runs/smol/lm --whisper whisper-tiny.en \\
        --train CORPUS/asr_train.json --out runs/smol/align
    python train_asr.py --adapters runs/smol/align ...

A small LM gives a new adapter a weak signal: through it, the first words come after thousands of
clips. Here each audio embedding is compared with the rows of the LM's own embedding table, and CTC
(Graves et al. 2006) asks that they spell the transcript, in order, with silence between. The LM's
blocks do not run, so a step costs a fraction of one of stage 1. The paper has no such warm-up.

Shapes: B batch, b clips of one part, A audio embeddings, G answer tokens, m distinct tokens of the
batch, n alternatives, D LM width, V vocabulary.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import SQUEEZE
from diffa import DIFFA
from encoder import SAMPLE_RATE, encoder_frames
from training.batches import Batch
from training.optimizers import TrainConfig
from training.recipe import Execution, Recipe, add_training_arguments
from training.run import Stage
from training.stage import run_command

# Logits are cosines times this. With more, a small cosine is confident enough, and embeddings stay
# further from the rows than the text that imitated audio was (adapt_lm.py).
SHARPNESS = 20.0
SILENCE_SEED = 1  # not adapt_lm.MASK_SEED: silence must not look like [MASK]
N_OTHERS = 8192  # rows of the table that are alternatives, beside the tokens of the batch

RECIPES = {
    "paper": Recipe(
        # Ours, at the scale of the paper's stage 1.
        train=TrainConfig(
            epochs=1, batch=128, lr=1e-3, warmup=1000, schedule="linear", optimizer="adamw"
        ),
        answer_length=128,
        match_embedding_scale=True,  # cosines do not teach the size of an embedding
        shapes={},
        dtype="bfloat16",
        bucket_by_length=True,
        execution=Execution(workers=8, cache="none"),
    ),
    "toy": Recipe(
        train=TrainConfig(
            steps=600, batch=32, lr=2e-3, warmup=50, schedule="cosine", optimizer="muon"
        ),
        answer_length=32,
        match_embedding_scale=True,
        shapes={"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0},
        bucket_by_length=True,
    ),
}


def table_logits(audio: Tensor, table: Tensor) -> Tensor:
    """Logits (b, A, n + 1) of silence, then of each row of `table` (n, D), for audio (b, A, D).

    Silence is one fixed random direction: the LM was adapted to ignore noise (adapt_lm.py).
    """
    drawn = torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(SILENCE_SEED))
    rows = torch.cat([drawn.to(table), table]).float()  # (n + 1, D)
    return SHARPNESS * F.normalize(audio.float(), dim=-1) @ F.normalize(rows, dim=-1).T


def spelling_loss(
    model: DIFFA, batch: Batch, generator: torch.Generator, recipe: Recipe
) -> Iterator[Tensor]:
    """The CTC losses of a batch's parts, for each token of the batch's transcripts."""
    end_id = model.lm.config.end_id
    is_word = batch.answer_ids != end_id  # (B, G)
    n_tokens = int(is_word.sum())

    # The alternatives to each token: the other tokens of the batch, and random ones of the table.
    # Without the latter, words that sound alike are told apart only where they meet in a batch.
    tokens, numbers = batch.answer_ids.unique(return_inverse=True)  # (m,), (B, G)
    every = model.lm.embedding.weight  # (V, D)
    others = torch.randperm(len(every), generator=generator)[:N_OTHERS]
    is_taken = torch.isin(others, tokens) | (others == model.lm.config.mask_id)
    others = others[~is_taken]
    table = every[torch.cat([tokens, others]).to(model.device)]  # (n, D)

    for part in batch.parts():
        audio, mask = part.hear(passes=0)  # (b, A, D), (b, A); the LM's blocks do not run
        logits = table_logits(audio, table)
        log_probabilities = logits.log_softmax(dim=-1).transpose(0, 1)  # (A, b, n + 1)

        # A clip that could not be read has no loss.
        targets = part.take(numbers) + 1  # (b, G), 0 is silence
        lengths = part.take(is_word).sum(dim=1)
        inputs = (log_probabilities, targets, mask.sum(dim=1), lengths)
        losses = F.ctc_loss(*inputs, reduction="none", zero_infinity=True)  # (b,)
        yield (losses * part.readable).sum() / n_tokens


def is_too_fast(item: dict, model: DIFFA) -> bool:
    """Whether a clip has fewer audio embeddings than CTC needs to spell its transcript.

    It needs one for each token, and a silence between two equal ones.
    """
    n_samples = min(round(item["duration"] * SAMPLE_RATE), model.encoder.config.n_samples)
    n_embeddings = encoder_frames(n_samples) // SQUEEZE
    ids = model.tokenizer.encode_text(item["transcription"])
    repeated = sum(first == second for first, second in zip(ids, ids[1:]))
    return len(ids) + repeated > n_embeddings


STAGE = Stage(
    parts="semantic",
    target="transcription",
    loss=spelling_loss,
    title="warm-up",
    unusable={"have more tokens than audio embeddings": is_too_fast},
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Warm-up: the semantic adapter learns words.")
    add_training_arguments(parser, train=None, out="runs/toy/align", adapters="")
    args = parser.parse_args(arguments)
    if args.train is None:
        parser.error("--train MANIFEST is required")
    for name in ("t_min", "recompute", "compile", "shard"):
        if getattr(args, name):
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} has no effect: nothing is masked, and no block of the LM runs")

    run_command("python -m training.align", STAGE, RECIPES, vars(args))


if __name__ == "__main__":
    main()
