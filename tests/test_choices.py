"""A reply is read as a fair examiner would read it."""

import time

import pytest

from evaluation.choices import answer_letter, choice_letter
from evaluation.exam_marks import is_refusal, words_match

# ---- multiple choice
ANIMALS = ("dog", "cat", "wild horse", "horse")
KEYS = ("D minor", "C major", "A flat major", "unknown")
MOODS = ("sad", "not sad", "happy", "a happy man")

NAMES_B = (
    "B", " b ", "(b)", "B.", "b) dog", "B: cat", "B, I think.", "[B]", "**B**", "B\n\ncat", "'B'",
    "Option B", "B because of A", "It's b.", "The answer is B", "the answer is: (b)",
    "**Answer:** B", "The correct answer to the question is option B, not C.",
    "A or C? The answer is B", "The answer is A. No, the answer is B.", "I think it's B, not C",
    "I don't think it's C; it's B", "Neither A nor C: B", "C is wrong, so B", "cat", "A cat",
    "A cat.", "a Cat!", "The animal is a cat, not a dog.", "I’d say it’s a cat", "B. dog",
)  # fmt: skip
NAMES_NONE = (
    "", " ", "...", "A bird", "dogs", "A or B", "A, B", "A, B or C", "A and B", "dog or cat",
    "none of them", "I don't know", "E", "Dad", "not B", "I'd rather not say",
    "The U.S.A. and D.C.", "C-sharp", "in B flat",
)  # fmt: skip


@pytest.mark.parametrize("reply, choices, letter", [
    *((reply, ANIMALS, "B") for reply in NAMES_B),
    *((reply, ANIMALS, None) for reply in NAMES_NONE),
    ("A", ANIMALS, "A"), ("a)", ANIMALS, "A"), ("The answer is a.", ANIMALS, "A"),
    ("A is right", ANIMALS, "A"), ("It is A", ANIMALS, "A"),
    ("A dog", ANIMALS, "A"), ("A\ndog", ANIMALS, "A"), ("The answer is: A horse", ANIMALS, "D"),
    ("I'd go for D", ANIMALS, "D"), ("A horse is heard", ANIMALS, "D"),
    ("a wild  Horse", ANIMALS, "C"),
    ("The answer is C major", KEYS, "B"), ("A flat major", KEYS, "C"), ("D minor", KEYS, "A"),
    ("B", KEYS, "B"), ("It is in E, or D minor", KEYS, "A"),
    ("He is not sad", MOODS, "B"), ("He is sad", MOODS, "A"),
    ("He isn't sad; a happy man", MOODS, "D"),
])  # fmt: skip
def test_the_choice_that_a_reply_names(reply, choices, letter):
    assert choice_letter(reply, choices) == letter


@pytest.mark.parametrize("reply, letter", [
    ("A dog barks.", None), ("The answer is a dog.", None), ("C, a dog", "C"),
    ("It would be option (d)", "D"),
])  # fmt: skip
def test_letters_are_read_where_the_choices_are_in_the_audio_alone(reply, letter):
    assert choice_letter(reply) == letter


@pytest.mark.parametrize(
    "part", ["A", "A.\n", "A is ", "(a", "A nor ", "answer to a ", "n't a", ". "]
)
def test_a_reply_of_a_million_letters_is_read_in_a_second(part):
    started = time.monotonic()
    for reply in (part * (10**6 // len(part)), "not " + part * 40 + "x B"):
        choice_letter(reply, ANIMALS)
        words_match(reply, "dog", ANIMALS)
        is_refusal(reply)
    assert time.monotonic() - started < 3  # of a machine that others use too


def test_a_long_reply_is_read_where_it_begins_and_ends():
    padding = " It barks." * 2000
    assert choice_letter(f"B.{padding}", ANIMALS) == "B"
    assert choice_letter(f"{padding} The answer is C", ANIMALS) == "C"


def test_the_correct_answer_is_given_by_letter_or_by_text():
    for answer in ("c", "(C)", " Wild horse"):
        assert answer_letter(answer, ANIMALS) == "C"

    # In a spelling task the choices are letters: the text comes first.
    assert answer_letter("A", ("B", "A", "D", "C")) == "B"

    for answer, choices in (("bird", ANIMALS), ("", ("dog", "cat", "", ""))):
        problem = f"'{answer}' is neither a letter of ABCD nor a choice"
        with pytest.raises(ValueError, match=problem):
            answer_letter(answer, choices)
