"""Our own reading of a reply: which choice it names, as a fair examiner would see it.

exam_marks.py holds the cruder readings of the exams' own scorers.
"""

import re
from collections.abc import Sequence

LETTERS = "ABCD"

# Characters. A reply names its choice where it begins or ends: of a longer one only LONGEST at each
# end are read. NEAR before a letter decide whether it is denied. Without bounds, a reply of a
# million letters would take days.
LONGEST = 2000
NEAR = 200

# A letter by itself: not within a word, as in I'd, D.C., C-sharp; nor a musical key.
LETTER = re.compile(
    r"(?<![\w'#-])(?<!\w\.)[A-Da-d](?![\w'#-]|\.\w\.| (?:major|minor|flat|sharp)\b)"
)

# A reply that opens with its letter: "B", "(b)", "B.", "b) dog", "B because"; but not "A, B or C".
LEADING = re.compile(
    r"\W*([A-Da-d])"
    r"(?:[:)\]]|\.(?!\w\.)|,(?!\s*(?:and |or )?[A-Da-d]\b)| (?:because|since|as)\b|\s*(?:\n|$))"
)

# What stands before a letter that is declared as the answer: "The correct answer is option".
DECLARED = re.compile(
    r"\banswer(?: to [^.?!]{1,60}?)?(?:'s| is| was| would be| should be| must be)?[\s:]*"
    r"(?:(?:most likely|likely|probably|clearly|therefore|the|option|choice|letter) )*\W*$",
    re.IGNORECASE,
)

# What stands before or after a choice that is denied: "I don't think it is B", "C is wrong".
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|rather than|instead of)|n't)"
    r"(?: (?:think|believe|say|be|it's|it is|is|that|the|option|choice|answer|letter|or|nor)"
    r"| an| a(?! n?or\b)| [A-D](?= n?or\b))*\W*$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(
    r"\W*(?:isn't|(?:is|are|was) (?:not|wrong|incorrect|false))\b", re.IGNORECASE
)


# What stands after "a" as a letter; after "A" as a word.
MARKED_AFTER = re.compile(r"[).:,;!?\]](?!\w)|$")
NOUN_AFTER = re.compile(r" +(?!(?:or|and|is|because|since|as)\b)\S")


def text_before(text: str, match: re.Match) -> str:
    """The NEAR characters before a match."""
    return text[max(0, match.start() - NEAR) : match.start()]


def is_denied(text: str, match: re.Match) -> bool:
    """Whether the text says that the matched choice is not the answer."""
    before = DENIED_BEFORE.search(text_before(text, match))
    return bool(before or DENIED_AFTER.match(text, match.end()))


def is_article(text: str, match: re.Match) -> bool:
    """Whether the matched letter is the word "a".

    A small a is an article unless it is marked as a letter, a capital A where it begins a sentence.
    """
    before = text_before(text, match)
    if match[0] == "a":
        return not (before.endswith("(") or MARKED_AFTER.match(text, match.end()))
    if match[0] == "A":
        begins = re.search(r"(?:^|[.!?:\n])\s*$", before)
        return bool(begins and NOUN_AFTER.match(text, match.end()))
    return False


def choice_letter(reply: str, choices: Sequence[str] = ()) -> str | None:
    """The choice that a reply names, "A" to "D"; None when it names none, or several undecided.

    In this order: a letter that opens the reply; the last letter after "the answer is"; the only
    letter that is not denied ("C, not B"); the only choice whose text appears and is not denied.
    Letters inside the text of a choice ("C major") and the article "a" do not count.

    Args:
        reply: of the model. choices: the texts of A, B, ..., where they are known.
    """
    if len(reply) > 2 * LONGEST:
        reply = f"{reply[:LONGEST]} ... {reply[-LONGEST:]}"

    # Markup and quotation marks go, apostrophes stay.
    text = re.sub(r"[*_`\"“”]", "", reply.replace("’", "'"))
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text).strip()

    # Choices by their text, the longest first: "young man" before "man". Each is then taken out of
    # the text, so that none of its letters is read below.
    named = set()
    for letter, choice in sorted(zip(LETTERS, choices), key=lambda pair: -len(pair[1])):
        words = choice.strip(" .").split()
        if sum(map(len, words)) < 2:
            continue  # one character looks like a letter
        words_in_order = r"\s+".join(map(re.escape, words))
        pattern = re.compile(rf"(?<!\w){words_in_order}(?!\w)", re.IGNORECASE)
        if not all(is_denied(text, match) for match in pattern.finditer(text)):
            named.add(letter)
        text = pattern.sub("...", text)

    # Choices by their letter.
    letters = set()
    declared = None
    for match in LETTER.finditer(text):
        if is_article(text, match) or is_denied(text, match):
            continue
        letters.add(match[0].upper())
        if DECLARED.search(text_before(text, match)):
            declared = match[0].upper()

    # The clearest of these decides.
    leading = LEADING.match(text)
    if leading and not is_denied(text, leading):
        return leading[1].upper()
    if declared:
        return declared
    candidates = letters if len(letters) == 1 else named
    return min(candidates) if len(candidates) == 1 else None


def answer_letter(answer: str, choices: Sequence[str]) -> str:
    """The letter of the correct choice, which an exam gives by its text or by its letter.

    Raises ValueError: it is neither.
    """
    # The text comes first: in a spelling task the choices are letters.
    texts = [choice.strip().lower() for choice in choices]
    text = answer.strip().lower()
    if text and text in texts:
        return LETTERS[texts.index(text)]

    letter = text.strip("().").upper()
    if len(letter) == 1 and letter in LETTERS:
        return letter
    raise ValueError(f"the correct answer {answer!r} is neither a letter of {LETTERS} nor a choice")
