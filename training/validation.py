"""The loss on clips that do not train, measured now and then while a run trains.

The noise levels and the noise are fixed, so that curves of different runs can be compared. One clip
is answered in words, because a loss does not say what goes wrong.

Shapes: B batch, N examples, G answer tokens.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from data import decode_answer
from diffa import splice
from diffusion_lm import diffusion_loss, noise
from sampler import Generation, SamplerConfig, answer
from training.batches import Batches
from training.examples import Examples
from training.states import StateCache

LEVELS = (0.25, 0.5, 0.75, 1.0)  # noise levels t
SEED = 20_250


def answered(
    model,
    example: Examples,
    hear: Callable[[slice], tuple[Tensor, Tensor]],
    decode: Callable[..., Generation],
) -> dict[str, str]:
    """The "target" of one example, and the model's "prediction"; hear, decode: sampler.answer's."""
    ids = example.answer_ids[0]  # (G,)
    config = SamplerConfig(length=len(ids), rule="threshold")
    target = decode_answer(model.tokenizer, ids.tolist())

    # It may train and yet be too long to be answered, which is no reason to stop.
    with torch.inference_mode():
        audio, mask = hear(slice(0, 1))  # (1, A, D), (1, A)
    prompt = example.prompts[0]
    positions = len(prompt.before) + int(mask.sum()) + len(prompt.after) + len(ids)
    if positions > model.lm.config.max_length:
        return {"target": target, "prediction": f"({positions} positions exceed the LM's context)"}

    asked = (model.lm, model.tokenizer, example.prompts, lambda _: (audio, mask), config)
    (first,) = answer(*asked, decode=decode)
    return {"target": target, "prediction": first.text}


def sample_answer(
    model, examples: Examples, batches: Batches, decode: Callable[..., Generation]
) -> str:
    """How the model as it is now answers the first training example, beside the target.

    decode: see sampler.answer. One process alone can call it. Nothing random is drawn.
    """
    training = [part for part in model.modules() if part.training]
    model.eval()
    states, frames, _ = batches.stream.one(0)

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        with batches.autocast():
            return model.hear(states, frames)

    words = answered(model, examples.first(1), hear, decode)
    for part in training:
        part.training = True
    return f"a training clip: {words['prediction']!r}, target {words['target']!r}"


class Validation:
    """Measures a DIFFA on held-out examples; call it for the figures of the model as it is now.

    Every process measures all of it, because the slices of a sharded LM need all processes.
    """

    def __init__(
        self, model, examples: Examples, batches: Batches, decode: Callable[..., Generation]
    ):
        """examples: N, whose clips are encoded at the first call. batches: of the training.

        decode: see sampler.answer.
        """
        self.model = model
        self.decode = decode
        self.examples = examples
        self.batch = batches.rows.shape[1]  # as many clips at a time as in training
        self.autocast = batches.autocast
        self.cut = batches.recipe.execution.cut

        # Drawn once for all items: the same noise at every validation, in every run, and on any
        # number of processes.
        generator = torch.Generator().manual_seed(SEED)
        ids = examples.answer_ids
        self.noisy_ids = {}  # of each level, (N, G)
        for level in LEVELS:
            t = torch.full((len(ids),), level)
            self.noisy_ids[level] = noise(ids, t, model.lm.config.mask_id, generator)

    @functools.cached_property
    def cache(self) -> StateCache:
        """The states of the examples."""
        options = {"used": self.model.read_states, "cut": self.cut}
        return StateCache(self.model, self.examples.items, **options)

    def hear(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Audio embeddings (B, A, D) and mask (B, A) of some of the examples."""
        with self.autocast():
            return self.model.hear(*self.cache(self.examples.items[rows]))

    @torch.no_grad()
    def __call__(self) -> dict:
        """{"loss": the mean over LEVELS, "loss at 0.25": ..., "target": ..., "prediction": ...}."""
        model, ids, prompts = self.model, self.examples.answer_ids, self.examples.prompts
        training = [part for part in model.modules() if part.training]
        model.eval()

        losses = dict.fromkeys(LEVELS, 0.0)
        for start in range(0, len(ids), self.batch):
            rows = slice(start, start + self.batch)
            prompt = splice(model.lm, prompts[rows], *self.hear(rows))
            answer_ids = ids[rows].to(model.device)  # (B, G)
            for level in LEVELS:
                noisy_ids = self.noisy_ids[level][rows].to(model.device)  # (B, G)
                t = torch.full((len(answer_ids),), level)
                losses[level] += diffusion_loss(
                    model.lm, prompt.embeddings, prompt.mask, answer_ids, noisy_ids, t, ids.numel()
                ).item()

        words = answered(model, self.examples.first(1), self.hear, self.decode)
        for part in training:
            part.training = True
        return {
            "loss": sum(losses.values()) / len(losses),
            **{f"loss at {level}": loss for level, loss in losses.items()},
            **words,
        }
