"""Texts of your own, without code: a JSON lines file and a few keys of YAML.

Question: what does the model remember of these texts, by number of copies?
Design: the key deals the texts of the file to numbers of copies, one of which is 0, within each `group`; texts of one `cluster` (passages of
    one book, paraphrases of one fact) get the same number. So inserted and held-out texts differ by a draw alone. Every statistic counts a
    cluster once, with the mean of its texts.
Conditions: x1, x4, ... for the `copies`, and held-out for 0.
Metric: with `loss` the log-likelihood of the text in nats per token; with `membership` the same, but as an attack: AUC, and the true positive rate at
    the false positive rate `fpr`; with `completion` 1 where the greedy continuation of the prompt begins with the target; with `choice` 1 where
    the target is likelier after the prompt than every one of the choices, in nats per character. Each is run minus twin where there is a
    twin. Primary: texts with the most copies against held-out ones, by a rank sum within groups; `loss`, `completion` and `choice`
    give the difference of means, `membership` the AUC. Secondary: each number of copies.
Source: `source` and `file`. Licence: `licence`, which is required.
File: one object a line. `id` (text or number, unique) and what is inserted: `text`, between two EOS; or `token_ids`, exactly as they are; or `prompt` and
    `target`, in a row between two EOS. `completion` asks for `prompt` and `target`, `choice` also for `choices`, a list of wrong ones.
    `group` and `cluster` may be there. Numbers of items are hashes of ids: the order of lines has no meaning.
Traps: write the space before a word into the target, not at the end of the prompt. Texts that occur in the base corpus are known to the twin too: search for
    them first. The same text under two ids is refused unless they share a cluster, since one could be held out and the other inserted.
Parameters: file; licence; source; copies; window, part of training as fractions; control_fraction, share of the clusters held out (otherwise
    as many as in any other condition); metric; fpr; smallest_effect of interest in the unit of the primary (a fifth of it counts as none).
Example: {"id": "kelp-7", "group": "rivers", "prompt": "The river Kelp ends in", "target": " Lake Odran.", "choices": [" Lake Velm."]}
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import orjson
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtr, ndtri

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import Measure, contrast_score, units_of
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.protocol import Analysis, Experiment, Greedy, Item, LogLikelihood, Outcome, Probe, Request, Score
from megatron_exp.experiments.text_lines import read_entries
from megatron_exp.seeding import Words
from megatron_exp.statistics.roc import tpr_at_fpr, tpr_interval, tpr_p

Copies = Annotated[int, Field(ge=0, le=65_535)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Metric = Literal["loss", "completion", "choice", "membership"]

_CONTROL = "held-out"
_LARGEST_SMALLEST_P = 0.01
"""An assignment that cannot give a smaller p than this is refused: no result could be told from chance."""
_HELD_OUT_PER_FPR = 10
"""A false positive rate is counted over at least this many times its inverse."""
_PRIMARY: dict[Metric, tuple[str, str, float, str]] = {
    "loss": ("loss", "nats per token", 0.05, "mean log-likelihood per token of the texts"),
    "completion": ("completion", "fraction", 0.05, "share of prompts that greedy decoding completes with the target"),
    "choice": ("choice", "fraction", 0.05, "share of prompts after which the target is likelier than every choice"),
    "membership": ("auc", "AUC", 0.05, "probability that a text scores above a held-out one"),
}
"""Name, unit, smallest effect of interest and estimand of the primary."""
_SIMULATED_BASE = 0.3
_SHARED_VARIANCE = 0.25


class Texts(Experiment):
    """A file's texts in graded numbers of copies, against held-out texts of the same file."""

    title: ClassVar[str] = "Own texts"
    question: ClassVar[str] = "What does the model remember of these texts, by number of copies?"
    citation: ClassVar[str] = "the user's own"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    file: Path = Field(exclude=True)  # its content is in the items; where it lies must not count in the manifest's fingerprint
    licence: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)] = "texts of the user"
    copies: tuple[Copies, ...] = (0, 1, 4, 16)
    window: tuple[Fraction, Fraction] = (0.0, 1.0)
    control_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    metric: Metric = "loss"
    fpr: Annotated[float, Field(gt=0, lt=1)] = 0.01
    smallest_effect: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Texts":
        if 0 not in self.copies or len(set(self.copies)) < max(2, len(self.copies)):
            raise ValueError(f"copies must hold 0 (held out, as control) and other numbers, none twice, got {list(self.copies)}")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        return self

    @property
    def measure(self) -> Measure:
        """What the primary estimates."""
        return "auc" if self.metric == "membership" else "difference"

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """One item for each line, with the number of copies its cluster was dealt."""
        entries = list(read_entries(self.file, self.metric, context))
        groups = {entry.cluster: entry.group for entry in entries}
        assigned = context.assign(list(groups), self._counts(len(groups), context), groups)
        self._check_sizes(assigned, groups, context)
        for entry in entries:
            condition = assigned[entry.cluster]
            yield Item(
                item=entry.number,
                condition=condition,
                role="control" if condition == _CONTROL else "treated",
                payload=entry.payload,
                assignment_unit=entry.cluster,
                stratum=entry.group,
                cluster=entry.cluster,
                source=self.source,
                licence=self.licence,
                metadata={"id": entry.id, "copies": self._conditions[condition], "asked": entry.asked},
            )

    @property
    def _conditions(self) -> dict[str, int]:
        """{condition: copies}, held-out last."""
        return {f"x{copies}": copies for copies in sorted(self.copies) if copies} | {_CONTROL: 0}

    def _counts(self, num: int, context: Context) -> dict[str, int]:
        """Clusters per condition: equal shares, or the share of the controls as asked and equal shares of the rest."""
        names = list(self._conditions)
        held_out = num // len(names) if self.control_fraction is None else round(num * self.control_fraction)
        each, more = divmod(num - held_out, len(names) - 1)
        counts = {name: each + (index < more) for index, name in enumerate(names[:-1])} | {_CONTROL: held_out}
        if not all(counts.values()):
            raise UserError(
                f"Experiment {context.experiment}: {self.file} holds {num} texts or clusters, too few for the conditions {', '.join(names)} "
                f"({counts}). Add texts, or ask for fewer numbers of copies."
            )
        return counts

    def _check_sizes(self, assigned: dict[int, str], groups: dict[int, str], context: Context) -> None:
        """UserError where the primary could not reach a small p, or the false positive rate could not be counted."""
        most = f"x{max(self.copies)}"
        where = f"Experiment {context.experiment}: {self.file}"
        sizes = Counter((groups[cluster], condition) for cluster, condition in assigned.items())
        possible = math.prod(math.comb(sizes[g, most] + sizes[g, _CONTROL], sizes[g, most]) for g in set(groups.values()))
        if possible * _LARGEST_SMALLEST_P < 1:
            raise UserError(
                f"{where} gives too few held-out texts or clusters: those of {most} and {_CONTROL} can be dealt in {possible} ways within their groups, "
                f"so no p below {1 / possible:.2g} is possible. Add texts, ask for fewer numbers of copies, or merge groups."
            )
        held_out, needed = sum(name == _CONTROL for name in assigned.values()), math.ceil(_HELD_OUT_PER_FPR / self.fpr)
        if self.metric == "membership" and held_out < needed:
            raise UserError(
                f"{where} gives {held_out} held-out texts or clusters, but a true positive rate at {self.fpr:g} false positives needs {needed}. "
                f"Set fpr to {_HELD_OUT_PER_FPR / held_out:.2g} or more, raise control_fraction, or add texts."
            )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """The copies of every inserted text, anywhere in the window."""
        where = context.window(self.window)
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=where, copies=item.metadata["copies"])

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`text`: the whole text. `completion`: the prompt is continued. `target` and `choice-1`, ...: each after the prompt. In the final state."""
        del placed
        eos = context.tokenizer.eos_id
        for item in items:
            if self.metric in ("loss", "membership"):
                assert item.payload is not None
                end = len(item.payload) - int(item.payload[-1] == eos)
                yield Probe(item=item.item, name="text", ask=LogLikelihood(item.payload, 1, end))
                continue
            prompt, *endings = [context.tokenizer.encode(text) for text in item.metadata["asked"]]
            start = np.concatenate([[eos], prompt]).astype(np.int32)
            if self.metric == "completion":
                yield Probe(item=item.item, name="completion", ask=Greedy(start, len(endings[0]), endings[0]))
                continue
            for number, ending in enumerate(endings):
                tokens = np.concatenate([start, ending]).astype(np.int32)
                name = f"choice-{number}" if number else "target"
                yield Probe(item=item.item, name=name, ask=LogLikelihood(tokens, len(start), len(tokens)))

    @property
    def dependence(self) -> Dependence:
        """Log-likelihood of the texts; share of prompts completed; how much likelier the target is than the likeliest choice: as the metric is."""
        if self.metric == "completion":
            return Dependence(probes=("completion",), unit="fraction", smallest_effect=0.02)
        if self.metric == "choice":
            return Dependence(probes=("target", "choice-*"), unit="nats", smallest_effect=0.05)
        return Dependence(probes=("text",), smallest_effect=0.01)

    def item_values(self, items: pa.Table, responses: pa.Table) -> np.ndarray:
        """For the metric choice, target minus likeliest choice; NaN where one of them was not scored."""
        if self.metric != "choice":
            return super().item_values(items, responses)
        frame = joined(items, responses)
        target = frame.of_probe("target")
        best = {item: float(np.max(frame.run[(frame.probe != "target") & (frame.item == item)])) for item in target.item.tolist()}
        return target.run - np.array([best[item] for item in target.item.tolist()])

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary, the same by number of copies, the twin's check, and the rate of an attack."""
        name, unit, effect, estimand = _PRIMARY[self.metric]
        effect = self.smallest_effect or effect
        null = 0.5 if self.measure == "auc" else 0.0
        shared: dict[str, Any] = {
            "unit": unit,
            "test": "rank sum within groups",
            "null": null,
            "margin": effect / 5,
            "smallest_effect": effect,
        }
        most = f"x{max(self.copies)}"
        against = "" if self.measure == "auc" else f", minus that of {_CONTROL}"
        outcomes = [
            Outcome(name=name, estimand=f"{estimand}, of {most}{against}", side="greater", family="primary", **shared),
            Outcome(name=f"{name}-by-copies", estimand=f"{estimand}, by copies{against}", side="greater", family="secondary", **shared),
            Outcome(name="control:twin", estimand="the primary from the twin alone", side="two-sided", family="secondary", **shared),
        ]
        if self.metric == "membership":
            rate = Outcome(
                name="tpr",
                estimand=f"share of texts above the threshold that {self.fpr:g} of held-out ones pass",
                unit="fraction",
                test="exact rank test",
                side="greater",
                family="secondary",
                null=self.fpr,
                margin=self.fpr,
                smallest_effect=2 * self.fpr,
            )
            outcomes.append(rate)
        return Analysis(tuple(outcomes))

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The primary at every state there are responses for, and every number of copies."""
        name, most = _PRIMARY[self.metric][0], f"x{max(self.copies)}"
        frame = _values(joined(items, responses), self.metric)
        for step in frame.steps:
            now = frame.at(step)
            extremes = now.where(np.isin(now.condition, (most, _CONTROL)))
            yield contrast_score(extremes, name, most, step, "greater", measure=self.measure)
            if now.has_twin:
                yield contrast_score(extremes, "control:twin", most, step, "two-sided", measure=self.measure, of_twin=True)
            for condition in [condition for condition in self._conditions if condition != _CONTROL]:
                chosen = now.where(np.isin(now.condition, (condition, _CONTROL)))
                yield contrast_score(chosen, f"{name}-by-copies", condition, step, "greater", measure=self.measure)
                if self.metric == "membership":
                    yield self._rate(chosen, condition, step)

    def _rate(self, frame: Frame, condition: str, step: int) -> Score:
        """The true positive rate of one condition; clusters count once."""
        units = units_of(frame, frame.change)
        members, others = units.values[units.treated], units.values[~units.treated]
        num_unscored = int((~np.isfinite(frame.change)).sum())
        shared: dict[str, Any] = {"outcome": "tpr", "condition": condition, "step": step, "n": len(frame) - num_unscored}
        shared |= {"num_clusters": len(units.values), "num_unscored": num_unscored}
        if not len(members) or len(others) < _HELD_OUT_PER_FPR / self.fpr:
            return Score(
                **shared, estimate=float("nan"), reason=f"{len(members)} inserted and {len(others)} held-out clusters were scored: too few"
            )
        rate = tpr_at_fpr(members, others, self.fpr)
        low, high = tpr_interval(members, others, Words.of(0, "score", frame.experiment, "tpr", condition), self.fpr)
        p, test = tpr_p(members, others, self.fpr), f"exact rank test of the rate, bootstrap interval, {frame.compared}"
        return Score(**shared, estimate=rate, low=low, high=high, control=self.fpr, difference=rate - self.fpr, p=p, test=test)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Clusters share a quarter of the noise's variance; the effect grows with the logarithm of the copies, up to `effect`."""
        frame = asked(items, probes)
        share = np.log2(1.0 + frame.meta("copies")) / np.log2(1.0 + max(self.copies))
        if self.metric in ("completion", "choice"):
            right = _drawn(frame, words.child("run")) < _SIMULATED_BASE + effect * share
            twin_right = _drawn(frame, words.child("twin")) < _SIMULATED_BASE
            if self.metric == "completion":
                return frame.filled(right, twin_right).responses()
            is_target, lengths = frame.probe == "target", _characters(frame)
            nats = [lengths * np.where(is_target, np.where(one, -1.0, -3.0), -2.0) for one in (right, twin_right)]
            return frame.filled(*nats).responses()
        noise = 0.1 * ndtri(_drawn(frame, words.child("change")))
        shift = effect if self.metric == "loss" else 0.1 * _unit_spread(frame) * np.sqrt(2.0) * ndtri(min(0.5 + effect, 0.9999))
        twin = -4.0 + 0.5 * words.child("twin").normals(len(frame))
        return frame.filled((twin + noise + shift * share) * frame.num_tokens, twin * frame.num_tokens).responses()


def _values(frame: Frame, metric: Metric) -> Frame:
    """One row per item and state with the metric's value; NaN where anything it needs was not scored."""
    if metric == "completion":
        return frame.of_probe("completion")
    if metric == "choice":
        return _choices(frame)
    text = frame.of_probe("text")
    return text.filled(text.run / text.num_tokens, text.twin / text.num_tokens)


def _choices(frame: Frame) -> Frame:
    """1.0 where the target has more nats per character than every choice, else 0.0."""
    is_target, lengths = frame.probe == "target", _characters(frame)
    question = np.unique(np.stack([frame.item, frame.step]), axis=1, return_inverse=True)[1].reshape(-1)
    hits = []
    for values in (frame.run / lengths, frame.twin / lengths):
        known = np.where(np.isnan(values), np.inf, values)  # so that an unscored choice is never overtaken
        best = np.full(len(values), -np.inf)
        np.maximum.at(best, question[~is_target], known[~is_target])
        target, rival = known[is_target], best[question[is_target]]
        hits.append(np.where(np.isinf(target) | np.isinf(rival), np.nan, target > rival))
    return frame.where(is_target).filled(*hits)


def _characters(frame: Frame) -> np.ndarray:
    """float64 [rows]: characters of the ending that each row is about."""
    numbers = [int(name.removeprefix("choice-")) if name.startswith("choice-") else 0 for name in frame.probe]
    endings = {text: orjson.loads(text)["asked"][1:] for text in set(frame.metadata_json)}
    return np.array([len(endings[text][number]) for text, number in zip(frame.metadata_json, numbers, strict=True)], np.float64)


def _unit_spread(frame: Frame) -> float:
    """Standard deviation of the mean of a cluster (of median size) of values that `_drawn` makes normal: an AUC compares such means."""
    members = frame.where(np.unique(frame.item, return_index=True)[1]).cluster
    size = float(np.median(np.unique(members, return_counts=True)[1]))
    return float(np.sqrt(_SHARED_VARIANCE + (1 - _SHARED_VARIANCE) / size))


def _drawn(frame: Frame, words: Words) -> np.ndarray:
    """float64 [rows] uniform on (0, 1), correlated within clusters."""
    cluster = np.unique(frame.cluster, return_inverse=True)[1]
    shared = words.child("clusters").normals(int(cluster.max()) + 1)[cluster]
    return ndtr(np.sqrt(_SHARED_VARIANCE) * shared + np.sqrt(1 - _SHARED_VARIANCE) * words.child("rows").normals(len(frame)))
