"""Commands for clusters: submit, cache. What became of submitted jobs is asked here for `status`, too."""

import subprocess  # noqa: TID251 - a door: sbatch, squeue and scancel are SLURM's interface
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_exp.cli.show import console
from megatron_exp.errors import UserError

if TYPE_CHECKING:
    from megatron_exp.cluster.prepare import Prepared
    from megatron_exp.submission import Submission

_ALIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED"}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("submit")(submit)
    app.command("cache")(cache)


def submit(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    cluster: Annotated[Path, typer.Option(help="Cluster profile (docs/cluster.md).")],
    out: Annotated[Path | None, typer.Option(help="Directory of everything it makes; default: the configuration's name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and commands, write and submit nothing.")] = False,
) -> None:
    """Hand the whole chain, from text to report, to SLURM. Again with the same --out: what is not done yet."""
    from megatron_exp.cluster.prepare import prepare, write

    prepared = prepare(config, cluster, out)
    if prepared.memory:
        console.print(f"# {prepared.memory}" if dry_run else prepared.memory, markup=False, highlight=False)
    if dry_run:
        _print(prepared)
        return
    root = prepared.folders.root
    _refuse_running(root)
    submission = _hand_in(write(prepared))
    for stage in submission.stages:
        console.print(f"{stage.name}: job {stage.job}", markup=False, highlight=False)
    console.print(f"megatron-exp status {root} says how far it is.", markup=False, highlight=False)


def cache(
    corpus: Annotated[Path, typer.Argument(help="CORPUS directory.")],
    to: Annotated[Path, typer.Option(help="Directory on this node's own disk.")],
) -> None:
    """Copy the shards to this node's disk and check every byte; for `train --cache`. Again: only what is missing."""
    from megatron_exp.cli.show import progress_line
    from megatron_exp.shards.cache import cache_folder, fill_cache
    from megatron_exp.shards.corpus import Corpus

    opened = Corpus.open(corpus)
    with progress_line() as progress:
        copied, found = fill_cache(opened, to, progress)
    console.print(f"{cache_folder(opened, to)}: {copied:,} bytes copied, {found:,} found and checked.", markup=False, highlight=False)


def _print(prepared: "Prepared") -> None:
    for number, (name, text) in enumerate(prepared.scripts.items()):
        dependency = ["--dependency=afterok:<the job before>", "--kill-on-invalid-dep=yes"] if number else []
        typer.echo(f"# ===== {prepared.script_path(name)}")
        typer.echo(f"# sbatch {' '.join([*dependency, name])}")
        typer.echo(text)


def _hand_in(submission: "Submission") -> "Submission":
    """Submit all stages, each after the one before; where one is refused, the others are taken back."""
    from megatron_exp.cluster.prepare import with_job

    previous: str | None = None
    for index, stage in enumerate(submission.stages):
        dependency = [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"] if previous else []
        done = _run(["sbatch", "--parsable", *dependency, stage.script])
        if done.returncode:
            if submission.jobs:
                _run(["scancel", *submission.jobs])
            raise UserError(
                f"sbatch refused the stage {stage.name} ({stage.script}): {done.stderr.strip()} Nothing stays submitted. Correct the cluster profile and "
                "submit again."
            )
        previous = done.stdout.strip().partition(";")[0]
        submission = with_job(submission, index, previous)
        submission.write()  # after each, so that no job is without its record
    return submission


def _refuse_running(root: Path) -> None:
    """UserError where jobs of an earlier submission of this directory are still there: two trainers must not share a run."""
    from megatron_exp.submission import RECORD_NAME, Submission

    if not (root / RECORD_NAME).exists():
        return
    states = job_states(Submission.open(root).jobs)
    alive = sorted(job for job, state in states.items() if state in _ALIVE)
    if alive:
        raise UserError(
            f"Jobs of an earlier submission of {root} are still there: {', '.join(alive)}. Wait for them, or end them first: scancel {' '.join(alive)}"
        )


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """Job number to SLURM's state (of an array job: its least finished one), of those that SLURM still knows; empty where there is no SLURM."""
    if not jobs:
        return {}
    try:
        done = _run(["squeue", "--noheader", "--states=all", "--format=%F %T", f"--jobs={','.join(jobs)}"])
    except UserError:
        return {}
    states: dict[str, str] = {}
    for job, state in (line.split() for line in done.stdout.splitlines()):
        if job in jobs and (job not in states or _rank(state) < _rank(states[job])):
            states[job] = state
    return states


def _rank(state: str) -> int:
    """The order in which states tell most about an array: what runs, what waits, what failed, what is done."""
    order = ("RUNNING", "COMPLETING", "PENDING")
    return order.index(state) if state in order else (5 if state == "COMPLETED" else 4)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {command[0]} on this machine, so nothing can be handed to SLURM. Run this on a login node of the cluster, or see the scripts with "
            "--dry-run."
        ) from error
