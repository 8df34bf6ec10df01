"""How well does it do on clips that it does not train on? Asked every so many steps while it trains.

The loss is taken at fixed noise levels under fixed noise, so that curves of different runs can be laid over each other
(a causal LM has its next-token loss instead); and one clip is answered in words, since a loss does not say what goes wrong.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from toy.autoregressive import greedy
from training.clips import StateCache, needed_states
from checkpoints.tokenizer import build_prompt, decode_answer
from diffusion_lm import diffusion_loss, next_token_loss, noise
from sampler import SamplerConfig, generate

LEVELS = (0.25, 0.5, 0.75, 1.0)  # noise levels t
SEED = 20_250


def make_validation(model, items: list[dict], answer_ids: Tensor, batch: int, autocast=contextlib.nullcontext) -> Callable[[], dict]:
    """A function without arguments that measures the model now, on items with answers (N, G).

    It returns {"loss": the mean over LEVELS, "loss at 0.25": ..., "meant": ..., "said": ...}; of a causal LM the one loss
    without levels. The clips are encoded once, here, and kept in memory. Every process measures all of it, since the slices
    of a sharded LM need all processes.
    """
    heard = StateCache(model, items, used=needed_states(model))
    prompts = [build_prompt(model.tokenizer, item["input"]) for item in items]
    lm, (N, G) = model.lm, answer_ids.shape
    # Drawn for all at once: the same noise at every validation, in every run, and on any number of processes.
    generator = torch.Generator().manual_seed(SEED)
    noisy_ids = {level: noise(answer_ids, torch.full((N,), level), lm.config.mask_id, generator) for level in LEVELS}  # (N, G) each

    def splice(rows: slice):
        with autocast():
            audio = model.hear(*heard(items[rows]))
        return model.splice(prompts[rows], *audio)

    @torch.no_grad()
    def validate() -> dict:
        training = [part for part in model.modules() if part.training]
        model.eval()
        losses = dict.fromkeys(["next token"] if lm.config.causal else LEVELS, 0.0)
        for start in range(0, len(items), batch):
            rows = slice(start, start + batch)
            prompt, meant = splice(rows), answer_ids[rows].to(model.prompts.device)
            if lm.config.causal:
                losses["next token"] += next_token_loss(lm, prompt.embeddings, prompt.mask, meant, answer_ids.numel()).item()
                continue
            for level in LEVELS:
                t, noisy = torch.full((len(meant),), level), noisy_ids[level][rows].to(meant.device)
                losses[level] += diffusion_loss(lm, prompt.embeddings, prompt.mask, meant, noisy, t, answer_ids.numel()).item()
        first = splice(slice(0, 1))
        said = greedy(lm, first, G) if lm.config.causal else generate(lm, first, SamplerConfig(G, G, G, "threshold"))
        for part in training:
            part.training = True
        return {
            "loss": sum(losses.values()) / len(losses),
            **{f"loss at {level}": losses[level] for level in LEVELS if level in losses},
            "meant": decode_answer(model.tokenizer, answer_ids[0].tolist()),
            "said": decode_answer(model.tokenizer, said.ids[0].tolist()),
        }

    return validate
