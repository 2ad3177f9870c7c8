"""The cluster profile: a strict YAML file whose values match allow-lists, because they end in scripts that a shell runs."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_exp.config.load import load_model
from megatron_exp.config.schema import NonNegative, Positive, Strict

STAGES = ("preprocess", "merge", "plan", "twin", "plan-reference", "cpdt-prepare", "cpdt", "cpdt-gate", "train", "eval", "report")
"""All stages of a run, in order."""

StageName = Literal["preprocess", "merge", "plan", "twin", "plan-reference", "cpdt-prepare", "cpdt", "cpdt-gate", "train", "eval", "report"]

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,@+-]{0,127}$")]
"""A name that SLURM gives out, or several with commas."""
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.&|,-]{0,127}$")]
Time = Annotated[str, Field(pattern=r"^([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$")]
"""H:MM:SS or D-HH:MM:SS."""
Memory = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,6}[KMGT]?)$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./@+=~-]{0,1023}$")]
Image = Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9_./:#@+-]{0,1023}$")]
Program = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_./@+=~-]{1,1023}|[A-Za-z][A-Za-z0-9_.-]{0,63})$")]
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./+-]{0,127}$")]
Mount = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./@+=~-]{0,1023}(:/[A-Za-z0-9_./@+=~-]{0,1023})?$")]

ENVIRONMENT_NAMES = re.compile(
    r"(NCCL|GLOO|UCX|FI|OMPI|NVTE|CUBLAS|CUDNN|OMP|MKL|PYTORCH|TORCH_NCCL|TRITON|HF_HUB)_[A-Z0-9_]{1,64}"
    r"|CUDA_(DEVICE_MAX_CONNECTIONS|LAUNCH_BLOCKING|CACHE_PATH|HOME)|HF_HOME|PYTHONPATH|TMPDIR|LD_LIBRARY_PATH|LANG|LC_ALL|XDG_CACHE_HOME"
)
"""Variables that a profile may set: those that tune communication, kernels and caches. None that a shell runs, and no secret."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")


def _checked_environment(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if not ENVIRONMENT_NAMES.fullmatch(name) or _SECRET.search(name):
            raise ValueError(
                f"the variable {name!r} is not one that a profile may set (NCCL_*, GLOO_*, UCX_*, OMP_*, PYTORCH_*, HF_HOME, TMPDIR, ...; never a token or a "
                "key: scripts and logs are kept)"
            )
        if not (value.isascii() and value.isprintable() and len(value) <= 4096):
            raise ValueError(f"the value of {name} has characters other than printable ASCII, or more than 4096 of them")
    return variables


def printable(text: str) -> str:
    """TEXT, if a line can hold it; ValueError for control characters, line ends and half a surrogate pair."""
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is empty or holds control characters, which no name of a file needs")
    return text


Text = Annotated[str, AfterValidator(printable), Field(max_length=4096)]


class Resources(Strict):
    """What a stage asks SLURM for; None is left to the cluster. `processes_per_node`: default one per GPU, or one."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Features | None = None
    time: Time | None = None
    nodes: Annotated[int, Field(gt=0, le=100_000)] | None = None
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    gpu_type: Module | None = None
    cpus_per_node: Annotated[int, Field(gt=0, le=4096)] | None = None
    memory_per_node: Memory | None = None
    processes_per_node: Annotated[int, Field(gt=0, le=256)] | None = None
    exclusive: bool | None = None


class Container(Strict):
    """Where the program runs. image: what enroot or apptainer takes. mounts: `/path` or `/path:/inside`."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: Image | None = None
    mounts: tuple[Mount, ...] = ()

    @model_validator(mode="after")
    def _image_fits(self) -> "Container":
        if (self.kind == "none") != (self.image is None):
            raise ValueError("a container has a kind (pyxis or apptainer) and an image, or neither")
        return self


class PreprocessInputs(Strict):
    """The raw text of the corpus on this cluster. inputs, tokenizer: as `preprocess` takes them, relative to the profile. tasks: of the array job."""

    inputs: Annotated[tuple[Text, ...], Field(min_length=1)]
    tokenizer: Text
    tasks: Annotated[int, Field(gt=0, le=1000)] = 1
    max_reject_rate: Annotated[float, Field(ge=0, le=1)] = 0.0


class Dependence(Strict):
    """The dependence test before the run. state: of the twin, from which it starts (default: its last checkpoint).

    seeds: replicates. steps: of every run. tasks: of the array job. gate: whether experiments that disturb each other stop the chain.
    """

    state: NonNegative | None = None
    seeds: Positive = 5
    steps: Positive = 100
    tasks: Annotated[int, Field(gt=0, le=1000)] = 1
    gate: bool = True


class Cluster(Resources):
    """A whole profile: resources of the training stages, and what is different in others (`stages`)."""

    container: Container = Container()
    modules: tuple[Module, ...] = ()
    environment: Annotated[dict[str, str], AfterValidator(_checked_environment)] = {}
    python: Program | None = None
    scratch: AbsolutePath | None = None
    signal_seconds: Annotated[int, Field(ge=30, le=65535)] = 600
    requeue_limit: Annotated[int, Field(ge=0, le=1000)] = 100
    hang_seconds: NonNegative = 1800
    stages: dict[StageName, Resources] = {}
    preprocess: PreprocessInputs | None = None
    cpdt: Dependence | None = None


def load_cluster(path: Path) -> Cluster:
    """The checked profile, with the paths below `preprocess` found from its folder; UserError naming file, line and key."""
    path = Path(path)
    cluster = load_model(path, Cluster, "cluster profile", "docs/cluster.md")
    if cluster.preprocess is None:
        return cluster
    folder = path.resolve().parent
    found = cluster.preprocess.model_copy(
        update={
            "inputs": tuple(_beside(one, folder) for one in cluster.preprocess.inputs),
            "tokenizer": str(folder / cluster.preprocess.tokenizer),
        }
    )
    return cluster.model_copy(update={"preprocess": found})


def _beside(text: str, folder: Path) -> str:
    """An input with its path found from the folder; `NAME=` before it stays."""
    name, equals, place = text.partition("=")
    return f"{name}={folder / place}" if equals and "/" not in name else str(folder / text)
