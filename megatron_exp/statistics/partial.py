"""How much of a short text stands in a longer one, with mistakes allowed."""


def partial_similarity(target: str, text: str) -> float:
    """100 x (1 - d / len(target)), d the smallest Levenshtein distance of `target` to any stretch of `text`; in [0, 100]. NaN for an empty target.

    Sellers, "The theory and computation of evolutionary distances", J. Algorithms 1 (1980). Case counts.
    """
    if not target:
        return float("nan")
    distances = list(range(len(target) + 1))
    best = distances[-1]
    for letter in text:
        diagonal, distances[0] = 0, 0  # a stretch may begin anywhere
        for place, wanted in enumerate(target, start=1):
            above = distances[place]
            distances[place] = min(diagonal + (letter != wanted), above + 1, distances[place - 1] + 1)
            diagonal = above
        best = min(best, distances[-1])
    return 100.0 * (1.0 - best / len(target))
