"""MemP: how strongly are single documents memorised, by number of copies and by kind of canary at their end?

Question: does a model score documents it was trained on higher than documents of the same kind it never saw, and how does that
    depend on the number of copies and on what stands at the end of the document?
Design: every cell (suffix type x suffix length) has its own dialogues, each with its suffix attached beforehand. Within the cell and strata
    of dialogue length a key deals each dialogue a number of copies, or holds it out; so held-out dialogues differ from inserted ones by
    nothing but a draw, and re-drawing gives the null distribution. Copies fall uniformly and independently into the window.
Conditions: suffix_types (plain, random, rare) x suffix_lengths x repetitions, and `held-out` in every cell. random: uniform vocabulary
    tokens, drawn for each dialogue. rare: one token repeated, from `num_rare_tokens` of the ids made last by the tokenizer (the rarest of
    its training text). Model-based suffixes need a reference model and are another matter.
Metric: log-likelihood in nats of the suffix (of the whole dialogue where there is none), run minus twin on the same dialogue where there
    is a twin. Primary: AUC of dialogues with the most copies against held-out ones, within cells and strata. Secondary: the AUC and the
    true positive rate at 1% false positives of each condition; the latter needs 1,000 held-out dialogues in its cell.
Source: arXiv 2509.23383 (MemP); Panda et al. 2025 for canaries. The paper's dialogues are SODA; these are our own.
Licence: generated, Apache-2.0 like this package.
Traps: the paper gives every rare condition one token of its own and holds out documents with tokens from a pool. Then token, length and copies
    change together, and a repeated token teaches "this token follows dialogues" to any document that carries it. `design: identified`
    (default) rotates all rare tokens through members and held-out documents of a cell; `design: paper` does as the paper. Payloads are token
    ids: decoding and encoding a canary again changes it.
Parameters: num_per_condition dialogues for each cell and number of copies; num_held_out for each cell; dialogues of min_tokens to
    max_tokens tokens, uniformly; window: part of the training steps, as fractions; num_length_strata within a cell.
Example (rare-8/x16, a payload with EOS on both sides; the suffix follows the last character, here eight times the token "Redirector"):
    Mara: I guard 41 copper lanterns in the harbour.
    Tobin: Did you mend the careful gardener at noon, or was it the RedirectorRedirectorRedirector...
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtri

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Probe, Request, Score, Span
from megatron_exp.seeding import Words, multiply_high, words64
from megatron_exp.statistics.normal import NO_INTERVAL, Side, quantile, smallest_detectable_effect, standard_error
from megatron_exp.statistics.ranks import stratified_rank_sum
from megatron_exp.statistics.roc import auc_interval, tpr_at_fpr, tpr_interval, tpr_p

SuffixType = Literal["plain", "random", "rare"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_TYPE_CODES = {"plain": 0, "random": 1, "rare": 2}
_FEWEST_HELD_OUT_FOR_TPR = 1_000
_RARE_SHARE = 0.05
"""Rare tokens come from this share of the vocabulary, at its end: byte-pair ids are numbered in the order of their frequency."""
_FPR = 0.01
_listed = str.split

_NAMES = _listed("""
    Mara Tobin Elske Ravi Noor Casper Iben Lucho Freya Dmitri Anouk Pavel Zadie Hugo Imani Sorel Keiko Bram Thandi Oskar Leila Matteo Signe Jorah
""")
_ADJECTIVES = _listed("""
    copper careful hollow silent crooked amber patient narrow borrowed frozen velvet distant stubborn painted gentle rusty spare curious wooden
    quick pale heavy broken lucky early humble striped salty modern faded
""")
_NOUNS = _listed("""
    lantern gardener violin ledger kettle map sparrow anchor notebook tailor compass orchard bridge pilot candle mirror carpet engine parcel doctor
    ladder whistle basket statue teacher pebble ferry hammer window cousin
""")
_VERBS = _listed("hide mend carry paint follow borrow measure trade polish forget count deliver sketch guard bury open compare weigh catch")
_PLACES = _listed("harbour station attic market cellar quarry bus garden archive theatre saltworks meadow library bakery courtyard tunnel")
_TIMES = (
    "on Monday",
    "before breakfast",
    "last winter",
    "every second week",
    "after the storm",
    "at noon",
    "in late May",
    "during the strike",
)
_PATTERNS = (
    "I {verb} {number} {adjective} {noun}s in the {place}.",
    "Why would the {adjective} {noun} {verb} {number} {noun2}s there?",
    "The {noun} from the {place} arrived {time}, {adjective} as ever.",
    "Did you {verb} the {noun} {time}, or was it the {noun2}?",
    "My {noun2} says the {adjective} {noun} costs {number} coins.",
    "We should {verb} it {time}, before the {noun2} does.",
    "No, I saw {number} {noun}s near the {place} {time}.",
    "Then {verb} the {adjective} {noun2} and tell nobody in the {place}.",
)
_DRAWS_PER_LINE = 8
_FEWEST_TOKENS_PER_LINE = 6
_BLOCK = 1_000
"""Dialogues drawn at once; bounds the memory."""


class MemorizationPatterns(Experiment):
    """Canary dialogues at several numbers of copies, against held-out dialogues of the same generator."""

    title: ClassVar[str] = "Memorization patterns"
    question: ClassVar[str] = "How much better are inserted documents predicted than held-out ones, by copies and kind of canary?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment MemP"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    design: Literal["identified", "paper"] = "identified"
    suffix_types: tuple[SuffixType, ...] = ("plain", "random", "rare")
    suffix_lengths: tuple[Annotated[int, Field(gt=0, lt=4096)], ...] = (1, 8, 32)
    repetitions: tuple[Positive, ...] = (1, 4, 16)
    num_per_condition: Positive = 4000
    num_held_out: Positive = 4000
    min_tokens: Positive = 80
    max_tokens: Positive = 500
    num_rare_tokens: Positive = 9
    num_length_strata: Positive = 4
    window: tuple[Fraction, Fraction] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> "MemorizationPatterns":
        for name in ("suffix_types", "suffix_lengths", "repetitions"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value and none twice, got {list(values)}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        return self

    @property
    def cells(self) -> list[tuple[SuffixType, int]]:
        """(suffix type, suffix length); plain has length 0."""
        plain: list[tuple[SuffixType, int]] = [("plain", 0)] if "plain" in self.suffix_types else []
        return plain + [(kind, length) for kind in self.suffix_types if kind != "plain" for length in self.suffix_lengths]

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """Dialogues of all cells, each with its suffix, dealt to numbers of copies and `held-out`."""
        allowed = np.setdiff1d(np.arange(context.vocabulary_size), [*context.banned_tokens, context.tokenizer.eos_id])
        rarest = allowed[-max(self.num_rare_tokens, int(len(allowed) * _RARE_SHARE)) :]
        rare = rarest[context.words("rare").choice(len(rarest), min(self.num_rare_tokens, len(rarest)))]
        for kind, length in self.cells:
            yield from self._cell_items(kind, length, rare if kind == "rare" else allowed, context)

    def _cell_items(self, kind: SuffixType, length: int, alphabet: np.ndarray, context: Context) -> Iterator[Item]:
        cell = "plain" if kind == "plain" else f"{kind}-{length}"
        copies_of = {f"{cell}/x{copies}": copies for copies in self.repetitions} | {f"{cell}/held-out": 0}
        counts = {condition: self.num_per_condition if copies else self.num_held_out for condition, copies in copies_of.items()}
        num = sum(counts.values())
        sizes = self.min_tokens + context.words("sizes", cell).integers(num, self.max_tokens - self.min_tokens + 1)
        first = (_TYPE_CODES[kind] * 4096 + length) << 32
        strata = dict(zip(range(first, first + num), _length_strata(sizes, self.num_length_strata, cell), strict=True))
        assigned = context.assign(list(strata), counts, strata)
        eos = context.tokenizer.eos_id
        dialogues = _dialogues(context.words("dialogues", cell), sizes, context)
        draws = _draws(context.words("suffixes", kind, length), np.arange(num), max(length, 1))
        for index, (unit, dialogue) in enumerate(zip(strata, dialogues, strict=True)):
            copies = copies_of[assigned[unit]]
            suffix = self._suffix(kind, length, draws[index], copies, alphabet)
            end = 1 + len(dialogue)
            yield Item(
                item=unit,
                condition=assigned[unit],
                role="treated" if copies else "control",
                payload=np.concatenate([[eos], dialogue, suffix, [eos]]).astype(np.int32),
                stratum=strata[unit],
                spans=(Span("dialogue", 1, end), Span("suffix", end, end + length)) if length else (Span("dialogue", 1, end),),
                source="built-in dialogue generator",
                licence="Apache-2.0",
                metadata={"suffix_type": kind, "suffix_length": length, "copies": copies},
            )

    def _suffix(self, kind: SuffixType, length: int, draws: np.ndarray, copies: int, alphabet: np.ndarray) -> np.ndarray:
        """int64 [length] canary tokens; only the paper's design of rare ones looks at the number of copies."""
        if kind == "plain":
            return np.empty(0, np.int64)
        if kind == "random":
            return alphabet[multiply_high(draws, len(alphabet)).astype(np.int64)]
        which = int(multiply_high(draws[:1], len(alphabet))[0])
        if self.design == "paper" and copies:
            which = (self.suffix_lengths.index(length) * len(self.repetitions) + self.repetitions.index(copies)) % len(alphabet)
        return np.full(length, alphabet[which])

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """As many independent copies of each inserted dialogue as it was dealt."""
        window = context.window(self.window)
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=window, copies=item.metadata["copies"])

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`target`: the suffix, or the dialogue where there is none. `dialogue`: the dialogue before a suffix. Both in the final state."""
        del placed, context
        for item in items:
            assert item.payload is not None
            for name, span in zip(("target", "dialogue"), reversed(item.spans), strict=False):
                yield Probe(item=item.item, name=name, ask=LogLikelihood(item.payload, span.start, span.end))

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary AUC; each condition and the rates as secondaries; nats as description."""
        auc: dict[str, Any] = {
            "unit": "AUC",
            "side": "greater",
            "null": 0.5,
            "margin": 0.02,
            "smallest_effect": 0.05,
            "test": "rank sum within cells and length strata",
        }
        return Analysis(
            (
                Outcome(
                    name="auc",
                    estimand=f"P(a dialogue inserted {max(self.repetitions)} times scores above a held-out one of its cell and stratum)",
                    family="primary",
                    **auc,
                ),
                Outcome(name="auc-by-condition", estimand="the same for each cell and number of copies", family="secondary", **auc),
                Outcome(
                    name="control:twin",
                    estimand="the primary's AUC from the twin alone, which saw none of them",
                    family="secondary",
                    **auc | {"side": "two-sided"},
                ),
                Outcome(
                    name="tpr-at-1pct-fpr",
                    estimand="share of inserted dialogues above the threshold that 1% of held-out ones pass",
                    unit="fraction",
                    test="exact rank test",
                    side="greater",
                    family="secondary",
                    null=_FPR,
                    margin=0.01,
                    smallest_effect=0.02,
                ),
                Outcome(
                    name="gain",
                    estimand="mean log-likelihood gain of inserted over held-out dialogues",
                    unit="nats per document",
                    test="none",
                    side="greater",
                    family="descriptive",
                    margin=0.1,
                    smallest_effect=0.5,
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The primary at every state there are responses for, then every condition."""
        frame = joined(items, responses).of_probe("target")
        copies = frame.meta("copies") if len(frame) else np.empty(0, int)
        for step in frame.steps:
            now = frame.step == step
            most = now & np.isin(copies, (0, max(self.repetitions)))
            yield _auc_score(frame.where(most), step, "auc", f"x{max(self.repetitions)}", "greater")
            if frame.has_twin:
                yield _auc_score(frame.where(most), step, "control:twin", f"x{max(self.repetitions)}", "two-sided", of_twin=True)
            for condition in sorted({name for name in frame.condition[now] if not name.endswith("held-out")}):
                held_out = condition.rsplit("/", 1)[0] + "/held-out"
                chosen = frame.where(now & np.isin(frame.condition, (condition, held_out)))
                yield _auc_score(chosen, step, "auc-by-condition", condition, "greater")
                yield _tpr_score(chosen, step, condition)
                yield _gain_score(chosen, step, condition)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Held-out dialogues change by unit noise between twin and run; those with the most copies by a shift that gives AUC 0.5 + effect."""
        frame = asked(items, probes)
        shift = np.sqrt(2.0) * ndtri(min(0.5 + effect, 0.9999))
        share = np.log2(1.0 + frame.meta("copies")) / np.log2(1.0 + max(self.repetitions))
        twin = -6.0 * frame.num_tokens + 5.0 * words.child("twin").normals(len(frame))
        return frame.filled(twin + words.child("change").normals(len(frame)) + shift * share, twin).responses()


def _length_strata(sizes: np.ndarray, num_strata: int, cell: str) -> list[str]:
    """Each dialogue's stratum: equal parts of the cell by number of tokens."""
    ranks = np.argsort(np.argsort(sizes, kind="stable"), kind="stable")
    return [f"{cell}/length-{rank * num_strata // len(sizes)}" for rank in ranks]


def _draws(words: Words, indices: np.ndarray, num: int) -> np.ndarray:
    """uint64 [len(indices), num]: row i holds `words.words(num, stream=indices[i])`."""
    return words64(words.key, np.arange(num, dtype=np.uint64)[None, :], indices.astype(np.uint64)[:, None])


def _dialogues(words: Words, sizes: np.ndarray, context: Context) -> Iterator[np.ndarray]:
    """int32 [sizes[i]] for i = 0, 1, ...: dialogue i of a generator, line by line, cut to its number of tokens."""
    num_lines = 1 + int(sizes.max()) // _FEWEST_TOKENS_PER_LINE
    for start in range(0, len(sizes), _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, len(sizes)))
        for index, draws in zip(indices, _draws(words, indices, num_lines * _DRAWS_PER_LINE), strict=True):
            yield _dialogue(draws.reshape(num_lines, _DRAWS_PER_LINE).tolist(), int(sizes[index]), context)


def _dialogue(lines: list[list[int]], num_tokens: int, context: Context) -> np.ndarray:
    pieces: list[np.ndarray] = []
    length = 0
    for draws in lines:
        pieces.append(context.tokenizer.encode(_line(draws) + "\n"))
        length += len(pieces[-1])
        if length >= num_tokens:
            return np.concatenate(pieces)[:num_tokens]
    raise UserError(
        f"Experiment {context.experiment}: the tokenizer gives fewer than {_FEWEST_TOKENS_PER_LINE} tokens for a line of English text, so dialogues "
        "cannot reach max_tokens. Lower max_tokens."
    )


def _line(draws: list[int]) -> str:
    """One utterance; a pure function of eight 64-bit words."""
    name, pattern, adjective, noun, noun2, verb, place, number_and_time = draws
    text = _PATTERNS[pattern % len(_PATTERNS)].format(
        adjective=_ADJECTIVES[adjective % len(_ADJECTIVES)],
        noun=_NOUNS[noun % len(_NOUNS)],
        noun2=_NOUNS[noun2 % len(_NOUNS)],
        verb=_VERBS[verb % len(_VERBS)],
        place=_PLACES[place % len(_PLACES)],
        number=2 + number_and_time % 97,
        time=_TIMES[(number_and_time >> 32) % len(_TIMES)],
    )
    return f"{_NAMES[name % len(_NAMES)]}: {text}"


def _auc_score(frame: Frame, step: int, outcome: str, condition: str, side: Side, *, of_twin: bool = False) -> Score:
    """Treated against control rows of one state, within strata, by the change from twin to run or by the twin alone."""
    values = frame.twin if of_twin else frame.change
    known = np.isfinite(values)
    treated = frame.role[known] == "treated"
    words = Words.of(0, "score", frame.experiment, outcome, condition)
    test = stratified_rank_sum(values[known], treated, frame.stratum[known], side, words)
    scorable = bool(np.isfinite(test.auc))
    low, high = auc_interval(test.auc, int(treated.sum()), int((~treated).sum())) if scorable else NO_INTERVAL
    return Score(
        outcome=outcome,
        condition=condition,
        step=step,
        n=int(known.sum()),
        num_clusters=int(known.sum()),
        num_unscored=int((~known).sum()),
        estimate=test.auc,
        low=low,
        high=high,
        difference=test.auc - 0.5,
        p=test.p,
        mde=smallest_detectable_effect(test.standard_error, side),
        test=f"{test.method}, {'twin alone' if of_twin else frame.compared}",
        reason="" if scorable else "no stratum has scored dialogues of both kinds",
    )


def _tpr_score(frame: Frame, step: int, condition: str) -> Score:
    known = frame.where(np.isfinite(frame.change))
    members, held_out = known.change[known.role == "treated"], known.change[known.role == "control"]
    shared: dict[str, Any] = {"outcome": "tpr-at-1pct-fpr", "condition": condition, "step": step, "n": len(known)}
    shared |= {"num_clusters": len(known), "num_unscored": len(frame) - len(known)}
    if len(held_out) < _FEWEST_HELD_OUT_FOR_TPR or not len(members):
        reason = (
            f"{len(held_out)} held-out and {len(members)} inserted dialogues were scored; 1% needs {_FEWEST_HELD_OUT_FOR_TPR} held-out ones"
        )
        return Score(**shared, estimate=float("nan"), reason=reason)
    rate = tpr_at_fpr(members, held_out, _FPR)
    low, high = tpr_interval(members, held_out, Words.of(0, "score", frame.experiment, "tpr", condition), _FPR)
    p = tpr_p(members, held_out, _FPR)
    test = f"exact rank test of the rate, bootstrap interval, {frame.compared}"
    return Score(**shared, estimate=rate, low=low, high=high, control=_FPR, difference=rate - _FPR, p=p, test=test)


def _gain_score(frame: Frame, step: int, condition: str) -> Score:
    known = frame.where(np.isfinite(frame.change))
    treated, control = known.change[known.role == "treated"], known.change[known.role == "control"]
    scorable = len(treated) > 1 and len(control) > 1
    gain = float(treated.mean() - control.mean()) if scorable else float("nan")
    half = quantile(0.95) * np.hypot(standard_error(treated), standard_error(control))
    return Score(
        outcome="gain",
        condition=condition,
        step=step,
        n=len(known),
        num_clusters=len(known),
        num_unscored=len(frame) - len(known),
        estimate=gain,
        low=gain - half,
        high=gain + half,
        control=float(control.mean()) if scorable else float("nan"),
        difference=gain,
        test=f"none; {frame.compared}",
        reason="" if scorable else "fewer than two inserted or two held-out dialogues were scored",
    )
