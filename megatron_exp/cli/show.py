"""What commands print: tables on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from rich.console import Console
from rich.table import Column, Table

from megatron_exp.display.numbers import count, duration, size

if TYPE_CHECKING:
    from megatron_exp.manifest.reader import Manifest
    from megatron_exp.preparation.preprocess_progress import Progress

_LOG_SECONDS = 10

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def print_counts(manifest: "Manifest") -> None:
    """Items, insertions and tokens per experiment and condition, then both fractions."""
    numbers = ("items", "controls", "insertions", "tokens", "slots")
    table = Table(Column("experiment", overflow="fold"), Column("condition", overflow="fold"), box=None)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for experiment, conditions in manifest.counts.items():
        for condition, cell in conditions.items():
            table.add_row(experiment, condition, *(f"{cell[name]:,}" for name in numbers))
    console.print(table)
    budget = manifest.record["budget"]
    console.print(
        f"modified tokens: {budget['modified_tokens']:,} ({budget['modified_fraction']:.3%}); touched slots: {budget['touched_slots']:,} "
        f"({budget['touched_fraction']:.3%}); manifest {manifest.fingerprint[:12]}",
        highlight=False,
    )
    for name, one in manifest.controllers.items():
        console.print(
            f"{name}: a controller decides every {one['interval']:,} steps; {one['first']} copies first, up to {one['largest']:,} in each of "
            f"{one['intervals']} intervals",
            markup=False,
            highlight=False,
        )
    if manifest.controllers:
        reserved = budget["reserved_tokens"]
        console.print(
            f"reserved for controllers: {reserved:,} tokens ({reserved / manifest.geometry.num_tokens:.3%}) in {budget['reserved_slots']:,} slots",
            highlight=False,
        )


def print_kept(manifest: "Manifest") -> None:
    """The states whose checkpoints stay for good, and what they take."""
    from megatron_exp.checkpoint.space import checkpoint_bytes
    from megatron_exp.model.presets import resolve_shape
    from megatron_exp.shards.corpus import Corpus

    config = manifest.config
    vocabulary_size = Corpus.open(manifest.corpus_path).vocabulary_size
    shape = resolve_shape(config.model, vocabulary_size, config.geometry.sequence_length)
    each = checkpoint_bytes(shape.num_parameters, config.training.precision)
    states = sorted({*manifest.keep_steps, config.geometry.steps})
    listed = ", ".join(f"{state:,}" for state in states)
    console.print(f"checkpoints kept: {listed}: {len(states)} x {size(each)} = {size(len(states) * each)}", highlight=False)


def print_verdicts(directory: Path) -> None:
    """One line per experiment of an evaluation directory."""
    results = orjson.loads((directory / "results.json").read_bytes())
    for name, one in results["experiments"].items():
        primary = next((row for row in one["outcomes"] if row.get("primary")), None)
        detail = (
            f" ({primary['outcome']}: {primary['estimate']:.4g}, p = {primary['p']:.2g})"
            if primary and primary.get("p") is not None
            else ""
        )
        console.print(f"{name}: {one['verdict']}{detail}", markup=False, highlight=False)
    console.print(f"results: {directory}", markup=False, highlight=False)


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[["Progress | str"], None]]:
    """Something to call with progress: it shows one changing line on a terminal, and now and then a line of its own in a log."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda progress: status.update(progress_text(progress))
        return
    shown = [float("-inf")]

    def show(progress: "Progress | str") -> None:
        if time.monotonic() - shown[0] >= _LOG_SECONDS:
            shown[0] = time.monotonic()
            console.print(progress_text(progress), markup=False, highlight=False)

    yield show


def progress_text(progress: "Progress | str") -> str:
    """How far, how fast, how long still."""
    if isinstance(progress, str):
        return progress
    parts = [
        f"{progress.phase} {progress.fraction:.0%}",
        f"{progress.megabytes_per_second:.1f} MB/s",
        f"{count(progress.tokens_per_second)} tokens/s",
    ]
    left = progress.seconds_left
    return ", ".join([*parts, f"{duration(left)} left"] if left is not None else parts)
