"""What a path is: a corpus, a manifest or a run, told by the record it holds."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_exp.control.segments import Segment, read_segments
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import RECORD_NAME as MANIFEST_RECORD
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.decided import Decided
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.run_record import RECORD_NAME as RUN_RECORD
from megatron_exp.run_record import RunRecord
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream

if TYPE_CHECKING:
    from megatron_exp.shards.tokenizer import Tokenizer

Kind = Literal["corpus", "manifest", "run"]
_RECORDS: dict[str, Kind] = {"corpus.json": "corpus", MANIFEST_RECORD: "manifest", RUN_RECORD: "run"}


@dataclass(frozen=True, eq=False)
class Target:
    """A directory to look at. run: its record where it is a run. Manifest (unless `opened`), corpus and stream are opened when asked for."""

    kind: Kind
    path: Path
    run: RunRecord | None = None
    opened: Manifest | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest itself, or the one the run was trained on; UserError for a corpus or where it has changed."""
        if self.kind == "corpus":
            raise UserError(f"{self.path} is a corpus: it has text, but no steps, items or experiments. Give a manifest or a run.")
        if self.run is None:
            return self.opened or Manifest.open(self.path)
        return self.run.open_manifest()

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus itself, or the one below the manifest; UserError where its content is another."""
        if self.kind == "corpus":
            return Corpus.open(self.path)
        corpus = Corpus.open(self.manifest.corpus_path)
        self.manifest.check_corpus(corpus)
        return corpus

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """Of the corpus, loaded once however many texts are shown."""
        return self.corpus.tokenizer()

    @property
    def has_overlay(self) -> bool:
        """Whether insertions are applied: not for a baseline run."""
        return self.run is None or not self.run.baseline

    @cached_property
    def segments(self) -> list[Segment]:
        """What the controllers of a run decided, in order; UserError where a segment is damaged. None for a baseline."""
        return read_segments(self.path, self.manifest.fingerprint) if self.run and not self.run.baseline else []

    @cached_property
    def overlay(self) -> Overlay:
        """Base stream, manifest and segments, without the experiments that the run masked."""
        masked = self.run.masked if self.run else frozenset()
        decided = Decided(self.manifest.geometry, self.manifest.geometry.steps)
        for segment in self.segments:
            decided.add(segment.rows, self.manifest.geometry.steps)
        return Overlay.open(self.manifest.open_stream(self.corpus), self.manifest, masked, decided)

    @property
    def stream(self) -> Overlay | Stream:
        """What the model saw, or will see."""
        return self.overlay if self.has_overlay else self.overlay.stream


def open_target(path: Path) -> Target:
    """Tell what PATH is; UserError where it is none of the three."""
    path = Path(path)
    kind = next((kind for name, kind in _RECORDS.items() if (path / name).is_file()), None)
    if kind is None:
        raise UserError(
            f"{path} is no corpus, manifest or run: none of {', '.join(_RECORDS)} lies in it. Give the directory that a command wrote."
        )
    return Target(kind, path, RunRecord.open(path) if kind == "run" else None)
