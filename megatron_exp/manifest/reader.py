"""Opening a manifest: the record at once, tables and payloads when asked for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_exp import fingerprint
from megatron_exp.config.load import validate
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.files import read_object
from megatron_exp.manifest import schema
from megatron_exp.manifest.overlay_index import OverlayIndex, open_index
from megatron_exp.manifest.payloads import open_payloads
from megatron_exp.manifest.stored_table import read_stored
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.indexed import IndexedReader
from megatron_exp.stream.base import Stream
from megatron_exp.stream.olmo import ORDER_NAME, OrderFile
from megatron_exp.stream.opening import open_stream
from megatron_exp.stream.slot import Geometry

RECORD_NAME = "manifest.json"


def record_checksum(record: dict[str, Any]) -> str:
    """Over all of manifest.json but the checksum itself."""
    return fingerprint.of_json({name: value for name, value in record.items() if name != "checksum"})


@dataclass(frozen=True, eq=False)
class Manifest:
    """A manifest directory. record: the content of manifest.json. moved_corpus: where the corpus lies that was moved since."""

    path: Path
    record: dict[str, Any]
    moved_corpus: Path | None = None

    @classmethod
    def open(cls, path: Path, is_checked: bool = True) -> "Manifest":
        """Read manifest.json; UserError where it is missing, damaged, of an unknown version, or (unless not `is_checked`) changed after it was written."""
        path = Path(path)
        file = path / RECORD_NAME
        record = read_object(file, "the record of a manifest directory", "plan it again")
        if record.get("schema_version") != schema.SCHEMA_VERSION:
            raise UserError(
                f"{file} has schema version {record.get('schema_version')}, this program reads {schema.SCHEMA_VERSION}. Plan the manifest again."
            )
        if is_checked and record_checksum(record) != record.get("checksum"):
            raise UserError(
                f"{file} was changed after it was written: it does not agree with its own checksum. Restore it, or plan again; "
                f"`megatron-exp verify {path}` says what does not fit."
            )
        return cls(path, record)

    @property
    def fingerprint(self) -> str:
        """The plan fingerprint: geometry, seeds, order, items, insertions, probes and analyses."""
        return self.record["fingerprints"]["plan"]

    @cached_property
    def config(self) -> Config:
        return validate(self.record["config"], f"What {self.path / RECORD_NAME} was planned with")

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(**self.record["geometry"])

    @property
    def corpus_path(self) -> Path:
        """Where the corpus lies: where it lay when the manifest was planned, unless it was moved."""
        return self.moved_corpus or Path(self.record["corpus_path"])

    @property
    def experiments(self) -> list[str]:
        """Names of all experiments; the position is the code in the overlay index."""
        return list(self.record["experiments"])

    @property
    def keep_steps(self) -> list[int]:
        """Model states that probes need as checkpoints; they never rotate."""
        return list(self.record["keep_steps"])

    @property
    def analyses(self) -> dict[str, Any]:
        """Per experiment: title, question, citation and pre-registered outcomes."""
        return self.record["analyses"]

    @property
    def counts(self) -> dict[str, Any]:
        """Per experiment and condition: items, insertions, tokens, slots."""
        return self.record["counts"]

    def insertions(self) -> pa.Table:
        return self._table("insertions", schema.INSERTIONS)

    def items(self) -> pa.Table:
        return self._table("items", schema.ITEMS)

    def probes(self) -> pa.Table:
        return self._table("probes", schema.PROBE_DEFINITIONS)

    @property
    def controllers(self) -> dict[str, Any]:
        """Per experiment that has one: its closed loop."""
        return self.record.get("controllers", {})

    def reserve(self) -> pa.Table:
        """Places kept for controllers; empty without any."""
        return self._table("reserve", schema.RESERVE) if self.controllers else schema.RESERVE.empty_table()

    def bank(self) -> pa.Table:
        """What controllers hand out; empty without any."""
        return self._table("bank", schema.BANK) if self.controllers else schema.BANK.empty_table()

    def payload(self, number: int) -> np.ndarray:
        """int32 tokens of a payload."""
        return np.asarray(self._payloads.document(int(number)), dtype=np.int32)

    def payload_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All payloads one after the other (memory-mapped), and int64 [payloads + 1] where each begins."""
        return self._payloads.tokens, self._payloads.starts

    def noise_scale(self, key: int) -> float:
        """Standard deviation of the noise that belongs to a key."""
        return float(self.record["perturbations"][str(key)]["scale"])

    @cached_property
    def index(self) -> OverlayIndex:
        return open_index(self.path)

    def check_corpus(self, corpus: Corpus) -> None:
        """UserError where `corpus` is not the one this manifest was planned on."""
        planned = self.record["fingerprints"]["corpus"]
        if corpus.fingerprint != planned:
            raise UserError(
                f"The manifest {self.path} was planned on a corpus with fingerprint {planned[:12]}, but {corpus.path} has {corpus.fingerprint[:12]}. "
                "Use the corpus it was planned on, or plan a new manifest."
            )

    def open_stream(self, corpus: Corpus, config: Config | None = None) -> Stream:
        """The base stream that was planned; `config` where a run replaces values of the manifest's own.

        Raises UserError where the corpus is too small, or where the order file of this manifest is missing or damaged.
        """
        root = self.record["fingerprints"].get("order_file")
        return open_stream(config or self.config, corpus, OrderFile(self.path / ORDER_NAME, root) if root else None)

    @cached_property
    def _payloads(self) -> IndexedReader:
        return open_payloads(self.path)

    def _table(self, name: str, expected: pa.Schema) -> pa.Table:
        return read_stored(
            self.path / f"{name}.parquet",
            expected,
            "a table of the manifest",
            if_damaged="The manifest is damaged: plan it again",
            if_other="It was written by another version: plan it again",
        )
