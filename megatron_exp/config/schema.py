"""The configuration of a run as frozen, self-checking models. Unknown keys are refused, units are in the names."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
LARGEST_INT = 2**63 - 1
"""What every file format and every library takes; JSON as written here ends at 64 bits."""
Positive = Annotated[int, Field(gt=0, le=LARGEST_INT)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Strict(BaseModel):
    """Base of all configuration models. Infinity and NaN are refused: JSON has neither, and would keep null, which is another setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Seeds(Strict):
    """order: which data at which slot. placement: where insertions go and what generators make.

    assignment: which item gets which condition. init: the weights. Unsigned numbers of 64 bits.
    """

    order: Seed = 6198
    placement: Seed = 0
    assignment: Seed = 0
    init: Seed = 6198


class CorpusConfig(Strict):
    """path: a CORPUS directory, relative to the config file.

    order: `keyed` (seekable, several epochs), or `olmo`: AI2's shuffle replayed from a stored file, one epoch.

    sources: epochs per source, fractions allowed, 0 leaves it out; empty means every source once, else all are listed.

    first_slot: place of the order at which the run begins; its slot k is slot first_slot + k of a run that begins at 0.
    """

    path: Path
    order: Literal["keyed", "olmo"] = "keyed"
    sources: dict[str, Annotated[float, Field(ge=0)]] = {}
    first_slot: NonNegative = 0


class GeometryConfig(Strict):
    """sequence_length in tokens, global_batch_size in slots, steps in optimizer updates."""

    sequence_length: Positive
    global_batch_size: Positive
    steps: Positive


class PoolConfig(Strict):
    """slots: how many instances are set aside before anything else (validation, swaps, held-out data)."""

    slots: NonNegative = 0


class BudgetConfig(Strict):
    """unit `tokens`: fraction bounds the rewritten positions.

    unit `slots`: exactly round(fraction x slots) slots are drawn by key and every payload is packed inside them. held_back: the part of them that
    is left to whole slots of experiments which wait for a reference, whose number nobody knows when the others are placed.
    """

    unit: Literal["tokens", "slots"] = "tokens"
    fraction: Annotated[float, Field(gt=0, le=1)]
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _held_back_from_slots(self) -> "BudgetConfig":
        if self.held_back and (self.unit != "slots" or self.held_back >= self.fraction):
            raise ValueError("held_back is a part of the fraction that unit slots draws; leave it out with unit tokens, or make it smaller than fraction")
        return self


class ModelConfig(Strict):
    """A preset of docs/formats.md, with any of its numbers replaced."""

    preset: str = "tiny"
    layers: Positive | None = None
    hidden: Positive | None = None
    heads: Positive | None = None
    kv_groups: Positive | None = None
    ffn: Positive | None = None
    vocabulary_size: Positive | None = None


class ParallelConfig(Strict):
    """Degrees of tensor, pipeline and context parallelism; the rest of the processes is data-parallel.

    virtual: parts of the model on each pipeline stage (interleaved schedule); they take turns, which shortens the stages' idle time.
    """

    tp: Positive = 1
    pp: Positive = 1
    cp: Positive = 1
    virtual: Positive = 1
    sequence_parallel: bool = False


class ScheduleConfig(Strict):
    """Learning rate over steps.

    `cosine`: warm-up, cosine over `horizon_tokens` (default: the whole run) down to final_factor x peak, and from `decay_start` on
    linear to zero. `constant`: warm-up, constant, linear to zero from `decay_start`. peak_lr: default that of the model preset.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    peak_lr: Annotated[float, Field(gt=0)] | None = None
    warmup_steps: NonNegative = 0
    horizon_tokens: Annotated[float, Field(gt=0)] | None = None
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay_start: NonNegative | None = None


class OptimizerConfig(Strict):
    """AdamW; weight decay is not applied to embeddings. clip: largest gradient norm, 0 is off."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 1.0


class CheckpointConfig(Strict):
    """every: steps between rotating checkpoints. keep: states never rotated.

    portable_every: steps between checkpoints that load at any layout (0: only kept ones, and at the end or a stop).

    in_background: a thread writes periodic ones, from a copy in host memory, while training goes on.
    """

    every: Positive = 1000
    portable_every: NonNegative = 0
    in_background: bool = False
    keep: tuple[NonNegative, ...] = ()


class ValidationConfig(Strict):
    """every: steps between validations. slots: pool slots used (the first of the pool)."""

    every: Positive = 1000
    slots: NonNegative = 0


class TrainingConfig(Strict):
    """Everything the trainer needs beyond data. wandb_project: where Weights & Biases shows the metrics too (extra `wandb`).

    recompute `full`: keep only the input of each layer and compute the rest again in the backward pass: less memory, same weights.

    deterministic: on GPUs use only kernels and collectives whose sums have a fixed order (slower); on CPU runs always repeat.
    """

    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] = "tensorwise"
    micro_batch_size: Positive = 1
    recompute: Literal["none", "full"] = "none"
    deterministic: bool = False
    parallel: ParallelConfig = ParallelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    wandb_project: str | None = None


class ExperimentEntry(Strict):
    """One experiment of a run.

    type: a module of megatron_exp.experiments, or `package.module` of a third party. parameters: all other keys of the entry.
    """

    name: Name
    type: str
    enabled: bool = True
    parameters: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "parameters" in data:
            return data
        own = {"name", "type", "enabled"}
        return {**{k: v for k, v in data.items() if k in own}, "parameters": {k: v for k, v in data.items() if k not in own}}

    @field_validator("type")
    @classmethod
    def _check_type(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
            raise ValueError(f"{value!r} is not a module name such as memorization_patterns or my_package.my_experiment")
        return value

    @field_validator("parameters")
    @classmethod
    def _check_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for where, number in _numbers(value):
            if not math.isfinite(number) or (isinstance(number, int) and not -LARGEST_INT <= number < 2**64):
                raise ValueError(f"{where} is {number}; a parameter is a finite number, a whole one of at most 64 bits")
        return value


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in nested data, each with the dotted path that leads to it."""
    if isinstance(value, int | float):
        yield where, value
    elif isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(one, f"{where}.{key}" if where else str(key))


class Config(Strict):
    """A whole run: data, model, training and experiments."""

    name: Name
    seeds: Seeds = Seeds()
    corpus: CorpusConfig
    geometry: GeometryConfig
    pool: PoolConfig = PoolConfig()
    budget: BudgetConfig | None = None
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    experiments: tuple[ExperimentEntry, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Config":
        names = [entry.name for entry in self.experiments]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"experiment names must be unique; used twice: {', '.join(twice)}")
        return self
