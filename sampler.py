"""Masks become words, the most certain first.

The answer starts as `length` masks after the prompt. At each call of the model every masked position of the current
block proposes its likeliest token; a *rule* says which proposals are certain enough to stay (LLaDA, section 2.4):
  count      a fixed number a step, the most confident first (the published sampler)
  threshold  all with confidence above `threshold`, one at the least (Fast-dLLM, arXiv 2505.22618)
  factor     the longest prefix, sorted by confidence, in which the n-th has at least 1 - factor / (n + 1) (the same)

    python sampler.py CLIP "QUESTION"                       answers, denoising live
    python sampler.py CLIP "QUESTION" --trace out.html      and writes a page, a row for each step

Shapes: B batch, P prompt positions, G answer tokens, N block length, V vocabulary.
"""

import argparse
import html
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data import AudioError, Tokenizer, build_prompt, decode_answer, pad_waveforms, read_audio
from diffa import DIFFA, Spliced, add_model_arguments, model_options
from diffusion_lm import DiffusionLM


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

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length {self.length} holds no answer; use 1 or more")
        if self.block_length < 1 or self.length % self.block_length:
            divisors = [n for n in range(1, self.length + 1) if self.length % n == 0]
            raise ValueError(f"length {self.length} does not divide into blocks of {self.block_length}; use one of {divisors}")
        n_blocks = self.length // self.block_length
        if self.rule == "count" and not n_blocks <= self.steps <= self.length:
            raise ValueError(f"{self.steps} steps for {n_blocks} blocks and {self.length} tokens; use {n_blocks} to {self.length}")
        if self.rule not in ("count", "threshold", "factor"):
            raise ValueError(f"rule {self.rule!r} is none of count, threshold, factor")
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking {self.remasking!r} is neither low_confidence nor random")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} is outside (0, 1]; 0.9 is usual")
        if self.temperature < 0 or self.cfg_scale < 0 or self.factor <= 0:
            raise ValueError("temperature and cfg_scale must be 0 or more, factor more than 0")


@dataclass
class Generation:
    """What came out: ids (B, G), model calls each item took (B,), seconds for all."""

    ids: Tensor
    steps: Tensor
    seconds: float
    trace: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # after each step: ids (B, G), confidence (B, G)


def shares(total: int, parts: int) -> list[int]:
    """total divided into parts as evenly as integers allow, larger shares first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def propose(logits: Tensor, mask_id: int, config: SamplerConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The likeliest token at each position and its confidence, from logits (B, N, V): tokens and confidence (B, N).

    The confidence is the softmax probability, exp(logit - logsumexp) in float32, without a softmax tensor.
    [MASK] itself is never proposed.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1)  # (B, N)
    allowed = logits.clone()
    allowed[..., mask_id] = -torch.inf
    if config.temperature > 0:
        # Gumbel-max in float64: in less, its tails are cut and diversity is lost (LLaDA's guide, arXiv 2409.02908).
        u = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
        tokens = (allowed.double() - config.temperature * (-u.log()).log()).argmax(dim=-1)  # (B, N)
    else:
        tokens = allowed.argmax(dim=-1)
    confidence = (logits.gather(-1, tokens[..., None])[..., 0] - total).exp()
    if config.remasking == "random":
        confidence = torch.rand(confidence.shape, generator=generator).to(confidence)
    return tokens, confidence


def commit(confidence: Tensor, masked: Tensor, config: SamplerConfig, count: int) -> Tensor:
    """Which proposals stay, (B, N) bool: at least one in each row that has a mask, and never an unmasked position.

    Args:
        confidence (B, N); masked (B, N), true where a mask waits; count: of this step, for the count rule.
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    order = confidence.argsort(dim=-1, descending=True, stable=True)  # (B, N) positions by confidence
    rank = order.argsort(dim=-1)  # (B, N) of each position
    if config.rule == "count":
        keep = rank < count
    elif config.rule == "threshold":
        keep = confidence > config.threshold
    else:
        n = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        passes = confidence.gather(1, order) >= 1 - config.factor / (n + 1)  # (B, N), sorted
        keep = rank < passes.cumprod(dim=-1).sum(dim=-1, keepdim=True)
    return (keep | (rank == 0)) & masked


@torch.inference_mode()
def generate(
    lm: DiffusionLM, prompt: Spliced, config: SamplerConfig, on_step: Callable[[Tensor, Tensor], None] | None = None, trace: bool = False
) -> Generation:
    """Fill in answers to a batch of spliced prompts; the one loop of every rule.

    Args:
        on_step: called after each step with ids (B, G) and the confidence (B, G) that each token had when committed.
        trace: keep those of every step in the result.
    Raises:
        ValueError: the prompt with its answer is longer than the LM's context.
    """
    started = time.perf_counter()
    B, P, _ = prompt.embeddings.shape
    G, N, device, mask_id = config.length, config.block_length, prompt.embeddings.device, lm.config.mask_id
    if P + G > lm.config.max_length:
        raise ValueError(
            f"prompt of {P} positions and answer of {G} exceed the LM's context of {lm.config.max_length}; "
            f"ask a shorter question, or for an answer of at most {max(lm.config.max_length - P, 0)}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.full((B, G), mask_id, device=device)
    kept = torch.zeros(B, G, device=device)  # confidence at commitment
    calls = torch.zeros(B, dtype=torch.long, device=device)
    real = torch.cat([prompt.mask, torch.ones(B, G, dtype=torch.bool, device=device)], dim=1)  # (B, P + G)
    context, guided = prompt.embeddings, config.cfg_scale > 0
    if guided:
        # Quirk of the release: the unconditional pass masks the prompt's text but keeps the sound.
        blank = lm.embed(torch.tensor(mask_id, device=device))  # (D,)
        context = torch.cat([context, torch.where(prompt.is_text[..., None], blank, context)])  # (2 B, P, D)
        real = torch.cat([real, real])
    # Quirk of the release: beside sound, every embedding passes through bfloat16, whatever the LM's dtype; near ties in
    # confidence, and so the golden ids, hang on it. Text-only prompts are not rounded.
    rounds = bool((prompt.mask & ~prompt.is_text).any())
    context = context.bfloat16().to(context.dtype) if rounds else context
    result = Generation(ids, calls, 0.0)
    for block, n_steps in enumerate(shares(config.steps, G // N)):
        here = slice(block * N, (block + 1) * N)
        counts = shares(N, n_steps) if config.rule == "count" else []
        while bool((masked := ids[:, here] == mask_id).any()):
            answer = lm.embed(ids)  # (B, G, D)
            answer = answer.bfloat16().to(answer.dtype) if rounds else answer
            x = torch.cat([context, torch.cat([answer, answer]) if guided else answer], dim=1)
            hidden = lm(x, real)[:, P + here.start : P + here.stop]  # (B, N, D): the current block only
            logits = lm.head(hidden)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + (config.cfg_scale + 1) * (conditional - unconditional)
            tokens, confidence = propose(logits, mask_id, config, generator)
            keep = commit(confidence, masked, config, counts.pop(0) if counts else 1)
            ids[:, here] = torch.where(keep, tokens, ids[:, here])
            kept[:, here] = torch.where(keep, confidence, kept[:, here])
            calls += masked.any(dim=1)
            if trace:
                result.trace.append((ids.clone(), kept.clone()))
            if on_step:
                on_step(ids, kept)
    result.seconds = time.perf_counter() - started
    return result


def shown(tokenizer: Tokenizer, ids: list[int], mask_id: int, end_id: int) -> list[str]:
    """Text of each token for people: an underscore for a mask, nothing for the end."""
    texts = []
    for i, token in enumerate(ids):
        text = tokenizer.decode([token]) if token not in (mask_id, end_id) else ""
        texts.append("_" if token == mask_id else "" if token == end_id else text)
    return texts


def write_trace(path: Path, question: str, rows: list[tuple[list[str], list[float]]]) -> None:
    """An HTML page with one row a step, each token on a green as strong as its confidence."""
    body = []
    for step, (texts, confidences) in enumerate(rows, 1):
        cells = "".join(
            f'<td style="background:rgba(40,160,90,{c:.2f})" title="{c:.3f}">{html.escape(t)}</td>' for t, c in zip(texts, confidences)
        )
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
    parser.add_argument("--length", type=int, default=24, help="tokens of the answer")
    parser.add_argument("--block-length", type=int, help="tokens of a block (default: the whole answer)")
    parser.add_argument("--steps", type=int, help="steps of the count rule (default: one a token)")
    parser.add_argument("--rule", default="threshold", choices=["count", "threshold", "factor"])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--cfg-scale", type=float, default=0.0)
    parser.add_argument("--cut", action="store_true", help="hear only the beginning of a clip that is too long")
    parser.add_argument("--trace", type=Path, help="write the steps as an HTML page")
    args = parser.parse_args()
    try:
        config = SamplerConfig(
            args.length, args.length if args.block_length is None else args.block_length,
            args.length if args.steps is None else args.steps, args.rule, args.threshold,
            temperature=args.temperature, cfg_scale=args.cfg_scale,
        )  # fmt: skip
        waveform = read_audio(args.clip)
        model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters, **model_options(args)).eval()
        n_samples = model.encoder.config.n_samples
        waveforms, lengths = pad_waveforms([waveform], n_samples, [args.clip], args.cut)
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
    print(f"({int(result.steps[0])} model calls for {args.length} positions)", file=sys.stderr)
    if args.trace:
        write_trace(args.trace, args.question, [(texts_of(ids), kept[0].tolist()) for ids, kept in result.trace])


if __name__ == "__main__":
    main()
