"""What can be said of a training job before it waits in a queue: whether its processes divide the model and the batch, and what memory it takes."""

from pathlib import Path

from megatron_exp.cluster.profile import Cluster
from megatron_exp.cluster.stages import num_processes, resources_of
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.model.memory import TrainingLayout, training_memory
from megatron_exp.model.presets import resolve_shape
from megatron_exp.shards.corpus import RECORD_NAME, Corpus


def check_division(config: Config, cluster: Cluster) -> None:
    """UserError where the profile's processes cannot be divided as `training.parallel` and the batch ask; training would find it hours later."""
    for stage in ("twin", "train"):
        wanted = resources_of(cluster, stage)
        world, parallel = (wanted.nodes or 1) * num_processes(stage, wanted), config.training.parallel
        replica = parallel.tp * parallel.pp * parallel.cp
        if world % replica:
            raise UserError(
                f"The stage {stage} starts {world} processes, and training.parallel needs a multiple of tp {parallel.tp} x pp {parallel.pp} "
                f"x cp {parallel.cp} = {replica}. Change nodes or processes_per_node (default: one for each GPU) in the profile, or the degrees."
            )
        at_once = config.training.micro_batch_size * (world // replica)
        if config.geometry.global_batch_size % at_once:
            raise UserError(
                f"The stage {stage} has {world // replica} replicas of training.micro_batch_size = {config.training.micro_batch_size}: {at_once} slots go "
                f"through at once, which does not divide geometry.global_batch_size = {config.geometry.global_batch_size}. Change the micro-batch or the "
                "number of processes."
            )


def memory_line(config: Config, cluster: Cluster, corpus: Path) -> str | None:
    """One sentence on the memory of the training stage; None without GPUs, or while nobody knows the vocabulary."""
    wanted = resources_of(cluster, "train")
    if not wanted.gpus_per_node:
        return None
    known = Corpus.open(corpus).vocabulary_size if (corpus / RECORD_NAME).is_file() else config.model.vocabulary_size
    if known is None:
        return None
    training, parallel = config.training, config.training.parallel
    world = (wanted.nodes or 1) * num_processes("train", wanted)
    layout = TrainingLayout(
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        dp=world // (parallel.tp * parallel.pp * parallel.cp),
        sequence_parallel=parallel.sequence_parallel,
        recompute=training.recompute == "full",
    )
    memory = training_memory(resolve_shape(config.model, known, config.geometry.sequence_length), layout)
    gib = {name: value / 2**30 for name, value in vars(memory).items()}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in gib.items())
    return f"Training needs about {memory.total / 2**30:.0f} GiB on the fullest of {world} GPUs, by calculation ({parts})."
