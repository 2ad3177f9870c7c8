"""`eval --model`: a Hugging Face model answers a manifest's probes. It is described, never paired, and nothing is tested."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from megatron_exp import __version__
from megatron_exp.errors import UserError
from megatron_exp.evaluation import output
from megatron_exp.evaluation.judging import judged, open_judge, without_judged
from megatron_exp.evaluation.results import Results, Row, of_experiment, unscored_counts
from megatron_exp.evaluation.subjects import Label, checked_names
from megatron_exp.evaluation.units import Units
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Outcome
from megatron_exp.fingerprint import of_json
from megatron_exp.manifest.reader import Manifest
from megatron_exp.parallel.device import choose_device
from megatron_exp.scoring.huggingface import HuggingFaceScorer
from megatron_exp.scoring.probes import score_probes
from megatron_exp.scoring.responses import responses_table, stamped
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LABEL: Label = "external"
SCOPE = "an external model; described, not tested"
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"


def evaluate_model(
    model: Path,
    manifest_path: Path,
    out: Path,
    *,
    experiments: Sequence[str] | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    judge: Path | None = None,
) -> Path:
    """Ask a Hugging Face model all that the run of a manifest would be asked, once, and write an evaluation directory.

    Args:
        model: a directory with config.json and safetensors weights.
        manifest_path: whose probes; its corpus must be there.
        out: directory to write: responses.parquet, results.parquet, results.json, as of a run.
        experiments: names; default all.
        overwrite: compute again even where results exist.
        command: recorded as given.
        judge: another Hugging Face directory, whose model judges what was written.

    Raises:
        UserError: where the model cannot be read, or reads another tokenizer than the manifest's.
    """
    manifest = Manifest.open(manifest_path)
    corpus = Corpus.open(manifest.corpus_path)
    manifest.check_corpus(corpus)
    _check_tokenizer(Path(model), corpus)
    names = checked_names(manifest, experiments)
    inputs = _inputs(manifest, Path(model), names, judge)
    if output.existing(out, inputs, overwrite=overwrite):
        logger.info("%s holds these results already", out)
        return out
    noise_dtype = torch.float32 if manifest.config.training.precision == "fp32" else torch.bfloat16
    scorer = HuggingFaceScorer.open(str(model), device=str(choose_device(0)), noise_dtype=noise_dtype)
    if corpus.vocabulary_size > scorer.vocabulary_size:
        raise UserError(
            f"The model {model} has embeddings for {scorer.vocabulary_size} ids, but the tokenizer of {manifest.path} has {corpus.vocabulary_size}. Give a "
            "model of this tokenizer."
        )
    responses = _ask(scorer, manifest, corpus, names, Units(Path(out), inputs, writes=True), judge)
    results = _described(manifest, names, responses)
    output.write_evaluation(Path(out), _record(manifest, Path(model), inputs, responses, results, command), responses, results)
    Units(Path(out), inputs, writes=True).remove()
    return out


def _check_tokenizer(model: Path, corpus: Corpus) -> None:
    """UserError where the model comes with another tokenizer; without any, nothing can be checked, and that is said."""
    if not (model / _TOKENIZER).is_file():
        logger.warning("%s has no %s: whether it reads the tokenizer of this corpus cannot be checked", model, _TOKENIZER)
        return
    own, ours = Tokenizer.load(model / _TOKENIZER), corpus.tokenizer()
    sample = "The quick brown fox: 17 + 4 = 21.\n\tprint('hello')  # \u00e9\u4e2d"
    if own.vocabulary_size != ours.vocabulary_size or not np.array_equal(own.encode(sample), ours.encode(sample)):
        raise UserError(
            f"The model {model} reads another tokenizer than the corpus {corpus.path} was made with, so the token ids of the probes mean other text to "
            "it. Plan on a corpus of its tokenizer."
        )


def _inputs(manifest: Manifest, model: Path, names: Sequence[str], judge: Path | None) -> dict[str, Any]:
    """Like those of a run; a model is its configuration and the names, sizes and times of its weight files."""
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.glob("*.safetensors"))
    config = hashlib.sha256((model / _CONFIG).read_bytes()).hexdigest() if (model / _CONFIG).is_file() else None
    return {
        **({"judge": str(Path(judge).resolve())} if judge else {}),
        "package_version": __version__,
        "manifest": manifest.fingerprint,
        "states": [manifest.geometry.steps],
        "experiments": list(names),
        "models": {LABEL: {"config": config, "weights": of_json(weights)}},
    }


def _ask(scorer: HuggingFaceScorer, manifest: Manifest, corpus: Corpus, names: Sequence[str], units: Units, judge: Path | None) -> pa.Table:
    """Responses to every probe of the run, each once; one unit per experiment."""
    probes, state = manifest.probes(), manifest.geometry.steps
    of = probes["of"].combine_chunks()
    is_asked = np.zeros(len(probes), bool)
    is_asked[pc.list_parent_indices(of).filter(pc.equal(pc.list_flatten(of), "run")).to_numpy()] = True
    parts = []
    for name in names:
        is_mine = pc.equal(probes["experiment"].cast(pa.string()), name).to_numpy(zero_copy_only=False)
        rows = without_judged(probes, np.flatnonzero(is_asked & is_mine))
        if (answers := units.find(LABEL, state, rows.tolist())) is None:
            logger.info("asking about %s: %d probes", name, len(rows))
            found = score_probes(scorer, probes.take(pa.array(rows)), manifest, manifest.open_stream(corpus))
            answers = stamped(found, LABEL, state)
            units.keep(LABEL, state, rows.tolist(), answers)
        parts.append(answers)
    chosen = probes.filter(pc.is_in(probes["experiment"].cast(pa.string()), pa.array(names, pa.string())))
    parts += judged(chosen, parts, open_judge(judge) if judge else None, manifest, corpus.tokenizer())
    return responses_table(parts, manifest.items())


def _described(manifest: Manifest, names: Sequence[str], responses: pa.Table) -> Results:
    """What the experiments estimate from this model alone, without p-values and verdicts."""
    entries, items = {entry.name: entry for entry in manifest.config.experiments}, manifest.items()
    column = responses.schema.get_field_index("model")
    as_run = responses.set_column(column, "model", pa.array(["run"] * len(responses)).cast(responses.schema.field("model").type))
    rows = []
    for name in names:
        registered = {outcome["name"]: Outcome(**outcome) for outcome in manifest.analyses[name]["outcomes"]}
        for score in load_experiment(entries[name]).score(of_experiment(items, name), of_experiment(as_run, name)):
            plain = replace(score, p=float("nan"), mde=float("nan"), test="", scope=SCOPE, exploratory=True)
            rows.append(Row(name, plain, registered.get(score.outcome), tested=False))
    return Results(rows, {})


def _record(
    manifest: Manifest, model: Path, inputs: dict[str, Any], responses: pa.Table, results: Results, command: Sequence[str]
) -> dict[str, Any]:
    return {
        "schema_version": output.SCHEMA_VERSION,
        "name": model.name,
        "model": str(model),
        "state": inputs["states"][-1],
        "is_final": True,
        "baseline": False,
        "masked": [],
        "manifest": {"path": str(manifest.path), "fingerprint": manifest.fingerprint},
        "against": None,
        "command": list(command),
        "inputs": inputs,
        "experiments": {
            name: {
                "title": manifest.analyses[name]["title"],
                "question": manifest.analyses[name]["question"],
                "verdict": None,
                "outcomes": results.outcomes(name),
                "unscored": unscored_counts(responses, name),
            }
            for name in inputs["experiments"]
        },
        "family_sizes": {},
    }
