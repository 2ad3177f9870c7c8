"""What exists in the world of a word problem: things in layers, who holds what, and the numbers one can ask for.

An *instance parameter* is the number of one kind of thing in another, one for each edge between adjacent layers. An *abstract parameter* is the number
of all things of a category in a thing: the sum of its instance parameters where the category is the next layer's, and the sum of instance times abstract
parameters over its children where it lies deeper.
"""

import math
from functools import cache
from typing import NamedTuple

from megatron_exp.experiments.igsm_draws import Draws

MOST_LAYERS = 4
_CENTRES = (0.2, 0.5, 0.8)
"""Of the weights of 2, 3 and 4 layers (or things in a layer), on the scale of how large the problem is."""
_SIZES = (2, 3, 4)


class Edge(NamedTuple):
    """An instance parameter: thing `parent` of `layer` holds thing `child` of the next layer."""

    layer: int
    parent: int
    child: int


class Total(NamedTuple):
    """An abstract parameter: what thing `parent` of `layer` holds of `category`, the number of a deeper layer.

    parts: parameters it is computed from; sums of them, or of products of each two (instance, abstract). cost: operations. leaves: bits of the
    edges that all of it rests on.
    """

    layer: int
    parent: int
    category: int
    parts: tuple[int, ...]
    cost: int
    leaves: int

    @property
    def is_product(self) -> bool:
        """Whether its parts are to be multiplied in pairs."""
        return self.category > self.layer + 1


class World(NamedTuple):
    """num_things: of each layer. Parameters are numbered: edges first, then totals, deeper ones before those that need them."""

    num_things: tuple[int, ...]
    edges: tuple[Edge, ...]
    totals: tuple[Total, ...]

    def total(self, parameter: int) -> Total:
        """The abstract parameter of this number."""
        return self.totals[parameter - len(self.edges)]


@cache
def _weights(num_operations: int, most_edges: int) -> tuple[float, ...]:
    size = (num_operations - 1) / max(most_edges - 1, 1)
    return tuple(math.exp(-((size - centre) ** 2)) for centre in _CENTRES)


def draw_world(draws: Draws, num_operations: int, most_edges: int) -> World | None:
    """A world for a problem of about this many operations; None where the draws contradict each other."""
    weights = _weights(num_operations, most_edges)
    num_layers, *widths = (_SIZES[draws.weighted(weights)] for _ in range(3))
    narrow, wide = sorted(widths)
    least = (num_layers - 1) * narrow
    if least > most_edges:
        return None
    span = most_edges - least + 1
    num_edges = min(least + draws.below(span), least + draws.below(span), (num_layers - 1) * wide * wide)
    num_things = _draw_things(draws, [narrow] * num_layers, wide, num_edges)
    edges = _draw_edges(draws, num_things, num_edges)
    return World(tuple(num_things), edges, _totals(num_things, edges))


def _draw_things(draws: Draws, sizes: list[int], wide: int, num_edges: int) -> list[int]:
    """Grow the layers until they can hold the edges and, by chance, further, but not beyond one edge for each thing below the top."""
    growing = draws.uniform()
    while True:
        num_pairs = sum(upper * lower for upper, lower in zip(sizes, sizes[1:], strict=False))
        if num_pairs >= num_edges and (sum(sizes[1:]) == num_edges or draws.uniform() >= growing):
            return sizes
        open_layers = [layer for layer, size in enumerate(sizes) if size < wide]
        if not open_layers:
            return sizes
        sizes[draws.one_of(open_layers)] += 1


def _draw_edges(draws: Draws, sizes: list[int], num_edges: int) -> tuple[Edge, ...]:
    """Every thing below the top lies in one above it; the other edges are any between neighbouring layers."""
    edges = {Edge(layer, draws.below(sizes[layer]), child) for layer in range(len(sizes) - 1) for child in range(sizes[layer + 1])}
    if len(edges) < num_edges:
        free = [
            edge
            for layer in range(len(sizes) - 1)
            for parent in range(sizes[layer])
            for child in range(sizes[layer + 1])
            if (edge := Edge(layer, parent, child)) not in edges
        ]
        edges.update(draws.sample(free, num_edges - len(edges)))
    return tuple(sorted(edges))


def _totals(sizes: list[int], edges: tuple[Edge, ...]) -> tuple[Total, ...]:
    """All abstract parameters that have something to count, the innermost things first."""
    held: dict[tuple[int, int], list[int]] = {}
    for number, edge in enumerate(edges):
        held.setdefault((edge.layer, edge.parent), []).append(number)
    totals: list[Total] = []
    number_of: dict[tuple[int, int, int], int] = {}
    for layer in range(len(sizes) - 2, -1, -1):
        for category in range(layer + 1, len(sizes)):
            for parent in range(sizes[layer]):
                here = held.get((layer, parent), [])
                if category == layer + 1:
                    parts = here
                else:
                    below = ((number, number_of.get((layer + 1, edges[number].child, category))) for number in here)
                    parts = [part for number, inner in below if inner is not None for part in (number, inner)]
                if parts:
                    leaves = 0
                    for part in parts:
                        leaves |= 1 << part if part < len(edges) else totals[part - len(edges)].leaves
                    number_of[layer, parent, category] = len(edges) + len(totals)
                    totals.append(Total(layer, parent, category, tuple(parts), max(len(parts) - 1, 1), leaves))
    return tuple(totals)
