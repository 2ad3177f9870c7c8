"""sbatch scripts from stages: `#SBATCH` values come from allow-lists, commands are argument lists and are quoted once, here."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_exp.cluster.profile import Cluster
from megatron_exp.cluster.stages import Folders, Stage, num_processes
from megatron_exp.errors import UserError

_DIRECTIVE = re.compile(r"--[a-z-]+(=[A-Za-z0-9_.,:;@+=/%&|~()-]+)?", re.ASCII)
_SCRIPT_PATH = re.compile(r"/[A-Za-z0-9_./@+=~-]{0,1023}", re.ASCII)
_STEP_WAIT_SECONDS = 300
"""How long the other processes may take to end once the first has; a lost one then ends the step, whatever the others wait for."""

_EXPORTED = "HOME,USER,LOGNAME,PATH,LANG"
"""All that a job takes over from the shell that submits: no token, no leftover of a session."""


def check_root(root: Path) -> Path:
    """ROOT as an absolute path that may stand in a `#SBATCH` line, where nothing can be quoted; UserError where it may not."""
    absolute = Path(root).absolute()
    if not _SCRIPT_PATH.fullmatch(str(absolute)):
        raise UserError(
            f"The directory {str(absolute)!r} cannot stand in an sbatch script: SLURM cuts names at spaces and fills in signs such as %. "
            "Choose one of ASCII letters, digits and _ . / @ + = ~ - only."
        )
    return absolute


def render(stage: Stage, config_name: str, cluster: Cluster, folders: Folders, file: str) -> str:
    """The script of a stage. config_name: begins the job's name. file: what the script will be called, for its own comment."""
    template = _environment().get_template("resumable.sbatch" if stage.resumable else "once.sbatch")
    return template.render(
        stage=stage,
        cluster=cluster,
        file=file,
        directives=_directives(stage, config_name, cluster, folders),
        step=_step(stage, cluster),
        fill=_fill(stage, cluster),
        new="no new checkpoint" if _trains(stage) else "no progress",
        suffix="-$SLURM_ARRAY_TASK_ID" if stage.tasks else "",
        remedy=_remedy(stage, folders),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_exp.cluster"),
        autoescape=False,  # noqa: S701 - shell, not HTML: every value goes through `word` or an allow-list
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"word": _word, "join_words": _words}
    return environment


def _word(value: object) -> str:
    return _words([value])


def _words(values: Sequence[object]) -> str:
    """The values as words of a shell command; UserError for one that no line can hold."""
    words = [str(value) for value in values]
    unfit = [word for word in words if word and not word.isprintable()]
    if unfit:
        raise UserError(
            f"{unfit[0]!r} holds control characters and cannot stand in an sbatch script. Rename the file, or correct the value."
        )
    return shlex.join(words)


def _directives(stage: Stage, config_name: str, cluster: Cluster, folders: Folders) -> list[str]:
    wanted = stage.resources
    gpus = wanted.gpus_per_node
    log = folders.logs(stage.name) / ("%A_%a.log" if stage.tasks else "%j.log")
    values: dict[str, object] = {
        "job-name": f"{config_name}-{stage.name}",
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "reservation": wanted.reservation,
        "constraint": wanted.constraint,
        "time": wanted.time,
        "nodes": wanted.nodes or 1,
        "ntasks-per-node": num_processes(stage.name, stage.resources),
        "cpus-per-task": _cpus_per_process(stage),
        "gpus-per-node": (f"{wanted.gpu_type}:{gpus}" if wanted.gpu_type else gpus) if gpus else None,
        "mem": wanted.memory_per_node,
        "exclusive": "" if wanted.exclusive else None,
        "array": f"0-{stage.tasks - 1}" if stage.tasks else None,
        "chdir": folders.root,
        "output": log,
        "open-mode": "append",
        "export": _EXPORTED,
        "requeue": "",
        "signal": f"B:USR1@{cluster.signal_seconds}" if stage.resumable else None,
    }
    directives = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in values.items() if value is not None]
    for directive in directives:
        if not _DIRECTIVE.fullmatch(directive):
            raise UserError(f"#SBATCH {directive!r} has characters that SLURM would take for something else. Correct the value.")
    return directives


def _cpus_per_process(stage: Stage) -> int | None:
    cpus, processes = stage.resources.cpus_per_node, num_processes(stage.name, stage.resources)
    if cpus is None:
        return None
    if cpus < processes:
        raise UserError(
            f"The profile gives stage {stage.name} cpus_per_node = {cpus} for {processes} processes. Each needs one: raise it, or lower processes_per_node "
            "(default: one for each GPU)."
        )
    return cpus // processes


def _srun(stage: Stage, cluster: Cluster, processes: int) -> list[str]:
    """srun for so many processes on each node. CPUs per task are not inherited from the job since SLURM 22.05."""
    cpus = _cpus_per_process(stage)
    options = [f"--nodes={stage.resources.nodes or 1}", f"--ntasks-per-node={processes}"]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    if cluster.container.kind == "pyxis":
        options.append(f"--container-image={cluster.container.image}")
        options += (
            [f"--container-mounts={','.join(_both_sides(mount) for mount in cluster.container.mounts)}"] if cluster.container.mounts else []
        )
    return ["srun", *options]


def _both_sides(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"


def _program(cluster: Cluster, python: str) -> list[str]:
    """What stands before `megatron-exp`'s arguments."""
    inside: list[str] = []
    if cluster.container.kind == "apptainer":
        binds = [word for mount in cluster.container.mounts for word in ("--bind", mount)]
        inside = ["apptainer", "exec", "--nv", *binds, str(cluster.container.image)]
    return [*inside, python, "-m", "megatron_exp"]


def _step(stage: Stage, cluster: Cluster) -> str:
    srun = _srun(stage, cluster, num_processes(stage.name, stage.resources))
    if stage.has_ranks:
        srun += ["--kill-on-bad-exit=0", f"--wait={_STEP_WAIT_SECONDS}", "--label"]
    command = _words([*_program(cluster, str(cluster.python)), *stage.arguments])
    if stage.tasks:
        command += f' --task "$SLURM_ARRAY_TASK_ID/{stage.tasks}"'
    return _words(srun) + (' bash -c "$place" place \\\n  ' if stage.has_ranks else " \\\n  ") + command


def _fill(stage: Stage, cluster: Cluster) -> str:
    if stage.cache is None:
        return ""
    return _words([*_srun(stage, cluster, 1), *_program(cluster, str(cluster.python)), "cache", stage.cache, "--to", cluster.scratch])


def _remedy(stage: Stage, folders: Folders) -> str:
    log = folders.logs(stage.name)
    if _trains(stage):
        return f"Look into {log}; a checkpoint must fit between two stops (training.checkpoint.every, time, signal_seconds)."
    return f"Look into {log}."


def _trains(stage: Stage) -> bool:
    return stage.arguments[0] == "train"
