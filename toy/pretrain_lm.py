"""The stand-in LM: it learns to answer about a clip from text that imitates the clip's audio.

First next tokens with a CausalLM, which learns to copy by far the fastest. Then the same weights
continue as a DiffusionLM with the masked-diffusion loss. Extra rounds follow while it lacks a kind
of question. Whatever text it learns from, this is the one loop: the toy's here, that of recorded
prompts in lab/human_text.py. The baseline of lab/baseline.py shares its batches.

Shapes: B batch, P prompt positions, G answer tokens, D LM width.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from checkpoints.lm import save_lm
from checkpoints.tokenizer import MASK, Tokenizer
from data import TEXT_END, Prompt, encode_answers
from diffa import Spliced
from diffusion_lm import SIZES, DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from evaluation.wer import word_error_rate
from sampler import Generation, SamplerConfig, answer, generate
from toy import grammar
from toy.autoregressive import CausalLM, next_token_loss
from toy.imitation import (
    GAP,
    ImitationBatch,
    ImitationItem,
    blurred_embeddings,
    draw_question,
    pad_items,
)
from train_asr import RECIPES
from training.loop import fit
from training.optimizers import TrainConfig

NEXT_TOKEN = TrainConfig(steps=500, batch=32, lr=2e-3, warmup=50, optimizer="muon")
DIFFUSION = TrainConfig(steps=800, batch=32, lr=2e-3, warmup=50, optimizer="muon")

# An extra round, and the most of them. A higher learning rate fixes the weak question kinds but
# forgets others.
MORE = TrainConfig(steps=200, batch=32, lr=5e-4, warmup=30, optimizer="muon")
ROUNDS = 3
WANTED = 0.5  # fraction of an extra round's questions that are of the kinds the LM lacks

# Least noise level. With few masks, the rest of the answer gives a word away and the LM learns to
# ignore the prompt.
T_MIN = 0.3
BLUR = 0.7  # largest fraction of a word's embedding that comes from other words

# What the LM must reach, in percent: copy error at most, accuracy on each question at least. No
# adapter can repair what the LM cannot read.
AIM = {"copy_error": 1.0, "oracle": 99.0}  # the LM trains on until it gets there
GATE = {"copy_error": 3.0, "oracle": 98.0}  # below it, no adapter is trained on the LM
N_CHECK = 200  # unseen prompts for each of these figures

ANSWER_LENGTH = RECIPES["toy"].answer_length  # tokens, G
THRESHOLD = SamplerConfig(length=ANSWER_LENGTH, rule="threshold", threshold=0.9)

Decode = Callable[[DiffusionLM, Spliced, SamplerConfig], Generation]  # sampler.generate or greedy


# ---- what an LM learns from
class TextSource(Protocol):
    """Questions over text that imitates audio, and an exam on what the LM has learned."""

    tokenizer: Tokenizer
    blur: float  # largest fraction of a word's embedding that comes from other words

    def draw(
        self, rng: random.Random, n: int, stretched: bool, wanted: Sequence[str]
    ) -> list[ImitationItem]:
        """Draw n training questions; in an extra round, more of the kinds that are `wanted`."""

    def examine(self, lm: DiffusionLM, decode: Decode = generate) -> dict:
        """Percentages on unseen text: `copy_error`, and `oracle` for each kind of question."""


@dataclass(frozen=True)
class GrammarText:
    """The toy's text source: every kind of question about sentences of the grammar."""

    tokenizer: Tokenizer
    seed: int
    blur: float = BLUR

    def draw(
        self, rng: random.Random, n: int, stretched: bool, wanted: Sequence[str]
    ) -> list[ImitationItem]:
        """Draw n questions; of kinds `wanted`, if any, a fraction WANTED of them."""
        kinds = [rng.choice(wanted) if wanted and rng.random() < WANTED else None for _ in range(n)]
        return [
            draw_question(self.tokenizer, rng, held_out=False, stretched=stretched, kind=kind)
            for kind in kinds
        ]

    def examine(self, lm: DiffusionLM, decode: Decode = generate) -> dict:
        """WER of quoting a sentence, and accuracy on each kind of question; held-out sentences."""
        rng = random.Random(self.seed)

        def pairs(kind: str, stretched: bool) -> tuple[list[str], list[str]]:
            items = [
                draw_question(self.tokenizer, rng, held_out=True, stretched=stretched, kind=kind)
                for _ in range(N_CHECK)
            ]
            predictions = answer_text(lm, self.tokenizer, items, decode)
            return predictions, [item.answer for item in items]

        kinds = (*grammar.ATTRIBUTES, *grammar.SLOTS, "count")
        return {
            "copy_error": word_error_rate(*pairs("transcribe", False)),
            "copy_error_stretched": word_error_rate(*pairs("transcribe", True)),
            "oracle": {kind: accuracy(*pairs(kind, True)) for kind in kinds},
            "items": N_CHECK,
        }


def answer_text(
    lm: DiffusionLM, tokenizer: Tokenizer, items: list[ImitationItem], decode: Decode = generate
) -> list[str]:
    """The LM's answers to questions over text that imitates audio."""
    prompts = [
        Prompt(before=item.prompt.before + item.audio_ids, after=item.prompt.after)
        for item in items
    ]
    answers = answer(lm, tokenizer, prompts, None, THRESHOLD, batch=100, decode=decode)
    return [a.text for a in answers]


def accuracy(predictions: list[str], targets: list[str]) -> float:
    """Percent of predictions that equal their targets."""
    return 100 * sum(p == t for p, t in zip(predictions, targets)) / len(targets)


def lacking(bar: dict, result: dict) -> dict[str, str]:
    """The kinds of question on which an exam's result misses a bar, such as AIM; and how much."""
    missed = {
        kind: f"{kind} answered {percent:.1f} %"
        for kind, percent in result.get("oracle", {}).items()
        if percent < bar["oracle"]
    }
    if result["copy_error"] > bar["copy_error"]:
        missed["transcribe"] = f"copy error {result['copy_error']:.1f} %"
    return missed


def short_of(bar: dict, result: dict) -> str:
    """The same in words; empty when the result passes."""
    return ", ".join(lacking(bar, result).values())


# ---- training
def lm_config(tokenizer: Tokenizer) -> LMConfig:
    """The toy's shapes with a tokenizer's vocabulary and special ids."""
    return replace(
        SIZES["toy"],
        vocab=tokenizer.size,
        mask_id=tokenizer.id(MASK),
        end_id=tokenizer.id(TEXT_END),
    )


def new_lm(lm_class: type[DiffusionLM], config: LMConfig, seed: int, device: str) -> DiffusionLM:
    """An untrained LM; a seed always gives the same weights, whatever the class."""
    torch.manual_seed(seed)
    lm = lm_class(config)
    nn.init.normal_(lm.embedding.weight, std=0.2)
    return lm.to(device)


def phases(seed: int, longer: int = 1) -> list[TrainConfig]:
    """What an LM goes through at most: next tokens, masked diffusion, the extra rounds.

    Args:
        longer: multiplies the steps of the first two, for text that is harder than the toy's.
    """
    first = replace(NEXT_TOKEN, steps=longer * NEXT_TOKEN.steps, seed=seed)
    second = replace(DIFFUSION, steps=longer * DIFFUSION.steps, seed=seed + 1000)
    return [first, second, *(replace(MORE, seed=seed + 2000 + n) for n in range(ROUNDS))]


def draw_batch(
    lm: DiffusionLM, text: TextSource, config: TrainConfig, step: int, wanted: Sequence[str]
) -> tuple[ImitationBatch, Tensor]:
    """Prompts and answers (B, G) of a phase's step; they follow from its seed and the step."""
    # Plain and stretched prompts take turns: a batch of one sort is padded less.
    rng = random.Random(f"{config.seed} {step}")
    items = text.draw(rng, config.batch, step % 2 == 1, wanted)

    device = lm.embedding.weight.device
    texts = [item.answer for item in items]
    answers = encode_answers(text.tokenizer, texts, ANSWER_LENGTH)  # (B, G)
    return pad_items(items, device), answers.to(device)


def next_token_text_loss(
    lm: CausalLM,
    text: TextSource,
    config: TrainConfig,
    step: int,
    generator: torch.Generator,
    wanted: Sequence[str] = (),
    blurred: bool = False,
) -> Tensor:
    """Next-token loss of a phase's step, on clean embeddings or on blurred ones; a scalar."""
    prompts, answers = draw_batch(lm, text, config, step, wanted)
    gap_id = text.tokenizer.id(GAP)
    if blurred:
        embeddings = blurred_embeddings(lm, prompts, gap_id, text.blur, generator)  # (B, P, D)
    else:
        embeddings = lm.embed(prompts.ids)

    return next_token_loss(lm, embeddings, prompts.mask, answers, answers.numel())


def masked_text_loss(
    lm: DiffusionLM,
    text: TextSource,
    config: TrainConfig,
    step: int,
    generator: torch.Generator,
    wanted: Sequence[str] = (),
) -> Tensor:
    """Masked-diffusion loss of a phase's step, on blurred embeddings; a scalar."""
    prompts, answers = draw_batch(lm, text, config, step, wanted)
    gap_id = text.tokenizer.id(GAP)
    embeddings = blurred_embeddings(lm, prompts, gap_id, text.blur, generator)  # (B, P, D)

    t = noise_levels(len(answers), generator, t_min=T_MIN, stratified=True)  # (B,)
    noisy = noise(answers, t, lm.config.mask_id, generator)  # (B, G)
    return diffusion_loss(lm, embeddings, prompts.mask, answers, noisy, t, answers.numel())


def pretrain_lm(
    text: TextSource,
    out: Path,
    training: list[TrainConfig],
    device: str,
    *,
    title: str = "LM",
    identity: dict | None = None,
) -> dict:
    """Train an LM on a text source and save it to OUT/llada, beside its tokenizer.

    Args:
        out: its checkpoints go to OUT/checkpoints. training: as `phases` gives it.
        title: of the progress bars. identity: what else must be the same when a run resumes.
    Returns:
        the last result of the text's exam, with "steps", "losses" of all steps, and "asked": the
        kinds of question that each extra round had more of.
    Raises:
        ValueError: the checkpoints are of a run with other settings, or all damaged.
    """
    first, second, *extra = training

    def train(lm, loss, config, wanted, name, what) -> list[float]:
        loss_of_step = functools.partial(loss, lm, text, config, wanted=wanted)
        path = out / "checkpoints" / f"{name}.pt"
        parameters = dict(lm.named_parameters())
        return fit(parameters, loss_of_step, config, path, f"{title}, {what}", identity=identity)

    # 1. Next tokens.
    causal = new_lm(CausalLM, lm_config(text.tokenizer), first.seed, device)
    losses = train(causal, next_token_text_loss, first, [], "next_token", "next token")

    # 2. Masked diffusion, from the same weights.
    lm = DiffusionLM(causal.config).to(device)
    lm.load_state_dict(causal.state_dict())
    losses += train(lm, masked_text_loss, second, [], "lm", "diffusion")
    result = text.examine(lm)

    # 3. More, while something is lacking. The switch to masks can cost a kind of question that the
    # next-token LM knew, and chance alone brings it back late.
    asked = []
    for n, third in enumerate(extra, 1):
        wanted = list(lacking(AIM, result))
        if not wanted:
            break
        asked.append(wanted)
        what = f"diffusion, more of {', '.join(wanted)}"
        losses += train(lm, masked_text_loss, third, wanted, f"lm_more{n}", what)
        result = text.examine(lm)

    save_lm(lm, out / "llada")
    return result | {"steps": len(losses), "asked": asked, "losses": losses}
