"""Whether a run of a configuration could begin: what `train` would refuse is refused by `plan`, before a manifest of it exists."""

from megatron_exp.config.load import require_kept_states
from megatron_exp.config.schema import Config
from megatron_exp.model.presets import find_preset, resolve_shape
from megatron_exp.model.schedule import Schedule
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.slot import Geometry


def require_model(config: Config, corpus: Corpus) -> None:
    """UserError where the model's numbers do not fit together, or it has fewer embeddings than the tokenizer has ids."""
    resolve_shape(config.model, corpus.vocabulary_size, config.geometry.sequence_length)


def require_schedule(config: Config) -> None:
    """UserError where the learning rate, or a checkpoint to be kept, lies outside the run."""
    require_kept_states(config)
    geometry = Geometry(**config.geometry.model_dump())
    Schedule.of(config.training.schedule, find_preset(config.model.preset).peak_lr, geometry)
