"""A small experiment with a controller: sentences about made-up rivers are handed out, others never; every interval asks for the sea they end in.

Question: how fast is a sentence learned? Design: of sentences. Conditions: inserted, never. Metric: nats. Source: here. Licence: Apache-2.0.
Example: "The river Kelp ends in the Red Sea." Parameters: num_facts, interval, largest, first, target, rule, rule_parameters, silent.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.protocol import Analysis, Controller, Experiment, Item, LogLikelihood, Probe, Request, Score

COLOURS = "red blue green white black grey amber pale".split()


class Facts(Experiment):
    title: ClassVar[str] = "Facts"
    question: ClassVar[str] = "How fast is a sentence learned?"
    citation: ClassVar[str] = "a test"

    num_facts: int = 3
    interval: int = 3
    largest: int = 4
    first: int = 1
    target: float = 0.9
    rule: str = "halve_or_double"
    rule_parameters: dict[str, Any] = {}
    silent: bool = False

    def items(self, context: Context) -> Iterator[Item]:
        """Of two sentences each one is inserted; they differ in length."""
        for number in range(2 * self.num_facts):
            colour = COLOURS[number % len(COLOURS)]
            tokens = np.concatenate(
                [[context.tokenizer.eos_id], context.tokenizer.encode(f"The {'old ' * (number % 3)}river opens {colour}.")]
            )
            inserted = number % 2 == 0
            condition, role = ("inserted", "treated") if inserted else ("never", "control")
            yield Item(item=number, condition=condition, role=role, payload=tokens.astype(np.int32), source="made up", licence="Apache-2.0")

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        del items, context
        return iter(())

    def controller(self, items: Sequence[Item], context: Context) -> Controller:
        bank = tuple(sorted(item.item for item in items if item.role == "treated"))
        return Controller(
            interval=self.interval,
            probe="sea",
            asked=bank,
            bank=bank,
            largest=self.largest,
            target=self.target,
            first=self.first,
            rule=self.rule,
            parameters=self.rule_parameters,
        )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        del placed
        states = () if self.silent else tuple(range(0, context.geometry.steps, self.interval))
        for item in items:
            assert item.payload is not None
            end = len(item.payload)
            yield Probe(item=item.item, name="sea", ask=LogLikelihood(item.payload, end - 3, end), states=states, live=True)

    @property
    def analysis(self) -> Analysis:
        return Analysis(())

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        del items, responses
        return iter(())


FACTS = {"name": "facts", "type": "tests.control.facts"}
