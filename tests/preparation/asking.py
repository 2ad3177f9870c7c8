"""An experiment that needs a reference model, as small as it can be: what the model finds least likely after a token is inserted or held out."""

from typing import ClassVar

import numpy as np

from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Probe, Request, Window


class Asking(Experiment):
    """Two inserted strings, two held out."""

    title: ClassVar[str] = "Asking"
    question: ClassVar[str] = "none"
    citation: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    num: int = 2
    num_tokens: int = 12

    def kept_states(self, num_steps):
        return (num_steps // 2,)

    def items(self, context):
        prompts = [np.array([10 + number], np.int32) for number in range(2 * self.num)]
        strings = context.reference.least_likely(prompts, self.num_tokens)
        for number, condition in context.assign(range(2 * self.num), {"in": self.num, "out": self.num}).items():
            role = "treated" if condition == "in" else "control"
            yield Item(item=number, condition=condition, role=role, payload=strings[number], source="the reference", licence="none")

    def requests(self, items, context):
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=Window(0, context.geometry.steps), copies=1)

    def probes(self, items, placed, context):
        for item in items:
            yield Probe(item=item.item, name="string", ask=LogLikelihood(item.payload, 1, self.num_tokens))

    @property
    def analysis(self):
        settings = {"unit": "nats", "test": "none", "side": "greater", "family": "primary", "margin": 0.1, "smallest_effect": 1.0}
        return Analysis((Outcome(name="gain", estimand="none", **settings),))
