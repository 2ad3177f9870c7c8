"""Runs of real processes: killed, signalled, and several together."""

import functools
import os
import signal
from pathlib import Path

import pytest

from megatron_exp.checkpoint.catalogue import list_checkpoints
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.run_record import RunRecord
from megatron_exp.seeding import Words
from megatron_exp.training.train import REQUEUE, train
from tests.training.compare import answers, hook_states, losses, segments, step_hashes, weights
from tests.training.processes import kill_at_sync, metrics, train_together, training, wait_for_step
from tests.training.toy import STEPS


def kill_in(manifest: Path, run: Path, step: int, in_background: bool = False) -> None:
    overrides = ["training.checkpoint.every=2", f"training.checkpoint.in_background={str(in_background).lower()}"]
    with training(manifest=manifest, run_dir=run, overrides=overrides) as process:
        wait_for_step(run, step, process)
        process.kill()


def assert_finishes_as(manifest: Path, run: Path, whole_run: Path) -> None:
    with training(manifest=manifest, run_dir=run, overrides=["training.checkpoint.every=2"]) as process:
        process.join(100)
        assert process.exitcode == 0
    assert weights(run) == weights(whole_run)
    assert step_hashes(run) == step_hashes(whole_run)
    assert losses(run) == losses(whole_run)
    assert answers(run) == answers(whole_run)
    assert hook_states(run) == hook_states(whole_run)
    assert segments(run) == segments(whole_run)
    assert is_sound(verify(run)), "the ledger agrees with what was planned, and no file is half"
    assert {one["state"] for one in RunRecord.open(run).record["attempts"][:-1]} <= {"killed", "stopped"}


def test_a_run_killed_at_random_steps_ends_bitwise_as_the_one_that_was_not(manifest: Path, whole_run: Path, run: Path) -> None:
    for number, step in enumerate(sorted(1 + Words.of(0, "kill").choice(STEPS - 1, 5))):
        kill_in(manifest, run, int(step), in_background=number % 2 == 1)
    assert_finishes_as(manifest, run, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_killed_after_any_step_ends_bitwise_as_the_one_that_was_not(manifest: Path, whole_run: Path, run: Path, step: int) -> None:
    kill_in(manifest, run, step, in_background=step % 2 == 0)
    assert_finishes_as(manifest, run, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("call", range(8, 80, 9))
def test_a_run_killed_while_it_syncs_a_file_ends_bitwise_as_the_one_that_was_not(
    manifest: Path, whole_run: Path, run: Path, call: int, in_background: bool
) -> None:
    overrides = ["training.checkpoint.every=2", f"training.checkpoint.in_background={str(in_background).lower()}"]
    with training(prepare=functools.partial(kill_at_sync, call), manifest=manifest, run_dir=run, overrides=overrides) as process:
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
    assert_finishes_as(manifest, run, whole_run)


def test_a_second_process_is_refused_while_the_first_trains(manifest: Path, run: Path) -> None:
    with training(manifest=manifest, run_dir=run) as process:
        wait_for_step(run, 1, process)
        with pytest.raises(UserError, match=f"being trained into by process {process.pid}"):
            train(manifest, run)
    assert [one["attempt"] for one in RunRecord.open(run).record["attempts"]] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_and_exit_code_75(
    manifest: Path, whole_run: Path, run: Path, number: int
) -> None:
    with training(manifest=manifest, run_dir=run) as process:
        wait_for_step(run, 2, process)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == REQUEUE
    stopped = max(line["step"] for line in metrics(run))
    assert stopped < STEPS
    assert list_checkpoints(run)[-1][0] == stopped
    assert_finishes_as(manifest, run, whole_run)


def test_a_run_begun_by_two_replicas_is_finished_by_two_tensor_ranks(manifest: Path, whole_run: Path, run: Path) -> None:
    assert train_together(2, manifest=manifest, run_dir=run, stop_at=6) == [REQUEUE, REQUEUE]
    assert train_together(2, manifest=manifest, run_dir=run, overrides=["training.parallel.tp=2"]) == [0, 0]
    assert step_hashes(run) == step_hashes(whole_run)
    assert losses(run) == pytest.approx(losses(whole_run), abs=1e-4)
    assert answers(run) == pytest.approx(answers(whole_run), abs=1e-4)
