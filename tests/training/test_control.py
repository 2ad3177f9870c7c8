"""Controllers in training: segments are durable, replayable, never read past, and the same after any interruption."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp.checkpoint.catalogue import checkpoint_path
from megatron_exp.control.answers import recorded_answers
from megatron_exp.control.chain import Chain
from megatron_exp.control.segments import DIRECTORY, read_segments, segment_path
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import PROBES, SEGMENTS
from megatron_exp.overlay.decided import Decided
from megatron_exp.run_record import RunRecord
from megatron_exp.stream.slot import Geometry
from megatron_exp.training.data import Feed
from megatron_exp.training.hooks import control
from megatron_exp.training.train import FINISHED, REQUEUE, train
from tests.control.facts import FACTS
from tests.training.compare import answers, losses, step_hashes, weights
from tests.training.processes import metrics, train_together, training, wait_for_step
from tests.training.toy import BATCH, EXPERIMENTS, STEPS, make_manifest

CONTROLLED = [{**FACTS, "target": 0.002}, {**FACTS, "name": "slow", "interval": 4, "largest": 3, "rule": "proportional_integral"}]


@pytest.fixture(scope="module")
def controlled(data: Path) -> Path:
    """A manifest with two controllers of different intervals, and canaries."""
    return make_manifest(data, "manifest-controlled", experiments=[*CONTROLLED, EXPERIMENTS[0]])


@pytest.fixture(scope="module")
def whole(controlled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of it, never interrupted; tests only read it."""
    run = tmp_path_factory.mktemp("controlled") / "run"
    assert train(controlled, run) == FINISHED
    return run


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / DIRECTORY).iterdir())}


def segments(run: Path, manifest: Path) -> list:
    return read_segments(run, Manifest.open(manifest).fingerprint)


def assert_same_run(found: Path, other: Path) -> None:
    assert files(found) == files(other)
    assert weights(found) == weights(other)
    assert step_hashes(found) == step_hashes(other)
    assert losses(found) == losses(other)
    assert answers(found) == answers(other)
    assert decided(found) == decided(other)


def decided(run: Path) -> dict[str, dict[int, float]]:
    """{controller: {state: copies}}, by the measurements that count."""
    history = RunRecord.open(run).history()
    found = {name: history.series(f"control/{name}", "copies") for name in ("facts", "slow")}
    return {name: dict(zip(one.steps.tolist(), one.values.tolist(), strict=True)) for name, one in found.items()}


def test_every_state_in_which_a_controller_decides_has_its_segment(whole: Path, controlled: Path) -> None:
    found = segments(whole, controlled)
    assert [(one.step, sorted(one.decisions)) for one in found] == [
        (0, ["facts", "slow"]),
        (3, ["facts"]),
        (4, ["slow"]),
        (6, ["facts"]),
        (8, ["slow"]),
        (9, ["facts"]),
    ]
    for one in found:
        assert len(one.rows) == sum(state.number for state in one.decisions.values())
        assert one.rows.schema.names == SEGMENTS.names
    assert {state.number for one in found for state in one.decisions.values()} > {1}, "a rule that never changed its number shows nothing"


def test_segments_made_offline_from_the_recorded_probe_values_are_identical(whole: Path, controlled: Path) -> None:
    recorded = pq.read_table(whole / "probes.parquet").cast(PROBES)
    chain = Chain(Manifest.open(controlled))
    while not chain.is_complete:
        (values,) = recorded_answers(recorded, chain.loops.values(), chain.next_step) or [{}]
        segment = chain.decide(values)
        assert segment.encode() == segment_path(whole, segment.number).read_bytes()
        chain.add(segment)
    assert len(chain.segments) == len(files(whole))


def test_another_probe_value_gives_another_segment(whole: Path, controlled: Path) -> None:
    chain = Chain(Manifest.open(controlled))
    chain.add(chain.decide({}))
    recorded = pq.read_table(whole / "probes.parquet").cast(PROBES)
    (values,) = recorded_answers(recorded, chain.loops.values(), 3)
    louder = {"facts": dict.fromkeys(values["facts"], 0.0)}
    assert chain.decide(values).decisions["facts"].number == 2
    assert chain.decide(louder).decisions["facts"].number == 1


def test_what_was_handed_out_is_what_the_model_was_fed(whole: Path, controlled: Path) -> None:
    manifest = Manifest.open(controlled)
    bank = {row["item"]: row["payload"] for row in manifest.bank().to_pylist() if row["experiment"] == "facts"}
    reserve = {(row["slot"], row["offset"]) for row in manifest.reserve().to_pylist()}
    rows = [row for one in segments(whole, controlled) for row in one.rows.to_pylist()]
    assert {(row["slot"], row["offset"]) for row in rows} <= reserve
    assert len({row["insertion_id"] for row in rows}) == len(rows)
    mine = [row for row in rows if row["experiment"] == "facts"]
    handed = sorted((row["control_step"], row["repetition"], row["item"]) for row in mine)
    assert sorted(row["item"] for row in mine) == sorted(list(bank)[i % len(bank)] for i in range(len(mine)))
    assert handed and all(row["payload"] == bank[row["item"]] for row in mine)


def test_metrics_count_what_was_handed_out_so_far(whole: Path, controlled: Path) -> None:
    rows = pa.concat_tables([one.rows for one in segments(whole, controlled)]).to_pylist()
    lines = [line for line in metrics(whole) if "loss" in line]
    for line in lines:
        expected = sum(row["length"] for row in rows if row["experiment"] == "facts" and row["step"] < line["step"])
        assert line["modified_tokens"]["facts"] == expected
    assert lines[-1]["modified_tokens"]["canaries"] > 0
    decided = [line["control/facts"]["copies"] for line in metrics(whole) if "control/facts" in line]
    assert decided == [one.decisions["facts"].number for one in segments(whole, controlled) if "facts" in one.decisions]


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_stopped_control_run_goes_on_bitwise_as_if_never_stopped(controlled: Path, whole: Path, run: Path, stop_at: int) -> None:
    assert train(controlled, run, stop_at=stop_at) == REQUEUE
    assert train(controlled, run) == FINISHED
    assert_same_run(run, whole)


def test_segments_after_the_checkpoint_stay_and_win_over_probes_asked_again(
    controlled: Path, whole: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(controlled, run, stop_at=7)
    shutil.rmtree(checkpoint_path(run, 7))  # killed: the last checkpoint is that of state 4, the last decision that of state 6
    monkeypatch.setattr(control.ControlHook, "_decided", wrong_before(control.ControlHook._decided, 8))
    assert train(controlled, run) == FINISHED
    assert_same_run(run, whole)


def wrong_before(decide, step):
    def decided(hook, run):
        assert run.step >= step, "a decision that was recorded is made again"
        return decide(hook, run)

    return decided


def test_a_run_whose_checkpoints_are_gone_repeats_its_recorded_decisions(controlled: Path, whole: Path, run: Path) -> None:
    train(controlled, run, stop_at=7)
    shutil.rmtree(run / "checkpoints")
    assert train(controlled, run) == FINISHED
    assert_same_run(run, whole)


def test_a_run_resumed_elsewhere_from_state_0_asks_its_probes_once(data: Path, run: Path, tmp_path: Path) -> None:
    manifest = make_manifest(data, "manifest-kept-0", experiments=CONTROLLED[:1], training={"checkpoint": {"keep": [0]}})
    assert train(manifest, tmp_path / "first", stop_at=1) == REQUEUE
    assert train(manifest, run, resume=str(checkpoint_path(tmp_path / "first", 0)), stop_at=1) == REQUEUE
    rows = [pq.read_table(found / "probes.parquet").num_rows for found in (tmp_path / "first", run)]
    assert rows[0] == rows[1] > 0


def test_segments_that_a_checkpoint_covers_are_written_again_where_they_are_gone(controlled: Path, whole: Path, run: Path) -> None:
    assert train(controlled, run, resume=str(checkpoint_path(whole, 8))) == FINISHED
    assert files(run) == files(whole)
    assert weights(run) == weights(whole)
    assert answers(run) == answers(whole)
    assert ["steps 0 to 7 are in the directory" in finding.problem for finding in verify(run)] == [True]


def test_a_checkpoint_that_was_moved_without_its_answers_is_resumed_with_a_warning_and_the_run_is_sound(
    controlled: Path, whole: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = checkpoint_path(run.parent / "elsewhere", 8)
    shutil.copytree(checkpoint_path(whole, 8), moved)
    assert train(controlled, run, resume=str(moved), stop_at=9) == REQUEUE
    assert "has no answers of the live probes up to step 8" in caplog.text
    findings = verify(run)
    assert is_sound(findings) and sum("no answers of state" in finding.problem for finding in findings) == 4


def test_segments_of_another_run_and_changed_ones_are_refused(controlled: Path, whole: Path, run: Path) -> None:
    train(controlled, run, stop_at=5)
    third = segment_path(run, 2)
    before = third.read_bytes()
    third.write_bytes(before[: len(before) // 2] + b"x" + before[len(before) // 2 + 1 :])
    with pytest.raises(UserError, match=r"0002.parquet: .*Restore it from a copy"):
        train(controlled, run)
    third.write_bytes(before)
    segment_path(run, 1).rename(run / "aside")
    with pytest.raises(UserError, match=r"0001.parquet is missing before it"):
        train(controlled, run)
    (run / "aside").rename(segment_path(run, 1))
    other = {name: state for name, state in segments(run, controlled)[0].decisions.items()}
    chain = Chain(Manifest.open(controlled))
    changed = chain.made_of({name: type(state)(**{**vars(state), "number": 2}) for name, state in other.items()})
    for path in sorted((run / DIRECTORY).iterdir())[1:]:
        path.unlink()
    segment_path(run, 0).write_bytes(changed.encode())
    with pytest.raises(UserError, match="not the decision that the checkpoint of step 5 was trained with"):
        train(controlled, run)


def test_a_masked_controller_and_a_twin_decide_and_insert_nothing(controlled: Path, whole: Path, run: Path) -> None:
    assert train(controlled, run, masked=["facts"]) == FINISHED
    assert {name for one in segments(run, controlled) for name in one.decisions} == {"slow"}
    assert "facts" not in [line for line in metrics(run) if "loss" in line][-1]["modified_tokens"]
    shutil.rmtree(run)
    assert train(controlled, run, baseline=True) == FINISHED
    assert not (run / DIRECTORY).exists()
    assert {key[1] for key in answers(run)} >= {"facts", "slow"}


def test_the_feed_reads_no_slot_past_the_frontier() -> None:
    class Watched:
        geometry = Geometry(sequence_length=4, global_batch_size=2, steps=6)

        def __init__(self, decided: Decided):
            self.decided, self.slots = decided, []

        def read(self, slot: int):
            list(self.decided.of(slot))  # raises past the frontier
            self.slots.append(slot)
            return np.zeros(5, np.int32), np.ones(4, np.uint8)

        def noise(self, slot: int) -> list:
            return []

    class Contents(Watched):
        def read(self, slot: int):
            from megatron_exp.stream.slot import Slot

            return Slot(*super().read(slot))

    decided = Decided(Watched.geometry, 2)
    stream = Contents(decided)
    feed = Feed(stream, [range(2)], 10, [], frontier=lambda: decided.frontier)  # type: ignore[arg-type]
    for step in range(6):
        if step == decided.frontier:
            assert max(stream.slots) < step * 2, "nothing is read before it is decided"
            decided.add(SEGMENTS.empty_table(), step + 2)
        assert feed.batch(step).step == step
    feed.close()
    assert sorted(stream.slots) == list(range(12))
    with pytest.raises(RuntimeError, match="nothing is decided from step 0 on"):
        decided_nothing = Decided(Watched.geometry, 0)
        decided_nothing.of(1)


def kill_in(manifest: Path, run: Path, step: int) -> None:
    with training(manifest=manifest, run_dir=run) as process:
        wait_for_step(run, step, process)
        process.kill()


def test_a_control_run_killed_between_segment_and_checkpoint_ends_bitwise_as_the_one_that_was_not(
    controlled: Path, whole: Path, run: Path
) -> None:
    kill_in(controlled, run, 7)  # decided in 6, checkpoints in 4 and 8
    assert len(files(run)) >= 4
    with training(manifest=controlled, run_dir=run) as process:
        process.join(100)
        assert process.exitcode == 0
    assert_same_run(run, whole)


def test_two_tensor_ranks_agree_on_every_decision(controlled: Path, whole: Path, run: Path) -> None:
    assert train_together(2, manifest=controlled, run_dir=run, overrides=["training.parallel.tp=2"]) == [0, 0]
    found, expected = segments(run, controlled), segments(whole, controlled)
    assert [one.rows.select(["insertion_id", "slot", "offset"]).to_pylist() for one in found] == [
        one.rows.select(["insertion_id", "slot", "offset"]).to_pylist() for one in expected
    ]
    assert step_hashes(run) == step_hashes(whole)


def test_the_batch_size_of_the_toy_is_what_these_numbers_assume() -> None:
    assert (STEPS, BATCH) == (12, 4)
