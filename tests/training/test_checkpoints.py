"""When a run writes checkpoints, in which form, and that their room on the disk is looked at."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exp.checkpoint.catalogue import is_portable, list_checkpoints
from megatron_exp.errors import UserError
from megatron_exp.run_record import RunRecord
from megatron_exp.training.train import FINISHED, train
from tests.training.toy import STEPS


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_kept_periodic_portable_and_final_states_are_portable_and_the_rest_is_parallel(
    manifest: Path, run: Path, in_background: str
) -> None:
    settings = {"every": 2, "portable_every": 5, "keep": [3], "in_background": in_background}
    assert train(manifest, run, overrides=[f"training.checkpoint.{name}={value}" for name, value in settings.items()]) == FINISHED
    assert {step: is_portable(path) for step, path in list_checkpoints(run)} == {3: True, 8: False, 10: True, STEPS: True}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the disk have so many bytes free at the first looks, the last number from then on."""
    usage = namedtuple("Usage", "total used free")

    def set_free(*numbers: int) -> None:
        left = list(numbers)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 0, left.pop(0) if len(left) > 1 else left[0]))

    return set_free


def test_a_run_without_room_for_its_checkpoints_is_refused_before_its_first_step(
    manifest: Path, run: Path, free: Callable[..., None]
) -> None:
    free(1 << 20)
    with pytest.raises(UserError, match="needs room for . checkpoints"):
        train(manifest, run)
    assert RunRecord.open(run).history().last_step == 0


def test_a_disk_that_filled_up_since_stops_the_run_before_its_next_checkpoint_and_it_goes_on_when_there_is_room(
    manifest: Path, run: Path, free: Callable[..., None]
) -> None:
    free(1 << 40, 1 << 40, 1 << 20)
    with pytest.raises(UserError, match="step-00000008 takes .* It is not begun"):
        train(manifest, run)
    assert [step for step, _ in list_checkpoints(run)] == [4]
    free(1 << 40)
    assert train(manifest, run) == FINISHED
