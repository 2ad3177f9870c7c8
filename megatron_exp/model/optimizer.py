"""AdamW on megatron-core's optimizers, with exact resume."""

from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.model.build import LanguageModel


class Optimizer:
    """The optimizer of this process's part of the model.

    The learning rate is set by the caller before every step; nothing here schedules.
    """

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next `step`."""
        raise NotImplementedError


def build_optimizer(model: LanguageModel, config: OptimizerConfig, distributed: bool | None = None) -> Optimizer:
    """Wrap the model's chunks with gradient buffers and build AdamW over them (call once per model).

    Args:
        model: its `runnable` chunks are wrapped in place.
        config: AdamW's numbers and the clipping norm.
        distributed: shard the optimizer state over data-parallel replicas. Default: where there is more than one replica.
    """
    raise NotImplementedError
