"""An OLMo-2 model on megatron-core, in one layout."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from megatron_exp.model.presets import ModelShape
from megatron_exp.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_exp.model.noise import EmbeddingNoise

Precision = Literal["fp32", "bf16", "fp8"]


@dataclasses.dataclass(eq=False)
class LanguageModel:
    """This process's part of the model.

    chunks: the bare GPTModels (one per pipeline chunk of this rank): parameters, state dicts. runnable: the same chunks inside
    the wrappers that the schedules call (16-bit conversion, and gradient buffers once an optimizer is built).
    noise: the embedding-noise hook, off by default.
    """

    chunks: "list[GPTModel]"
    runnable: list[torch.nn.Module]
    config: "TransformerConfig"
    shape: ModelShape
    layout: Layout
    precision: Precision
    noise: "EmbeddingNoise"


def build_model(shape: ModelShape, layout: Layout, precision: Precision, init_seed: int, fp8_recipe: str = "tensorwise") -> LanguageModel:
    """Build the model and give it the initial weights of `init_seed`: the same weights in every layout.

    Raises:
        UserError: where the shape cannot be divided as the layout asks, or the machine lacks what the precision needs.
    """
    raise NotImplementedError
