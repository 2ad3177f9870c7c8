"""MemV: is a string still completed word for word by a model that never saw it?

Question: how much of verbatim completion is due to having read the very string, and how much remains ("lingers") when every slot that held it is
    taken out of training?
Design: documents of the training data are sampled by key; a reference model (the twin) is given the first prompt_tokens tokens of each,
    without anything before them, and continues greedily. A string of string_tokens is memorised where it writes the rest exactly. Half of the
    strings found, drawn by key within strata of their frequency, are removed: every training slot that holds one anywhere, contiguous in token
    space, is swapped whole for a pool slot that holds none. The other half is kept, chosen the same way and left in the data, so the effect is
    identified within the run; near-duplicates of each other (13 tokens in a row) share an arm and count as one cluster. Strings that a payload or
    a swapped-in slot of another experiment holds, or that stand in a slot that must keep its content (noise, splice), cannot be removed and
    are not studied at all, in either arm.
Conditions: removed, kept (strings; never inserted), replacement (the swapped slots; each says which strings it held).
Metric: share of strings whose greedy continuation is exact. Primary: kept minus removed, run minus twin on the same string: how much having
    read a string raises its completion; with `selection: likelihood` the same difference in nats per token of the continuation. Descriptive: the
    lingering fraction, completions of removed strings, at `states` (parts of training), with what remains of a string elsewhere: a
    near-duplicate (half its tokens in a row), a template (a fifth, in ten slots or more), counting (it repeats itself, or counts up), or nothing
    of these.
Source: arXiv 2509.23383 (MemV), after Liu et al. 2025 ("lingering sequences", n = 50, 40% linger). The paper removes 1,000 strings, 0.52% of its slots.
Licence: the training data's own; nothing is added. Strings are training text and marked sensitive.
Traps: the winner's curse. Strings are selected on one checkpoint, so there the twin completes all of them by construction and elsewhere fewer:
    a fall from that 100% is no effect of removal. The paper quotes 74.4% for the run in the state of selection; against the twin in other states
    the difference is 3 to 14 points. Kept strings carry the same curse as removed ones, so their difference does not. Near-copies survive a
    50-gram filter, and a kept string that shares a slot with a removed one loses that occurrence (`occurrences_left`): both make the
    difference smaller. A small model memorises little. With `selection: likelihood` the strings it finds easiest are taken instead, exact or
    not: these are easy for any model (counting, boilerplate), so the question becomes how much a copy lowers their loss, and lingering
    completions say little. Use it where `exact` finds fewer than min_strings, and say so. Classes are looked for in searched_slots slots: in a
    large run a rare near-duplicate is missed. In the paper `--reference-step` is the last state before the decay (90,000). CPDT does not
    apply: an absence cannot be applied at high intensity.
Parameters: design (the paper's has no kept strings; they cost nothing, so they are there in both); scale, a factor on num_strings and
    min_strings; string_tokens, prompt_tokens; num_sampled documents; num_strings, removed and kept together, at least min_strings, else
    planning stops; selection; states, as parts of training; searched_slots.
Example: prompt "Permission is hereby granted, free of charge, to any person", continuation " obtaining a copy of this software"; removed, 412 occurrences.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context, ReferenceLike
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import (
    Analysis,
    Experiment,
    Forbidden,
    Greedy,
    Item,
    LogLikelihood,
    Match,
    Outcome,
    Probe,
    Request,
    Score,
    Span,
)
from megatron_exp.experiments.verbatim_strings import (
    Found,
    Selection,
    classes,
    clusters,
    locate,
    memorised,
    removable,
    sampled_strings,
    seen,
    stream_of,
)
from megatron_exp.seeding import Words, key
from megatron_exp.statistics.normal import Side
from megatron_exp.statistics.proportions import wilson_interval
from megatron_exp.stream.slot import POOL

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]

_REMOVED, _KEPT, _SWAPPED = "removed", "kept", "replacement"
_NUM_STRATA = 4
_FEWEST_CLUSTERS = 8
_BASE_RATE = 0.75
"""Of completions in simulations."""


class VerbatimCompletion(PaperDesign, Experiment):
    """Memorised strings, half of them taken out of the training data."""

    title: ClassVar[str] = "Verbatim completion of unseen text"
    question: ClassVar[str] = "Is a memorised string still completed when every slot that held it is taken out of training?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment MemV"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "corpus", "pool", "tokenizer"})

    paper_effects: ClassVar[Mapping[str, float]] = {"completion": 0.06}
    """Clean minus run at the end of the paper's training (88% and 82% of strings, read from a figure)."""

    string_tokens: Annotated[int, Field(ge=4)] = 50
    prompt_tokens: Positive = 25
    num_sampled: Positive = 200_000
    num_strings: Annotated[int, Field(ge=2)] = 2_000
    min_strings: Annotated[int, Field(ge=2)] = 400
    selection: Selection = "exact"
    states: tuple[Fraction, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    searched_slots: Positive = 100_000

    @model_validator(mode="after")
    def _check(self) -> "VerbatimCompletion":
        if self.prompt_tokens >= self.string_tokens:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} leaves nothing of string_tokens {self.string_tokens} to be completed")
        if self.min_strings > self.num_strings:
            raise ValueError(f"min_strings {self.min_strings} is above num_strings {self.num_strings}")
        return self

    @property
    def dependence(self) -> Dependence:
        """None: the treatment is an absence."""
        return Dependence(untestable="its treatment is the absence of strings, which cannot be applied at high intensity in a short run")

    def kept_states(self, num_steps: int) -> tuple[int, ...]:
        """The states in which completion is asked; the last one is the end of training."""
        return tuple(sorted({max(1, round(part * num_steps)) for part in self.states} | {num_steps}))

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """The strings, dealt to removed and kept, and one item for each slot that is replaced."""
        if context.reference is None:
            raise UserError(f"Experiment {context.experiment} studies what a reference model has memorised. Give --reference.")
        found = self._chosen(context, context.reference)
        roots = clusters([one.tokens for one in found])
        strata = _strata(found, roots, context)
        units = list(strata)
        arms = context.assign(units, {_REMOVED: len(units) // 2, _KEPT: len(units) - len(units) // 2}, strata)
        held: dict[int, set[int]] = defaultdict(set)  # slot: numbers of the removed strings it holds
        for one, root in zip(found, roots, strict=True):
            for slot in seen(one, context.earlier).tolist() if arms[_number(found[root])] == _REMOVED else []:
                held[slot].add(_number(one))
        away = np.array(sorted(held), dtype=np.uint64)
        named = classes(context, found, away, self.searched_slots)
        for one, root, kind in zip(found, roots, named, strict=True):
            unit = _number(found[root])
            yield self._string(one, unit, arms[unit], strata[unit], kind, away, context)
        yield from _swapped_slots(held, found, arms, roots, context)

    def _chosen(self, context: Context, reference: ReferenceLike) -> list[Found]:
        """The strings of both arms; UserError where there are too few."""
        wanted, least = self.scaled(self.num_strings, 2), self.scaled(self.min_strings, 2)
        strings = sampled_strings(context, reference, self.num_sampled, self.string_tokens)
        candidates = memorised(context, reference, strings, self.prompt_tokens, self.selection, wanted)
        reasons: Counter[str] = Counter()
        chosen: list[Found] = []
        for one, reason in removable(locate(stream_of(context), candidates), context.earlier) if candidates else ():
            reasons[reason] += bool(reason)
            if not reason and len(chosen) < wanted:
                chosen.append(one)
        if len(chosen) >= least and len(set(clusters([one.tokens for one in chosen]))) >= _FEWEST_CLUSTERS:
            return chosen
        lost = "".join(f"; {number} are left out because {reason}" for reason, number in sorted(reasons.items()) if reason)
        how = "completes exactly" if self.selection == "exact" else "was asked about"
        raise UserError(
            f"Experiment {context.experiment} needs at least {least} strings ({_FEWEST_CLUSTERS} or more that are no near-duplicates of each other), but has "
            f"{len(chosen)}: the reference {how} {len(candidates)} of the beginnings of {len(strings)} different documents{lost}. "
            "Sample more documents (num_sampled), take shorter strings (string_tokens, prompt_tokens), a later state of the reference "
            "(--reference-step), fewer strings (min_strings), or `selection: likelihood`, which the docstring of the experiment explains."
        )

    def _string(self, one: Found, unit: int, arm: str, stratum: str, kind: str, away: np.ndarray, context: Context) -> Item:
        places = seen(one, context.earlier)
        return Item(
            item=_number(one),
            condition=arm,
            role="probe-only" if arm == _REMOVED else "control",
            payload=one.tokens,
            assignment_unit=unit,
            stratum=stratum,
            cluster=unit,
            spans=(Span("prompt", 0, self.prompt_tokens), Span("continuation", self.prompt_tokens, self.string_tokens)),
            source="training data",
            licence="that of the training data",
            sensitive=True,
            metadata={
                "class": kind,
                "occurrences": len(places),
                "slots": len(np.unique(places)),
                "occurrences_left": int((~np.isin(places, away)).sum()),
            },
        )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every slot that held a removed string shows a slot of the pool instead; token copies of others may lie on it."""
        for item in items:
            if item.role == "treated":
                source = np.array([POOL + item.metadata["pool_place"]], dtype=np.uint64)
                yield Request(item=item.item, arm=item.arm, kind="swap", where=Match((item.item,)), copies=1, source_slots=source)

    def forbidden(self, items: Sequence[Item]) -> Iterator[Forbidden]:
        """The removed strings: no payload and no slot that is swapped in may bring one back."""
        for item in items:
            if item.condition == _REMOVED and item.payload is not None:
                yield Forbidden(item.payload, f"the string {item.item} that it removed", in_sources=True)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`completion`: the greedy continuation; `continuation`: its likelihood. Of removed and kept strings alike, in all states."""
        del placed
        states = self.kept_states(context.geometry.steps)
        for item in items:
            if item.payload is not None:
                prompt, rest = item.payload[: self.prompt_tokens], item.payload[self.prompt_tokens :]
                yield Probe(item=item.item, name="completion", ask=Greedy(prompt, len(rest), target=rest), states=states)
                ask = LogLikelihood(item.payload, self.prompt_tokens, self.string_tokens)
                yield Probe(item=item.item, name="continuation", ask=ask, states=states)

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary by the way of selection, the other measure as secondary; lingering as description."""
        measures: dict[str, dict[str, Any]] = {
            "completion": {"unit": "fraction", "margin": 0.05, "smallest_effect": 0.1},
            "continuation": {"unit": "nats per token", "margin": 0.02, "smallest_effect": 0.1},
        }
        estimand = "{} of kept strings minus that of removed ones"
        ranks: dict[str, Any] = {"test": "rank sum within strata of frequency, by cluster"}
        what = {"completion": "exact greedy completion", "continuation": "log-likelihood of the continuation"}
        primary = self._primary
        return Analysis(
            (
                *(
                    Outcome(
                        name=name,
                        estimand=estimand.format(what[name]),
                        side="greater",
                        family="primary" if name == primary else "secondary",
                        **ranks,
                        **measures[name],
                    )
                    for name in sorted(measures, key=lambda name: name != primary)
                ),
                Outcome(
                    name="control:twin",
                    estimand="the primary's difference from the twin alone, which saw all strings",
                    side="two-sided",
                    family="secondary",
                    **ranks,
                    **measures[primary],
                ),
                Outcome(
                    name="lingering",
                    estimand="share of strings completed exactly, by arm and by what remains of them elsewhere",
                    test="none",
                    side="greater",
                    family="descriptive",
                    **measures["completion"],
                ),
            )
        )

    @property
    def _primary(self) -> str:
        return "completion" if self.selection == "exact" else "continuation"

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """Both differences and the lingering fractions at every state there are responses for."""
        frame = joined(items, responses)
        completion, continuation = frame.of_probe("completion"), frame.of_probe("continuation")
        for step in frame.steps:
            values = {"completion": completion.at(step), "continuation": _per_token(continuation.at(step))}
            for name in sorted(values, key=lambda name: name != self._primary):
                yield _difference(values[name], name, step)
            if frame.has_twin:
                yield _difference(values[self._primary], "control:twin", step, of_twin=True)
            yield from _lingering(values["completion"], step)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Three of four strings are completed; of removed ones a share of `effect` fewer (or `effect` nats per token are lost)."""
        frame = asked(items, probes)
        num, removed = len(frame), frame.role == "probe-only"
        lost = effect * removed
        completed = [
            words.child(model).uniforms(num) < np.clip(_BASE_RATE - shift, 0, 1) for model, shift in (("run", lost), ("twin", 0 * lost))
        ]
        twin = -1.0 + 0.3 * words.child("strings").normals(num)
        run = twin + 0.2 * words.child("change").normals(num) - lost
        is_completion = frame.probe == "completion"
        tokens = np.nan_to_num(frame.num_tokens, nan=1.0)
        values = (np.where(is_completion, exact, nats * tokens) for exact, nats in zip(completed, (run, twin), strict=True))
        return frame.filled(*values).responses()


def _number(one: Found) -> int:
    """An item number of the string itself."""
    return key(0, "verbatim", one.tokens.tobytes().hex()) >> 11


def _strata(found: Sequence[Found], roots: Sequence[int], context: Context) -> dict[int, str]:
    """{unit: stratum}: equal parts of the clusters by how often their strings are seen in training."""
    seen_in: Counter[int] = Counter()
    for one, root in zip(found, roots, strict=True):
        seen_in[_number(found[root])] += len(seen(one, context.earlier))
    ordered = sorted(seen_in, key=lambda unit: (seen_in[unit], unit))
    return {unit: f"frequency-{rank * _NUM_STRATA // len(ordered)}" for rank, unit in enumerate(ordered)}


def _swapped_slots(
    held: dict[int, set[int]], found: Sequence[Found], arms: dict[int, str], roots: Sequence[int], context: Context
) -> Iterator[Item]:
    """One item for each slot that is replaced, by a pool slot that holds no removed string."""
    removed = [one for one, root in zip(found, roots, strict=True) if arms[_number(found[root])] == _REMOVED]
    unfit = {int(slot) for one in removed for slot in one.pool}
    sources = context.take_pool("replacements", len(held), unfit).tolist()
    for slot, source in zip(sorted(held), sources, strict=True):
        yield Item(
            item=slot,
            arm=_SWAPPED,
            condition=_SWAPPED,
            role="treated",
            source="training data, from the pool",
            licence="that of the training data",
            metadata={"pool_place": source - POOL, "strings": sorted(held[slot])},
        )


def _per_token(frame: Frame) -> Frame:
    return frame.filled(frame.run / frame.num_tokens, frame.twin / frame.num_tokens)


def _difference(frame: Frame, outcome: str, step: int, *, of_twin: bool = False) -> Score:
    """Kept minus removed: `contrast_score` takes what is not a control minus the controls, so both are turned over."""
    turned = frame.filled(-frame.run, -frame.twin)
    side: Side = "two-sided" if of_twin else "greater"
    score = contrast_score(turned, outcome, "removed against kept", step, side, of_twin=of_twin)
    return replace(score, control=-score.control)


def _lingering(frame: Frame, step: int) -> Iterator[Score]:
    """Completed shares of both arms, and of the removed strings by class."""
    parts = {arm: frame.where(frame.condition == arm) for arm in (_REMOVED, _KEPT)}
    kinds = parts[_REMOVED].meta("class") if len(parts[_REMOVED]) else np.empty(0, object)
    parts |= {f"{_REMOVED}, {kind}": parts[_REMOVED].where(kinds == kind) for kind in sorted(set(kinds))}
    for condition, part in parts.items():
        known = part.run[np.isfinite(part.run)]
        of_twin = part.twin[np.isfinite(part.twin)]
        interval = wilson_interval(int(known.sum()), len(known))
        yield Score(
            outcome="lingering",
            condition=condition,
            step=step,
            n=len(known),
            num_clusters=len(set(part.cluster.tolist())),
            num_unscored=len(part) - len(known),
            estimate=float(known.mean()) if len(known) else float("nan"),
            low=interval.low,
            high=interval.high,
            twin=float(of_twin.mean()) if len(of_twin) else float("nan"),
            test="none; Wilson's interval",
            reason="" if len(known) else "no string was scored",
        )
