"""What a stage trains on: the items of a manifest that can be used, their prompts and answers.

Shapes: N items, G answer tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data import ManifestError, Prompt, build_prompt, encode_answers, is_too_long
from encoder import SAMPLE_RATE
from training import processes


@dataclass(frozen=True, kw_only=True)
class Examples:
    """N items with all that a loss needs to know of them."""

    items: list[dict]
    prompts: list[Prompt]
    answer_ids: Tensor  # (N, G)

    def first(self, n: int) -> "Examples":
        """The first n of them, at most."""
        return Examples(
            items=self.items[:n], prompts=self.prompts[:n], answer_ids=self.answer_ids[:n]
        )

    @property
    def digest(self) -> str:
        """A name for what trains: clips, instructions and answers."""
        known = [
            [item["audio_id"], item["input"], ids]
            for item, ids in zip(self.items, self.answer_ids.tolist(), strict=True)
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def usable(items: list[dict], target: str, model, length: int, source: Path) -> Examples:
    """The items whose clip fits the encoder's window, and whose answer fits `length` tokens.

    Args:
        items: of the manifest `source`; their field `target` is the answer. model: a DIFFA.
    Raises:
        ManifestError: no item is left; the message counts why. ValueError: a prompt and an answer
        exceed the LM's context.
    """
    context = model.encoder.config.n_samples
    kept = []
    n_long = 0
    n_wordy = 0
    n_empty = 0
    for item in items:
        is_long = is_too_long(item["duration"] * SAMPLE_RATE, context)
        is_wordy = len(model.tokenizer.encode(item[target])) >= length
        is_empty = not item[target].strip()
        if not (is_long or is_wordy or is_empty):
            kept.append(item)

        n_long += is_long
        n_wordy += is_wordy
        n_empty += is_empty

    if len(kept) < len(items):
        counts = (
            f"{source}: of {len(items)} items, {n_long} last longer than the encoder's "
            f"{context / SAMPLE_RATE:.2f} s, {n_wordy} have answers of {length} tokens or more "
            f"and {n_empty} have none"
        )
        if not kept:
            advice = "cut the clips, or choose another manifest, encoder or answer length"
            raise ManifestError(f"{counts}: no item is left; {advice}")
        if processes.rank() == 0:
            tqdm.write(f"{counts}; they are left out")

    answer_ids = encode_answers(model.tokenizer, [item[target] for item in kept], length)
    prompts = prompts_of(kept, model, length)
    return Examples(items=kept, prompts=prompts, answer_ids=answer_ids)


def prompts_of(items: list[dict], model, length: int) -> list[Prompt]:
    """The prompts of items. Raises ValueError: one and an answer exceed the LM's context."""
    instructions = {item["input"] for item in items}
    prompts = {text: build_prompt(model.tokenizer, text) for text in instructions}

    longest = max(len(p.before) + len(p.after) for p in prompts.values()) + length
    if longest > model.lm.config.max_length:
        raise ValueError(
            f"a prompt and answer of {longest} tokens exceed the LM's context of "
            f"{model.lm.config.max_length}"
        )
    return [prompts[item["input"]] for item in items]
