"""Writing a manifest directory: under a temporary name, renamed when whole, never edited."""

from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import __version__, fingerprint
from megatron_exp.manifest import schema
from megatron_exp.manifest.overlay_index import ENTRIES_NAME, SLOTS_NAME, build_index, write_index
from megatron_exp.manifest.reader import RECORD_NAME, record_checksum
from megatron_exp.shards.checksums import file_sum

_ROW_GROUP = 1 << 17


class Tables(NamedTuple):
    """The tables of a manifest. reserve, bank: empty where no experiment has a controller; then they are no files."""

    items: pa.Table
    insertions: pa.Table
    probes: pa.Table
    reserve: pa.Table
    bank: pa.Table

    def present(self) -> dict[str, pa.Table]:
        """Those that are written, by name."""
        return {name: table for name, table in self._asdict().items() if len(table) or name not in ("reserve", "bank")}


def plan_fingerprint(record: dict[str, Any]) -> str:
    """Fingerprint of everything that decides what a run trains on and how it is judged (no paths, no versions)."""
    parts = {name: value for name, value in record["fingerprints"].items() if name != "plan"}
    decided = [record[name] for name in ("geometry", "seeds", "experiments", "analyses", "keep_steps", "perturbations")]
    if "controllers" in record:
        # The source of a rule is not its behaviour: that is checked on every segment.
        decided.append({name: {**one, "rule_hash": None} for name, one in record["controllers"].items()})
    return fingerprint.of_json([parts, *decided])


def table_fingerprints(tables: Tables, payload_hashes: list[bytes]) -> dict[str, str]:
    """Fingerprints of the tables and of the payload store."""
    return {name: fingerprint.of_table(table) for name, table in tables.present().items()} | {
        "payloads": fingerprint.of_bytes(*payload_hashes)
    }


def write_table(path: Path, table: pa.Table) -> None:
    """A table of the manifest as Parquet.

    Names are dictionary-encoded. Trying that for numbers, most of which are different in every row, takes longer and a larger file. Row groups are small
    enough that one step is found without reading the table.
    """
    names = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP, use_dictionary=names)


def write_manifest(directory: Path, record: dict[str, Any], tables: Tables) -> None:
    """Write tables, overlay index and record into `directory`, which is under construction and holds the payload store.

    `record` is completed with schema version, package version, the plan fingerprint, the sums of the files (the payload store has hashes of its own) and
    its own checksum.
    """
    for name, table in tables.present().items():
        write_table(directory / f"{name}.parquet", table)
    write_index(directory, build_index(tables.insertions, record["experiments"]))
    record["schema_version"] = schema.SCHEMA_VERSION
    record["package_version"] = __version__
    record["fingerprints"]["plan"] = plan_fingerprint(record)
    written = [*(f"{name}.parquet" for name in tables.present()), SLOTS_NAME, ENTRIES_NAME]
    record["files"] = {name: file_sum(directory / name).as_record() for name in written}
    record["checksum"] = record_checksum(record)
    (directory / RECORD_NAME).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")
