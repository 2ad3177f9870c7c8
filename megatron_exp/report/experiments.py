"""One section for each experiment: question, design, plots, results, an example."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.display.numbers import count, counted
from megatron_exp.report.effects import Row, natural, outcome_pictures
from megatron_exp.report.figures import Picture
from megatron_exp.report.gather import Inputs
from megatron_exp.report.inserted import interventions
from megatron_exp.report.outputs import Output, outputs_of
from megatron_exp.report.overview import primary_rows
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer

_MAX_ROWS = 400
_KIND_WORDS = {
    "swap": "whole training samples replaced",
    "tokens": "texts written over training tokens",
    "splice": "texts spliced in at document borders",
    "noise": "noise added to input embeddings",
    "mask": "stretches taken out of the loss",
}


@dataclass(frozen=True)
class Example:
    """A payload of the experiment. text: None where it is hidden."""

    item: int
    condition: str
    num_tokens: int
    source: str
    licence: str
    sensitive: bool
    text: str | None


@dataclass(frozen=True)
class ExperimentSection:
    """Everything the page shows about one experiment.

    verdict: of the newest evaluation, None without one. primary: rows of the verdict. rows: all tested rows and those of the latest
    state. other_rows: the rest, at most 400. unscored: what could not be scored, in sentences.
    """

    name: str
    title: str
    question: str
    citation: str
    enabled: bool
    design: list[str]
    outcomes: list[dict[str, Any]]
    verdict: str | None
    unscored: list[str]
    pictures: list[Picture]
    primary: list[Row]
    rows: list[Row]
    other_rows: list[Row]
    num_rows_left_out: int
    example: Example | None
    outputs: list[Output]


def experiment_sections(inputs: Inputs, *, show_text: bool) -> list[ExperimentSection]:
    """All experiments of the manifest, in its order."""
    items = inputs.manifest.items()
    tokenizer = Corpus.open(inputs.manifest.corpus_path).tokenizer() if show_text else None
    return [
        _section(inputs, name, items.filter(pc.equal(items["experiment"].cast(pa.string()), name)), tokenizer)
        for name in inputs.manifest.experiments
    ]


def _section(inputs: Inputs, name: str, items: pa.Table, tokenizer: Tokenizer | None) -> ExperimentSection:
    analysis = inputs.manifest.analyses[name]
    rows = sorted(
        inputs.results.of(name), key=lambda row: (not row["primary"], natural(row["outcome"]), natural(row["condition"]), row["step"])
    )
    latest = max((row["step"] for row in rows), default=0)
    first = [row for row in rows if row["verdict"] or row["step"] == latest]
    other = [row for row in rows if not (row["verdict"] or row["step"] == latest)]
    evaluated = inputs.results.record.get("experiments", {}).get(name, {})
    return ExperimentSection(
        name=name,
        title=analysis["title"],
        question=analysis["question"],
        citation=analysis["citation"],
        enabled=not inputs.run.baseline and name not in inputs.run.masked,
        design=_design(inputs, name, items),
        outcomes=analysis["outcomes"],
        verdict=evaluated.get("verdict"),
        unscored=[
            f"{model}: {count(number)} ({reason})"
            for model, reasons in evaluated.get("unscored", {}).items()
            for reason, number in reasons.items()
        ],
        pictures=outcome_pictures(rows, {outcome["name"]: outcome for outcome in analysis["outcomes"]}),
        primary=primary_rows(rows),
        rows=first,
        other_rows=other[:_MAX_ROWS],
        num_rows_left_out=max(len(other) - _MAX_ROWS, 0),
        example=_example(inputs, items, tokenizer),
        outputs=outputs_of(inputs, name, show_text=tokenizer is not None),
    )


def _design(inputs: Inputs, name: str, items: pa.Table) -> list[str]:
    """The design in sentences, from the tables: so it says what was done, not what was meant."""
    roles = Counter(items["role"].to_pylist())
    conditions = sorted(set(items["condition"].to_pylist()), key=natural)
    clusters = len(np.unique(items["cluster"].to_numpy()))
    sentences = [
        f"{counted(roles['treated'], 'treated item')}, {counted(roles['control'], 'control item')} (prepared the same way, never inserted)"
        + (f", {counted(roles['probe-only'], 'item')} only asked about" if roles["probe-only"] else "")
        + f", in {counted(clusters, 'independent cluster')}."
    ]
    if len(conditions) > 1:
        sentences.append(f"{len(conditions)} conditions: {', '.join(conditions[:12])}{', …' if len(conditions) > 12 else ''}.")
    for kind, found in interventions(inputs, name).items():
        alone = " Nothing else touches these samples." if found["exclusive"] else ""
        sentences.append(f"Intervention: {_KIND_WORDS[kind]}, {counted(found['copies'], 'time')}.{alone}")
    return sentences


def _example(inputs: Inputs, items: pa.Table, tokenizer: Tokenizer | None) -> Example | None:
    """The first treated item that has a payload."""
    candidates = items.filter(pc.and_(pc.is_valid(items["payload"]), pc.equal(items["role"].cast(pa.string()), "treated")))
    if not candidates.num_rows:
        return None
    row = candidates.slice(0, 1).to_pylist()[0]
    text = None if tokenizer is None else tokenizer.decode(inputs.manifest.payload(row["payload"]))
    return Example(row["item"], row["condition"], row["num_tokens"], row["source"], row["licence"], row["sensitive"], text)
