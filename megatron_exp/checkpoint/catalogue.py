"""Which checkpoints a run has, which of them are sound, and which may go. No torch."""

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson

from megatron_exp import files
from megatron_exp.errors import UserError
from megatron_exp.run_record import RunRecord

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORD = "checkpoint.json"
FILE_LIST = "files.json"
MARKER = "COMPLETE"
_UNFINISHED = ".partial"
"""Ending of the names under which `files.durable_directory` builds a directory."""
_READERS = 8
"""Files that are hashed at the same time."""
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """RUN/checkpoints/step-XXXXXXXX of the state after `step` updates."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def list_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """What has the name of a checkpoint, as (step, path), oldest first. One without its marker has lost it: it gets its name when it is whole."""
    root = Path(run_dir) / "checkpoints"
    if not root.is_dir():
        return []
    return sorted((int(found[1]), path) for path in root.iterdir() if (found := _NAME.fullmatch(path.name)))


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run that have their marker, as (step, path), oldest first; content is not read."""
    return [(step, path) for step, path in list_directories(run_dir) if (path / MARKER).is_file()]


def is_finished(run: RunRecord) -> bool:
    """Whether nothing is left to do. The last update alone does not say so: validation, probes and the last checkpoint come after it."""
    return run.record.get("state") == "finished" or any(step >= run.num_steps for step, _ in list_checkpoints(run.path))


def seal(directory: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Write the file list of a finished directory, then its marker; returns the SHA-256 of both. `hashes` gives that of every file by relative name."""
    listed = {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256} for name, sha256 in sorted(hashes.items())}
    with files.hashed_file(directory / FILE_LIST) as file_list:
        file_list.write(orjson.dumps({"schema_version": SCHEMA_VERSION, "files": listed}, option=orjson.OPT_INDENT_2))
    with files.hashed_file(directory / MARKER) as marker:
        marker.write(file_list.sha256.encode())
    return {FILE_LIST: file_list.sha256, MARKER: marker.sha256}


def verify_checkpoint(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence per finding naming the file; empty means sound. Reads every byte."""
    directory = Path(directory)
    unreadable = [f"{directory / name} is missing." for name in (MARKER, FILE_LIST) if not (directory / name).is_file()]
    if unreadable:
        return unreadable
    marker, actual = (directory / MARKER).read_bytes(), files.sha256_file(directory / FILE_LIST)
    if marker != actual.encode():
        return [f"{directory / MARKER} does not belong to {directory / FILE_LIST}: one of them is damaged or of another checkpoint."]
    listed = orjson.loads((directory / FILE_LIST).read_bytes())["files"]
    with ThreadPoolExecutor(_READERS) as readers:
        findings = readers.map(lambda name: _check_file(directory, name, listed[name]), sorted(listed))
        return [finding for finding in findings if finding] + _unlisted(directory, listed)


def _check_file(directory: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    path = files.safe_join(directory, name)
    if not path.is_file():
        return f"{path} is missing."
    if path.stat().st_size != expected["bytes"]:
        return f"{path} has {path.stat().st_size} bytes, not the {expected['bytes']} written."
    return None if files.sha256_file(path) == expected["sha256"] else f"{path} is damaged: its SHA-256 is not the one written."


def _unlisted(directory: Path, listed: Collection[str]) -> list[str]:
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    return [
        f"{directory / name} is not in {FILE_LIST}: it was not written with this checkpoint."
        for name in sorted(present - {*listed, FILE_LIST, MARKER})
    ]


def require_sound(directory: Path) -> None:
    """Raise UserError naming what is damaged, missing or unlisted, if anything is."""
    findings = verify_checkpoint(directory)
    if findings:
        raise UserError(
            f"The checkpoint {directory} cannot be trusted. {' '.join(findings)} It is not loaded. Restore the file from a copy, or use an older checkpoint "
            "of the run (`--resume auto` finds the newest sound one)."
        )


def newest_verified(run_dir: Path) -> tuple[int, Path] | None:
    """The newest sound checkpoint of a run as (step, path); a damaged one is logged and the one before is tried."""
    for step, path in reversed(list_directories(run_dir)):
        findings = verify_checkpoint(path)
        if not findings:
            return step, path
        logger.warning("Checkpoint %s is passed over: %s", path, " ".join(findings))
    return None


def read_record(directory: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint: schema_version, shape, precision, optimizer (its summary, or null), division, extra.

    UserError where it is missing, damaged or of another version.
    """
    path = Path(directory) / RECORD
    remedy = "restore it from a copy, or use another checkpoint (`train --resume auto` finds the newest sound one)"
    record = files.read_object(path, "the record of a checkpoint", remedy)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{directory} was written with checkpoint schema {record.get('schema_version')!r}, and this version reads {SCHEMA_VERSION}. "
            "Use the version of megatron-exp that wrote it."
        )
    if missing := sorted({"shape", "precision", "optimizer", "extra"} - record.keys()):
        raise UserError(f"{path} lacks {', '.join(missing)}. It is damaged: {remedy}.")
    return record


def fingerprint_of(directory: Path) -> str:
    """SHA-256 of a checkpoint's file list, which names the content of every file; UserError where it has none."""
    return files.sha256_file(files.require_file(directory / FILE_LIST, "the file list of a checkpoint"))


def record_bytes(
    shape: Mapping[str, Any], precision: str, optimizer: Mapping[str, Any] | None, extra: Mapping[str, Any], division: Mapping[str, Any] | None = None
) -> bytes:
    """checkpoint.json. `division`: the layout to which the optimizer state is bound; None where any can load it."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "shape": shape,
        "precision": precision,
        "optimizer": optimizer,
        "division": division,
        "extra": extra,
    }
    return orjson.dumps(record, option=orjson.OPT_INDENT_2)


def is_portable(directory: Path) -> bool:
    """Whether every layout can go on from a checkpoint; none can where its record cannot be read. Its weights alone always load anywhere."""
    if not (directory / RECORD).is_file():
        return True
    try:
        return read_record(directory).get("division") is None
    except UserError as error:
        logger.warning("No run can go on from %s: %s", directory, error)
        return False


def newest_portable(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that any layout can go on from; its content is not checked."""
    return next((path for _, path in reversed(list_checkpoints(run_dir)) if is_portable(path)), None)


def find_checkpoint(path: Path) -> Path:
    """PATH where it is a checkpoint directory, the last checkpoint where it is a run; UserError where it is neither."""
    path = Path(path)
    if any((path / name).is_file() for name in (MARKER, FILE_LIST, RECORD)):
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise UserError(
            f"{path} is neither a checkpoint nor a run that has one. Give a directory such as RUN/checkpoints/step-00001000, or RUN for its last checkpoint."
        )
    return checkpoints[-1][1]


def rotate_checkpoints(run_dir: Path, keep: Collection[int], num_rotating: int = 2, known_sound: set[Path] | None = None) -> list[Path]:
    """Remove checkpoints but the `keep` steps, the newest `num_rotating` sound others and the newest sound portable one.

    Nothing is removed while fewer than that many others are sound: a damaged checkpoint never costs a sound one. What a killed
    process left half-written goes too, so call this only where no other process writes checkpoints of the run.

    Args:
        run_dir: the run.
        keep: states that never rotate.
        num_rotating: how many others stay.
        known_sound: checkpoints that were read back already and are not read again; what is read here is added.

    Returns:
        What was removed.
    """
    known = set() if known_sound is None else known_sound
    for leftover in (Path(run_dir) / "checkpoints").glob(f"step-*{_UNFINISHED}"):
        shutil.rmtree(leftover)
    sound, has_portable = 0, False
    removed = []
    for step, path in reversed(list_checkpoints(run_dir)):
        needed = sound < num_rotating and step not in keep
        wanted = not has_portable and is_portable(path)
        if (needed or wanted) and _is_sound(path, known):
            sound += step not in keep
            has_portable |= wanted
        elif step not in keep and not needed:
            _remove(path)
            removed.append(path)
    return removed


def _is_sound(path: Path, known: set[Path]) -> bool:
    if path not in known and not verify_checkpoint(path):
        known.add(path)
    return path in known


def _remove(path: Path) -> None:
    """One rename makes it no checkpoint; what a crash leaves behind is a leftover of the next rotation."""
    doomed = path.with_name(f"{path.name}.removed{_UNFINISHED}")
    path.rename(doomed)
    shutil.rmtree(doomed)
