"""Word problems as documents and prompts: which are for training, which for testing, and how they stand in a slot."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.igsm_check import check_solution
from megatron_exp.experiments.igsm_draws import Draws, draws_of
from megatron_exp.experiments.igsm_problem import MODULUS, draw_problem
from megatron_exp.experiments.igsm_text import Written, write
from megatron_exp.seeding import Words

TEST = 1 << 44
"""Item numbers from here on are test problems; the number of operations and that of the stream follow."""
TRAINING_BINS = range(16)
"""Of the 23 bins of canonical traces; the others are for testing."""
_MOST_DRAWN_OPERATIONS = 15
"""The number of operations is the smaller of two uniform draws up to here, as in iGSM's medium setting."""
_NUM_SHOTS_POOL = 64
_LEAST_YIELD = 0.002
"""With fewer documents than this fitting, the settings cannot be meant."""
_AT_ONCE = 512

_PREAMBLES = (
    "All numbers are integers modulo 23.",
    "Calculate with whole numbers only, and modulo 23.",
    "In this problem arithmetic is done modulo 23, on integers.",
    "Every quantity is an integer; results are taken modulo 23.",
    "Work with integers, keeping the remainder of a division by 23.",
    "Numbers here are whole, from 0 to 22, and wrap around at 23.",
)


@dataclass(frozen=True, eq=False)
class Documents:
    """The problems of one experiment. max_edges: of a problem's world. most_tokens: of a document, EOS included."""

    context: Context
    max_edges: int
    most_tokens: int

    def training(self, num: int, max_operations: int) -> Iterator[tuple[int, Written]]:
        """`num` numbered problems from the training bins."""
        yield from self._accepted("train", num, lambda draws: _draw_operations(draws, max_operations), self._is_for_training)

    def testing(self, operations: int, num: int) -> Iterator[tuple[int, Written]]:
        """`num` numbered problems from the test bins, answers equally frequent to within one."""
        # The quotas' remainder goes to answers drawn by key, so that no answer is the more frequent one everywhere.
        favoured = set(self.context.words("answers", operations).permutation(MODULUS)[: num % MODULUS].tolist())
        left = Counter({answer: num // MODULUS + (answer in favoured) for answer in range(MODULUS)})

        def is_wanted(number: int, written: Written) -> bool:
            if written.trace_bin in TRAINING_BINS or not left[written.answer] or not self._fits(number, written):
                return False
            left[written.answer] -= 1
            return True

        yield from self._accepted(f"test {operations}", num, lambda draws: operations, is_wanted, base=TEST | operations << 32)

    def shots(self, max_operations: int) -> list[Written]:
        """Worked examples for prompts: from the training bins, never inserted."""
        drawn = self._accepted("shots", _NUM_SHOTS_POOL, lambda draws: _draw_operations(draws, max_operations), self._is_for_training)
        return [written for _, written in drawn]

    def tokens(self, number: int, written: Written) -> np.ndarray:
        """int32: the training document with EOS on both sides."""
        text = f"{self._head(number, written)} {written.solution}\nAnswer: {written.answer}"
        eos = [self.context.tokenizer.eos_id]
        return np.concatenate([eos, self._encode(text), eos]).astype(np.int32)

    def pair(self, number: int, written: Written, wrong: int) -> tuple[np.ndarray, np.ndarray, int]:
        """int32 tokens up to the solution's last value, right and wrong, after an EOS; and where they part."""
        stem, mark, last = written.solution.rpartition(" = ")
        assert mark and last == f"{written.answer}.", written.solution
        head = f"{self._head(number, written)} {stem} ="
        encode, eos = self.context.tokenizer.encode, [self.context.tokenizer.eos_id]
        right, other = (np.concatenate([eos, encode(f"{head} {value}.")]).astype(np.int32) for value in (written.answer, wrong))
        shortest = min(len(right), len(other))
        start = int(np.append(right[:shortest] != other[:shortest], True).argmax())
        return right, other, min(start, shortest - 1)

    @cached_property
    def _encode(self) -> Callable[[str], np.ndarray]:
        """The tokenizer's, which keeps the last text: what was found to fit is asked for next."""
        return lru_cache(1)(self.context.tokenizer.encode)

    def _head(self, number: int, written: Written) -> str:
        preamble = _preamble(self.context.words("preamble"), number)
        return f"{preamble}\nProblem: {written.problem}\nSolution:"

    def _is_for_training(self, number: int, written: Written) -> bool:
        return written.trace_bin in TRAINING_BINS and self._fits(number, written)

    def _fits(self, number: int, written: Written) -> bool:
        return len(self.tokens(number, written)) <= self.most_tokens

    def _accepted(
        self, purpose: str, num: int, operations: Callable[[Draws], int], is_wanted: Callable[[int, Written], bool], base: int = 0
    ) -> Iterator[tuple[int, Written]]:
        """The first `num` problems of the purpose's streams that are wanted, each checked step by step; numbered by stream, from `base` on."""
        words, found, tried = self.context.words("problems", purpose), 0, 0
        while found < num:
            for number, draws in enumerate(draws_of(words, tried, _AT_ONCE), start=base + tried):
                written = write(draw_problem(draws, operations(draws), self.max_edges))
                if written is None or not is_wanted(number, written):
                    continue
                verdict = check_solution(written.problem, written.solution)
                assert verdict.is_right and verdict.answer == written.answer, (verdict.fault, written)
                yield number, written
                found += 1
                if found == num:
                    return
            tried += _AT_ONCE
            if found < _LEAST_YIELD * tried and tried >= 4 * _AT_ONCE:
                raise UserError(
                    f"Experiment {self.context.experiment}: of {tried} drawn problems ({purpose}) {found} are usable in {self.most_tokens} tokens. "
                    "Lower max_ops, extra_ops or max_edges, or raise max_tokens or geometry.sequence_length."
                )


def _preamble(words: Words, number: int) -> str:
    block, place = divmod(number, _AT_ONCE)
    return _preambles(words, block)[place]


@lru_cache(maxsize=8)
def _preambles(words: Words, block: int) -> list[str]:
    """Of `_AT_ONCE` neighbouring problems: one Philox call each would take longer than writing the problem."""
    drawn = words.one_each(len(_PREAMBLES), np.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE, dtype=np.uint64))
    return [_PREAMBLES[index] for index in drawn]


def _draw_operations(draws: Draws, most: int) -> int:
    while True:
        operations = 1 + min(draws.below(_MOST_DRAWN_OPERATIONS), draws.below(_MOST_DRAWN_OPERATIONS))
        if operations <= most:
            return operations


def wrong_value(context: Context, number: int, answer: int) -> int:
    """One of the other 22 values, by key."""
    return int((answer + 1 + context.words("wrong").integers(1, MODULUS - 1, number)[0]) % MODULUS)


def few_shot_prompt(context: Context, number: int, problem: str, shots: Sequence[Written], num_shots: int) -> np.ndarray:
    """int32: a preamble, `num_shots` worked problems drawn for this number, and the problem, after an EOS."""
    words = context.words("prompt")
    chosen = [shots[index] for index in words.child("shots").choice(len(shots), num_shots, number)] if num_shots else []
    lines = [_preamble(words, number)]
    for place, shot in enumerate(chosen, start=1):
        lines += [f"Problem {place}: {shot.problem}", f"Solution: {shot.solution}", f"Answer: {shot.answer}"]
    lines += [f"Problem {num_shots + 1}: {problem}" if num_shots else f"Problem: {problem}", "Solution:"]
    text = "\n".join(lines)
    return np.concatenate([[context.tokenizer.eos_id], context.tokenizer.encode(text)]).astype(np.int32)
