"""One experiment planned alone and in memory: its items, places and probes as the manifest's tables, without a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.controllers import Reserved, check_controller, check_probes, reserved_places
from megatron_exp.experiments.protocol import Controller, Experiment, Item, Probe, Request
from megatron_exp.experiments.requests import check_items, copies_of, ranked
from megatron_exp.experiments.tables import Wanted, insertions_table, item_rows, probe_rows, table_of
from megatron_exp.manifest import schema
from megatron_exp.placement.place import place


@dataclass(frozen=True, eq=False, kw_only=True)
class Draft:
    """What an experiment asks for, and the tables `score` and `simulate` take. insertions: where its copies would go if it were alone."""

    controller: Controller | None
    items: Sequence[Item]
    requests: Sequence[Request]
    probes: Sequence[Probe]
    item_table: pa.Table
    insertions: pa.Table
    probe_table: pa.Table


@dataclass(eq=False)
class MemoryPayloads:
    """Numbers token sequences like the manifest's payload store, keeping them in memory."""

    sequences: dict[bytes, int] = field(default_factory=dict)

    def add(self, tokens: np.ndarray) -> int:
        """The number of this sequence; equal sequences share one."""
        return self.sequences.setdefault(np.asarray(tokens, dtype="<i4").tobytes(), len(self.sequences))


def _any_slot(slot: int) -> np.ndarray:
    """Without a corpus, as though a document began with every slot."""
    del slot
    return np.zeros(1, np.int64)


def draft(experiment: Experiment, context: Context) -> Draft:
    """Plan `experiment` as the only one of a run. Raises UserError as `plan` would."""
    name, geometry, seed = context.experiment, context.geometry, context.seeds.placement
    items = list(experiment.items(context))
    check_items(name, items, geometry, context.vocabulary_size)
    requests = ranked(name, list(experiment.requests(items, context)))
    by_name = {(item.item, item.arm): item for item in items}
    wanted: list[Wanted | Reserved] = [Wanted(name, by_name[request.item, request.arm], request) for request in requests]
    controller = experiment.controller(items, context)
    if controller:
        check_controller(name, controller, items, geometry)
        wanted += reserved_places(name, controller, items, geometry, seed)
    copies = (copies_of(*one, geometry, seed) if isinstance(one, Wanted) else one.copies for one in wanted)
    placement = place(copies, geometry, boundaries=_any_slot)
    store = MemoryPayloads()
    insertions = insertions_table(wanted, placement, store, geometry, seed)
    probes = list(experiment.probes(items, insertions, context))
    if controller:
        check_probes(name, controller, probes, geometry)
    rows = [row | {"probe_id": number} for number, row in enumerate(probe_rows(name, probes, store))]
    return Draft(
        controller=controller,
        items=items,
        requests=requests,
        probes=probes,
        item_table=table_of(item_rows(name, items, store), schema.ITEMS),
        insertions=insertions,
        probe_table=table_of(rows, schema.PROBE_DEFINITIONS),
    )
