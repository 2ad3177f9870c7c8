"""Where every number of the report comes from."""

import shlex
from collections.abc import Iterator
from typing import Any

from megatron_exp.report.gather import Inputs
from megatron_exp.run_record import RunRecord

_PAPER = "Train Once, Answer All: Many Pretraining Experiments for the Cost of One. arXiv:2509.23383."


def provenance(inputs: Inputs) -> list[tuple[str, str]]:
    """(name, value) pairs: files, fingerprints, commands, versions, hardware."""
    run, manifest = inputs.run, inputs.manifest
    rows = [
        ("Run", str(run.path)),
        ("Twin", str(inputs.twin.path) if inputs.twin else "none"),
        ("Manifest", str(manifest.path)),
        ("Results file", str(inputs.results.file) if inputs.results.file else "none: the run has not been evaluated"),
        *_of_results(inputs.results.record),
        *((f"Fingerprint: {name}", value) for name, value in sorted(manifest.record["fingerprints"].items())),
        ("Seeds", ", ".join(f"{name} {value}" for name, value in run.record["config"]["seeds"].items())),
        ("Attempts", str(inputs.history.num_attempts)),
        *_of_run(run, ""),
        *(_of_run(inputs.twin, "Twin: ") if inputs.twin else ()),
    ]
    return rows


def _of_results(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    against = record.get("against")
    if against:
        yield "Results against", f"{against['path']} ({against['relation']})"
    if record.get("command"):
        yield "Evaluation command", _plain(record["command"])


def _of_run(run: RunRecord, prefix: str) -> Iterator[tuple[str, str]]:
    for key in ("command", "created", "precision", "versions", "hardware", "layout", "model"):
        if key in run.record:
            yield prefix + key.capitalize(), _plain(run.record[key])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return str(value)


def citations(inputs: Inputs) -> list[str]:
    """The paper this follows and the sources of the experiments, each once."""
    named = [inputs.manifest.analyses[name]["citation"] for name in inputs.manifest.experiments]
    return list(dict.fromkeys([_PAPER, *(citation for citation in named if citation)]))
