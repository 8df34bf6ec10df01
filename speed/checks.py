"""What the sampler refuses: impossible settings, prompts that are too long, damaged weights."""

import math

from torch import Tensor

from diffa import Spliced
from diffusion_lm import DiffusionLM

CHOICES = {
    "rule": ("count", "threshold", "factor", "frechet"),
    "remasking": ("low_confidence", "random"),
    "cache": ("none", "prefix", "dual"),
}
RANGES = {  # smallest and largest; larger numbers would overflow
    "length": (1, 2**20),
    "block_length": (1, 2**20),
    "threshold": (1e-9, 1),
    "factor": (1e-9, 1000),
    "frechet": (0, 1),
    "refresh": (1, 2**20),
    "deliberate": (0, 1),
    "temperature": (0, 100),
    "cfg_scale": (0, 100),
    "seed": (0, 2**64 - 1),
}
NOT_WHOLE = (
    "deliberate needs an answer that is whole from the start: leave out deliberate, or leave out "
    "append, --length auto and second_call, or take an LM that does not append its blocks"
)


def check_settings(config) -> None:
    """Raise ValueError: a setting of a SamplerConfig is impossible. The message says what works."""
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} {getattr(config, name)!r} is none of {', '.join(known)}")

    if config.last_candidate and config.rule != "factor":
        raise ValueError(f"last_candidate does nothing under rule {config.rule}; use factor")

    # NaN is in no range.
    for name, (least, most) in RANGES.items():
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"{name} {getattr(config, name)} is outside {least} to {most}")

    if config.refresh > 1 and config.cache == "none":
        raise ValueError(f"refresh {config.refresh} does nothing without a cache; use dual, prefix")

    if config.deliberate > 0 and (config.append or config.second_call):
        raise ValueError(NOT_WHOLE)

    # A block takes one step or more, a step commits one token or more.
    n_blocks = math.ceil(config.length / config.block_length)
    if not n_blocks <= config.steps <= config.length:
        steps = f"{config.steps} steps for {n_blocks} blocks and {config.length} tokens"
        raise ValueError(f"{steps}; use {n_blocks} to {config.length}")


def check_prompt(lm: DiffusionLM, prompt: Spliced, config) -> None:
    """Raise ValueError: prompt and answer exceed the context, guidance has no text to mask, or an
    LM that appends its blocks is to deliberate.
    """
    if config.deliberate > 0 and config.append is None and lm.config.appends:
        raise ValueError(NOT_WHOLE)
    longest = int(prompt.mask.sum(dim=1).max()) if prompt.mask.numel() else 0
    room = lm.config.max_length - longest
    if config.length > room:
        both = f"prompt of {longest} positions and answer of {config.length}"
        advice = f"ask a shorter question, or for an answer of at most {max(room, 0)}"
        raise ValueError(f"{both} exceed the LM's context of {lm.config.max_length}; {advice}")
    if config.cfg_scale > 0 and not (prompt.is_text & prompt.mask).any(dim=1).all():
        raise ValueError("guidance masks the prompt's text, and a prompt has none; use cfg_scale 0")


def check_finite(lm: DiffusionLM, numbers: Tensor) -> None:
    """Raise ValueError: some of these confidences or logits are NaN or infinite."""
    if not numbers.isfinite().all():
        raise ValueError(
            f"the LM's logits are NaN or infinite in {lm.embedding.weight.dtype}. Use --dtype "
            "float32 or bfloat16, since numbers above 65,504 overflow in float16; if that does not "
            "help, weights are damaged: download or train them again"
        )
