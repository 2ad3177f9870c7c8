"""Where the runs of a test begin: a checkpoint, what is known of it, and the base slots that follow."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exp.checkpoint.catalogue import FILE_LIST, find_checkpoint, read_record
from megatron_exp.checkpoint.convert_tokenizer import CARRIED, is_in
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.presets import ModelShape
from megatron_exp.run_record import RECORD_NAME, RunRecord
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer

_SAME_SIZES = ("layers", "hidden", "heads", "kv_groups", "ffn", "vocabulary_size")


@dataclass(frozen=True, eq=False)
class Start:
    """A checkpoint to continue from.

    step: its state. has_optimizer: whether moments are continued. run: the run it is of, None for a converted model. notes: what a reader of the
    matrix has to know about it.
    """

    path: Path
    step: int
    fingerprint: str
    has_optimizer: bool
    run: RunRecord | None
    notes: tuple[str, ...]

    @property
    def config(self) -> Config | None:
        """The run's configuration, None where no run is known."""
        return Config.model_validate(self.run.record["config"]) if self.run else None

    def record(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "path": str(self.path.resolve()),
            "step": self.step,
            "fingerprint": self.fingerprint,
            "has_optimizer": self.has_optimizer,
            "run": self.run.name if self.run else None,
        }


def open_start(path: Path, manifest: Manifest, corpus: Corpus, shape: ModelShape) -> Start:
    """Look at a checkpoint or at the last one of a run; UserError where it is of another model or of another tokenizer."""
    checkpoint = find_checkpoint(path)
    record = read_record(checkpoint)
    differing = [
        f"{name} {record['shape'][name]} (here {getattr(shape, name)})"
        for name in _SAME_SIZES
        if record["shape"][name] != getattr(shape, name)
    ]
    if differing:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model than the manifest {manifest.path} is for: {', '.join(differing)}. Give a checkpoint of the "
            "manifest's model, or plan the manifest with the model of the checkpoint."
        )
    run_dir = checkpoint.parent.parent
    run = RunRecord.open(run_dir) if (run_dir / RECORD_NAME).is_file() else None
    _check_tokenizer(checkpoint, run, corpus)
    fingerprint = hashlib.sha256((checkpoint / FILE_LIST).read_bytes()).hexdigest()[:32]
    has_optimizer = record["optimizer"] is not None
    return Start(checkpoint, int(record["extra"]["step"]), fingerprint, has_optimizer, run, tuple(_notes(run, has_optimizer, corpus)))


def _check_tokenizer(checkpoint: Path, run: RunRecord | None, corpus: Corpus) -> None:
    theirs = None
    if is_in(checkpoint / CARRIED):
        theirs = Tokenizer.load(checkpoint / CARRIED).fingerprint
    elif run and run.record["corpus"]["fingerprint"] != corpus.fingerprint and Path(run.record["corpus"]["path"]).is_dir():
        theirs = Corpus.open(Path(run.record["corpus"]["path"])).tokenizer_fingerprint
    if theirs and theirs != corpus.tokenizer_fingerprint:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer than the corpus {corpus.path} is made with: the same ids mean other text to it. Use a corpus "
            "made with the tokenizer of the model."
        )


def _notes(run: RunRecord | None, has_optimizer: bool, corpus: Corpus) -> list[str]:
    notes = []
    if not has_optimizer:
        notes.append("the checkpoint holds weights only: the optimizer begins without moments in every run")
    if run is None:
        notes.append("the checkpoint is of no run of this package: whether it has seen the base slots of the blocks is not known")
    elif run.record["corpus"]["fingerprint"] != corpus.fingerprint:
        notes.append("the checkpoint was trained on another corpus")
    if run and not run.baseline:
        notes.append(
            "the checkpoint is of a run with insertions of its own, not of a twin: what it has learnt of them already cannot be learnt again"
        )
    return notes


def learning_rate_config(start: Start, manifest: Manifest) -> Config:
    """Whose schedule gives the rate; UserError where it is in its final decay, which no test should continue."""
    config = start.config or manifest.config
    decay = config.training.schedule.decay_start
    if decay is not None and start.step > decay:
        raise UserError(
            f"{start.path} is state {start.step} of a run whose learning rate falls to zero from step {decay} on, so runs from it would learn next to nothing. "
            "Continue from a state before the decay (keep one with training.checkpoint.keep), or give --learning-rate."
        )
    return config


def first_slots(start: Start, manifest: Manifest, capacity: int, steps: int, num_seeds: int) -> list[tuple[int, bool]]:
    """(first base slot, whether the checkpoint was trained on them) of every replicate: first what follows the checkpoint, then the order from its beginning.

    capacity: slots of the whole order. UserError where there are too few for disjoint blocks.
    """
    length = steps * manifest.geometry.global_batch_size
    begin = min(_trained_slots(start, manifest), capacity)
    after = [(begin + index * length, False) for index in range((capacity - begin) // length)]
    before = [(index * length, True) for index in range(begin // length)]
    found = [*after, *before][:num_seeds]
    if len(found) < num_seeds:
        raise UserError(
            f"{num_seeds} replicates of {steps} steps need {num_seeds * length} slots of their own, but the order has {capacity}: room for {len(found)}. Use "
            "fewer --seeds or --steps, or a larger corpus."
        )
    return found


def _trained_slots(start: Start, manifest: Manifest) -> int:
    """Slots of the manifest's order that the checkpoint has seen; 0 where its run had another order."""
    theirs, ours = start.config, manifest.config
    if theirs is None or start.run is None or start.run.record["corpus"]["fingerprint"] != manifest.record["fingerprints"]["corpus"]:
        return 0
    same = theirs.seeds.order == ours.seeds.order and theirs.pool == ours.pool and theirs.corpus.sources == ours.corpus.sources
    same = same and theirs.geometry.sequence_length == ours.geometry.sequence_length and theirs.corpus.order == ours.corpus.order
    return start.step * theirs.geometry.global_batch_size if same else 0
