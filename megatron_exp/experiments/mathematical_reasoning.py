r"""MR: does training on worked word problems teach a model to solve new ones, and longer ones?

Question: after training on generated problems with step-by-step solutions, does the model know the values of unseen problems, by number of operations?
Design: problems, their shortest solutions and answers come from a generator after iGSM: things in layers, parameters defined by one another, all
    numbers modulo 23. Training and test problems are disjoint by the hash of their canonical trace (16 of 23 bins train, 7 test). A trace is the solution
    without names and numbers; below five operations there are only a few such templates, so there it keeps names and numbers. Test problems are
    never inserted. Answers are balanced over 0..22 within each number of operations, and beside each right last value a key draws a wrong one of
    the other 22: prepared the same way, and told from the right one by the problem's content alone. All of it passed the checker.
Conditions: `train/op-K` (inserted once each) for operations up to max_ops; `test/op-K` up to max_ops + extra_ops, the latter never trained on; arms
    `right` (probe-only) and `wrong` (control) of each test problem.
Metric: log-likelihood of the right last value of the solution minus that of the wrong one, given problem and solution so far, in nats, run minus twin.
    Primary: its mean over test problems of up to max_ops operations; under the null, sides are exchangeable, so p is that of sign flips. Secondary:
    each number of operations. Descriptive: accuracy of a greedy few-shot solution (first integer after the first "Answer:"; none is wrong), and the
    share of written solutions in which the checker finds every step right and necessary.
Source: arXiv 2509.23383 (MR); Ye et al. 2024, "Physics of language models: part 2.1" (iGSM). Own generator, words and checker.
Licence: generated, Apache-2.0 like this package.
Paper: 500,000 problems of at most 10 operations and 20 edges ("ip"), 8,004 = 23 x 348 test problems for each of 1 to 12 operations, three worked
    examples, at most 500 tokens: the defaults. `design: paper` makes the gain in accuracy the primary, as Table 5 has it. Open in the paper, and our
    choice: how 500,000 were chosen of a million with up to 15 operations (the number of operations is the smaller of two uniform draws on 1..15, above
    max_ops drawn again); the preambles (six of our own); the examples (drawn for each test problem from problems of up to max_ops operations
    that are never inserted); what "decontaminated" means (the traces above).
Traps: an untrained model prefers numbers that it has just read, and in a copying step such a number is right: without a twin the primary holds this,
    too. At one operation the base model of the paper scores 39% from its worked examples, far above 1/23. Letters are case-sensitive. Solutions of
    which no slot can hold the document are drawn again, so `max_tokens` also bounds how many distractors there are; `max_edges` does so openly.
Parameters: design; problems to train on; max_ops; extra_ops; max_edges; test_problems for each number of operations; num_generated of them that are also
    solved in writing (default all); num_shots and max_new_tokens for these; scale, a factor on problems, test_problems and num_generated;
    max_tokens of a document (default: a slot); window, part of training as fractions.
Example (train/op-2): "All numbers are integers modulo 23.\nProblem: The number of each Foggy Cove's Swift Ketch equals 5. The number of each Foggy
    Bay's Swift Ketch equals 4 times as much as each Foggy Cove's Swift Ketch. How many Swift Ketch does Foggy Bay have?\nSolution: Define Foggy Cove's
    Swift Ketch as p; so p = 5. Define Foggy Bay's Swift Ketch as B; so B = 4 * p = 4 * 5 = 20.\nAnswer: 20"
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.igsm_problem import MODULUS
from megatron_exp.experiments.igsm_text import Written
from megatron_exp.experiments.mathematical_answers import accuracy_scores, gain_score, with_texts
from megatron_exp.experiments.mathematical_problems import Documents, few_shot_prompt, wrong_value
from megatron_exp.experiments.protocol import (
    Analysis,
    Experiment,
    Forbidden,
    Greedy,
    Item,
    LogLikelihood,
    Outcome,
    Probe,
    Request,
    Score,
    Span,
)
from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import mean_interval, smallest_detectable_effect
from megatron_exp.statistics.resampling import sign_flip_test
from megatron_exp.stream.slot import Geometry

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_FEWEST_TOKENS = 100
"""Of a worked problem, about: a bound for how many problems fill a share of a run."""


class MathematicalReasoning(Experiment):
    """Worked word problems of known length, tested on unseen ones by what the model thinks of right and wrong values."""

    title: ClassVar[str] = "Mathematical reasoning"
    question: ClassVar[str] = "Does training on worked word problems teach a model to solve new ones, and longer ones?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment MR"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    paper_effects: ClassVar[Mapping[str, float]] = {"accuracy-gain": 0.368}  # its Table 5, mean of 1 to 10 operations

    design: Literal["identified", "paper"] = "identified"
    problems: Positive = 500_000
    max_ops: Annotated[int, Field(ge=1, le=20)] = 10
    extra_ops: Annotated[int, Field(ge=0, le=10)] = 2
    max_edges: Annotated[int, Field(ge=2, le=28)] = 20
    test_problems: Annotated[int, Field(ge=23)] = 8_004
    num_generated: Annotated[int, Field(ge=0)] | None = None
    num_shots: Annotated[int, Field(ge=0, le=10)] = 3
    max_new_tokens: Positive = 500
    scale: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Positive | None = None
    window: tuple[Fraction, Fraction] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> "MathematicalReasoning":
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        if self.design == "paper" and self.num_solved == 0:
            raise ValueError(
                "design: paper is judged by written solutions, but num_generated is 0; give a number, or take design: identified"
            )
        return self

    @property
    def num_tested(self) -> int:
        """Test problems for each number of operations, at least one for each answer."""
        return max(MODULUS, round(self.scale * self.test_problems))

    @property
    def num_solved(self) -> int:
        """Of these, those that are solved in writing."""
        return self.num_tested if self.num_generated is None else min(self.num_tested, round(self.scale * self.num_generated))

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """Training problems, then test problems of every length with both arms."""
        documents = Documents(
            context, self.max_edges, min(self.max_tokens or context.geometry.sequence_length, context.geometry.sequence_length)
        )
        for number, written in documents.training(max(1, round(self.scale * self.problems)), self.max_ops):
            tokens = documents.tokens(number, written)
            yield self._item(number, f"train/op-{written.num_operations}", "treated", "main", tokens, (), written)
        for operations in range(1, self.max_ops + self.extra_ops + 1):
            for rank, (number, written) in enumerate(documents.testing(operations, self.num_tested)):
                yield from self._arms(number, written, documents, is_solved=rank < self.num_solved)

    def _arms(self, number: int, written: Written, documents: Documents, is_solved: bool) -> Iterator[Item]:
        """Right and wrong last value; what is scored begins where their tokens part."""
        wrong = wrong_value(documents.context, number, written.answer)
        right_tokens, wrong_tokens, start = documents.pair(number, written, wrong)
        condition = f"test/op-{written.num_operations}"
        extra = {"solved": is_solved}
        for arm, role, tokens in (("right", "probe-only", right_tokens), ("wrong", "control", wrong_tokens)):
            yield self._item(number, condition, role, arm, tokens, (Span("value", start, len(tokens)),), written, **extra)

    @staticmethod
    def _item(
        number: int, condition: str, role: Any, arm: str, tokens: np.ndarray, spans: tuple[Span, ...], written: Written, **extra: Any
    ) -> Item:
        texts = {"problem": written.problem, "solution": written.solution} if spans else {}
        return Item(
            item=number,
            condition=condition,
            role=role,
            arm=arm,
            payload=tokens,
            stratum=f"op-{written.num_operations}",
            spans=spans,
            source="built-in problem generator",
            licence="Apache-2.0",
            metadata={"operations": written.num_operations, "answer": written.answer, "trace_bin": written.trace_bin, **texts, **extra},
        )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every training problem once, anywhere in the window."""
        where = context.window(self.window)
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=where, copies=1)

    def forbidden(self, items: Sequence[Item]) -> Iterator[Forbidden]:
        """Test problems with their solutions up to the last value, whichever value follows."""
        for item in items:
            if item.arm == "right" and item.payload is not None:
                yield Forbidden(item.payload[1 : item.spans[0].start], f"its test problem {item.item} ({item.condition})")

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`value`: the last value, of both arms. `solve`: a solution in writing. All in the final state."""
        del placed
        for item in items:
            if item.spans and item.payload is not None:
                yield Probe(
                    item=item.item, arm=item.arm, name="value", ask=LogLikelihood(item.payload, item.spans[0].start, item.spans[0].end)
                )
        solved = [item for item in items if item.arm == "right" and item.metadata["solved"]]
        if not solved:
            return
        shots = Documents(context, self.max_edges, context.geometry.sequence_length).shots(self.max_ops) if self.num_shots else []
        for item in solved:
            prompt = few_shot_prompt(context, item.item, item.metadata["problem"], shots, self.num_shots)
            if (needed := len(prompt) + self.max_new_tokens) > context.geometry.sequence_length:
                raise UserError(
                    f"Experiment {context.experiment}: a worked prompt with its solution takes {needed} tokens, but the model reads "
                    f"{context.geometry.sequence_length}. Lower num_shots or max_new_tokens, or set num_generated to 0."
                )
            yield Probe(item=item.item, arm="right", name="solve", ask=Greedy(prompt, self.max_new_tokens))

    @property
    def dependence(self) -> Dependence:
        """At one operation: how much likelier right last values are than wrong ones, or in the paper's design the share of right written answers."""
        if self.design == "paper":
            return Dependence(probes=("solve",), conditions=("test/op-1",), unit="fraction correct", smallest_effect=0.02)
        return Dependence(probes=("value",), conditions=("test/op-1",), max_items=512, unit="nats", smallest_effect=0.05)

    def at_intensity(self, fraction: float, geometry: Geometry) -> dict[str, Any]:
        """As many problems as the share may hold, and test problems for the outcome alone."""
        problems = max(MODULUS, round(fraction * geometry.num_tokens / _FEWEST_TOKENS))
        written = {} if self.design == "paper" else {"num_generated": 0}
        return {"problems": problems, "test_problems": 11 * MODULUS, "extra_ops": 0, "scale": 1.0, "window": (0.0, 1.0), **written}

    def item_values(self, items: pa.Table, responses: pa.Table) -> np.ndarray:
        """Right minus wrong in nats per problem; in the paper's design 1.0 for a right answer."""
        if self.design == "paper":
            return with_texts(items, responses).run
        frame = joined(items, responses)
        return frame.where(frame.arm == "right").run - frame.where(frame.arm == "wrong").run

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary (preference for right values; gain in accuracy in the paper's design), each length, and the written solutions."""
        nats: dict[str, Any] = {
            "unit": "nats",
            "side": "greater",
            "margin": 0.05,
            "smallest_effect": 0.25,
            "test": "sign flips over problems",
        }
        share: dict[str, Any] = {"unit": "fraction", "side": "greater", "margin": 0.01, "smallest_effect": 0.05}
        is_paper = self.design == "paper"
        preference = f"mean log-likelihood of right minus wrong last values, up to {self.max_ops} operations"
        outcomes = [
            Outcome(name="preference", estimand=preference, family="secondary" if is_paper else "primary", **nats),
            Outcome(name="preference-by-operations", estimand="the same for each number of operations", family="secondary", **nats),
        ]
        if self.num_solved:
            gain = Outcome(
                name="accuracy-gain",
                estimand=f"share of written solutions with the right answer, up to {self.max_ops} operations, minus the twin's (minus 1/23 without twin)",
                family="primary" if is_paper else "secondary",
                test="McNemar's exact test",
                **share,
            )
            described = share | {"family": "descriptive", "test": "none", "null": 1 / MODULUS}
            accuracy = Outcome(name="accuracy", estimand="share of right answers for each number of operations", **described)
            steps = Outcome(
                name="sound-solutions",
                estimand="share of written solutions that the checker finds right in every step",
                **described | {"null": 0.0},
            )
            outcomes += [gain, accuracy, steps]
        return Analysis(tuple(sorted(outcomes, key=lambda outcome: outcome.family != "primary")))

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The primary at every state there are responses for, then every length."""
        frame = joined(items, responses)
        values = frame.of_probe("value")
        steps = values.steps
        for step in steps:
            now = values.at(step)
            operations = now.meta("operations") if len(now) else np.empty(0, int)
            yield _preference(now.where(operations <= self.max_ops), "preference", f"test/op-1..{self.max_ops}", step)
            for number in np.unique(operations):
                yield _preference(now.where(operations == number), "preference-by-operations", f"test/op-{number}", step)
        if self.num_solved:
            written = with_texts(items, responses)
            yield from (gain_score(written, step, self.max_ops) for step in steps)
            yield from (score for step in steps for score in accuracy_scores(written, step))

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Last values differ by 2 nats between problems and by 1 between models (Student's t with 5 degrees); right ones gain `effect`.

        In the paper's design the twin answers 10% of the problems rightly, and the run so many more as `effect` says.
        """
        frame = asked(items, probes)
        is_right = frame.arm == "right"
        twin = -3.0 + 2.0 * words.child("twin").normals(len(frame))
        noise = words.child("change").normals(len(frame)) / np.sqrt(
            (words.child("tail").normals(5 * len(frame)).reshape(5, -1) ** 2).mean(axis=0)
        )
        gained = effect if self.design == "identified" else 0.0
        responses = frame.filled(twin + noise + gained * is_right, twin).responses()
        draws = words.child("solved").uniforms(len(frame))
        share = {"twin": 0.1, "run": 0.1 + (effect if self.design == "paper" else 0.0)}
        own = {"twin": draws, "run": np.where(draws < 0.05, draws, words.child("again").uniforms(len(frame)))}
        return _with_written(frame, responses, {model: own[model] < share[model] for model in share})


def _preference(frame: Frame, outcome: str, condition: str, step: int) -> Score:
    """Mean of right minus wrong over the problems of a frame (both arms), tested by sign flips."""
    right, wrong = frame.where(frame.arm == "right"), frame.where(frame.arm == "wrong")
    assert np.array_equal(right.item, wrong.item), "arms come in the same order"
    differences = right.change - wrong.change
    known = np.isfinite(differences)
    found = differences[known]
    test = sign_flip_test(found, "greater", Words.of(0, "score", frame.experiment, outcome, condition))
    low, high = mean_interval(found)
    own = (right.twin - wrong.twin)[np.isfinite(right.twin - wrong.twin)]
    return Score(
        outcome=outcome,
        condition=condition,
        step=step,
        n=len(found),
        num_clusters=len(found),
        num_unscored=int((~known).sum()),
        estimate=test.mean,
        low=low,
        high=high,
        twin=float(own.mean()) if len(own) else float("nan"),
        difference=test.mean,
        p=test.p,
        mde=smallest_detectable_effect(float(np.sqrt((found**2).sum())) / len(found), "greater") if len(found) else float("nan"),
        test=f"{test.method}, {frame.compared}",
        reason="" if len(found) else "no problem has both values scored",
    )


def _with_written(frame: Frame, responses: pa.Table, is_right: dict[str, np.ndarray]) -> pa.Table:
    """Responses in whose `solve` rows a text gives the right answer or another; a written solution has no value."""
    answers = frame.meta("answer")
    texts, values, reasons = [], responses["value"].to_pylist(), responses["reason"].to_pylist()
    for row, (probe, model) in enumerate(zip(responses["probe"].to_pylist(), responses["model"].to_pylist(), strict=True)):
        place = row % len(frame)
        hit = probe == "solve" and bool(is_right[model][place])
        texts.append(f"Answer: {(answers[place] + (not hit)) % MODULUS}" if probe == "solve" else None)
        if probe == "solve":
            values[row], reasons[row] = None, ""
    columns = {"text": texts, "value": values, "reason": reasons}
    for name, column in columns.items():
        place = responses.schema.get_field_index(name)
        responses = responses.set_column(place, name, pa.array(column).cast(responses.schema.field(name).type))
    return responses
