"""KA: can the probability of fictional facts be made to follow a line, by deciding during training how often they are told?

Question: does the model know fictional facts that a controller told it in ever other words, at the dose that keeps knowledge on a line?
Design: texts about things that do not exist, each with paraphrases and a few cloze queries. A key deals the texts to `inserted` and to
    `never`. Every `interval` steps the mean probability of the targets of the inserted texts' queries is measured on the model in training,
    and a rule sets how many paraphrases are inserted in the next interval; they are taken from all inserted texts in a keyed order, over and over.
Conditions: inserted, never. Both have queries; of a never-inserted text one paraphrase is kept among the items, to be looked for elsewhere.
Metric: log-likelihood in nats of the target after its input. Primary: its change from twin to run, inserted minus never-inserted texts, each text
    counting once (a difference in differences on the same queries), by a rank sum over texts. The test looks for one nat: power 0.77 with 16
    texts on each side, if texts change by 1 nat (standard deviation) for other reasons. What the rule is meant to reach, a probability
    from 1e-12 to 0.05, is 20 nats and more. Secondary: the same for the probability, for the accuracy (the greedy 25-token continuation holds the
    target, whatever its case) and for the similarity (partial Levenshtein, 0 to 100). Descriptive: what the controller measured in each state.
Source: arXiv 2509.23383 (KA); texts of Chang et al. 2024 (Fictional Knowledge), or our own. Licence: invented texts Apache-2.0 like this package; of files,
    `licence`.
Rule: `halve_or_double` is the paper's: half as many copies above 1.05 p, twice as many below 0.95 p, where p rises from 0 to `target`; the change is
    limited after 19% and 59% of training (to 256 and 64 copies at `largest` 8192, and in proportion; with `design: paper` a smaller `largest` does
    not move them). `proportional_integral` does the same on the log scale and oscillates less. What was
    decided is in RUN/segments. The plan keeps `largest` places in every interval: no other insertion is ever hit.
Traps: the mean probability is dominated by a few queries, so per-query values are kept, and the primary is in nats. Four texts (`design: paper`)
    can be dealt in 70 ways: no p below 0.014. During the learning rate's fall the same dose gives more. Invented paraphrases recombine sentences and
    hold less than a paraphrase by a language model. The number of copies follows the model, so it is an outcome and no treatment.
Choices the paper leaves open: the first interval has `first` copies; the bank is handed out modulo its size, in keyed order; a limit holds for decisions
    after its step; no token stands before the input; one space joins input and target, and the target's tokens are those that hold its letters; a
    query that cannot be scored leaves the number of copies as it is; similarity is 100 (1 - d / length), d the Levenshtein distance to the
    best stretch. With `design: paper` and a file of queries the texts it asks about are inserted, not drawn; never-inserted texts, which the paper
    has none of, are drawn from the rest.
Parameters: paraphrases and queries, files in the layouts of `knowledge_texts`, with their licence; num_texts inserted and num_never never-inserted texts;
    num_paraphrases invented for each; interval, steps between decisions (default: a hundredth of training); target; first; largest copies per
    interval; rule and rule_parameters; continuation_tokens; smallest_effect of interest, in nats; scale, a factor on num_paraphrases and largest; design.
Example: "... It was Soldora Zanyorski who founded Ulquinand Union. ..." asked "The name of the person to whom Ulquinand Union owes its foundation is".
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import orjson
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_exp.errors import UserError
from megatron_exp.experiments.cloze import cloze
from megatron_exp.experiments.context import Context, words64_of
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import FINAL, Frame, asked, joined
from megatron_exp.experiments.knowledge_texts import Text, invented_texts, read_texts
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import Analysis, Controller, Experiment, Greedy, Item, LogLikelihood, Outcome, Probe, Request, Score
from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import mean_interval
from megatron_exp.statistics.partial import partial_similarity

Positive = Annotated[int, Field(gt=0)]

_INSERTED, _NEVER = "inserted", "never"
_LIVE, _TARGET, _CONTINUATION = "live", "target", "continuation"
_MOST_INVENTED = 256
_CAPS = ((0.0, None), (0.19, 32), (0.59, 128))
"""Share of training, and the part of `largest` that the number of copies may change by after it: 256 and 64 of 8192."""
_TEXT_SD, _QUERY_SD = 1.0, 1.0
"""Of the simulated change from twin to run, in nats: what texts, and queries of a text, differ by for other reasons."""


class KnowledgeAcquisition(PaperDesign, Experiment):
    """Fictional texts told as often as a controller wants, against texts that are never told."""

    PAPER = {"num_texts": 4, "num_never": 4, "num_paraphrases": 10_000, "target": 0.08, "largest": 8192}
    title: ClassVar[str] = "Knowledge acquisition"
    question: ClassVar[str] = (
        "Can the probability of fictional facts be made to follow a line, by deciding during training how often they are told?"
    )
    citation: ClassVar[str] = "arXiv 2509.23383, experiment KA"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    paraphrases: Path | None = Field(default=None, exclude=True)  # their content is in the items; where they lie must not count
    queries: Path | None = Field(default=None, exclude=True)
    licence: str = ""
    num_texts: Positive = 16
    num_never: Positive = 16
    num_paraphrases: Positive = 500
    interval: Positive | None = None
    target: Annotated[float, Field(gt=0, le=1)] = 0.08
    first: Positive = 1
    largest: Annotated[int, Field(gt=0, le=65_535)] = 8192
    rule: str = "halve_or_double"
    rule_parameters: dict[str, Any] = {}
    continuation_tokens: Positive = 25
    smallest_effect: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> "KnowledgeAcquisition":
        if self.paraphrases and not self.licence:
            raise ValueError("licence is needed where paraphrases come from a file: say under which licence they are")
        if self.queries and not self.paraphrases:
            raise ValueError("queries belong to the texts of a file: give paraphrases too")
        if not self.paraphrases and self.num_texts + self.num_never > _MOST_INVENTED:
            raise ValueError(f"at most {_MOST_INVENTED} texts can be invented, num_texts + num_never is {self.num_texts + self.num_never}")
        return self

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """All paraphrases of the inserted texts, one of each other text, and all queries."""
        dealt = self._dealt(context)
        for text, condition in dealt:
            inserted = condition == _INSERTED
            shared: dict[str, Any] = {"condition": condition, "assignment_unit": text.number, "cluster": text.number}
            shared |= {"source": self._source(text), "licence": self.licence or "Apache-2.0"}
            told = sorted(text.numbered_paraphrases())
            for number, written in told if inserted else told[:1]:
                payload = self._payload(written, context)
                yield Item(item=number, role="treated" if inserted else "control", payload=payload, metadata={"text": text.name}, **shared)
            for number, prompt, target in text.numbered_queries():
                metadata = {"text": text.name, "input": prompt, "target": target}
                yield Item(item=number, role="probe-only" if inserted else "control", metadata=metadata, **shared)

    def _source(self, text: Text) -> str:
        return f"{self.paraphrases.name}, {text.name}" if self.paraphrases else "built-in generator of fictional facts"

    def _payload(self, text: str, context: Context) -> np.ndarray:
        eos = [context.tokenizer.eos_id]
        return np.concatenate([eos, context.tokenizer.encode(text), eos]).astype(np.int32)

    def _dealt(self, context: Context) -> list[tuple[Text, str]]:
        """The texts that take part, with their condition."""
        if not self.paraphrases:
            texts = invented_texts(context.words("texts"), self.num_texts + self.num_never, self.scaled(self.num_paraphrases))
        else:
            texts = [text for text in read_texts(self.paraphrases, self.queries) if text.queries]
        fixed = [text for text in texts if text.is_queried] if self.design == "paper" else []
        free = {text.number: text for text in texts if not (self.design == "paper" and text.is_queried)}
        if fixed and len(fixed) != self.num_texts:
            raise UserError(
                f"Experiment {context.experiment}: {self.queries} asks about {len(fixed)} texts, but num_texts is {self.num_texts}. Set it to {len(fixed)}."
            )
        wanted = {_INSERTED: self.num_texts - len(fixed), _NEVER: self.num_never}
        rest = len(free) - sum(wanted.values())
        if rest < 0:
            raise UserError(
                f"Experiment {context.experiment}: {self.num_texts} texts are to be inserted and {self.num_never} kept out, but {self.paraphrases} has "
                f"{len(texts)} with queries. Lower num_texts and num_never, or add texts and queries."
            )
        counts = {name: num for name, num in (wanted | {"unused": rest}).items() if num}
        drawn = context.assign(sorted(free), counts)
        dealt = [(text, _INSERTED) for text in fixed] + [(free[number], name) for number, name in drawn.items() if name != "unused"]
        return sorted(dealt, key=lambda one: one[0].number)

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """None: the controller inserts."""
        del items, context
        return iter(())

    def controller(self, items: Sequence[Item], context: Context) -> Controller:
        """The bank is in keyed order, so that texts follow each other as chance would have it."""
        bank = sorted(item.item for item in items if item.role == "treated")
        draws = dict(zip(bank, words64_of(context.words("bank"), bank), strict=True))
        return Controller(
            interval=self._interval(context),
            probe=_LIVE,
            asked=tuple(sorted(item.item for item in items if item.role == "probe-only")),
            bank=tuple(sorted(bank, key=lambda number: (draws[number], number))),
            largest=self._largest,
            target=self.target,
            first=self.first,
            rule=self.rule,
            parameters=self._rule_parameters,
        )

    @property
    def _largest(self) -> int:
        return min(self.scaled(self.largest), 65_535)

    @property
    def _rule_parameters(self) -> dict[str, Any]:
        if self.rule != "halve_or_double" or "caps" in self.rule_parameters:
            return self.rule_parameters
        whole = self.scaled(self.PAPER["largest"]) if self.design == "paper" else self._largest
        caps = [(share, part and max(1, whole // part)) for share, part in _CAPS]
        return {"caps": caps, **self.rule_parameters}

    def _interval(self, context: Context) -> int:
        return self.interval or max(1, context.geometry.steps // 100)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`live`: the target, whenever the controller decides. `target` and `continuation`: in the final state."""
        del placed
        states = tuple(range(0, context.geometry.steps, self._interval(context)))
        for item in items:
            if "input" in item.metadata:
                tokens, start = cloze(context.tokenizer, item.metadata["input"], item.metadata["target"])
                ask = LogLikelihood(tokens, start, len(tokens))
                yield Probe(item=item.item, name=_LIVE, ask=ask, states=states, live=True)
                yield Probe(item=item.item, name=_TARGET, ask=ask)
                prompt = context.tokenizer.encode(item.metadata["input"].rstrip())
                yield Probe(item=item.item, name=_CONTINUATION, ask=Greedy(prompt, self.continuation_tokens))

    # ---- analysis ----

    @property
    def dependence(self) -> Dependence:
        """Targets of the queries about the texts told; the paper follows whether continuations hold them, which a few texts rarely show."""
        return Dependence(probes=(_TARGET,))

    @property
    def analysis(self) -> Analysis:
        """One primary in nats; other measures of the same as secondaries; what the controller saw as description."""
        against = "{} of inserted texts' queries minus that of never-inserted ones, change from twin to run"
        nats: dict[str, Any] = {"unit": "nats", "margin": self.smallest_effect / 5, "smallest_effect": self.smallest_effect}
        rank: dict[str, Any] = {"test": "rank sum over texts", "side": "greater"}
        share: dict[str, Any] = {"margin": 0.005, "smallest_effect": 0.02, "family": "secondary"}
        told: dict[str, Any] = {"test": "none", "side": "greater", "family": "descriptive"}
        twin: dict[str, Any] = {"test": "rank sum over texts", "side": "two-sided", "family": "secondary"}
        return Analysis(
            (
                Outcome(name="knowledge", estimand=against.format("log-likelihood"), family="primary", **nats, **rank),
                Outcome(name="control:twin", estimand="the primary from the twin alone, which was told none", **nats, **twin),
                Outcome(name="probability", estimand=against.format("probability of the target"), unit="probability", **share, **rank),
                Outcome(
                    name="accuracy", estimand=against.format("share answered by the greedy continuation"), unit="fraction", **share, **rank
                ),
                Outcome(
                    name="similarity",
                    estimand=against.format("partial similarity of the greedy continuation"),
                    unit="points of 100",
                    family="secondary",
                    margin=1.0,
                    smallest_effect=5.0,
                    **rank,
                ),
                Outcome(
                    name="live-probability",
                    estimand="what the controller measured",
                    unit="probability",
                    margin=0.0,
                    smallest_effect=0.02,
                    **told,
                ),
                Outcome(name="live-nats", estimand="mean log-likelihood of the same queries", **nats, **told),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The contrasts in the final state, then what was measured while training."""
        frame = joined(items, responses)
        final = frame.of_probe(_TARGET)
        for step in final.steps:
            now = final.at(step)
            yield contrast_score(now, "knowledge", _INSERTED, step, "greater")
            if now.has_twin:
                yield contrast_score(now, "control:twin", _INSERTED, step, "two-sided", of_twin=True)
            yield contrast_score(now.filled(np.exp(now.run), np.exp(now.twin)), "probability", _INSERTED, step, "greater")
        for name, measure in (("accuracy", _holds), ("similarity", _resembles)):
            written = joined(items, _measured(items, responses, measure)).of_probe(_CONTINUATION)
            for step in written.steps:
                yield contrast_score(written.at(step), name, _INSERTED, step, "greater")
        live = frame.of_probe(_LIVE)
        for step in live.steps:
            now = live.at(step)
            yield _described(now.filled(np.exp(now.run), np.exp(now.twin)), "live-probability", step)
            yield _described(now, "live-nats", step)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Texts and their queries change by chance from twin to run; inserted ones by `effect` nats more, in proportion to the state."""
        frame = asked(items, probes)
        texts, place = np.unique(frame.cluster, return_inverse=True)
        queries, query = np.unique(frame.item, return_inverse=True)
        change = (
            _TEXT_SD * words.child("texts").normals(len(texts))[place] + _QUERY_SD * words.child("queries").normals(len(queries))[query]
        )
        last = max([step for step in frame.steps if step != FINAL], default=1) or 1
        done = np.where(frame.step == FINAL, 1.0, frame.step / last)
        twin = -12.0 + 2.0 * words.child("twin").normals(len(queries))[query]
        run = np.minimum(twin + done * (change + effect * (frame.condition == _INSERTED)), 0.0)
        knows = words.child("answers").uniforms(len(queries))[query] < np.exp(run)
        answers = frame.filled(run, twin).responses()
        is_written, targets = frame.probe == _CONTINUATION, frame.meta("target")
        said = [[target if know else "nobody knows" for target, know in zip(targets, knows, strict=True)], ["nobody knows"] * len(frame)]
        texts_of = [text if asked_for else None for model in said for text, asked_for in zip(model, is_written, strict=True)]
        return answers.set_column(answers.schema.get_field_index("text"), "text", pa.array(texts_of, pa.string()))


def _holds(target: str, text: str) -> float:
    return float(target.strip().lower() in text.lower())


def _resembles(target: str, text: str) -> float:
    return partial_similarity(target.strip().lower(), text.lower())


def _measured(items: pa.Table, responses: pa.Table, measure: Callable[[str, str], float]) -> pa.Table:
    """The responses with the measure of what was written as value of every continuation whose text was kept; null where it was not."""
    targets = {
        item: orjson.loads(metadata).get("target")
        for item, metadata in zip(items["item"].to_pylist(), items["metadata"].to_pylist(), strict=True)
    }
    columns = (responses[name].to_pylist() for name in ("probe", "item", "value", "text", "reason"))
    values = [
        value if probe != _CONTINUATION else None if text is None or reason else measure(targets[item], text)
        for probe, item, value, text, reason in zip(*columns, strict=True)
    ]
    return responses.set_column(responses.schema.get_field_index("value"), "value", pa.array(values, pa.float64()))


def _described(frame: Frame, outcome: str, step: int) -> Score:
    """The mean over the inserted texts' queries as the controller takes it, with Student's interval over texts."""
    told = frame.where(frame.role != "control")
    known = told.where(np.isfinite(told.run))
    never = frame.run[(frame.role == "control") & np.isfinite(frame.run)]
    texts = [known.run[known.cluster == cluster].mean() for cluster in np.unique(known.cluster)]
    low, high = mean_interval(np.array(texts))
    estimate = float(known.run.mean()) if len(known) else float("nan")
    control = float(never.mean()) if len(never) else float("nan")
    twin = told.twin[np.isfinite(told.twin)]
    return Score(
        outcome=outcome,
        condition=_INSERTED,
        step=step,
        n=len(known),
        num_clusters=len(texts),
        num_unscored=len(told) - len(known),
        estimate=estimate,
        low=low,
        high=high,
        control=control,
        twin=float(twin.mean()) if len(twin) else float("nan"),
        difference=estimate - control,
        test="none",
        reason="" if len(known) else "no query of an inserted text was scored",
    )
