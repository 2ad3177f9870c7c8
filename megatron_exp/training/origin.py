"""`train --from`: a run that begins with the weights of another one's checkpoint, or of a converted model.

It is a new run: its steps count from 0, over the slots of its own manifest and at the rates of its own schedule. What it takes over are the
weights and, where the checkpoint has them, the optimizer's moments and step count, so that training goes on as warm as it was (CPDT and
continued pretraining need that). Whoever wants the same run to go on says --resume.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.errors import UserError
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.optimizer import Optimizer, build_optimizer
from megatron_exp.shards.corpus import Corpus


@dataclass(frozen=True)
class Origin:
    """given: the path that was asked for. path: the checkpoint. fingerprint: SHA-256 of its file list. step: its state in its own run."""

    given: str
    path: str
    fingerprint: str
    step: int
    has_optimizer: bool

    @property
    def record(self) -> dict[str, Any]:
        """As run.json keeps it."""
        return asdict(self)


def choose_origin(run_dir: Path, record: dict[str, Any] | None, wanted: Path | None, corpus: Corpus) -> Origin | None:
    """What the run in RUN_DIR begins from: what its RECORD says, which WANTED may repeat and not change; without a record, WANTED.

    UserError where WANTED is no checkpoint, another one than the run was begun from, or one of a model that reads other token ids.
    """
    recorded = Origin(**record["from"]) if record and record.get("from") else None
    if wanted is None:
        return recorded
    given = str(Path(wanted).resolve())
    if recorded and given in (recorded.given, recorded.path):
        return recorded  # it may have rotated away meanwhile
    path = catalogue.find_checkpoint(wanted).resolve()
    found = catalogue.read_record(path)
    origin = Origin(given, str(path), catalogue.fingerprint_of(path), found["extra"].get("step", 0), found["optimizer"] is not None)
    if record and (recorded is None or recorded.fingerprint != origin.fingerprint):
        begun = f"from {recorded.path}" if recorded else "without --from"
        raise UserError(
            f"{run_dir} holds a run that was begun {begun}, so it cannot go on from {path}. Leave --from out, or choose another directory."
        )
    tokenizer = found["extra"].get("tokenizer")
    if tokenizer is not None and tokenizer != corpus.tokenizer_fingerprint:
        raise UserError(
            f"--from {path}: that model was trained with another tokenizer ({tokenizer[:12]}) than the corpus {corpus.path} was made with "
            f"({corpus.tokenizer_fingerprint[:12]}), so its token ids mean other text. Use a corpus made with the tokenizer of that model."
        )
    return origin


def load_origin(origin: Origin, model: LanguageModel, config: OptimizerConfig) -> Optimizer:
    """Give the model the weights of the checkpoint; the optimizer over them, with its state where it has one (collective)."""
    path = Path(origin.path)
    if origin.has_optimizer:
        optimizer = build_optimizer(model, config)
        load_checkpoint(path, model, optimizer)
        return optimizer
    if model.precision == "fp32" or catalogue.read_record(path)["precision"] != "fp32":
        load_checkpoint(path, model, None)  # before the optimizer copies the weights
        return build_optimizer(model, config)
    return _with_exact_masters(path, model, config)


def _with_exact_masters(path: Path, model: LanguageModel, config: OptimizerConfig) -> Optimizer:
    """For a model in 16 bits: the optimizer's fp32 weights are those stored, which the model rounds, and not what is left after rounding."""
    exact = build_model(model.shape, model.layout, "fp32", 0)
    load_checkpoint(path, exact, None)
    stored = {}
    for chunk, wide in zip(model.chunks, exact.chunks, strict=True):
        weights = dict(wide.named_parameters())
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(weights[name])
            stored[parameter] = weights[name]
    optimizer = build_optimizer(model, config)
    optimizer.take_weights(stored)
    return optimizer
