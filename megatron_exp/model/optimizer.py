"""AdamW on megatron-core's distributed optimizer, with exact resume.

The distributed optimizer is used for any number of replicas, one included: its state alone is stored per parameter, so that a
checkpoint loads at another layout. Without Transformer Engine and apex megatron 0.16.1 then runs on torch's AdamW, whose step
count per parameter it restores wrongly in three places; the functions below say which.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.model.build import LanguageModel
from megatron_exp.parallel.layout import Layout

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerSummary(NamedTuple):
    """What tells a restored optimizer from a fresh or a mixed one: updates done, and the norms of its tensors over the whole model."""

    step: int
    weights_norm: float
    first_moment_norm: float
    second_moment_norm: float


class Optimizer:
    """The optimizer of this process's part of the model. The caller sets the learning rate before every step; nothing here schedules."""

    def __init__(self, megatron: ChainedOptimizer, buffers: Sequence[DistributedDataParallel], config: OptimizerConfig):
        self._megatron = megatron
        self._buffers = buffers
        self._config = config
        self._apply_config()
        for part in self._megatron.chained_optimizers:
            # Moments exist from the start, as zeros: megatron cannot save a state that has none.
            part.init_state_fn(part.optimizer)
        for part in self._torch_parts():
            for values in part.optimizer.state.values():
                values["step"] = torch.tensor(0.0)  # likewise: megatron asserts on its absence, when saving as when loading
            part._set_main_param_and_optimizer_states = functools.partial(_restore_parameter, part)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next `step`."""
        for group in self._megatron.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm over the whole model before clipping."""
        _, gradient_norm, _ = self._megatron.step()
        return float(gradient_norm)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for buffer in self._buffers:
            buffer.zero_grad_buffer()
        self._megatron.zero_grad()

    def sharded_state(self, model_state: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What megatron's distributed checkpoints save, or load into, for this rank."""
        state = self._megatron.sharded_state_dict(model_state, is_loading, metadata=metadata)
        if state["param_state"] is None:
            del state["param_state"]  # the first replica saves it; what is no tensor must be equal on all ranks
        elif not is_loading:
            _clear_padding(state["param_state"])
        return state

    @property
    def buckets(self) -> list[str]:
        """How many numbers each of this rank's gradient buckets holds; state stored by bucket loads only where these agree."""
        return [str(part.per_bucket_numel_unpadded) for part in self._megatron.chained_optimizers]

    def load_sharded_state(self, state: Mapping[str, Any]) -> None:
        """Take over a loaded state. Rates and coefficients stay those of the configuration, not of the checkpoint."""
        self._megatron.load_state_dict(state)
        for part in self._torch_parts():
            for values in part.optimizer.state.values():
                # megatron gives all parameters one and the same `step` tensor, and torch counts it up once per parameter.
                values["step"] = values["step"].clone()
        self._apply_config()

    @torch.no_grad()
    def take_weights(self, stored: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Take over this rank's share of fp32 weights as the ones that are updated; `stored` holds those of every parameter of this rank's model."""
        for part in self._megatron.chained_optimizers:
            for parameter in part.model_param_group_index_map:
                share = part._get_model_param_range_map(parameter)["param"]
                _master(part, parameter).copy_(stored[parameter].view(-1)[share.start : share.end])

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of this rank, with their settings and, in some implementations, their step counter."""
        return [group for part in self._megatron.chained_optimizers for group in part.optimizer.param_groups]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that this rank's optimizer keeps, in a fixed order: weights it updates, moments, counters."""
        for _, parameter, values in self._states():
            yield parameter.data
            yield from (values[name] for name in sorted(values) if isinstance(values[name], torch.Tensor))

    def summary(self) -> OptimizerSummary:
        """Step and norms over all ranks (collective); equal in every layout up to the order of the sums."""
        squares = torch.zeros(1 + len(_MOMENTS), dtype=torch.float64)
        step = torch.tensor(0)
        for group, parameter, values in self._states():
            step = step.clamp(min=int(values["step"] if "step" in values else group.get("step", 0)))
            if param_is_not_tensor_parallel_duplicate(parameter):
                tensors = (parameter, *(values[moment] for moment in _MOMENTS))
                squares += torch.stack([tensor.detach().double().square().sum().cpu() for tensor in tensors])
        dist.all_reduce(squares)
        dist.all_reduce(step, dist.ReduceOp.MAX)  # a rank may hold no part of any parameter
        return OptimizerSummary(int(step), *(math.sqrt(value) for value in squares.tolist()))

    def _apply_config(self) -> None:
        for group in self._megatron.param_groups:
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
            group["betas"] = (self._config.beta1, self._config.beta2)
            group["eps"] = self._config.eps

    def _states(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, dict[str, torch.Tensor]]]:
        for part in self._megatron.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield group, parameter, part.optimizer.state[parameter]

    def _torch_parts(self) -> list[DistributedOptimizer]:
        """The parts that run on torch's AdamW; those on Transformer Engine's keep their step elsewhere and need no help."""
        return [part for part in self._megatron.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]


def overlaps(layout: Layout) -> bool:
    """Whether gradients and weights travel between replicas while others are computed: on GPUs, where there is something to overlap."""
    return layout.device.type == "cuda" and layout.dp_size * layout.cp_size > 1


def buffer_config(overlap: bool) -> DistributedDataParallelConfig:
    """How gradients are summed: in fp32 whatever the weights are, each replica keeping its share of the sums."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        check_for_nan_in_grad=False,  # it ends one process and lets the others hang; the norm is finite only where all gradients are
        average_in_collective=False,  # sums, so that the order of divisions does not depend on the layout
    )


def build_optimizer(model: LanguageModel, config: OptimizerConfig, overlap: bool | None = None) -> Optimizer:
    """Add gradient buffers to the model (its `training_chunks`) and build AdamW over them; once per model.

    Weight decay applies to everything but the input embedding: norms and head included, as in OLMo-2. `overlap`: see `overlaps`.
    """
    assert not model.training_chunks, "this model has an optimizer already"
    overlap = overlaps(model.layout) if overlap is None else overlap
    buffers = [
        # Later parts' gradients are ready while earlier parts are still computed: only the first is worth sending in pieces.
        DistributedDataParallel(model.config, buffer_config(overlap), chunk, disable_bucketing=part > 0)
        for part, chunk in enumerate(model.callable_chunks)
    ]
    model.training_chunks = list(buffers)
    model.config.finalize_model_grads_func = finalize_model_grads
    no_sync = [buffer.no_sync for buffer in buffers]
    model.config.no_sync_func = no_sync if len(buffers) > 1 else no_sync[0]
    overrides = {ParamKey(name="*embedding.word_embeddings.weight"): {"wd_mult": 0.0}}
    numbers = megatron_optimizer_config(model, config, overlap)
    return Optimizer(get_megatron_optimizer(numbers, buffers, config_overrides=overrides), buffers, config)


def megatron_optimizer_config(model: LanguageModel, config: OptimizerConfig, overlap: bool) -> MegatronOptimizerConfig:
    """AdamW over fp32 masters; the learning rate is set before every step."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip,
        bf16=model.dtype == torch.bfloat16,
        params_dtype=model.dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        fp8_recipe=model.fp8_recipe,
    )


def _master(part: DistributedOptimizer, model_parameter: torch.nn.Parameter) -> torch.Tensor:
    """fp32, flat: this rank's share of a weight as it is updated."""
    group, place = part.model_param_group_index_map[model_parameter]
    return part.optimizer.param_groups[group]["params"][place]


@torch.no_grad()
def _restore_parameter(part: DistributedOptimizer, model_parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a loaded weight and its moments. megatron's own also asks for a `step` there, which is stored with the group instead."""
    main = _master(part, model_parameter)
    main.copy_(tensors["param"])
    for moment in _MOMENTS:
        part.optimizer.state[main][moment].copy_(tensors[moment])


def _clear_padding(state: Any) -> None:
    """Zeros in the gaps between the parameters of a bucket, where megatron leaves what happened to be in memory."""
    if isinstance(state, Mapping) and getattr(state.get("padding"), "obj", False):
        for part in state.values():
            if isinstance(part, ShardedTensor):
                part.data.zero_()
    elif isinstance(state, Mapping | list):
        for part in state.values() if isinstance(state, Mapping) else state:
            _clear_padding(part)


def data_parallel_group() -> dist.ProcessGroup:
    """The processes over which gradients are summed and the optimizer is divided (replicas and context-parallel ranks)."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
