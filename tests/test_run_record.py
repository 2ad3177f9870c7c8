"""A run's history: attempts that were cut off, torn lines, damage."""

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.run_record import RunRecord, Series, read_history


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else orjson.dumps(line) + b"\n" for line in lines))
    return path


def losses(attempt, *steps):
    return [{"step": step, "attempt": attempt, "loss": 10.0 * attempt + step} for step in steps]


def test_an_attempt_that_resumes_makes_all_later_lines_of_earlier_ones_void(tmp_path):
    validation = {"step": 4, "attempt": 1, "validation_loss": 1.0}
    path = write(tmp_path / "metrics.jsonl", *losses(1, 1, 2, 3, 4, 5), validation, *losses(2, 3, 4))
    history = read_history(path)
    loss = history.series("loss")
    assert loss.steps.tolist() == [1, 2, 3, 4]
    assert loss.values.tolist() == [11, 12, 23, 24]
    assert (history.last_step, history.num_attempts) == (4, 2)
    assert len(history.series("validation_loss")) == 0


def test_a_torn_last_line_is_normal_and_any_other_damage_names_its_line(tmp_path):
    assert read_history(write(tmp_path / "torn.jsonl", *losses(1, 1, 2), b'{"step": 3, "at')).last_step == 2
    with pytest.raises(UserError, match="line 2"):
        read_history(write(tmp_path / "damaged.jsonl", *losses(1, 1), b"{broken\n", *losses(1, 3)))


def test_series_may_lie_inside_an_object_and_skip_states(tmp_path):
    history = read_history(
        write(tmp_path / "m.jsonl", {"step": 1, "attempt": 1, "loss": None}, {"step": 2, "attempt": 1, "norms": {"hidden": 3}})
    )
    assert history.series("norms", "hidden").steps.tolist() == [2]
    assert len(history.series("loss")) == 0
    assert history.names("norms") == ["hidden"]


def test_a_difference_uses_the_states_both_have(tmp_path):
    first, second = (
        read_history(write(tmp_path / f"{n}.jsonl", *losses(n, *steps))).series("loss") for n, steps in ((1, (1, 2, 3)), (2, (2, 3, 4)))
    )
    difference: Series = second.minus(first)
    assert difference.steps.tolist() == [2, 3]
    assert difference.values.tolist() == [10.0, 10.0]


def test_a_directory_without_a_record_or_with_a_newer_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        RunRecord.open(tmp_path)
    (tmp_path / "run.json").write_bytes(b'{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        RunRecord.open(tmp_path)
