"""Training that stands still is noticed, described and ended; a slow process is named; an outdated attempt ends."""

import faulthandler
import functools
import itertools
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.run_record import HEARTBEAT_NAME, RECORD_NAME
from megatron_exp.training.hooks import stragglers as stragglers_of
from megatron_exp.training.hooks.record import RecordHook
from megatron_exp.training.hooks.stragglers import Pace, stragglers
from megatron_exp.training.hooks.watchdog import EXIT_HUNG, Watch, WatchdogHook
from megatron_exp.training.train import train
from tests.training.processes import metrics, train_together


def test_a_watch_reports_only_what_stands_still_for_the_whole_limit():
    watch = Watch(limit_seconds=10, tick_seconds=5)
    watch.step = 1
    assert [watch.tick(now) for now in (0, 5)] == [False, False]
    watch.step = 2
    assert [watch.tick(now) for now in (10, 15, 20)] == [False, False, True]


def test_time_in_which_the_process_was_stopped_does_not_count():
    watch = Watch(limit_seconds=20, tick_seconds=5)
    watch.step = 1
    assert [watch.tick(now) for now in (0, 5, 5000, 5005)] == [False, False, False, True]
    assert watch.still_seconds == 20  # 5 + 10 for the gap + 5


def fake_run(directory: Path) -> SimpleNamespace:
    return SimpleNamespace(layout=SimpleNamespace(rank=3, is_main=True), plan=SimpleNamespace(directory=directory), attempt=2, step=7)


def stand_still_somewhere(released: threading.Event) -> None:
    released.wait(30)


def test_a_hang_is_logged_with_rank_step_and_stack_and_ends_the_process(tmp_path, caplog):
    ended, released = [], threading.Event()
    hook = WatchdogHook(0.2, end=lambda code: (ended.append(code), released.set()), grace_seconds=0.1)
    run = fake_run(tmp_path)
    with caplog.at_level(logging.ERROR):
        hook.on_start(run, None)
        stand_still_somewhere(released)
        hook.on_end(run)
    assert ended == [EXIT_HUNG]
    assert "Rank 3 on " in caplog.text and "the last was 7" in caplog.text and "stand_still_somewhere" in caplog.text
    faulthandler.cancel_dump_traceback_later()


def test_steps_keep_the_watchdog_quiet(tmp_path):
    ended = []
    hook = WatchdogHook(0.6, end=ended.append, grace_seconds=0)
    run = fake_run(tmp_path)
    hook.on_start(run, None)
    for step in range(12):
        time.sleep(0.1)
        run.step = step
        hook.on_step(run)
    hook.on_end(run)
    assert not ended
    assert {"attempt", "step", "time", "host", "still_seconds", "schema_version"} == set(
        orjson.loads((tmp_path / HEARTBEAT_NAME).read_bytes())
    )


def test_a_heartbeat_that_cannot_be_written_does_not_end_training(tmp_path, caplog):
    hook = WatchdogHook(0, grace_seconds=0)
    run = fake_run(tmp_path / "gone")
    hook.on_start(run, None)
    hook.on_end(run)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("inf"), 1e12])
def test_a_time_that_no_timer_can_wait_for_is_refused_before_anything_is_written(manifest, run, seconds):
    with pytest.raises(UserError, match="--hang-seconds"):
        train(manifest, run, hang_seconds=seconds)
    assert not run.exists()


def test_stragglers_are_named_with_their_host_and_equals_are_not():
    paces = [Pace(1.0, 0.0, "a"), Pace(1.05, 0.01, "a"), Pace(1.9, 0.0, "b"), Pace(0.98, 0.6, "c")]
    found = stragglers(paces)
    assert len(found) == 2
    assert "rank 2 on b" in found[0] and "forward and backward took 1.90 s a step, 1.02 s" in found[0]
    assert "rank 3 on c" in found[1] and "waiting for data" in found[1]
    assert stragglers([Pace(0.010, 0.0, "a"), Pace(0.016, 0.0, "b")]) == []  # too little to matter


def slow_second_rank(log: Path) -> None:
    """In a training process: ranks are compared every four steps, and rank 1 takes its time before it exchanges gradients."""
    stragglers_of.EVERY_STEPS = 4
    if os.environ["RANK"] == "0":
        logging.getLogger().addHandler(logging.FileHandler(log))
        return
    noting = stragglers_of.StragglerHook._noting

    def later(hook, finalize):
        noted = noting(hook, finalize)
        return lambda *arguments, **options: (time.sleep(0.5), noted(*arguments, **options))[1]

    stragglers_of.StragglerHook._noting = later


@pytest.mark.slow
def test_a_slow_rank_of_a_real_run_is_named(manifest, run, tmp_path):
    log = tmp_path / "log"
    assert train_together(2, manifest=manifest, run_dir=run, prepare=functools.partial(slow_second_rank, log)) == [0, 0]
    named = [line for line in log.read_text().splitlines() if "straggler" in line]
    assert named and all("rank 1 on " in line and "forward and backward" in line for line in named)


def stuck_second_rank(log: Path) -> None:
    """In a training process: its log goes to a file, the watchdog has little patience, and rank 1 stops in the middle of step 4."""
    logging.getLogger().addHandler(logging.FileHandler(f"{log}.{os.environ['RANK']}"))
    WatchdogHook.__init__.__kwdefaults__["grace_seconds"] = 8.0  # longer than the 5 s between two looks, so that both ranks have looked
    if os.environ["RANK"] == "1":
        noting = stragglers_of.StragglerHook._noting

        def stuck(hook, finalize):
            noted, calls = noting(hook, finalize), itertools.count()
            return lambda *arguments, **options: (next(calls) == 3 and stuck_here(), noted(*arguments, **options))[1]

        stragglers_of.StragglerHook._noting = stuck


def stuck_here() -> None:
    time.sleep(600)


@pytest.mark.slow
def test_a_real_run_that_hangs_ends_with_an_error_and_both_ranks_say_where_they_are(manifest, run, tmp_path):
    prepare = functools.partial(stuck_second_rank, tmp_path / "log")
    waited, stuck = train_together(2, manifest=manifest, run_dir=run, hang_seconds=20, prepare=prepare)
    # Where the stuck rank's time is up first, the one that waits for it sees a lost connection before its own time is up.
    assert stuck == EXIT_HUNG and waited in (EXIT_HUNG, 1)
    waiting, stuck = ((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert "Rank 1 on " in stuck and "stuck_here" in stuck
    assert "Rank 0 on " in waiting and "finish_grad_sync" in waiting and "the last was 3" in waiting


def test_an_attempt_that_was_believed_dead_ends_before_its_next_checkpoint_and_leaves_the_record_alone(manifest, run):
    class TakeOver(RecordHook):
        """After step 2 another attempt enters the record."""

        def on_step(self, run):
            if run.step == 2:
                path = run.plan.directory / RECORD_NAME
                record = orjson.loads(path.read_bytes())
                record["attempts"].append({**record["attempts"][-1], "attempt": 2})
                path.write_bytes(orjson.dumps(record))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_exp.training.train.RecordHook", TakeOver)
        with pytest.raises(UserError, match="Another attempt"):
            train(manifest, run)
    record = orjson.loads((run / RECORD_NAME).read_bytes())
    assert [attempt["state"] for attempt in record["attempts"]] == ["running", "running"]
    assert not list(run.glob("checkpoints/step-*"))
    assert max(line["step"] for line in metrics(run)) == 4
