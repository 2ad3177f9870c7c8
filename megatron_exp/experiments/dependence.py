"""What an experiment says of itself for the dependence test (CPDT) and for power before the run; all of it has defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.stream.slot import Geometry


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """What a dependence test (CPDT) follows of an experiment after a short run: the mean of `item_values` over at most `max_items` items.

    probes: patterns of probe names that are asked, all in the final state. conditions: patterns of conditions whose items are asked about; empty: the items
    inserted in the test, and those of their clusters that are asked on their behalf. smallest_effect: smallest effect of interest, in `unit`; with 0 only
    5% of the effect of the experiment itself is the margin. untestable: why no such outcome exists; the experiment is then no column of the test.
    """

    probes: tuple[str, ...] = ("*",)
    conditions: tuple[str, ...] = ()
    max_items: int = 256
    smallest_effect: float = 0.0
    unit: str = "nats per token"
    untestable: str = ""


class FollowedInTests:
    """The members of an experiment that short tests of it use."""

    paper_effects: ClassVar[Mapping[str, float]] = {}
    """Outcome name to the effect (estimate - null) that the experiment's source reports, for `plan --power`."""

    @property
    def dependence(self) -> Dependence:
        """What a dependence test follows of this experiment. Default: what its probes say about the items inserted."""
        return Dependence()

    def at_intensity(self, fraction: float, geometry: Geometry) -> dict[str, Any]:
        """Parameters to replace for a dependence test in which about `fraction` of the tokens of a short run are this experiment's.

        What is requested beyond that is left out by key, and what is missing is made up by more copies of what is written as tokens, so most experiments
        need not answer. Those whose insertions exist once only (swaps, noise) do.
        """
        del fraction, geometry
        return {}

    def item_values(self, items: pa.Table, responses: pa.Table) -> np.ndarray:
        """float64, one value per (item, arm) asked, NaN where it could not be scored: larger means more of the experiment's effect.

        Default: log-likelihood per token (also of slots); the mean of the values of questions that have no likelihood.
        """
        del items
        has_nats = pc.any(pc.is_valid(responses["nats"])).as_py()
        value = pc.negate(pc.abs(responses["nats"])) if has_nats else responses["value"]
        weight = responses["num_tokens"].cast(pa.float64()) if has_nats else pa.array(np.ones(len(responses)))
        columns = {
            "item": responses["item"],
            "arm": responses["arm"].cast(pa.string()),
            "value": value.cast(pa.float64()),
            "weight": weight,
        }
        grouped = pa.table(columns).group_by(["item", "arm"])
        sums = grouped.aggregate([("value", "sum", pc.ScalarAggregateOptions(skip_nulls=False)), ("weight", "sum")]).sort_by("item")
        return pc.divide(sums["value_sum"], sums["weight_sum"]).to_numpy().astype(np.float64)
