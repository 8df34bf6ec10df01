"""Word error rate (WER), as it stands and after Whisper's text normalisation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from whisper_normalizer.english import EnglishTextNormalizer

# Words that whisper-normalizer 0.1.15 replaces and openai-whisper does not. "cause" would become
# "because" in any sentence.
OWN_REPLACEMENTS = ("kinda", "sorta", "dunno", "cause")

NO_WORD = "no target holds a word, so there is no word error rate"


@dataclass(frozen=True, kw_only=True)
class WordErrors:
    """Word errors of one text, or of many together."""

    words: int = 0  # of the targets
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per 100 words of the targets. Raises ValueError: these hold no word."""
        if self.words == 0:
            raise ValueError(NO_WORD)
        return 100 * self.total / self.words


def word_errors(prediction: str, target: str) -> WordErrors:
    """The fewest word errors that turn the target into the prediction.

    Of several ways with equally few errors, the one with the fewest substitutions counts: it keeps
    the most words.
    """
    vocabulary: dict[str, int] = {}
    expected = [vocabulary.setdefault(word, len(vocabulary)) for word in target.split()]
    found = np.array([vocabulary.setdefault(w, len(vocabulary)) for w in prediction.split()], int)

    # Edit distance row by row; an error costs `one`, a substitution a little more. An entry is the
    # cost of turning the words of the target so far into the first j words of the prediction.
    one = len(expected) + len(found) + 1
    steps = one * np.arange(len(found) + 1)
    costs = steps
    for word in expected:
        kept_or_substituted = costs[:-1] + (one + 1) * (found != word)
        best = costs + one  # the word is deleted
        best[1:] = np.minimum(best[1:], kept_or_substituted)
        costs = np.minimum.accumulate(best - steps) + steps  # words are inserted after it

    # Insertions exceed deletions by what the prediction is longer.
    total, substitutions = divmod(int(costs[-1]), one)
    deletions = (total - substitutions + len(expected) - len(found)) // 2
    return WordErrors(
        words=len(expected),
        substitutions=substitutions,
        deletions=deletions,
        insertions=total - substitutions - deletions,
    )


def summed(errors: Iterable[WordErrors]) -> WordErrors:
    """The errors of many texts together."""
    errors = list(errors)
    return WordErrors(
        words=sum(e.words for e in errors),
        substitutions=sum(e.substitutions for e in errors),
        deletions=sum(e.deletions for e in errors),
        insertions=sum(e.insertions for e in errors),
    )


def word_error_rate(predictions: list[str], targets: list[str]) -> float:
    """Substituted, missing and extra words per 100 words of the targets.

    Raises ValueError: unequal numbers of texts, or targets without a word.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return summed(map(word_errors, predictions, targets)).rate


def bootstrap_interval(
    errors: Sequence[WordErrors], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bounds of 95 % of the WERs of texts that are drawn from these with replacement.

    errors: of each text; or of each speaker, since texts of one speaker are not independent. Raises
    ValueError: no target holds a word.
    """
    totals = np.array([e.total for e in errors])  # (n,)
    words = np.array([e.words for e in errors])  # (n,)
    if not words.any():
        raise ValueError(NO_WORD)

    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(errors), size=len(errors))
        n_words = words[drawn].sum()
        if n_words:
            rates.append(100 * totals[drawn].sum() / n_words)
    low, high = np.percentile(rates, (2.5, 97.5))
    return float(low), float(high)


@cache
def english_normalizer() -> EnglishTextNormalizer:
    """Whisper's normaliser of English (arXiv 2212.04356, appendix C), equal to openai-whisper's."""
    normalizer = EnglishTextNormalizer()
    for word in OWN_REPLACEMENTS:
        normalizer.replacers.pop(rf"\b{word}\b", None)
    return normalizer


def normalize_english(text: str) -> str:
    """Lower case without punctuation and fillers, numbers in digits, American spelling."""
    return english_normalizer()(text).strip()
