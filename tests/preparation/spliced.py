"""Texts spliced in, beside texts written over; both held out in part."""

import numpy as np

from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Probe, Request, Window


class Spliced(Experiment):
    """Random payloads of `num_tokens` tokens, `copies` of each; even items are spliced in, odd ones overwrite."""

    title = "Spliced texts"
    question = "Are they remembered?"
    citation = "none"

    num_items: int = 4
    num_tokens: int = 6
    copies: int = 2
    only_splices: bool = False

    def items(self, context):
        for number in range(self.num_items):
            payload = 4 + context.words("payload", number).integers(self.num_tokens, context.vocabulary_size - 4)
            yield Item(
                item=number,
                condition="splice" if self._is_spliced(number) else "overwrite",
                role="treated",
                payload=payload.astype(np.int32),
                source="made here",
                licence="CC0",
            )

    def _is_spliced(self, number):
        return self.only_splices or number % 2 == 0

    def requests(self, items, context):
        for item in items:
            kind = "splice" if self._is_spliced(item.item) else "tokens"
            yield Request(item=item.item, kind=kind, where=Window(0, context.geometry.steps), copies=self.copies)

    def probes(self, items, placed, context):
        for item in items:
            yield Probe(item=item.item, name="target", ask=LogLikelihood(item.payload, 1, len(item.payload)))

    @property
    def analysis(self):
        shared = {"unit": "nats", "test": "none", "side": "greater", "margin": 0.02, "smallest_effect": 0.05}
        return Analysis((Outcome(name="target", estimand="log-likelihood", family="descriptive", **shared),))
