"""In which order experiments are designed and placed, which is their rank: those that need a reference come after all others.

So a plan with a reference differs from the one without it by what it adds: pool slots, places and rows of the others are the same.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_exp.config.schema import Config, ExperimentEntry
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.manifest.reader import Manifest

WAITING = "waiting_for_reference"
"""Key of manifest.json: experiments that were left out because they need a reference."""


@dataclass(frozen=True)
class Order:
    """entries: in the order of placement. needing: names of those that need a reference. waiting: names left out, in the order of the file."""

    entries: tuple[ExperimentEntry, ...]
    needing: frozenset[str]
    waiting: tuple[str, ...]


def placing_order(config: Config, extends: Manifest | None, has_reference: bool) -> Order:
    """The file's order, with experiments that need a reference moved to the end; those of a manifest that is extended keep their ranks."""
    needing = frozenset(entry.name for entry in config.experiments if "reference" in load_experiment(entry).needed)
    rank = {name: number for number, name in enumerate(placed_names(extends))} if extends else {}
    placed = [entry for entry in config.experiments if has_reference or entry.name not in needing]
    placed.sort(key=lambda entry: (rank.get(entry.name, len(rank)), entry.name in needing))
    waiting = () if has_reference else tuple(entry.name for entry in config.experiments if entry.name in needing)
    return Order(tuple(placed), needing, waiting)


def placed_names(manifest: Manifest) -> list[str]:
    """All experiments that have places in a manifest, disabled ones too, in the order of placement."""
    listed = [entry.name for entry in manifest.config.experiments if entry.name not in manifest.record.get(WAITING, ())]
    return list(manifest.record.get("placing_order", listed))


def comparable(config: Config, order: Order, older: Collection[str]) -> list[ExperimentEntry]:
    """The entries whose order in the file decides places: all but those that a reference adds to the older manifest's."""
    return [entry for entry in config.experiments if entry.name in older or entry.name not in order.needing]
