"""The command, with a recording stand-in for sbatch."""

from pathlib import Path

import pytest
import yaml

from megatron_exp.cli.main import app, entry
from megatron_exp.config.load import load_config
from megatron_exp.errors import UserError
from megatron_exp.submission import Submission
from tests.cluster.test_render import CONFIG

NUM_STAGES = 5


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with config, profile and corpus, and stand-ins for SLURM's commands in front of PATH."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.json").touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG.model_dump(mode="json")))
    (tmp_path / "cluster.yaml").write_text("{partition: main, time: '1:00:00'}")
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path, "sbatch", 'echo "$((100 + $(grep -c ^sbatch calls)));cluster"')
    stand_in(tmp_path, "squeue", "cat jobs 2>/dev/null")
    stand_in(tmp_path, "scancel", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(place: Path, name: str, body: str) -> None:
    path = place / "bin" / name
    path.write_text(f"#!/bin/bash\ncd {place}\n(IFS=$'\\t'; echo {name}$'\\t'\"$*\") >> calls\n{body}\n")
    path.chmod(0o755)


def calls(place: Path, name: str) -> list[list[str]]:
    lines = [line.split("\t") for line in (place / "calls").read_text().splitlines()] if (place / "calls").exists() else []
    return [line[1:] for line in lines if line[0] == name]


def submit(*more: str) -> None:
    app(["submit", "config.yaml", "--cluster", "cluster.yaml", "--out", "out", *more], standalone_mode=False)


def test_every_stage_waits_for_the_one_before(place):
    submit()
    handed_in = calls(place, "sbatch")
    assert len(handed_in) == NUM_STAGES
    assert handed_in[0] == ["--parsable", str(place / "out/scripts/01-plan.sbatch")]
    for number, words in enumerate(handed_in[1:], start=101):
        assert words[:3] == ["--parsable", f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
    assert Submission.open(place / "out").jobs == [str(101 + index) for index in range(NUM_STAGES)]


def test_the_config_is_frozen_with_absolute_paths(place):
    submit()
    frozen = load_config(place / "out/config.yaml")
    assert frozen == CONFIG.model_copy(update={"corpus": CONFIG.corpus.model_copy(update={"path": place / "corpus"})})


def test_a_dry_run_prints_all_scripts_and_writes_nothing(place, capsys):
    submit("--dry-run")
    shown = capsys.readouterr().out
    assert shown.count("#!/bin/bash") == NUM_STAGES and "--dependency=afterok:" in shown
    assert not (place / "out").exists() and not calls(place, "sbatch")


def test_a_refused_stage_takes_the_others_back(place):
    stand_in(place, "sbatch", 'n=$(grep -c ^sbatch calls); [ "$n" -lt 3 ] || { echo "invalid partition" >&2; exit 1; }; echo $n')
    with pytest.raises(UserError, match="refused the stage train .*invalid partition"):
        submit()
    assert calls(place, "scancel") == [["1", "2"]]


def test_a_directory_whose_jobs_are_still_there_is_not_submitted_again(place):
    submit()
    (place / "jobs").write_text("101 COMPLETED\n102 RUNNING\n103 PENDING\n")
    with pytest.raises(UserError, match="still there: 102, 103"):
        submit()
    (place / "jobs").write_text("101 COMPLETED\n102 FAILED\n103 CANCELLED\n")
    submit()
    assert len(calls(place, "sbatch")) == 2 * NUM_STAGES


def test_another_config_is_not_submitted_into_the_same_directory(place):
    submit()
    (place / "config.yaml").write_text((place / "config.yaml").read_text().replace("steps: 3", "steps: 4"))
    with pytest.raises(UserError, match="another configuration"):
        submit()


def test_without_slurm_the_message_says_so(place, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit) as ended:
        entry(["submit", "config.yaml", "--cluster", "cluster.yaml"])
    assert ended.value.code == 2 and "no sbatch on this machine" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("training", "words"),
    [("{parallel: {tp: 4}}", "multiple of tp 4 x pp 1 x cp 1 = 4"), ("{micro_batch_size: 2}", "4 slots go through at once")],
)
def test_processes_that_do_not_divide_the_model_or_the_batch_are_refused_before_they_wait_in_a_queue(place, training, words):
    (place / "cluster.yaml").write_text("{nodes: 2}")
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump({**config, "training": yaml.safe_load(training)}))
    with pytest.raises(UserError, match=words):
        submit()
    assert not calls(place, "sbatch")


def test_the_memory_of_training_is_told_where_there_are_gpus(place, capsys):
    (place / "cluster.yaml").write_text("{gpus_per_node: 2}")
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"preset": "tiny", "vocabulary_size": 128}}))
    (place / "corpus/corpus.json").unlink()
    (place / "tokenizer.json").touch()
    (place / "cluster.yaml").write_text("{gpus_per_node: 2, preprocess: {inputs: [a], tokenizer: tokenizer.json}}")
    submit("--dry-run")
    assert "GiB on the fullest of 2 GPUs, by calculation (weights" in capsys.readouterr().out
