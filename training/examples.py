"""What a stage trains on: the items of a manifest that can be used, their prompts and answers.

Shapes: N items, G answer tokens.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from data import ManifestError, Prompt, build_prompt, encode_answers, is_too_long
from encoder import SAMPLE_RATE
from training import processes


@dataclass(frozen=True, kw_only=True)
class Examples:
    """N items, their prompts, and their answers (N, G); for stage 4 also the rejected answers."""

    items: list[dict]
    prompts: list[Prompt]
    answer_ids: Tensor
    rejected_ids: Tensor | None = None

    def first(self, n: int) -> "Examples":
        """The first n of them, at most."""
        return Examples(
            items=self.items[:n],
            prompts=self.prompts[:n],
            answer_ids=self.answer_ids[:n],
            rejected_ids=None if self.rejected_ids is None else self.rejected_ids[:n],
        )

    def digest(self) -> str:
        """A name for what trains: clips, instructions and answers."""
        rows = zip(self.items, self.answer_ids.tolist())
        known = [[item["audio_id"], item["input"], ids] for item, ids in rows]
        if self.rejected_ids is not None:
            known.append(self.rejected_ids.tolist())
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def check_rejected(items: list[dict], source, target: str, rejected: str) -> None:
    """Raise ManifestError that lists the items whose rejected answer is absent, or the target."""
    wrong = {}
    for i, item in enumerate(items):
        if not isinstance(item.get(rejected), str):
            wrong[i] = f"lacks {rejected}, the worse answer as text"
        elif item[rejected] == item[target]:
            wrong[i] = f"{rejected} equals {target}"
    if wrong:
        lines = [f"item {i} ({items[i]['audio_id']}): {text}" for i, text in wrong.items()]
        lines[10:] = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ManifestError(f"{source}: {len(wrong)} bad pairs\n  " + "\n  ".join(lines))


def without_bad(
    items: list[dict],
    source,
    answers: list[str],
    model,
    length: int,
    cut: bool,
    unusable: dict[str, Callable[[dict, object], bool]],
) -> list[dict]:
    """The items that can be used; arguments and errors as for `usable`.

    answers: the fields that hold answers.
    """
    # Every reason is counted, so that the user knows what to change.
    context = model.encoder.config.n_samples
    too_long = [not cut and is_too_long(item["duration"] * SAMPLE_RATE, context) for item in items]
    encode = model.tokenizer.encode_text
    too_wordy = [any(len(encode(item[name])) >= length for name in answers) for item in items]
    empty = [not all(item[name].strip() for name in answers) for item in items]

    others = {name: [is_bad(item, model) for item in items] for name, is_bad in unusable.items()}

    bad = [any(reasons) for reasons in zip(too_long, too_wordy, empty, *others.values())]
    if any(bad):
        counts = (
            f"{source}: of {len(items)} items, {sum(too_long)} last longer than the encoder's "
            f"{context / SAMPLE_RATE:.2f} s, {sum(too_wordy)} have answers of {length} tokens or "
            f"more and {sum(empty)} have none"
        )
        counts += "".join(f"; {sum(reasons)} {name}" for name, reasons in others.items())
        if all(bad):
            advice = "pass --cut or another --answer-length, or choose another manifest or models"
            raise ManifestError(f"{counts}: no item is left; {advice}")
        if processes.rank() == 0:
            tqdm.write(f"{counts}; they are left out")
    return [item for item, is_bad in zip(items, bad) if not is_bad]


def usable(
    items: list[dict],
    source,
    target: str,
    model,
    length: int,
    cut: bool = False,
    rejected: str | None = None,
    unusable: dict[str, Callable[[dict, object], bool]] | None = None,
) -> Examples:
    """The items whose clip fits the encoder's window, whose answer fits `length` tokens, and to
    which no other reason applies.

    Args:
        items: of the manifest `source`; their field `target` holds the answer. model: a DIFFA.
        cut: longer clips are usable. rejected: the field of the worse answer, in stage 4.
        unusable: more reasons to leave an item out, see Stage.
    Raises:
        ManifestError: no item is left (the message counts why), or pairs of answers are none.
        ValueError: a prompt and an answer exceed the LM's context.
    """
    answers = [target]
    if rejected:
        check_rejected(items, source, target, rejected)
        answers.append(rejected)
    items = without_bad(items, source, answers, model, length, cut, unusable or {})

    # Few instructions serve many items.
    instructions = {item["input"] for item in items}
    prompts = {text: build_prompt(model.tokenizer, text) for text in instructions}
    longest = max(len(p.before) + len(p.after) for p in prompts.values()) + length
    most = model.lm.config.max_length
    if longest > most:
        raise ValueError(
            f"a prompt and answer of {longest} tokens exceed the LM's context of {most}"
        )

    # A row of ids for each answer.
    ids = [
        encode_answers(model.tokenizer, [item[name] for item in items], length) for name in answers
    ]
    return Examples(
        items=items,
        prompts=[prompts[item["input"]] for item in items],
        answer_ids=ids[0],
        rejected_ids=ids[1] if rejected else None,
    )
