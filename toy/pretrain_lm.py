"""The stand-in LM: it learns to answer about a clip from text that imitates the clip's audio.

First next tokens with a CausalLM, which learns to copy by far the fastest. Then the same weights
continue as a DiffusionLM with the masked-diffusion loss. Extra rounds follow while it lacks a kind
of question. The baseline of lab/baseline.py shares its batches.

Shapes: B batch, P prompt positions, G answer tokens, D LM width.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.chats import MASK
from checkpoints.lm import save_lm
from checkpoints.sizes import LM_SIZES
from checkpoints.tokenizer import Tokenizer
from data import TEXT_END, Prompt, encode_answers
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from evaluation.wer import word_error_rate
from sampler import Generation, SamplerConfig, answer, generate
from toy import grammar
from toy.autoregressive import CausalLM, next_token_loss
from toy.imitation import GAP, draw_question
from train_asr import RECIPES
from training.imitation import ImitationItem, blurred_embeddings, pad_items
from training.loop import fit
from training.optimizers import TrainConfig
from training.run_files import minutes_of

NEXT_TOKEN = TrainConfig(steps=300, batch=32, lr=4e-3, warmup=50, optimizer="muon")
DIFFUSION = replace(NEXT_TOKEN, steps=1000)

# An extra round, and how many there may be. A higher learning rate fixes the weak question kinds
# but forgets others.
MORE = replace(NEXT_TOKEN, steps=100, lr=1e-3, warmup=30)
ROUNDS = 3

# Fraction of an extra round's questions that are of the kinds the LM lacks.
WANTED = 0.5

# Batches of questions that are drawn together and sorted by length, so that little is padded.
POOL = 4

# Least noise level. With few masks, the rest of the answer gives a word away and the LM learns to
# ignore the prompt.
MIN_NOISE = 0.5

# What the LM must reach, in percent: copy error at most, accuracy on each question at least. No
# adapter can repair what the LM cannot read. It trains until it reaches the aim; below the gate, no
# adapter is trained on it.
AIM = {"copy_error": 1.0, "oracle": 98.5}
GATE = {"copy_error": 3.0, "oracle": 98.0}

# Unseen prompts for each of these figures.
N_CHECK = 200

ANSWER_LENGTH = RECIPES["toy"].answer_length  # tokens, G
THRESHOLD = SamplerConfig(length=ANSWER_LENGTH, rule="threshold", threshold=0.9)

Decode = Callable[..., Generation]  # sampler.generate, or toy.autoregressive.greedy


# ---- what an LM learns from
@dataclass(frozen=True)
class GrammarText:
    """Questions over text that imitates audio: every kind about sentences of the grammar.

    blur: largest fraction of a word's embedding that comes from other words.
    """

    tokenizer: Tokenizer
    seed: int
    blur: float = 0.7

    def draw(
        self, rng: random.Random, n: int, stretched: bool, wanted: Sequence[str]
    ) -> list[ImitationItem]:
        """Draw n training questions; a fraction WANTED of kinds `wanted`, if any."""
        kinds = [rng.choice(wanted) if wanted and rng.random() < WANTED else None for _ in range(n)]
        options = {"held_out": False, "stretched": stretched}
        return [draw_question(self.tokenizer, rng, kind=kind, **options) for kind in kinds]

    def examine(self, lm: DiffusionLM, decode: Decode = generate) -> dict:
        """Percentages on held-out sentences: `copy_error`, a WER, and `oracle`, accuracy by kind of
        question.
        """
        rng = random.Random(self.seed)

        def pairs(kind: str, stretched: bool = True) -> tuple[list[str], list[str]]:
            options = {"held_out": True, "stretched": stretched, "kind": kind}
            items = [draw_question(self.tokenizer, rng, **options) for _ in range(N_CHECK)]
            predictions = answer_text(lm, self.tokenizer, items, decode)
            return predictions, [item.answer for item in items]

        kinds = (*grammar.ATTRIBUTES, *grammar.SLOTS, "count")
        return {
            "copy_error": word_error_rate(*pairs("transcribe", stretched=False)),
            "copy_error_stretched": word_error_rate(*pairs("transcribe")),
            "oracle": {kind: accuracy(*pairs(kind)) for kind in kinds},
            "items": N_CHECK,
        }


def answer_text(
    lm: DiffusionLM, tokenizer: Tokenizer, items: list[ImitationItem], decode: Decode = generate
) -> list[str]:
    """The LM's answers to questions over text that imitates audio."""
    prompts = [Prompt(item.prompt.before + item.audio_ids, item.prompt.after) for item in items]
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
def new_lm(lm_class: type[DiffusionLM], config: LMConfig, seed: int, device: str) -> DiffusionLM:
    """An untrained LM; a seed always gives the same weights, whatever the class."""
    torch.manual_seed(seed)
    lm = lm_class(config)
    nn.init.normal_(lm.embedding.weight, std=0.2)
    return lm.to(device)


def phases(seed: int) -> list[TrainConfig]:
    """What an LM goes through at most: next tokens, masked diffusion, the extra rounds."""
    first = replace(NEXT_TOKEN, seed=seed)
    second = replace(DIFFUSION, seed=seed + 1000)
    return [first, second, *(replace(MORE, seed=seed + 2000 + n) for n in range(ROUNDS))]


@functools.lru_cache(maxsize=2)
def pool_of_questions(
    text: GrammarText, seed: int, batch: int, pool: int, stretched: bool, wanted: tuple[str, ...]
) -> list[list[ImitationItem]]:
    """POOL batches of questions, each of prompts of similar length; the batches in any order."""
    rng = random.Random(f"{seed} {pool} {stretched}")
    items = text.draw(rng, POOL * batch, stretched, wanted)
    items.sort(key=lambda item: len(item.prompt.before + item.audio_ids + item.prompt.after))
    batches = [items[i : i + batch] for i in range(0, len(items), batch)]
    rng.shuffle(batches)
    return batches


def text_loss(
    lm: DiffusionLM,
    text: GrammarText,
    config: TrainConfig,
    step: int,
    generator: torch.Generator,
    wanted: Sequence[str] = (),
    blurred: bool = True,
) -> Tensor:
    """Loss of a phase's step: of next tokens if the LM is causal, else of masked diffusion.

    Args:
        wanted: kinds of question to draw more often. blurred: blur the words' embeddings.
    """
    # The questions follow from the phase's seed and the step. Plain and stretched prompts take
    # turns: a batch of one sort is padded less. POOL batches of each sort are drawn together.
    pool, turn = divmod(step, 2 * POOL)
    drawn = (text, config.seed, config.batch, pool, step % 2 == 1, tuple(wanted))
    items = pool_of_questions(*drawn)[turn // 2]
    device = lm.embedding.weight.device
    ids, mask, is_audio = pad_items(items, device)  # (B, P)
    answers = [item.answer for item in items]
    answer_ids = encode_answers(text.tokenizer, answers, ANSWER_LENGTH).to(device)  # (B, G)

    # What stands in the place of the audio.
    if blurred:
        gap_id = text.tokenizer.id(GAP)
        embeddings = blurred_embeddings(lm, ids, is_audio, gap_id, text.blur, generator)
    else:
        embeddings = lm.embed(ids)  # (B, P, D)

    n_tokens = answer_ids.numel()
    if isinstance(lm, CausalLM):
        return next_token_loss(lm, embeddings, mask, answer_ids, n_tokens)

    t = noise_levels(len(items), generator, MIN_NOISE, stratified=True)  # (B,)
    noisy_ids = noise(answer_ids, t, lm.config.mask_id, generator)  # (B, G)
    return diffusion_loss(lm, embeddings, mask, answer_ids, noisy_ids, t, n_tokens)


def pretrain_lm(
    text: GrammarText,
    out: Path,
    training: list[TrainConfig],
    device: str,
) -> dict:
    """Train an LM on a text source and save it to OUT/llada, beside its tokenizer.

    Args:
        out: its checkpoints go to OUT/checkpoints. training: as `phases` gives it.
    Returns:
        the last result of the text's exam, with "steps", "losses" of all steps, "minutes" of
        training, and "asked": the kinds of question that each extra round had more of.
    Raises:
        ValueError: the checkpoints are of a run with other settings, or all damaged.
    """
    first, second, *extra = training
    names = []

    def train(lm, config, name, what, **options) -> list[float]:
        names.append(name)
        loss_of_step = functools.partial(text_loss, lm, text, config, **options)
        path = out / "checkpoints" / f"{name}.pt"
        parameters = dict(lm.named_parameters())
        return fit(parameters, loss_of_step, config, path, f"LM, {what}")

    # 1. Next tokens, from clean words.
    tokenizer = text.tokenizer
    ids = {"mask_id": tokenizer.id(MASK), "end_id": tokenizer.id(TEXT_END)}
    config = replace(LM_SIZES["toy"], vocab=tokenizer.size, **ids)
    causal = new_lm(CausalLM, config, first.seed, device)
    losses = train(causal, first, "next_token", "next token", blurred=False)

    # 2. Masked diffusion, from the same weights.
    lm = DiffusionLM(config).to(device)
    lm.load_state_dict(causal.state_dict())
    losses += train(lm, second, "lm", "diffusion")
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
        losses += train(lm, third, f"lm_more{n}", what, wanted=wanted)
        result = text.examine(lm)

    save_lm(lm, out / "llada")
    minutes = minutes_of(out / "checkpoints", names)
    return result | {"steps": len(losses), "asked": asked, "losses": losses, "minutes": minutes}
