"""What the trainer is compared with: the same model in a bare megatron-core loop, and the same shape in plain PyTorch."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention, silu

from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.model.build import build_model
from megatron_exp.model.optimizer import buffer_config, megatron_optimizer_config
from megatron_exp.model.precision import Precision
from megatron_exp.model.presets import NORM_EPS, ROPE_THETA, Z_LOSS_WEIGHT, ModelShape
from megatron_exp.parallel.layout import Layout

MicroBatches = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(tokens int64 [b, S + 1], loss mask uint8 [b, S]) on the device."""


class BareLoop:
    """The trainer's model, buffers and optimizer with nothing around them: no data, no hooks, nothing read back from the device."""

    def __init__(self, shape: ModelShape, layout: Layout, precision: Precision, fp8_recipe: str = "tensorwise"):
        self.model = build_model(shape, layout, precision, 0, fp8_recipe)
        self.chunk = DistributedDataParallel(self.model.config, buffer_config(overlap=False), self.model.callable_chunks[0])
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.no_sync_func = self.chunk.no_sync
        self.optimizer = get_megatron_optimizer(megatron_optimizer_config(self.model, OptimizerConfig(), overlap=False), [self.chunk])

    def step(self, micro_batches: MicroBatches, learning_rate: float = 1e-4) -> None:
        """One update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(micro_batches),
            model=[self.chunk],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0][1].shape[1],
            micro_batch_size=len(micro_batches[0][1]),
            forward_only=False,
        )
        self.optimizer.step()

    @staticmethod
    def _forward(batches, chunk):  # noqa: ANN001, ANN205 - megatron's signature
        tokens, mask = next(batches)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = ((output[..., 0] + Z_LOSS_WEIGHT * output[..., 1].square()) * mask).sum()
            return total, mask.sum(dtype=torch.int32), total.detach().clone()

        return chunk(tokens[:, :-1], None, None, labels=tokens[:, 1:]), loss


class _Layer(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.heads, self.kv_groups = shape.heads, shape.kv_groups
        self.qkv = nn.Linear(shape.hidden, shape.hidden + 2 * shape.kv_width, bias=False)
        self.projection = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_and_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)
        widths = (shape.hidden, shape.kv_width, shape.hidden, shape.hidden)
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in widths)
        self.split = [shape.hidden, shape.kv_width, shape.kv_width]

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).split(self.split, dim=-1)
        q, k = (rms_norm(part, part.shape[-1:], norm, NORM_EPS) for part, norm in zip((q, k), self.norms[:2], strict=True))
        q, k, v = (part.view(b, s, -1, x.shape[-1] // self.heads).transpose(1, 2) for part in (q, k, v))
        mixed = scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True, enable_gqa=self.heads != self.kv_groups)
        x = x + rms_norm(self.projection(mixed.transpose(1, 2).flatten(2)), x.shape[-1:], self.norms[2], NORM_EPS)
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return x + rms_norm(self.down(silu(gate) * up), x.shape[-1:], self.norms[3], NORM_EPS)


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on [b, n, s, d]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class PlainLoop(nn.Module):
    """The same shape as anybody would write it, with torch's AdamW, over full logits."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary_size, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Linear(shape.hidden, shape.vocabulary_size, bias=False)
        angles = torch.arange(shape.sequence_length)[:, None] * ROPE_THETA ** -(torch.arange(0, shape.head_width, 2) / shape.head_width)
        self.register_buffer("angles", angles.repeat(1, 2))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.06, b=0.06)
        self.to(device)
        self.cos, self.sin = self.angles.cos().to(dtype), self.angles.sin().to(dtype)
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, micro_batches: MicroBatches) -> None:
        """One update; 16-bit products by autocast over fp32 weights."""
        num_tokens = sum(mask.sum() for _, mask in micro_batches)
        for tokens, mask in micro_batches:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                x = self.embedding(tokens[:, :-1]).to(self.dtype)
                for layer in self.layers:
                    x = layer(x, self.cos, self.sin)
                logits = self.head(rms_norm(x, x.shape[-1:], self.norm, NORM_EPS))
            logits = logits.float().flatten(0, 1)
            losses = cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none") + Z_LOSS_WEIGHT * logits.logsumexp(-1).square()
            ((losses * mask.flatten()).sum() / num_tokens).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
