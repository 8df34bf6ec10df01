"""Masks become words, the most certain first.

The answer starts as `length` masks after the prompt. At each call of the model every masked position of the current
block proposes its likeliest token; a *rule* says which proposals are certain enough to stay (LLaDA, section 2.4):
  count      a fixed number a step, the most confident first (the published sampler)
  threshold  all with confidence above `threshold`, one at the least (Fast-dLLM, arXiv 2505.22618)
  factor     the longest prefix, sorted by confidence, in which the n-th has at least 1 - factor / (n + 1) (the same)
A *cache* says what a call computes anew. The first call of a block is always a full pass (Fast-dLLM):
  none       everything, at every call: exact
  prefix     the current block and what follows it; what stands before is kept from the block's first call
  dual       the current block alone

    python sampler.py CLIP "QUESTION"                       answers, denoising live
    python sampler.py CLIP "QUESTION" --trace out.html      and writes a page, a row for each step
    python -m lab.benchmark [--size toy]                    how fast each of them is

Shapes: B batch, R rows of it that a call works on, C conditions (1, or 2 under guidance), P prompt positions, G answer
tokens, M positions that pass through the model, N block length, V vocabulary, D width.
"""

import argparse
import functools
import html
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data import AudioError, pad_waveforms, read_audio
from checkpoints.tokenizer import Tokenizer, build_prompt, decode_answer
from diffa import AUDIO_PARTS, DIFFA, Spliced, add_model_arguments, model_options
from diffusion_lm import DiffusionLM, KeyValues

BUCKET = 64  # compiled calls pad prompts to a multiple of this, so that few shapes are ever compiled
CHOICES = {"rule": ("count", "threshold", "factor"), "remasking": ("low_confidence", "random"), "cache": ("none", "prefix", "dual")}


@dataclass(frozen=True)
class SamplerConfig:
    """How an answer is filled in. Checked when made: an impossible setting raises ValueError that says what would work."""

    length: int = 16  # tokens of the answer
    block_length: int = 16  # blocks are filled left to right
    steps: int = 16  # of the count rule, shared by the blocks, the first blocks taking the remainder
    rule: str = "count"  # count, threshold, factor
    threshold: float = 0.9
    factor: float = 1.0
    temperature: float = 0.0  # of the Gumbel noise on the proposals
    remasking: str = "low_confidence"  # or "random": proposals are kept by chance, not by confidence
    cfg_scale: float = 0.0
    seed: int = 0  # of temperature and random remasking
    cache: str = "none"  # none, prefix, dual
    compile: bool = False  # with torch.compile: the first answer waits for it, CUDA graphs replay the others
    stop_at_end: bool = True  # an item is done once its text is, and the rest filled with the end token

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length {self.length} holds no answer; use 1 or more")
        if self.block_length < 1 or self.length % self.block_length:
            divisors = [n for n in range(1, self.length + 1) if self.length % n == 0]
            raise ValueError(f"length {self.length} does not divide into blocks of {self.block_length}; use one of {divisors}")
        n_blocks = self.length // self.block_length
        if self.rule == "count" and not n_blocks <= self.steps <= self.length:
            raise ValueError(f"{self.steps} steps for {n_blocks} blocks and {self.length} tokens; use {n_blocks} to {self.length}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} is outside (0, 1]; 0.9 is usual")
        if self.temperature < 0 or self.cfg_scale < 0 or self.factor <= 0:
            raise ValueError("temperature and cfg_scale must be 0 or more, factor more than 0")


@dataclass
class Generation:
    """What came out: ids (B, G), model calls each item took (B,), tokens before its end (B,), seconds for all."""

    ids: Tensor
    steps: Tensor
    text_tokens: Tensor
    seconds: float
    trace: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # after each step: ids (B, G), confidence (B, G)


def shares(total: int, parts: int) -> list[int]:
    """total divided into parts as evenly as integers allow, larger shares first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def propose(logits: Tensor, mask_id: int, gumbel: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest token at each position and its confidence, from logits (B, N, V): tokens and confidence (B, N).

    The confidence is the softmax probability, exp(logit - logsumexp) in float32, without a softmax tensor.
    [MASK] itself is never proposed; its logits are overwritten to spare a copy.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1)  # (B, N), [MASK] counted
    logits[..., mask_id] = -torch.inf
    if gumbel is None:
        best, tokens = logits.max(dim=-1)
    else:
        tokens = (logits.double() + gumbel).argmax(dim=-1)
        best = logits.gather(-1, tokens[..., None])[..., 0]
    return tokens, (best - total).exp()


def commit(confidence: Tensor, masked: Tensor, rule: str, limit: Tensor) -> Tensor:
    """Which proposals stay, (B, N) bool: at least one in each row that has a mask, and never an unmasked position.

    Args:
        confidence (B, N); masked (B, N), true where a mask waits.
        limit: the rule's number, (): tokens of this step, the threshold, or the factor. A tensor, for a number would be
            compiled into the graph, and another number compile anew.
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    mine, other = confidence[:, :, None], confidence[:, None, :]
    order = torch.arange(confidence.shape[1], device=confidence.device)
    earlier = order[None, :] < order[:, None]  # (N, N)
    rank = ((other > mine) | ((other == mine) & earlier)).sum(dim=-1)  # (B, N): 0 for the surest
    if rule == "count":
        keep = rank < limit
    elif rule == "threshold":
        keep = confidence > limit
    else:  # confidence falls with rank while the bar rises: whoever passes, all surer ones pass too
        keep = confidence >= 1 - limit / (rank + 2)
    return (keep | (rank == 0)) & masked


def refine(
    lm: DiffusionLM, x: Tensor, block: Tensor, real: Tensor, cache: KeyValues | None, where: Tensor, wanted: Tensor,
    rule: str, limit: Tensor, scale: Tensor | None, gumbel: Tensor | None, chance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One call of the model and what it commits; pure but for the cache, without branches on data: it compiles whole.

    Args:
        x: (C R, M, D) embeddings that pass through, at `where` (M,) among all. real: (C R, P + G), false at padding.
        block: (R, N) ids of the current block, where masks wait. wanted: (N,) their rows of x.
        rule, limit: see `commit`. scale: of the guidance, (). gumbel: (R, N, V). chance: (R, N), replaces the confidence.
    Returns:
        block with what was committed (R, N), confidence (R, N), committed (R, N).
    """
    logits = lm.head(lm(x, real, cache, where, wanted))  # (C R, N, V): the current block only
    if scale is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (scale + 1) * (conditional - unconditional)
    masked = block == lm.config.mask_id
    proposed, confidence = propose(logits, lm.config.mask_id, gumbel)
    confidence = confidence if chance is None else chance
    keep = commit(confidence, masked, rule, limit)
    return torch.where(keep, proposed, block), confidence, keep


def rounded(x: Tensor, rows: Tensor) -> Tensor:
    """x (..., R, M, D) with those of its rows (R,) passed through bfloat16."""
    return torch.where(rows[:, None, None], x.bfloat16().to(x.dtype), x)


@functools.cache
def compiled_refine(device: str) -> Callable:
    """`refine` in one graph for each shape; on a GPU the graph is recorded once and replayed."""
    torch._dynamo.config.recompile_limit = 256  # shapes, rules and models; the default of 8 is for graphs that leak
    return torch.compile(refine, fullgraph=True, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)


def check_prompt(lm: DiffusionLM, prompt: Spliced, config: SamplerConfig) -> None:
    """Raises ValueError: prompt and answer exceed the context, or guidance has no text to lead from."""
    longest, most = int(prompt.mask.sum(dim=1).max()) if prompt.mask.numel() else 0, lm.config.max_length
    if longest + config.length > most:
        raise ValueError(
            f"prompt of {longest} positions and answer of {config.length} exceed the LM's context of {most}; "
            f"ask a shorter question, or for an answer of at most {max(most - longest, 0)}"
        )
    if config.cfg_scale > 0 and not (prompt.is_text & prompt.mask).any(dim=1).all():
        raise ValueError("guidance leads away from the answer without the prompt's text, and a prompt has none; use cfg_scale 0")


@torch.no_grad()
def generate(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, on_step: Callable[[Tensor, Tensor], None] | None = None, trace: bool = False
) -> Generation:
    """Fill in answers to a batch of spliced prompts; the one loop of every rule and cache.

    Args:
        on_step: called after each step with ids (B, G) and the confidence (B, G) that each token had when committed.
        trace: keep those of every step in the result.
    Raises:
        ValueError: the prompt with its answer is longer than the LM's context, guidance has nothing to lead from, or the LM is causal.
    """
    started = time.perf_counter()
    if lm.config.causal:
        raise ValueError("this LM is causal and was not trained to fill in masks; autoregressive.greedy answers with it, token by token")
    check_prompt(lm, prompt, config)
    cached, guided = config.cache != "none", config.cfg_scale > 0
    context, real, is_text = prompt.embeddings, prompt.mask, prompt.is_text
    if config.compile:
        pad = -context.shape[1] % BUCKET
        context, real, is_text = F.pad(context, (0, 0, pad, 0)), F.pad(real, (pad, 0)), F.pad(is_text, (pad, 0))
    (B, P, _), G, N = context.shape, config.length, config.block_length
    device, mask_id, end_id = context.device, lm.config.mask_id, lm.config.end_id
    generator = torch.Generator().manual_seed(config.seed)
    ids, kept = torch.full((B, G), mask_id, device=device), torch.zeros(B, G, device=device)  # kept: confidence at commitment
    calls, ended = torch.zeros(B, dtype=torch.long, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    # Quirk of the release: beside sound, every embedding passes through bfloat16, whatever the LM's dtype, and the golden
    # ids hang on it. Text-only prompts are not rounded.
    rounds = (real & ~is_text).any(dim=1)  # (B,)
    context = context[None]  # (C, B, P, D)
    if guided:
        # Quirk of the release: the unconditional pass masks the prompt's text but keeps the sound.
        blank = lm.embed(torch.tensor(mask_id, device=device))  # (D,)
        context = torch.cat([context, torch.where(is_text[None, ..., None], blank, context)])
    context = rounded(context, rounds)
    real = torch.cat([real, torch.ones(B, G, dtype=torch.bool, device=device)], dim=1)  # (B, P + G)
    C, everywhere, rows, cache = len(context), torch.arange(P + G, device=device), torch.arange(B, device=device), []
    buffers = lm.new_cache(C * B, P + G, fixed=config.compile) if cached else []
    call = compiled_refine(device.type) if config.compile else refine
    scale = torch.tensor(config.cfg_scale, device=device) if guided else None
    seen = []
    for block, n_steps in enumerate(shares(config.steps, G // N)):
        here = slice(block * N, (block + 1) * N)
        limits = shares(N, n_steps) if config.rule == "count" else [getattr(config, config.rule)] * (N + 1)
        limits = torch.tensor(limits, dtype=torch.float32, device=device)
        for turn in range(N + 1):
            # Fast-dLLM does not ask after the pass that opens a block, and its call counts hang on it.
            unasked = cached and turn == 1 and config.rule != "count"
            waiting = ~ended if unasked else (ids[:, here] == mask_id).any(dim=1)  # (B,)
            if not waiting.any():
                break
            full = turn == 0 or not cached
            if config.compile:  # shapes must stay
                torch.compiler.cudagraph_mark_step_begin()  # what the last call returned has been read and may go
                columns = everywhere[here]  # (N,)
            else:  # rows that are done and positions that are filled cost nothing
                rows = waiting.nonzero()[:, 0] if full else rows  # (R,)
                columns = everywhere[here][(ids[rows, here] == mask_id).any(dim=0)]  # (N,) or fewer
            if full:
                answer, where, wanted, padded = slice(0, G), everywhere, P + columns, real[rows].repeat(C, 1)  # (C R, P + G)
                cache = buffers if config.compile else [(k[: len(padded)], v[: len(padded)]) for k, v in buffers]
            else:
                answer, wanted = here if config.cache == "dual" else slice(here.start, G), columns - here.start
                where = everywhere[P:][answer]
            # Not part of the compiled call: compilers drop the rounding.
            x = rounded(lm.embed(ids[rows, answer]), rounds[rows]).repeat(C, 1, 1)  # (C R, M or G, D)
            x = torch.cat([context[:, rows].flatten(0, 1), x], dim=1) if full else x  # (C R, M, D)
            spot, gumbel, chance = (rows[:, None], columns), None, None  # (R, N) places in the answers
            inside = (rows[:, None], columns - here.start)  # and in the block
            if config.temperature > 0:
                # Gumbel-max in float64: in less, its tails are cut and diversity is lost (LLaDA's guide, arXiv 2409.02908).
                u = torch.rand(B, N, lm.config.vocab, generator=generator, dtype=torch.float64).to(device)[inside]
                gumbel = -config.temperature * (-u.log()).log()
            if config.remasking == "random":
                chance = torch.rand(B, N, generator=generator).to(device)[inside]
            ids[spot], confidence, keep = call(
                lm, x, ids[spot], padded, cache or None, where, wanted, config.rule, limits[turn], scale, gumbel, chance
            )  # fmt: skip
            kept[spot] = torch.where(keep, confidence, kept[spot])
            calls += waiting
            if config.stop_at_end:
                # The text of an item ends at its first end token; once no mask stands before that, nothing can change it.
                ended = ((ids == end_id) & ((ids == mask_id).cumsum(dim=1) == 0)).any(dim=1)  # (B,)
                ids.masked_fill_(ended[:, None] & (ids == mask_id), end_id)
            if trace:
                seen.append((ids.clone(), kept.clone()))
            if on_step:
                on_step(ids, kept)
    return Generation(ids, calls, ((ids == end_id).cumsum(dim=1) == 0).sum(dim=1), time.perf_counter() - started, seen)


def shown(tokenizer: Tokenizer, ids: list[int], mask_id: int, end_id: int) -> list[str]:
    """Text of each token for people: an underscore for a mask, nothing for the end."""
    return ["_" if token == mask_id else "" if token == end_id else tokenizer.decode([token]) for token in ids]


def write_trace(path: Path, question: str, rows: list[tuple[list[str], list[float]]]) -> None:
    """An HTML page with one row a step, each token on a green as strong as its confidence."""
    body = []
    for step, (texts, confidences) in enumerate(rows, 1):
        cell = '<td style="background:rgba(40,160,90,{1:.2f})" title="{1:.3f}">{0}</td>'
        cells = "".join(cell.format(html.escape(t), c) for t, c in zip(texts, confidences))
        body.append(f"<tr><th>{step}</th>{cells}</tr>")
    path.write_text(
        "<!doctype html><meta charset=utf-8><style>body{font:16px sans-serif}td{padding:4px 8px;min-width:1em}"
        f"th{{color:#888}}</style><h1>{html.escape(question)}</h1><p>One row a step; the greener, the surer.</p>"
        f"<table>{''.join(body)}</table>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a question about a sound file.")
    parser.add_argument("clip", help="WAV, FLAC, OGG or MP3; any rate; mono or stereo")
    parser.add_argument("question")
    add_model_arguments(parser, "runs/toy/stage2")
    parser.add_argument("--stage", choices=AUDIO_PARTS, help="what stands before the words' embeddings (default: what the adapters hold)")
    parser.add_argument("--length", type=int, default=24, help="tokens of the answer")
    parser.add_argument("--block-length", type=int, help="tokens of a block (default: the whole answer)")
    parser.add_argument("--steps", type=int, help="steps of the count rule (default: one a token)")
    parser.add_argument("--rule", default="threshold", choices=CHOICES["rule"])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--cfg-scale", type=float, default=0.0)
    parser.add_argument("--cache", default="none", choices=CHOICES["cache"])
    parser.add_argument("--compile", action="store_true", help="worth its minute for many answers only")
    parser.add_argument("--cut", action="store_true", help="hear only the beginning of a clip that is too long")
    parser.add_argument("--trace", type=Path, help="write the steps as an HTML page")
    args = parser.parse_args()
    try:
        config = SamplerConfig(
            args.length, args.length if args.block_length is None else args.block_length,
            args.length if args.steps is None else args.steps, args.rule, args.threshold, args.factor,
            args.temperature, cfg_scale=args.cfg_scale, cache=args.cache, compile=args.compile,
        )  # fmt: skip
        waveform = read_audio(args.clip)
        model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters, args.stage, **model_options(args)).eval()
        waveforms, lengths = pad_waveforms([waveform], model.encoder.config.n_samples, [args.clip], args.cut)
        with torch.inference_mode():
            audio, mask = model.hear(*model.encode(waveforms.to(args.device), lengths.to(args.device)))
            prompt = model.splice([build_prompt(model.tokenizer, args.question)], audio, mask)
        live, lm_config = sys.stdout.isatty(), model.lm.config

        def texts_of(ids: Tensor) -> list[str]:
            return shown(model.tokenizer, ids[0].tolist(), lm_config.mask_id, lm_config.end_id)

        def show(ids: Tensor, confidence: Tensor) -> None:
            print(f"\r\033[K{' '.join(texts_of(ids)).strip()}" if live else " ".join(texts_of(ids)).strip(), end="" if live else "\n", flush=True)
            time.sleep(0.15 if live else 0)  # slow enough to be watched

        result = generate(model.lm, prompt, config, show, trace=args.trace is not None)
    except (AudioError, ValueError) as error:
        raise SystemExit(f"sampler.py: {error}") from None
    print(("\r\033[K" if live else "") + decode_answer(model.tokenizer, result.ids[0].tolist()))
    print(f"({int(result.steps[0])} model calls for {args.length} positions, {int(result.text_tokens[0])} of them text)", file=sys.stderr)
    if args.trace:
        write_trace(args.trace, args.question, [(texts_of(ids), kept[0].tolist()) for ids, kept in result.trace])


if __name__ == "__main__":
    main()
