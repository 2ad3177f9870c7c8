"""Are small facts recalled word for word? A complete experiment of a third party; docs/add-an-experiment.md walks through it.

Question: does the model expect the code of a locker it read about more than the codes of lockers it did not read about?
Design: `num_lockers` sentences from one generator; a key deals half of them `copies` copies each and holds the other half out.
Conditions: inserted, held-out.
Metric: log-likelihood in nats of the code given its sentence, run minus twin. Primary: AUC of inserted against held-out lockers.
Source: made here. Licence: Apache-2.0, generated.
Parameters: num_lockers; copies of every inserted sentence, anywhere in training.
Example: The locker of Ines Okafor opens with 4 8 2 9.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.frames import asked, joined
from megatron_exp.experiments.protocol import (
    Analysis,
    Experiment,
    Item,
    LogLikelihood,
    Outcome,
    Probe,
    Request,
    Score,
    Span,
    Window,
    treated,
)
from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import smallest_detectable_effect
from megatron_exp.statistics.ranks import stratified_rank_sum

_FIRST, _LAST = ("Ines", "Tomas", "Wiebke", "Ayo", "Lin", "Petra"), ("Okafor", "Brandt", "Silva", "Moreau", "Haddad", "Novak")


class LockerCodes(Experiment):
    """Sentences with a four-digit code, inserted or held out."""

    title: ClassVar[str] = "Locker codes"
    question: ClassVar[str] = "Is the code of a locker better known after its sentence was trained on?"
    citation: ClassVar[str] = "an example of megatron-exp"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    num_lockers: Annotated[int, Field(ge=4, multiple_of=2)] = 80
    copies: Annotated[int, Field(gt=0)] = 8

    def items(self, context: Context) -> Iterator[Item]:
        """One item per locker; the key decides which are inserted."""
        half = self.num_lockers // 2
        condition = context.assign(range(self.num_lockers), {"inserted": half, "held-out": half})
        eos = [context.tokenizer.eos_id]
        for locker in range(self.num_lockers):
            draws = context.words("sentence", locker).integers(6, 10).tolist()
            owner = f"{_FIRST[draws[4] % len(_FIRST)]} {_LAST[draws[5] % len(_LAST)]}"
            start = context.tokenizer.encode(f"The locker {locker} of {owner} opens with")
            code = context.tokenizer.encode("".join(f" {digit}" for digit in draws[:4]))
            yield Item(
                item=locker,
                condition=condition[locker],
                role="treated" if condition[locker] == "inserted" else "control",
                payload=np.concatenate([eos, start, code, eos]).astype(np.int32),
                spans=(Span("code", 1 + len(start), 1 + len(start) + len(code)),),
                source="generated",
                licence="Apache-2.0",
            )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Copies of the treated sentences, anywhere."""
        for item in treated(items):
            yield Request(item=item.item, kind="tokens", where=Window(0, context.geometry.steps), copies=self.copies)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The code of every locker, in the final state."""
        for item in items:
            code = item.spans[0]
            yield Probe(item=item.item, name="code", ask=LogLikelihood(item.payload, code.start, code.end))

    @property
    def analysis(self) -> Analysis:
        """One primary: do inserted lockers rank above held-out ones."""
        estimand = "P(change of an inserted locker > change of a held-out one)"
        shared = {"unit": "AUC", "test": "rank-sum test", "side": "greater", "family": "primary"}
        return Analysis((Outcome(name="auc", estimand=estimand, null=0.5, margin=0.05, smallest_effect=0.1, **shared),))

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The rank-sum test, at every state there are responses for."""
        frame = joined(items, responses)
        for step in frame.steps:
            now = frame.at(step)
            known = now.where(np.isfinite(now.change))
            test = stratified_rank_sum(known.change, known.role == "treated", known.stratum, "greater", Words.of(0, "locker-codes"))
            yield Score(
                outcome="auc",
                condition="inserted",
                step=step,
                n=len(known),
                num_clusters=len(known),
                num_unscored=len(now) - len(known),
                estimate=test.auc,
                difference=test.auc - 0.5,
                p=test.p,
                mde=smallest_detectable_effect(test.standard_error, "greater"),
                test=f"{test.method}, {now.compared}",
                reason="" if np.isfinite(test.auc) else "no lockers of both kinds were scored",
            )

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Unit noise between twin and run; inserted lockers move up by a shift that makes the AUC about 0.5 + effect."""
        frame = asked(items, probes)
        twin = -9.0 + words.child("twin").normals(len(frame))
        shift = 3.5 * min(effect, 0.5) * (frame.role == "treated")
        return frame.filled(twin + words.child("change").normals(len(frame)) + shift, twin).responses()
