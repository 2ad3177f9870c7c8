"""Runs that begin with the weights of another one."""

from pathlib import Path

import orjson
import pytest
import torch

from megatron_exp.checkpoint.catalogue import checkpoint_path, read_record
from megatron_exp.checkpoint.convert import from_huggingface, to_huggingface
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.errors import UserError
from megatron_exp.evaluation.subjects import open_reference, open_run
from megatron_exp.run_record import RunRecord
from megatron_exp.training.origin import Origin, load_origin
from megatron_exp.training.train import FINISHED, REQUEUE, train
from tests.model.tiny import randomize, running, tiny_model
from tests.model.tiny import weights as exact_weights
from tests.training.compare import losses, weights
from tests.training.toy import STEPS

KEPT = ["training.checkpoint.keep=[0]"]


@pytest.fixture(scope="module")
def continued(manifest: Path, whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest trained once more, from the end of the whole run."""
    run = tmp_path_factory.mktemp("continued") / "run"
    assert train(manifest, run, begin_from=whole_run, overrides=KEPT) == FINISHED
    return run


def test_a_run_begins_at_step_0_with_weights_and_moments_of_the_other(whole_run: Path, continued: Path) -> None:
    assert weights(continued, 0) == weights(whole_run)
    assert [read_record(checkpoint_path(continued, state))["optimizer"]["step"] for state in (0, STEPS)] == [STEPS, 2 * STEPS]
    assert losses(continued)[0] < losses(whole_run)[0] - 0.3, "it goes on from what was learned"
    record = RunRecord.open(continued).record["from"]
    assert (record["path"], record["step"]) == (str(checkpoint_path(whole_run, STEPS).resolve()), STEPS)


def test_it_is_resumed_bitwise_with_or_without_saying_from_again(manifest: Path, whole_run: Path, continued: Path, run: Path) -> None:
    origin = checkpoint_path(whole_run, STEPS)
    assert train(manifest, run, begin_from=origin, overrides=KEPT, stop_at=5) == REQUEUE
    assert train(manifest, run, overrides=KEPT, stop_at=8) == REQUEUE
    with pytest.raises(UserError, match="was begun from .*cannot go on from .*step-00000008"):
        train(manifest, run, begin_from=checkpoint_path(whole_run, 8))
    assert train(manifest, run, begin_from=origin, overrides=KEPT) == FINISHED
    assert weights(run) == weights(continued)


def test_a_run_begun_from_nothing_cannot_be_begun_from_something_later(manifest: Path, whole_run: Path) -> None:
    with pytest.raises(UserError, match="was begun without --from"):
        train(manifest, whole_run, begin_from=checkpoint_path(whole_run, 8))


def test_a_converted_model_gives_its_weights_to_a_fresh_optimizer(manifest: Path, whole_run: Path, run: Path, tmp_path: Path) -> None:
    to_huggingface(whole_run, tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "converted")
    assert train(manifest, run, begin_from=tmp_path / "converted", overrides=KEPT, stop_at=1) == REQUEUE
    assert read_record(checkpoint_path(run, 1))["optimizer"]["step"] == 1
    assert RunRecord.open(run).history().series("loss").values[0] < losses(whole_run)[0] - 0.3


def test_16_bit_training_begins_with_the_fp32_weights_that_were_stored_and_not_with_rounded_ones(tmp_path: Path) -> None:
    with running() as layout:
        source = tiny_model(layout)
        randomize(source)
        save_checkpoint(tmp_path / "fp32", source, None, {})
        origin = Origin("", str(tmp_path / "fp32"), "", 0, has_optimizer=False)
        model = tiny_model(layout, "bf16", seed=1)
        optimizer = load_origin(origin, model, OptimizerConfig())
        (part,) = optimizer._megatron.chained_optimizers
        stored = dict(source.chunks[0].named_parameters())
        for name, parameter in model.chunks[0].named_parameters():
            group, place = part.model_param_group_index_map[parameter]
            assert torch.equal(part.optimizer.param_groups[group]["params"][place], stored[name].flatten())
        assert all(torch.equal(mine, stored.bfloat16()) for mine, stored in zip(exact_weights(model), exact_weights(source), strict=True))


def test_another_shape_or_tokenizer_is_refused_before_anything_is_written(
    manifest: Path, whole_run: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"checkpoint of another model: hidden 32 \(here 64\)"):
        train(manifest, run, begin_from=whole_run, overrides=["model.hidden=64"])
    monkeypatch.setattr("megatron_exp.shards.corpus.Corpus.tokenizer_fingerprint", "0123456789abcdef")
    with pytest.raises(UserError, match="another tokenizer"):
        train(manifest, run, begin_from=whole_run)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        train(manifest, run, begin_from=tmp_path)
    assert not run.exists()


def test_a_run_is_no_twin_of_one_that_began_with_other_weights(whole_run: Path, continued: Path) -> None:
    subject, _ = open_run(continued)
    assert "model or initialisation" in open_reference(subject, whole_run).differences


def test_the_checkpoint_says_the_rate_that_a_continuation_may_keep(whole_run: Path) -> None:
    record = orjson.loads((checkpoint_path(whole_run, STEPS) / "checkpoint.json").read_bytes())
    assert 0 < record["extra"]["learning_rate"] <= 1e-2
