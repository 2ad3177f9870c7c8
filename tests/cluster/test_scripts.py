"""What the scripts do, with stand-ins for srun and scontrol: when a job starts again, when it ends, and what it says."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_exp.cluster.profile import Cluster
from tests.cluster.test_render import scripts


class Job:
    """The training script of a tiny chain, run by bash with commands of SLURM that note how they were called."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.run = directory / "out/run"
        (directory / "corpus").mkdir()
        (directory / "corpus/corpus.json").touch()
        (directory / "bin").mkdir()
        self.script = directory / "train.sbatch"
        self.script.write_text(scripts(directory, Cluster(requeue_limit=3))["train"])
        self.stand_in("srun", "exit 0")
        self.stand_in("sleep", "exec /bin/sleep 0.1")
        self.state("RUNNING")

    def stand_in(self, name: str, body: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {self.directory}/calls\n{body}\n')
        path.chmod(0o755)

    def state(self, state: str) -> None:
        """What SLURM says about the job when the script asks."""
        self.stand_in("scontrol", f'[ "$1" = requeue ] || echo "JobId=7 JobState={state} Reason=None"')

    def start(self, restart: int = 0, job: int = 7) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(job),
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        return subprocess.Popen(["bash", self.script], env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self, restart: int = 0, job: int = 7) -> int:
        return self.start(restart, job).wait(60)

    @property
    def calls(self) -> list[str]:
        return (self.directory / "calls").read_text().splitlines()

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 7" in self.calls

    def checkpoint(self, step: int) -> None:
        path = self.run / f"checkpoints/step-{step:08d}"
        path.mkdir(parents=True)
        (path / "COMPLETE").touch()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (1, True), (137, True), (124, True)])
def test_all_but_success_and_the_users_mistakes_starts_the_job_again(job, code, again):
    job.stand_in("srun", f"exit {code}")
    assert job.finish() == code
    assert job.requeued == again


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT", "NODE_FAIL"])
def test_where_slurm_has_decided_the_script_does_not_start_the_job_again(job, state):
    job.stand_in("srun", "exit 75")
    job.state(state)
    assert job.finish() == 75
    assert not job.requeued


def test_a_controller_that_does_not_answer_is_asked_again(job):
    job.stand_in("srun", "exit 75")
    job.stand_in("sleep", "exit 0")
    job.stand_in(
        "scontrol",
        f'[ "$(grep -c "scontrol show" {job.directory}/calls)" -ge 3 ] && [ "$1" = show ] && echo JobState=RUNNING; [ "$1" = requeue ]',
    )
    job.finish()
    assert job.requeued


def test_two_attempts_without_a_new_checkpoint_end_the_job_with_a_reason(job):
    job.stand_in("srun", "exit 75")
    assert [job.finish(restart) for restart in range(3)] == [75, 75, 2]
    assert len([call for call in job.calls if call.startswith("srun")]) == 2
    reason = (job.run / "stopped.txt").read_text()
    assert "two attempts in a row made no new checkpoint" in reason and "training.checkpoint.every" in reason
    assert len((job.run / "attempts.log").read_text().splitlines()) == 2


def test_a_new_checkpoint_makes_two_more_attempts(job):
    job.stand_in("srun", "exit 75")
    assert [job.finish(restart) for restart in range(2)] == [75, 75]
    job.checkpoint(10)
    assert [job.finish(restart) for restart in range(2)] == [75, 75]
    assert job.finish(2) == 2


def test_another_job_begins_its_own_count_and_removes_the_reason(job):
    job.stand_in("srun", "exit 75")
    assert [job.finish(restart) for restart in range(3)] == [75, 75, 2]
    assert job.finish(job=8) == 75
    assert not (job.run / "stopped.txt").exists()


def test_the_profiles_limit_of_requeues_holds(job):
    assert job.finish(3) == 0
    assert job.finish(4) == 2
    assert "started again 3 times" in (job.run / "stopped.txt").read_text()


def waiting(job: Job, number: str) -> subprocess.Popen[str]:
    """The script, with a step that ends 75 after this signal; it has begun."""
    job.stand_in("srun", f"trap 'sleep 0.5; exit 75' {number}; touch {job.directory}/begun; while :; do sleep 0.05; done")
    process = job.start()
    deadline = time.monotonic() + 60
    while not (job.directory / "begun").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def test_the_signal_before_the_time_limit_reaches_the_step_and_the_job_waits_for_its_checkpoint(job):
    process = waiting(job, "USR1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert job.requeued


def test_a_second_signal_does_not_lose_the_steps_exit_code(job):
    process = waiting(job, "USR1")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_every_process_gets_its_place_from_slurm(job):
    variables = {
        "SLURM_PROCID": 3,
        "SLURM_NTASKS": 4,
        "SLURM_LOCALID": 1,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    exports = "; ".join(f"export {name}={value}" for name, value in variables.items())
    job.stand_in("python3", "env")
    job.stand_in("srun", f'while [[ $1 == --* ]]; do shift; done; {exports}; exec "$@" > {job.directory}/env')
    assert job.finish(2) == 0
    told = dict(line.partition("=")[::2] for line in (job.directory / "env").read_text().splitlines())
    assert [told[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")] == [
        "3",
        "4",
        "1",
        "2",
        "10.0.0.1",
    ]
    assert told["MASTER_PORT"] == str(10000 + (7 * 16 + 2) % 20000) and told["SLURM_EXPORT_ENV"] == "ALL"
