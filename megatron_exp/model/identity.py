"""Fingerprints of what decides the weights of a run, up to data and layout. No torch here, so that a run can be compared before it exists."""

from megatron_exp.config.schema import Config
from megatron_exp.fingerprint import of_json
from megatron_exp.model.presets import ModelShape


def weights_identity(config: Config, shape: ModelShape, origin: str | None = None) -> dict[str, str]:
    """`model`: shape and initialisation (`origin`: fingerprint of the checkpoint it begins from). `training`: precision, schedule and optimizer.

    As in `identity` of run.json.
    """
    training = config.training
    recipe = {
        "precision": training.precision,
        "fp8_recipe": training.fp8_recipe if training.precision == "fp8" else None,
        "schedule": training.schedule.model_dump(),
        "optimizer": training.optimizer.model_dump(),
    }
    return {"model": of_json([vars(shape), config.seeds.init, *([origin] if origin else [])]), "training": of_json(recipe)}
