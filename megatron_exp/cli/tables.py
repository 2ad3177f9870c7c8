"""What `plan` prints about the data of every experiment, and beside the paper's where the run has its geometry."""

from rich.table import Column, Table

from megatron_exp.cli.show import console
from megatron_exp.display.paper_numbers import REFERENCE_GEOMETRY, compared
from megatron_exp.manifest.reader import Manifest

_COLUMNS = ("items", "insertions", "tokens")
_KINDS = ("iid", "ood", "unusual", "reserved")


def print_data(manifest: Manifest) -> None:
    """Tokens and their share of the run per experiment (Table 1 of the paper), and what kind of data they are (Table 4)."""
    kinds = manifest.record["data_kinds"]
    if not kinds:
        return
    table = Table(Column("experiment", overflow="fold"), box=None)
    for name in (*_COLUMNS, "fraction", *_KINDS):
        table.add_column(name, justify="right", no_wrap=True)
    total = {name: sum(cell[name] for cell in kinds.values()) for name in (*_COLUMNS, "fraction", *_KINDS)}
    for name, cell in {**kinds, "total": total}.items():
        numbers = [f"{cell[column]:,}" for column in _COLUMNS], [f"{cell['fraction']:.3%}"], [f"{cell[column]:,}" for column in _KINDS]
        table.add_row(name, *(text for part in numbers for text in part))
    console.print(table)
    if manifest.record["geometry"] == REFERENCE_GEOMETRY:
        _print_beside_the_paper(manifest)


def _print_beside_the_paper(manifest: Manifest) -> None:
    types = {name: analysis["type"] for name, analysis in manifest.analyses.items()}
    table = Table(Column("million tokens", overflow="fold"), box=None)
    for name in ("here", "paper", "iid", "paper", "ood", "paper", "unusual", "paper"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = compared(manifest.record["data_kinds"], types)
    for row in rows:
        pairs = [(row.ours[name], getattr(row.paper, name)) for name in ("tokens", "iid", "ood", "unusual")]
        table.add_row(row.label, *(f"{value:,.1f}" for pair in pairs for value in pair))
    console.print(table)
    for row in rows:
        if row.reason:
            console.print(f"{row.label} differs from the paper: {row.reason}.", markup=False, highlight=False)
