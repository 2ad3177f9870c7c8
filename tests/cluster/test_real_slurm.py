"""A real SLURM of two nodes: the whole chain by one `submit`, and a run that survives all that a cluster does to it."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from megatron_exp.checkpoint.catalogue import checkpoint_path
from megatron_exp.cluster.prepare import prepare, write
from megatron_exp.cluster.profile import STAGES
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.run_record import RunRecord
from megatron_exp.shards.corpus import Corpus
from megatron_exp.submission import Submission
from tests.cluster.daemons import Slurm
from tests.cluster.test_render import scripts, with_text
from tests.cluster.tiny import CANARIES, CHOSEN_BY_THE_TWIN, ROOT, WATERMARKS, write_inputs
from tests.training.compare import step_hashes
from tests.training.processes import metrics

STEPS, EVERY = 40, 10
PLANNED = (CANARIES, WATERMARKS, CHOSEN_BY_THE_TWIN)
"""Two that the dependence test can insert, and one that waits for the twin."""
PATIENCE_SECONDS = 300
"""Starting Python with torch on two nodes that share two busy cores may take a minute."""


def weights(run: Path) -> dict[str, bytes]:
    files = sorted(checkpoint_path(run, STEPS).glob("*.distcp"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def test_the_real_sbatch_accepts_every_script(slurm: Slurm, tmp_path: Path) -> None:
    tokenizer_and_text = with_text(
        tmp_path, partition="main", time="0:10:00", nodes=2, cpus_per_node=2, environment={"NCCL_DEBUG": "$(id)'\""}
    )
    for name, script in scripts(tmp_path, tokenizer_and_text).items():
        (tmp_path / "script").write_text(script)
        (tmp_path / "out").mkdir(exist_ok=True)
        shown = slurm.command("sbatch", "--test-only", str(tmp_path / "script"))
        assert shown == "", name  # what it would do goes to stderr, errors end it


@pytest.fixture(scope="module")
def finished(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one whole submission, every stage that there is done: each on its node or nodes, run and twin on two."""
    folder = tmp_path_factory.mktemp("chain")
    dependence = {"seeds": 2, "steps": 3, "tasks": 2, "gate": False}  # so short a test decides nothing: only its files are of interest
    config, cluster = write_inputs(folder, steps=STEPS, checkpoint_every=EVERY, experiments=PLANNED, cpdt=dependence)
    command = [sys.executable, "-m", "megatron_exp", "submit", str(config), "--cluster", str(cluster), "--out", str(folder / "out")]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    stages = Submission.open(folder / "out").stages
    assert tuple(stage.name for stage in stages) == STAGES
    for stage in stages:
        state = slurm.wait(stage.job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", seconds=4 * PATIENCE_SECONDS)
        assert state == "COMPLETED", log_of(folder / "out", stage.name)
    return folder / "out"


def log_of(out: Path, stage: str) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted((out / "logs" / stage).glob("*.log")))


@pytest.mark.slow
def test_one_submit_brings_text_to_a_report_on_two_nodes(finished: Path) -> None:
    assert (finished / "report.html").stat().st_size > 10_000
    for name, baseline in (("twin", True), ("run", False)):
        record = RunRecord.open(finished / name)
        assert record.baseline == baseline and record.record["state"] == "finished"
        assert record.record["layout"]["processes"] == 2
    assert list(finished.glob("run/evals/*/results.json"))
    assert RunRecord.open(finished / "run").open_manifest().experiments == [entry["name"] for entry in PLANNED]
    assert orjson.loads((finished / "cpdt/matrix.json").read_bytes())["complete"]


class DisturbedRun:
    """The chain's training script, edited as a person would: the same run into another directory."""

    def __init__(self, slurm: Slurm, finished: Path):
        self.slurm = slurm
        self.run = finished / "disturbed"
        script = finished / "scripts/disturbed.sbatch"
        script.write_text(next(finished.glob("scripts/*-train.sbatch")).read_text().replace(str(finished / "run"), str(self.run)))
        self.job = slurm.command("sbatch", "--parsable", str(script)).strip()
        self.log = finished / "logs/train" / f"{self.job}.log"
        self.attempts = 0
        self.former: set[int] = set()

    def ranks(self) -> list[psutil.Process]:
        """The training processes of the present attempt, by rank."""
        found = {}
        for process in psutil.process_iter(["cmdline", "name"]):
            words = process.info["cmdline"] or ()
            if (
                process.pid not in self.former
                and "megatron_exp" in words
                and str(self.run) in words
                and process.info["name"].startswith("python")
            ):
                with contextlib.suppress(psutil.Error, KeyError):
                    found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def until(self, met: Callable[[], Any], what: str) -> None:
        deadline, asked = time.monotonic() + PATIENCE_SECONDS, 0.0
        while not met():
            if time.monotonic() - asked > 0.5:
                asked = time.monotonic()
                state = self.slurm.wake(self.job)
                assert state in ("RUNNING", "PENDING", "COMPLETING", "REQUEUED"), f"{state} before {what}\n{self.log.read_text()[-4000:]}"
                assert asked < deadline, f"{what} did not come; {state}\n{self.log.read_text()[-4000:]}"
            time.sleep(0.005)

    def freeze_after_a_step(self) -> list[psutil.Process]:
        """The ranks of the next attempt, held still after a step of their own, so that they cannot finish while they are disturbed."""
        self.attempts += 1
        self.until(lambda: self.slurm.state(self.job) == "RUNNING" and len(self.ranks()) == 2, f"attempt {self.attempts}")
        ranks = self.ranks()
        self.former |= {rank.pid for rank in ranks}
        self.until(
            lambda: any(line["attempt"] == self.attempts and "loss" in line for line in metrics(self.run)),
            f"a step of attempt {self.attempts}",
        )
        for rank in ranks:
            rank.suspend()
        assert max(line["step"] for line in metrics(self.run)) < STEPS - 1
        return ranks

    def limit_time(self) -> None:
        """A time limit that is over in 25 to 85 seconds; limits are whole minutes."""
        elapsed = self.slurm.command("squeue", "--noheader", "--format=%M", "--job", self.job).strip()
        minutes, seconds = (int(part) for part in elapsed.split(":")[-2:])
        self.slurm.command("scontrol", "update", f"jobid={self.job}", f"TimeLimit={minutes + 1 + (seconds > 35)}")

    def num_restarts(self) -> int:
        shown = self.slurm.command("scontrol", "show", "job", self.job, "--oneliner")
        return int(shown.partition("Restarts=")[2].split()[0])


def has_pending(process: psutil.Process, number: int) -> bool:
    """Whether a stopped process has been sent this signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def resume(ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()


def lose_a_node(slurm: Slurm, disturbed: DisturbedRun, ranks: list[psutil.Process]) -> None:
    """slurmd of n2 falls silent; once SLURM has given the node up, what ran there is gone too; later it is back."""
    restarts = disturbed.num_restarts()
    slurm.kill_node("n2")
    try:
        disturbed.until(lambda: disturbed.num_restarts() > restarts, "SLURM's giving up the node")
    finally:
        for process in (ranks[1].parent(), ranks[1]):
            process.kill()
        resume(ranks[:1])
        slurm.start_node("n2")


@pytest.mark.slow
def test_a_run_that_is_killed_signalled_requeued_cut_off_and_loses_a_node_ends_bitwise_as_the_one_that_was_not(
    slurm: Slurm, finished: Path
) -> None:
    disturbed = DisturbedRun(slurm, finished)

    ranks = disturbed.freeze_after_a_step()  # a killed rank: the other loses its partner
    ranks[1].kill()
    resume(ranks)

    ranks = disturbed.freeze_after_a_step()  # a signal by hand
    slurm.command("scancel", "--signal=USR1", disturbed.job)
    resume(ranks)

    ranks = disturbed.freeze_after_a_step()  # an operator
    slurm.command("scontrol", "requeue", disturbed.job)
    resume(ranks)

    ranks = disturbed.freeze_after_a_step()  # a job that matters more
    urgent = slurm.command(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    ).strip()
    slurm.wait(urgent, "COMPLETED")
    resume(ranks)

    ranks = disturbed.freeze_after_a_step()  # the time limit: the batch shell is told 30 s before
    disturbed.limit_time()
    disturbed.until(lambda: all(has_pending(rank, signal.SIGUSR1) for rank in ranks), "the signal before the time limit")
    slurm.command("scontrol", "update", f"jobid={disturbed.job}", "TimeLimit=20", check=False)
    resume(ranks)

    ranks = disturbed.freeze_after_a_step()
    lose_a_node(slurm, disturbed, ranks)

    state = slurm.wait(disturbed.job, "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", seconds=2 * PATIENCE_SECONDS)
    assert state == "COMPLETED", disturbed.log.read_text()[-6000:]
    attempts = RunRecord.open(disturbed.run).record["attempts"]
    assert len(attempts) == 7 and [attempt["state"] for attempt in attempts[1:5]] == ["stopped"] * 4 and attempts[-1]["state"] == "finished"
    assert weights(disturbed.run) == weights(finished / "run")
    assert step_hashes(disturbed.run) == step_hashes(finished / "run")


REAL_DATA = ROOT.parent / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data (olmo-mix-mini and the dolma2 tokenizer)")
def test_an_array_of_preprocess_tasks_makes_the_same_shards_as_one_process(slurm: Slurm, tmp_path: Path) -> None:
    text = {"inputs": [str(REAL_DATA / "olmo-mix-mini/data")], "tokenizer": str(REAL_DATA / "tokenizers/dolma2.json")}
    config, cluster = write_inputs(tmp_path, steps=STEPS, checkpoint_every=EVERY, preprocess={**text, "tasks": 3})
    prepared = prepare(config, cluster, tmp_path / "out")
    array, merge = (stage.script for stage in write(prepared).stages[:2])
    first = slurm.command("sbatch", "--parsable", array).strip()
    second = slurm.command("sbatch", "--parsable", f"--dependency=afterok:{first}", merge).strip()
    assert slurm.wait(second, "COMPLETED", "FAILED", "CANCELLED", seconds=2 * PATIENCE_SECONDS) == "COMPLETED", log_of(
        tmp_path / "out", "merge"
    )
    assert len(list((tmp_path / "out/logs/preprocess").glob(f"{first}_*.log"))) == 3
    alone = preprocess(text["inputs"], Path(text["tokenizer"]), tmp_path / "alone", workers=1)
    made = Corpus.open(tmp_path / "corpus")
    assert [shard["files"] for shard in made.record["shards"]] == [shard["files"] for shard in alone.record["shards"]]
    assert made.fingerprint == alone.fingerprint
