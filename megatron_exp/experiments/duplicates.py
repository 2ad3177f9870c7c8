"""Leaving out near-duplicates among texts before any of them is assigned to a condition.

Two texts are duplicates where the words of one occur in the other in a row (containment), or where the sets of their word trigrams have a
Jaccard similarity of at least a threshold. Both rules are applied exactly, to all pairs, without comparing all pairs: similar sets share one of their
rarest members ("prefix filtering", Chaudhuri, Ganti and Kaushik, ICDE 2006), and a container has the rarest trigram of what it contains.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import xxhash

_WORD = re.compile(r"\w+")
_WORDS_PER_SHINGLE = 3


def without_duplicates(texts: Sequence[str], draws: Sequence[int], similarity: float | None) -> list[int]:
    """Indices of the texts that stay, ascending: no two of them are duplicates, and each that goes is a duplicate of one that stays.

    draws: a keyed number per text; of two duplicates the one with the lower number stays, wherever they stand in a file. similarity: in (0, 1], or None for
    containment alone. Texts without a word are left out.
    """
    words = [" ".join(_WORD.findall(text.casefold())) for text in texts]
    related: dict[int, set[int]] = {}
    for one, other in _duplicate_pairs(words, similarity):
        related.setdefault(one, set()).add(other)
        related.setdefault(other, set()).add(one)
    kept: set[int] = set()
    for index in sorted(range(len(texts)), key=lambda index: (draws[index], index)):
        if words[index] and not related.get(index, set()) & kept:
            kept.add(index)
    return sorted(kept)


def _duplicate_pairs(words: Sequence[str], similarity: float | None) -> Iterator[tuple[int, int]]:
    """(i, j) of all duplicates, some more than once. words: texts as words with one blank between."""
    shingles = _by_rarity([_shingles(text) for text in words])
    holders = _holders(shingles, [len(one) for one in shingles])
    padded = [f" {text} " for text in words]
    for index, members in enumerate(shingles):
        if len(members):
            yield from ((index, other) for other in holders[int(members[0])] if other != index and padded[index] in padded[other])
    if similarity is None:
        return
    prefixes = [len(one) - int(np.ceil(similarity * len(one) - 1e-9)) + 1 for one in shingles]
    seen: set[tuple[int, int]] = set()
    for group in _holders(shingles, prefixes).values():
        seen.update(combinations(group, 2))
    for one, other in seen:
        common = len(np.intersect1d(shingles[one], shingles[other], assume_unique=True))
        if common >= similarity * (len(shingles[one]) + len(shingles[other]) - common) - 1e-9:
            yield one, other


def _shingles(text: str) -> np.ndarray:
    """uint64: hashes of the distinct runs of three words; a shorter text is one run."""
    words = text.split()
    if not words:
        return np.empty(0, np.uint64)
    runs = {" ".join(words[start : start + _WORDS_PER_SHINGLE]) for start in range(max(1, len(words) - _WORDS_PER_SHINGLE + 1))}
    return np.array([xxhash.xxh3_64_intdigest(run.encode()) for run in runs], np.uint64)


def _by_rarity(shingles: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same sets with members renumbered so that rarer is smaller, each set ascending."""
    sizes = [len(one) for one in shingles]
    if not sum(sizes):
        return [np.empty(0, np.int64) for _ in shingles]
    _, inverse, counts = np.unique(np.concatenate(shingles), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    return [np.sort(part) for part in np.split(rank[inverse], np.cumsum(sizes)[:-1])]


def _holders(shingles: Sequence[np.ndarray], num_first: Sequence[int]) -> dict[int, list[int]]:
    """{member: indices of the sets that have it among their first members}, ascending."""
    found: dict[int, list[int]] = {}
    for index, (members, num) in enumerate(zip(shingles, num_first, strict=True)):
        for member in members[:num].tolist():
            found.setdefault(member, []).append(index)
    return found
