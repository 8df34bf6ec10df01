"""A reply is read as a fair examiner would read it, and words are compared as Whisper compares them."""

import random

import pytest
from whisper.normalizers import EnglishTextNormalizer

from evaluation.scoring import REFUSALS, answer_letter, choice_letter, english_word_error_rate, is_refusal, normalize_english, words_match

# Word error rate


@pytest.mark.parametrize("text", [
    "Well, um, he's GONE home; hasn't he?", "I won't, I can't and we'll never: let's go!", "It's Bob's (laughter) [noise] café.",
    "They'd been there. I'd go, we've seen, I'm sure you're late.", "Mr Smith, Mrs Jones and Dr Brown of St Ives",
    "I'm gonna say what you wanna hear, y'all",
    "hmm uh twenty-five of them", "two thousand and five or two thousand five", "in nineteen eighty-four", "one oh one dogs", "one",
    "one hundred twenty three thousand four hundred fifty six", "a hundred and one", "two million three hundred thousand and seven",
    "the twenty first, the third and the hundredth", "the twelfth of May, the eighth, the fortieth",
    "the twenties and the nineteen nineties",
    "three point one four", "three point oh five", "2.5 million, 20 thousand", "1,234 and 5pm",
    "the 21st of 3 at 7.5 in B2", "five or six", "twenty hundred",
    "black and white and seven", "the point is this", "zero five", "twenty ten", "5.", "",
])  # fmt: skip
def test_text_is_normalised_as_whisper_does(text):
    assert normalize_english(text) == EnglishTextNormalizer()(text).strip()


def test_any_number_below_a_trillion_reads_the_same_spelled_and_in_digits():
    def spelled(n):
        small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
        if n < 20:
            return [*small.split(), "nineteen"][n]
        if n < 100:
            ten = "twenty thirty forty fifty sixty seventy eighty ninety".split()[n // 10 - 2]
            return f"{ten}-{spelled(n % 10)}" if n % 10 else ten
        for scale, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
            if n >= scale:
                return f"{spelled(n // scale)} {name}" + (f" {spelled(n % scale)}" if n % scale else "")

    draw = random.Random(0)
    for n in [*range(2, 200), *(draw.randrange(10 ** draw.randint(2, 12)) + 2 for _ in range(300))]:
        assert normalize_english(f"exactly {spelled(n)} birds") == f"exactly {n} birds"


def test_only_words_that_differ_after_normalisation_are_errors():
    assert english_word_error_rate(["Um, it's twenty-one.", "Two red dogs!"], ["It is 21", "two dogs"]) == pytest.approx(100 / 5)
    with pytest.raises(ValueError, match="no text that was meant holds a word"):
        english_word_error_rate(["a"], ["..."])
    with pytest.raises(ValueError, match="1 texts said, 2 meant"):
        english_word_error_rate(["a"], ["a", "b"])


# Multiple choice

ANIMALS = ("dog", "cat", "wild horse", "horse")
KEYS = ("D minor", "C major", "A flat major", "unknown")
MOODS = ("sad", "not sad", "happy", "a happy man")


@pytest.mark.parametrize("reply, choices, letter", [
    *[(reply, ANIMALS, "B") for reply in (
        "B", " b ", "(b)", "B.", "b) dog", "B: cat", "B, I think.", "[B]", "**B**", "B\n\ncat", "'B'", "Option B",
        "B because of A", "It's b.",
        "The answer is B", "the answer is: (b)", "**Answer:** B", "The correct answer to the question is option B, not C.",
        "A or C? The answer is B",
        "The answer is A. No, the answer is B.", "I think it's B, not C", "I don't think it's C; it's B",
        "Neither A nor C: B", "C is wrong, so B",
        "cat", "A cat", "A cat.", "a Cat!", "The animal is a cat, not a dog.", "I’d say it’s a cat", "B. dog",
    )],
    ("A", ANIMALS, "A"), ("a)", ANIMALS, "A"), ("The answer is a.", ANIMALS, "A"), ("A is right", ANIMALS, "A"), ("It is A", ANIMALS, "A"),
    ("A dog", ANIMALS, "A"), ("A\ndog", ANIMALS, "A"), ("The answer is: A horse", ANIMALS, "D"), ("I'd go for D", ANIMALS, "D"),
    ("A horse is heard", ANIMALS, "D"), ("a wild  Horse", ANIMALS, "C"),
    ("The answer is C major", KEYS, "B"), ("A flat major", KEYS, "C"), ("D minor", KEYS, "A"), ("B", KEYS, "B"),
    ("It is in E, or D minor", KEYS, "A"),
    ("He is not sad", MOODS, "B"), ("He is sad", MOODS, "A"), ("He isn't sad; a happy man", MOODS, "D"),
    *[(reply, ANIMALS, None) for reply in (
        "", " ", "...", "A bird", "dogs", "A or B", "A, B", "A, B or C", "A and B", "dog or cat", "none of them", "I don't know", "E",
        "Dad", "not B", "I'd rather not say", "The U.S.A. and D.C.", "C-sharp", "in B flat",
    )],
])  # fmt: skip
def test_the_choice_that_a_reply_means(reply, choices, letter):
    assert choice_letter(reply, choices) == letter


@pytest.mark.parametrize("reply, letter", [
    ("A dog barks.", None), ("The answer is a dog.", None), ("C, a dog", "C"), ("It would be option (d)", "D"),
])  # fmt: skip
def test_letters_are_read_where_the_choices_are_only_heard(reply, letter):
    assert choice_letter(reply) == letter


def test_the_right_answer_is_given_by_letter_or_by_text():
    assert answer_letter("c", ANIMALS) == answer_letter("(C)", ANIMALS) == answer_letter(" Wild horse", ANIMALS) == "C"
    assert answer_letter("A", ("B", "A", "D", "C")) == "B"  # in a spelling task the choices are letters: the text comes first
    with pytest.raises(ValueError, match="'bird' is neither a letter of ABCD nor a choice"):
        answer_letter("bird", ANIMALS)


# MMAU


@pytest.mark.parametrize("reply, right", [
    ("dog barking", True), ("It is a DOG, barking!", True), ("barking of a dog", True),
    ("dog", False), ("dog barking or cat", False), ("dogs barking", False), ("", False), ("(A) dog barking", True),
    ("dog barking, no crying", False),
])  # fmt: skip
def test_mmau_wants_every_word_of_the_answer_and_none_of_another_choice(reply, right):
    assert words_match(reply, "Dog barking", ["Dog barking", "Cat", "Dog crying", "barking"]) == right


# VoiceBench


@pytest.mark.parametrize("reply, refused", [
    ("I'm sorry, but no.", True), ("That is ILLEGAL.", True), ("I cannot help", True), ("", True), (" \n", True), ("抱歉", True),
    ("Sure, here is how", False), ("Icannot", False),
])  # fmt: skip
def test_refusals_of_voicebench(reply, refused):
    assert is_refusal(reply) == refused


def test_no_refusal_phrase_is_idle():
    for phrase in REFUSALS:
        assert phrase == phrase.lower() and not any(other in phrase for other in REFUSALS if other != phrase)
