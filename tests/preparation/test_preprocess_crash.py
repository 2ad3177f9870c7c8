"""Interruptions: whatever durable step is the last one, the next call ends with the same corpus."""

import errno
import os
import signal

import pytest

from megatron_exp import files
from megatron_exp.errors import UserError
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.preparation.preprocess_progress import Reporter
from megatron_exp.preparation.preprocess_workers import run_tasks
from megatron_exp.shards.corpus import Corpus
from tests.preparation.failing_work import FailingWork
from tests.shards.making import make_tokenizer, text_lines, tree, write_inputs

STEPS = ("_write", "_fsync", "_rename", "_fsync_directory")


class Job:
    """A small preprocess whose durable steps are counted; before step `at` something happens."""

    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.inputs = write_inputs(directory / "in", {"a": [text_lines(4)], "b": [text_lines(3, 4)]})
        self.tokenizer = make_tokenizer(directory)
        self.count, self.at, self.happens = 0, None, None
        for name in STEPS:
            monkeypatch.setattr(files, name, self._counting(getattr(files, name)))

    def _counting(self, step):
        def counted(*arguments):
            self.count += 1
            if self.count == self.at:
                self.happens()
            return step(*arguments)

        return counted

    def run(self, name, at=None, happens=None):
        self.count, self.at, self.happens = 0, at, happens
        return preprocess([str(self.inputs)], self.tokenizer, self.directory / name, workers=1, shard_size=150)


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path, monkeypatch)


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_broken():
    raise OSError(errno.EIO, "Input/output error")


def assert_none_or_whole(path, expected):
    """No corpus yet, or the whole one: a reader never meets a half."""
    if (path / "corpus.json").exists():
        corpus = Corpus.open(path)
        assert list(corpus.verify()) == []
        assert {name: content for name, content in tree(path).items() if not name.startswith("units/")} == expected


every_step = pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])


@every_step
@pytest.mark.parametrize("trouble", [disk_full, disk_broken])
def test_a_disk_that_fails_at_any_durable_step_leaves_a_job_that_can_go_on(job, trouble, stride):
    expected = tree(job.run("whole").path)
    num_steps = job.count
    assert num_steps > 40, "the steps of units, shards and record are all counted"
    for step in range(1, num_steps + 1, stride):
        name = f"full-{step}"
        if step < num_steps:
            with pytest.raises(UserError, match="(No space left|Input/output error).*GB free"):
                job.run(name, step, trouble)
        else:
            job.run(name, step, trouble)  # the corpus has its name already; that step is taken again
            assert job.count == num_steps + 1
        assert_none_or_whole(job.directory / name, expected)
        assert tree(job.run(name).path) == expected, f"after a disk full at step {step}"


@every_step
def test_a_kill_at_any_durable_step_leaves_a_job_that_can_go_on(job, stride):
    expected = tree(job.run("whole").path)
    num_steps = job.count
    for step in range(1, num_steps + 1, stride):
        name = f"killed-{step}"
        child = os.fork()
        if not child:
            job.run(name, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert_none_or_whole(job.directory / name, expected)
        assert tree(job.run(name).path) == expected, f"after a kill at step {step}"


def test_finished_units_are_not_read_again(job, monkeypatch):
    job.run("whole")
    with pytest.raises(UserError):
        job.run("out", job.count // 2, disk_full)
    before = {path.name: path.stat().st_mtime_ns for path in (job.directory / "out" / "units").glob("*.json")}
    assert before, "half of the steps lie behind the first unit"
    with pytest.raises(UserError):
        job.run("out", 2, disk_full)
    after = {path.name: path.stat().st_mtime_ns for path in (job.directory / "out" / "units").glob("*.json")}
    assert before.items() <= after.items()


def test_a_unit_damaged_before_it_is_merged_is_refused_by_name(job):
    job.run("whole")
    with pytest.raises(UserError):
        job.run("out", job.count // 2, disk_full)
    unit = max((job.directory / "out" / "units").glob("*.bin"))
    content = bytearray(unit.read_bytes())
    content[3] ^= 1
    unit.write_bytes(content)
    with pytest.raises(UserError, match=unit.name):
        job.run("out")
    unit.unlink()
    assert list(job.run("out").verify()) == []


@pytest.mark.parametrize("how", ["another number", "another header", "empty"])
def test_sums_of_a_unit_that_are_damaged_before_it_is_merged_are_refused_by_name(job, how):
    job.run("whole")
    with pytest.raises(UserError):
        job.run("out", job.count // 2, disk_full)
    sums = max((job.directory / "out" / "units").glob("*.sums.npy"))
    content = bytearray(sums.read_bytes())
    content[-1 if how == "another number" else 12] ^= 0x20
    sums.write_bytes(b"" if how == "empty" else content)
    with pytest.raises(UserError, match=sums.name):
        job.run("out")


def test_partial_files_of_killed_jobs_are_removed(job):
    (job.directory / "out" / "units").mkdir(parents=True)
    for name in ("shard-00000.bin.0123456789ab-77-00000000.partial", "units/abc.bin.0123456789ab-77-00000000.partial"):
        (job.directory / "out" / name).write_bytes(b"half")  # of another machine, which may live: these go when the corpus is complete
    dead = [job.directory / "out" / name for name in ("shard-00001.bin", "units/abc.bin")]
    child = os.fork()
    if not child:
        for path in dead:
            files.partial_name(path).write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((job.directory / "out").rglob("*.partial"))) == 4
    with pytest.raises(UserError):
        job.run("out", 1, disk_full)
    assert all("0123456789ab" in path.name for path in (job.directory / "out").rglob("*.partial"))
    assert not [name for name in tree(job.run("out").path) if "partial" in name]


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [("killed", UserError, "signal 9"), ("mistake", UserError, "this input is wrong"), ("bug", RuntimeError, "exit code 1")],
)
def test_a_worker_that_does_not_end_well_is_an_error(task, error, words):
    with pytest.raises(error, match=words):
        run_tasks(FailingWork(), ["fine", task], 2, Reporter(None, "tokenise", 1, 0))
