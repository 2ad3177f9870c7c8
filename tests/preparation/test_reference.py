"""Planning with a reference model: what waits for it, what it changes, and that its answers are asked for once."""

import shutil

import numpy as np
import pyarrow.compute as pc
import pytest

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reference_answers import ANSWERS_NAME, read_answers, write_answers
from megatron_exp.preparation import reference as references
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.reference import Reference
from megatron_exp.shards.corpus import Corpus
from tests.preparation.fake_reference import FakeModel, identity
from tests.training import toy

CANARIES, FORGETTING, WATERMARKS = toy.EXPERIMENTS
ASKING = {"name": "asking", "type": "tests.preparation.asking"}
LISTED = [CANARIES, ASKING, WATERMARKS]
"""The one that needs a reference stands between the others."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """Planned without a reference."""
    return plan(toy.make_config(corpus, experiments=LISTED), tmp_path_factory.mktemp("first") / "manifest")


def asked(corpus, model=None, **changes):
    return Reference(identity(Corpus.open(corpus), **changes), model or FakeModel())


@pytest.fixture(scope="module")
def second(corpus, first, tmp_path_factory):
    return plan(toy.make_config(corpus, experiments=LISTED), tmp_path_factory.mktemp("second") / "manifest", first, reference=asked(corpus))


def rows_of(table, names):
    return table.filter(pc.is_in(table["experiment"].cast("string"), value_set=pc.cast(names, "string")))


def test_without_a_reference_the_experiment_waits_and_the_twin_keeps_the_states_it_will_ask_about(first):
    assert first.record["waiting_for_reference"] == ["asking"] and first.record["reference"] is None
    assert first.experiments == ["canaries", "watermarks"]
    assert toy.STEPS // 2 in first.keep_steps


def test_what_waits_takes_nothing_from_the_others(corpus, first, tmp_path):
    alone = plan(toy.make_config(corpus, experiments=[CANARIES, WATERMARKS]), tmp_path / "alone")
    for name in ("items", "insertions", "probes", "payloads"):
        assert alone.record["fingerprints"][name] == first.record["fingerprints"][name]


def test_the_second_plan_holds_the_rows_of_the_first_unchanged(first, second):
    for name in ("insertions", "items"):
        kept = rows_of(getattr(second, name)(), first.experiments)
        assert fingerprint.of_table(kept) == first.record["fingerprints"][name]
    assert second.experiments == ["canaries", "watermarks", "asking"] and second.record["extends"] == first.fingerprint
    assert len(rows_of(second.insertions(), ["asking"])) == 2 and second.record["waiting_for_reference"] == []
    assert verify(second.path) == []


def test_the_manifest_says_which_model_was_asked_and_keeps_its_answers(second):
    told = second.record["reference"]
    assert (told["fingerprint"], told["state"], told["relation"], told["differences"]) == ("f" * 32, 12, "twin", [])
    assert (second.path / ANSWERS_NAME).is_file()
    assert not second.path.with_name("manifest.reference").exists()


def test_the_recorded_answers_give_the_same_plan_without_a_model(corpus, first, second, tmp_path):
    config = toy.make_config(corpus, experiments=LISTED)
    again = plan(config, tmp_path / "again", first, reference=Reference.recorded_in(second.path / ANSWERS_NAME))
    assert again.record["fingerprints"] == second.record["fingerprints"] and again.record["reference"] == second.record["reference"]


def test_verify_notices_other_answers(second, tmp_path):
    copy = shutil.copytree(second.path, tmp_path / "copy")
    answers, told, _ = read_answers(copy / ANSWERS_NAME)
    name = min(answers)
    write_answers(copy, answers | {name: (answers[name][0], answers[name][1] + 1)}, told)
    assert [finding.place for finding in verify(copy)] == [ANSWERS_NAME]


def test_recorded_answers_do_not_answer_other_questions(corpus, second, tmp_path):
    config = toy.make_config(corpus, experiments=[CANARIES, {**ASKING, "num_tokens": 13}])
    with pytest.raises(UserError, match="4 questions to the reference have no recorded answer"):
        plan(config, tmp_path / "again", reference=Reference.recorded_in(second.path / ANSWERS_NAME))


def test_a_killed_plan_asks_only_what_is_not_answered_yet(corpus, first, second, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_QUESTIONS_AT_ONCE", 1)
    config = toy.make_config(corpus, experiments=LISTED)
    with pytest.raises(RuntimeError, match="killed"):
        plan(config, tmp_path / "m", first, reference=asked(corpus, FakeModel(fails_after=3)))
    model = FakeModel()
    done = plan(config, tmp_path / "m", first, reference=asked(corpus, model))
    assert model.asked == 1 and done.record["reference"]["answers"] == second.record["reference"]["answers"]
    assert done.fingerprint == second.fingerprint


def test_answers_of_another_reference_are_not_mixed_in(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_QUESTIONS_AT_ONCE", 1)
    config = toy.make_config(corpus, experiments=LISTED)
    with pytest.raises(RuntimeError, match="killed"):
        plan(config, tmp_path / "m", reference=asked(corpus, FakeModel(fails_after=1)))
    with pytest.raises(UserError, match="answers of another reference"):
        plan(config, tmp_path / "m", reference=asked(corpus, fingerprint="0" * 32))


def test_a_reference_of_another_tokenizer_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="another tokenizer"):
        plan(toy.make_config(corpus, experiments=LISTED), tmp_path / "m", reference=asked(corpus, tokenizer="0" * 32))
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_not_finite_are_refused(corpus, tmp_path):
    class Broken(FakeModel):
        def least_likely(self, prompts, num_tokens):
            return np.full((len(prompts), num_tokens), -1)

    with pytest.raises(UserError, match="not finite"):
        plan(toy.make_config(corpus, experiments=LISTED), tmp_path / "m", reference=asked(corpus, Broken()))


def test_a_third_plan_keeps_the_ranks_of_the_second(corpus, second, tmp_path):
    config = toy.make_config(corpus, experiments=[*LISTED, {**CANARIES, "name": "more"}])
    third = plan(config, tmp_path / "third", second, reference=Reference.recorded_in(second.path / ANSWERS_NAME))
    assert third.experiments == ["canaries", "watermarks", "asking", "more"]
    assert fingerprint.of_table(rows_of(third.insertions(), second.experiments)) == second.record["fingerprints"]["insertions"]
