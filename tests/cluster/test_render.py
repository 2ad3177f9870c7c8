"""Scripts are what they should be, whatever the values: checked by bash, by a stand-in for the daemons, and by the real sbatch."""

import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_exp.cli.main import app
from megatron_exp.cluster.profile import STAGES, Cluster, Container, Dependence, PreprocessInputs, Resources
from megatron_exp.cluster.render import check_root, render
from megatron_exp.cluster.stages import Folders, chain
from megatron_exp.config.load import validate
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError

CONFIG = validate(
    {"name": "toy", "corpus": {"path": "corpus"}, "geometry": {"sequence_length": 8, "global_batch_size": 2, "steps": 3}}, "test"
)


def scripts(tmp_path: Path, cluster: Cluster, config=CONFIG) -> dict[str, str]:
    folders = Folders(check_root(tmp_path / "out"), tmp_path / "corpus")
    cluster = cluster if cluster.python else cluster.model_copy(update={"python": "python3"})
    return {stage.name: render(stage, config.name, cluster, folders, f"{stage.name}.sbatch") for stage in chain(config, cluster, folders)}


def with_text(tmp_path: Path, **changes) -> Cluster:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.touch()
    return Cluster(preprocess=PreprocessInputs(inputs=("a.jsonl",), tokenizer=str(tokenizer), tasks=4), **changes)


def assert_bash_reads(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()


def directives(script: str) -> list[str]:
    """What sbatch reads: the #SBATCH lines before the first command."""
    lines = script.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    return [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]


def config_with(experiment: dict[str, object]) -> Config:
    return validate({**CONFIG.model_dump(mode="json"), "experiments": [{"name": "x", **experiment}]}, "test")


NEEDING = {"verbatim": {"type": "verbatim_completion"}, "canaries": {"type": "memorization_patterns", "suffix_types": ["plain", "model-based"]}}


@pytest.mark.parametrize("experiment", NEEDING.values(), ids=list(NEEDING))
def test_the_chain_has_the_stages_of_the_design_in_order(tmp_path, experiment):
    made = scripts(tmp_path, with_text(tmp_path, cpdt=Dependence()), config_with(experiment))
    assert tuple(made) == STAGES
    for script in made.values():
        assert_bash_reads(script)
    assert "manifest-reference --out" in made["train"] and "manifest-reference --from" in made["cpdt"] and "--gate" in made["cpdt-gate"]
    assert "/manifest --out" in made["twin"]


def test_without_an_experiment_that_needs_a_reference_there_is_one_plan(tmp_path):
    assert "plan-reference" not in scripts(tmp_path, with_text(tmp_path), config_with({"type": "memorization_patterns"}))


def test_every_stage_is_a_command_that_the_program_understands(tmp_path):
    config = config_with(NEEDING["canaries"])
    cluster = with_text(tmp_path, cpdt=Dependence(state=5, tasks=2), scratch="/local", hang_seconds=60)
    commands = typer.main.get_command(app).commands
    for stage in chain(config, cluster, Folders(tmp_path / "out", tmp_path / "corpus")):
        task = ["--task", f"0/{stage.tasks}"] if stage.tasks else []
        name, *arguments = stage.arguments
        commands[name].make_context(name, [*arguments, *task])  # parses, and ends for an option that does not exist
    commands["cache"].make_context("cache", [str(tmp_path / "corpus"), "--to", "/local"])


def test_a_corpus_that_exists_is_not_made_again_and_one_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no corpus at"):
        scripts(tmp_path, Cluster())
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.json").touch()
    assert list(scripts(tmp_path, Cluster())) == ["plan", "twin", "train", "eval", "report"]


def test_stages_ask_for_what_they_use_and_a_stage_of_the_profile_has_the_last_word(tmp_path):
    cluster = with_text(
        tmp_path,
        partition="gpu",
        nodes=8,
        gpus_per_node=8,
        cpus_per_node=96,
        time="1-00:00:00",
        stages={"plan": Resources(partition="cpu", memory_per_node="200G")},
    )
    made = {name: directives(script) for name, script in scripts(tmp_path, cluster).items()}
    assert {"--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=12", "--signal=B:USR1@600", "--requeue"} <= set(
        made["train"]
    )
    assert {"--nodes=1", "--partition=cpu", "--mem=200G", "--ntasks-per-node=1", "--cpus-per-task=96"} <= set(made["plan"])
    assert not [one for one in made["plan"] if "gpu" in one]
    assert {"--nodes=1", "--gpus-per-node=8"} <= set(made["eval"])
    assert "--array=0-3" in made["preprocess"] and "--array=0-3" not in made["merge"]


def test_more_processes_than_cpus_are_refused(tmp_path):
    with pytest.raises(UserError, match="cpus_per_node = 4 for 8 processes"):
        scripts(tmp_path, with_text(tmp_path, gpus_per_node=8, cpus_per_node=4))


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_the_program_runs_inside_the_container(tmp_path, kind):
    container = Container(kind=kind, image="/images/exp.sqsh", mounts=("/data", "/a:/b"))
    script = scripts(tmp_path, with_text(tmp_path, container=container, python="python3"))["train"]
    wanted = {
        "pyxis": "--container-image=/images/exp.sqsh --container-mounts=/data:/data,/a:/b",
        "apptainer": "apptainer exec --nv --bind /data --bind /a:/b /images/exp.sqsh python3 -m megatron_exp",
    }
    assert wanted[kind] in script
    assert_bash_reads(script)


@pytest.mark.parametrize("root", ["a b", "a\nb", "$(id)", "ü", "a%j", "a,b"])
def test_a_directory_that_no_directive_can_hold_is_refused(tmp_path, root):
    with pytest.raises(UserError, match="cannot stand in an sbatch script"):
        check_root(tmp_path / root)


ARGUMENT = st.text(min_size=1, max_size=30).filter(str.isprintable)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    inputs=st.lists(ARGUMENT, min_size=1, max_size=3),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    corpus=ARGUMENT,
)
def test_free_values_come_out_of_a_shell_as_they_went_in(tmp_path, inputs, value, corpus):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.touch()
    cluster = Cluster(
        preprocess=PreprocessInputs(inputs=tuple(inputs), tokenizer=str(tokenizer)), environment={"NCCL_DEBUG": value}, python="python3"
    )
    folders = Folders(check_root(tmp_path / "out"), Path("/data") / corpus.replace("/", "_"))
    stage = chain(CONFIG, cluster, folders)[0]
    script = render(stage, "toy", cluster, folders, "x.sbatch")
    assert not [one for one in directives(script) if not one.startswith("--")]
    line = next(line for line in script.splitlines() if "python3 -m megatron_exp" in line)
    assert shlex.split(line.removesuffix(" &")) == ["python3", "-m", "megatron_exp", *stage.arguments]
    export = next(line for line in script.splitlines() if line.startswith("export NCCL_DEBUG="))
    shown = subprocess.run(["bash", "-c", f'{export}; printf %s "$NCCL_DEBUG"'], capture_output=True, check=True).stdout
    assert shown.decode() == value
    assert_bash_reads(script)


@pytest.mark.parametrize("text", ["a\nb", "a\r", "\x00", "a\u2028b", "\ud800"])
def test_control_characters_never_reach_a_script(tmp_path, text):
    with pytest.raises(ValueError, match="control characters"):
        PreprocessInputs(inputs=(text,), tokenizer="t")
    with pytest.raises(UserError, match="control characters"):
        (tmp_path / "tokenizer.json").touch()
        cluster = with_text(tmp_path, python="python3")
        folders = Folders(tmp_path / "out", Path(f"/data/{text}".replace("\x00", "\x01")))
        for stage in chain(CONFIG, cluster, folders):
            render(stage, "toy", cluster, folders, "x")
