"""Which models are evaluated: the run, and what it is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_exp.checkpoint.catalogue import list_checkpoints
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.run_record import RunRecord
from megatron_exp.shards.corpus import Corpus

Label = Literal["run", "twin", "external"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that answers probes. label: what its responses are called. differences: why an external model is no twin."""

    label: Label
    record: RunRecord
    checkpoints: Mapping[int, Path] = field(repr=False)
    differences: tuple[str, ...] = ()

    @property
    def newest(self) -> int | None:
        """The newest state with a complete checkpoint."""
        return max(self.checkpoints, default=None)


def open_run(run_dir: Path) -> tuple[Subject, Manifest]:
    """The run and its manifest; UserError where the manifest is no longer the one it was trained on."""
    record = RunRecord.open(run_dir)
    manifest = record.open_manifest()
    return Subject("run", record, dict(list_checkpoints(record.path))), manifest


def open_reference(run: Subject, path: Path) -> Subject:
    """What the run is held against: its twin where everything but the insertions agrees, else an external reference.

    An external reference is scored and described, and never paired with the run. UserError where it reads other tokens: the same
    questions would mean something else to it.
    """
    record = RunRecord.open(path)
    mine, theirs = run.record.pairing, record.pairing
    differences = tuple(name for name in mine if mine[name] != theirs[name])
    if "corpus" in differences and _tokenizer(record) != _tokenizer(run.record):
        raise UserError(
            f"{record.path} cannot be held against {run.record.path}: its tokenizer is another, so the token ids of the probes mean other text to it. "
            "Give a run on a corpus made with the same tokenizer."
        )
    if not record.baseline:
        differences = (*differences, "insertions (it is no baseline)")
    return Subject("external" if differences else "twin", record, dict(list_checkpoints(record.path)), differences)


def _tokenizer(run: RunRecord) -> str:
    return Corpus.open(Path(run.record["corpus"]["path"])).tokenizer_fingerprint


def checked_states(run: Subject, states: list[int] | None) -> list[int]:
    """The states in which final probes are asked, ascending: those given, else the end of the run. UserError where one has no checkpoint."""
    wanted = sorted(set(states)) if states else [run.record.num_steps]
    missing = [state for state in wanted if state not in run.checkpoints]
    if missing:
        existing = ", ".join(str(state) for state in sorted(run.checkpoints)) or "none"
        raise UserError(
            f"The run {run.record.path} has no complete checkpoint of state {', '.join(map(str, missing))} (states with one: {existing}; the run ends at "
            f"{run.record.num_steps}). Finish training, or choose among the existing states with --steps."
        )
    return wanted


def checked_names(manifest: Manifest, experiments: Sequence[str] | None) -> list[str]:
    """The experiments wanted, in the manifest's order."""
    unknown = sorted(set(experiments or ()) - set(manifest.experiments))
    if unknown:
        raise UserError(
            f"The manifest {manifest.path} has no experiment {', '.join(unknown)}; it has {', '.join(manifest.experiments) or 'none'}."
        )
    return [name for name in manifest.experiments if experiments is None or name in experiments]
