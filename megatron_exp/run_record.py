"""Reading a run directory: its record (run.json) and its history (metrics.jsonl). No torch, no model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import read_object
from megatron_exp.manifest.reader import Manifest

RECORD_NAME, METRICS_NAME, ALERTS_NAME, HEARTBEAT_NAME = "run.json", "metrics.jsonl", "alerts.jsonl", "heartbeat.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Series:
    """Values of one quantity by model state. steps: int64 [n], strictly rising. values: float64 [n]."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The latest value."""
        return float(self.values[-1])

    def minus(self, other: "Series") -> "Series":
        """The difference at the states both have."""
        steps, here, there = np.intersect1d(self.steps, other.steps, assume_unique=True, return_indices=True)
        return Series(steps, self.values[here] - other.values[there])


@dataclass(frozen=True, eq=False)
class History:
    """What a run measured: lines of metrics.jsonl that count, in order of states.

    A run that was stopped and resumed repeats steps. An attempt that starts at state s makes every earlier line from s on void.
    """

    lines: tuple[dict[str, Any], ...]
    num_attempts: int

    def series(self, *keys: str) -> Series:
        """The numbers under a key (or a path of keys, such as "norms", "hidden"), at the states that have them."""
        found = {line["step"]: value for line in self.lines if isinstance(value := _at(line, keys), int | float)}
        return Series(np.fromiter(found.keys(), np.int64, len(found)), np.fromiter(found.values(), np.float64, len(found)))

    def names(self, key: str) -> list[str]:
        """Sorted keys that occur in the object under `key`."""
        return sorted({name for line in self.lines for name in line.get(key) or {}})

    @property
    def last_step(self) -> int:
        """Updates done, 0 before the first."""
        return max((line["step"] for line in self.lines if "loss" in line), default=0)


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run directory. record: the content of run.json."""

    path: Path
    record: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "RunRecord":
        """Read run.json; UserError where it is missing, damaged or of an unknown version."""
        path = Path(path)
        file = path / RECORD_NAME
        record = read_object(file, "the record of a run directory", "restore it, or train again")
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{file} has schema version {record.get('schema_version')}, this program reads {SCHEMA_VERSION}. Use the program that wrote it."
            )
        return cls(path, record)

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def baseline(self) -> bool:
        """Whether the overlay was off: this run is a twin."""
        return bool(self.record["baseline"])

    @property
    def masked(self) -> frozenset[str]:
        """Experiments whose insertions were left out."""
        return frozenset(self.record["masked"])

    @property
    def manifest_path(self) -> Path:
        return Path(self.record["manifest"]["path"])

    @property
    def manifest_fingerprint(self) -> str:
        return self.record["manifest"]["fingerprint"]

    @property
    def first_state(self) -> int:
        """What the first attempt began with: above 0 only where that was a checkpoint of another directory, which has what was recorded before."""
        return next((attempt["from_step"] for attempt in self.record["attempts"]), 0)

    def open_manifest(self) -> Manifest:
        """The manifest the run was trained on, with the corpus where the run found it, if that is still there.

        Raises UserError where another manifest lies in its place.
        """
        manifest = Manifest.open(self.manifest_path)
        if manifest.fingerprint != self.manifest_fingerprint:
            raise UserError(
                f"The run {self.path} was trained on a manifest with fingerprint {self.manifest_fingerprint[:12]}, but {manifest.path} now has "
                f"{manifest.fingerprint[:12]}. Put the manifest it was trained on back in its place."
            )
        found = Path(self.record["corpus"]["path"])
        return replace(manifest, moved_corpus=found) if found.is_dir() else manifest

    @property
    def pairing(self) -> dict[str, Any]:
        """What a twin of this run agrees with it in, by name."""
        identity = self.record["identity"]
        return pairing(self.record["config"], self.record["corpus"]["fingerprint"], identity["model"], identity["training"])

    @property
    def num_steps(self) -> int:
        """Planned updates."""
        return int(self.record["config"]["geometry"]["steps"])

    @property
    def slots_per_step(self) -> int:
        return int(self.record["config"]["geometry"]["global_batch_size"])

    @property
    def tokens_per_step(self) -> int:
        return self.slots_per_step * int(self.record["config"]["geometry"]["sequence_length"])

    def heartbeat(self) -> dict[str, Any] | None:
        """The newest sign of life of an attempt (heartbeat.json), None where there is none."""
        path = self.path / HEARTBEAT_NAME
        return orjson.loads(path.read_bytes()) if path.exists() else None

    def history(self) -> History:
        """The measurements so far; empty where training has not written any."""
        path = self.path / METRICS_NAME
        return read_history(path) if path.exists() else History((), 0)

    def alerts(self) -> list[dict[str, Any]]:
        """Lines of alerts.jsonl that count, in the order written: not those about states that a later attempt reached anew."""
        path = self.path / ALERTS_NAME
        lines = list(_parsed(path)) if path.exists() else []
        starts = {one["attempt"]: one["from_step"] + 1 for one in self.record["attempts"]}
        return [line for line in lines if not _is_void(line, starts)]


def pairing(config: Mapping[str, Any], corpus: str, model: str, training: str) -> dict[str, Any]:
    """What a run and its twin must agree in, by name; the manifest need not be the same.

    Args:
        config: the resolved configuration, as in run.json.
        corpus: fingerprint of the corpus.
        model: fingerprint of shape and initialisation (`identity.model` of run.json).
        training: fingerprint of precision, schedule and optimizer (`identity.training`).
    """
    sources = {name: value for name, value in config["corpus"].items() if name != "path"}
    return {
        "corpus": corpus,
        "geometry": config["geometry"],
        "order": [config["seeds"]["order"], sources, config["pool"]],
        "model or initialisation": model,
        "training": training,
    }


def read_history(path: Path) -> History:
    """Read metrics.jsonl. A torn last line (the process was killed while writing) is normal; any other damage is a UserError."""
    lines = list(_parsed(path))
    starts: dict[int, int] = {}
    for line in lines:
        if "loss" in line:
            starts[line["attempt"]] = min(line["step"], starts.get(line["attempt"], line["step"]))
    kept = [line for line in lines if not _is_void(line, starts)]
    return History(tuple(sorted(kept, key=lambda line: line["step"])), len({line["attempt"] for line in lines}))


def _is_void(line: dict[str, Any], starts: dict[int, int]) -> bool:
    return any(attempt > line["attempt"] and start <= line["step"] for attempt, start in starts.items())


def _parsed(path: Path) -> Iterator[dict[str, Any]]:
    raw = path.read_bytes().split(b"\n")
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            if number == len(raw):
                return
            raise UserError(
                f"{path}, line {number} is not valid JSON ({error}). The file is damaged there: remove that line to read the rest."
            ) from error
        yield line


def _at(line: dict[str, Any], keys: Iterable[str]) -> Any:
    value: Any = line
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value
