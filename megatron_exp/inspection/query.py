"""SQL over the tables of a manifest or a run, reading only."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from megatron_exp.control.segments import segment_path
from megatron_exp.errors import UserError
from megatron_exp.inspection.items import newest_evaluation_table
from megatron_exp.inspection.targets import Target

if TYPE_CHECKING:
    import duckdb

MANIFEST_TABLES = ("insertions", "items", "probes")
CONTROL_TABLES = ("reserve", "bank")
RUN_TABLES = ("responses", "results")


def query(target: Target, sql: str) -> pa.Table:
    """The answer of one SELECT over insertions, items, probes and, where there are such, reserve, bank, segments, responses and results.

    The database lives in memory and may open these files and nothing else: no other file, no network, no extension.

    Raises:
        UserError: where the statement is not a single SELECT, or DuckDB refuses it.
    """
    import duckdb  # a third of a second: only those who ask in SQL pay for it

    tables = table_files(target)
    connection = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"})
    try:
        _require_select(connection, sql)
        for name, paths in tables.items():
            connection.from_parquet([str(path) for path in paths]).create_view(name)
        connection.execute("SET allowed_paths = [" + ", ".join(_quoted(str(path)) for paths in tables.values() for path in paths) + "]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return connection.sql(sql).to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"The query was refused: {str(error).strip()} The tables are: {', '.join(tables)}.") from error
    finally:
        connection.close()


def table_files(target: Target) -> dict[str, list[Path]]:
    """Table names and their files."""
    tables = {name: [target.manifest.path / f"{name}.parquet"] for name in MANIFEST_TABLES}
    if target.manifest.controllers:
        tables |= {name: [target.manifest.path / f"{name}.parquet"] for name in CONTROL_TABLES}
    evaluated = {name: newest_evaluation_table(target, name) for name in RUN_TABLES}
    tables |= {name: [path] for name, path in evaluated.items() if path is not None}
    if target.segments:
        tables["segments"] = [segment_path(target.path, segment.number) for segment in target.segments]
    return {name: [path.resolve() for path in paths] for name, paths in tables.items()}


def _require_select(connection: "duckdb.DuckDBPyConnection", sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type.name != "SELECT":
        raise UserError(
            "--sql takes exactly one SELECT statement: this command only reads. Give one SELECT, without a second statement after it."
        )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
