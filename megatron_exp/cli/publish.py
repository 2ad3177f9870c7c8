"""Commands that turn results into tables: export, compare."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from megatron_exp.cli.show import console
from megatron_exp.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("export")(export)
    app.command("compare")(compare)


def export(
    run: Annotated[Path, typer.Argument(help="RUN directory.")],
    table: Annotated[str, typer.Option(help="primary, results, inserted or dynamics.")] = "primary",
    format_: Annotated[str, typer.Option("--format", help="csv, md, tex or parquet.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output (not for parquet).")] = None,
    against: Annotated[Path | None, typer.Option(help="The twin, for its columns in dynamics.")] = None,
) -> None:
    """Write one table of a run for a paper or another tool."""
    from megatron_exp.report.export import export as go

    _deliver(go(run, table, format_, against), format_, out)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="RUN directories: several seeds, or several sizes.")],
    format_: Annotated[str | None, typer.Option("--format", help="csv, md, tex or parquet instead of a table on the terminal.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write in that format.")] = None,
) -> None:
    """Put the primary results of several runs side by side."""
    from megatron_exp.report.compare import compare as go
    from megatron_exp.report.formats import encode

    compared, table = go(runs)
    if format_ is not None:
        _deliver(encode(table, format_), format_, out)
        return
    if out is not None:
        raise UserError("--out needs --format: the table of the terminal is no file. Add --format csv, md, tex or parquet.")
    for one in compared:
        console.print(Text(f"{one.label} (group {one.group}): {one.note}"))
    console.print(_pivot(table.to_pylist(), [one.label for one in compared]))


def _pivot(rows: list[dict], labels: list[str]) -> Table:
    """One line per primary outcome, one column per run, then the means over runs."""
    from megatron_exp.display.numbers import interval, measured

    columns = list(dict.fromkeys([*labels, *(row["run"] for row in rows)]))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        text = f"{measured(row['estimate'])} {interval(row['low'], row['high'])}\n{row['verdict'] or 'not tested'}"
        cells.setdefault((row["experiment"], row["outcome"], row["condition"]), {})[row["run"]] = text
    table = Table("experiment", "outcome", "condition", *(Column(Text(column)) for column in columns), box=None)
    for key, found in cells.items():
        table.add_row(*(Text(part) for part in key), *(Text(found.get(column, "")) for column in columns))
    return table


def _deliver(data: bytes, kind: str, out: Path | None) -> None:
    from megatron_exp.files import write_file

    if out is None and kind == "parquet":
        raise UserError("parquet is no text for a terminal. Give --out FILE.")
    if out is None:
        typer.echo(data.decode(), nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, data)
        console.print(f"{kind}: {out}", markup=False, highlight=False)
