"""The answers to a batch of prompts while they are filled in: what `sampler.generate` works on.

A canvas decides which rows of the batch and which positions a call computes, and what it reads from
the cache. It also draws the random numbers.

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, V vocabulary, D width; R rows of
the batch in a call, C conditions (1, or 2 with guidance), M positions that pass through the model,
N positions that are predicted.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa import Spliced
from diffusion_lm import DiffusionLM, KeyValues
from sampler import (
    Call,
    Choice,
    SamplerConfig,
    blocks_of,
    split_evenly,
    tokens_before_end,
)
from speed.small import small_step


def round_rows(x: Tensor, is_rounded: Tensor) -> Tensor:
    """x (..., R, M, D) with the rows of is_rounded (R,) passed through bfloat16."""
    return torch.where(is_rounded[:, None, None], x.bfloat16().to(x.dtype), x)


def item_generators(prompt: Spliced, seed: int) -> list[torch.Generator]:
    """A generator for each item, seeded from the seed, the item's text and its length.

    An item's answer then does not depend on its neighbours. The audio embeddings are left out,
    because their last bits may differ in another batch.
    """
    generators = []
    for embeddings, mask, is_text in zip(prompt.embeddings, prompt.mask, prompt.is_text):
        text = embeddings[mask & is_text].float().cpu().numpy().tobytes()
        digest = hashlib.sha256(f"{seed} {mask.sum()} ".encode() + text).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))
    return generators


class Canvas:
    """The state of `generate`."""

    def __init__(self, lm: DiffusionLM, prompt: Spliced, config: SamplerConfig):
        self.lm = lm
        self.config = config
        B, P, _ = prompt.embeddings.shape
        device = prompt.embeddings.device
        self.ids = torch.full((B, config.length), lm.config.mask_id, device=device)  # (B, G)
        self.confidence = torch.zeros_like(self.ids, dtype=torch.float64)  # of committed tokens
        self.calls = torch.zeros(B, dtype=torch.long, device=device)
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.appends = lm.config.appends if config.append is None else config.append
        self.end = config.length  # columns of the answer that exist yet
        self.generators = []
        if config.temperature > 0 or config.remasking == "random":
            self.generators = item_generators(prompt, config.seed)

        # Guidance adds a second condition, in which every token of the prompt is [MASK]. Quirk of
        # the release: the audio stays, so the answer moves away from what the LM would say about
        # the clip without the instruction.
        conditions = prompt.embeddings[None]  # (C, B, P, D)
        self.cfg_scale = None
        if config.cfg_scale > 0:
            self.cfg_scale = torch.tensor(config.cfg_scale, device=device)
            blank = lm.embed(torch.tensor(lm.config.mask_id, device=device))  # (D,)
            without_text = torch.where(prompt.is_text[..., None], blank, prompt.embeddings)
            conditions = torch.stack([prompt.embeddings, without_text])

        # Quirk of the release: in a prompt with audio, every embedding passes through bfloat16,
        # whatever the LM's dtype. Its generated ids depend on it.
        self.is_rounded = (prompt.mask & ~prompt.is_text).any(dim=1)  # (B,)
        self.prompt = round_rows(conditions, self.is_rounded)  # (C, B, P, D)
        self.real = F.pad(prompt.mask, (0, config.length), value=True)  # (B, L)
        self.is_padded = not bool(prompt.mask.all())

        # Keys and values of every condition, item and position.
        self.cache = None
        if config.cache != "none":
            self.cache = self.new_cache(len(conditions) * B, P + config.length)

    def new_cache(self, rows: int, L: int) -> KeyValues:
        return self.lm.new_cache(rows, L)

    def cache_of(self, rows: int, L: int) -> KeyValues:
        """The cache of a call with this many rows and positions."""
        if (rows, L) == (self.cache[0][0].shape[0], self.cache[0][0].shape[2]):
            return self.cache
        return [(k[:rows, :, :L], v[:rows, :, :L]) for k, v in self.cache]

    def masks(self, block: slice) -> Tensor:
        """Where masks stand in the block, (B, N)."""
        return self.ids[:, block] == self.lm.config.mask_id

    def rows(self, waiting: Tensor) -> Tensor:
        """Rows (R,) of the batch that a full call computes: items that are done cost nothing."""
        return waiting.nonzero()[:, 0]

    def columns(self, block: slice) -> Tensor:
        """Columns (N,) of the answers that a call predicts: those of the block with a mask.

        Rows that the call leaves out have none: they were done before it, or before the cache.
        """
        return self.masks(block).any(dim=0).nonzero()[:, 0] + block.start

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Each block when its turn comes: its number, its columns and `step_limits`."""
        for number, (block, n_steps) in enumerate(blocks_of(self.config)):
            self.open_block(block)
            yield number, block, self.step_limits(block, n_steps)

        # Deliberation is one more, and opens like the first: the whole answer with a few masks.
        if self.config.deliberate > 0:
            self.mask_unconfident()
            block = slice(0, self.config.length)
            yield 0, block, self.step_limits(block, self.config.steps)

    def step_limits(self, block: slice, n_steps: int) -> Tensor:
        """The rule's number at each step of a block; only the count rule knows how many there are.

        Returns float64 (steps,); for other rules steps enough for one token each, and a second
        call.
        """
        N = block.stop - block.start
        limits = split_evenly(N, n_steps)
        if self.config.rule != "count":
            limits = [getattr(self.config, self.config.rule)] * (N + 1)
        return torch.tensor(limits, dtype=torch.float64).to(self.ids.device)

    def waiting(self, block: slice, turn: int) -> Tensor:
        """Which items (B,) take part in a step of the block, the `turn`-th from 0.

        Those with a mask in it; in a second call as Fast-dLLM makes it, all that have not ended.
        """
        config = self.config
        if turn == 1 and config.second_call and config.cache != "none" and config.rule != "count":
            return ~self.ended
        return self.masks(block).any(dim=1)

    def open_block(self, block: slice) -> None:
        """Appended blocks: for now, the answer ends with this one."""
        if self.appends:
            self.end = block.stop

    def cached_part(self, block: slice | None) -> slice:
        """Columns of the answer that the cache does not hold; None: a new block, so all of them."""
        if block is None:
            return slice(0, self.end)
        return block if self.config.cache == "dual" else slice(block.start, self.end)

    def call(self, rows: Tensor, columns: Tensor, part: slice | None = None) -> Call:
        """A pass for these rows over a part of the answer; None: over prompt and answer.

        It replaces keys and values of these positions in the cache. The others are as old as the
        pass that made them, in which the block was still masked. That is why a cached answer can
        differ from the exact one. Between two passes over everything, rows must stay the same.
        """
        C, B, P, _ = self.prompt.shape
        rows = slice(None) if len(rows) == B else rows  # all of them, without copies

        # Columns that pass; negative ones are of the prompt. A shifted LM predicts the first token
        # of a part one position before it.
        start = part.start - self.lm.config.shifted if part else -P
        stop = part.stop if part else self.end
        ids = self.ids[rows, max(start, 0) : stop]
        x = round_rows(self.lm.embed(ids), self.is_rounded[rows])  # (R, M, D)
        x = x.repeat(C, 1, 1) if C > 1 else x  # (C R, M, D)
        if start < 0:
            x = torch.cat([self.prompt[:, rows, start:].flatten(0, 1), x], dim=1)

        L = P + self.end
        indices = torch.arange(P + start, P + stop, device=x.device)  # (M,)
        cache = self.cache_of(len(x), L) if self.cache else None
        real = self.real[rows, :L].repeat(C, 1) if self.is_padded else None  # (C R, L)
        return Call(x, real, cache, indices, columns - start)

    def uniform(self, waiting: Tensor, *shape: int) -> Tensor:
        """Random numbers (B, *shape) in [0, 1), by the generators of the waiting items (B,)."""
        u = torch.full((len(waiting), *shape), 0.5, dtype=torch.float64)
        for i in waiting.nonzero()[:, 0].tolist():
            torch.rand(shape, generator=self.generators[i], out=u[i])
        return u.to(waiting.device)

    def choice(
        self, limit: Tensor, waiting: Tensor, block: slice, inside: tuple[Tensor, Tensor]
    ) -> Choice:
        """The rule of a step with its random numbers, at rows and columns `inside` the block.

        They are drawn on the CPU for the whole block, even if only some positions are computed, so
        that an item's numbers do not depend on that.
        """
        gumbel = None
        chance = None
        N = block.stop - block.start
        if self.config.temperature > 0:
            # In float64: float32 would cut the noise's tails and lose diversity (arXiv 2409.02908).
            u = self.uniform(waiting, N, self.lm.config.vocab)[inside]  # (R, N, V)
            gumbel = -self.config.temperature * (-u.log()).log()
        if self.config.remasking == "random":
            chance = self.uniform(waiting, N)[inside].float()  # (R, N)
        config = self.config
        return Choice(config.rule, limit, self.cfg_scale, gumbel, chance, config.last_candidate)

    def mask_unconfident(self) -> None:
        """Mask the tokens again whose confidence is below `deliberate`.

        What stands behind a text's first end token is masked only together with that token.
        """
        last = self.config.length - 1
        end = tokens_before_end(self.ids, self.lm.config.end_id).clamp(max=last)[:, None]  # (B, 1)
        is_behind = torch.arange(last + 1, device=end.device) > end  # (B, G)
        confidence = torch.where(is_behind, self.confidence.gather(1, end), self.confidence)
        is_unconfident = confidence < self.config.deliberate
        self.ids.masked_fill_(is_unconfident, self.lm.config.mask_id)
        self.confidence.masked_fill_(is_unconfident, 0.0)

    def finish_ended(self) -> None:
        """With `stop_at_end`: mark items whose text is complete, fill their masks with end tokens.

        A text ends at its first end token. Once no mask stands before it, nothing can change it.
        """
        if not self.config.stop_at_end:
            return
        is_masked = self.ids == self.lm.config.mask_id  # (B, G)
        is_end = self.ids == self.lm.config.end_id
        self.ended = (is_end & (is_masked.cumsum(dim=1) == 0)).any(dim=1)  # (B,)
        self.ids.masked_fill_(self.ended[:, None] & is_masked, self.lm.config.end_id)


def begin(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig
) -> tuple[Canvas, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """The state of `generate`, and its step: `refine`, maybe compiled or with fewer operations."""
    if config.compile:
        from speed.compiled import compile_step

        return compile_step(lm, prompt, config)
    return Canvas(lm, prompt, config), small_step(lm)
