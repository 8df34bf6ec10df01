"""One spelling for each value of an attribute, whichever corpus it comes from.

Genders, emotions and intents are adjectives in lower case; accents begin with a capital.
"""

import re

GENDERS = {"m": "male", "f": "female", "male": "male", "female": "female"}

# IEMOCAP's codes, and the nouns of DailyTalk. "oth" and "xxx", on which IEMOCAP's raters did not
# agree, are no emotion.
EMOTIONS = {
    "ang": "angry", "hap": "happy", "sad": "sad", "neu": "neutral", "fru": "frustrated",
    "exc": "excited", "fea": "fearful", "sur": "surprised", "dis": "disgusted",
    "oth": "", "xxx": "",
    "anger": "angry", "happiness": "happy", "joy": "happy", "sadness": "sad",
    "no emotion": "neutral", "frustration": "frustrated", "excitement": "excited",
    "fear": "fearful", "surprise": "surprised", "disgust": "disgusted",
}  # fmt: skip
UNKNOWN = {"", "unknown", "none", "n/a", "na", "nan", "-", "?"}


def one_spelling(name: str, value: str) -> str:
    """A value of the attribute `name` in the one spelling for all corpora; "" if unknown."""
    # "NewZealand", "new_zealand" and " New  Zealand " are the same.
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", value.replace("_", " "))
    spaced = " ".join(spaced.split())
    if spaced.lower() in UNKNOWN:
        return ""

    if name == "Gender":
        return GENDERS.get(spaced.lower(), "")
    if name == "Emotion":
        return EMOTIONS.get(spaced.lower(), spaced.lower())
    if name == "Intent":
        return spaced.lower()
    if name == "Age":
        return spaced if spaced.isdecimal() else ""
    if name == "Accent":
        return " ".join(word[:1].upper() + word[1:] for word in spaced.split())
    return value.strip()


def attributes_of(**values: str) -> dict[str, str]:
    """Attributes of a clip by name, in the common spelling, without those that are unknown."""
    spelled = {name: one_spelling(name, value) for name, value in values.items()}
    return {name: value for name, value in spelled.items() if value}
