"""Commands about dependence between experiments: cpdt, and what is printed of power and cost before a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from megatron_exp.cli.power import print_plan, shown
from megatron_exp.cli.show import console
from megatron_exp.cli.tasks import parsed_task
from megatron_exp.errors import UserError

if TYPE_CHECKING:
    from megatron_exp.dependence.run import Settings

_GATE = 2
"""Exit code of `--gate` where something depends on something."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("cpdt")(cpdt)


def cpdt(
    manifest: Annotated[Path, typer.Argument(help="MANIFEST directory.")],
    out: Annotated[Path | None, typer.Option(help="CPDT directory to write or to continue.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Checkpoint, or a run for its last one.")] = None,
    seeds: Annotated[int, typer.Option(help="Replicates. More can be added later.")] = 5,
    steps: Annotated[int, typer.Option(help="Updates of every run.")] = 100,
    intensity: Annotated[float, typer.Option(help="Share of a run's tokens for each experiment; 0: what it requests itself.")] = 0.01,
    share: Annotated[list[str] | None, typer.Option(help="NAME=FRACTION: this experiment's own share. Repeatable.")] = None,
    experiment: Annotated[list[str] | None, typer.Option(help="Only this experiment. Repeatable.")] = None,
    raise_to: Annotated[float, typer.Option(help="Largest share, where an experiment's own effect does not show at the first.")] = 0.04,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the checkpoint's own.")] = None,
    leave_one_out: Annotated[str, typer.Option(help="auto (where ALL changes a column), always, or never.")] = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Only print power and cost.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only settle the intensities (before an array of --task jobs).")] = False,
    task: Annotated[str | None, typer.Option(help="I/N: only the I-th of N shares of the runs (from 0), no matrix.")] = None,
    collect: Annotated[bool, typer.Option("--collect", help="Only write the matrix of the runs there are.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Exit code 2 where something is dependent.")] = False,
    tokens_per_second: Annotated[float | None, typer.Option(help="Of training on this machine, for hours in --plan.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print --plan as JSON.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a value under training: a.b=c. Repeatable.")] = None,
) -> None:
    """Do the experiments of a manifest disturb one another? Short runs from one checkpoint, before the long one."""
    if plan:
        print_plan(manifest, seeds, steps, tokens_per_second, json, tuple(experiment or ()))
        return
    if from_ is None or out is None:
        raise UserError("cpdt needs --from CHECKPOINT and --out DIR (or --plan, to see what it would cost).")
    from megatron_exp.model.precision import require_engine

    require_engine()
    from megatron_exp.dependence.run import Settings

    settings = Settings(
        num_seeds=seeds,
        steps=steps,
        intensity=intensity,
        raise_to=max(raise_to, intensity) if intensity else 0.0,
        shares=dict(map(_parsed_share, share or ())),
        only=tuple(experiment or ()),
        learning_rate=learning_rate,
        leave_one_out=leave_one_out,
        task=parsed_task(task) if task else None,
        prepare=prepare,
        collect=collect,
        overrides=tuple(set_ or ()),
    )
    record = _run(manifest, from_, out, settings)
    if record is None:
        return
    print_matrix(record, out)
    if gate and any(cell["verdict"] == "dependent" and cell["comparison"] in ("primary", "spill-over") for cell in record["cells"]):
        sys.exit(_GATE)


def _run(manifest: Path, checkpoint: Path, out: Path, settings: "Settings") -> dict[str, Any] | None:
    """Join what the applications lend one another."""
    from megatron_exp.dependence.run import Machinery
    from megatron_exp.dependence.run import cpdt as go
    from megatron_exp.preparation.plan import plan as planner
    from megatron_exp.training.continuation import Continuation, rate_at

    machinery = Machinery(planner=planner, continue_from=Continuation.open, learning_rate=rate_at)
    return go(manifest, checkpoint, out, settings, machinery, command=sys.argv)


def _parsed_share(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise UserError(f"--share {text!r} is not of the form NAME=FRACTION, such as poisoning=0.1.") from error


def print_matrix(record: dict[str, Any], out: Path) -> None:
    """The comparisons that matter: own effects, ALL against alone, and every dependent or undecided pair."""
    table = Table("column", "comparison", Column("estimate", justify="right"), Column("interval", justify="right"), "verdict", box=None)
    for cell in record["cells"]:
        if cell["comparison"] in ("diagonal", "primary") or cell["verdict"] not in ("independent", "not testable"):
            told = cell["verdict"]
            if told == "undecided":
                told += f" ({cell['seeds_needed']} seeds)" if cell["seeds_needed"] else " (more than 1000 seeds)"
            table.add_row(cell["column"], f"{cell['row']} - {cell['reference']}", shown(cell["estimate"]), _interval(cell), told)
    console.print(table)
    for row in record["leave_one_out"]:
        if row["culprit"]:
            console.print(f"{row['column']} changes back where {row['left_out']} is left out", markup=False, highlight=False)
    for note in record["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    if not record["complete"]:
        console.print(f"INCOMPLETE: {len(record['missing'])} runs are missing", style="bold", markup=False, highlight=False)
    overhead = record["cost"]["overhead"]
    spent = f"; outside scoring {overhead:.3f} x the time of its steps" if overhead else ""
    console.print(f"{record['verdict']}: {out}/matrix.json ({record['cost']['num_cells']} runs{spent})", markup=False, highlight=False)


def _interval(cell: dict[str, Any]) -> str:
    return f"[{shown(cell['low'])}, {shown(cell['high'])}]"
