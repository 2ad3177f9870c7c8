"""Answers that are kept while an evaluation is under way: one file for each model and state, so that a killed evaluation goes on with the next one."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import fingerprint
from megatron_exp.files import write_file


class Units:
    """Finished units of one evaluation directory, beside it. Made anew for every evaluation: what is there then, and of the same inputs, is used."""

    def __init__(self, evaluation: Path, inputs: dict[str, Any], writes: bool):
        """inputs: what the whole evaluation follows from. writes: whether this process is the one that writes."""
        self.directory = evaluation.with_name(f"{evaluation.name}.units")
        self._common = {name: inputs[name] for name in ("package_version", "manifest", "precision") if name in inputs}
        self._models, self._writes = inputs["models"], writes
        self._found = {path.name for path in self.directory.glob("*.parquet")}

    def find(self, label: str, state: int, probes: Sequence[int]) -> pa.Table | None:
        """The answers of a model in a state to these probes (numbers in the manifest), if they are all there."""
        path = self._path(label, state, probes)
        return pq.read_table(path) if path.name in self._found else None

    def keep(self, label: str, state: int, probes: Sequence[int], answers: pa.Table) -> None:
        """Store the answers of a finished unit."""
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            pq.write_table(answers, content, compression="zstd")
            write_file(self._path(label, state, probes), content.getvalue())

    def remove(self) -> None:
        """All is in the evaluation now."""
        if self._writes and self.directory.exists():
            shutil.rmtree(self.directory)

    def _path(self, label: str, state: int, probes: Sequence[int]) -> Path:
        key = fingerprint.of_json({**self._common, "model": self._models[label], "probes": list(probes)})
        return self.directory / f"{label}-{state:08d}-{key[:16]}.parquet"
