import pytest
import torch

from megatron_exp.config.schema import OptimizerConfig, ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.model.build import build_model
from megatron_exp.model.optimizer import build_optimizer
from megatron_exp.model.scoring import embedding_gradients, next_token_logits, token_scores
from megatron_exp.model.step import MicroBatch, micro_batch_rows, train_step
from megatron_exp.parallel.layout import Layout
from tests.model.tiny import (
    LENGTH,
    ROWS,
    VOCABULARY,
    mask_of,
    running,
    same_weights,
    tiny_model,
    tiny_shape,
    tokens_of,
    train,
    trainable,
    weights,
)


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


def test_two_runs_are_bitwise_equal_and_learn(layout):
    first, second = trainable(layout), trainable(layout)
    one, other = train(*first, [0] * 8), train(*second, [0] * 8)
    assert one == other
    assert same_weights(first[0], second[0])
    assert one[-1].loss < one[0].loss - 1


def test_another_seed_gives_other_weights(layout):
    assert not same_weights(tiny_model(layout, seed=0), tiny_model(layout, seed=1))


def test_the_loss_is_the_mean_over_the_unmasked_tokens_of_the_global_batch(layout):
    model, optimizer = trainable(layout)
    losses = token_scores(model, tokens_of(0)).losses
    mask = mask_of(0)
    assert len(set(mask.sum(1).tolist())) > 1
    result = train(model, optimizer, [0], micro_batch_size=1)[0]
    assert result.num_tokens == int(mask.sum())
    assert result.loss == pytest.approx(float((losses * mask).sum() / mask.sum()), abs=1e-5)


def test_the_size_of_micro_batches_changes_rounding_only(layout):
    whole, single = trainable(layout), trainable(layout)
    for one, other in zip(train(*whole, range(4), ROWS), train(*single, range(4), 1), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_masked_positions_teach_nothing(layout):
    tokens, mask = tokens_of(0), torch.ones((ROWS, LENGTH), dtype=torch.uint8)
    mask[1] = 0
    kept = [0, 2, 3]
    masked, shorter = trainable(layout), trainable(layout)
    for (model, optimizer), rows in ((masked, slice(None)), (shorter, kept)):
        optimizer.set_learning_rate(1e-3)
        train_step(model, optimizer, [MicroBatch(tokens[rows], mask[rows])])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(masked[0]), weights(shorter[0]), strict=True))


def test_one_update_is_that_of_adamw_with_no_decay_on_the_embedding(layout):
    rate, decay = 1e-3, 0.5
    model = tiny_model(layout)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=decay, clip=0.0))
    before = dict(zip([name for name, _ in model.chunks[0].named_parameters()], weights(model), strict=True))
    optimizer.set_learning_rate(rate)
    train_step(model, optimizer, [MicroBatch(tokens_of(0), mask_of(0))])
    unseen = sorted(set(range(VOCABULARY)) - set(tokens_of(0)[:, :-1].flatten().tolist()))
    after = dict(model.chunks[0].named_parameters())
    embedding = "embedding.word_embeddings.weight"
    assert torch.equal(after[embedding][unseen], before[embedding][unseen])
    norm = "decoder.final_layernorm.weight"  # the first step of Adam moves by the rate in the direction of the sign
    assert torch.allclose((after[norm] - (1 - rate * decay) * before[norm]).abs(), torch.tensor(rate), rtol=1e-3)


def test_gradients_are_clipped_to_the_norm_asked_for(layout):
    model = tiny_model(layout)
    optimizer = build_optimizer(model, OptimizerConfig(clip=1e-3, beta1=0.0))
    optimizer.set_learning_rate(0.0)
    result = train_step(model, optimizer, [MicroBatch(tokens_of(0), mask_of(0))])
    assert result.grad_norm > 0.1
    assert optimizer.summary().first_moment_norm == pytest.approx(1e-3, rel=1e-3)


def test_scoring_between_updates_changes_no_weight(layout):
    scored, unscored = trainable(layout), trainable(layout)
    for step in range(4):
        assert train(*scored, [step]) == train(*unscored, [step])
        token_scores(scored[0], tokens_of(9))
        embedding_gradients(scored[0], tokens_of(9), mask_of(9))
        next_token_logits(scored[0], tokens_of(9), torch.arange(ROWS))
    assert same_weights(scored[0], unscored[0])


def test_next_logits_are_those_of_each_ragged_prompt_by_itself(layout):
    model = tiny_model(layout)
    tokens, positions = tokens_of(0)[:, :10], torch.tensor([0, 4, 9, 2])
    made = next_token_logits(model, tokens, positions)
    for row, position in enumerate(positions.tolist()):
        alone = model.chunks[0](tokens[row : row + 1, : position + 1], None, None)[0, -1]
        assert torch.allclose(made[row], alone, atol=1e-6)


def test_next_logits_ignore_what_stands_to_the_right(layout):
    model = tiny_model(layout)
    tokens = tokens_of(0)[:, :10]
    positions = torch.tensor([0, 4, 9, 2])
    changed = tokens.clone()
    changed[:, -1] = torch.where(positions == 9, tokens[:, -1], 1)
    assert torch.equal(next_token_logits(model, tokens, positions), next_token_logits(model, changed, positions))


def test_embedding_gradients_are_those_of_an_ordinary_backward_pass(layout):
    model, optimizer = trainable(layout)
    train(model, optimizer, [0] * 4)
    tokens, mask = tokens_of(1), mask_of(1)
    embedded = []
    handle = model.chunks[0].embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    losses = model.chunks[0](tokens[:, :-1], None, None, labels=tokens[:, 1:])[..., 0]
    handle.remove()
    expected = torch.autograd.grad((losses * mask).sum(), embedded[0])[0].transpose(0, 1)
    assert expected.norm() > 1
    assert torch.allclose(embedding_gradients(model, tokens, mask), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_16_bit_weights_train(layout):
    model, optimizer = trainable(layout, "bf16")
    results = train(model, optimizer, [0] * 8)
    assert weights(model)[0].dtype == torch.bfloat16
    assert results[-1].loss < results[0].loss - 1


def layout_of(**numbers: int) -> Layout:
    places = dict.fromkeys(["rank", "tp_rank", "pp_rank", "cp_rank", "dp_rank"], 0)
    sizes = dict.fromkeys(["world_size", "tp_size", "pp_size", "cp_size", "dp_size"], 1)
    return Layout(**{**places, **sizes, **numbers}, device=torch.device("cpu"), sequence_parallel=False, threads=1)


def test_rows_of_all_replicas_are_the_global_batch_in_any_layout():
    for replicas, size in [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)]:
        rows = [
            row for rank in range(replicas) for part in micro_batch_rows(layout_of(dp_rank=rank, dp_size=replicas), 8, size) for row in part
        ]
        assert sorted(rows) == list(range(8))


def test_a_global_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="micro_batch_size = 3"):
        micro_batch_rows(layout_of(dp_size=2), 8, 3)


def test_interleaved_stages_need_a_multiple_of_micro_batches():
    assert len(micro_batch_rows(layout_of(pp_size=2, virtual_size=2), 8, 4)) == 2
    with pytest.raises(UserError, match=r"a replica has 1 of them.*multiple of training.parallel.pp"):
        micro_batch_rows(layout_of(pp_size=2, virtual_size=2), 8, 8)


def test_a_layout_that_cannot_divide_the_model_is_refused(layout):
    with pytest.raises(UserError, match=r"kv_groups\) = 4 cannot be divided into 3"):
        build_model(tiny_shape(), layout_of(tp_size=3), "fp32", 0)


def test_fp8_without_transformer_engine_is_refused(layout):
    with pytest.raises(UserError, match="Transformer Engine"):
        build_model(tiny_shape(), layout, "fp8", 0)


def test_more_parallelism_than_processes_is_refused():
    with pytest.raises(UserError, match="1 were started"), running(ParallelConfig(tp=2)):
        pass
