"""OLMo-2 as megatron-core sees it: a configuration, a layer specification and the language model.

x + norm(attention(x)), x + norm(mlp(x)); RMSNorm over the whole width of queries and of keys; rotary positions; SwiGLU; no biases, no
dropout, untied head. megatron's TransformerLayer is used as it is: its pre-norms are left out and its bias-dropout-add is the norm
behind the branch. Source: AI2's OLMo-2 (arXiv 2501.00656) and transformers' Olmo2ForCausalLM, which the tests compare with.
"""

import importlib.util

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_exp.model.attention import CausalAttention
from megatron_exp.model.loss import token_losses
from megatron_exp.model.norm import FullWidthQKNorm, PostNormAdd, RMSNorm
from megatron_exp.model.presets import NORM_EPS, ModelShape
from megatron_exp.parallel.layout import Layout


class Olmo2Model(GPTModel):
    """megatron's GPTModel; with labels [b, s] it returns fp32 [b, s, 2]: negative log-likelihood and log-normaliser in nats."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels [b, s] and this rank's logits [s, b, vocabulary / tp] to fp32 [b, s, 2]."""
        losses, normalizers = token_losses(logits, labels.transpose(0, 1).contiguous(), self.tp_group)
        return torch.stack([losses, normalizers], dim=-1).transpose(0, 1).contiguous()


def has_fused_gradient_sums() -> bool:
    """Whether NVIDIA's apex with its kernels is there, which adds weight gradients to their fp32 buffer inside the product."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_config(
    shape: ModelShape, layout: Layout, dtype: torch.dtype, fp8_recipe: str | None, with_engine: bool = False, recompute: bool = False
) -> TransformerConfig:
    """The numbers of the model, how it is divided, and which fused kernels it uses; `fp8_recipe` None means no FP8."""
    on_gpu = layout.device.type == "cuda"
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPS,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.virtual_size if layout.virtual_size > 1 else None,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8="hybrid" if fp8_recipe else None,
        fp8_recipe=fp8_recipe or "delayed",
        fp8_amax_history_len=1024 if fp8_recipe == "delayed" else 1,  # megatron's default of 1 forgets every outlier at once
        fp8_amax_compute_algo="max" if fp8_recipe == "delayed" else "most_recent",
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        deterministic_mode=layout.deterministic and on_gpu,
        perform_initialization=False,  # weights come from model/initialization.py
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=on_gpu and has_fused_gradient_sums(),
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=with_engine,
    )


def layer_specs(config: TransformerConfig, with_engine: bool, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """What a transformer block of this rank is built from: PyTorch modules, or Transformer Engine's linear layers and attention.

    Context parallelism is Transformer Engine's own there, and the gather of keys in `CausalAttention` here.
    """
    if with_engine:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )

        layer = _layer(config, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention, TENorm)
        norm = TENorm
    else:
        layer = _layer(config, ColumnParallelLinear, RowParallelLinear, CausalAttention, RMSNorm)
        norm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


def _layer(config: TransformerConfig, column: type, row: type, attention: type, norm: type) -> ModuleSpec:
    post_norm = ModuleSpec(PostNormAdd, params={"config": config, "norm": norm})
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=attention,
                    linear_proj=row,
                    q_layernorm=ModuleSpec(FullWidthQKNorm, params={"num_heads": config.num_attention_heads}),
                    k_layernorm=ModuleSpec(FullWidthQKNorm, params={"num_heads": config.num_query_groups}),
                ),
            ),
            self_attn_bda=post_norm,
            mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=post_norm,
        ),
    )
