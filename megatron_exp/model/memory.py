"""How much memory training needs on each GPU, and how fast it could be: by calculation, so that a layout can be chosen before any GPU is paid for.

What is exact: weights, gradients and optimizer state, which follow from the shape and how megatron-core divides it. What is counted from the code of
the layers: activations (the tests compare them with what autograd keeps). What is assumed: OVERHEAD_BYTES, and MFU in `throughput`. On one H200 all but the
overhead was within 5% of what PyTorch had allocated at most (docs/performance.md), in bf16 and FP8. No torch here.
"""

import dataclasses
from typing import Literal

from megatron_exp.model.presets import ModelShape

OVERHEAD_BYTES = 4 << 30
"""CUDA context, NCCL buffers, kernels' workspaces, fragmentation. An assumption."""

_LOSS_CHUNK_BYTES = 2 << 30
"""Logits are handled in pieces of 2^30 (model/loss.py), whose gradient is made beside that of all."""

PEAK_FLOPS = {"bf16": 989e12, "fp8": 1979e12}
"""Of one H100 SXM without sparsity (NVIDIA's data sheet)."""

ASSUMED_MFU = {"bf16": 0.40, "fp8": 0.28}
"""Share of that peak which training is assumed to reach on many GPUs. On one H200, where nothing has to travel, the 1B model reached 0.52 and 0.32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingLayout:
    """How a model is divided. dp: data-parallel replicas; the optimizer is divided over dp x cp. fused: Transformer Engine's layers."""

    precision: Literal["fp32", "bf16", "fp8"]
    micro_batch_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    fused: bool = True

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def element_bytes(self) -> int:
        """Of a weight and of an activation."""
        return 4 if self.precision == "fp32" else 2


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest GPU of a layout."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def training_memory(shape: ModelShape, layout: TrainingLayout) -> TrainingMemory:
    """What training keeps on the fullest GPU, which is one of the first or last pipeline stage."""
    local = local_parameters(shape, layout)
    per_optimizer = 8 if layout.precision == "fp32" else 12  # two moments, and the fp32 weights where the model's are not
    fp8_copies = shape.layers / layout.pp * layer_parameters(shape) / layout.tp if layout.precision == "fp8" else 0
    tokens = layout.micro_batch_size * shape.sequence_length / layout.cp
    return TrainingMemory(
        weights=layout.element_bytes * local + fp8_copies,
        gradients=4 * local,  # reduced in fp32
        optimizer=per_optimizer * local / (layout.dp * layout.cp),
        activations=tokens * _layers_in_memory(shape, layout),
        logits=tokens * 2 * layout.element_bytes * shape.vocabulary_size / layout.tp + _LOSS_CHUNK_BYTES,  # and their gradient
        overhead=OVERHEAD_BYTES,
    )


def layer_parameters(shape: ModelShape) -> int:
    """Weights of one layer, norms included."""
    attention = 2 * shape.hidden * shape.hidden + 2 * shape.hidden * shape.kv_width
    return attention + 3 * shape.hidden * shape.ffn + 3 * shape.hidden + shape.kv_width


def local_parameters(shape: ModelShape, layout: TrainingLayout) -> float:
    """Weights on the fullest GPU: its layers, and one vocabulary matrix per pipeline end (both where there is one stage). Norms are not divided by tp."""
    vocabulary = shape.vocabulary_size * shape.hidden * (2 if layout.pp == 1 else 1)
    undivided = 2 * shape.hidden * shape.layers / layout.pp + shape.hidden
    divided = shape.layers / layout.pp * (layer_parameters(shape) - 2 * shape.hidden) + vocabulary
    return divided / layout.tp + undivided


def activation_bytes_per_token(shape: ModelShape, layout: TrainingLayout) -> float:
    """What one layer keeps of one token for its backward pass, on one GPU.

    With h hidden, k key (= value) width, f MLP width, e bytes per element: input e h; queries, keys and values e (h + 2k); both normalised: their copy,
    e (h + k), when fused, else twice in fp32, 8 (h + k); both rotated e (h + k); attention's output e h; the MLP's input e h, its two branches and their
    product 3 e f. Norms behind the branches: their input, e h each, when fused, else twice in fp32, 8 h each. SwiGLU keeps 2 e f
    more when not fused. In FP8 the layers' own inputs and the product, which nothing else keeps, are kept with one byte instead of e; attention's output
    is kept by attention, and once more with one byte.
    """
    h, k, f, e = shape.hidden, shape.kv_width, shape.ffn, layout.element_bytes
    divided = e * (h + 2 * k) + ((e if layout.fused else 8) + e) * (h + k) + e * h + 3 * e * f + (0 if layout.fused else 2 * e * f)
    whole = 2 * e * h + 2 * (e * h if layout.fused else 8 * h)
    if layout.precision == "fp8":
        divided, whole = divided + h - f * (e - 1), whole - 2 * h * (e - 1)
    return divided / layout.tp + whole / (layout.tp if layout.sequence_parallel else 1)


def _layers_in_memory(shape: ModelShape, layout: TrainingLayout) -> float:
    """Bytes per token of all layers whose activations a GPU holds: the first stage of a pipeline has as many micro-batches under way as there are stages."""
    per_layer = activation_bytes_per_token(shape, layout)
    if not layout.recompute:
        return shape.layers * per_layer
    return shape.layers * layout.element_bytes * shape.hidden + per_layer


def throughput(shape: ModelShape, layout: TrainingLayout) -> float:
    """Tokens per second of all GPUs together, if they are H100s that reach ASSUMED_MFU. A calculation, no measurement."""
    assert layout.precision != "fp32", "fp32 trains on CPUs"
    per_gpu = ASSUMED_MFU[layout.precision] * PEAK_FLOPS[layout.precision] / shape.flops_per_token
    return per_gpu * layout.num_gpus


def checkpoint_bytes(shape: ModelShape, precision: str) -> int:
    """Bytes of a full checkpoint: the weights as the model holds them, and for the optimizer in fp32 the weights again and two moments."""
    return shape.num_parameters * (16 if precision == "fp32" else 14)
