"""MemP: how strongly are single documents memorised, by number of copies and by kind of canary at their end?

Question: does a model score documents it was trained on higher than documents of the same kind it never saw, and how does that
    depend on the number of copies and on what stands at the end of the document?
Design: every cell (suffix type x suffix length) has its own dialogues, each with its suffix attached beforehand. Within the cell and strata
    of dialogue length a key deals each dialogue a number of copies, or holds it out; so held-out dialogues differ from inserted ones by
    nothing but a draw, and re-drawing gives the null distribution. Copies fall uniformly and independently into the window.
Conditions: suffix_types (plain, random, rare, model-based) x suffix_lengths x repetitions, and `held-out` in every cell. random: uniform
    vocabulary tokens, drawn for each dialogue. rare: one token repeated, of the twentieth of ids that the tokenizer made last those that do not
    occur in the first 512 slots of training (or occur least there: among the last ids are common words, too). model-based: after each dialogue
    the token that a reference model finds least likely, then the one it finds least likely after that, and so on (greedily; the paper does not
    say whether the 32 were chosen so or jointly). All four types make the paper's 30 conditions.
    Rare cells also hold out `held-out-pool`: dialogues with other rare tokens than any inserted one.
Metric: log-likelihood in nats of the suffix (of the whole dialogue where there is none), run minus twin on the same dialogue where there
    is a twin (calibration). Primary: AUC of dialogues with the most copies against held-out ones with the same tokens, within cells and strata.
    Secondary: the AUC and the true positive rate at 1% false positives of each condition, counted, with a bootstrap interval; the latter needs
    1,000 held-out dialogues in its cell. Descriptive: the same from the run alone, against the pool of other tokens, and over the dialogue.
Source: arXiv 2509.23383 (MemP); Panda et al. 2025 for canaries. The paper's dialogues are SODA (Kim et al. 2022, arXiv 2212.10465): `file` takes it in
    its original layout, JSON lines or Parquet. Without a file dialogues are made up.
Licence: generated ones Apache-2.0 like this package; those of a file as stated in `licence` (SODA: CC-BY-4.0).
Traps: the paper gives every rare condition one token of its own and holds out documents with tokens from a pool. Then token, length and copies
    change together, and a repeated token teaches "this token follows dialogues" to any document that carries it: against the pool, the
    test finds the token and not the document (one such condition has AUC 0.9985 that way). `design: identified` (default) rotates all rare tokens
    through members and held-out documents of a cell; `design: paper` gives each condition its own token, and holds out dialogues both with these tokens
    (`held-out`, which every test uses) and with others. The paper says 29 conditions; its counts fit 30. A reference that knows little finds nearly
    the same tokens least likely after every dialogue: look at the items. Where "model-based" is among the types, the whole experiment waits
    for `plan --reference`: use two entries if the other cells should not. Payloads are token ids: decoding and encoding a canary changes it.
Parameters: design; scale, a factor on all numbers of dialogues; suffix_types (in the paper's design all four); suffix_lengths; repetitions;
    tpr, the rate at 1% false positives (none: where there are the 1,000 held-out dialogues it needs; true: fewer are an error; false: not);
    num_per_condition dialogues for each cell and number of copies; num_held_out for each cell, and num_held_out_pool for each rare cell (as many; in the
    paper's design 34,907 of each); dialogues of min_tokens to max_tokens tokens; num_rare_tokens; window: part of the training steps, as
    fractions; num_length_strata within a cell; file, licence.
Example (rare-8/x16, a payload with EOS on both sides; the suffix follows the last character, here eight times the token "Redirector"):
    Mara: I guard 41 copper lanterns in the harbour.
    Tobin: Did you mend the careful gardener at noon, or was it the RedirectorRedirectorRedirector...
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtri

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.dialogues import Dialogue, draws, generated_dialogues, read_dialogues
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.membership import FEWEST_HELD_OUT_FOR_TPR, gain_score, tpr_score
from megatron_exp.experiments.memorization_outcomes import outcomes
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import (
    FEWEST_FORBIDDEN,
    Analysis,
    Experiment,
    Forbidden,
    Item,
    LogLikelihood,
    Probe,
    Request,
    Score,
    Span,
)
from megatron_exp.seeding import Words, multiply_high

SuffixType = Literal["plain", "random", "rare", "model-based"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_TYPE_CODES = {"plain": 0, "random": 1, "rare": 2, "model-based": 3}
_RARE_SHARE = 0.05
"""Rare tokens come from this share of the vocabulary, at its end: byte-pair ids are numbered in the order of their frequency."""
_SAMPLED_SLOTS = 512
_HELD_OUT, _POOL = "held-out", "held-out-pool"


class _Cell(NamedTuple):
    """copies: {condition: number}, 0 for both kinds of held-out. numbers, dialogues: of its items, in the order of `draws`."""

    kind: SuffixType
    length: int
    name: str
    copies: dict[str, int]
    counts: dict[str, int]


class _Rare(NamedTuple):
    """Token ids: those that members (and held-out dialogues with the same tokens) carry, and the pool of others."""

    members: np.ndarray
    pool: np.ndarray


class MemorizationPatterns(PaperDesign, Experiment):
    """Canary dialogues at several numbers of copies, against held-out dialogues of the same kind."""

    title: ClassVar[str] = "Memorization patterns"
    question: ClassVar[str] = "How much better are inserted documents predicted than held-out ones, by copies and kind of canary?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment MemP"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    unusual: ClassVar[frozenset[str]] = frozenset({"suffix"})

    PAPER: ClassVar[Mapping[str, Any]] = {
        "suffix_types": ("plain", "rare", "model-based", "random"),
        "num_held_out": 34_907,
    }

    suffix_types: tuple[SuffixType, ...] = ("plain", "random", "rare")
    suffix_lengths: tuple[Annotated[int, Field(gt=0, lt=4096)], ...] = (1, 8, 32)
    repetitions: tuple[Positive, ...] = (1, 4, 16)
    num_per_condition: Positive = 4000
    num_held_out: Positive = 4000
    num_held_out_pool: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Positive = 80
    max_tokens: Positive = 500
    num_rare_tokens: Positive = 9
    num_length_strata: Positive = 4
    window: tuple[Fraction, Fraction] = (0.0, 1.0)
    file: Path | None = None
    licence: str = ""
    tpr: bool | None = None

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
        if self.file and not self.licence.strip():
            raise ValueError("`file` needs `licence`: say under which licence its dialogues are (SODA: CC-BY-4.0)")
        if self.tpr and self._num_matched < FEWEST_HELD_OUT_FOR_TPR:
            raise ValueError(
                f"tpr: the rate at 1% false positives needs {FEWEST_HELD_OUT_FOR_TPR} held-out dialogues with the tokens of each condition, but num_held_out "
                f"times scale gives {self._num_matched}; raise it, or leave tpr out"
            )
        return self

    @property
    def needed(self) -> frozenset[str]:
        """A reference only where there are model-based suffixes."""
        return self.needs | ({"reference"} if "model-based" in self.suffix_types else frozenset())

    @property
    def _num_matched(self) -> int:
        """Held-out dialogues that a condition is compared with, at least; in the paper's design those of a rare cell share the tokens of all conditions."""
        own_tokens = self.design == "paper" and "rare" in self.suffix_types
        return self.scaled(self.num_held_out) // (len(self.repetitions) if own_tokens else 1)

    @property
    def has_rate(self) -> bool:
        """Whether the rate at 1% false positives is among the outcomes."""
        return self.tpr if self.tpr is not None else self._num_matched >= FEWEST_HELD_OUT_FOR_TPR

    @property
    def cells(self) -> list[_Cell]:
        """All cells; plain has length 0."""
        kinds: list[tuple[SuffixType, int]] = [("plain", 0)] if "plain" in self.suffix_types else []
        kinds += [(kind, length) for kind in self.suffix_types if kind != "plain" for length in self.suffix_lengths]
        return [self._cell(kind, length) for kind, length in kinds]

    def _cell(self, kind: SuffixType, length: int) -> _Cell:
        name = "plain" if kind == "plain" else f"{kind}-{length}"
        copies = {f"{name}/x{number}": number for number in self.repetitions} | {f"{name}/{_HELD_OUT}": 0}
        counts = {condition: self.scaled(self.num_per_condition if number else self.num_held_out) for condition, number in copies.items()}
        num_pool = self.num_held_out if self.num_held_out_pool is None else self.num_held_out_pool
        if kind == "rare" and num_pool:
            copies[f"{name}/{_POOL}"], counts[f"{name}/{_POOL}"] = 0, self.scaled(num_pool)
        return _Cell(kind, length, name, copies, counts)

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """Dialogues of all cells, each with its suffix, dealt to numbers of copies and held out."""
        allowed = np.setdiff1d(np.arange(context.vocabulary_size), [*context.banned_tokens, context.tokenizer.eos_id])
        rare = self._rare_tokens(allowed, context)
        total = sum(sum(cell.counts.values()) for cell in self.cells)
        read = iter(read_dialogues(self.file, (self.min_tokens, self.max_tokens), total, context) if self.file else [])
        for cell in self.cells:
            num = sum(cell.counts.values())
            dialogues = [next(read) for _ in range(num)] if self.file else list(self._generated(cell, num, context))
            yield from self._cell_items(cell, dialogues, rare, allowed, context)

    def _rare_tokens(self, allowed: np.ndarray, context: Context) -> _Rare:
        """Of the ids that the tokenizer made last, those that a sample of the training data has least often: some stand for common words."""
        late = allowed[-max(2 * self.num_rare_tokens, int(len(allowed) * _RARE_SHARE)) :]
        late = late[context.words("rare").permutation(len(late))]
        counts = _sampled_counts(context)[late]
        order = np.argsort(counts, kind="stable")
        rarest = late[order[: max(2 * self.num_rare_tokens, int((counts == 0).sum()))]]
        return _Rare(rarest[: self.num_rare_tokens], rarest[self.num_rare_tokens :])

    def _generated(self, cell: _Cell, num: int, context: Context) -> Iterator[Dialogue]:
        sizes = self.min_tokens + context.words("sizes", cell.name).integers(num, self.max_tokens - self.min_tokens + 1)
        first = (_TYPE_CODES[cell.kind] * 4096 + cell.length) << 32
        for index, tokens in enumerate(generated_dialogues(context, cell.name, sizes)):
            yield Dialogue(first + index, tokens, "built-in dialogue generator")

    def _cell_items(self, cell: _Cell, dialogues: Sequence[Dialogue], rare: _Rare, allowed: np.ndarray, context: Context) -> Iterator[Item]:
        strata = _length_strata(dialogues, self.num_length_strata, cell.name)
        assigned = context.assign([one.number for one in dialogues], cell.counts, strata)
        eos = context.tokenizer.eos_id
        suffixes = self._suffixes(cell, dialogues, assigned, rare, allowed, context)
        for dialogue, suffix in zip(dialogues, suffixes, strict=True):
            condition, end = assigned[dialogue.number], 1 + len(dialogue.tokens)
            copies = cell.copies[condition]
            yield Item(
                item=dialogue.number,
                condition=condition,
                role="treated" if copies else "control",
                payload=np.concatenate([[eos], dialogue.tokens, suffix, [eos]]).astype(np.int32),
                stratum=strata[dialogue.number],
                spans=(Span("dialogue", 1, end), Span("suffix", end, end + len(suffix))) if len(suffix) else (Span("dialogue", 1, end),),
                source=dialogue.source,
                licence=self.licence if self.file else "Apache-2.0",
                metadata={
                    "suffix_type": cell.kind,
                    "suffix_length": cell.length,
                    "copies": copies,
                    "token": int(suffix[0]) if cell.kind == "rare" else -1,
                },
            )

    def _suffixes(
        self,
        cell: _Cell,
        dialogues: Sequence[Dialogue],
        assigned: Mapping[int, str],
        rare: _Rare,
        allowed: np.ndarray,
        context: Context,
    ) -> Sequence[np.ndarray]:
        """The canary of each dialogue. Only rare ones look at what was dealt: the pool, and in the paper's design the condition's own token."""
        if cell.kind == "plain":
            return [np.empty(0, np.int64)] * len(dialogues)
        if cell.kind == "model-based":
            if context.reference is None:
                raise UserError(
                    f"Experiment {context.experiment} has model-based suffixes, which a reference model chooses. Give --reference."
                )
            prompts = [np.concatenate([[context.tokenizer.eos_id], one.tokens]).astype(np.int32) for one in dialogues]
            return list(context.reference.least_likely(prompts, cell.length))
        drawn = draws(context.words("suffixes", cell.kind, cell.length), np.arange(len(dialogues)), cell.length)
        if cell.kind == "random":
            return list(allowed[multiply_high(drawn, len(allowed)).astype(np.int64)])
        tokens = [self._rare_token(cell, assigned[one.number], int(word), rare) for one, word in zip(dialogues, drawn[:, 0], strict=True)]
        return [np.full(cell.length, token) for token in tokens]

    def _rare_token(self, cell: _Cell, condition: str, word: int, rare: _Rare) -> int:
        if condition.endswith(_POOL):
            return int(rare.pool[word % len(rare.pool)])
        if self.design == "identified":
            return int(rare.members[word % len(rare.members)])
        own = [number for number in self.repetitions if number == cell.copies[condition]] or self.repetitions
        which = self.suffix_lengths.index(cell.length) * len(self.repetitions) + self.repetitions.index(own[word % len(own)])
        return int(rare.members[which % len(rare.members)])

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """As many independent copies of each inserted dialogue as it was dealt."""
        window = context.window(self.window)
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=window, copies=item.metadata["copies"])

    def forbidden(self, items: Sequence[Item]) -> Iterator[Forbidden]:
        """The held-out dialogues, and the canaries of eight tokens or more (a shorter one may stand elsewhere by chance), the pool's left out."""
        yield from super().forbidden(items)
        told: set[bytes] = set()
        for item in items:
            assert item.payload is not None
            for span in item.spans if not item.condition.endswith(_POOL) else ():
                tokens = item.payload[span.start : span.end]
                if span.name == "suffix" and len(tokens) >= FEWEST_FORBIDDEN and tokens.tobytes() not in told:
                    told.add(tokens.tobytes())
                    yield Forbidden(tokens, f"the canary of its item {item.item} ({item.condition})")

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`target`: the suffix, or the dialogue where there is none. `dialogue`: the dialogue before a suffix. Both in the final state."""
        del placed, context
        for item in items:
            assert item.payload is not None
            for name, span in zip(("target", "dialogue"), reversed(item.spans), strict=False):
                yield Probe(item=item.item, name=name, ask=LogLikelihood(item.payload, span.start, span.end))

    @property
    def dependence(self) -> Dependence:
        """Log-likelihood of what was inserted, suffix and dialogue."""
        return Dependence(smallest_effect=0.01)

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary AUC; each condition and the rates as secondaries; the rest as description."""
        return Analysis(outcomes(max(self.repetitions), self.has_rate))

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The primary at every state there are responses for, then every condition."""
        everything = joined(items, responses)
        frame, dialogue = everything.of_probe("target"), everything.of_probe("dialogue")
        most = f"x{max(self.repetitions)}"
        for step in frame.steps:
            now, before = frame.at(step), dialogue.at(step)
            extreme = _same_tokens(now.where(np.isin(now.meta("copies"), (0, max(self.repetitions)))))
            yield contrast_score(extreme, "auc", most, step, "greater", measure="auc")
            if frame.has_twin:
                yield contrast_score(extreme, "control:twin", most, step, "two-sided", measure="auc", of_twin=True)
            for condition in sorted(set(now.condition[now.role == "treated"])):
                chosen = _same_tokens(_with_held_out(now, condition, _HELD_OUT))
                yield contrast_score(chosen, "auc-by-condition", condition, step, "greater", measure="auc")
                yield gain_score(chosen, "gain", step, condition)
                if self.has_rate:
                    yield tpr_score(chosen, "tpr-at-1pct-fpr", step, condition)
                yield from _descriptions(now, before, chosen, condition, step, self.has_rate)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Held-out dialogues change by unit noise between twin and run; those with the most copies by a shift that gives AUC 0.5 + effect."""
        frame = asked(items, probes)
        shift = np.sqrt(2.0) * ndtri(min(0.5 + effect, 0.9999))
        share = np.log2(1.0 + frame.meta("copies")) / np.log2(1.0 + max(self.repetitions))
        twin = -6.0 * frame.num_tokens + 5.0 * words.child("twin").normals(len(frame))
        return frame.filled(twin + words.child("change").normals(len(frame)) + shift * share, twin).responses()


def _length_strata(dialogues: Sequence[Dialogue], num_strata: int, cell: str) -> dict[int, str]:
    """Each dialogue's stratum: equal parts of the cell by number of tokens."""
    ranks = np.argsort(np.argsort([len(one.tokens) for one in dialogues], kind="stable"), kind="stable").tolist()
    return {one.number: f"{cell}/length-{rank * num_strata // len(dialogues)}" for one, rank in zip(dialogues, ranks, strict=True)}


def _with_held_out(frame: Frame, condition: str, held_out: str) -> Frame:
    return frame.where(np.isin(frame.condition, (condition, f"{condition.rsplit('/', 1)[0]}/{held_out}")))


def _same_tokens(frame: Frame) -> Frame:
    """Inserted dialogues, and held-out ones whose rare token is one of theirs in the same cell; the pool of others is left out."""
    if not len(frame):
        return frame
    cells = np.array([condition.rsplit("/", 1)[0] for condition in frame.condition], dtype=object)
    tokens = frame.meta("token")
    members = set(zip(cells[frame.role == "treated"], tokens[frame.role == "treated"].tolist(), strict=True))
    return frame.where(np.array([pair in members for pair in zip(cells, tokens.tolist(), strict=True)]))


def _descriptions(now: Frame, before: Frame, chosen: Frame, condition: str, step: int, has_rate: bool) -> Iterator[Score]:
    """The run alone, the pool of other tokens, and the dialogue before the suffix."""
    if chosen.has_twin:
        alone = chosen.filled(chosen.run, np.full(len(chosen), np.nan))
        yield contrast_score(alone, "auc-run-alone", condition, step, "greater", measure="auc")
        if has_rate:
            yield tpr_score(alone, "tpr-run-alone", step, condition)
    pool = _with_held_out(now, condition, _POOL)
    if (pool.role == "control").any():
        yield contrast_score(pool, "auc-against-pool", condition, step, "greater", measure="auc")
        if has_rate:
            yield tpr_score(pool, "tpr-against-pool", step, condition)
    if (before.condition == condition).any():
        text = before.where(np.isin(before.item, chosen.item))
        yield contrast_score(text, "auc-dialogue", condition, step, "greater", measure="auc")


def _sampled_counts(context: Context) -> np.ndarray:
    """int64 [vocabulary]: occurrences of each id in the first slots of training (their order is random); zeros where there is no base data to look at."""
    counts = np.zeros(context.vocabulary_size, np.int64)
    if context.stream:
        for slot in range(min(_SAMPLED_SLOTS, context.geometry.num_slots)):
            counts += np.bincount(context.stream.read(slot).tokens, minlength=len(counts))[: len(counts)]
    return counts
