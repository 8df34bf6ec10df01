"""Word error rate (WER), as it stands and after Whisper's text normalisation."""

from functools import cache

from torchaudio.functional import edit_distance
from whisper_normalizer.english import EnglishTextNormalizer

# Words that whisper-normalizer 0.1.15 replaces and openai-whisper does not. "cause" would become
# "because" in any sentence.
OWN_REPLACEMENTS = ("kinda", "sorta", "dunno", "cause")


def word_error_rate(predictions: list[str], targets: list[str]) -> float:
    """Substituted, missing and extra words per 100 words of the targets.

    Raises ValueError: unequal numbers of texts, or targets without a word.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    n_words = sum(len(target.split()) for target in targets)
    if n_words == 0:
        raise ValueError("no target holds a word, so there is no word error rate")

    errors = 0
    for prediction, target in zip(predictions, targets):
        errors += edit_distance(target.split(), prediction.split())
    return 100 * errors / n_words


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


def normalized_word_error_rate(predictions: list[str], targets: list[str]) -> float:
    """WER after both sides are normalised as English. Raises ValueError as word_error_rate."""
    return word_error_rate(
        [normalize_english(text) for text in predictions],
        [normalize_english(text) for text in targets],
    )
