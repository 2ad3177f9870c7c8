"""How much of a text stands in another, in order: ROUGE-L (Lin, "ROUGE", ACL workshop 2004)."""

import re

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l_recall(reference: str, text: str) -> float:
    """Longest common subsequence of words over the words of the reference, in [0, 1]; lower case, no stemming. NaN for a reference without words."""
    expected, found = (_WORD.findall(one.lower()) for one in (reference, text))
    if not expected:
        return float("nan")
    lengths = [0] * (len(found) + 1)
    for word in expected:
        diagonal = 0
        for column, other in enumerate(found, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1] / len(expected)
