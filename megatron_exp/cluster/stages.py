"""The chain of a run: which stages there are, what each runs, what tells that it is done, and what it waits for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_exp.cluster.profile import Cluster, Resources
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.shards.corpus import RECORD_NAME as CORPUS_RECORD

CONFIG_NAME = "config.yaml"

_WIDE = {"twin", "train"}
"""Stages that use all nodes of the profile; the others use one."""
_ON_GPU = {"twin", "plan-reference", "cpdt-prepare", "cpdt", "cpdt-gate", "train", "eval"}
_MANY_PROCESSES = {"twin", "plan-reference", "train", "eval"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of the chain.

    arguments: after `megatron-exp`. tasks: of an array job, which then get `--task I/N`. done: a file that exists exactly when the stage
    has nothing left to do. result: one that is made anew each time. resumable: killed, it goes on where it was; `progress` is the pattern
    of the files that show how far it came, and `folder` keeps the account of its attempts. cache: a corpus to be copied to node-local
    disks before.
    """

    name: str
    purpose: str
    arguments: tuple[str, ...]
    resources: Resources
    tasks: int | None = None
    done: Path | None = None
    result: Path | None = None
    progress: tuple[Path, str] | None = None
    folder: Path
    cache: Path | None = None

    @property
    def resumable(self) -> bool:
        return self.progress is not None

    @property
    def has_ranks(self) -> bool:
        """Whether all its processes work together and must know of each other."""
        return self.name in _MANY_PROCESSES


@dataclass(frozen=True)
class Folders:
    """Where everything of a submission lies. root: its directory; corpus: the config's."""

    root: Path
    corpus: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest"

    @property
    def extended(self) -> Path:
        """The manifest with the experiments that need a reference."""
        return self.root / "manifest-reference"

    @property
    def twin(self) -> Path:
        return self.root / "twin"

    @property
    def dependence(self) -> Path:
        return self.root / "cpdt"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def logs(self, stage: str) -> Path:
        return self.root / "logs" / stage


def chain(config: Config, cluster: Cluster, folders: Folders) -> list[Stage]:
    """The stages of a run in order; each waits for the one before.

    Raises:
        UserError: where there is neither a corpus nor text to make one from, or an experiment cannot be set up.
    """
    wants_reference = any("reference" in load_experiment(entry).needed for entry in config.experiments if entry.enabled)
    manifest = folders.extended if wants_reference else folders.manifest
    stages = [*_corpus(cluster, folders), _plan(cluster, folders), _training("twin", cluster, folders, folders.manifest)]
    if wants_reference:
        stages.append(_plan_reference(cluster, folders))
    if cluster.cpdt is not None:
        stages += _dependence(cluster, folders, manifest)
    return [*stages, _training("train", cluster, folders, manifest), *_closing(cluster, folders)]


def resources_of(cluster: Cluster, stage: str) -> Resources:
    """The profile's resources with those of the stage in their place; one node, and no GPU, where a stage has no use for more."""
    general = {name: getattr(cluster, name) for name in Resources.model_fields}
    if stage not in _WIDE:
        general["nodes"] = 1
    if stage not in _ON_GPU:
        general |= {"gpus_per_node": None, "gpu_type": None}
    elif stage not in _MANY_PROCESSES:
        general["gpus_per_node"] = min(general["gpus_per_node"] or 0, 1) or None
    if stage not in _MANY_PROCESSES:
        general |= {"processes_per_node": None, "exclusive": None}
    own = cluster.stages.get(stage, Resources()).model_dump(exclude_none=True)  # type: ignore[call-overload]
    return Resources(**{**general, **own})


def num_processes(stage: str, resources: Resources) -> int:
    """Processes that a stage starts on each of its nodes."""
    return (resources.processes_per_node or resources.gpus_per_node or 1) if stage in _MANY_PROCESSES else 1


def _corpus(cluster: Cluster, folders: Folders) -> Iterator[Stage]:
    if (folders.corpus / CORPUS_RECORD).is_file():
        return
    text = cluster.preprocess
    if text is None:
        raise UserError(
            f"There is no corpus at {folders.corpus}, and the cluster profile names no text to make it from. Put `preprocess: {{inputs: [...], "
            "tokenizer: ...}` into the profile, or make the corpus first."
        )
    inputs = [word for one in text.inputs for word in ("--input", one)]
    options = ["--max-reject-rate", str(text.max_reject_rate)] if text.max_reject_rate else []
    command = ("preprocess", *inputs, "--tokenizer", text.tokenizer, "--output", str(folders.corpus), *options)
    progress, done = (folders.corpus / "units", "*.json"), folders.corpus / CORPUS_RECORD
    in_one = text.tasks == 1
    names = ["preprocess"] if in_one else ["preprocess", "merge"]
    for name in names:
        is_array = name == "preprocess" and not in_one
        yield Stage(
            name=name,
            purpose="text to shards, each task its share of the input files"
            if is_array
            else "text to shards, and the record of the corpus",
            arguments=command,
            resources=resources_of(cluster, name if name in cluster.stages else "preprocess"),
            tasks=text.tasks if is_array else None,
            done=done,
            progress=progress,
            folder=folders.logs(name),
        )


def _plan(cluster: Cluster, folders: Folders) -> Stage:
    return Stage(
        name="plan",
        purpose="items, places and probes of all experiments that need no reference model",
        arguments=("plan", str(folders.root / CONFIG_NAME), "--out", str(folders.manifest)),
        resources=resources_of(cluster, "plan"),
        done=folders.manifest / "manifest.json",
        folder=folders.logs("plan"),
    )


def _plan_reference(cluster: Cluster, folders: Folders) -> Stage:
    arguments = ("plan", str(folders.root / CONFIG_NAME), "--out", str(folders.extended))
    return Stage(
        name="plan-reference",
        purpose="the experiments that need the twin as reference are added",
        arguments=(*arguments, "--reference", str(folders.twin), "--extends", str(folders.manifest)),
        resources=resources_of(cluster, "plan-reference"),
        done=folders.extended / "manifest.json",
        progress=(folders.root, f"{folders.extended.name}.reference/*"),  # answers so far
        folder=folders.logs("plan-reference"),
    )


def _training(name: str, cluster: Cluster, folders: Folders, manifest: Path) -> Stage:
    directory = folders.twin if name == "twin" else folders.run
    options = ["--baseline"] if name == "twin" else ["--against", str(folders.twin)]  # for alerts
    if cluster.hang_seconds != Cluster.model_fields["hang_seconds"].default:
        options += ["--hang-seconds", str(cluster.hang_seconds)]
    if cluster.scratch:
        options += ["--cache", cluster.scratch]
    return Stage(
        name=name,
        purpose="the baseline run: the overlay is off" if name == "twin" else "the run",
        arguments=("train", str(manifest), "--out", str(directory), *options),
        resources=resources_of(cluster, name),
        progress=(directory / "checkpoints", "step-*/COMPLETE"),
        folder=directory,
        cache=folders.corpus if cluster.scratch else None,
    )


def _dependence(cluster: Cluster, folders: Folders, manifest: Path) -> list[Stage]:
    test = cluster.cpdt
    assert test is not None
    start = folders.twin if test.state is None else folders.twin / "checkpoints" / f"step-{test.state:08d}"
    command = (
        "cpdt",
        str(manifest),
        "--from",
        str(start),
        "--out",
        str(folders.dependence),
        "--seeds",
        str(test.seeds),
        "--steps",
        str(test.steps),
    )
    progress = (folders.dependence, "cells/*/results.parquet")
    pilot = Stage(
        name="cpdt-prepare",
        purpose="dependence test: how strong each experiment must be to show",
        arguments=(*command, "--prepare"),
        resources=_as_cpdt(cluster, "cpdt-prepare"),
        progress=(folders.dependence, "pilot/*/cells/*/results.parquet"),
        folder=folders.logs("cpdt-prepare"),
    )
    array = Stage(
        name="cpdt",
        purpose="dependence test: each task its share of the cells",
        arguments=command,
        resources=resources_of(cluster, "cpdt"),
        tasks=test.tasks,
        progress=progress,
        folder=folders.logs("cpdt"),
    )
    gate = Stage(
        name="cpdt-gate",
        purpose="the matrix of the dependence test" + ("; experiments that disturb each other end the chain here" if test.gate else ""),
        arguments=(*command, *(["--gate"] if test.gate else [])),
        result=folders.dependence / "matrix.json",
        resources=_as_cpdt(cluster, "cpdt-gate"),
        progress=progress,
        folder=folders.logs("cpdt-gate"),
    )
    return [pilot, array, gate]


def _as_cpdt(cluster: Cluster, stage: str) -> Resources:
    """What the profile says of the stage itself, or else of the array."""
    return resources_of(cluster, stage if stage in cluster.stages else "cpdt")


def _closing(cluster: Cluster, folders: Folders) -> list[Stage]:
    against = ("--against", str(folders.twin))
    dependence = ("--cpdt", str(folders.dependence)) if cluster.cpdt is not None else ()
    report = folders.root / "report.html"
    return [
        Stage(
            name="eval",
            purpose="every experiment scored, run against twin",
            arguments=("eval", str(folders.run), *against),
            resources=resources_of(cluster, "eval"),
            progress=(folders.run / "evals", "step-*.units/*.parquet"),
            folder=folders.logs("eval"),
        ),
        Stage(
            name="report",
            purpose=f"one HTML file: {report.name}",
            arguments=("report", str(folders.run), *against, *dependence, "--out", str(report)),
            result=report,
            resources=resources_of(cluster, "report"),
            folder=folders.logs("report"),
        ),
    ]
