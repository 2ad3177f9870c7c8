"""`cpdt`: from a manifest and a checkpoint to the dependence matrix."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_exp import __version__
from megatron_exp.config.load import override_config
from megatron_exp.config.schema import Config
from megatron_exp.dependence.bench import Bench, Planner
from megatron_exp.dependence.cells import Trainer
from megatron_exp.dependence.output import write_matrix
from megatron_exp.dependence.pilot import raised
from megatron_exp.dependence.plan import check_same, read_plan, write_plan
from megatron_exp.dependence.rows import leave_one_out_rows, standard_rows
from megatron_exp.dependence.start import Start, first_slots, learning_rate_config, open_start
from megatron_exp.dependence.what import Tested, tested
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.presets import resolve_shape
from megatron_exp.parallel.agreement import on_main
from megatron_exp.parallel.layout import start_parallel
from megatron_exp.shards.corpus import Corpus
from megatron_exp.statistics.dependence import DEPENDENT
from megatron_exp.stream.base import Stream
from megatron_exp.stream.keyed import KeyedStream
from megatron_exp.stream.olmo import OlmoStream

logger = logging.getLogger(__name__)

_LARGEST = 0.5


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What other applications lend: how a manifest is planned, how a checkpoint is trained on, and at what rate."""

    planner: Planner
    continue_from: Callable[..., Trainer]
    learning_rate: Callable[[Config, int], float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a test is made.

    num_seeds: replicates. steps: length of a run. intensity: share of a run's tokens for every experiment, raised up to `raise_to` where its own effect is not
    clear; 0: what the experiments request themselves in a run of this length. shares: intensity of single experiments, which is not raised. only: names of
    the experiments tested; empty: all. leave_one_out: `auto` trains ALL without each experiment where ALL changes a column. task: (number from 0, of how
    many) to do a share of the cells and no matrix. collect: write the matrix of the cells there are, without running any.
    """

    num_seeds: int = 5
    steps: int = 100
    intensity: float = 0.01
    raise_to: float = 0.04
    shares: Mapping[str, float] = field(default_factory=dict)
    only: Sequence[str] = ()
    learning_rate: float | None = None
    leave_one_out: str = "auto"
    task: tuple[int, int] | None = None
    prepare: bool = False
    collect: bool = False
    overrides: Sequence[str] = field(default_factory=tuple)

    def check(self) -> None:
        """UserError for numbers that make no test."""
        if self.num_seeds < 2:
            raise UserError(
                f"--seeds {self.num_seeds}: the spread of runs is estimated from replicates, so at least 2 are needed; 5 is the default."
            )
        if (
            self.steps < 1
            or not 0 <= self.intensity <= self.raise_to <= _LARGEST
            or any(not 0 < one <= _LARGEST for one in self.shares.values())
        ):
            raise UserError(
                f"--steps {self.steps}, --intensity {self.intensity:g}, --raise-to {self.raise_to:g}: at least one step is needed, and "
                f"0 <= intensity <= raise-to <= {_LARGEST}; a --share lies above 0 and is at most {_LARGEST}."
            )

    def fractions(self, names: Sequence[str]) -> dict[str, float]:
        """Share of the tokens for every experiment, before the pilot. UserError for a share of an experiment that is not tested."""
        unknown = sorted(set(self.shares) - set(names))
        if unknown:
            raise UserError(f"--share names {', '.join(unknown)}, which is not among the experiments tested: {', '.join(names)}.")
        return {name: self.shares.get(name, self.intensity) for name in names}


def cpdt(
    manifest_path: Path, checkpoint: Path, out: Path, settings: Settings, machinery: Machinery, command: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Run what is missing of a test, and write its matrix; every process of the run calls this with the same arguments.

    Returns:
        The content of matrix.json, None where only a share of the cells was asked for.

    Raises:
        UserError: for a checkpoint of another model, cells of another plan, or settings that cannot be had.
    """
    settings.check()
    manifest = Manifest.open(manifest_path)
    config = training_config(manifest, settings.overrides)
    corpus = Corpus.open(manifest.corpus_path)
    manifest.check_corpus(corpus)
    what, shape = tested(manifest, settings.only), resolve_shape(config.model, corpus.vocabulary_size, config.geometry.sequence_length)
    start = open_start(checkpoint, manifest, corpus, shape)
    wanted = plan_record(manifest, config, corpus, start, what, settings, machinery, command)
    if settings.collect:
        return write_matrix(Path(out), _settled(Path(out), wanted), what)
    layout = start_parallel(config.training.parallel)
    try:
        trainer = machinery.continue_from(start.path, shape, config.training, layout, wanted["learning_rate"])
        bench = Bench(
            directory=Path(out),
            manifest=manifest,
            corpus=corpus,
            layout=layout,
            trainer=trainer,
            planner=machinery.planner,
            fractions=settings.fractions(what.rows),
            columns=list(what.columns),
            slots=wanted["first_slots"],
            steps=settings.steps,
            plan="",
        )
        plan = _prepared(bench, wanted, settings)
        if settings.prepare:
            return None
        bench.fractions, bench.plan = plan["fractions"], plan["fingerprint"]
        _run_cells(bench, standard_rows(what.rows), settings)
        if settings.task:
            return None
        record = on_main(layout, lambda: write_matrix(Path(out), plan, what))
        if _needs_leave_one_out(record, settings):
            _run_cells(bench, leave_one_out_rows(what.rows), settings)
            record = on_main(layout, lambda: write_matrix(Path(out), plan, what))
        return record
    finally:
        layout.stop()


def training_config(manifest: Manifest, overrides: Sequence[str]) -> Config:
    """The manifest's config with `training.x=value` strings over it."""
    wrong = [override for override in overrides if not override.startswith(("training.", "model."))]
    if wrong:
        raise UserError(f"--set {wrong[0]} changes what the manifest has fixed. Only training and model may be set here.")
    return override_config(manifest.config, list(overrides))


def capacity(stream: Stream) -> int:
    """Slots that the whole order of a stream has, beyond the run too; with a pool that follows a run, what is left before the last one."""
    if isinstance(stream, OlmoStream):
        return len(stream.order) - stream.num_pool
    assert isinstance(stream, KeyedStream)
    return stream.num_indices


def plan_record(
    manifest: Manifest,
    config: Config,
    corpus: Corpus,
    start: Start,
    what: Tested,
    settings: Settings,
    machinery: Machinery,
    command: Sequence[str],
) -> dict[str, Any]:
    """What plan.json will say, before the pilot has settled the intensities."""
    rate = settings.learning_rate or machinery.learning_rate(learning_rate_config(start, manifest), start.step)
    blocks = first_slots(start, manifest, capacity(manifest.open_stream(corpus)), settings.steps, settings.num_seeds)
    notes = list(start.notes)
    if any(seen for _, seen in blocks):
        notes.append(
            f"the base slots of {sum(seen for _, seen in blocks)} replicates were trained on before the checkpoint: no others are left in the order"
        )
    training = config.training
    return {
        "package_version": __version__,
        "manifest": {"path": str(manifest.path.resolve()), "fingerprint": manifest.fingerprint},
        "checkpoint": start.record(),
        "learning_rate": rate,
        "steps": settings.steps,
        "intensity": {
            "asked": settings.intensity,
            "raise_to": settings.raise_to,
            "shares": dict(settings.shares),
            "only": sorted(settings.only),
        },
        "training": {
            "precision": training.precision,
            "fp8_recipe": training.fp8_recipe if training.precision == "fp8" else None,
            "optimizer": training.optimizer.model_dump(),
        },
        "num_seeds": settings.num_seeds,
        "first_slots": [first for first, _ in blocks],
        "rows": standard_rows(what.rows),
        "columns": {name: vars(outcome) for name, outcome in what.columns.items()},
        "not_inserted": what.not_inserted,
        "not_measured": what.not_measured,
        "fractions": settings.fractions(what.rows),
        "pilot": [],
        "notes": notes,
        "command": list(command),
    }


def _settled(directory: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The plan of a directory that has one, checked against what is asked for now."""
    plan = read_plan(directory)
    if plan is None:
        raise UserError(f"{directory} holds no dependence test yet, so there is no matrix to write. Run the command without --collect.")
    check_same(directory, plan, wanted)
    return plan


def _prepared(bench: Bench, wanted: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The plan: as it is, with more replicates where more are asked for now, or a new one with intensities by the pilot."""
    old = on_main(bench.layout, lambda: read_plan(bench.directory))
    if old is not None:
        on_main(bench.layout, lambda: check_same(bench.directory, old, wanted))
        if old["num_seeds"] >= wanted["num_seeds"]:
            return old
        kept = {name: old[name] for name in ("fractions", "pilot")}
        return on_main(bench.layout, lambda: write_plan(bench.directory, wanted | kept))
    if settings.task or settings.intensity == settings.raise_to:
        wanted["notes"].append("no pilot was run: the intensities are as asked for")
    else:
        bench.plan = "pilot"
        wanted["fractions"], wanted["pilot"] = raised(bench, settings.raise_to, frozenset(settings.shares))
    return on_main(bench.layout, lambda: write_plan(bench.directory, wanted))


def _run_cells(bench: Bench, rows: Sequence[str], settings: Settings) -> None:
    """All cells, or this task's share: replicate by replicate, since a block is planned and opened once."""
    cells = [(row, seed) for seed in range(settings.num_seeds) for row in rows]
    if settings.task:
        number, of = settings.task
        cells = cells[number * len(cells) // of : (number + 1) * len(cells) // of]
    for place, (row, seed) in enumerate(cells):
        logger.info("cell %d of %d: %s, seed %d", place + 1, len(cells), row, seed)
        bench.cell(row, seed)


def _needs_leave_one_out(record: dict[str, Any], settings: Settings) -> bool:
    changed = any(cell["comparison"] == "primary" and cell["verdict"] == DEPENDENT for cell in record["cells"])
    return settings.leave_one_out == "always" or (settings.leave_one_out == "auto" and changed)
