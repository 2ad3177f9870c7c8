"""A manifest against itself: tables, payloads, overlay index, counts, budget and fingerprints say the same."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import Finding, rows_where
from megatron_exp.inspection.verify_reserve import RESERVE_CHECKS
from megatron_exp.inspection.verify_rows import INSERTIONS_FILE, ROW_CHECKS, Tables
from megatron_exp.manifest.overlay_index import build_index
from megatron_exp.manifest.payloads import open_payloads, stored_hashes
from megatron_exp.manifest.reader import Manifest, record_checksum
from megatron_exp.manifest.reference_answers import ANSWERS_NAME, read_answers
from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.manifest.writer import Tables as Written
from megatron_exp.manifest.writer import plan_fingerprint, table_fingerprints
from megatron_exp.placement.boundaries import DocumentBoundaries
from megatron_exp.shards.checksums import file_sum
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream
from megatron_exp.stream.olmo import ORDER_NAME, OlmoStream
from megatron_exp.stream.slot import POOL

_RECORDED = "analyses budget checksum config corpus_path counts experiments files fingerprints geometry keep_steps perturbations seeds".split()
"""What a manifest's record must hold for anything to be checked."""


def verify_manifest(manifest: Manifest) -> list[Finding]:
    """All findings; rows are named before the fingerprint that they change, so the first finding is the place."""
    findings = list(_record(manifest))
    if findings:
        return findings  # nothing can be compared with a damaged record
    changed = [*_unchanged_record(manifest), *_files(manifest)]
    try:
        tables = _read(manifest)
    except UserError as error:
        return [Finding(str(manifest.path), str(error)), *changed]
    return [*(finding for check in _CHECKS for finding in _of(check, tables, bool(changed))), *changed]


def _of(check: Callable[[Tables], Iterator[Finding]], tables: Tables, are_changed: bool) -> Iterator[Finding]:
    """The findings of a check. In files that are known to be changed it may meet anything, and ends there."""
    expected = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, pa.ArrowException) if are_changed else ()
    with contextlib.suppress(*expected):
        yield from check(tables)


def _unchanged_record(manifest: Manifest) -> Iterator[Finding]:
    if record_checksum(manifest.record) != manifest.record["checksum"]:
        yield Finding("manifest.json", "it was changed after it was written: it does not agree with its own checksum")


def _files(manifest: Manifest) -> Iterator[Finding]:
    """Tables and overlay index are, byte for byte, those that were written."""
    for name, written in manifest.record["files"].items():
        path = manifest.path / name
        if path.is_file() and file_sum(path).as_record() != written:
            yield Finding(name, f"it was changed after it was written, as {written['bytes']} bytes with another checksum")


def _record(manifest: Manifest) -> Iterator[Finding]:
    """manifest.json is complete, agrees with itself, and has the plan fingerprint it names."""
    record = manifest.record
    missing = [name for name in _RECORDED if name not in record]
    if missing:
        yield Finding("manifest.json", f"it has no {', '.join(missing)}")
        return
    try:
        config = manifest.config
    except UserError as error:
        yield Finding("manifest.json config", str(error))
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
    own = manifest.items(), manifest.insertions(), manifest.probes(), manifest.reserve(), manifest.bank()
    return Tables(manifest, Written(*own), stored_hashes(store), np.diff(store.starts))


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
            yield Finding(name, f"it has {len(mine)} rows, but {INSERTIONS_FILE} gives {len(theirs)}")
        elif table_is_sound or mine.dtype != expected.entries.dtype:
            yield from rows_where(np.asarray(mine) != theirs, name, f"it differs from what {INSERTIONS_FILE} gives")
        else:
            yield from rows_where(np.asarray(mine) != theirs, INSERTIONS_FILE, f"it differs from {name}, which was written with it")


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
    found, reserved = rewritten(tables.insertions, geometry), pc.sum(tables.written.reserve["length"]).as_py() or 0
    for name, recorded, counted in (
        ("modified_tokens", budget["modified_tokens"], found.tokens),
        ("touched_slots", budget["touched_slots"], found.slots),
        ("shifted_tokens", budget["shifted_tokens"], found.shifted),
        ("reserved_tokens", budget["reserved_tokens"], reserved),
    ):
        if recorded != counted:
            yield Finding(f"manifest.json budget {name}", f"{recorded} is recorded, the insertions give {counted}")
    used = found.tokens + reserved
    if budget["fraction"] is not None and budget["unit"] == "tokens" and used > budget["fraction"] * geometry.num_tokens:
        yield Finding(
            "manifest.json budget", f"{used} tokens are rewritten or reserved, more than {budget['fraction']:.4%} of {geometry.num_tokens}"
        )
    if budget["fraction"] is not None and budget["unit"] == "slots" and found.slots > round(budget["fraction"] * geometry.num_slots):
        yield Finding(
            "manifest.json budget", f"{found.slots} slots are touched, more than {budget['fraction']:.4%} of {geometry.num_slots}"
        )


def _fingerprints(tables: Tables) -> Iterator[Finding]:
    """Recomputed from tables and payloads."""
    record = tables.manifest.record
    for name, value in table_fingerprints(tables.written, tables.payload_hashes).items():
        planned = record["fingerprints"].get(name, "none")
        if planned != value:
            file = "payloads.bin" if name == "payloads" else f"{name}.parquet"
            yield Finding(file, f"its content has fingerprint {value[:12]}, but {planned[:12]} was planned")


def _reference(tables: Tables) -> Iterator[Finding]:
    """The answers of the reference model are those that were recorded."""
    told = tables.manifest.record.get("reference")
    if told is None:
        return
    try:
        _, identity, found = read_answers(tables.manifest.path / ANSWERS_NAME)
    except UserError as error:
        yield Finding(ANSWERS_NAME, str(error))
        return
    if found != told["answers"] or identity != {name: value for name, value in told.items() if name != "answers"}:
        yield Finding(ANSWERS_NAME, "its answers, or the model they are of, are not those that manifest.json names")


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
    yield from _boundaries(tables, stream)
    source = tables.column("source_slot")
    limit = np.where(source >= np.uint64(POOL), np.uint64(POOL + stream.pool_slots), np.uint64(stream.num_slots))
    yield from rows_where(
        tables.insertions["source_slot"].is_valid().to_numpy() & (source >= limit), INSERTIONS_FILE, "its source slot does not exist"
    )


def _boundaries(tables: Tables, stream: Stream) -> Iterator[Finding]:
    """Every splice lies where a document begins."""
    slot, offset, wrong = tables.column("slot"), tables.column("offset"), np.zeros(len(tables.insertions), dtype=bool)
    find = DocumentBoundaries(stream)
    for row in np.flatnonzero(tables.is_kind("splice") & (slot < np.uint64(stream.num_slots))):
        wrong[row] = int(offset[row]) not in find(int(slot[row]))
    yield from rows_where(wrong, INSERTIONS_FILE, "no document begins at its offset, where it was to be spliced in")


_CHECKS: tuple[Callable[[Tables], Iterator[Finding]], ...] = (
    *ROW_CHECKS,
    *RESERVE_CHECKS,
    _index,
    _counts,
    _budget,
    _fingerprints,
    _reference,
    _corpus,
)
