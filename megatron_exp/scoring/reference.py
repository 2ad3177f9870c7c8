"""A trained model that `plan` may ask: a checkpoint of ours or a Hugging Face directory, loaded by all processes of the command together.

One process plans. It passes every question on to the others, which wait in `serve` and take part in the forward passes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_exp import files
from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.convert_config import CONFIG_NAME, OURS, read_json
from megatron_exp.checkpoint.convert_tokenizer import CARRIED, is_in
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import Config, ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.fingerprint import of_json
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.identity import weights_identity
from megatron_exp.model.precision import Precision
from megatron_exp.model.presets import ModelShape, resolve_shape
from megatron_exp.parallel.layout import Layout, start_parallel
from megatron_exp.run_record import RECORD_NAME, RunRecord, pairing
from megatron_exp.scoring.batched import BatchedScorer, LogLikelihoodRequest
from megatron_exp.scoring.engine import Scorer
from megatron_exp.scoring.huggingface import HuggingFaceScorer
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer

_TWIN, _EXTERNAL = "twin", "external"


class Found(NamedTuple):
    """What lies at a path given as reference. fields: of `preparation.reference.ReferenceIdentity`. checkpoint: None for a Hugging Face model."""

    fields: dict[str, Any]
    checkpoint: Path | None


class ReferenceModel:
    """Answers of one model. On the process that plans every method answers; the others only `serve`."""

    def __init__(self, scorer: BatchedScorer, layout: Layout, excluded: np.ndarray, shared: bool):
        """excluded: ids that `least_likely` never chooses. shared: whether the other processes take part."""
        self._scorer, self._layout, self._excluded = scorer, layout, excluded
        self._shared = shared and layout.world_size > 1

    @property
    def plans(self) -> bool:
        """Whether this is the process that plans."""
        return self._layout.is_main

    def loglikelihood(self, sequences: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> np.ndarray:
        """float64 [n], nats."""
        return self._asked("loglikelihood", list(sequences), list(starts), list(ends))

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int64 [n, num_tokens], negative where the logits were not finite."""
        return self._asked("greedy", list(prompts), num_tokens)

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int64 [n, num_tokens], negative where the logits were not finite."""
        return self._asked("least_likely", list(prompts), num_tokens)

    def serve(self) -> None:
        """Take part in the questions of the process that plans, until it is done."""
        while (call := self._layout.broadcast(None)) is not None:
            if self._shared:
                self._answer(*call)

    def dismiss(self) -> None:
        """There are no more questions."""
        self._layout.broadcast(None)

    def _asked(self, name: str, *arguments: Any) -> np.ndarray:
        if self._shared:
            self._layout.broadcast((name, *arguments))
        return self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> np.ndarray:
        longest = max((len(one) for one in arguments[0]), default=0) + (arguments[1] - 1 if name != "loglikelihood" else 0)
        if longest > self._scorer.sequence_length + (name == "loglikelihood"):
            raise UserError(
                f"An experiment asks the reference about {longest} tokens in a row, but it has {self._scorer.sequence_length} positions. "
                "Give a reference with a longer context, or make the experiment's texts shorter."
            )
        if name == "loglikelihood":
            return self._scorer.loglikelihood([LogLikelihoodRequest(*one) for one in zip(*arguments, strict=True)]).nats
        extra = (self._excluded,) if name == "least_likely" else ()
        return getattr(self._scorer, name)(*arguments, *extra)


def find_reference(path: Path, step: int | None, config: Config, corpus: Corpus, precision: Precision | None = None) -> Found:
    """What lies at `path`: a run (its newest checkpoint, or state `step`), a checkpoint, or a Hugging Face directory.

    Raises:
        UserError: where it is none of them, has no such state, or nothing says which tokenizer it reads.
    """
    path = Path(path)
    if not (path / RECORD_NAME).is_file() and not (path / catalogue.RECORD).is_file() and (path / CONFIG_NAME).is_file():
        if precision is not None:
            raise UserError(f"--reference-precision is for checkpoints of runs, and {path} is a Hugging Face model. Leave it out.")
        return _huggingface(path, step)
    checkpoint = _checkpoint(path, step)
    catalogue.require_sound(checkpoint)
    run = _run_of(checkpoint)
    relation, differences = _relation(run, config, corpus) if run else (_EXTERNAL, ("it is no run of ours",))
    record = catalogue.read_record(checkpoint)
    other = precision if precision != record["precision"] else None
    fields = {
        "fingerprint": of_json(["checkpoint", (checkpoint / catalogue.MARKER).read_text(), *([other] if other else [])]),
        "tokenizer": _tokenizer_of(checkpoint, run),
        "kind": "run",
        "state": int(record["extra"]["step"]),
        "relation": relation,
        "differences": differences,
        "precision": other,
    }
    return Found(fields, checkpoint)


@contextlib.contextmanager
def loaded(path: Path, found: Found, corpus: Corpus) -> Iterator[ReferenceModel]:
    """The model of `find_reference`, in memory."""
    tokenizer = corpus.tokenizer()
    layout = start_parallel(ParallelConfig())
    try:
        scorer = (
            Scorer(_load(found.checkpoint, layout, found.fields["precision"]))
            if found.checkpoint
            else HuggingFaceScorer.open(str(path), device=str(layout.device))
        )
        if tokenizer.vocabulary_size > scorer.vocabulary_size:
            raise UserError(
                f"The reference {path} has embeddings for {scorer.vocabulary_size} ids, but the tokenizer has {tokenizer.vocabulary_size}. "
                "Give a model of this tokenizer."
            )
        excluded = np.array([*tokenizer.special_ids, *range(tokenizer.vocabulary_size, scorer.vocabulary_size)], dtype=np.int64)
        yield ReferenceModel(scorer, layout, excluded, shared=found.checkpoint is not None)
    finally:
        layout.stop()


def _load(checkpoint: Path, layout: Layout, precision: Precision | None) -> LanguageModel:
    record, run = catalogue.read_record(checkpoint), _run_of(checkpoint)
    training = run.record["config"]["training"] if run else {"fp8_recipe": "tensorwise"}
    model = build_model(ModelShape(**record["shape"]), layout, precision or record["precision"], 0, training["fp8_recipe"])
    load_checkpoint(checkpoint, model, None)
    return model


def _checkpoint(path: Path, step: int | None) -> Path:
    if step is None:
        return catalogue.find_checkpoint(path)
    states = dict(catalogue.list_checkpoints(path))
    if step not in states:
        listed = ", ".join(map(str, states)) or "none"
        raise UserError(
            f"{path} has no complete checkpoint of state {step} (there are: {listed}). Choose one of them, or train again with "
            f"`training.checkpoint.keep: [{step}]`."
        )
    return states[step]


def _run_of(checkpoint: Path) -> RunRecord | None:
    directory = checkpoint.resolve().parent.parent
    return RunRecord.open(directory) if (directory / RECORD_NAME).is_file() else None


def _relation(run: RunRecord, config: Config, corpus: Corpus) -> tuple[str, tuple[str, ...]]:
    """Whether a run would be the twin of the one that is planned, and why not."""
    identity = weights_identity(config, resolve_shape(config.model, corpus.vocabulary_size, config.geometry.sequence_length))
    planned = pairing(config.model_dump(mode="json"), corpus.fingerprint, identity["model"], identity["training"])
    differences = tuple(name for name, value in run.pairing.items() if planned[name] != value)
    if not run.baseline:
        differences = (*differences, "insertions (it is no baseline)")
    return (_EXTERNAL if differences else _TWIN), differences


def _tokenizer_of(checkpoint: Path, run: RunRecord | None) -> str:
    if (checkpoint / CARRIED).is_dir():
        return Tokenizer.load(checkpoint / CARRIED).fingerprint
    if run is None:
        raise UserError(
            f"Nothing says which tokenizer {checkpoint} reads: it lies in no run and brought none along. Give RUN or RUN/checkpoints/step-..."
        )
    return Corpus.open(Path(run.record["corpus"]["path"])).tokenizer_fingerprint


def _huggingface(path: Path, step: int | None) -> Found:
    told = read_json(path / CONFIG_NAME).get(OURS, {}).get("step")
    if step is not None and step != told:
        raise UserError(f"--reference-step {step} asks for a state of a run, but {path} is one Hugging Face model. Leave it out.")
    if not is_in(path):
        raise UserError(
            f"{path} holds no tokenizer.json or tokenizer.model, so nothing says which tokenizer the model reads. Put its tokenizer file there."
        )
    weights = {file.name: files.sha256_file(file) for file in sorted([path / CONFIG_NAME, *path.glob("*.safetensors")])}
    if len(weights) < 2:
        raise UserError(f"{path} holds no *.safetensors weights. Give the directory of a whole model.")
    fields = {
        "fingerprint": of_json(["huggingface", weights]),
        "tokenizer": Tokenizer.load(path).fingerprint,
        "kind": "huggingface",
        "state": told,
        "relation": _EXTERNAL,
        "differences": ("it is no run of ours",),
    }
    return Found(fields, None)
