"""run.json: what a run is, where and with what it was made, and how each attempt went."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from megatron_exp import __version__
from megatron_exp.files import write_file
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.precision import effective_precision
from megatron_exp.parallel.device import describe_device
from megatron_exp.parallel.layout import Layout
from megatron_exp.run_record import RECORD_NAME, SCHEMA_VERSION, RunRecord
from megatron_exp.training.run import Plan, Run

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "pyarrow")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a run directory, None where there is none yet."""
    return RunRecord.open(directory).record if (directory / RECORD_NAME).exists() else None


def begin_attempt(run: Run, overrides: list[str], resumed_from: str | None) -> None:
    """Write the record with this attempt added as the newest; call on the main process."""
    before = read_record(run.plan.directory)
    made_with = {
        "command": sys.argv,
        "overrides": overrides,
        "layout": _layout(run.layout),
        "precision": _precision(run.model),
        "versions": _versions(),
        "hardware": _hardware(run.layout),
    }
    attempt = {
        "attempt": run.attempt,
        "from_step": run.step,
        "resumed_from": resumed_from,
        "begun": _now(),
        "state": "running",
        **made_with,
    }
    earlier = [_ended(one, run.step) for one in before["attempts"]] if before else []
    record = {
        **_what(run.plan, run.model),
        **made_with,
        "created": before["created"] if before else attempt["begun"],
        "state": "running",
        "attempts": [*earlier, attempt],
    }
    _write(run.plan.directory, record)


def is_newest(run: Run) -> bool:
    """Whether no other attempt of this run has begun since this one; call on the main process."""
    record = read_record(run.plan.directory)
    return record is not None and record["attempts"][-1]["attempt"] == run.attempt


def end_attempt(directory: Path, attempt: int, step: int, state: str, error: BaseException | None = None) -> None:
    """Note how an attempt ended: `finished`, `stopped` (go on with `--resume auto`) or `failed`, with its error; call on the main process."""
    record = read_record(directory)
    assert record is not None
    entry = next(one for one in reversed(record["attempts"]) if one["attempt"] == attempt)
    entry |= {"state": state, "ended": _now(), "step": step}
    if error is not None:
        entry["error"] = {"type": type(error).__name__, "message": str(error)}
    if entry is record["attempts"][-1]:
        record["state"] = state
    _write(directory, record)


def settle(directory: Path, step: int) -> None:
    """Enter a run as finished whose last attempt was killed between its last checkpoint and its end; call on the main process."""
    record = read_record(directory)
    if record and record["state"] != "finished":
        end_attempt(directory, record["attempts"][-1]["attempt"], step, "finished")


def _ended(attempt: dict[str, Any], step: int) -> dict[str, Any]:
    """An attempt that nobody ended was killed; what it reached is the state that the next one, now beginning at `step`, found."""
    return attempt | {"state": "killed", "step": step} if attempt["state"] == "running" else attempt


def _what(plan: Plan, model: LanguageModel) -> dict[str, Any]:
    shape = {name: getattr(model.shape, name) for name in model.shape.__dataclass_fields__}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": plan.config.name,
        "config": plan.config.model_dump(mode="json"),
        "manifest": {"path": str(plan.manifest.path.resolve()), "fingerprint": plan.manifest.fingerprint},
        "corpus": {"path": str(plan.base.corpus.path.resolve()), "fingerprint": plan.base.corpus.fingerprint},
        "stream": {"fingerprint": plan.identity["data"]},
        "identity": plan.identity,
        "from": plan.origin.record if plan.origin else None,
        "baseline": plan.baseline,
        "masked": sorted(plan.masked),
        "model": {**shape, "num_parameters": model.shape.num_parameters},
    }


def _layout(layout: Layout) -> dict[str, Any]:
    sizes = {name: getattr(layout, f"{name}_size") for name in ("tp", "pp", "cp", "dp", "virtual")}
    return {"processes": layout.world_size, **sizes, "sequence_parallel": layout.sequence_parallel, "threads": layout.threads}


def _precision(model: LanguageModel) -> dict[str, Any]:
    return {
        "name": model.precision,
        "fp8_recipe": model.fp8_recipe,
        "products": effective_precision(model.chunks[0], model.fp8_recipe),
        "gradient_sums_fused": bool(model.config.gradient_accumulation_fusion),
        "recompute": model.config.recompute_granularity or "none",
        "deterministic": model.layout.deterministic,
        "weights": str(model.dtype).removeprefix("torch."),
        "layers": model.implementation,
    }


def _versions() -> dict[str, str]:
    found = {"megatron-exp": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware(layout: Layout) -> dict[str, Any]:
    return {"device": describe_device(layout.device), "platform": platform.platform(), "cores": os.cpu_count()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(directory: Path, record: dict[str, Any]) -> None:
    write_file(directory / RECORD_NAME, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
