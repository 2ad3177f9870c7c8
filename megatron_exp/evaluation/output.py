"""The evaluation directory: three files, written whole, and recognised when the same is asked again."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import __version__, fingerprint
from megatron_exp.checkpoint.catalogue import FILE_LIST
from megatron_exp.control.segments import handed_out, read_segments
from megatron_exp.errors import UserError
from megatron_exp.evaluation.asking import RECORDED_NAME
from megatron_exp.evaluation.results import Results, unscored_counts
from megatron_exp.evaluation.subjects import Subject
from megatron_exp.files import durable_directory, sha256_file
from megatron_exp.manifest.reader import Manifest

SCHEMA_VERSION = 1
RESULTS_NAME = "results.json"


def evaluation_path(run_dir: Path, state: int) -> Path:
    """RUN/evals/step-XXXXXXXX of the last state evaluated."""
    return Path(run_dir) / "evals" / f"step-{state:08d}"


def inputs_record(
    manifest: Manifest,
    subjects: Sequence[Subject],
    states: list[int],
    experiments: Sequence[str],
    judge: Path | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """Fingerprints of everything the results follow from: equal inputs give equal bytes. `precision`: where it is not that of training."""
    return {
        **({"precision": precision} if precision else {}),
        **({"judge": str(Path(judge).resolve())} if judge else {}),
        "package_version": __version__,
        "manifest": manifest.fingerprint,
        "states": states,
        "experiments": list(experiments),
        "models": {subject.label: _model_record(subject) for subject in subjects},
    }


def existing(directory: Path, inputs: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether the results of these inputs are already there. UserError where there are results of other inputs."""
    if not directory.exists() or overwrite:
        return False
    path = directory / RESULTS_NAME
    if not path.is_file() or orjson.loads(path.read_bytes()).get("inputs") != inputs:
        raise UserError(
            f"{directory} holds an evaluation of other inputs (another twin or precision, other experiments or states, newer checkpoints, another version of "
            "this program). Give --overwrite to compute it again, or move it away to keep it."
        )
    return True


def write_evaluation(directory: Path, record: dict[str, Any], responses: pa.Table, results: Results) -> None:
    """Write responses.parquet, results.parquet and results.json; an older evaluation there goes only when all is computed."""
    if directory.exists():
        shutil.rmtree(directory)
    with durable_directory(directory) as partial:
        pq.write_table(responses, partial / "responses.parquet", compression="zstd")
        pq.write_table(results.table(), partial / "results.parquet", compression="zstd")
        (partial / RESULTS_NAME).write_bytes(
            orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY) + b"\n"
        )


def results_record(
    manifest: Manifest, subjects: Sequence[Subject], inputs: dict[str, Any], responses: pa.Table, results: Results, command: Sequence[str]
) -> dict[str, Any]:
    """The content of results.json: no times and nothing else that two evaluations of the same inputs could differ in."""
    run, *references = subjects
    state = inputs["states"][-1]
    used = _handed_out(run, manifest, state)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": run.record.name,
        "state": state,
        "is_final": state == run.record.num_steps,
        "baseline": run.record.baseline,
        "masked": sorted(run.record.masked),
        "manifest": {"path": str(manifest.path), "fingerprint": manifest.fingerprint},
        "against": _reference_record(references[0]) if references else None,
        "command": list(command),
        "inputs": inputs,
        "experiments": {
            name: _experiment_record(manifest, name, responses, results) | used.get(name, {}) for name in inputs["experiments"]
        },
        "family_sizes": results.family_sizes,
    }


def _handed_out(run: Subject, manifest: Manifest, state: int) -> dict[str, dict[str, Any]]:
    """For experiments with a controller, what it inserted up to the state: its budget is known only after the run."""
    if not manifest.controllers or run.record.baseline:
        return {}
    segments = read_segments(run.record.path, run.record.manifest_fingerprint)
    return {name: {"handed_out": one} for name, one in handed_out(segments, state).items()}


def _experiment_record(manifest: Manifest, name: str, responses: pa.Table, results: Results) -> dict[str, Any]:
    analysis = manifest.analyses[name]
    return {
        "title": analysis["title"],
        "question": analysis["question"],
        "verdict": results.verdict(name),
        "outcomes": results.outcomes(name),
        "unscored": unscored_counts(responses, name),
    }


def _reference_record(reference: Subject) -> dict[str, Any]:
    return {
        "path": str(reference.record.path),
        "name": reference.record.name,
        "relation": reference.label,
        "differences": list(reference.differences),
    }


def _model_record(subject: Subject) -> dict[str, Any]:
    """What fixes the answers of a subject: its checkpoints (each names the hashes of its files) and what it recorded in training."""
    markers = {
        str(state): hashlib.sha256((path / FILE_LIST).read_bytes()).hexdigest() for state, path in sorted(subject.checkpoints.items())
    }
    recorded = subject.record.path / RECORDED_NAME
    return {"checkpoints": fingerprint.of_json(markers), "recorded": sha256_file(recorded) if recorded.exists() else None}
