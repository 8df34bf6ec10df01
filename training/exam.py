"""What an LM that is being adapted can do with sentences that do not train it (adapt_lm.py).

Shapes: B batch, A audio embeddings, D LM width.
"""

import random

import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from data import left_pad
from sampler import Answer, SamplerConfig, answer
from training.imitation import ImitationItem, blurred_embeddings
from training.perplexity import pseudo_perplexity
from training.questions import VALUES, plain_words
from training.text_rows import TextRows

LOSSES = 4  # batches whose loss is measured
PLAIN_TOKENS = 512  # of plain text, whose pseudo-perplexity is measured
WINDOW = 32  # tokens that the LM sees of it at once
# An LM of little training is confident of an answer's padding before it is of the answer's words.
# Blocks are filled from left to right, so that no end token comes before these words.
BLOCK_LENGTH = 8


class Exam:
    """Questions over text that imitates audio; call it for the LM's figures as it is now.

    The rows, the noise and the questions are the same at every call.
    """

    def __init__(self, adaptation, rows: TextRows, n: int):
        """adaptation: see adapt_lm.Adaptation. rows: of sentences that do not train; n of them at
        most for each figure. ValueError: no sentence in plain words fits an answer.
        """
        self.adaptation = adaptation
        self.rows = rows
        length = rows.mixture.answer_length
        encode = rows.tokenizer.encode_text
        self.lines = [line for line in rows.lines if len(encode(plain_words(line))) < length]
        if not self.lines:
            raise ValueError(f"no sentence of the validation fits an answer of {length} tokens")
        self.n = min(n, len(self.lines))
        self.sampler = SamplerConfig(
            length=length, block_length=BLOCK_LENGTH, rule="threshold", threshold=0.9
        )

    def items(self, kind: str, stretched: bool) -> list[ImitationItem]:
        """Questions of a kind, each about another sentence."""
        rng = random.Random(f"{kind} {stretched}")
        lines = rng.sample(self.lines, self.n)
        items = [self.rows.audio(line, kind, stretched, rng) for line in lines]
        fitting = [item for item in items if self.rows.fits(item)]
        if not fitting:
            raise ValueError(f"no question of kind {kind} fits the LM's context and its answers")
        return fitting

    def answers(self, items: list[ImitationItem]) -> list[Answer]:
        """The LM's answers, at threshold 0.9, block by block."""
        lm = self.adaptation.lm
        gap_id = self.rows.gap_id
        device = self.adaptation.device

        def heard(rows: slice) -> tuple[Tensor, Tensor]:
            ids, mask = left_pad([torch.tensor(i.audio_ids, device=device) for i in items[rows]])
            noise = torch.Generator(device).manual_seed(rows.start)
            return blurred_embeddings(lm, ids, mask, gap_id, 0.0, noise), mask  # (B, A, D), (B, A)

        prompts = [item.prompt for item in items]
        tokenizer = self.rows.tokenizer
        return list(answer(lm, tokenizer, prompts, heard, self.sampler, batch=200))

    def copy_error(self, stretched: bool) -> tuple[float, float]:
        """WER in percent of quoting a sentence, and the mean number of calls."""
        items = self.items("transcribe", stretched)
        answers = self.answers(items)
        pairs = [(i.answer.split(), a.text.split()) for i, a in zip(items, answers)]
        errors = sum(edit_distance(target, text) for target, text in pairs)
        n_words = sum(len(target) for target, _ in pairs)
        return 100 * errors / n_words, sum(a.calls for a in answers) / len(answers)

    def accuracy(self, kind: str) -> float:
        """Percent of the answers to a kind of question that are right."""
        items = self.items(kind, stretched=True)
        right = [a.text == item.answer for a, item in zip(self.answers(items), items)]
        return 100 * sum(right) / len(right)

    def perplexity(self) -> float:
        """Pseudo-perplexity of the first sentences, as plain text."""
        ids = self.rows.tokenizer.encode_text("\n".join(self.lines[: self.n]))
        return pseudo_perplexity(self.adaptation.lm, ids[:PLAIN_TOKENS], window=WINDOW)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The loss on fixed rows, pseudo-perplexity, copy errors and accuracies in percent."""
        adaptation = self.adaptation
        adaptation.lm.eval()
        losses = [
            sum(adaptation.losses(self.rows[i], torch.Generator().manual_seed(i))).item()
            for i in range(LOSSES)
        ]

        with torch.autocast(adaptation.device.type, torch.bfloat16, enabled=adaptation.autocast):
            result = {"loss": sum(losses) / LOSSES, "pseudo_perplexity": self.perplexity()}
            result["copy_error"], result["calls"] = self.copy_error(stretched=False)
            result["copy_error_stretched"], result["calls_stretched"] = self.copy_error(True)
            result |= {kind: self.accuracy(kind) for kind in (*VALUES, "first", "last", "says")}
        adaptation.lm.train()
        return result
