"""The loss on clips that do not train, measured now and then while a run trains.

The noise levels and the noise are fixed, so that curves of different runs can be compared. One clip
is answered in words, because a loss does not say what goes wrong.

Shapes: B batch, N items, G answer tokens.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from data import decode_answer
from diffa import splice
from diffusion_lm import diffusion_loss, noise
from sampler import SamplerConfig, answer
from training.examples import Examples
from training.states import StateCache

LEVELS = (0.25, 0.5, 0.75, 1.0)  # noise levels t
SEED = 20_250


class Validation:
    """Measures a DIFFA on held-out items; call it for the figures of the model as it is now.

    Every process measures all of it, because the slices of a sharded LM need all processes.
    """

    def __init__(
        self,
        model,
        examples: Examples,
        batch: int,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """model: a DIFFA. examples: N, whose clips are encoded now. batch: clips at a time."""
        self.model = model
        self.examples = examples
        self.batch = batch
        self.autocast = autocast
        self.cache = StateCache(model, examples.items, used=model.read_states)

        # Drawn once for all items: the same noise at every validation, in every run, and on any
        # number of processes.
        generator = torch.Generator().manual_seed(SEED)
        self.noisy_ids = {}  # of each level, (N, G)
        for level in LEVELS:
            t = torch.full((len(examples.items),), level)
            mask_id = model.lm.config.mask_id
            self.noisy_ids[level] = noise(examples.answer_ids, t, mask_id, generator)

    def hear(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Audio embeddings (B, A, D) and mask (B, A) of some of the items."""
        with self.autocast():
            return self.model.hear(*self.cache(self.examples.items[rows]))

    @torch.no_grad()
    def __call__(self) -> dict:
        """{"loss": the mean over LEVELS, "loss at 0.25": ..., "target": ..., "prediction": ...}."""
        training = [part for part in self.model.modules() if part.training]
        self.model.eval()

        losses = dict.fromkeys(LEVELS, 0.0)
        for start in range(0, len(self.examples.items), self.batch):
            self.add_losses(slice(start, start + self.batch), losses)

        config = SamplerConfig(length=self.examples.answer_ids.shape[1], rule="threshold")
        tokenizer = self.model.tokenizer
        (first,) = answer(self.model.lm, tokenizer, self.examples.prompts[:1], self.hear, config)

        for part in training:
            part.training = True
        return {
            "loss": sum(losses.values()) / len(losses),
            **{f"loss at {level}": loss for level, loss in losses.items()},
            "target": decode_answer(tokenizer, self.examples.answer_ids[0].tolist()),
            "prediction": first.text,
        }

    def add_losses(self, rows: slice, losses: dict[float, float]) -> None:
        """Add the losses of some items, divided by all answer tokens, to those of each level."""
        lm = self.model.lm
        prompt = splice(lm, self.examples.prompts[rows], *self.hear(rows))
        answer_ids = self.examples.answer_ids[rows].to(self.model.device)  # (B, G)

        for level in LEVELS:
            noisy_ids = self.noisy_ids[level][rows].to(self.model.device)  # (B, G)
            t = torch.full((len(answer_ids),), level)
            n_tokens = self.examples.answer_ids.numel()
            loss = diffusion_loss(
                lm, prompt.embeddings, prompt.mask, answer_ids, noisy_ids, t, n_tokens
            )
            losses[level] += loss.item()
