import math

import pytest

from megatron_exp.statistics.rouge import rouge_l_recall


@pytest.mark.parametrize(
    ("text", "recall"),
    [
        ("the cat sat on the mat", 1.0),
        ("The cat, sat on THE mat!", 1.0),
        ("a dog and the cat sat on some mat today", 5 / 6),
        ("mat the on sat cat the", 3 / 6),  # all words, but in order only: the, on (or sat, or cat), the
        ("", 0.0),
    ],
)
def test_recall_is_the_share_of_reference_words_found_in_order(text, recall):
    assert rouge_l_recall("the cat sat on the mat", text) == pytest.approx(recall)


def test_more_text_than_the_reference_costs_nothing_and_a_reference_without_words_has_no_recall():
    assert rouge_l_recall("one two", "zero one and two and three") == 1.0
    assert math.isnan(rouge_l_recall("...", "one"))
