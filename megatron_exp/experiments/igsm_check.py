"""Checking a solution step by step, from the texts alone.

The problem's text is parsed and solved by recursion, independently of the generator; then every sentence of the solution is held against it. So the
same check serves generated problems and what a model wrote.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_exp.experiments.igsm_problem import MODULUS
from megatron_exp.experiments.igsm_words import category_of, layer_of

Parameter = tuple[str, str]
"""(what holds, what is held): a thing and a thing, or a thing and a category."""

_STATEMENT = re.compile(r"The number of each (.+?)'s (.+?) equals (.+)")
_QUESTION = re.compile(r"How many (.+?) does (.+?) have\?")
_NUMBERED = re.compile(r"(\d+) (more than|times as much as) (.+)")
_TERM = re.compile(r"each (.+?)'s (.+?)(?=, each |(?: and each )|$)")
_SENTENCE = re.compile(r"Define (.+?)'s (.+?) as ([A-Za-z]); (.+)")
_CLAUSE = re.compile(r"([A-Za-z]) = (?:([A-Za-z]|\d+)(?: ([-+*]) ([A-Za-z]|\d+))? = )??(?:(\d+) ([-+*]) (\d+) = )?(\d+)")
_MOST_DEPTH = 200


class Stated(NamedTuple):
    """What a problem says of an instance parameter. operation: "more than", "times as much as" or None; is_difference: of two terms."""

    number: int | None
    operation: str | None
    is_difference: bool
    terms: tuple[Parameter, ...]


@dataclass
class Reading:
    """A problem's text as definitions and a question."""

    stated: dict[Parameter, Stated]
    question: Parameter
    values: dict[Parameter, int | None] = field(default_factory=dict)

    def parts(self, parameter: Parameter) -> tuple[Parameter, ...]:
        """What a parameter is computed from directly; KeyError where the problem has no such parameter."""
        if parameter in self.stated:
            return self.stated[parameter].terms
        holder, held = parameter
        if held not in layer_of():
            raise KeyError(parameter)
        found: list[Parameter] = []
        for parent, child in self.stated:
            if parent == holder:
                if category_of()[child] == held:
                    found.append((parent, child))
                elif layer_of()[held][1] > layer_of()[category_of()[child]][1] and self._is_held((child, held)):
                    found += [(parent, child), (child, held)]
        if not found:
            raise KeyError(parameter)
        return tuple(found)

    def _is_held(self, parameter: Parameter) -> bool:
        try:
            return bool(self.parts(parameter))
        except KeyError:
            return False

    def is_product(self, parameter: Parameter) -> bool:
        """Whether an abstract parameter sums products."""
        return parameter not in self.stated and self.parts(parameter)[1:] != () and self.parts(parameter)[1][1] == parameter[1]

    def signs(self, parameter: Parameter) -> str:
        """The signs of a parameter's definition, sorted."""
        num, stated = len(self.parts(parameter)), self.stated.get(parameter)
        if stated is None:
            joined = "*" * (num // 2) + "+" * (num // 2 - 1) if self.is_product(parameter) else "+" * (num - 1)
        else:
            joined = ("-" if stated.is_difference else "+") * (num - 1)
            if num and stated.number is not None:
                joined += "*" if stated.operation == "times as much as" else "+"
        return "".join(sorted(joined))

    def value(self, parameter: Parameter, depth: int = 0) -> int:
        """The parameter's value modulo 23. Raises KeyError where it is not defined, RecursionError where definitions run in circles."""
        if depth > _MOST_DEPTH:
            raise RecursionError(parameter)
        known = self.values.get(parameter)
        if known is None:
            known = self.values[parameter] = self._compute(parameter, depth + 1) % MODULUS
        return known

    def _compute(self, parameter: Parameter, depth: int) -> int:
        parts = [self.value(part, depth) for part in self.parts(parameter)]
        stated = self.stated.get(parameter)
        if stated is None:
            return sum(a * b for a, b in zip(parts[::2], parts[1::2], strict=True)) if self.is_product(parameter) else sum(parts)
        combined = parts[0] - parts[1] if stated.is_difference else sum(parts)
        if stated.number is None:
            return combined
        return stated.number * combined if stated.operation == "times as much as" else stated.number + combined

    def needed(self) -> set[Parameter]:
        """All parameters that the question rests on, itself included."""
        found, waiting = {self.question}, [self.question]
        while waiting:
            for part in self.parts(waiting.pop()):
                if part not in found:
                    found.add(part)
                    waiting.append(part)
        return found


def read_problem(text: str) -> Reading:
    """ValueError where the text is no problem of this kind."""
    *sentences, last = text.strip().split(". ")
    question = _QUESTION.fullmatch(last)
    if not question:
        raise ValueError(f"no question: {last!r:.80}")
    stated = {}
    for sentence in sentences:
        found = _STATEMENT.fullmatch(sentence)
        if not found:
            raise ValueError(f"no statement: {sentence!r:.80}")
        if (found[1], found[2]) in stated:
            raise ValueError(f"stated twice: {sentence!r:.80}")
        stated[found[1], found[2]] = _read_phrase(found[3])
    return Reading(stated, (question[2], question[1]))


def _read_phrase(phrase: str) -> Stated:
    if phrase.isdecimal():
        return Stated(int(phrase), None, False, ())
    numbered = _NUMBERED.fullmatch(phrase)
    rest = numbered[3] if numbered else phrase
    terms = tuple((holder, held) for holder, held in _TERM.findall(rest))
    if not terms:
        raise ValueError(f"no definition: {phrase!r:.80}")
    return Stated(int(numbered[1]) if numbered else None, numbered[2] if numbered else None, rest.startswith("the difference of "), terms)


@dataclass
class Verdict:
    """is_right: every step right, none unnecessary, the last one the question's. num_right of num_steps. fault: the first one, "" if none.

    answer: the value of the last step that could be read.
    """

    num_steps: int = 0
    num_right: int = 0
    num_unnecessary: int = 0
    answer: int | None = None
    fault: str = ""

    @property
    def is_right(self) -> bool:
        return self.fault == "" and self.num_steps > 0

    def blame(self, fault: str) -> None:
        """Keep the first fault."""
        self.fault = self.fault or fault


@dataclass
class _Board:
    """What letters stand for.

    sources, signs: the parameters and numbers behind a letter of an intermediate step and what joins them; behind a parameter's, itself and nothing.
    """

    value: dict[str, int] = field(default_factory=dict)
    sources: dict[str, frozenset[Parameter | int]] = field(default_factory=dict)
    signs: dict[str, str] = field(default_factory=dict)


def check_solution(problem: Reading | str, solution: str) -> Verdict:
    """Hold every step of a solution against its problem (a text or `read_problem` of it)."""
    reading = read_problem(problem) if isinstance(problem, str) else problem
    verdict, board, done = Verdict(), _Board(), set[Parameter]()
    needed = reading.needed()
    last: Parameter | None = None
    for sentence in filter(None, (part.strip() for part in solution.strip().removesuffix(".").split(". "))):
        verdict.num_steps += 1
        found = _SENTENCE.fullmatch(sentence)
        if not found:
            verdict.blame(f"step {verdict.num_steps} is no definition: {sentence!r:.60}")
            continue
        last = (found[1], found[2])
        fault = _check_step(reading, board, last, found[3], found[4])
        if not fault and last in done:
            fault = "defines something twice"
        done.add(last)
        verdict.answer = board.value.get(found[3], verdict.answer)
        verdict.num_unnecessary += last not in needed
        verdict.num_right += not fault
        if fault or last not in needed:
            verdict.blame(f"step {verdict.num_steps} {fault or 'is not necessary'}")
    if last != reading.question:
        verdict.blame("the last step is not what is asked for")
    return verdict


def _check_step(reading: Reading, board: _Board, parameter: Parameter, letter: str, text: str) -> str:
    """What is wrong with one definition, "" where nothing is; binds its letters."""
    try:
        truth, parts = reading.value(parameter), reading.parts(parameter)
    except (KeyError, RecursionError):
        return "defines what the problem does not have"
    if letter in board.value:
        return f"uses the letter {letter} again"
    clauses = text.split("; ")
    if not clauses[-1].startswith("so "):
        return "has no conclusion"
    for number, clause in enumerate([*clauses[:-1], clauses[-1].removeprefix("so ")], start=1):
        found = _CLAUSE.fullmatch(clause)
        if not found:
            return f"cannot be read: {clause!r:.40}"
        if (found[1] == letter) != (number == len(clauses)):
            return "defines another letter than it says"
        if fault := _bind(board, found):
            return fault
    stated = reading.stated.get(parameter)
    wanted = frozenset(parts) | (frozenset({stated.number}) if stated and stated.number is not None else frozenset())
    used, board.sources[letter] = board.sources[letter], frozenset({parameter})
    signs, board.signs[letter] = board.signs[letter], ""
    if used != wanted:
        return "does not use what the parameter is defined by"
    if signs != reading.signs(parameter):
        return "adds, subtracts or multiplies where the definition does not"
    return "" if board.value[letter] == truth else "has a wrong value"


def _bind(board: _Board, clause: re.Match[str]) -> str:
    """Check one equation chain and bind its letter."""
    letter, left, sign, right, a, sign_again, b, value = clause.groups()
    if letter in board.value:
        return f"uses the letter {letter} again"
    operands = [operand for operand in (left, right) if operand is not None]
    unknown = [operand for operand in operands if operand.isalpha() and operand not in board.value]
    if unknown:
        return f"uses the letter {unknown[0]} before it is defined"
    numbers = [board.value[operand] if operand.isalpha() else int(operand) for operand in operands]
    if sign is not None and (sign_again != sign or [int(a), int(b)] != numbers):
        return "puts in other numbers"
    if (sign is None) != (sign_again is None):
        return "does not put in numbers"
    if sign is None:
        result = numbers[0] if numbers else int(value)
    else:
        result = {"+": numbers[0] + numbers[1], "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[sign] % MODULUS
    if int(value) != result or not 0 <= int(value) < MODULUS:
        return "calculates wrongly"
    board.value[letter] = result
    sources: set[Parameter | int] = set() if operands else {int(value)}
    for operand in operands:
        sources |= board.sources[operand] if operand.isalpha() else {int(operand)}
    board.sources[letter] = frozenset(sources)
    board.signs[letter] = "".join(sorted((sign or "") + "".join(board.signs.get(operand, "") for operand in operands)))
    return ""
