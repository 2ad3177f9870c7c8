"""Texts with hostile content in 1, 4 or 16 copies, against held-out ones."""

from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Probe, Request, Window
from tests.report.fabricated import HOSTILE


class Memory(Experiment):
    """Copies of short texts."""

    title = "Memory <b>of</b> texts"
    question = f"Are inserted texts predicted better? {HOSTILE}"
    citation = "Somebody & others, 'Memory' <i>2026</i>"

    def items(self, context):
        for number in range(6):
            copies = (0, 1, 16, 0, 4, 0)[number]
            tokens = context.tokenizer.encode(f"{number} {HOSTILE[:40]} {HOSTILE[54:80]}")[: context.geometry.sequence_length - 10]
            condition = f"plain/x{copies}" if copies else "plain/held-out"
            yield Item(
                item=number,
                condition=condition,
                role="treated" if copies else "control",
                payload=tokens,
                source=HOSTILE,
                licence="CC0",
                metadata={"copies": copies},
            )

    def requests(self, items, context):
        for item in items:
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=Window(2, context.geometry.steps - 2), copies=item.metadata["copies"])

    def probes(self, items, placed, context):
        for item in items:
            yield Probe(item=item.item, name="target", ask=LogLikelihood(item.payload, 1, len(item.payload)))

    @property
    def analysis(self):
        shared = {"unit": "AUC", "test": "rank sum", "side": "greater", "margin": 0.02, "smallest_effect": 0.05, "null": 0.5}
        return Analysis(
            (
                Outcome(name="auc", estimand="inserted above held-out", family="primary", **shared),
                Outcome(name="auc-by-condition", estimand="the same by copies", family="secondary", **shared),
            )
        )
