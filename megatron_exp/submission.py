"""submission.json: which stages of a run were handed to SLURM, as which jobs, and where their results lie."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import require_file, write_file

RECORD_NAME = "submission.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SubmittedStage:
    """One job. job: SLURM's number, None where the stage is not handed in yet. script, folder: absolute; `folder` holds attempts and stop reasons.

    done: a file that exists exactly when nothing is left to do; None where only SLURM or the run's own record knows.
    run: the run directory of a stage that trains, else None.
    """

    name: str
    purpose: str
    script: str
    folder: str
    done: str | None = None
    run: str | None = None
    job: str | None = None


@dataclass(frozen=True)
class Submission:
    """A submission as recorded. config_fingerprint: of the frozen config.yaml beside the record."""

    root: Path
    name: str
    created: str
    config_fingerprint: str
    stages: tuple[SubmittedStage, ...]

    @classmethod
    def open(cls, root: Path) -> "Submission":
        """Read submission.json; UserError where it is missing, damaged or of another version."""
        root = Path(root)
        file = require_file(root / RECORD_NAME, "the record of `megatron-exp submit`")
        try:
            record: dict[str, Any] = orjson.loads(file.read_bytes())
            if record["schema_version"] != SCHEMA_VERSION:
                raise UserError(f"{file} has schema version {record['schema_version']}, this program reads {SCHEMA_VERSION}.")
            stages = tuple(SubmittedStage(**stage) for stage in record["stages"])
            return cls(root, record["name"], record["created"], record["config_fingerprint"], stages)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!r}). Remove it and submit again: stages that are done are not repeated.") from error

    def write(self) -> None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "created": self.created,
            "config_fingerprint": self.config_fingerprint,
            "stages": [asdict(stage) for stage in self.stages],
        }
        write_file(self.root / RECORD_NAME, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @property
    def jobs(self) -> list[str]:
        return [stage.job for stage in self.stages if stage.job is not None]
