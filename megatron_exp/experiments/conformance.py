"""One check for every experiment, built in or third party: is it documented, controlled, reproducible, and does its score find what it claims?

    findings = check_experiment(MyExperiment(num_items=40), toy_context("mine"))

An empty list means the experiment may be trusted with a run; every finding is a sentence that says what is wrong.
"""

import inspect
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from megatron_exp.config.schema import Seeds
from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.draft import Draft, draft
from megatron_exp.experiments.protocol import Experiment, Item, LogLikelihood, Outcome, Score
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import POOL, Geometry

DOCUMENTED = ("Question", "Design", "Conditions", "Metric", "Source", "Licence", "Example")
"""What the docstring of an experiment (of its class or its module) must say, each as `Word:`."""
STRONG = 10.0
"""Multiple of the smallest effect of interest at which a primary must be detected."""
ALPHA = 0.05


def check_experiment(experiment: Experiment, context: Context) -> list[str]:
    """Everything that is wrong with `experiment` as planned in `context` (see `toy_context`); empty where nothing is.

    The context should be large enough that an effect of ten times the smallest one of interest is detected.
    """
    findings = [*_documentation(experiment), *_analysis(experiment)]
    try:
        first, again = draft(experiment, context), draft(experiment, replace(context, pool=ToyPool(len_of(context))))
    except UserError as error:
        return [*findings, f"it cannot be planned: {error}"]
    findings += [*_items(first), *_requests(first), *_probes(first, context), *_reproducible(experiment, context, first, again)]
    if not findings:  # scores of a broken design say nothing more
        findings += _scores(experiment, first)
    return findings


def null_p_values(experiment: Experiment, planned: Draft, num: int, words: Words) -> np.ndarray:
    """float64 [num, primary outcomes]: p-values of the primaries on simulated runs without an effect; uniform or larger if calibrated."""
    return simulated_primaries(experiment, planned, num, words, 0.0)[0]


def simulated_primaries(experiment: Experiment, planned: Draft, num: int, words: Words, effect: float) -> tuple[np.ndarray, float]:
    """P-values of the primaries where the first truly has size `effect`, float64 [num, primaries], and its mean smallest detectable effect."""
    names = [outcome.name for outcome in _primaries(experiment)]
    rows, detectable = [], []
    for index in range(num):
        scores = _tested(experiment, planned, effect, words.child("null", index))
        rows.append([scores[name].p for name in names])
        detectable.append(scores[names[0]].mde)
    return np.array(rows), float(np.mean(detectable))


# ---- a small world to try experiments in ----


@dataclass(frozen=True)
class ToyTokenizer:
    """Bytes as tokens: id = byte + 1, 0 ends a document, 257 to 511 are free ids. Every text has more tokens than with a real tokenizer."""

    vocabulary_size: int = 512
    eos_id: int = 0
    special_ids: frozenset[int] = frozenset({0})

    def encode(self, text: str) -> np.ndarray:
        """int32 ids, one for each UTF-8 byte."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + 1

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(one) - 1 for one in ids if 0 < one <= 256).decode(errors="replace")


@dataclass(eq=False)
class ToyPool:
    """Hands out places in order; enough for tests."""

    num_slots: int
    taken: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return self.num_slots - sum(map(len, self.taken.values()))

    def take(self, experiment: str, purpose: str, num: int, unfit: Collection[int] = ()) -> np.ndarray:
        """uint64 [num] slot ids."""
        if (experiment, purpose) in self.taken:
            return self.taken[experiment, purpose]
        away = {int(slot) for slots in self.taken.values() for slot in slots}.union(unfit)
        free = [POOL + place for place in range(self.num_slots) if POOL + place not in away]
        if num > len(free):
            raise UserError(f"Experiment {experiment} needs {num} pool slots for {purpose}, but {len(free)} are free. Raise pool.slots.")
        return self.taken.setdefault((experiment, purpose), np.array(free[:num], dtype=np.uint64))


@dataclass(frozen=True)
class ToyReference:
    """Answers drawn by key of the question: a model that knows nothing, but always says the same."""

    vocabulary_size: int
    state: int = 0
    fingerprint: str = "toy"

    def loglikelihood(self, sequences: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> np.ndarray:
        """float64 [n]: around -6 nats for each token."""
        drawn = [self._words(tokens).normals(1)[0] for tokens in sequences]
        return np.array([-6.0 * (end - start) + noise for start, end, noise in zip(starts, ends, drawn, strict=True)])

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens], never id 0."""
        written = [1 + self._words(prompt).integers(num_tokens, self.vocabulary_size - 1) for prompt in prompts]
        return np.array(written, np.int32).reshape(len(prompts), num_tokens)

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens], never id 0."""
        return self.greedy(prompts, num_tokens)

    def _words(self, tokens: np.ndarray) -> Words:
        return Words.of(0, "toy reference", np.asarray(tokens, np.int32).tobytes().hex())


def toy_context(
    experiment: str, *, steps: int = 600, batch: int = 8, length: int = 512, pool_slots: int = 512, assignment: int = 0, placement: int = 0
) -> Context:
    """A context without files: byte tokens, a pool, a reference that knows nothing, and the geometry given."""
    tokenizer = ToyTokenizer()
    return Context(
        experiment=experiment,
        geometry=Geometry(sequence_length=length, global_batch_size=batch, steps=steps),
        seeds=Seeds(assignment=assignment, placement=placement),
        tokenizer=tokenizer,
        pool=ToyPool(pool_slots),
        vocabulary_size=tokenizer.vocabulary_size,
        banned_tokens=tokenizer.special_ids,
        reference=ToyReference(tokenizer.vocabulary_size),
    )


def len_of(context: Context) -> int:
    """Pool slots of a toy context."""
    return context.pool.num_slots if isinstance(context.pool, ToyPool) else 0


# ---- the checks ----


def _documentation(experiment: Experiment) -> Iterator[str]:
    kind = type(experiment)
    text = f"{inspect.getdoc(kind)}\n{inspect.getdoc(sys.modules[kind.__module__])}"
    for word in DOCUMENTED:
        if f"{word}:" not in text and f"{word} (" not in text:
            yield f"its docstring does not say `{word}:`"
    for name in kind.model_fields:
        if name not in text:
            yield f"its docstring does not explain the parameter {name}"
    for name in ("title", "question", "citation"):
        if not getattr(kind, name, "").strip():
            yield f"it has no {name}"


def _primaries(experiment: Experiment) -> list[Outcome]:
    return [outcome for outcome in experiment.analysis.outcomes if outcome.family == "primary"]


def _analysis(experiment: Experiment) -> Iterator[str]:
    outcomes = experiment.analysis.outcomes
    names = [outcome.name for outcome in outcomes]
    if not _primaries(experiment):
        yield "its analysis has no primary outcome"
    if len(set(names)) < len(names):
        yield f"two of its outcomes share a name: {sorted(names)}"
    for outcome in outcomes:
        if not (outcome.estimand and outcome.unit and outcome.test):
            yield f"outcome {outcome.name} lacks an estimand, a unit or a test"
        if not 0 <= outcome.margin <= outcome.smallest_effect or outcome.smallest_effect == 0:
            yield f"outcome {outcome.name}: 0 <= margin <= smallest_effect and smallest_effect > 0 are needed"


def _items(planned: Draft) -> Iterator[str]:
    roles = {item.role for item in planned.items}
    for role, meaning in (("treated", "is inserted"), ("control", "is prepared the same way and never inserted")):
        if role not in roles:
            yield f"it has no {role} item: nothing {meaning}"
    for item in planned.items:
        name = f"item {item.item}, arm {item.arm}"
        if not 0 <= item.item < 2**53:
            yield f"{name}: item numbers lie in [0, 2**53)"
        if not item.source or not item.licence:
            yield f"{name} lacks a source or a licence"
        length = 0 if item.payload is None else len(item.payload)
        for span in item.spans:
            if not 0 <= span.start < span.end <= length:
                yield f"{name}: span {span.name} [{span.start}, {span.end}) does not lie in its payload of {length} tokens"


def _requests(planned: Draft) -> Iterator[str]:
    keys = [(request.item, request.arm, request.kind) for request in planned.requests]
    if len(set(keys)) < len(keys):
        yield "it makes two requests for the same item, arm and kind"
    inserted = {(request.item, request.arm) for request in planned.requests}
    if planned.controller:
        inserted |= {(item, planned.controller.arm) for item in planned.controller.bank}
    forgotten = [item for item in planned.items if item.role == "treated" and (item.item, item.arm) not in inserted]
    if forgotten:
        yield f"{len(forgotten)} treated items are never requested, such as item {forgotten[0].item}"


def _probes(planned: Draft, context: Context) -> Iterator[str]:
    role_of = {(item.item, item.arm): item.role for item in planned.items}
    names: dict[str, set[str]] = {}
    seen: set[tuple[int, str, str]] = set()
    for probe in planned.probes:
        name = f"probe {probe.name} of item {probe.item}, arm {probe.arm}"
        if (probe.item, probe.arm) not in role_of:
            yield f"{name} asks about an item that does not exist"
            continue
        if (probe.item, probe.arm, probe.name) in seen:
            yield f"{name} occurs twice"
        seen.add((probe.item, probe.arm, probe.name))
        names.setdefault(probe.name, set()).add(role_of[probe.item, probe.arm])
        if isinstance(probe.ask, LogLikelihood) and not 1 <= probe.ask.start < probe.ask.end <= len(probe.ask.tokens):
            yield f"{name}: [{probe.ask.start}, {probe.ask.end}) is no part of its {len(probe.ask.tokens)} tokens after the first"
        if any(not 0 <= state <= context.geometry.steps for state in probe.states):
            yield f"{name} is asked of states outside 0 to {context.geometry.steps}"
    if not any("control" in roles and roles & {"treated", "probe-only"} for roles in names.values()):
        yield "no probe is asked of both controls and treated (or probe-only) items, so there is nothing to compare"


def _reproducible(experiment: Experiment, context: Context, first: Draft, again: Draft) -> Iterator[str]:
    """The same twice, whatever the order in which items are handed around."""
    if _designs(first.items) != _designs(again.items):
        yield "planning it twice gives different items: draw everything from `context`, by key"
    elif not first.insertions.equals(again.insertions) or not first.probe_table.equals(again.probe_table):
        yield "planning it twice gives different requests or probes: draw everything from `context`, by key"
    backwards = list(reversed(first.items))
    if experiment.controller(backwards, context) != first.controller:
        yield "its controller depends on the order of the items"
    requests = {(r.item, r.arm, r.kind, r.copies, r.where) for r in experiment.requests(backwards, context)}
    if requests != {(r.item, r.arm, r.kind, r.copies, r.where) for r in first.requests}:
        yield "its requests depend on the order of the items"
    probes = {(p.item, p.arm, p.name, p.states) for p in experiment.probes(backwards, first.insertions, context)}
    if probes != {(p.item, p.arm, p.name, p.states) for p in first.probes}:
        yield "its probes depend on the order of the items"


def _designs(items: Sequence[Item]) -> dict[tuple[int, str], tuple[str, str, str, bytes]]:
    return {
        (item.item, item.arm): (item.condition, item.role, item.stratum, b"" if item.payload is None else item.payload.tobytes())
        for item in items
    }


def _tested(experiment: Experiment, planned: Draft, effect: float, words: Words) -> dict[str, Score]:
    """The primaries' scores on simulated responses, each with the first condition it is reported for."""
    responses = experiment.simulate(planned.item_table, planned.probe_table, effect, words)
    scores: dict[str, Score] = {}
    for score in experiment.score(planned.item_table, responses):
        scores.setdefault(score.outcome, score)
    return scores


def _scores(experiment: Experiment, planned: Draft) -> Iterator[str]:
    declared = {outcome.name for outcome in experiment.analysis.outcomes}
    words = Words.of(0, "conformance", type(experiment).__name__)
    for outcome in _primaries(experiment):
        strong = _tested(experiment, planned, STRONG * outcome.smallest_effect, words.child("strong"))
        if undeclared := sorted({name for name, score in strong.items() if name not in declared and not score.exploratory}):
            yield f"it scores outcomes that its analysis does not declare: {undeclared}"
        yield from _primary_score(outcome, strong)
        none = _tested(experiment, planned, 0.0, words.child("none")).get(outcome.name)
        if none is None or not math.isfinite(none.estimate):
            yield f"primary {outcome.name} has no estimate where there is no effect"
    yield from _missing_answers(experiment, planned, words)


def _primary_score(outcome: Outcome, strong: dict[str, Score]) -> Iterator[str]:
    score = strong.get(outcome.name)
    if score is None or not math.isfinite(score.estimate):
        yield f"primary {outcome.name} has no estimate on simulated responses"
        return
    effect = score.estimate - outcome.null
    if outcome.side != "two-sided" and (effect > 0) != (outcome.side == "greater"):
        yield f"primary {outcome.name}: a true effect moves it to {score.estimate:.4g}, against its declared side {outcome.side!r}"
    if not score.p < ALPHA:
        yield f"primary {outcome.name}: p = {score.p:.3g} at {STRONG:g} times the smallest effect of interest; the design is too small to find it"


def _missing_answers(experiment: Experiment, planned: Draft, words: Words) -> Iterator[str]:
    """Without a twin it still scores; without any answer it says why, and never zero."""
    effect = STRONG * _primaries(experiment)[0].smallest_effect
    responses = experiment.simulate(planned.item_table, planned.probe_table, effect, words.child("strong"))
    models = responses["model"].cast(pa.string())
    alone = responses.filter(pa.array([model == "run" for model in models.to_pylist()]))
    if not any(
        score.outcome == _primaries(experiment)[0].name and math.isfinite(score.estimate)
        for score in experiment.score(planned.item_table, alone)
    ):
        yield "without a twin its first primary has no estimate"
    empty = responses
    for name, kind in (("value", pa.float64()), ("nats", pa.float64()), ("text", pa.string())):
        empty = empty.set_column(empty.schema.get_field_index(name), name, pa.nulls(len(responses), kind))
    for score in experiment.score(planned.item_table, empty):
        if math.isfinite(score.estimate) or not score.reason:
            yield f"outcome {score.outcome}: no response was scored, yet it has an estimate or no reason"
            break
