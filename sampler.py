"""Masks become words, the most confident first.

The answer starts as `length` masks after the prompt. At each step every masked position of the
current block proposes its most probable token. A *rule* decides which proposals are committed:

    count      a fixed number a step, the most confident first (LLaDA, section 2.4)
    threshold  all with a confidence above `threshold`, at least one (Fast-dLLM, section 3.3)
    factor     the longest prefix, sorted by confidence, in which the n-th has a confidence of at
               least 1 - factor / (n + 1) (the same section, version 3 of the paper)
    frechet    the longest prefix whose doubts 1 - c, the last one twice, leave more than `frechet`
               of 1: a bound on the probability that all are correct (arXiv 2606.02955)

A *cache* decides what a step computes (Fast-dLLM, section 3.2, figure 2; in speed/canvas.py, `call`
and `cached_part`). A block's first step is a full pass over prompt and answer; later ones compute

    none       everything: exact
    prefix     the current block and what follows it; keys and values before it are kept
    dual       the current block only; keys and values on both sides of it are kept

With `refresh` above 1, one full pass serves that many blocks. The others open with a pass over the
answer alone, and the prompt's keys and values are kept. With `append`, the answer grows block by
block, and no masks stand behind the current one, as iLLaDA samples. With `deliberate`, tokens of
the finished answer with a lower confidence are masked again, together, and filled in once more.

From plain to fast: `generate_plain` is the published procedure. `generate` has every rule and cache
for a batch of prompts; `refine` is one step of it. `answer` answers questions about clips.

    python sampler.py CLIP "QUESTION" [--trace out.html]      (evaluation/ask.py; many clips too)

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, V vocabulary, D width. A call has
R rows of the batch, C conditions (1, or 2 with guidance) and M positions that pass through the
model. It predicts N positions: those of a block, or only the masked ones of it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Prompt, decode_answer
from diffa import Spliced, splice
from diffusion_lm import DiffusionLM, KeyValues
from speed.checks import check_finite, check_prompt, check_settings


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How an answer is filled in. ValueError: an impossible setting, and what works instead."""

    length: int = 16  # tokens of the answer
    block_length: int | None = None  # filled left to right, the last may be shorter; None: one
    steps: int | None = None  # of the count rule, shared by the blocks; None: one a token
    rule: str = "count"
    threshold: float = 0.9
    factor: float = 1.0
    frechet: float = 0.25
    last_candidate: bool = False  # of the factor rule, as in DIFFA-2's release; see `commit`
    temperature: float = 0.0  # of the Gumbel noise on the proposals
    remasking: str = "low_confidence"  # "random": proposals are committed by chance instead
    cfg_scale: float = 0.0  # classifier-free guidance; 0: none
    seed: int = 0  # of temperature and random remasking
    cache: str = "none"
    refresh: int = 1  # blocks that share one pass over the prompt; above 1 only with a cache
    deliberate: float = 0.0  # tokens less confident than this are filled in twice; 0: none
    append: bool | None = None  # blocks are appended one by one; None: as the LM was trained
    compile: bool = False  # slow at first (speed/compiled.py)
    second_call: bool = False  # Fast-dLLM's, in a block that is full after its first; to compare
    stop_at_end: bool = True  # an item is done once its end token is committed with all before it

    def __post_init__(self):
        for name in ("block_length", "steps"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.length)
        check_settings(self)
        object.__setattr__(self, "block_length", min(self.block_length, self.length))

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.block_length)


@dataclass(kw_only=True)
class Generation:
    """Answers to a batch of prompts."""

    ids: Tensor  # (B, G)
    calls: Tensor  # (B,) forward passes that each item took
    text_tokens: Tensor  # (B,) tokens before the end
    seconds: float  # for all of them


def split_evenly(total: int, parts: int) -> list[int]:
    """total as a sum of `parts` integers that differ by at most 1, larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def blocks_of(config: SamplerConfig) -> list[tuple[slice, int]]:
    """The columns of each block, and its number of steps: by its length, at least one."""
    G = config.length
    starts = range(0, G, config.block_length)
    blocks = [slice(start, min(start + config.block_length, G)) for start in starts]

    # The last block may be shorter; the others divide what it leaves.
    last = max(config.steps * (G - starts[-1]) // G, 1)
    n_steps = [*split_evenly(config.steps - last, len(blocks) - 1), last]
    return list(zip(blocks, n_steps, strict=True))


# The published procedure


@torch.no_grad()
def generate_plain(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, max_steps: int | None = None
) -> Generation:
    """LLaDA's sampler as DIFFA publishes it, for one item: the count rule, no cache.

    Greedy, without guidance or padding; other settings are ignored. The tests compare `generate`
    with it, and the benchmark measures against it, stopping after `max_steps`.
    """
    started = time.perf_counter()
    P = prompt.embeddings.shape[1]
    is_answer = torch.arange(P + config.length, device=prompt.mask.device)[None] >= P  # (1, L)
    x = torch.full_like(is_answer, lm.config.mask_id, dtype=torch.long)  # only the answer is read
    calls = 0

    for block, n_steps in blocks_of(config):
        for n_commit in split_evenly(block.stop - block.start, n_steps):
            if calls == max_steps:
                break

            # One pass over prompt and answer. Quirk of the release: in a prompt with audio, all
            # embeddings are rounded to bfloat16.
            embeddings = torch.cat([prompt.embeddings, lm.embed(x[:, P:])], dim=1)  # (1, L, D)
            if not prompt.is_text.all():
                embeddings = embeddings.bfloat16().to(embeddings.dtype)
            logits = lm.head(lm(embeddings))  # (1, L, V)

            # Each position proposes a token; its confidence is the token's probability.
            proposed = logits.argmax(dim=-1)  # (1, L)
            probabilities = F.softmax(logits.double(), dim=-1)
            confidence = probabilities.gather(-1, proposed[..., None])[..., 0]  # (1, L)

            # Masks up to the end of the block compete, and the most confident are committed.
            confidence[~is_answer | (x != lm.config.mask_id)] = -torch.inf
            confidence[:, P + block.stop :] = -torch.inf
            best = confidence[0].topk(n_commit).indices
            check_finite(lm, confidence[0, best])
            x[0, best] = proposed[0, best]
            calls += 1

    return Generation(
        ids=x[:, P:],
        calls=torch.tensor([calls]),
        text_tokens=tokens_before_end(x[:, P:], lm.config.end_id),
        seconds=time.perf_counter() - started,
    )


def tokens_before_end(ids: Tensor, end_id: int) -> Tensor:
    """How many tokens of each answer (B, G) stand before its first end token: (B,)."""
    return ((ids == end_id).cumsum(dim=1) == 0).sum(dim=1)


# One step: propose, choose, commit


def propose(logits: Tensor, mask_id: int, gumbel: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) that logits (B, N, V) make most probable, and their confidence (B, N).

    The confidence is the softmax probability in float64, as published, and NaN where a logit is NaN
    or +infinite. Float32 could not rank proposals that are almost certain: its last step below 1 is
    6e-8. [MASK] counts in the softmax but is never proposed: its logit is overwritten.
    gumbel: (B, N, V) float64 noise, added before the maximum.
    """
    logits = logits.float()
    probabilities = logits.softmax(dim=-1)  # (B, N, V)
    logits[..., mask_id] = -torch.inf
    noisy = logits if gumbel is None else logits.double() + gumbel
    tokens = noisy.argmax(dim=-1, keepdim=True)  # (B, N, 1)

    # Beside an almost certain token, the others' sum is small, and float32 keeps its digits.
    own = probabilities.gather(-1, tokens).double()
    others = probabilities.scatter_(-1, tokens, 0.0).sum(dim=-1, keepdim=True)
    return tokens[..., 0], (own / (own + others))[..., 0]


def commit(
    confidence: Tensor, is_masked: Tensor, rule: str, limit: Tensor, last_candidate: bool = False
) -> Tensor:
    """Which proposals stay, (B, N) bool: at least one in each row with a mask, only at masks.

    confidence: (B, N). is_masked: (B, N), true where a mask waits. limit: (), the rule's number:
    tokens of this step, or the setting named like the rule. It is a tensor, because torch.compile
    would bake a Python float into the graph and recompile for a new value. last_candidate: a
    proposal that is the only one to fail the factor rule stays too. Quirk of Fast-dLLM's code, and
    so of DIFFA-2; its paper has no such exception.
    """
    confidence = confidence.masked_fill(~is_masked, -torch.inf)

    # The rank of each position by confidence, 0 for the most confident; ties go to the left.
    own = confidence[:, :, None]
    other = confidence[:, None, :]
    order = torch.arange(confidence.shape[1], device=confidence.device)
    is_earlier = order[None, :] < order[:, None]  # (N, N)
    is_before = (other > own) | ((other == own) & is_earlier)  # (B, N, N)
    rank = is_before.sum(dim=-1)  # (B, N)

    if rule == "count":
        keep = rank < limit
    elif rule == "threshold":
        keep = confidence > limit
    elif rule == "factor":
        # The bar rises with the rank while the confidence falls: if one passes, all before it do.
        keep = confidence >= 1 - limit / (rank + 2)
        if last_candidate:
            fails = is_masked & ~keep & (rank > 0)
            keep |= fails.sum(dim=-1, keepdim=True) == 1
    else:
        # As n grows, c1 + ... + cn - (n - 1) - (1 - cn) falls: the kept ones are a prefix too.
        doubts = torch.where(is_before, 1 - other, 0.0).sum(dim=-1)  # (B, N)
        keep = 1 - doubts - 2 * (1 - confidence) > limit
    return (keep | (rank == 0)) & is_masked


class Call(NamedTuple):
    """One forward pass: what goes through the model, and which rows of it are predicted."""

    x: Tensor  # (C R, M, D) embeddings
    real: Tensor | None  # (C R, L), false at padding; None: there is none
    cache: KeyValues | None
    indices: Tensor  # (M,) positions of x in the sequence
    output_rows: Tensor  # (N,) rows of x


class Choice(NamedTuple):
    """How the predictions of a call are turned into committed tokens."""

    rule: str
    limit: Tensor  # (), see `commit`
    cfg_scale: Tensor | None  # ()
    gumbel: Tensor | None  # (R, N, V), see `propose`
    chance: Tensor | None  # (R, N), decides instead of the confidence under random remasking
    last_candidate: bool = False  # see `commit`


def refine(
    lm: DiffusionLM, call: Call, block_ids: Tensor, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the model and what it commits; pure but for the cache, so that it compiles whole.

    block_ids: (R, N) tokens at the output rows, masks among them. Returns them with what was
    committed, the confidence, and which were committed: (R, N) each.
    """
    hidden = lm(call.x, call.real, call.cache, call.indices, call.output_rows)  # (C R, N, D)
    logits = lm.head(hidden)  # (C R, N, V)

    # Guidance (LLaDA, equation 16) moves the logits away from those without the prompt's text. A
    # scale of 0 leaves the conditional logits; 1 doubles their difference.
    if choice.cfg_scale is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (choice.cfg_scale + 1) * (conditional - unconditional)

    # Propose a token at each position, choose by the rule, commit: (R, N) each.
    is_masked = block_ids == lm.config.mask_id
    proposed, confidence = propose(logits, lm.config.mask_id, choice.gumbel)
    deciding = confidence if choice.chance is None else choice.chance
    keep = commit(deciding, is_masked, choice.rule, choice.limit, choice.last_candidate)
    return torch.where(keep, proposed, block_ids), confidence, keep


# Generation for a batch, with every rule and cache


@torch.no_grad()
def generate(
    lm: DiffusionLM,
    prompt: Spliced,
    config: SamplerConfig,
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Generation:
    """Fill in the answers to a batch of spliced prompts.

    on_step: called after each step with ids (B, G) and the confidence (B, G) of each token when it
    was committed. Later steps change both: copy them. ValueError: see check_prompt, check_finite.
    """
    from speed.canvas import begin

    started = time.perf_counter()
    check_prompt(lm, prompt, config)
    canvas, step = begin(lm, prompt, config)

    for number, block, limits in canvas.blocks():
        for turn, limit in enumerate(limits):
            # Which items still wait?
            waiting = canvas.waiting(block, turn)  # (B,)
            if not waiting.any():
                break

            # A block's first call runs over everything, or over the whole answer while the prompt
            # is kept. Later ones run over what is not cached.
            part = None
            if config.cache == "none" or (turn == 0 and number % config.refresh == 0):
                rows = canvas.rows(waiting)  # (R,)
            else:
                part = canvas.cached_part(block if turn else None)
            columns = canvas.columns(block)  # (N,)
            call = canvas.call(rows, columns, part)

            # Predict, and commit what the rule takes.
            choice = canvas.choice(limit, waiting, block, (rows[:, None], columns - block.start))
            where = (rows[:, None], columns)  # (R, N)
            canvas.ids[where], confidence, keep = step(lm, call, canvas.ids[where], choice)
            canvas.confidence[where] = torch.where(keep, confidence, canvas.confidence[where])
            check_finite(lm, canvas.confidence)
            canvas.calls += waiting
            canvas.finish_ended()
            if on_step:
                on_step(canvas.ids, canvas.confidence)

    return Generation(
        ids=canvas.ids,
        calls=canvas.calls,
        text_tokens=tokens_before_end(canvas.ids, lm.config.end_id),
        seconds=time.perf_counter() - started,
    )


# Questions about clips


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one question."""

    text: str
    ids: list[int]  # all G tokens
    calls: int  # forward passes that it took
    n_tokens: int  # tokens before the end


def answer(
    lm: DiffusionLM,
    tokenizer,
    prompts: list[Prompt],
    audio: Callable[[slice], tuple[Tensor, Tensor]] | None,
    config: SamplerConfig,
    *,
    batch: int = 16,
    decode: Callable[..., Generation] = generate,
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Answer]:
    """Answers to prompts, batch by batch, in their order.

    audio: called with the rows of a batch, gives their audio embeddings (B, A, D) and mask (B, A),
    as DIFFA.hear does. None: the prompts are text alone. decode: `generate`, or another decoder
    with its arguments. on_step, ValueError: see `generate`.
    """
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)

        # Hear the clips (B, A, D), splice the prompts (B, P, D), fill in the answers (B, G).
        with torch.inference_mode():
            heard, heard_mask = audio(rows) if audio else (None, None)
            out = decode(lm, splice(lm, prompts[rows], heard, heard_mask), config, on_step)
        for ids, calls, n_tokens in zip(out.ids, out.calls, out.text_tokens, strict=True):
            text = decode_answer(tokenizer, ids.tolist())
            yield Answer(text=text, ids=ids.tolist(), calls=int(calls), n_tokens=int(n_tokens))


def main() -> None:
    from evaluation.ask import main as ask_about_clip

    ask_about_clip()


if __name__ == "__main__":
    main()
