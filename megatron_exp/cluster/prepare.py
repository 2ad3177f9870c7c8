"""What `submit` writes before it calls sbatch: the frozen config, one script per stage, folders for logs."""

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_exp import fingerprint
from megatron_exp.cluster.estimate import check_division, memory_line
from megatron_exp.cluster.profile import Cluster, load_cluster
from megatron_exp.cluster.render import check_root, render
from megatron_exp.cluster.stages import CONFIG_NAME, Folders, Stage, chain
from megatron_exp.config.load import load_config
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.files import require_file, write_file
from megatron_exp.submission import RECORD_NAME, Submission, SubmittedStage

_HEADER = "# What is run: the configuration as it was submitted. Changing it later changes nothing that is planned already.\n"


class Prepared(NamedTuple):
    """The chain of one submission, nothing of it written yet. scripts: name of the file to its text, in order of the stages.

    memory: a sentence on what training takes, where that can be told.
    """

    config: Config
    folders: Folders
    stages: list[Stage]
    scripts: dict[str, str]
    memory: str | None

    @property
    def frozen(self) -> str:
        return _HEADER + yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def script_path(self, name: str) -> Path:
        return self.folders.root / "scripts" / name


def prepare(config_path: Path, cluster_path: Path, out: Path | None) -> Prepared:
    """Read both files and render all scripts; UserError for every mistake in them."""
    config = load_config(Path(config_path).absolute())
    cluster = _with_python(load_cluster(cluster_path))
    folders = Folders(check_root(out or Path(config.name)), config.corpus.path.absolute())
    check_division(config, cluster)
    stages = chain(config, cluster, folders)
    if cluster.preprocess is not None:
        require_file(Path(cluster.preprocess.tokenizer), "the tokenizer of the corpus")
    names = [f"{number:02d}-{stage.name}.sbatch" for number, stage in enumerate(stages, start=1)]
    scripts = {name: render(stage, config.name, cluster, folders, name) for name, stage in zip(names, stages, strict=True)}
    return Prepared(config, folders, stages, scripts, memory_line(config, cluster, folders.corpus))


def _with_python(cluster: Cluster) -> Cluster:
    """Where the profile names none: the interpreter that runs now, or the one in the container."""
    default = sys.executable if cluster.container.kind == "none" else "python3"
    return cluster if cluster.python else cluster.model_copy(update={"python": default})


def write(prepared: Prepared) -> Submission:
    """Write config, scripts and folders; the record of the submission without job numbers.

    Raises:
        UserError: where the directory holds the submission of another configuration.
    """
    root = prepared.folders.root
    identity = fingerprint.of_json(prepared.config.model_dump(mode="json"))
    if (root / RECORD_NAME).exists() and Submission.open(root).config_fingerprint != identity:
        raise UserError(
            f"{root} holds the submission of another configuration, which is frozen in {root / CONFIG_NAME}. Choose another --out for the changed one, or put "
            "the configuration back to go on."
        )
    root.mkdir(parents=True, exist_ok=True)
    write_file(root / CONFIG_NAME, prepared.frozen.encode())
    (root / "scripts").mkdir(exist_ok=True)
    stages = []
    for stage, (name, text) in zip(prepared.stages, prepared.scripts.items(), strict=True):
        write_file(prepared.script_path(name), text.encode())
        prepared.folders.logs(stage.name).mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of a log
        stages.append(_submitted(stage, prepared.script_path(name)))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Submission(root, prepared.config.name, now, identity, tuple(stages))


def _submitted(stage: Stage, script: Path) -> SubmittedStage:
    return SubmittedStage(
        name=stage.name,
        purpose=stage.purpose,
        script=str(script),
        folder=str(stage.folder),
        done=str(stage.done or stage.result) if stage.done or stage.result else None,
        run=str(stage.folder) if stage.name in ("twin", "train") else None,
    )


def with_job(submission: Submission, index: int, job: str) -> Submission:
    """The submission with stage number `index` handed in as `job`."""
    stages = list(submission.stages)
    stages[index] = replace(stages[index], job=job)
    return replace(submission, stages=tuple(stages))
