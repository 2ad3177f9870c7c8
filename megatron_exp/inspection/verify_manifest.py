"""A manifest against itself: tables, payloads, overlay index, counts, budget and fingerprints say the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from megatron_exp import fingerprint, seeding
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import Finding, rows_where
from megatron_exp.manifest.overlay_index import build_index
from megatron_exp.manifest.payloads import open_payloads, payload_hash
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.manifest.writer import plan_fingerprint, table_fingerprints
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.olmo import ORDER_NAME, OlmoStream
from megatron_exp.stream.slot import POOL

_FILE = "insertions.parquet"
_RECORDED = "analyses budget config corpus_path counts experiments fingerprints geometry keep_steps perturbations seeds".split()
"""What a manifest's record must hold for anything to be checked."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a manifest, read whole, with the hash of every payload."""

    manifest: Manifest
    insertions: pa.Table
    items: pa.Table
    probes: pa.Table
    payload_hashes: list[bytes]
    payload_lengths: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """A column of the insertions as numpy; nulls are 0."""
        column = self.insertions[name]
        filled = pc.fill_null(column, 0) if column.null_count else column
        return filled.to_numpy()

    def text(self, name: str) -> np.ndarray:
        """A dictionary column of the insertions as an array of strings."""
        return np.asarray(self.insertions[name].cast(pa.string()).to_pylist(), dtype=object)


def verify_manifest(manifest: Manifest) -> list[Finding]:
    """All findings; rows are named before the fingerprint that they change, so the first finding is the place."""
    findings = list(_record(manifest))
    if findings:
        return findings  # nothing can be compared with a damaged record
    try:
        tables = _read(manifest)
    except UserError as error:
        return [Finding(str(manifest.path), str(error))]
    return [finding for check in _CHECKS for finding in check(tables)]


def _record(manifest: Manifest) -> Iterator[Finding]:
    """manifest.json is complete, agrees with itself, and has the plan fingerprint it names."""
    record = manifest.record
    missing = [name for name in _RECORDED if name not in record]
    if missing:
        yield Finding("manifest.json", f"it has no {', '.join(missing)}")
        return
    try:
        config = manifest.config
    except ValidationError as error:
        yield Finding(
            "manifest.json config",
            f"it is no valid configuration: {error.errors()[0]['msg']} ({'.'.join(map(str, error.errors()[0]['loc']))})",
        )
        return
    for name, configured in (("geometry", config.geometry.model_dump()), ("seeds", config.seeds.model_dump())):
        if record[name] != configured:
            yield Finding(
                f"manifest.json {name}", f"it is not that of the configuration in the same file: {record[name]} against {configured}"
            )
    if plan_fingerprint(record) != record["fingerprints"].get("plan"):
        yield Finding(
            "manifest.json",
            "its plan fingerprint does not belong to its content: geometry, seeds, analyses or another fingerprint was changed",
        )


def _read(manifest: Manifest) -> Tables:
    store = open_payloads(manifest.path)
    documents = [store.document(number) for number in range(store.num_documents)]
    hashes, lengths = [payload_hash(tokens) for tokens in documents], np.array([len(tokens) for tokens in documents], dtype=np.int64)
    return Tables(manifest, manifest.insertions(), manifest.items(), manifest.probes(), hashes, lengths)


def _rows(tables: Tables) -> Iterator[Finding]:
    """Every row on its own: numbers that must agree, offsets inside the slot, windows kept."""
    geometry, column = tables.manifest.geometry, tables.column
    slot, offset, length, step = column("slot"), column("offset").astype(np.int64), column("length").astype(np.int64), column("step")
    batch = np.uint64(geometry.global_batch_size)
    yield from rows_where(slot >= np.uint64(geometry.num_slots), _FILE, f"its slot is outside the run of {geometry.num_slots} slots")
    yield from rows_where(slot // batch != step, _FILE, "its step is not slot // global batch size")
    yield from rows_where(slot % batch != column("row"), _FILE, "its row is not slot % global batch size")
    yield from rows_where(
        (length < 1) | (offset + length > geometry.sequence_length),
        _FILE,
        f"it does not lie inside the slot's {geometry.sequence_length} tokens",
    )
    yield from rows_where((step < column("window_start")) | (step >= column("window_end")), _FILE, "its step is outside its window")
    layers = np.array([LAYERS.get(kind, 255) for kind in tables.text("kind")], dtype=np.uint8)
    yield from rows_where(layers != column("layer"), _FILE, "its layer does not belong to its kind")
    order = np.lexsort((offset, column("layer"), slot))
    yield from rows_where(order != np.arange(len(order)), _FILE, "it is out of order: rows are sorted by slot, layer, offset")


def _identities(tables: Tables) -> Iterator[Finding]:
    """Insertion ids are a function of seed, experiment, arm, kind, item and repetition; repetitions count from 0 without a gap."""
    seed = tables.manifest.config.seeds.placement
    names = list(zip(tables.text("experiment"), tables.text("arm"), tables.text("kind"), strict=True))
    keys = {name: seeding.key(seed, "insertion", *name) for name in set(names)}
    key = np.array([keys[name] for name in names], dtype=np.uint64)
    item, repetition = tables.column("item"), tables.column("repetition")
    expected = seeding.words64(key, repetition, item) if len(key) else key
    yield from rows_where(
        expected != tables.column("insertion_id"), _FILE, "its insertion_id is not that of its experiment, arm, kind, item and repetition"
    )
    order = np.lexsort((repetition, item, key))
    first = np.append(True, (key[order][1:] != key[order][:-1]) | (item[order][1:] != item[order][:-1]))[: len(order)]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    wrong = np.zeros(len(order), dtype=bool)
    wrong[order] = rank != repetition[order]
    yield from rows_where(wrong, _FILE, "the repetitions of its item do not count 0, 1, 2, ...: a copy is missing or there twice")


def _items(tables: Tables) -> Iterator[Finding]:
    """Every insertion belongs to a treated item of its condition, and carries that item's payload."""
    known = {
        (row["experiment"], row["item"], row["arm"]): row
        for row in tables.items.select(["experiment", "item", "arm", "condition", "role", "payload"]).to_pylist()
    }
    rows = tables.insertions.select(["experiment", "item", "arm", "condition", "payload", "kind"]).to_pylist()
    owners = [known.get((row["experiment"], row["item"], row["arm"])) for row in rows]
    yield from rows_where(np.array([owner is None for owner in owners], dtype=bool), _FILE, "items.parquet has no such item and arm")
    pairs = list(zip(rows, owners, strict=True))
    yield from rows_where(
        np.array([o is not None and o["condition"] != r["condition"] for r, o in pairs], dtype=bool),
        _FILE,
        "its condition is not that of its item",
    )
    yield from rows_where(
        np.array([o is not None and o["role"] != "treated" for _, o in pairs], dtype=bool), _FILE, "its item is not a treated one"
    )
    wrong = [o is not None and r["kind"] in ("tokens", "splice") and o["payload"] != r["payload"] for r, o in pairs]
    yield from rows_where(np.array(wrong, dtype=bool), _FILE, "its payload is not that of its item")


def _payloads(tables: Tables) -> Iterator[Finding]:
    """Payload numbers exist, and lengths and hashes are those of the stored tokens."""
    lengths, hashes = tables.payload_lengths, tables.payload_hashes
    has_payload = tables.insertions["payload"].is_valid().to_numpy()
    number = tables.column("payload").astype(np.int64)
    missing = has_payload & (number >= len(hashes))
    yield from rows_where(missing, _FILE, f"its payload is not among the {len(hashes)} stored ones")
    stored = has_payload & ~missing
    expected = np.where(stored, lengths[np.where(stored, number, 0)] if len(lengths) else 0, 0)
    yield from rows_where(stored & (expected != tables.column("length")), _FILE, "its length is not that of its payload")
    recorded = tables.insertions["payload_hash"].to_pylist()
    differs = [bool(stored[row]) and recorded[row] != hashes[number[row]] for row in range(len(recorded))]
    yield from rows_where(np.array(differs, dtype=bool), _FILE, "its payload's tokens in payloads.bin do not have the recorded hash")
    own = tables.items.select(["payload", "num_tokens"]).to_pylist()
    wrong = [row["payload"] is not None and (row["payload"] >= len(hashes) or row["num_tokens"] != lengths[row["payload"]]) for row in own]
    yield from rows_where(np.array(wrong, dtype=bool), "items.parquet", "its payload is not stored or has another length")


def _overlaps(tables: Tables) -> Iterator[Finding]:
    """No two token copies share a position, no two swaps a slot, and an exclusive insertion is alone in its slot."""
    slot, layer = tables.column("slot"), tables.column("layer")
    start = slot.astype(np.uint64) * np.uint64(tables.manifest.geometry.sequence_length) + tables.column("offset").astype(np.uint64)
    written = np.flatnonzero(layer == LAYERS["tokens"])
    order = written[np.argsort(start[written], kind="stable")]
    end = start + tables.column("length").astype(np.uint64)
    overlapping = np.zeros(len(slot), dtype=bool)
    overlapping[order[1:]] = start[order][1:] < end[order][:-1]
    yield from rows_where(overlapping, _FILE, "it overlaps the token insertion before it")
    swaps = np.flatnonzero(layer == LAYERS["swap"])
    twice = np.zeros(len(slot), dtype=bool)
    twice[swaps[1:]] = slot[swaps][1:] == slot[swaps][:-1]
    yield from rows_where(twice, _FILE, "a second swap of the same slot")
    exclusive = tables.column("exclusive").astype(bool)
    _, inverse, sizes = np.unique(slot, return_inverse=True, return_counts=True)
    yield from rows_where(exclusive & (sizes[inverse] > 1), _FILE, "it is exclusive, but something else touches its slot")


def _index(tables: Tables) -> Iterator[Finding]:
    """The overlay index, which training reads, holds exactly the rows of the table. The fingerprint tells which of the two was changed."""
    expected = build_index(tables.insertions, tables.manifest.experiments)
    try:
        stored = tables.manifest.index
    except UserError as error:
        yield Finding(str(tables.manifest.path), str(error))
        return
    table_is_sound = fingerprint.of_table(tables.insertions) == tables.manifest.record["fingerprints"]["insertions"]
    for name, mine, theirs in (
        ("overlay-entries.npy", stored.entries, expected.entries),
        ("overlay-slots.npy", stored.slots, expected.slots),
    ):
        if len(mine) != len(theirs):
            yield Finding(name, f"it has {len(mine)} rows, but {_FILE} gives {len(theirs)}")
        elif table_is_sound or mine.dtype != expected.entries.dtype:
            yield from rows_where(np.asarray(mine) != theirs, name, f"it differs from what {_FILE} gives")
        else:
            yield from rows_where(np.asarray(mine) != theirs, _FILE, f"it differs from {name}, which was written with it")


def _counts(tables: Tables) -> Iterator[Finding]:
    """Requested = placed: the record's counts per experiment and condition are those of the table."""
    grouped = tables.insertions.group_by(["experiment", "condition"]).aggregate([("slot", "count"), ("slot", "count_distinct")]).to_pylist()
    placed = {(row["experiment"], row["condition"]): (row["slot_count"], row["slot_count_distinct"]) for row in grouped}
    recorded = {(e, c): (cell["insertions"], cell["slots"]) for e, cells in tables.manifest.counts.items() for c, cell in cells.items()}
    for name in sorted(placed.keys() | recorded.keys()):
        requested, found = recorded.get(name, (0, 0)), placed.get(name, (0, 0))
        if requested != found:
            yield Finding(
                "manifest.json counts",
                f"experiment {name[0]}, condition {name[1]}: {requested[0]} copies in {requested[1]} slots were requested, {found[0]} in {found[1]} are placed",
            )


def _budget(tables: Tables) -> Iterator[Finding]:
    """The recorded totals are exact and within the budget."""
    budget, geometry = tables.manifest.record["budget"], tables.manifest.geometry
    found = rewritten(tables.insertions, geometry)
    for name, recorded, counted in (
        ("modified_tokens", budget["modified_tokens"], found.tokens),
        ("touched_slots", budget["touched_slots"], found.slots),
    ):
        if recorded != counted:
            yield Finding(f"manifest.json budget {name}", f"{recorded} is recorded, the insertions give {counted}")
    if budget["fraction"] is not None and budget["unit"] == "tokens" and found.tokens > budget["fraction"] * geometry.num_tokens:
        yield Finding(
            "manifest.json budget", f"{found.tokens} tokens are rewritten, more than {budget['fraction']:.4%} of {geometry.num_tokens}"
        )
    if budget["fraction"] is not None and budget["unit"] == "slots" and found.slots > round(budget["fraction"] * geometry.num_slots):
        yield Finding(
            "manifest.json budget", f"{found.slots} slots are touched, more than {budget['fraction']:.4%} of {geometry.num_slots}"
        )


def _fingerprints(tables: Tables) -> Iterator[Finding]:
    """Recomputed from tables and payloads."""
    record = tables.manifest.record
    computed = table_fingerprints(tables.items, tables.insertions, tables.probes, tables.payload_hashes)
    files = {"items": "items.parquet", "insertions": _FILE, "probes": "probes.parquet", "payloads": "payloads.bin"}
    for name, value in computed.items():
        if record["fingerprints"][name] != value:
            yield Finding(files[name], f"its content has fingerprint {value[:12]}, but {record['fingerprints'][name][:12]} was planned")


def _corpus(tables: Tables) -> Iterator[Finding]:
    """The corpus it was planned on still lies there, gives the same order, and has the slots that swaps take."""
    manifest = tables.manifest
    try:
        corpus = Corpus.open(manifest.corpus_path)
        manifest.check_corpus(corpus)
        stream = manifest.open_stream(corpus)
    except UserError as error:
        yield Finding(str(manifest.corpus_path), str(error))
        return
    if stream.fingerprint != manifest.record["fingerprints"]["order"]:
        yield Finding(
            "manifest.json fingerprints.order",
            f"the corpus and configuration give {stream.fingerprint[:12]}: the order of slots is another",
        )
    if isinstance(stream, OlmoStream) and not stream.is_permutation():
        yield Finding(ORDER_NAME, "it does not list every instance once: it is not the order of this corpus")
    source = tables.column("source_slot")
    limit = np.where(source >= np.uint64(POOL), np.uint64(POOL + stream.pool_slots), np.uint64(stream.num_slots))
    yield from rows_where(
        tables.insertions["source_slot"].is_valid().to_numpy() & (source >= limit), _FILE, "its source slot does not exist"
    )


_CHECKS: tuple[Callable[[Tables], Iterator[Finding]], ...] = (
    _rows,
    _identities,
    _items,
    _payloads,
    _overlaps,
    _index,
    _counts,
    _budget,
    _fingerprints,
    _corpus,
)
