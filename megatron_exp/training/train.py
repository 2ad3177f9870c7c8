"""`train`: from a manifest to a run directory. No experiment is known here; the manifest says all."""

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.load import override_config, require_kept_states
from megatron_exp.config.schema import Config
from megatron_exp.control.chain import Chain
from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.fingerprint import of_json
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.identity import weights_identity
from megatron_exp.model.optimizer import Optimizer, build_optimizer
from megatron_exp.model.presets import ModelShape, find_preset, resolve_shape
from megatron_exp.model.schedule import Schedule
from megatron_exp.model.step import micro_batch_rows
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.parallel.agreement import on_main
from megatron_exp.parallel.layout import Layout, start_parallel
from megatron_exp.run_record import ALERTS_NAME, Series
from megatron_exp.scoring.engine import Scorer
from megatron_exp.shards.cache import with_cache
from megatron_exp.shards.corpus import Corpus
from megatron_exp.training.data import Feed
from megatron_exp.training.hooks.alerts import AlertHook
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.checkpoint import CheckpointHook
from megatron_exp.training.hooks.control import ControlHook
from megatron_exp.training.hooks.ledger import LedgerHook
from megatron_exp.training.hooks.metrics import MetricsHook
from megatron_exp.training.hooks.owner import OwnerHook
from megatron_exp.training.hooks.probes import ProbeHook
from megatron_exp.training.hooks.progress import ProgressHook
from megatron_exp.training.hooks.record import RecordHook
from megatron_exp.training.hooks.stop import StopHook
from megatron_exp.training.hooks.stragglers import StragglerHook
from megatron_exp.training.hooks.validation import ValidationHook
from megatron_exp.training.hooks.watchdog import WatchdogHook
from megatron_exp.training.json_log import JsonLog
from megatron_exp.training.loop import train_loop
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.origin import Origin, choose_origin, load_origin
from megatron_exp.training.ownership import Ownership
from megatron_exp.training.record import read_record, settle
from megatron_exp.training.resume import Beginning, choose_beginning
from megatron_exp.training.run import Plan, Run
from megatron_exp.training.trackers import Detached, WeightsAndBiases
from megatron_exp.training.twins import twin_losses

FINISHED, REQUEUE = 0, 75
"""What `train` returns, which is the exit code of the command: the run is over, or is to be started again to go on."""

HANG_SECONDS = 1800.0
"""Longer than a step, a checkpoint and all probes of a state together; no collective of torch waits longer either."""

_OVERRIDABLE = ("training.", "model.", "seeds.init", "corpus.path")
"""Settings that do not change what is at which slot; all others were fixed by `plan`."""

logger = logging.getLogger(__name__)


def train(
    manifest: Path,
    run_dir: Path,
    *,
    baseline: bool = False,
    masked: Collection[str] = (),
    overrides: Sequence[str] = (),
    resume: str = "auto",
    begin_from: Path | None = None,
    against: Sequence[Path] = (),
    stop_at: int | None = None,
    cache: Path | None = None,
    hang_seconds: float = HANG_SECONDS,
) -> int:
    """Train the run of MANIFEST into RUN_DIR, or go on with it; every process of the run calls this with the same arguments.

    Args:
        manifest: what `plan` wrote.
        run_dir: the run directory, made where it does not exist.
        baseline: leave the overlay off: the twin.
        masked: experiments whose insertions are left out.
        overrides: `training.x=value` strings over the manifest's config (also model, seeds.init, corpus.path).
        resume: `auto` (the newest sound checkpoint, else the start), `never`, or the path of a checkpoint.
        begin_from: a checkpoint, or a run (its last one), whose weights and optimizer state a new run begins with (see `training.origin`).
        against: twins with whose losses this run's are compared while it trains, for alerts only.
        stop_at: state in which to stop with a checkpoint although the run is not over.
        cache: read tokens from the node-local copy that `megatron-exp cache` made below this directory.
        hang_seconds: a process that finishes no step for so long says where it stands and ends; 0: never.

    Returns:
        FINISHED, or REQUEUE where the run was stopped by a signal or by `stop_at`.

    Raises:
        UserError: for every mistake in manifest, corpus, settings or run directory, before anything is written there.
    """
    watchdog = WatchdogHook(hang_seconds)
    plan = make_plan(Path(manifest), Path(run_dir), baseline, frozenset(masked), list(overrides), cache, begin_from)
    layout = start_parallel(plan.config.training.parallel, deterministic=plan.config.training.deterministic)
    try:
        with Ownership(plan.directory) as owner:
            beginning = on_main(layout, lambda: choose_beginning(plan, resume, owner))
            if beginning.step >= plan.num_steps:
                on_main(layout, lambda: settle(plan.directory, beginning.step))
                logger.info("%s is finished: %d of %d steps are done.", plan.directory, beginning.step, plan.num_steps)
                return FINISHED
            twins = on_main(layout, lambda: [twin_losses(plan, path) for path in against])
            run = assemble(plan, layout, beginning)
            try:
                record = RecordHook(list(overrides), beginning.checkpoint, owner)
                with open_directory(run, owner) as written, under_way():
                    hooks = make_hooks(run, written, record, StopHook(stop_at), twins)
                    train_loop(run, [watchdog, *hooks, StragglerHook()])
            finally:
                run.feed.close()
            return FINISHED if run.is_over else REQUEUE
    finally:
        layout.stop()


def make_plan(
    manifest_path: Path,
    directory: Path,
    baseline: bool,
    masked: frozenset[str],
    overrides: list[str],
    cache: Path | None = None,
    begin_from: Path | None = None,
) -> Plan:
    """Open and check manifest, corpus and stream."""
    if baseline and masked:
        raise UserError("--baseline leaves out all experiments, so --mask has nothing left to mask. Use one of them.")
    manifest = Manifest.open(manifest_path)
    config = effective_config(manifest, overrides)
    corpus = Corpus.open(config.corpus.path)
    manifest.check_corpus(corpus)
    corpus.check_sizes()
    if cache is not None:
        corpus = with_cache(corpus, cache)
    base = manifest.open_stream(corpus, config)
    chain = Chain(manifest, masked)
    overlay = Overlay.open(base, manifest, masked, chain.decided)
    _check_validation(config, manifest)
    require_kept_states(config)
    shape = shape_of(config, corpus)
    data = base.fingerprint if baseline else overlay.fingerprint
    origin = choose_origin(directory, read_record(directory), begin_from, corpus)
    return Plan(
        directory=directory,
        manifest=manifest,
        config=config,
        base=base,
        stream=base if baseline else overlay,
        baseline=baseline,
        masked=masked,
        identity=identity_of(manifest, corpus, data, config, shape, origin),
        origin=origin,
        chain=chain if chain.loops and not baseline else None,
    )


def effective_config(manifest: Manifest, overrides: list[str]) -> Config:
    """The manifest's config with the corpus where it lay when it was planned, then `overrides`; UserError for what `plan` has fixed."""
    fixed = [override for override in overrides if not override.startswith(_OVERRIDABLE)]
    if fixed:
        raise UserError(
            f"--set {fixed[0]} changes what the manifest {manifest.path} has fixed. While training only {', '.join(_OVERRIDABLE)} may be set; "
            "put the rest into the config and plan again."
        )
    corpus = manifest.config.corpus.model_copy(update={"path": manifest.corpus_path})
    return override_config(manifest.config.model_copy(update={"corpus": corpus}), overrides)


def _check_validation(config: Config, manifest: Manifest) -> None:
    wanted, planned = config.training.validation.slots, manifest.config.training.validation.slots
    if wanted > planned:
        raise UserError(
            f"training.validation.slots is set to {wanted}, but the manifest keeps only the first {planned} slots of the pool for validation; later ones may "
            "hold text that experiments train on. Use at most that many, or plan again."
        )


def shape_of(config: Config, corpus: Corpus) -> ModelShape:
    """The model that the config names, for the corpus's tokenizer."""
    return resolve_shape(config.model, corpus.vocabulary_size, config.geometry.sequence_length)


def identity_of(manifest: Manifest, corpus: Corpus, data: str, config: Config, shape: ModelShape, origin: Origin | None) -> dict[str, str]:
    """Fingerprints of what decides the weights, up to the layout; these must agree for an attempt to go on with a run."""
    return {
        "manifest": manifest.fingerprint,
        "corpus": corpus.fingerprint,
        "data": data,
        **weights_identity(config, shape, origin.fingerprint if origin else None),
    }


def assemble(plan: Plan, layout: Layout, beginning: Beginning) -> Run:
    """Build model, optimizer and data feed, and load the checkpoint that the attempt begins from."""
    config = plan.config
    training = config.training
    geometry = plan.base.geometry
    schedule = Schedule.of(training.schedule, find_preset(config.model.preset).peak_lr, geometry)
    rows = micro_batch_rows(layout, geometry.global_batch_size, training.micro_batch_size)
    shape = shape_of(config, plan.base.corpus)
    model = build_model(shape, layout, training.precision, config.seeds.init, training.fp8_recipe, training.recompute == "full")
    optimizer, hook_states = load_beginning(plan, model, beginning)
    return Run(
        plan=plan,
        layout=layout,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        feed=Feed(plan.stream, rows, shape.vocabulary_size, plan.shard_names, layout.reads_data, lambda: plan.frontier),
        scorer=Scorer(model),
        attempt=beginning.attempt,
        step=beginning.step,
        resumed_from=Path(beginning.checkpoint) if beginning.checkpoint else None,
        hook_states=hook_states,
    )


def load_beginning(plan: Plan, model: LanguageModel, beginning: Beginning) -> tuple[Optimizer, dict[str, Any]]:
    """Weights and optimizer as the attempt begins with them, and what the hooks left in the checkpoint it goes on from."""
    config = plan.config.training.optimizer
    if plan.origin and not beginning.checkpoint:
        return load_origin(plan.origin, model, config), {}
    optimizer = build_optimizer(model, config)
    if not beginning.checkpoint:
        return optimizer, {}
    return optimizer, load_checkpoint(Path(beginning.checkpoint), model, optimizer, is_checked=True)["hooks"]


@dataclass(frozen=True)
class Written:
    """What the main process writes in a run directory; None on the others. owner: its claim, None where nobody else comes. metrics, alerts: logs."""

    owner: Ownership | None = None
    metrics: MetricsLog | None = None
    alerts: JsonLog | None = None


@contextlib.contextmanager
def open_directory(run: Run, owner: Ownership | None = None) -> Iterator[Written]:
    """The run directory made ready for this attempt, on the main process only."""
    if not run.layout.is_main:
        yield Written()
        return
    directory = run.plan.directory
    directory.mkdir(parents=True, exist_ok=True)
    metrics = MetricsLog(directory, run.attempt, run.step, trackers_of(run))
    yield Written(owner, metrics, JsonLog(directory / ALERTS_NAME))


@contextlib.contextmanager
def under_way() -> Iterator[None]:
    """From here on a file that cannot be read or written is a failure of the machine, although its paths were good when the run began."""
    try:
        yield
    except OSError as error:
        raise InterruptedRunError(f"The run was interrupted: {error}. Start it again to go on from its last checkpoint.") from error


def trackers_of(run: Run) -> list[Detached]:
    """Services that the configuration asks for, besides metrics.jsonl and TensorBoard."""
    plan, project = run.plan, run.plan.config.training.wandb_project
    if project is None:
        return []
    name = plan.directory.resolve().name
    run_id = of_json([plan.identity, str(plan.directory.resolve())])[:16]
    config = plan.config.model_dump(mode="json")
    return [Detached("W&B", lambda: WeightsAndBiases(plan.directory, project, name, run_id, config))]


def make_hooks(run: Run, written: Written, record: RecordHook, stop: StopHook, twins: Sequence[tuple[Series, Series]]) -> list[Hook]:
    """All features of the trainer in the order in which they act; the checkpoint comes last and covers the others."""
    probes = ProbeHook()
    others: list[Hook] = [
        OwnerHook(written.owner),
        record,
        stop,
        LedgerHook(written.owner),
        MetricsHook(written.metrics),
        ValidationHook(written.metrics),
        AlertHook(written.alerts, twins),
        probes,
        ControlHook(probes, written.metrics),
        ProgressHook(),
    ]
    keep = frozenset(run.plan.manifest.keep_steps) | frozenset(run.plan.config.training.checkpoint.keep)
    return [*others, CheckpointHook(others, keep)]
