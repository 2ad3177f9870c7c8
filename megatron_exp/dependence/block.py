"""A block of the test: one short manifest with all experiments and the sham, which every row of a replicate is a mask of."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa

from megatron_exp import seeding
from megatron_exp.config.schema import Config, ExperimentEntry
from megatron_exp.dependence.intensity import Key, at_tokens, open_loop
from megatron_exp.dependence.rows import SHAM
from megatron_exp.dependence.sham import overwrites
from megatron_exp.experiments.context import Context, words64_of
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Experiment, Item, Probe, Request
from megatron_exp.manifest.reader import Manifest
from megatron_exp.stream.slot import Geometry

_SEED_BITS = 31


def block_config(manifest: Manifest, fractions: Mapping[str, float], seed: int, first_slot: int, steps: int) -> Config:
    """The configuration of one replicate.

    Args:
        manifest: whose experiments are tested.
        fractions: experiment to its share of the tokens, 0 for what it requests itself; those not named are left out.
        seed: number of the replicate: items, assignment and places of its own.
        first_slot: where in the order its base slots begin.
        steps: length of its runs.
    """
    config = manifest.config
    geometry = config.geometry.model_copy(update={"steps": steps})
    short = Geometry(**geometry.model_dump())
    seeds = {
        name: seeding.key(getattr(config.seeds, name), "cpdt", name, seed) >> (64 - _SEED_BITS) for name in ("placement", "assignment")
    }
    entries = [_at_intensity(entry, fractions[entry.name], short) for entry in config.experiments if entry.name in fractions]
    sham = ExperimentEntry(name=SHAM, type="megatron_exp.dependence.sham")
    return config.model_copy(
        update={
            "name": f"{config.name[:48]}-cpdt-{seed}",
            "seeds": config.seeds.model_copy(update=seeds),
            "corpus": config.corpus.model_copy(update={"path": manifest.corpus_path, "first_slot": first_slot}),
            "geometry": geometry,
            "budget": None,
            "experiments": (*entries, sham),
        }
    )


def _at_intensity(entry: ExperimentEntry, fraction: float, geometry: Geometry) -> ExperimentEntry:
    experiment = load_experiment(entry)
    changes = experiment.at_intensity(fraction, geometry) if fraction else {}
    if (interval := getattr(experiment, "interval", None)) and interval > geometry.steps:
        changes = {"interval": geometry.steps, **changes}  # of a controller, which does not act here
    return entry.model_copy(update={"parameters": {**entry.parameters, **changes}})


def rearranged(designed: Sequence[Any], fractions: Mapping[str, float]) -> list[Any]:
    """What `plan` designed (its `Designed`), at the intensities of the test, with the sham at the end."""
    result, lengths = [], list[tuple[str, int, int]]()
    for one in designed:
        if one.entry.name == SHAM:
            items, requests = overwrites(lengths, one.context)
            result.append(dataclasses.replace(one, experiment=InBlock(one.experiment, requests, frozenset()), items=items, controller=None))
            continue
        part, items = _part(one, fractions[one.entry.name])
        payloads = {(item.item, item.arm): item.payload for item in items}
        for request in part.chosen:
            payload = payloads[request.item, request.arm]
            lengths.append((request.kind, 0 if payload is None else len(payload), request.copies))
        result.append(dataclasses.replace(one, experiment=part, items=items, controller=None))
    return result


def _part(one: Any, fraction: float) -> tuple["InBlock", list[Item]]:
    """The experiment with the requests drawn, and the items that these insert or that are asked about."""
    context: Context = one.context
    by_key: dict[Key, Item] = {(item.item, item.arm): item for item in one.items}
    bank = one.controller.bank if one.controller else ()
    requests = open_loop(one.items, list(one.experiment.requests(one.items, context)), bank, context.geometry)
    wanted = round(fraction * context.geometry.num_tokens)
    chosen = at_tokens(requests, by_key, wanted, context.geometry, context.words("cpdt")) if fraction else requests
    inserted = {(request.item, request.arm) for request in chosen}
    asked = asked_items(one.experiment.dependence, one.items, inserted)
    return InBlock(one.experiment, chosen, frozenset(asked)), [item for key, item in by_key.items() if key in inserted or key in asked]


def asked_items(dependence: Dependence, items: Sequence[Item], inserted: set[Key]) -> set[Key]:
    """Which items the outcome may be about."""
    if dependence.untestable:
        return set()
    if dependence.conditions:
        return {(item.item, item.arm) for item in items if any(fnmatchcase(item.condition, pattern) for pattern in dependence.conditions)}
    clusters = {_cluster(item) for item in items if (item.item, item.arm) in inserted}
    on_behalf = {(item.item, item.arm) for item in items if item.role == "probe-only" and _cluster(item) in clusters}
    return inserted | on_behalf


def _cluster(item: Item) -> int:
    return item.item if item.cluster is None else item.cluster


@dataclasses.dataclass(frozen=True, eq=False)
class InBlock:
    """An experiment in a block: it asks for the insertions chosen, and puts only the questions of its dependence outcome, within the item budget."""

    original: Experiment
    chosen: Sequence[Request]
    asked: frozenset[Key]

    def __getattr__(self, name: str) -> Any:
        """Everything else is the experiment's own: title, analysis, parameters."""
        return getattr(self.original, name)

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """The requests chosen."""
        del items, context
        yield from self.chosen

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The questions about at most `max_items` items drawn by key, all in the final state."""
        outcome = self.original.dependence
        probes = [
            probe
            for probe in self.original.probes(items, placed, context)
            if (probe.item, probe.arm) in self.asked and any(fnmatchcase(probe.name, pattern) for pattern in outcome.probes)
        ]
        keys = sorted({(probe.item, probe.arm) for probe in probes})
        draws = dict(zip(keys, words64_of(context.words("cpdt", "asked"), [item for item, _ in keys]), strict=True))
        kept = set(sorted(keys, key=lambda key: (draws[key], key))[: outcome.max_items])
        for probe in probes:
            if (probe.item, probe.arm) in kept:
                yield dataclasses.replace(probe, states=(), live=False, of=frozenset({"run"}))
