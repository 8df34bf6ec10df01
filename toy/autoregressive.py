"""The autoregressive baseline: the same transformer, but a position attends only to those before.

What is diffusion worth to a model that listens? The paper gives LLaMA-3.1 the same adapters and
data as LLaDA, but those two LMs have also read different text. The baseline has not: it starts from
the random weights of the run's diffusion LM and trains on the same batches for as many steps, with
the loss of next tokens (`python -m lab.baseline`).

Its answers are greedy. A cache of keys and values is exact here, since later tokens change nothing
before them: after the prompt, each call reads one position.

Shapes: B batch, R rows still without an end token, P prompt positions, G answer tokens, M positions
of a call, L positions so far, D width.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa import DIFFA, Spliced, splice
from diffusion_lm import DiffusionLM, token_losses
from sampler import Generation, SamplerConfig, check_finite, check_prompt, tokens_before_end


class CausalLM(DiffusionLM):
    """The transformer of DiffusionLM, with logits at position i that predict token i + 1."""

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> embeddings (B, L, D). Raises ValueError: an id is [MASK]."""
        if (ids == self.config.mask_id).any():
            raise ValueError(
                "a causal LM cannot fill in masks; its loss is next_token_loss, and "
                "autoregressive.greedy answers with it"
            )
        return super().embed(ids)

    def attention_mask(self, mask: Tensor | None, indices: Tensor, n_keys: int) -> Tensor:
        """What the queries at indices (M,) may attend to: themselves and real positions before.

        Args:
            mask: (B, L), true where a position is real; None when all are. n_keys: L.
        Returns:
            (M, L), or (B, 1, M, L) with a mask; true where a query may attend.
        """
        keys = torch.arange(n_keys, device=indices.device)  # (L,)
        before = keys <= indices[:, None]  # (M, L)
        if mask is None:
            return before

        # A padded query attends to itself; its softmax over no keys at all would be NaN.
        itself = keys == indices[:, None]  # (M, L)
        return (before & mask[:, None, None, :]) | itself


def refuse_bidirectional(lm: DiffusionLM) -> None:
    """Raise ValueError that says what to use instead, when the LM is not causal."""
    if not isinstance(lm, CausalLM):
        raise ValueError(
            "this LM sees the next token itself; its loss is diffusion_loss, and sampler.generate "
            "answers with it"
        )


def next_token_loss(
    lm: CausalLM,
    prompt: Tensor,
    prompt_mask: Tensor,
    answer_ids: Tensor,
    n_tokens: int,
    counted: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each answer token given all tokens before it.

    Args:
        prompt, prompt_mask, answer_ids, n_tokens: as in diffusion_loss.
        counted: (B, G), true at the tokens that have a loss; None: all.
    Returns:
        a scalar.
    Raises:
        ValueError: the LM is not causal, so it would read each token off the answer itself.
    """
    refuse_bidirectional(lm)
    G = answer_ids.shape[1]

    # 1. Sequence: the prompt, then the answer.
    x = torch.cat([prompt, lm.embed(answer_ids)], dim=1)  # (B, L, D)
    mask = F.pad(prompt_mask, (0, G), value=True)  # (B, L)

    # 2. One pass; the hidden state of the position before a token predicts it.
    L = x.shape[1]
    hidden = lm(x, mask, output_rows=torch.arange(L - G - 1, L - 1, device=x.device))  # (B, G, D)

    # 3. Cross-entropy, divided by the answer tokens of the whole batch.
    if counted is None:
        counted = torch.ones_like(answer_ids, dtype=torch.bool)
    return token_losses(lm, hidden[counted], answer_ids[counted]).sum() / n_tokens


def next_token_stage_loss(
    model: DIFFA, batch, generator: torch.Generator, recipe
) -> Iterator[Tensor]:
    """A stage's loss on a CausalLM: losses of a step's parts, which add up to that of its batch."""
    for part in batch.parts():
        audio, audio_mask = part.hear()  # (b, A, D), (b, A)
        prompt = splice(model.lm, part.prompts, audio, audio_mask)  # (b, P, D)

        # A clip that could not be read has no loss.
        answer_ids = part.take(batch.answer_ids)  # (b, G)
        readable = part.readable[:, None].expand_as(answer_ids)  # (b, G)
        n_tokens = batch.answer_ids.numel()
        yield next_token_loss(
            model.lm, prompt.embeddings, prompt.mask, answer_ids, n_tokens, readable
        )


def causal(stage):
    """A training.run.Stage as it is for a CausalLM: its loss, and how it answers a clip."""
    return replace(stage, loss=next_token_stage_loss, decode=greedy)


@torch.no_grad()
def greedy(
    lm: CausalLM,
    prompt: Spliced,
    config: SamplerConfig,
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Generation:
    """Answer a batch of spliced prompts, one most likely token a call, until their end tokens.

    Args:
        prompt: left-padded, as `splice` makes it; embeddings (B, P, D).
        config: its length G is the most tokens of an answer; nothing else of it applies.
        on_step: called after each token with ids (B, G) and the confidence (B, G) of each.
    Returns:
        as sampler.generate: ids (B, G), filled with the end token after the first one; calls (B,)
        of the model until that one. The first call reads the prompt, each other one token.
    Raises:
        ValueError: the LM is not causal, a prompt is empty, or prompt and answer exceed the
            LM's context.
    """
    started = time.perf_counter()
    refuse_bidirectional(lm)
    check_prompt(lm, prompt, config)
    B, P, _ = prompt.embeddings.shape
    if P == 0 or not prompt.mask[:, -1].all():
        raise ValueError("a prompt has no end to continue; is it empty, or padded on the right?")

    # State: the answers so far, and keys and values of what the model has read.
    G = config.length
    end_id = lm.config.end_id
    device = prompt.embeddings.device
    real = F.pad(prompt.mask, (0, G), value=True)  # (B, P + G)
    ids = torch.full((B, G), end_id, device=device)
    confidence = torch.zeros(B, G, device=device)
    calls = torch.zeros(B, dtype=torch.long, device=device)
    cache = lm.new_cache(B, P + G)
    rows = torch.arange(B, device=device)  # (R,) items without an end token yet
    x = prompt.embeddings  # (R, M, D): what the model has not read yet

    for n in range(G):
        # 1. One pass over the new positions; attention reads the cache up to the last of them.
        M = x.shape[1]
        L = P + n
        filled = [(keys[:, :, :L], values[:, :, :L]) for keys, values in cache]
        indices = torch.arange(L - M, L, device=device)  # (M,)
        last = torch.tensor([M - 1], device=device)
        hidden = lm(x, real[rows, :L], filled, indices, output_rows=last)  # (R, 1, D)

        # 2. The most likely next token.
        logits = lm.head(hidden[:, 0])  # (R, V)
        check_finite(lm, logits.amax(dim=-1))
        token = logits.argmax(dim=-1)  # (R,)
        ids[rows, n] = token
        calls[rows] += 1
        if on_step:
            confidence[rows, n] = logits.float().softmax(dim=-1).amax(dim=-1)
            on_step(ids, confidence)

        # 3. Items with an end token leave the batch and cost nothing more.
        open_rows = token != end_id  # (R,)
        if not open_rows.any():
            break
        if not open_rows.all():
            rows = rows[open_rows]
            token = token[open_rows]
            cache = [(keys[open_rows], values[open_rows]) for keys, values in cache]
        x = lm.embedding(token[:, None])  # (R, 1, D); even [MASK], if the LM predicts it

    return Generation(
        ids=ids,
        calls=calls,
        text_tokens=tokens_before_end(ids, end_id),
        seconds=time.perf_counter() - started,
    )
