"""`plan`: from a config and a corpus to a manifest. A pure function of both: same input, same fingerprint."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.config.schema import Config, ExperimentEntry
from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.controllers import (
    Reserved,
    bank_table,
    check_controller,
    check_probes,
    controller_record,
    reserve_table,
    reserved_places,
)
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Controller, Experiment, Item, Probe
from megatron_exp.experiments.requests import check_items, copies_of, ranked
from megatron_exp.experiments.tables import Wanted, insertions_table, item_rows, noise_key, probe_rows, table_of
from megatron_exp.files import durable_directory, refuse_existing
from megatron_exp.manifest import schema
from megatron_exp.manifest.payloads import PayloadStore
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.writer import Tables, table_fingerprints, write_manifest
from megatron_exp.placement.boundaries import DocumentBoundaries
from megatron_exp.placement.place import Placement, SlotBudget, place
from megatron_exp.preparation.counts import budget_record, counts_of
from megatron_exp.preparation.data_kinds import data_kinds
from megatron_exp.preparation.earlier import Earlier
from megatron_exp.preparation.extends import require_same_frame, require_same_rows
from megatron_exp.preparation.order import WAITING, Order, placing_order
from megatron_exp.preparation.plan_tokenizer import PlanTokenizer
from megatron_exp.preparation.pool import PoolAllocator
from megatron_exp.preparation.preprocess_encode import Backend
from megatron_exp.preparation.reference import Reference
from megatron_exp.preparation.safety import Planned, require_apart, require_clean_sources
from megatron_exp.preparation.trainable import require_model, require_schedule
from megatron_exp.search.base_rates import BaseRates
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream
from megatron_exp.stream.olmo import OlmoStream
from megatron_exp.stream.opening import make_order, open_stream


@dataclass(frozen=True, eq=False)
class Designed:
    """One experiment of the config with its items, before placement."""

    entry: ExperimentEntry
    experiment: Experiment
    context: Context
    items: Sequence[Item]
    controller: Controller | None


def plan(
    config: Config,
    out: Path,
    extends: Manifest | None = None,
    base_rates: Path | None = None,
    reference: Reference | None = None,
    rearrange: Callable[[list[Designed]], list[Designed]] | None = None,
    backend: Backend = "auto",
) -> Manifest:
    """Write the manifest of `config` to `out`.

    Args:
        config: everything that is planned.
        out: the manifest directory to write.
        extends: an older manifest, every row of which is to be kept.
        base_rates: the result of a search for payloads (`search.base_rates`), for the items table and for experiments that ask.
        reference: a trained model for the experiments that need one. Without it they are left out and recorded as waiting.
        rearrange: changes what was designed before any of it is placed (a dependence test inserts a part of it, in other numbers).
        backend: how the texts of experiments are encoded; a choice of speed, as for `preprocess`.

    Raises UserError, with nothing written, for every mistake in config, corpus or payloads.
    """
    refuse_existing(out)
    corpus = Corpus.open(config.corpus.path)
    found = BaseRates.read(base_rates, corpus) if base_rates else None
    corpus.check_sizes()
    require_model(config, corpus)
    if rearrange is None:  # the runs of a dependence test have a length and a rate of their own
        require_schedule(config)
    if reference:
        reference.begin(corpus, Path(out))
    order = placing_order(config, extends, reference is not None)
    with durable_directory(Path(out)) as directory:
        stream = open_stream(config, corpus, make_order(config, corpus, directory))
        if extends:
            require_same_frame(config, corpus, stream, extends, order)
        designed = design(config, corpus, stream, order, found, reference, backend)
        planned = [Planned(one.entry.name, one.experiment, one.items) for one in designed if one.entry.enabled]
        require_apart(planned)
        designed = rearrange(designed) if rearrange else designed
        wanted, placement = place_all(designed, stream, config)
        require_clean_sources(planned, [one for one in wanted if isinstance(one, Wanted)], stream)
        _write(directory, config, corpus, stream, designed, order, wanted, placement, extends, found, reference)
    if reference:
        reference.close()
    return Manifest.open(out)


def design(
    config: Config,
    corpus: Corpus,
    stream: Stream,
    order: Order,
    base_rates: BaseRates | None = None,
    reference: Reference | None = None,
    backend: Backend = "auto",
) -> list[Designed]:
    """Items of all experiments that are placed, disabled ones too (they keep their places), in the order of placement."""
    tokenizer = PlanTokenizer(corpus.tokenizer(), backend)
    validation = config.training.validation.slots
    if validation > stream.pool_slots:
        raise UserError(
            f"training.validation.slots is {validation}, but pool.slots is {stream.pool_slots}. Validation uses the pool: enlarge it."
        )
    pool = PoolAllocator(stream.pool_slots, validation, config.seeds.placement)
    designed: list[Designed] = []
    for entry in order.entries:
        experiment = load_experiment(entry)
        told = entry.name in order.needing
        context = Context(
            experiment=entry.name,
            geometry=stream.geometry,
            seeds=config.seeds,
            tokenizer=tokenizer,
            pool=pool,
            stream=stream,
            vocabulary_size=corpus.vocabulary_size,
            banned_tokens=frozenset(tokenizer.special_ids),
            base_rates=base_rates,
            reference=reference if told else None,
            earlier=_earlier(tuple(designed), stream, config) if told else None,
        )
        items = list(experiment.items(context))
        check_items(entry.name, items, stream.geometry, corpus.vocabulary_size)
        controller = experiment.controller(items, context)
        if controller:
            check_controller(entry.name, controller, items, stream.geometry)
        designed.append(Designed(entry, experiment, context, items, controller))
    return designed


def _earlier(designed: Sequence[Designed], stream: Stream, config: Config) -> Earlier:
    enabled = [(one.entry.name, one.items) for one in designed if one.entry.enabled]
    return Earlier(enabled, lambda: place_all(designed, stream, config))


def place_all(designed: Sequence[Designed], stream: Stream, config: Config) -> tuple[list[Wanted | Reserved], Placement]:
    """All requests of all experiments and their places; rank is the order of experiments, then item, arm and kind, then the reserve."""
    wanted: list[Wanted | Reserved] = []
    late: int | None = None
    geometry = stream.geometry
    for one in designed:
        if "reference" in one.experiment.needed and late is None:
            late = len(wanted)  # these come after all others
        items = {(item.item, item.arm): item for item in one.items}
        requests = ranked(one.entry.name, list(one.experiment.requests(one.items, one.context)))
        wanted += [Wanted(one.entry.name, items[request.item, request.arm], request) for request in requests]
        if one.controller:
            wanted += reserved_places(one.entry.name, one.controller, one.items, geometry, config.seeds.placement)
    budget = None
    if config.budget and config.budget.unit == "slots":
        num_slots, held_back = (round(share * geometry.num_slots) for share in (config.budget.fraction, config.budget.held_back))
        budget = SlotBudget(num_slots, config.seeds.placement, held_back, late)
    seed = config.seeds.placement
    requested = (copies_of(*one, geometry, seed) if isinstance(one, Wanted) else one.copies for one in wanted)
    return wanted, place(requested, geometry, budget, DocumentBoundaries(stream))


def _write(
    directory: Path,
    config: Config,
    corpus: Corpus,
    stream: Stream,
    designed: Sequence[Designed],
    order: Order,
    wanted: Sequence[Wanted | Reserved],
    placement: Placement,
    extends: Manifest | None,
    base_rates: BaseRates | None,
    reference: Reference | None,
) -> None:
    enabled = [one for one in designed if one.entry.enabled]
    names = frozenset(one.entry.name for one in enabled)
    store = PayloadStore(directory)
    items = table_of((row for one in enabled for row in item_rows(one.entry.name, one.items, store, base_rates)), schema.ITEMS)
    insertions = insertions_table(wanted, placement, store, stream.geometry, config.seeds.placement, only=names)
    reserve = reserve_table(wanted, placement, stream.geometry, config.seeds.placement, only=names)
    banks = [bank_table(one.entry.name, one.controller, one.items, store) for one in enabled if one.controller]
    bank = pa.concat_tables([schema.BANK.empty_table(), *banks]).unify_dictionaries().combine_chunks()
    probes = _probes(enabled, insertions, store)
    hashes = store.close()
    tables = Tables(items, insertions, probes, reserve, bank)
    record = _record(config, corpus, stream, enabled, tables)
    record |= {WAITING: list(order.waiting), "placing_order": [entry.name for entry in order.entries]}
    record["reference"] = reference.finish(directory) if reference else None
    record["keep_steps"] = sorted({*record["keep_steps"], *_waiting_states(config, order)})
    if base_rates:
        record["base_rates"] = {"fingerprint": base_rates.fingerprint, "ngram": base_rates.ngram}
    if extends:
        require_same_rows(extends, tables, record)
        record["extends"] = extends.fingerprint
    inserted = [one for one in wanted if isinstance(one, Wanted) and one.experiment in names]
    record["perturbations"] = _perturbations(inserted, config.seeds.placement)
    record["fingerprints"] |= table_fingerprints(tables, hashes)
    write_manifest(directory, record, tables)


def _probes(enabled: Sequence[Designed], insertions: pa.Table, store: PayloadStore) -> pa.Table:
    owners = insertions["experiment"].cast(pa.string())
    placed = ((one, insertions.filter(pc.equal(owners, one.entry.name))) for one in enabled)
    rows = (row for one, own in placed for row in probe_rows(one.entry.name, _asked(one, own), store))
    return table_of((row | {"probe_id": number} for number, row in enumerate(rows)), schema.PROBE_DEFINITIONS)


def _asked(one: Designed, placed: pa.Table) -> list[Probe]:
    """What an experiment asks, given its own rows of the insertions table."""
    asked = list(one.experiment.probes(one.items, placed, one.context))
    if one.controller:
        check_probes(one.entry.name, one.controller, asked, one.context.geometry)
    return asked


def _record(
    config: Config,
    corpus: Corpus,
    stream: Stream,
    enabled: Sequence[Designed],
    tables: Tables,
) -> dict[str, Any]:
    geometry = stream.geometry
    controlled = {one.entry.name: one.controller for one in enabled if one.controller}
    controllers = {name: controller_record(one, -(-geometry.steps // one.interval)) for name, one in controlled.items()}
    order_file = {"order_file": stream.order_root} if isinstance(stream, OlmoStream) else {}
    return {
        "name": config.name,
        "geometry": {"sequence_length": geometry.sequence_length, "global_batch_size": geometry.global_batch_size, "steps": geometry.steps},
        "seeds": config.seeds.model_dump(),
        "config": config.model_dump(mode="json"),
        "corpus_path": str(Path(config.corpus.path).resolve()),
        "fingerprints": {"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer_fingerprint, "order": stream.fingerprint} | order_file,
        "extends": None,
        "experiments": [one.entry.name for one in enabled],
        "counts": counts_of(tables.items, tables.insertions),
        "data_kinds": data_kinds(
            tables.items, tables.insertions, tables.reserve, {one.entry.name: one.experiment.unusual for one in enabled}, geometry
        ),
        "budget": budget_record(tables.insertions, tables.reserve, geometry, config.budget),
        "analyses": {one.entry.name: _analysis_record(one) for one in enabled},
        "keep_steps": _keep_steps(tables.probes, config),
        "source_hashes": {one.entry.name: _source_hash(one.experiment) for one in enabled},
        "warnings": [],
    } | ({"controllers": controllers} if controllers else {})


def _perturbations(wanted: Sequence[Wanted], seed: int) -> dict[str, Any]:
    """{noise key: {kind, scale, experiment}}; an experiment has one scale."""
    scales: dict[str, float] = {}
    for one in wanted:
        scale = one.request.noise.scale if one.request.noise else None
        if scale is not None and scales.setdefault(one.experiment, scale) != scale:
            raise UserError(
                f"Experiment {one.experiment} asks for noise of scales {scales[one.experiment]} and {scale}; one experiment has one. Split it."
            )
    return {str(noise_key(seed, name)): {"kind": "gaussian", "scale": scale, "experiment": name} for name, scale in scales.items()}


def _keep_steps(probes: pa.Table, config: Config) -> list[int]:
    """States in which probes are asked of a checkpoint, and those the user wants kept."""
    states = {state for row in probes.select(["live", "states"]).to_pylist() if not row["live"] for state in row["states"]}
    return sorted(states | set(config.training.checkpoint.keep))


def _waiting_states(config: Config, order: Order) -> list[int]:
    """States that experiments waiting for a reference will ask about: the twin must have them when its run is planned."""
    waiting = [entry for entry in config.experiments if entry.name in order.waiting]
    return [state for entry in waiting for state in load_experiment(entry).kept_states(config.geometry.steps)]


def _analysis_record(one: Designed) -> dict[str, Any]:
    experiment = one.experiment
    return {
        "title": experiment.title,
        "question": experiment.question,
        "citation": experiment.citation,
        "type": one.entry.type,
        "parameters": experiment.model_dump(mode="json"),
        "outcomes": [{**vars(outcome)} for outcome in experiment.analysis.outcomes],
    }


def _source_hash(experiment: Experiment) -> str:
    experiment = getattr(experiment, "original", experiment)  # what a rearrangement wrapped
    return hashlib.sha256(Path(inspect.getfile(type(experiment))).read_bytes()).hexdigest()
