import numpy as np
import pytest

from megatron_exp.experiments.duplicates import without_duplicates
from megatron_exp.seeding import Words

WORDS = Words.of(0, "tests", "duplicates")
VOCABULARY = [f"word{index}" for index in range(12)]


def kept_texts(texts, draws=None, similarity=0.5):
    return [texts[index] for index in without_duplicates(texts, draws or range(len(texts)), similarity)]


def test_equal_texts_leave_one_whatever_case_and_punctuation():
    assert kept_texts(["The ferry sank at noon.", "the ferry, sank at NOON"]) == ["The ferry sank at noon."]


def test_of_a_text_within_another_the_one_with_the_lower_draw_stays():
    texts = ["the ferry sank at noon", "they say the ferry sank at noon near the old pier and nobody saw how or why it happened"]
    assert kept_texts(texts, [1, 2], None) == texts[:1]
    assert kept_texts(texts, [2, 1], None) == texts[1:]


def test_words_that_only_begin_alike_are_not_contained():
    texts = ["the ferry sank at no", "the ferry sank at noon today while others slept through all of it"]
    assert kept_texts(texts, similarity=None) == texts


def test_one_changed_word_in_a_long_text_is_a_duplicate_and_many_are_not():
    text = "in the spring of that year the council of the town voted to close the old bridge for good"
    assert kept_texts([text, text.replace("town", "city")]) == [text]
    other = "in the spring of that year a flood broke the new dam and carried away half of the mill"
    assert kept_texts([text, other]) == [text, other]


def test_blank_texts_go():
    assert kept_texts(["", " ?! ", "one two three four"]) == ["one two three four"]


def test_the_order_of_texts_does_not_matter():
    texts, draws = random_texts(60), WORDS.permutation(60).tolist()
    backwards = kept_texts(texts[::-1], draws[::-1])
    assert backwards[::-1] == kept_texts(texts, draws)


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_exactly_the_pairs_above_the_threshold_are_found(similarity):
    """Against the definition, by brute force: nothing that stays is similar, and whatever goes is similar to something that stays."""
    texts = random_texts(80)
    kept = set(without_duplicates(texts, range(80), similarity))
    assert 0 < len(kept) < 80
    for index in range(80):
        earlier = [other for other in kept if other < index and is_duplicate(texts[index], texts[other], similarity)]
        assert (index in kept) == (not earlier)


def random_texts(num):
    """Short runs of a small vocabulary, so that many are alike."""
    sizes = 3 + WORDS.child("sizes").integers(num, 4)
    return [" ".join(np.array(VOCABULARY)[WORDS.integers(size, 3, stream=index)]) for index, size in enumerate(sizes)]


def is_duplicate(one, other, similarity):
    first, second = ({" ".join(text.split()[start : start + 3]) for start in range(len(text.split()) - 2)} for text in (one, other))
    contained = f" {one} " in f" {other} " or f" {other} " in f" {one} "
    return contained or len(first & second) >= similarity * len(first | second) - 1e-9
