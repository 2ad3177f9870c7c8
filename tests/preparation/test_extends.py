"""A manifest that extends another holds its rows unchanged, or is refused with the reason."""

import pyarrow.compute as pc
import pytest

from megatron_exp import fingerprint
from megatron_exp.config.load import validate
from megatron_exp.errors import UserError
from megatron_exp.inspection.verify import verify
from megatron_exp.preparation.plan import plan
from tests.training import toy

CANARIES, FORGETTING, WATERMARKS = toy.EXPERIMENTS
MANY = {**CANARIES, "repetitions": [1, 4], "num_per_condition": 5, "num_held_out": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def older(corpus, tmp_path_factory):
    return plan(toy.make_config(corpus, experiments=[MANY, WATERMARKS]), tmp_path_factory.mktemp("older") / "manifest")


def changed(corpus, **values):
    config = toy.make_config(corpus, experiments=[MANY, WATERMARKS]).model_dump(mode="json")
    return validate({**config, **values}, "test")


def test_all_rows_of_the_older_manifest_are_in_the_new_one(corpus, older, tmp_path):
    config = toy.make_config(corpus, experiments=[MANY, WATERMARKS, {**CANARIES, "name": "more"}])
    new = plan(config, tmp_path / "new", older)
    for name in ("insertions", "items"):
        table = getattr(new, name)()
        kept = table.filter(pc.is_in(table["experiment"].cast("string"), value_set=pc.cast(older.experiments, "string")))
        assert fingerprint.of_table(kept) == older.record["fingerprints"][name]
    assert new.record["extends"] == older.fingerprint
    assert new.experiments == ["canaries", "watermarks", "more"]
    assert verify(new.path) == []


def test_a_plan_that_extends_differs_from_the_same_plan_alone_only_in_saying_so(corpus, older, tmp_path):
    config = toy.make_config(corpus, experiments=[MANY, WATERMARKS, {**CANARIES, "name": "more"}])
    assert plan(config, tmp_path / "new", older).fingerprint == plan(config, tmp_path / "alone").fingerprint


def test_an_exclusive_experiment_that_would_move_rows_is_refused_with_the_rows(corpus, older, tmp_path):
    with pytest.raises(UserError, match=r"insertions would move.*canaries item \d+, copy \d+ from slot \d+ offset \d+ to slot"):
        plan(toy.make_config(corpus, experiments=[MANY, WATERMARKS, FORGETTING]), tmp_path / "new", older)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"geometry": {"sequence_length": 32, "global_batch_size": 4, "steps": 13}}, "geometry.steps is 13, was 12"),
        ({"seeds": {"assignment": 5}}, "seeds.assignment is 5, was 0"),
        ({"pool": {"slots": 25}}, "the order of slots is another"),
        ({"experiments": [WATERMARKS, MANY]}, "experiment canaries, number 1"),
        ({"experiments": [{**MANY, "num_held_out": 5}, WATERMARKS]}, "experiment canaries, number 1"),
        ({"experiments": [MANY, {**WATERMARKS, "enabled": False}]}, "experiment watermarks, number 2"),
        ({"experiments": [MANY]}, "experiment watermarks, number 2"),
        ({"budget": {"unit": "slots", "fraction": 0.9}}, "insertions would move"),
    ],
)
def test_another_frame_or_another_older_experiment_is_refused(corpus, older, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        plan(changed(corpus, **change), tmp_path / "new", older)
