import shutil

import orjson
import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint, read_extra
from megatron_exp.errors import UserError
from megatron_exp.model.norm import RMSNorm
from megatron_exp.model.scoring import token_scores
from tests.model.tiny import VOCABULARY, running, same_weights, tiny_model, tokens_of, train, trainable


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


@pytest.mark.parametrize("is_portable", [True, False], ids=["portable", "parallel"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise_the_uninterrupted_run(layout, tmp_path, precision, is_portable):
    whole = trainable(layout, precision)
    train(*whole, range(3))
    save_checkpoint(tmp_path / "step-00000003", *whole, {"step": 3, "note": "here"}, is_portable=is_portable)
    expected = train(*whole, range(3, 7))

    resumed = trainable(layout, precision, seed=1)
    assert load_checkpoint(tmp_path / "step-00000003", *resumed) == {"step": 3, "note": "here"}
    assert train(*resumed, range(3, 7)) == expected
    assert same_weights(whole[0], resumed[0])


def test_state_zero_can_be_saved_and_resumed(layout, tmp_path):
    whole = trainable(layout)
    save_checkpoint(tmp_path / "step-00000000", *whole, {})
    expected = train(*whole, range(2))
    resumed = trainable(layout, seed=1)
    load_checkpoint(tmp_path / "step-00000000", *resumed)
    assert train(*resumed, range(2)) == expected


def test_saving_changes_nothing_and_a_loaded_optimizer_can_load_again(layout, tmp_path):
    saved, unsaved = trainable(layout), trainable(layout)
    for step in range(3):
        assert train(*saved, [step]) == train(*unsaved, [step])
        save_checkpoint(tmp_path / f"step-{step + 1:08d}", *saved, {})
    load_checkpoint(tmp_path / "step-00000001", *saved)
    train(*saved, [1, 2])
    assert same_weights(*(pair[0] for pair in (saved, unsaved)))


def test_weights_alone_are_loaded_for_scoring(layout, tmp_path):
    model, optimizer = trainable(layout)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "full", model, optimizer, {})
    save_checkpoint(tmp_path / "parallel", model, optimizer, {}, is_portable=False)
    save_checkpoint(tmp_path / "light", model, None, {})
    expected = token_scores(model, tokens_of(5)).losses
    for name in ("full", "parallel", "light"):
        reader = tiny_model(layout, seed=1)
        load_checkpoint(tmp_path / name, reader, None)
        assert torch.equal(token_scores(reader, tokens_of(5)).losses, expected)
    with pytest.raises(UserError, match="weights only"):
        load_checkpoint(tmp_path / "light", *trainable(layout))


def test_a_checkpoint_of_another_model_is_refused_with_the_numbers(layout, tmp_path):
    save_checkpoint(tmp_path / "one", tiny_model(layout), None, {})
    with pytest.raises(UserError, match=r"layers 2 \(here 3\)"):
        load_checkpoint(tmp_path / "one", tiny_model(layout, layers=3), None)


def test_a_damaged_checkpoint_is_refused_and_the_model_left_alone(layout, tmp_path):
    model = tiny_model(layout)
    save_checkpoint(tmp_path / "one", model, None, {})
    shard = tmp_path / "one" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    other = tiny_model(layout, seed=1)
    with pytest.raises(UserError, match="__0_0.distcp is damaged"):
        load_checkpoint(tmp_path / "one", other, None)
    assert same_weights(other, tiny_model(layout, seed=1))


def test_a_checkpoint_never_overwrites_one(layout, tmp_path):
    model = tiny_model(layout)
    save_checkpoint(tmp_path / "one", model, None, {"step": 1})
    with pytest.raises(UserError, match="already exists"):
        save_checkpoint(tmp_path / "one", model, None, {"step": 2})
    assert read_extra(tmp_path / "one") == {"step": 1}
    assert catalogue.verify_checkpoint(tmp_path / "one") == []


def test_a_failed_save_leaves_nothing_behind(layout, tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "one", tiny_model(layout), None, {"step": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_parallel_checkpoint_has_the_same_bytes_every_time(layout, tmp_path):
    """The gaps between parameters of a bucket must not hold what happened to be in memory."""
    for name in ("one", "other"):
        whole = trainable(layout, layers=1, hidden=24, ffn=20)
        train(*whole, range(2))
        save_checkpoint(tmp_path / name, *whole, {}, is_portable=False)
    assert (tmp_path / "one" / "__0_0.distcp").read_bytes() == (tmp_path / "other" / "__0_0.distcp").read_bytes()


def test_a_parallel_checkpoint_of_another_division_is_refused_and_a_portable_one_named(layout, tmp_path):
    whole = trainable(layout)
    portable, parallel = (catalogue.checkpoint_path(tmp_path, step) for step in (1, 2))
    save_checkpoint(portable, *whole, {})
    save_checkpoint(parallel, *whole, {}, is_portable=False)
    record = orjson.loads((parallel / "checkpoint.json").read_bytes())
    record["division"] |= {"virtual": 2, "buckets": "another"}
    (parallel / "checkpoint.json").write_bytes(orjson.dumps(record))
    told = r"at tp 1, pp 1, virtual 2 and loads only there.*here are tp 1, pp 1, virtual 1.*can load is .*step-00000001: .*moved step-00000002 out of"
    with pytest.raises(UserError, match=told):
        load_checkpoint(parallel, *trainable(layout), is_checked=True)
    load_checkpoint(parallel, tiny_model(layout), None, is_checked=True)
    shutil.rmtree(portable)
    with pytest.raises(UserError, match="has none that any layout can load. Use the old layout: a stop by SIGTERM"):
        load_checkpoint(parallel, *trainable(layout), is_checked=True)


@pytest.mark.parametrize("with_state_first", [True, False])
def test_a_checkpoint_loads_into_layers_that_write_a_state_of_their_own_and_into_layers_that_write_none(
    layout, tmp_path, monkeypatch, with_state_first
):
    """Transformer Engine's norms write an empty one and its linear layers their history of FP8: weights and a run go from them to PyTorch's, and back."""
    states = {RMSNorm: torch.empty(0, dtype=torch.uint8)} | dict.fromkeys((ColumnParallelLinear, RowParallelLinear), torch.arange(8).byte())
    saved, into = tmp_path / "saved", []
    for has_state in (with_state_first, not with_state_first):
        with monkeypatch.context() as patch:
            for kind, state in states.items() if has_state else ():
                # The head is never Transformer Engine's.
                patch.setattr(kind, "get_extra_state", lambda one, state=state: None if one.weight.shape[0] == VOCABULARY else state, raising=False)
                patch.setattr(kind, "set_extra_state", lambda layer, state: None, raising=False)
            if not into:
                model, optimizer = trainable(layout)
                train(model, optimizer, [0])
                save_checkpoint(saved, model, optimizer, {})
                into.append(model)
            else:
                weights_alone = tiny_model(layout, seed=1)
                load_checkpoint(saved, weights_alone, None)
                resumed = trainable(layout, seed=1)
                load_checkpoint(saved, *resumed)
                assert same_weights(into[0], weights_alone) and same_weights(into[0], resumed[0])


@pytest.mark.parametrize(("name", "changed"), [("step", lambda step: step + 1), ("first_moment_norm", lambda norm: norm * (1 + 1e-7))])
def test_an_optimizer_that_is_not_the_one_saved_is_noticed_when_it_is_loaded(layout, tmp_path, name, changed):
    whole = trainable(layout)
    train(*whole, range(2))
    save_checkpoint(tmp_path / "one", *whole, {})
    record = orjson.loads((tmp_path / "one" / "checkpoint.json").read_bytes())
    record["optimizer"][name] = changed(record["optimizer"][name])
    (tmp_path / "one" / "checkpoint.json").write_bytes(orjson.dumps(record))
    with pytest.raises(RuntimeError, match="is not the one saved"):
        load_checkpoint(tmp_path / "one", *trainable(layout), is_checked=True)
