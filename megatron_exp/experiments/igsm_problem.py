"""Word problems of an exactly known number of operations, after iGSM (Ye et al. 2024, "Physics of language models, part 2.1").

A problem is a world of things in layers, a set of parameters that the question needs, an order in which they can be computed, and definitions of
parameters by one another; further definitions, which the question does not need, are stated too. Everything is modulo 23. A parameter defined from g
ingredients costs max(1, g - 1) operations, a number of its own among them; the operations of a problem are those of its shortest solution.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from megatron_exp.experiments.igsm_draws import Draws
from megatron_exp.experiments.igsm_structure import World, draw_world
from megatron_exp.experiments.igsm_words import hierarchies

MODULUS = 23
_MOST_INGREDIENTS = 4
_ORDER_TRIES = 50


class Definition(NamedTuple):
    """How an instance parameter is stated: `number` alone, or `number` more than (times) the sum or difference of `terms`."""

    number: int | None
    operation: Literal["+", "*"] | None
    combination: Literal["+", "-"]
    terms: tuple[int, ...]


class Problem(NamedTuple):
    """One problem.

    hierarchy, first_layer: where the categories come from. names: of the things of each layer. definitions: of all edges, those the question needs and
    others. order: the parameters of the shortest solution as they can be computed; the last is asked for. num_operations: of it. values: of `order`.
    draws: what is left to draw, for the text.
    """

    hierarchy: int
    first_layer: int
    names: tuple[tuple[str, ...], ...]
    world: World
    definitions: dict[int, Definition]
    order: tuple[int, ...]
    num_operations: int
    values: dict[int, int]
    draws: Draws

    @property
    def answer(self) -> int:
        """The value asked for."""
        return self.values[self.order[-1]]

    def category(self, layer: int) -> str:
        """The category of a layer of this problem."""
        return hierarchies()[self.hierarchy][self.first_layer + layer].name


def draw_problem(draws: Draws, num_operations: int, most_edges: int = 20) -> Problem:
    """A problem whose shortest solution has exactly `num_operations` operations and whose world has at most `most_edges` edges."""
    while True:
        world = draw_world(draws, num_operations, most_edges)
        needed = _draw_needed(draws, world, num_operations) if world else None
        order, chosen = _draw_order(draws, world, needed) if world and needed else (None, {})
        definitions = _define(draws, world, order, chosen, num_operations) if world and order else None
        if world and order and definitions is not None:
            break
    _add_distractors(draws, world, order, definitions)
    names, hierarchy, first = _draw_names(draws, world)
    return Problem(hierarchy, first, names, world, definitions, tuple(order), num_operations, _values(world, definitions, order), draws)


# ---- which parameters the question needs ----


def _draw_needed(draws: Draws, world: World, num_operations: int) -> list[int] | None:
    """Parameters that cost at most `num_operations`: abstract ones for a part of it, the deepest that fit, then instance parameters."""
    least = max(1 + draws.below(num_operations), 1 + draws.below(num_operations))
    wanted = least + draws.below(num_operations - least + 1)
    needed: dict[int, None] = {}
    left = least
    while found := _longest_total(draws, world, needed, left):
        left -= sum(_own_cost(world, parameter) for parameter in found)
        needed.update(dict.fromkeys(found))
    unused = [edge for edge in range(len(world.edges)) if edge not in needed]
    needed.update(dict.fromkeys(draws.sample(unused, min(wanted - least + left, len(unused)))))
    return list(needed) or None


def _own_cost(world: World, parameter: int) -> int:
    return 1 if parameter < len(world.edges) else world.total(parameter).cost


def _longest_total(draws: Draws, world: World, needed: dict[int, None], budget: int) -> list[int]:
    """A drawn abstract parameter with what it needs and is not there yet: of those within the budget that with the most layers between."""
    best: list[int] = []
    for distance in range(1, len(world.num_things)):
        candidates = [
            len(world.edges) + number
            for number, total in enumerate(world.totals)
            if total.category - total.layer == distance and len(world.edges) + number not in needed
        ]
        if not candidates:
            continue
        new = _missing(world, draws.one_of(candidates), needed)
        if sum(_own_cost(world, parameter) for parameter in new) > budget:
            break
        best = new
    return best


def _missing(world: World, parameter: int, needed: dict[int, None]) -> list[int]:
    """The parameter and all below it that are not in `needed`."""
    found, waiting = {parameter: None}, [parameter]
    while waiting:
        now = waiting.pop()
        if now >= len(world.edges):
            for part in world.total(now).parts:
                if part not in needed and part not in found:
                    found[part] = None
                    waiting.append(part)
    return list(found)


# ---- in which order they are computed ----


def _draw_order(draws: Draws, world: World, needed: list[int]) -> tuple[list[int] | None, dict[int, list[int]]]:
    """An order, drawn from the question backwards so that it needs every parameter, and the ingredients that this fixes."""
    linking, preference = draws.uniform(), math.exp(abs(draws.normal()))
    num_edges = len(world.edges)
    users = dict.fromkeys(needed, 0)
    for parameter in needed:
        if parameter >= num_edges:
            for part in set(world.total(parameter).parts):
                users[part] += 1
    for _ in range(_ORDER_TRIES):
        found = _try_order(draws, world, needed, dict(users), linking, preference)
        if found:
            return found
    return None, {}


def _try_order(
    draws: Draws, world: World, needed: list[int], users: dict[int, int], linking: float, preference: float
) -> tuple[list[int], dict[int, list[int]]] | None:
    """One walk; None where it ends before everything is placed. `users`: how many parameters not yet placed compute with each."""
    num_edges = len(world.edges)
    ingredients: dict[int, list[int]] = {}
    current = draws.one_of([parameter for parameter in needed if not users[parameter]])
    placed, rest = [current], [parameter for parameter in needed if parameter != current]
    pending: set[int] = set()
    while rest:
        if current >= num_edges:
            parts = set(world.total(current).parts)
            pending |= parts.intersection(rest)
            for part in parts:
                users[part] -= 1
        ready = [parameter for parameter in rest if parameter in pending and not users[parameter]]
        if current < num_edges and (not ready or draws.uniform() < linking):
            weights = [(preference if other >= num_edges else 1.0) * (1.0 if other in pending else preference) for other in rest]
            other = rest[draws.weighted(weights)]
            ingredients[current] = [other]
            pending.add(other)
            ready = [parameter for parameter in rest if parameter in pending and not users[parameter]]
        if not ready:
            return None
        current = draws.one_of(ready)
        placed.append(current)
        rest.remove(current)
    return placed[::-1], ingredients


# ---- how they are defined ----


def _define(draws: Draws, world: World, order: list[int], fixed: dict[int, list[int]], num_operations: int) -> dict[int, Definition] | None:
    """Definitions of the needed instance parameters that use up the operations exactly; None where they cannot."""
    num_edges = len(world.edges)
    spare = num_operations - sum(_own_cost(world, parameter) for parameter in order)
    room = [place for place, parameter in enumerate(order) if parameter < num_edges for _ in range(min(place + 1, _MOST_INGREDIENTS) - 2)]
    if spare > len(room):
        return None
    extra: dict[int, int] = {}
    for place in draws.sample(room, spare):
        extra[place] = extra.get(place, 0) + 1
    definitions = {}
    for place, parameter in enumerate(order):
        if parameter < num_edges:
            more = extra.get(place, 0)
            size = more + 2 if more else 1 + draws.coin()
            definitions[parameter] = _draw_definition(draws, fixed.get(parameter, []), order[:place], size)
    return definitions


def _draw_definition(draws: Draws, fixed: list[int], known: Sequence[int], size: int) -> Definition:
    """One definition with `size` ingredients where there are so many: the fixed ones, others of `known`, and perhaps a number of its own."""
    others = [parameter for parameter in known if parameter not in fixed]
    size = min(size, len(fixed) + len(others) + 1)
    open_places = size - len(fixed)
    with_number = open_places > 0 and (len(others) < open_places or draws.coin())
    drawn = draws.sample(others, max(open_places - with_number, 0))
    terms = tuple(draws.sample([*fixed, *drawn], len(fixed) + len(drawn)))
    if not terms:
        return Definition(draws.below(MODULUS), None, "+", ())
    combination: Literal["+", "-"] = "-" if len(terms) == 2 and draws.coin() else "+"
    if not with_number:
        return Definition(None, None, combination, terms)
    if draws.coin():
        return Definition(draws.below(MODULUS), "+", combination, terms)
    return Definition(1 + draws.below(MODULUS - 1), "*", combination, terms)


def _add_distractors(draws: Draws, world: World, order: list[int], definitions: dict[int, Definition]) -> None:
    """Define the edges that the question does not need, from anything known or from such independent of the question alone."""
    others = [edge for edge in range(len(world.edges)) if edge not in definitions]
    known, independent = list(order), list[int]()
    defined = sum(1 << edge for edge in definitions)
    waiting = [len(world.edges) + number for number in range(len(world.totals)) if len(world.edges) + number not in order]
    for edge in draws.sample(others, len(others)):
        for total in [one for one in waiting if not world.total(one).leaves & ~defined]:
            known.append(total)
            waiting.remove(total)
        is_independent = draws.coin()
        size = 1
        while size < _MOST_INGREDIENTS and draws.coin():
            size += 1
        definitions[edge] = _draw_definition(draws, [], independent if is_independent else known, size)
        defined |= 1 << edge
        known.append(edge)
        if is_independent:
            independent.append(edge)


# ---- names and values ----


def _draw_names(draws: Draws, world: World) -> tuple[tuple[tuple[str, ...], ...], int, int]:
    """(names of each layer, hierarchy, its first layer used)."""
    number = draws.below(len(hierarchies()))
    hierarchy = hierarchies()[number]
    first = draws.below(len(hierarchy) - len(world.num_things) + 1)
    layers = hierarchy[first : first + len(world.num_things)]
    return (
        tuple(tuple(draws.sample(draws.one_of(one.lists), num)) for one, num in zip(layers, world.num_things, strict=True)),
        number,
        first,
    )


def _values(world: World, definitions: dict[int, Definition], order: Sequence[int]) -> dict[int, int]:
    """{parameter: value modulo 23} of the needed ones."""
    values: dict[int, int] = {}
    for parameter in order:
        if parameter >= len(world.edges):
            total = world.total(parameter)
            parts = [values[part] for part in total.parts]
            values[parameter] = (
                sum(a * b for a, b in zip(parts[::2], parts[1::2], strict=True)) if total.is_product else sum(parts)
            ) % MODULUS
            continue
        number, operation, combination, terms = definitions[parameter]
        parts = [values[term] for term in terms]
        combined = parts[0] - parts[1] if combination == "-" else sum(parts)
        if operation is None:
            values[parameter] = (combined if number is None else number) % MODULUS
        else:
            values[parameter] = (number + combined if operation == "+" else number * combined) % MODULUS  # type: ignore[operator]  # a number is there
    return values
