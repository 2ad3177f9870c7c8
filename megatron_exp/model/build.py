"""An OLMo-2 model on megatron-core, in one layout."""

import dataclasses
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_exp.errors import UserError
from megatron_exp.model.initialization import initialize
from megatron_exp.model.noise import EmbeddingNoise
from megatron_exp.model.olmo2 import Olmo2Model, layer_specs, transformer_config
from megatron_exp.model.precision import Precision, check_fp8, choose_implementation
from megatron_exp.model.presets import ROPE_THETA, ModelShape
from megatron_exp.parallel.layout import Layout
from megatron_exp.parallel.slices import length_multiple


@dataclasses.dataclass(eq=False)
class LanguageModel:
    """This process's part of the model.

    chunks: the bare GPTModels, one for each part of the model on this rank's pipeline stage: parameters, state dicts. callable_chunks: the same inside the
    16-bit conversion where there is one; forward passes for scoring call these. training_chunks: the same inside the gradient
    buffers that `build_optimizer` adds; empty before. implementation: whose linear layers and attention run.
    """

    chunks: list[GPTModel]
    callable_chunks: list[torch.nn.Module]
    config: TransformerConfig
    shape: ModelShape
    layout: Layout
    precision: Precision
    implementation: Literal["torch", "transformer-engine"]
    noise: EmbeddingNoise
    training_chunks: list[DistributedDataParallel] = dataclasses.field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations outside FP8 products, norms and losses."""
        return self.config.params_dtype

    @property
    def fp8_recipe(self) -> str | None:
        """How FP8 products are scaled; None without FP8."""
        return self.config.fp8_recipe if self.precision == "fp8" else None

    def complete_weights(self) -> None:
        """Wait for weights that are still on their way after an update, before they are read other than by a forward pass (collective)."""
        for chunk in self.training_chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def build_model(
    shape: ModelShape, layout: Layout, precision: Precision, init_seed: int, fp8_recipe: str = "tensorwise", recompute: bool = False
) -> LanguageModel:
    """Build the model and give it the initial weights of `init_seed`: the same weights in every layout.

    Transformer Engine's layers are used on CUDA where it is installed, PyTorch's elsewhere; `implementation` says which.
    With `recompute` only the inputs of the layers are kept for the backward pass, and the rest is computed again: the same numbers.

    Raises:
        UserError: where the shape cannot be divided as the layout asks, or the machine lacks what the precision needs.
    """
    _check_division(shape, layout)
    implementation = choose_implementation(layout, precision)
    if precision == "fp8":
        check_fp8(shape, layout, fp8_recipe)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with_engine = implementation == "transformer-engine"
    config = transformer_config(shape, layout, dtype, fp8_recipe if precision == "fp8" else None, with_engine, recompute)
    chunks = [_build_chunk(config, shape, layout, with_engine, part) for part in range(layout.virtual_size)]
    for chunk in chunks:
        initialize(chunk, layout, init_seed)
    return LanguageModel(
        chunks=chunks,
        callable_chunks=chunks if precision == "fp32" else [Float16Module(config, chunk) for chunk in chunks],
        config=config,
        shape=shape,
        layout=layout,
        precision=precision,
        implementation=implementation,
        noise=EmbeddingNoise(chunks, layout),
    )


def _build_chunk(config: TransformerConfig, shape: ModelShape, layout: Layout, with_engine: bool, part: int) -> GPTModel:
    """Part `part` of this rank's stage: the parts of all stages follow each other in turn through the model."""
    vp_stage = part if layout.virtual_size > 1 else None
    return Olmo2Model(
        config=config,
        transformer_layer_spec=layer_specs(config, with_engine, vp_stage),
        vocab_size=shape.vocabulary_size,
        max_sequence_length=shape.sequence_length,
        pre_process=layout.is_first_stage and part == 0,
        post_process=layout.is_last_stage and part == layout.virtual_size - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=ROPE_THETA,
        vp_stage=vp_stage,
    ).to(layout.device)


def _check_division(shape: ModelShape, layout: Layout) -> None:
    divisions = [
        ("key and value heads (model.kv_groups)", shape.kv_groups, "tp", layout.tp_size),
        ("the width of the MLP (model.ffn)", shape.ffn, "tp", layout.tp_size),
        ("the vocabulary (model.vocabulary_size)", shape.vocabulary_size, "tp", layout.tp_size),
        ("layers (model.layers)", shape.layers, "pp", layout.pp_size),
        ("layers (model.layers)", shape.layers, "pp x training.parallel.virtual", layout.pp_size * layout.virtual_size),
        ("the sequence length (geometry.sequence_length)", shape.sequence_length, "cp and tp", length_multiple(layout)),
    ]
    for what, number, degree, parts in divisions:
        if number % parts:
            raise UserError(
                f"{what} = {number} cannot be divided into {parts} equal parts, as training.parallel.{degree} asks. Choose a degree that divides {number}."
            )

