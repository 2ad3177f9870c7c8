"""`eval`: from a trained run, its twin and the manifest to results with verdicts."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.checkpoint.distance import weight_distance
from megatron_exp.config.schema import ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.evaluation import output
from megatron_exp.evaluation.asking import Examiner, trained_in
from megatron_exp.evaluation.judging import JUDGE, Judge, judged, open_judge
from megatron_exp.evaluation.results import score_experiments
from megatron_exp.evaluation.subjects import Subject, checked_names, checked_states, open_reference, open_run
from megatron_exp.evaluation.units import Units
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.precision import Precision
from megatron_exp.parallel.layout import Layout, start_parallel
from megatron_exp.scoring.engine import Scorer
from megatron_exp.scoring.responses import responses_table
from megatron_exp.shards.corpus import Corpus

logger = logging.getLogger(__name__)


def evaluate(
    run_dir: Path,
    *,
    against: Path | None = None,
    states: list[int] | None = None,
    experiments: Sequence[str] | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    judge: Path | None = None,
    parallel: ParallelConfig | None = None,
    precision: Precision | None = None,
) -> Path:
    """Score the experiments of a run and write RUN/evals/step-XXXXXXXX, named after the last state.

    Args:
        run_dir: the run.
        against: its twin, or a run that is then an external reference: scored and described, never paired.
        states: model states in which final probes are asked. Default: the end of the run. Probes with states of their own are asked
            in those, up to the last of these.
        experiments: names; default all. The others keep their places in the primary family.
        overwrite: compute again even where this evaluation exists.
        command: recorded as given.
        judge: a Hugging Face directory whose model judges what was written, in the place of the twin.
        parallel: how the processes share a copy of the model; copies share the questions. Default: each process holds a copy. No layout
            changes what is asked; floating-point sums may differ in their last digits.
        precision: what checkpoints are computed in. Default: what each run was trained in, which FP8 leaves to a few GPUs.

    Returns:
        The directory. Where it holds results of the same inputs already, nothing is computed.

    Raises:
        UserError: where a checkpoint, manifest or corpus is missing or another one, or results of other inputs would be replaced.
    """
    run, manifest = open_run(run_dir)
    subjects = [run] if against is None else [run, open_reference(run, against)]
    wanted = checked_states(run, states)
    names = checked_names(manifest, experiments)
    if {trained_in(subject) for subject in subjects} == {precision}:
        precision = None
    inputs = output.inputs_record(manifest, subjects, wanted, names, judge, precision)
    directory = output.evaluation_path(run.record.path, wanted[-1])
    if output.existing(directory, inputs, overwrite=overwrite):
        logger.info("%s holds these results already", directory)
        return directory
    layout = start_parallel(parallel or ParallelConfig())
    try:
        units = Units(directory, inputs, writes=layout.is_main)
        responses = _responses(manifest, subjects, wanted, names, layout, judge, units, precision)
        if layout.is_main:
            results = score_experiments(manifest, names, responses, wanted[-1])
            record = output.results_record(manifest, subjects, inputs, responses, results, command)
            record["weight_distance"] = _weight_distances(subjects)
            output.write_evaluation(directory, record, responses, results)
            units.remove()
        layout.barrier()
    finally:
        layout.stop()
    return directory


def _responses(
    manifest: Manifest,
    subjects: Sequence[Subject],
    states: list[int],
    names: Sequence[str],
    layout: Layout,
    judge: Path | None,
    units: Units,
    precision: Precision | None,
) -> pa.Table:
    corpus = Corpus.open(manifest.corpus_path)
    manifest.check_corpus(corpus)
    probes = manifest.probes()
    probes = probes.filter(pc.is_in(probes["experiment"].cast(pa.string()), value_set=pa.array(names, pa.string())))
    examiner = Examiner(manifest, probes, manifest.open_stream(corpus), layout, units, precision)
    parts: list[pa.Table] = []
    for subject in subjects:
        newest = subject.newest
        if subject.label == "external" and newest is None:
            raise UserError(f"{subject.record.path} has no complete checkpoint to be scored. Train it to its end, or leave --against out.")
        parts += examiner.ask(subject, states if subject.label != "external" or newest is None else [newest])
    if JUDGE in probes["ask"].cast(pa.string()).unique().to_pylist():
        judging = open_judge(judge) if judge else _twin_as_judge(examiner, subjects)
        parts += judged(probes, parts, judging, manifest, corpus.tokenizer())
    return responses_table(parts, manifest.items())


def _twin_as_judge(examiner: Examiner, subjects: Sequence[Subject]) -> Judge | None:
    """The twin's newest checkpoint, which saw no insertion."""
    twin = next((subject for subject in subjects if subject.label == "twin" and subject.newest is not None), None)
    return None if twin is None or twin.newest is None else Judge(Scorer(examiner.loaded(twin, twin.newest)))


def _weight_distances(subjects: Sequence[Subject]) -> dict[str, dict[str, dict[str, float]]]:
    """{state: distance of run and twin by part} in every state that both have a checkpoint of."""
    run, *others = subjects
    twins = [other for other in others if other.label == "twin"]
    common = sorted(set(run.checkpoints).intersection(*(twin.checkpoints for twin in twins))) if twins else []
    return {str(state): weight_distance(run.checkpoints[state], twins[0].checkpoints[state]) for state in common}
