"""Words are compared as openai-whisper compares them, and word error rates count them."""

import random

import numpy as np
import pytest
from torchaudio.functional import edit_distance
from whisper.normalizers import EnglishTextNormalizer

from evaluation.wer import (
    WordErrors,
    bootstrap_interval,
    normalize_english,
    word_error_rate,
    word_errors,
)

CASES = """
Well, um, he's GONE home; hasn't he?
hmm uh twenty-five of them
Mm, mhm, I think so
I won't, I can't and we'll never: let's go!
They'd been there. I'd go, we've seen, I'm sure you're late.
I'm gonna say what you wanna hear, y'all
It ain't so. You gotta see it
we woulda, coulda, shoulda
I'ma do it, imma go
he 's here and they 're there
she's been, he's got, it'd done
Yes, ma'am
I’d say it’s a cat
It's kinda nice, sorta
I dunno
the cause of it, 'cause I said so
Mr Smith, Mrs Jones and Dr Brown of St Ives
Prof. Lee met Capt. Cook and Gov. Grey
Gen. Ward, Sen. Young, Rep. Hill and Pres. Ford
Rev. Moon, Hon. Reed, Lt. Dan and Col. Kurtz
Smith Jr. and Jones Sr., Esq.
Asst. manager, assoc. editor, ald. Burke
It's Bob's (laughter) [noise] café.
<unk> a thing [music] (applause)
unclosed (bracket and [another
naïve façade, Ångström, Øre, Łódź, straße, þing
A.B.C. and U.S.A., e.g. this
rock & roll, 5 + 6 = 11
well-known co-operation
mother-in-law's house
e-mail me @ home #1
"quoted" and 'quoted' and «quoted»
colour, favourite, centre, theatre
he organised and realised the programme
travelling, cancelled, modelling
an aluminium aeroplane with grey tyres
analyse the defence and the licence
one
no one, one of them, someone
zero five
five or six
twenty ten
twenty hundred
two thousand and five or two thousand five
in nineteen eighty-four
nineteen oh five
one oh one dogs
one hundred twenty three thousand four hundred fifty six
a hundred and one
two million three hundred thousand and seven
three and a half
six and a half thousand
one trillion two billion
black and white and seven
the point is this
three point one four
three point oh five
point five
2.5 million, 20 thousand
4.2 billions
1,234 and 5pm
1,234,567.89
5.
1/2 and 3/4
minus seven, plus eight, positive nine, negative ten
double five triple two
double o seven
call five five five one two one two
the twenty first, the third and the hundredth
the twelfth of May, the eighth, the fortieth
the 21st of 3 at 7.5 in B2
1st 2nd 3rd 4 th
the twenties and the nineteen nineties
the 1980s and '90s
fifty percent, 20 per cent, 7 %
100% of 50 percentages
ten dollars, five cents
twenty dollars and fifty cents
$5, $3.50 and $ 4
$1 million, £20 thousand, €5 billion
five pounds and three euros
$0.05 and ¢7
two hundred bucks
seven o'clock
at 10:30 a.m. or 7.45 p.m.
half past three, quarter to four
ten thirty in the evening
July 4th, 2021
May the fourth two thousand nineteen
10km at 5mph
WW2 and B747, R2D2
version 3.10.2
192.168.0.1
a, an, the
OK okay o.k.
line one\tline two
  spaces   everywhere
...
!?
日本語 and русский
½ and ²
""".split("\n")


@pytest.mark.parametrize("text", CASES)
def test_text_is_normalised_as_openai_whisper_does(text):
    assert normalize_english(text) == EnglishTextNormalizer()(text).strip()


def test_random_sequences_of_number_words_are_normalised_as_openai_whisper_does():
    words = "zero oh one two nine ten twelve twenty ninety hundred thousand million and point"
    words += " double half third twentieth fifties dollars cents percent minus 3 4.5 $7 80s st a"
    draw = random.Random(0)
    theirs = EnglishTextNormalizer()
    for _ in range(300):
        text = " ".join(draw.choices(words.split(), k=draw.randint(2, 7)))
        assert normalize_english(text) == theirs(text).strip()


def test_any_number_below_a_trillion_reads_the_same_spelled_and_in_digits():
    below_twenty = "zero one two three four five six seven eight nine ten eleven twelve thirteen"
    below_twenty += " fourteen fifteen sixteen seventeen eighteen nineteen"
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    scales = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))

    def spelled(n):
        if n < 20:
            return below_twenty.split()[n]
        if n < 100:
            return tens[n // 10 - 2] + (f"-{spelled(n % 10)}" if n % 10 else "")
        scale, name = next(pair for pair in scales if n >= pair[0])
        rest = f" {spelled(n % scale)}" if n % scale else ""
        return f"{spelled(n // scale)} {name}{rest}"

    draw = random.Random(0)
    for n in [*range(2, 200), *(draw.randrange(10 ** draw.randint(2, 12)) + 2 for _ in range(300))]:
        assert normalize_english(f"exactly {spelled(n)} birds") == f"exactly {n} birds"


def test_substituted_missing_and_extra_words_are_errors():
    targets = ["two red birds sing", "one"]
    assert word_error_rate(["two red birds sing", "one"], targets) == 0
    assert word_error_rate(["two blue birds sing", "one"], targets) == pytest.approx(20)
    assert word_error_rate(["two birds", "one one"], targets) == pytest.approx(60)
    assert word_error_rate(["", ""], targets) == pytest.approx(100)
    assert word_error_rate(["Two red birds sing", "one."], targets) == pytest.approx(40)


def normalized(texts):
    return [normalize_english(text) for text in texts]


def test_only_words_that_differ_after_normalisation_are_errors():
    predictions = ["Um, it's twenty-one.", "Two red dogs!"]
    targets = ["It is 21", "two dogs"]
    rate = word_error_rate(normalized(predictions), normalized(targets))
    assert rate == pytest.approx(100 / 5)


def test_texts_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="no target holds a word"):
        word_error_rate(["a"], [normalize_english("Um, (noise)!")])
    with pytest.raises(ValueError, match="no target holds a word"):
        word_error_rate([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 targets"):
        word_error_rate(["a"], ["a", "b"])


def ways(prediction, target):
    """(errors, substitutions, deletions, insertions) of every alignment of two lists of words."""
    if not prediction and not target:
        yield 0, 0, 0, 0
    if target:
        for e, s, d, i in ways(prediction, target[1:]):
            yield e + 1, s, d + 1, i
    if prediction:
        for e, s, d, i in ways(prediction[1:], target):
            yield e + 1, s, d, i + 1
    if prediction and target:
        wrong = prediction[0] != target[0]
        for e, s, d, i in ways(prediction[1:], target[1:]):
            yield e + wrong, s + wrong, d, i


def test_errors_are_those_of_the_best_of_all_alignments():
    draw = random.Random(0)
    for _ in range(150):
        prediction = draw.choices("abc", k=draw.randrange(6))
        target = draw.choices("abc", k=draw.randrange(6))
        found = word_errors(" ".join(prediction), " ".join(target))
        counts = (found.total, found.substitutions, found.deletions, found.insertions)
        assert counts == min(ways(prediction, target))
        assert found.words == len(target)


def test_long_texts_have_torchaudio_s_edit_distance():
    draw = random.Random(1)
    for n_words in (3, 40, 400):
        texts = [draw.choices("abcdefg", k=draw.randint(1, n_words)) for _ in range(2)]
        found = word_errors(*map(" ".join, texts))
        assert found.total == edit_distance(*texts)


def test_the_interval_of_resampled_texts_covers_the_spread_of_samples():
    """Of 60 samples of texts with a known WER of 10 %, about 57 intervals hold 10 %."""
    rng = np.random.default_rng(0)
    covered = 0
    widths = []
    for sample in range(60):
        wrong = rng.binomial(10, 0.1, size=80)
        errors = [WordErrors(words=10, substitutions=int(n)) for n in wrong]
        low, high = bootstrap_interval(errors, resamples=200, seed=sample)
        covered += low <= 10 <= high
        widths.append(high - low)
    assert 52 <= covered <= 60
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 100 * (0.1 * 0.9 / 800) ** 0.5, rel=0.1)


def test_one_text_or_texts_without_words_have_an_interval_or_a_sentence():
    assert bootstrap_interval([WordErrors(words=4, deletions=1)]) == (25, 25)
    with pytest.raises(ValueError, match="no target holds a word"):
        bootstrap_interval([WordErrors(insertions=1)])
