"""What an experiment may ask for while it is planned. Everything is keyed by names, nothing by order."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from megatron_exp.config.schema import Seeds
from megatron_exp.errors import UserError
from megatron_exp.experiments.windows import Window
from megatron_exp.seeding import Words, words64
from megatron_exp.stream.slot import Geometry, Slot

_ROUNDING = 1e-9
_MOST_UNITS = 10_000


class TokenizerLike(Protocol):
    """The part of a tokenizer that experiments use (`megatron_exp.shards.tokenizer.Tokenizer` has it)."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text, no special tokens added, special-token strings encoded as plain text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class PoolLike(Protocol):
    """Hands out pool slots; the same (experiment, purpose) always gets the same ones. num_free: slots that nobody has."""

    @property
    def num_free(self) -> int: ...

    def take(self, experiment: str, purpose: str, num: int, unfit: Collection[int] = ()) -> np.ndarray:
        """uint64 [num] slot ids, disjoint from all others handed out and from `unfit`. UserError where the pool is used up."""
        ...


class BaseRatesLike(Protocol):
    """Results of a search for payloads in the base corpus (`megatron_exp.search.base_rates.BaseRates`)."""

    def of(self, payload: np.ndarray) -> float | None:
        """Occurrences of a payload's n-grams per million tokens, None where it was not searched for."""
        ...


class StreamLike(Protocol):
    """Read access to the training data in the order it will be consumed (`megatron_exp.stream.base.Stream` has it)."""

    def read(self, slot: int) -> Slot:
        """The unmodified content of a slot (train or pool)."""
        ...

    def instance(self, slot: int) -> Any:
        """Where it comes from: source, epoch, index, shard, offset."""
        ...

    def slots(self, source: str, index: int) -> list[int]:
        """All slots with the content of this instance."""
        ...


class ReferenceLike(Protocol):
    """A trained model that may be asked while planning (`megatron_exp.preparation.reference.Reference`); the same question always has the same answer."""

    @property
    def state(self) -> int | None:
        """Updates done; None where nothing says it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        ...

    def loglikelihood(self, sequences: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> np.ndarray:
        """float64 [n]: log p(sequence[start:end] | sequence[:start]) in nats; 1 <= start < end <= length."""
        ...

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens]: the most likely continuation, token by token."""
        ...

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens]: the least likely next token, then the least likely after that; never a special token."""
        ...


class EarlierLike(Protocol):
    """What the experiments planned before this one write (`megatron_exp.preparation.earlier.Earlier`). Only experiments that need a reference are told."""

    @property
    def replaced(self) -> np.ndarray:
        """uint64 [n], rising: training slots whose base content is swapped out."""
        ...

    @property
    def sources(self) -> np.ndarray:
        """uint64 [m], rising: slots (train or pool) shown instead."""
        ...

    @property
    def closed(self) -> np.ndarray:
        """uint64 [k], rising: training slots whose content must stay, because of noise or a splice."""
        ...

    def payloads(self) -> Iterator[tuple[str, np.ndarray]]:
        """(experiment, int32 ids) of everything that is inserted."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """The planning environment of one experiment.

    experiment: its name in the config. banned_tokens: ids no generator may use (padding, special tokens). stream: the base data, for
    experiments that choose slots by content (curricula, ablations); such an experiment lists "corpus" in its `needs`. base_rates: what was found
    in the corpus, where the plan was given it. reference, earlier: for experiments with "reference" in their `needs`, which are planned after all others.
    """

    experiment: str
    geometry: Geometry
    seeds: Seeds
    tokenizer: TokenizerLike
    pool: PoolLike
    vocabulary_size: int
    banned_tokens: frozenset[int] = field(default_factory=frozenset)
    stream: StreamLike | None = None
    base_rates: BaseRatesLike | None = None
    reference: ReferenceLike | None = None
    earlier: EarlierLike | None = None

    def words(self, *names: str | int) -> Words:
        """Keyed randomness for generators, below the experiment's name and the placement seed."""
        return Words.of(self.seeds.placement, "experiment", self.experiment, *names)

    def take_pool(self, purpose: str, num: int, unfit: Collection[int] = ()) -> np.ndarray:
        """uint64 [num]: pool slots that belong to this experiment alone, none of `unfit`."""
        return self.pool.take(self.experiment, purpose, num, unfit)

    def window(self, fractions: Sequence[float]) -> Window:
        """The steps of a part of this run given as two fractions (`Window.of_fractions`)."""
        return Window.of_fractions(fractions, self.geometry.steps)

    def base_rate(self, payload: np.ndarray) -> float | None:
        """How often the n-grams of a payload (int32 ids as inserted) stand in the base corpus, per million of its tokens.

        None where the plan was given no base rates, or none of this payload: an item that is to be excluded or put into a stratum by its rate
        must have been among the items of the plan that was searched for.
        """
        return self.base_rates.of(payload) if self.base_rates else None

    def assign(
        self, units: Sequence[int], counts: Mapping[str, int], strata: Mapping[int, str] | None = None, purpose: str = ""
    ) -> dict[int, str]:
        """Draw a condition for every unit by key, balanced within strata.

        counts: units wanted per condition; they must add up to the number of units. Units of a stratum are laid out in keyed
        order and dealt to the conditions in the proportions of `counts`, so each condition's share of each stratum is right to
        within one unit. The result depends on unit ids, strata and the assignment seed, never on the order of `units`.
        """
        if sum(counts.values()) != len(units):
            raise UserError(
                f"Experiment {self.experiment}: {sum(counts.values())} units are wanted over all conditions but {len(units)} exist. "
                "Make the counts per condition add up to the number of units."
            )
        words = Words.of(self.seeds.assignment, "assign", self.experiment, purpose)
        stratum_of = strata or {}
        draws = dict(zip(units, words64_of(words, units), strict=True))
        ordered = sorted(units, key=lambda unit: (stratum_of.get(unit, ""), draws[unit], unit))
        return dict(zip(ordered, _dealt(counts), strict=True))

    def copies(self, units: Sequence[int], rate: float, strata: Mapping[int, str] | None = None, purpose: str = "") -> dict[int, int]:
        """How many copies each unit gets so that they are `rate` on average, exactly: every unit gets one of the two whole numbers around it.

        Which units get the larger number is drawn like `assign` draws conditions. UserError where rate x number of units is no whole number.
        """
        total = rate * len(units)
        if not (rate >= 0 and math.isfinite(total)) or abs(total - round(total)) > _ROUNDING * max(1.0, total):
            raise UserError(
                f"Experiment {self.experiment}: {rate:g} copies for each of {len(units)} units are {total:g}. {_remedy(rate, len(units))}"
            )
        if not units:
            return {}
        fewer, num_more = divmod(round(total), len(units))
        drawn = self.assign(units, {"fewer": len(units) - num_more, "more": num_more}, strata, f"copies {purpose}")
        return {unit: fewer + (name == "more") for unit, name in drawn.items()}


def _remedy(rate: float, num_units: int) -> str:
    """Which numbers of units a rate can be had with."""
    if not (rate >= 0 and math.isfinite(rate)):
        return "Give a number that is not negative."
    exact = Fraction(rate).limit_denominator(_MOST_UNITS)
    below = num_units // exact.denominator * exact.denominator
    possible = [str(num) for num in (below, below + exact.denominator) if num]
    if abs(exact - Fraction(rate)) > _ROUNDING:
        return "No copy can be inserted in part: round the rate."
    return f"No copy can be inserted in part: use {' or '.join(possible)} units, or another rate."


def words64_of(words: Words, units: Sequence[int]) -> list[int]:
    """One keyed word per unit id."""
    return [int(word) for word in words64(words.key, np.asarray(units, dtype=np.uint64))]


def _dealt(counts: Mapping[str, int]) -> list[str]:
    """Conditions in a low-discrepancy sequence: each prefix holds every condition in proportion to within one."""
    positions: list[tuple[float, str]] = []
    for name in sorted(counts):
        positions += [((index + 0.5) / counts[name], name) for index in range(counts[name])]
    return [name for _, name in sorted(positions)]
