"""Where an attempt begins: at the start, or at a checkpoint of the same run."""

import itertools
import logging
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from megatron_exp.checkpoint.catalogue import list_directories, newest_verified, require_sound
from megatron_exp.checkpoint.state import read_extra
from megatron_exp.errors import UserError
from megatron_exp.run_record import ALERTS_NAME, HEARTBEAT_NAME, METRICS_NAME, RECORD_NAME
from megatron_exp.training.ownership import OWNER_NAME, Ownership, refuse_if_owned
from megatron_exp.training.record import read_record
from megatron_exp.training.run import Plan

_BEFORE_RECORD = (
    *("attempts*.log", "stopped*.txt"),  # the account that a batch script keeps, also of attempts that never got as far as this program
    *("logs", "*.log", "*.out", "*.err", "slurm-*", ".nfs*"),  # what shells and schedulers write where a command runs
    *(f"{name}{ending}" for name in (OWNER_NAME, HEARTBEAT_NAME, METRICS_NAME, ALERTS_NAME, RECORD_NAME) for ending in ("", ".*.partial")),
    *("tensorboard", "wandb"),  # these and those before are of an attempt that was killed before its record was whole
)
"""Names, as patterns, that a directory may have in it although no run has begun there."""

logger = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """attempt: its number, from 1. step: updates done. checkpoint: what to load, None at the start."""

    attempt: int
    step: int
    checkpoint: str | None


def choose_beginning(plan: Plan, resume: str, owner: Ownership) -> Beginning:
    """Decide by RESUME: `auto` (the newest sound checkpoint, else the start), `never`, or the path of a checkpoint.

    The directory is OWNER's from here on: what is found in it stays true until the run has begun, and no other attempt gets the same number.

    Raises:
        UserError: where the directory holds another run or is being trained into, or RESUME does not fit what is there.
    """
    require_writable(plan.directory)
    refuse_if_owned(plan.directory)
    record = read_record(plan.directory)
    if record is None and list_directories(plan.directory):
        raise UserError(
            f"{plan.directory} has checkpoints but no run.json, so nobody can tell what they belong to. Choose another directory for this run."
        )
    if record is None:
        refuse_foreign(plan.directory)
    else:
        check_same_run(record["identity"], plan.identity, str(plan.directory))
    if resume == "never" and record is not None:
        raise UserError(
            f"{plan.directory} already holds this run and --resume never was asked. Choose another directory, or use --resume auto."
        )
    attempt = owner.claim(1 + (record["attempts"][-1]["attempt"] if record else 0))
    clear_leftovers(plan.directory)
    if resume == "never":
        return Beginning(attempt, 0, None)
    checkpoint = _newest(plan) if resume == "auto" else _named(plan, Path(resume))
    if checkpoint is None:
        return Beginning(attempt, 0, None)
    extra = read_extra(checkpoint)
    check_same_run(extra["identity"], plan.identity, str(checkpoint))
    return Beginning(attempt, int(extra["step"]), str(checkpoint))


def require_writable(directory: Path) -> None:
    """UserError where DIRECTORY is no folder that this process may write, and cannot become one."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{directory} cannot be a run directory: {existing} is a file. Choose another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written: {existing} does not allow it. Choose another --out, or have its permissions changed.")


def refuse_foreign(directory: Path) -> None:
    """UserError where DIRECTORY, which has no run.json, holds anything but what is there before a run has its record."""
    if not directory.is_dir():
        return
    foreign = sorted(path.name for path in directory.iterdir() if not any(fnmatchcase(path.name, allowed) for allowed in _BEFORE_RECORD))
    if foreign:
        listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"{directory} is no run directory: it holds {listed} and no run.json. A run would mix its files with those. Choose a new or an empty directory "
            "with --out."
        )


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed attempt left half-written: nothing refers to it, and half a checkpoint is as large as a whole one."""
    for partial in [*directory.glob("*.partial"), *directory.glob("checkpoints/*.partial")]:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def check_same_run(found: Mapping[str, str], wanted: Mapping[str, Any], where: str) -> None:
    """UserError that names what differs, with both fingerprints, where `found` (stored at WHERE) is not the run we were asked for."""
    different = [
        f"{name} (there {found.get(name, 'none')[:12]}, here {value[:12]})" for name, value in wanted.items() if found.get(name) != value
    ]
    if different:
        raise UserError(
            f"{where} belongs to another run: it differs in {', '.join(different)}. Going on would mix two runs. Train into another directory, or use the "
            "manifest, corpus and settings that this directory was begun with (run.json has them)."
        )


def _newest(plan: Plan) -> Path | None:
    """The newest sound checkpoint; newer ones, which are damaged, are put aside so that their steps can be saved again."""
    newest = newest_verified(plan.directory)
    for step, path in list_directories(plan.directory):
        if newest is None or step > newest[0]:
            aside = _free_name(path)
            logger.warning("%s is damaged and is put aside as %s; training goes on from an older state.", path, aside.name)
            path.rename(aside)
    return newest[1] if newest else None


def _free_name(path: Path) -> Path:
    """For a damaged checkpoint; what was put aside before is kept."""
    aside = path.with_name(f"damaged-{path.name}")
    more = (aside.with_name(f"{aside.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([aside], more) if not name.exists())


def _named(plan: Plan, path: Path) -> Path:
    if not path.is_dir():
        raise UserError(
            f"--resume {path}: there is no such checkpoint directory. Give auto, never, or a directory such as RUN/checkpoints/step-00001000."
        )
    require_sound(path)
    step = int(read_extra(path)["step"])
    newer = [later.name for number, later in list_directories(plan.directory) if number > step]
    if newer:
        raise UserError(
            f"--resume {path} goes back to step {step}, but {plan.directory} has newer checkpoints ({', '.join(newer)}), and results are never overwritten. "
            "Move them away first, train into another directory, or use --resume auto."
        )
    return path.resolve()  # the run that it is of lies two folders up, whatever name it was given
