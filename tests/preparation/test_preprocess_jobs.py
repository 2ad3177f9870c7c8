"""Several jobs on one corpus: shares of an array, and the same job twice at once. No locks; one result."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_exp import files
from megatron_exp.cli.main import app
from megatron_exp.errors import UserError
from megatron_exp.preparation.preprocess import preprocess, preprocess_part
from megatron_exp.seeding import Words
from megatron_exp.shards.corpus import Corpus
from tests.shards.making import make_tokenizer, text_lines, tree, write_inputs


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path / "in", {"a": [text_lines(9, 9 * index) for index in range(5)]})


def job(inputs, tmp_path, name, **options):
    return preprocess([str(inputs)], make_tokenizer(tmp_path), tmp_path / name, **{"workers": 1, "shard_size": 700, **options})


def test_tasks_of_an_array_job_in_any_order_and_twice_give_the_bytes_of_one_job(inputs, tmp_path):
    whole = job(inputs, tmp_path, "whole")
    arguments = ([str(inputs)], make_tokenizer(tmp_path), tmp_path / "tasks")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda task: preprocess_part(*arguments, task, 3, workers=1), (2, 0, 1, 0)))
    assert not (tmp_path / "tasks" / "corpus.json").exists()
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "tasks" / "units").glob("*.json")}
    preprocess_part(*arguments, 1, 3, workers=1)
    assert len(records) == 5 and all(path.stat().st_mtime_ns == time_ns for path, time_ns in records.items())
    job(inputs, tmp_path, "tasks")
    assert tree(tmp_path / "tasks") == tree(whole.path)


def test_the_command_does_shares_and_then_finishes(inputs, tmp_path, capsys):
    command = ["preprocess", "--input", str(inputs), "--tokenizer", str(make_tokenizer(tmp_path)), "--workers", "1", "--output"]
    app([*command, str(tmp_path / "whole")], standalone_mode=False)
    for task in ("1/2", "0/2"):
        app([*command, str(tmp_path / "tasks"), "--task", task], standalone_mode=False)
        assert not (tmp_path / "tasks" / "corpus.json").exists()
    app([*command, str(tmp_path / "tasks")], standalone_mode=False)
    assert tree(tmp_path / "tasks") == tree(tmp_path / "whole")
    for wrong in ("2/2", "1", "a/b", "-1/2"):
        with pytest.raises(UserError, match="--task"):
            app([*command, str(tmp_path / "tasks"), f"--task={wrong}"], standalone_mode=False)


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_job_may_run_twice_at_once_whenever_the_other_finishes(inputs, tmp_path, monkeypatch, stride):
    expected = tree(job(inputs, tmp_path, "whole").path)
    count = at = 0
    name = ""

    def counted(step):
        def run(*arguments):
            nonlocal count, at
            count += 1
            if count == at:
                at = 0
                assert list(job(inputs, tmp_path, name).verify()) == []
            return step(*arguments)

        return run

    for step in ("_write", "_fsync", "_rename", "_fsync_directory"):
        monkeypatch.setattr(files, step, counted(getattr(files, step)))
    job(inputs, tmp_path, "counted")
    for moment in range(1, count + 1, stride):
        count, at, name = 0, moment, f"twice-{moment}"
        job(inputs, tmp_path, name)
        job(inputs, tmp_path, name)  # nothing is left to do, but what the slower one left is removed
        assert tree(tmp_path / name) == expected, f"the other job ran at durable step {moment}"


def test_jobs_with_other_options_do_not_mix_their_shards(inputs, tmp_path):
    refused = []

    def second(progress):
        if progress.phase == "merge" and not refused:
            with pytest.raises(UserError, match="other options") as error:
                job(inputs, tmp_path, "out", shard_size=400)
            refused.append(str(error.value))

    corpus = job(inputs, tmp_path, "out", progress=second)
    assert refused and list(corpus.verify()) == []
    assert tree(corpus.path) == tree(job(inputs, tmp_path, "alone").path)


@pytest.mark.parametrize(
    "given",
    ["{}/in", "{}/in/", "{}/in/*", "web={}/in/**", "{}/in/**/*", "{}/in/*/*", "{}/in/[ao]*/*.json*", "{}/**/*.*", "{}/link", "{}/link/*"],
)
@pytest.mark.parametrize("begun", [False, True])
def test_an_output_that_its_own_inputs_take_in_is_refused_before_anything_is_written(inputs, tmp_path, given, begun):
    (tmp_path / "link").symlink_to(inputs)
    output = inputs / "out"
    if begun:
        (output / "units").mkdir(parents=True)
    arguments = [given.format(tmp_path)], make_tokenizer(tmp_path), output
    with pytest.raises(UserError, match=r"takes in .*in/out, the directory that is to be written"):
        preprocess(*arguments, workers=1)
    with pytest.raises(UserError, match=r"takes in .*in/out, the directory that is to be written"):
        preprocess_part(*arguments, 0, 2, workers=1)
    assert not tree(output) and (begun or not output.exists())


def test_a_file_of_the_output_is_no_input(inputs, tmp_path):
    (tmp_path / "out" / "units").mkdir(parents=True)
    (tmp_path / "out" / "units" / "a.jsonl").write_bytes(text_lines(1))
    (inputs / "link").symlink_to(tmp_path / "out")
    for given in (inputs, tmp_path / "out" / "units" / "a.jsonl"):
        with pytest.raises(UserError, match=r"a\.jsonl lies in the directory that is to be written"):
            job(given, tmp_path, "out")


@pytest.mark.parametrize("given", ["{}/*.jsonl", "{}/a", "{}/**/*.jsonl", "{}/[ab]*"])
def test_an_output_beside_the_inputs_may_be_continued(inputs, tmp_path, given):
    (inputs / "b.jsonl").write_bytes(text_lines(1, 99))
    arguments = [given.format(inputs)], make_tokenizer(tmp_path), inputs / "out"
    preprocess_part(*arguments, 0, 2, workers=1)
    before = tree(preprocess(*arguments, workers=1).path)
    preprocess(*arguments, workers=1)
    assert tree(inputs / "out") == before


def test_of_many_writers_of_a_new_file_one_succeeds(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda number: files.create_file(tmp_path / "claim", str(number).encode()), range(16)))
    assert sum(done) == 1
    assert (tmp_path / "claim").read_bytes() == str(done.index(True)).encode()
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


@pytest.mark.slow
def test_processes_killed_at_random_times_leave_a_job_that_can_go_on(inputs, tmp_path):
    expected = tree(job(inputs, tmp_path, "whole", shard_size=8 << 30).path)
    command = [sys.executable, "-m", "megatron_exp", "preprocess", "--input", str(inputs), "--tokenizer", str(make_tokenizer(tmp_path))]
    command += ["--workers", "2", "--output", str(tmp_path / "out")]
    start = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], check=True, capture_output=True)
    usual = time.monotonic() - start
    for share in Words.of(0, "kill at random").integers(6, 1000) / 1000:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(float(share) * usual)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out" / "corpus.json").exists():
            assert list(Corpus.open(tmp_path / "out").verify()) == []
    subprocess.run(command, check=True, capture_output=True)
    assert tree(tmp_path / "out") == expected
