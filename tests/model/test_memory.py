import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_exp.config.schema import ModelConfig
from megatron_exp.model.build import build_model
from megatron_exp.model.memory import (
    OVERHEAD_BYTES,
    TrainingLayout,
    activation_bytes_per_token,
    checkpoint_bytes,
    layer_parameters,
    local_parameters,
    throughput,
    training_memory,
)
from megatron_exp.model.presets import PRESETS, resolve_shape
from tests.model.tiny import running, tiny_shape, tokens_of, trainable

LOCAL = TrainingLayout(precision="fp32", micro_batch_size=4, fused=False)


def test_parameters_are_those_of_the_shape_and_of_the_model():
    for name in PRESETS:
        shape = resolve_shape(ModelConfig(preset=name), 100_278, 4096)
        assert local_parameters(shape, LOCAL) == shape.num_parameters
    with running() as layout:
        model, _ = trainable(layout)
        assert local_parameters(model.shape, LOCAL) == sum(parameter.numel() for parameter in model.chunks[0].parameters())


def test_states_are_as_large_as_the_real_ones():
    with running() as layout:
        model, optimizer = trainable(layout)
        memory = training_memory(model.shape, LOCAL)
        gradients = sum(buffer.grad_data.nbytes for chunk in model.training_chunks for buffer in chunk.buffers)
        moments = sum(values[name].nbytes for _, _, values in optimizer._states() for name in ("exp_avg", "exp_avg_sq"))
    assert memory.gradients == pytest.approx(gradients, rel=0.05)  # megatron pads its buffers
    assert memory.optimizer == moments


def kept_bytes_per_token(layout, **numbers) -> float:
    """What autograd keeps of one token after a forward pass, every storage once, without weights."""
    shape = tiny_shape(**numbers)
    model = build_model(shape, layout, "fp32", 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.chunks[0].parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens_of(0)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.chunks[0](tokens[:, :-1], torch.arange(shape.sequence_length).expand(len(tokens), -1), None, labels=tokens[:, 1:])
    del output
    return sum(kept.values()) / tokens[:, 1:].numel()


@pytest.mark.parametrize("numbers", [{"hidden": 64, "ffn": 96}, {"hidden": 128, "ffn": 96}, {"hidden": 64, "ffn": 384}], ids=str)
def test_activations_of_a_layer_are_what_autograd_keeps(numbers):
    with running() as layout:
        per_layer = kept_bytes_per_token(layout, layers=3, **numbers) - kept_bytes_per_token(layout, layers=2, **numbers)
    assert activation_bytes_per_token(tiny_shape(**numbers), LOCAL) == pytest.approx(per_layer, rel=0.05)


def test_dividing_a_model_leaves_less_on_every_gpu_and_all_of_it_together():
    shape = resolve_shape(ModelConfig(preset="olmo2-7b"), 100_278, 4096)
    whole = TrainingLayout(precision="bf16", micro_batch_size=1)
    for changes in ({"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"cp": 2}, {"dp": 8}, {"recompute": True}):
        part = training_memory(shape, dataclasses.replace(whole, **changes))
        assert part.total < training_memory(shape, whole).total, changes
    divided = dataclasses.replace(whole, tp=8, sequence_parallel=True)
    assert shape.num_parameters <= 8 * local_parameters(shape, divided) < 1.001 * shape.num_parameters
    assert training_memory(shape, whole).overhead == OVERHEAD_BYTES


def test_a_layer_and_a_checkpoint_have_the_sizes_they_have():
    shape = resolve_shape(ModelConfig(preset="olmo2-1b"), 100_278, 4096)
    vocabulary = 2 * shape.vocabulary_size * shape.hidden
    assert shape.layers * layer_parameters(shape) + vocabulary + shape.hidden == shape.num_parameters
    assert checkpoint_bytes(shape, "bf16") == 14 * shape.num_parameters  # 2 weights, 4 + 8 optimizer


def test_throughput_grows_with_gpus_and_falls_with_size():
    small, large = (resolve_shape(ModelConfig(preset=name), 100_278, 4096) for name in ("olmo2-1b", "olmo2-7b"))
    one = TrainingLayout(precision="bf16", micro_batch_size=1)
    assert throughput(small, dataclasses.replace(one, dp=8)) == pytest.approx(8 * throughput(small, one))
    assert throughput(large, one) < throughput(small, one)
