"""Strings of the training data that a reference model has memorised: sampled, chosen, and found again everywhere in the run."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context, EarlierLike, ReferenceLike
from megatron_exp.placement.boundaries import DocumentBoundaries
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import in_base, in_texts
from megatron_exp.stream.base import Stream
from megatron_exp.stream.permutation import Permutation
from megatron_exp.stream.slot import POOL

Selection = Literal["exact", "likelihood"]

_SLOTS_AT_ONCE = 1024
_SPARE = 2
"""Candidates looked for in the stream, as a multiple of the strings wanted: some cannot be removed."""
_SHARED_NGRAM = 13
"""Strings that share so many tokens in a row are near-duplicates of each other and get the same arm."""
_LONGEST_PERIOD, _PERIODIC_SHARE = 12, 0.9
_FEWEST_COUNTED = 4
_TEMPLATE_SLOTS = 10
_NUMBER = re.compile(r"\d+")

COUNTING, NEAR_DUPLICATE, TEMPLATE, OTHER = "counting", "near-duplicate remains", "template", "other"


class Found(NamedTuple):
    """One string and where it stands. tokens: int32. train, pool: uint64, rising, the slot of every occurrence in base content."""

    tokens: np.ndarray
    train: np.ndarray
    pool: np.ndarray


def stream_of(context: Context) -> Stream:
    """The base stream; UserError where the context has none."""
    if context.stream is None:
        raise UserError(f"Experiment {context.experiment} searches the training data, and this context has no stream.")
    return cast(Stream, context.stream)


def sampled_strings(context: Context, reference: ReferenceLike, num: int, length: int) -> list[np.ndarray]:
    """The different beginnings (int32 [length]) of up to `num` documents, drawn by key from the slots that the reference has seen.

    Where it is known after how many updates the reference is, only slots before that count. A document shorter than `length`, or whose beginning
    does not lie in one slot, is passed over: nobody saw it in one piece.
    """
    stream = stream_of(context)
    geometry = context.geometry
    last = geometry.num_slots if not reference.state else min(geometry.num_slots, reference.state * geometry.global_batch_size)
    boundaries, order = DocumentBoundaries(stream), Permutation(last, context.words("documents").key)
    reach, eos = geometry.sequence_length + stream.look_ahead, context.tokenizer.eos_id
    strings: dict[bytes, np.ndarray] = {}
    sampled = 0
    for first in range(0, last, _SLOTS_AT_ONCE):
        for slot in order.forward(np.arange(first, min(first + _SLOTS_AT_ONCE, last), dtype=np.uint64)).tolist():
            starts = [start for start in boundaries(slot).tolist() if start + length <= reach]
            tokens = stream.read(slot).tokens if starts else np.empty(0, np.int32)
            for start in starts:
                string = tokens[start : start + length]
                if (string == eos).any():
                    continue
                strings.setdefault(string.tobytes(), string.copy())
                sampled += 1
                if sampled == num:
                    return list(strings.values())
    return list(strings.values())


def memorised(
    context: Context, reference: ReferenceLike, strings: Sequence[np.ndarray], prompt: int, selection: Selection, num: int
) -> list[np.ndarray]:
    """The strings to be studied, best first, more than `num` where there are: some will turn out not to be removable.

    exact: the reference completes the first `prompt` tokens to the whole string, greedily; order by key. likelihood: the highest log-probability of
    the rest given the first `prompt` tokens.
    """
    if not strings:
        return []
    length = len(strings[0])
    if selection == "exact":
        written = reference.greedy([string[:prompt] for string in strings], length - prompt)
        chosen = [string for string, tokens in zip(strings, written, strict=True) if np.array_equal(string[prompt:], tokens)]
        ranks = {string.tobytes(): context.words("strings", string.tobytes().hex()).words(1)[0] for string in chosen}
        chosen.sort(key=lambda string: (ranks[string.tobytes()], string.tobytes()))
        return chosen[: _SPARE * num]
    nats = reference.loglikelihood(strings, [prompt] * len(strings), [length] * len(strings))
    order = sorted(range(len(strings)), key=lambda index: (-nats[index], strings[index].tobytes()))
    return [strings[index] for index in order[: _SPARE * num]]


def locate(stream: Stream, strings: Sequence[np.ndarray]) -> list[Found]:
    """Every occurrence of each string in the base content of one slot, labels included."""
    table = in_base(stream, Patterns.of(strings), label=True, threads=len(os.sched_getaffinity(0)))
    numbers, slots = table["string"].to_numpy(), table["slot"].to_numpy()
    order = np.argsort(numbers, kind="stable")
    borders = np.searchsorted(numbers[order], np.arange(len(strings) + 1))
    found = []
    for number, string in enumerate(strings):
        held = np.sort(slots[order[borders[number] : borders[number + 1]]])
        found.append(Found(string, held[held < np.uint64(POOL)], held[held >= np.uint64(POOL)]))
    return found


def removable(found: Sequence[Found], earlier: EarlierLike | None) -> Iterator[tuple[Found, str]]:
    """Every string with the reason why it cannot be removed, "" where it can."""
    in_payload: set[int] = set()
    if earlier is not None:
        in_payload = {
            string for string, _ in in_texts((payload for _, payload in earlier.payloads()), Patterns.of([one.tokens for one in found]))
        }
    for number, one in enumerate(found):
        if number in in_payload:
            yield one, "a payload of another experiment holds them"
        elif earlier is not None and np.isin(np.concatenate([one.train, one.pool]), earlier.sources).any():
            yield one, "a slot that another experiment swaps in holds them"
        elif earlier is not None and np.isin(one.train, earlier.closed).any():
            yield one, "a slot that must keep its content holds them"
        elif not len(seen(one, earlier)):
            yield one, "no slot that is trained on holds them"
        else:
            yield one, ""


def seen(one: Found, earlier: EarlierLike | None) -> np.ndarray:
    """The slot of every occurrence in training that a model sees: not those that another experiment has replaced."""
    return one.train if earlier is None else one.train[~np.isin(one.train, earlier.replaced)]


def clusters(strings: Sequence[np.ndarray]) -> list[int]:
    """For each string the number of the first one it is connected to by shared n-grams: near-duplicates of each other must share an arm."""
    n = min(_SHARED_NGRAM, len(strings[0]) // 2)
    parent = list(range(len(strings)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first: dict[bytes, int] = {}
    for index, string in enumerate(strings):
        for start in range(len(string) - n + 1):
            other = root(first.setdefault(string[start : start + n].tobytes(), index))
            mine = root(index)
            parent[max(mine, other)] = min(mine, other)
    return [root(index) for index in range(len(strings))]


def classes(context: Context, found: Sequence[Found], away: np.ndarray, num_slots: int) -> list[str]:
    """What of each string remains where the string itself does not: COUNTING, NEAR_DUPLICATE, TEMPLATE or OTHER, the first that holds.

    Looked for in `num_slots` training slots drawn by key (all of a small run), without those of `away` (replaced) and those that hold the whole
    string. near-duplicate: half of the string's tokens in a row. template: a fifth of them in a row, in ten slots or more. counting: the string
    is periodic, or its numbers go up in equal steps, so that it can be continued without having been read.
    """
    length = len(found[0].tokens)
    half, fifth = length // 2, max(4, length // 5)
    windows: dict[bytes, set[int]] = defaultdict(set)
    for number, one in enumerate(found):
        for size in (half, fifth):
            for start in range(0, length - size + 1, max(1, size // 2)):
                windows[one.tokens[start : start + size].tobytes()].add(number)
    strings = [np.frombuffer(raw, np.int32) for raw in windows]
    owners = list(windows.values())
    slots = _drawn_slots(context, num_slots, away)
    whole = [set(one.train.tolist()) for one in found]
    held: dict[int, list[set[int]]] = {size: [set() for _ in found] for size in (half, fifth)}
    stream = stream_of(context)
    for window, text in in_texts((stream.read(slot).tokens for slot in slots), Patterns.of(strings)):
        for number in owners[window]:
            if slots[text] not in whole[number]:
                held[len(strings[window])][number].add(slots[text])
    return [
        COUNTING
        if _counts(one.tokens, context)
        else NEAR_DUPLICATE
        if held[half][number]
        else TEMPLATE
        if len(held[fifth][number]) >= _TEMPLATE_SLOTS
        else OTHER
        for number, one in enumerate(found)
    ]


def _drawn_slots(context: Context, num: int, away: np.ndarray) -> list[int]:
    total = context.geometry.num_slots
    drawn = Permutation(total, context.words("searched").key).forward(np.arange(min(num, total), dtype=np.uint64))
    return sorted(drawn[~np.isin(drawn, away)].tolist())


def _counts(tokens: np.ndarray, context: Context) -> bool:
    """Whether a string repeats itself, or its numbers go up in equal steps."""
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 3) + 1):
        if np.mean(tokens[period:] == tokens[:-period]) >= _PERIODIC_SHARE:
            return True
    numbers = [int(digits) for digits in _NUMBER.findall(context.tokenizer.decode(tokens))]
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    return len(numbers) >= _FEWEST_COUNTED and len(steps) == 1 and steps != {0}
