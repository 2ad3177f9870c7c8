"""An experiment that inserts nothing and asks one question of every kind in every state: probes must change nothing."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import pyarrow as pa

from megatron_exp.experiments import protocol
from megatron_exp.experiments.context import Context
from megatron_exp.stream.slot import pool_slot


class DenseProbes(protocol.Experiment):
    title: ClassVar[str] = "Dense probes"
    question: ClassVar[str] = "Do probes change the weights?"
    citation: ClassVar[str] = ""

    def items(self, context: Context) -> Iterator[protocol.Item]:
        payload = context.tokenizer.encode("The silver river sings under the bridge.")
        yield protocol.Item(item=0, condition="asked", role="probe-only", payload=payload, source="made up", licence="Apache-2.0")

    def requests(self, items: Sequence[protocol.Item], context: Context) -> Iterator[protocol.Request]:
        del items, context
        return iter(())

    def probes(self, items: Sequence[protocol.Item], placed: pa.Table, context: Context) -> Iterator[protocol.Probe]:
        del placed
        tokens = items[0].payload
        assert tokens is not None
        asks: dict[str, protocol.Ask] = {
            "likelihood": protocol.LogLikelihood(tokens, 2, len(tokens)),
            "greedy": protocol.Greedy(tokens[:4], 3, tokens[4:7]),
            "sample": protocol.Sample(tokens[:4], 3, 2, 1.0),
            "slot": protocol.SlotLoss(pool_slot(0)),
            "gradient": protocol.EmbeddingGradient(pool_slot(1), 5, pool_slot(1), 0.1),
        }
        states = tuple(range(context.geometry.steps + 1))
        for name, ask in asks.items():
            yield protocol.Probe(item=0, name=name, ask=ask, states=states, live=True)

    @property
    def analysis(self) -> protocol.Analysis:
        return protocol.Analysis(())
