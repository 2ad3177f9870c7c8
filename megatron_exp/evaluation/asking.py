"""Putting the questions to the models: checkpoints are loaded one after the other into one model, live answers are read."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.errors import UserError
from megatron_exp.evaluation.judging import without_judged
from megatron_exp.evaluation.questions import Questions, questions
from megatron_exp.evaluation.responses import live_responses, unanswered
from megatron_exp.evaluation.subjects import Subject
from megatron_exp.evaluation.units import Units
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import PROBES
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.precision import Precision
from megatron_exp.model.presets import ModelShape
from megatron_exp.parallel.layout import Layout
from megatron_exp.scoring.engine import Scorer, fp32_scorer
from megatron_exp.scoring.probes import score_probes
from megatron_exp.scoring.responses import stamped
from megatron_exp.stream.base import Stream

logger = logging.getLogger(__name__)

_GRADIENT = "embedding_gradient"
RECORDED_NAME = "probes.parquet"


@dataclasses.dataclass(eq=False)
class Examiner:
    """Asks any number of subjects. All processes of `layout` ask together.

    The model is built once and refilled from checkpoint to checkpoint, as long as shape and precision stay the same. precision: what all are computed
    in; None: each in what it was trained in.
    """

    manifest: Manifest
    probes: pa.Table
    stream: Stream
    layout: Layout
    units: Units | None = None
    precision: Precision | None = None
    _built: LanguageModel | None = None

    def ask(self, subject: Subject, final_states: list[int]) -> list[pa.Table]:
        """Responses (columns of ANSWERS with model and step) of one subject to everything it is asked."""
        asked = questions(self.probes, subject.label, final_states, subject.record.num_steps)
        parts = [self._live(subject, asked)]
        for state, all_rows in asked.of_checkpoints().items():
            rows = without_judged(self.probes, all_rows)
            if state not in subject.checkpoints:
                parts.append(unanswered(self.probes, rows, subject.label, state, f"the {subject.label} has no checkpoint of this state"))
                continue
            parts.append(self._unit(subject, state, rows))
        return parts

    def _unit(self, subject: Subject, state: int, rows: np.ndarray) -> pa.Table:
        """Answers of one model in one state: those of an evaluation that was killed, or new ones, which are kept."""
        chosen = self.probes.take(pa.array(rows))
        numbers = chosen["probe_id"].to_pylist()
        if self.units and (kept := self.units.find(subject.label, state, numbers)) is not None:
            logger.info("the %s in state %d has answered already", subject.label, state)
            return kept
        logger.info("asking the %s in state %d: %d probes", subject.label, state, len(rows))
        answers = stamped(self._answers(self.loaded(subject, state), chosen, trained_in(subject)), subject.label, state)
        if self.units:
            self.units.keep(subject.label, state, numbers, answers)
        return answers

    def _answers(self, model: LanguageModel, probes: pa.Table, trained: Precision) -> pa.Table:
        """Gradients are computed in fp32, with noise rounded as in training; all else in the model's precision."""
        is_gradient = pc.equal(probes["ask"].cast(pa.string()), _GRADIENT)
        if model.precision == trained == "fp32" or not pc.any(is_gradient).as_py():
            return score_probes(Scorer(model), probes, self.manifest, self.stream)
        exact = Scorer(model) if model.precision == "fp32" else fp32_scorer(model)
        exact.noise_dtype = torch.float32 if trained == "fp32" else torch.bfloat16
        gradients = score_probes(exact, probes.filter(is_gradient), self.manifest, self.stream)
        return pa.concat_tables([score_probes(Scorer(model), probes.filter(pc.invert(is_gradient)), self.manifest, self.stream), gradients])

    def _live(self, subject: Subject, asked: Questions) -> pa.Table:
        """What training recorded. Another manifest's records answer other questions, even where they carry the same names.

        The manifest that this one extends asks the same ones of its experiments, which `plan --extends` has compared.
        """
        if subject.record.manifest_fingerprint not in (self.manifest.fingerprint, self.manifest.record["extends"]):
            reason = f"the {subject.label} was trained with the probes of another manifest"
            return live_responses(self.probes, asked, PROBES.empty_table(), subject.label, reason)
        return live_responses(self.probes, asked, read_recorded(subject.record.path), subject.label)

    def loaded(self, subject: Subject, state: int) -> LanguageModel:
        """The subject's model in one state, until the next call."""
        precision = self.precision or trained_in(subject)
        numbers = subject.record.record["model"]
        shape = ModelShape(**{field.name: numbers[field.name] for field in dataclasses.fields(ModelShape)})
        if self._built is None or (self._built.shape, self._built.precision) != (shape, precision):
            self._built = None  # before the next one is built: both may not fit
            config = subject.record.record["config"]
            self._built = build_model(shape, self.layout, precision, config["seeds"]["init"], config["training"]["fp8_recipe"])
        load_checkpoint(subject.checkpoints[state], self._built, None)
        return self._built


def trained_in(subject: Subject) -> Precision:
    """The precision of the run that made the model."""
    return subject.record.record["config"]["training"]["precision"]


def read_recorded(run_dir: Path) -> pa.Table:
    """PROBES that training wrote, of all attempts; empty where it asked none."""
    path = run_dir / RECORDED_NAME
    if not path.exists():
        return PROBES.empty_table()
    try:
        return pq.read_table(path).cast(PROBES)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). The answers recorded in training are damaged: restore the file, or train again."
        ) from error
