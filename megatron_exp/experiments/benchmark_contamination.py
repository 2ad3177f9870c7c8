r"""BC: how much do copies of a benchmark's questions in the training data raise what a model scores on it, and does it pass?

Question: does a model that read questions with their right answers a number of times do better on these than on held-out questions of the same
    benchmarks, by number of copies, and is the gain still there long after the last copy?
Design: near-duplicates are removed from files first. Then a key deals the questions, within each benchmark, to levels of copies in two groups, or
    holds them out. Group `uniform`: copies anywhere in training. Group `window`: copies in one early part of it, so that the rest of training can
    wash them out. A copy is the question with its right answer in OLMES's completion format, EOS on both sides; wrong options are never inserted.
Conditions: `GROUP/xLEVEL` for groups x levels, and `held-out`.
Metric: log-likelihood of the right answer given the question, in nats per character of the answer, run minus twin; the primary is the mean of
    `uniform` questions with most copies minus that of held-out ones, within benchmarks. It is preferred to accuracy because it exists for files
    that hold gold texts alone and does not wait until the answer overtakes another option: a step of accuracy needs thousands of questions.
    Secondary: the same for each condition, and accuracy by ranked classification with the normalisation that OLMES gives each benchmark;
    descriptive: accuracy with each normalisation, and the curve over training. The scored part of an option begins after the longest prefix of
    tokens that all options share; `char` divides by the characters of that part; `unconditional` subtracts its log-likelihood after "Answer:"
    alone. Texts stand after an EOS, as in training.
Source: arXiv 2509.23383 (BC), after Bordt et al. 2025, "How much can we forget about data contamination?". Questions: `files`, or the built-in
    ones.
Licence: the built-in questions are generated, Apache-2.0 like this package; `licences` says it of every file.
Paper: 44,000 questions of 7 benchmarks; 10,000 held out, and in each group 8,000 x 4, 5,000 x 12, 2,000 x 36, 2,000 x 144 copies: the defaults,
    with `scale` 1. Its text says 36 copies but its figures, and the 62,272 rows = 1,946 x 32 that were released, say 32; so the default of
    `levels` has 32. `window`: between the first and second Chinchilla, 30B to 60B of 209.7B tokens. Its released splits 1-4 are the uniform
    group, in the original script they are the other; here the condition says it. Duplicates in the paper: containment, or rapidfuzz's
    partial_ratio above 70, on gold texts. Here: the words of one within another's, or a Jaccard similarity of word trigrams of at least
    `similarity`; 0.5 is about three changed words of seventeen. `design: paper` scores the run alone, as the paper does, with accuracy as the
    primary; then a level whose questions happen to be easier shows an effect. The default, `identified`, takes the twin's own difference out.
Traps: a test set that is in the base corpus is contaminated at every level, so search the corpus for the questions first. BoolQ's passages
    dominate the tokens. Questions that no slot holds are refused; `max_tokens` leaves them out.
Parameters: design; files, {benchmark: path} with benchmarks arc_challenge, arc_easy, boolq, csqa, hellaswag, mmlu, openbookqa, piqa, socialiqa,
    winogrande, paths relative to the configuration; licences, one for each of them; groups; levels and num_questions, the latter per group;
    num_held_out; scale, a factor on all numbers of questions; window, part of training as fractions; similarity; max_tokens of a question with
    its longest option; curve_states, states over training at which right answers are scored.
Example (uniform/x12): "Question: Which instrument does Kelmar Doriston of Velnimwick play at the winter fair?\nAnswer: the copper flute"
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_exp.errors import UserError
from megatron_exp.experiments.benchmark_accuracy import UNCONDITIONAL, Ranking, characters, option_name, per_character
from megatron_exp.experiments.benchmark_questions import ANSWER, Benchmark, Normalisation, Question, generated_questions, read_benchmark
from megatron_exp.experiments.context import Context, words64_of
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.duplicates import without_duplicates
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Probe, Request, Score, Span
from megatron_exp.seeding import Words, key

logger = logging.getLogger(__name__)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Group = Literal["uniform", "window"]

_NORMALISATIONS: tuple[Normalisation, ...] = ("none", "char", "unconditional")
_TESTED = ("gold", "accuracy", "gold-by-condition", "accuracy-by-condition")
_SIMULATED_CHANCE = 0.25
"""Accuracy of a model that knows nothing, with the four options of the built-in questions."""


class BenchmarkContamination(PaperDesign, Experiment):
    """Benchmark questions with their right answers in graded numbers of copies, against held-out questions."""

    title: ClassVar[str] = "Benchmark contamination"
    question: ClassVar[str] = "How much do copies of benchmark questions raise the score on them, and does it last?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment BC"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    paper_effects: ClassVar[Mapping[str, float]] = {"accuracy": 0.188}  # its Figure 3a, 144 copies

    files: dict[Benchmark, Path] = Field(default={}, exclude=True)  # their content is in the items; where they lie is no part of the plan
    licences: dict[Benchmark, Annotated[str, Field(min_length=1)]] = {}
    groups: tuple[Group, ...] = ("uniform", "window")
    levels: tuple[Annotated[int, Field(gt=0, le=65_535)], ...] = (4, 12, 32, 144)
    num_questions: tuple[Positive, ...] = (8_000, 5_000, 2_000, 2_000)
    num_held_out: Positive = 10_000
    window: tuple[Fraction, Fraction] = (0.143, 0.286)
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_tokens: Positive | None = None
    curve_states: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkContamination":
        for name in ("groups", "levels"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value and none twice, got {list(values)}")
        if len(self.num_questions) != len(self.levels):
            raise ValueError(
                f"num_questions must have one number for each of the {len(self.levels)} levels, got {list(self.num_questions)}"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        if set(self.files) != set(self.licences):
            raise ValueError(
                f"licences must name the licence of each benchmark of files ({sorted(self.files)}), got {sorted(self.licences)}"
            )
        return self

    @property
    def counts(self) -> dict[str, int]:
        """Questions wanted per condition."""
        sizes = dict(zip(self.levels, self.num_questions, strict=True))
        counts = {f"{group}/x{level}": self.scaled(sizes[level]) for group in self.groups for level in self.levels}
        return counts | {"held-out": self.scaled(self.num_held_out, 2)}

    @property
    def most_contaminated(self) -> str:
        """The condition of the primary: most copies, over all of training where there is such a group."""
        return f"{'uniform' if 'uniform' in self.groups else 'window'}/x{max(self.levels)}"

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """Distinct questions dealt to the conditions within their benchmarks; what is left over is not used."""
        questions = self._distinct_questions(context)
        wanted = sum(self.counts.values())
        if len(questions) < wanted:
            raise UserError(
                f"Experiment {context.experiment}: {wanted} questions are wanted, but after near-duplicates were removed there are {len(questions)}. Set "
                f"scale to {self.scale * len(questions) / wanted * 0.99:.3g} or less, or give more files."
            )
        strata = {number: question.benchmark for number, question in questions.items()}
        spare = {"unused": len(questions) - wanted} if len(questions) > wanted else {}
        dealt = context.assign(list(questions), self.counts | spare, strata)
        for number, question in questions.items():
            if dealt[number] != "unused":
                yield self._item(number, question, dealt[number], context)

    def _distinct_questions(self, context: Context) -> dict[int, Question]:
        """{item number: question}; the number is a hash of benchmark and gold text, so it does not depend on the order of files."""
        if self.files:
            found = [question for benchmark, path in self.files.items() for question in read_benchmark(benchmark, path)]
        else:
            found = list(generated_questions(context.words("questions"), sum(self.counts.values())))
        if self.max_tokens is not None:
            most = self.max_tokens - 2  # two for EOS
            found = [one for one in found if max(len(context.tokenizer.encode(text)) for text in one.texts) <= most]
        numbers = [key(0, "question", question.benchmark, question.texts[0]) >> 11 for question in found]
        if not self.files:  # every question is about another person: distinct as made
            return dict(zip(numbers, found, strict=True))
        contents = [one.texts[0].replace(ANSWER, "").removeprefix("Question: ").removeprefix("Goal: ") for one in found]
        kept = without_duplicates(contents, words64_of(context.words("duplicates"), numbers), self.similarity)
        read, left = Counter(one.benchmark for one in found), Counter(found[index].benchmark for index in kept)
        for benchmark in sorted(read - left):
            logger.info("%s: %d of %d questions of %s are near-duplicates of others", context.experiment, (read - left)[benchmark], read[benchmark], benchmark)
        return {numbers[index]: found[index] for index in kept}

    def _item(self, number: int, question: Question, condition: str, context: Context) -> Item:
        tokens, start = _option_tokens(question, context)
        if (longest := max(map(len, tokens)) + 1) > context.geometry.sequence_length:
            raise UserError(
                f"Experiment {context.experiment}: {question.place}, the question has {longest} tokens with its longest option, but a slot holds "
                f"{context.geometry.sequence_length}. Raise geometry.sequence_length, or leave such questions out with max_tokens."
            )
        level = 0 if condition == "held-out" else int(condition.rpartition("x")[2])
        return Item(
            item=number,
            condition=condition,
            role="treated" if level else "control",
            payload=np.append(tokens[0], context.tokenizer.eos_id).astype(np.int32),
            stratum=question.benchmark,
            spans=(Span("answer", start, len(tokens[0])),),
            source=question.source,
            licence=self.licences[question.benchmark] if self.files else "Apache-2.0",  # type: ignore[index]  # a name of `files`
            metadata={
                "benchmark": question.benchmark,
                "copies": level,
                "normalisation": question.normalisation,
                "stem": question.stem,
                "texts": question.texts,
                "answers": question.answers,
                "characters": [max(1, len(context.tokenizer.decode(option[start:]))) for option in tokens],
            },
        )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """All copies of the inserted questions, over the whole run or in the window."""
        for item in items:
            if item.role == "treated":
                where = context.window((0.0, 1.0) if item.condition.startswith("uniform/") else self.window)
                yield Request(item=item.item, kind="tokens", where=where, copies=item.metadata["copies"])

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`gold` and `wrong-1`, ...: the options, in the final state; `.../unconditional` after "Answer:" alone; `curve`: gold over training."""
        del placed
        states = tuple(sorted({int(state) for state in np.linspace(0, context.geometry.steps, self.curve_states + 1)[1:]}))
        for item in items:
            question = _question_of(item)
            tokens, start = _option_tokens(question, context)
            for number, option in enumerate(tokens):
                name = option_name(number)
                yield Probe(item=item.item, name=name, ask=LogLikelihood(option, start, len(option)))
                if question.normalisation == "unconditional" and len(tokens) > 1:
                    alone, first = _after(ANSWER, f"{ANSWER} {question.answers[number]}", context)
                    yield Probe(item=item.item, name=f"{name}{UNCONDITIONAL}", ask=LogLikelihood(alone, first, len(alone)))
            if states:
                yield Probe(item=item.item, name="curve", ask=LogLikelihood(tokens[0], start, len(tokens[0])), states=states, live=True)

    @property
    def dependence(self) -> Dependence:
        """The primary's measure on the questions inserted: likelihood of the right answer, or in the paper's design accuracy."""
        if self.design == "paper":
            return Dependence(probes=("gold*", "wrong-*"), max_items=1000, unit="fraction correct", smallest_effect=0.02)
        return Dependence(probes=("gold",), smallest_effect=0.01)

    def item_values(self, items: pa.Table, responses: pa.Table) -> np.ndarray:
        """1.0 where the right option ranks first, in the paper's design."""
        if self.design != "paper":
            return super().item_values(items, responses)
        return Ranking.of(joined(items, responses)).correct(None).run

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary (likelihood; accuracy in the paper's design), each condition and the twin as secondaries, the rest as description."""
        shared: dict[str, Any] = {"side": "greater", "test": "rank sum within benchmarks"}
        nats = shared | {"unit": "nats per character", "margin": 0.002, "smallest_effect": 0.01}
        points = shared | {"unit": "fraction correct", "margin": 0.01, "smallest_effect": 0.05}
        gold, accuracy = "mean log-likelihood of right answers", "share of questions whose right answer ranks first"
        against = f"{self.most_contaminated} minus held-out"
        is_paper = self.design == "paper"
        primary, other = ((accuracy, points), (gold, nats)) if is_paper else ((gold, nats), (accuracy, points))
        names = ("accuracy", "gold") if is_paper else ("gold", "accuracy")
        outcomes = [
            Outcome(name=names[0], estimand=f"{primary[0]}, {against}", family="primary", **primary[1]),
            Outcome(
                name=f"{names[0]}-by-condition", estimand=f"{primary[0]}, each condition minus held-out", family="secondary", **primary[1]
            ),
            Outcome(name=f"{names[1]}-by-condition", estimand=f"{other[0]}, each condition minus held-out", family="secondary", **other[1]),
            Outcome(name="control:twin", estimand=f"{gold}, {against}, of the twin", family="secondary", **nats | {"side": "two-sided"}),
            Outcome(
                name="curve",
                estimand=f"{gold} over training, each condition minus held-out",
                family="descriptive",
                **nats | {"test": "none"},
            ),
        ]
        for name in _NORMALISATIONS:
            estimand = f"{accuracy} with normalisation {name}, each condition minus held-out"
            outcomes.append(Outcome(name=f"accuracy-{name}", estimand=estimand, family="descriptive", **points | {"test": "none"}))
        return Analysis(tuple(outcomes))

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """Likelihood and accuracy at every state all options were asked in, the curve at its own states."""
        frame = joined(items, responses)
        gold, ranking = per_character(frame.of_probe("gold")), Ranking.of(frame)
        by_condition = {"gold-by-condition": gold, "accuracy-by-condition": ranking.correct(None)}
        by_condition |= {f"accuracy-{name}": ranking.correct(name) for name in _NORMALISATIONS}
        name = "accuracy" if self.design == "paper" else "gold"
        for step in gold.steps:
            yield self._contrast(by_condition[f"{name}-by-condition"].at(step), step, name, self.most_contaminated)
            if frame.has_twin:
                yield self._contrast(gold.at(step), step, "control:twin", self.most_contaminated)
            for outcome, values in by_condition.items():
                for condition in sorted(set(self.counts) - {"held-out"}):
                    yield self._contrast(values.at(step), step, outcome, condition)
        curve = per_character(frame.of_probe("curve"))
        for step in curve.steps:
            for condition in sorted(set(self.counts) - {"held-out"}):
                yield self._contrast(curve.at(step), step, "curve", condition)

    def _contrast(self, frame: Frame, step: int, outcome: str, condition: str) -> Score:
        """One condition against the held-out questions, within benchmarks; the paper's design does not look at the twin."""
        chosen = frame.where(np.isin(frame.condition, (condition, "held-out")))
        if outcome == "control:twin":
            return contrast_score(chosen, outcome, condition, step, "two-sided", of_twin=True)
        if self.design == "paper":
            chosen = replace(chosen, twin=np.full(len(chosen), np.nan), has_twin=False)
        score = contrast_score(chosen, outcome, condition, step, "greater")
        return score if outcome in _TESTED else replace(score, p=float("nan"), mde=float("nan"), test=f"none; {chosen.compared}")

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Options differ by 0.3 nats per character, run and twin by 0.1; right answers rise with the logarithm of their copies, up to `effect`.

        In the paper's design the primary is a share of questions: then so many of those that would have been wrong become right.
        """
        frame = asked(items, probes)
        share = np.log2(1.0 + frame.meta("copies")) / np.log2(1.0 + max(self.levels))
        is_gold = np.isin(frame.probe, ("gold", "curve"))
        twin = -1.0 + 0.3 * words.child("twin").normals(len(frame))
        run = twin + 0.1 * words.child("change").normals(len(frame))
        if self.design == "paper":
            becomes_right = words.child("chosen").uniforms(len(frame)) < effect * share / (1.0 - _SIMULATED_CHANCE)
            run = np.where(is_gold & becomes_right, 0.0, run)
        else:
            run = run + effect * share * is_gold
        return frame.filled(run * characters(frame), twin * characters(frame)).responses()


def _question_of(item: Item) -> Question:
    """The question an item was made of."""
    names = ("benchmark", "stem", "normalisation")
    texts, answers = (tuple(item.metadata[name]) for name in ("texts", "answers"))
    return Question(texts=texts, answers=answers, place=item.source, source=item.source, **{name: item.metadata[name] for name in names})


def _option_tokens(question: Question, context: Context) -> tuple[list[np.ndarray], int]:
    """int32 tokens of every option after an EOS, and where the scored part begins: after what all options (and the stem, if alone) share."""
    encoded = [_with_eos(text, context) for text in question.texts]
    compared = encoded if len(encoded) > 1 else [*encoded, _with_eos(question.stem, context)]
    return encoded, min(_num_common(compared), min(map(len, encoded)) - 1)


def _after(start: str, text: str, context: Context) -> tuple[np.ndarray, int]:
    """int32 tokens of a text after an EOS, and where they part from those of its beginning."""
    tokens = _with_eos(text, context)
    return tokens, min(_num_common([tokens, _with_eos(start, context)]), len(tokens) - 1)


def _with_eos(text: str, context: Context) -> np.ndarray:
    return np.concatenate([[context.tokenizer.eos_id], context.tokenizer.encode(text)]).astype(np.int32)


def _num_common(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix."""
    length = min(map(len, sequences))
    alike = np.all([one[:length] == sequences[0][:length] for one in sequences], axis=0)
    return int(np.append(alike, False).argmin())
