"""An OLMo-2 model on megatron-core, in one layout."""

import dataclasses
from typing import Literal, get_args

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_exp.errors import UserError
from megatron_exp.model.initialization import initialize
from megatron_exp.model.noise import EmbeddingNoise
from megatron_exp.model.olmo2 import Olmo2Model, has_transformer_engine, layer_specs, transformer_config
from megatron_exp.model.presets import ROPE_THETA, ModelShape
from megatron_exp.parallel.layout import Layout
from megatron_exp.parallel.slices import length_multiple

Precision = Literal["fp32", "bf16", "fp8"]


@dataclasses.dataclass(eq=False)
class LanguageModel:
    """This process's part of the model.

    chunks: the bare GPTModels, one per pipeline chunk of this rank: parameters, state dicts. callable_chunks: the same inside the
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
    training_chunks: list[torch.nn.Module] = dataclasses.field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations outside FP8 products, norms and losses."""
        return self.config.params_dtype


def build_model(shape: ModelShape, layout: Layout, precision: Precision, init_seed: int, fp8_recipe: str = "tensorwise") -> LanguageModel:
    """Build the model and give it the initial weights of `init_seed`: the same weights in every layout.

    Transformer Engine's layers are used on CUDA where it is installed, PyTorch's elsewhere; `implementation` says which.

    Raises:
        UserError: where the shape cannot be divided as the layout asks, or the machine lacks what the precision needs.
    """
    _check_division(shape, layout)
    with_transformer_engine = layout.device.type == "cuda" and has_transformer_engine()
    _check_precision(precision, with_transformer_engine)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    config = transformer_config(shape, layout, dtype, fp8_recipe if precision == "fp8" else None)
    chunk = Olmo2Model(
        config=config,
        transformer_layer_spec=layer_specs(config, with_transformer_engine),
        vocab_size=shape.vocabulary_size,
        max_sequence_length=shape.sequence_length,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=ROPE_THETA,
    ).to(layout.device)
    initialize(chunk, layout, init_seed)
    return LanguageModel(
        chunks=[chunk],
        callable_chunks=[chunk if precision == "fp32" else Float16Module(config, chunk)],
        config=config,
        shape=shape,
        layout=layout,
        precision=precision,
        implementation="transformer-engine" if with_transformer_engine else "torch",
        noise=EmbeddingNoise([chunk], layout),
    )


def _check_division(shape: ModelShape, layout: Layout) -> None:
    divisions = [
        ("key and value heads (model.kv_groups)", shape.kv_groups, "tp", layout.tp_size),
        ("the width of the MLP (model.ffn)", shape.ffn, "tp", layout.tp_size),
        ("the vocabulary (model.vocabulary_size)", shape.vocabulary_size, "tp", layout.tp_size),
        ("layers (model.layers)", shape.layers, "pp", layout.pp_size),
        ("the sequence length (geometry.sequence_length)", shape.sequence_length, "cp and tp", length_multiple(layout)),
    ]
    for what, number, degree, parts in divisions:
        if number % parts:
            raise UserError(
                f"{what} = {number} cannot be divided into {parts} equal parts, as training.parallel.{degree} asks. Choose a degree that divides {number}."
            )


def _check_precision(precision: Precision, with_transformer_engine: bool) -> None:
    assert precision in get_args(Precision), precision
    if precision == "fp8" and not with_transformer_engine:
        raise UserError(
            "training.precision is fp8, but FP8 needs an NVIDIA GPU of the Hopper generation or later and Transformer Engine, and this machine lacks one of "
            "them. Install the `cuda` extra on a GPU machine, or set training.precision to bf16 (fp32 on CPU)."
        )
