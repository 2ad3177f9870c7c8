"""The text of a word problem and of its shortest solution, and the canonical trace by which training and test problems are told apart."""

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_exp.experiments.igsm_draws import Draws
from megatron_exp.experiments.igsm_problem import MODULUS, Definition, Problem

LETTERS = string.ascii_letters
NUM_BINS = 23
"""Canonical traces fall into so many bins by their hash."""
FEWEST_FOR_TEMPLATE = 5
"""From so many operations on a trace is the solution's template, without names and numbers. There is one template of one operation and there are four of
two, so shorter solutions keep names and numbers in their trace: else whole kinds of problems would be missing on one side."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """problem and solution as text; answer in 0..22; trace: the solution with letters numbered as they come, of longer ones the template alone."""

    problem: str
    solution: str
    answer: int
    num_operations: int
    trace: str

    @property
    def trace_bin(self) -> int:
        """In [0, NUM_BINS)."""
        return int.from_bytes(hashlib.sha256(self.trace.encode()).digest()[:8], "little") % NUM_BINS


def write(problem: Problem) -> Written | None:
    """Problem and solution as text; None where the solution needs more letters than there are."""
    solution = _Solution(problem, problem.draws)
    try:
        for parameter in problem.order:
            solution.add(parameter)
    except IndexError:
        return None
    statement = ". ".join(problem.draws.sample(_sentences(problem), len(problem.definitions)))
    question = _split_name(problem, problem.order[-1])
    return Written(
        problem=f"{statement}. How many {question[1]} does {question[0]} have?",
        solution=" ".join(solution.steps),
        answer=problem.answer,
        num_operations=problem.num_operations,
        trace=" ".join(solution.trace),
    )


def _split_name(problem: Problem, parameter: int) -> tuple[str, str]:
    """(what holds, what is held): of an instance parameter two things, of an abstract one a thing and a category."""
    if parameter < len(problem.world.edges):
        layer, parent, child = problem.world.edges[parameter]
        return problem.names[layer][parent], problem.names[layer + 1][child]
    total = problem.world.total(parameter)
    return problem.names[total.layer][total.parent], problem.category(total.category)


def name_of(problem: Problem, parameter: int) -> str:
    """What a parameter is called in both texts."""
    return "'s ".join(_split_name(problem, parameter))


def _sentences(problem: Problem) -> list[str]:
    return [f"The number of each {name_of(problem, edge)} equals {_phrase(problem, one)}" for edge, one in problem.definitions.items()]


def _phrase(problem: Problem, definition: Definition) -> str:
    if not definition.terms:
        return str(definition.number)
    names = [f"each {name_of(problem, term)}" for term in definition.terms]
    kind = "difference" if definition.combination == "-" else "sum"
    combined = names[0] if len(names) == 1 else f"the {kind} of {', '.join(names[:-1])} and {names[-1]}"
    if definition.operation is None:
        return combined
    return f"{definition.number} {'more than' if definition.operation == '+' else 'times as much as'} {combined}"


@dataclass
class _Solution:
    """Steps written so far. letters: still free, in the order of the alphabet. bound: {parameter: (letter, value)}."""

    problem: Problem
    draws: Draws
    letters: list[str] = field(default_factory=lambda: list(LETTERS))
    bound: dict[int, tuple[str, int]] = field(default_factory=dict)
    number_of: dict[str, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    def add(self, parameter: int) -> None:
        """The sentence that defines a parameter; IndexError where letters have run out."""
        is_instance = parameter < len(self.problem.world.edges)
        letter, name = self._letter(), name_of(self.problem, parameter)
        self.steps.append(f"Define {name} as {letter};")
        self.trace.append(f"{name if self.is_exact else 'instance' if is_instance else 'abstract'} {self.number_of[letter]}")
        if is_instance:
            self._instance(self.problem.definitions[parameter], letter)
        else:
            total = self.problem.world.total(parameter)
            parts = [self.bound[part] for part in total.parts]
            if total.is_product:
                pairs = list(zip(parts[::2], parts[1::2], strict=True))
                if len(pairs) == 1:
                    self._last(letter, "*", pairs[0])
                else:
                    self._sum([self._between("*", pair) for pair in pairs], letter)
            else:
                self._sum(parts, letter)
        self.bound[parameter] = (letter, self.problem.values[parameter])

    def _instance(self, definition: Definition, letter: str) -> None:
        parts = [self.bound[term] for term in definition.terms]
        if definition.number is None:
            if definition.combination == "-":
                self._last(letter, "-", (parts[0], parts[1]))
            else:
                self._sum(parts, letter)
        elif definition.operation is None:
            self.steps.append(f"so {letter} = {definition.number}.")
            self.trace.append(f"so {self.number_of[letter]} = {self._shown(definition.number)}.")
        else:
            if definition.combination == "-":
                combined = self._between("-", (parts[0], parts[1]))
            else:
                combined = parts[0]
                for part in parts[1:]:
                    combined = self._between("+", (combined, part))
            self._last(letter, definition.operation, ((str(definition.number), definition.number), combined))

    def _sum(self, parts: Sequence[tuple[str, int]], letter: str) -> None:
        if len(parts) == 1:
            self.steps.append(f"so {letter} = {parts[0][0]} = {parts[0][1]}.")
            self.trace.append(f"so {self.number_of[letter]} = {self.number_of[parts[0][0]]} = {self._shown(parts[0][1])}.")
            return
        combined = parts[0]
        for part in parts[1:-1]:
            combined = self._between("+", (combined, part))
        self._last(letter, "+", (combined, parts[-1]))

    def _between(self, sign: str, pair: tuple[tuple[str, int], tuple[str, int]]) -> tuple[str, int]:
        """One lettered step of its own."""
        letter = self._letter()
        value = self._write(letter, sign, pair, "", ";")
        return letter, value

    def _last(self, letter: str, sign: str, pair: tuple[tuple[str, int], tuple[str, int]]) -> None:
        self._write(letter, sign, pair, "so ", ".")

    def _write(self, letter: str, sign: str, pair: tuple[tuple[str, int], tuple[str, int]], before: str, after: str) -> int:
        (left, a), (right, b) = pair
        value = (a + b if sign == "+" else a - b if sign == "-" else a * b) % MODULUS
        self.steps.append(f"{before}{letter} = {left} {sign} {right} = {a} {sign} {b} = {value}{after}")
        first, second, result = map(self._shown, (a, b, value))
        operands = f"{self.number_of.get(left, 'n')} {sign} {self.number_of[right]}"
        self.trace.append(f"{before}{self.number_of[letter]} = {operands} = {first} {sign} {second} = {result}{after}")
        return value

    @property
    def is_exact(self) -> bool:
        """Whether the trace keeps names and numbers."""
        return self.problem.num_operations < FEWEST_FOR_TEMPLATE

    def _shown(self, number: int) -> int:
        """A number as the trace has it."""
        return number if self.is_exact else 0

    def _letter(self) -> str:
        letter = self.letters.pop(self.draws.below(len(self.letters)) if self.letters else 0)
        self.number_of[letter] = len(self.number_of)
        return letter
