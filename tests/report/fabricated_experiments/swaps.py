"""One batch replaced by pool slots."""

from megatron_exp.experiments.protocol import Analysis, Batches, Experiment, Item, Outcome, Probe, Request, SlotLoss


class Swaps(Experiment):
    """A batch of held-out text, shown once."""

    title = "Forgetting"
    question = "How long does one batch stay better known?"
    citation = "Somebody, 2026"

    def items(self, context):
        size = context.geometry.global_batch_size
        for role, purpose, first in (("treated", "shown", 0), ("control", "never", 1)):
            slots = context.take_pool(purpose, size)
            yield Item(
                item=first,
                condition=role,
                role=role,
                source="pool",
                licence="as the corpus",
                metadata={"slots": [int(slot) for slot in slots]},
            )

    def requests(self, items, context):
        for item in items:
            if item.role == "treated":
                slots = context.take_pool("swapped in", context.geometry.global_batch_size)
                yield Request(item=item.item, kind="swap", where=Batches((10,)), copies=len(slots), exclusive=True, source_slots=slots)

    def probes(self, items, placed, context):
        for item in items:
            yield Probe(item=item.item, name="loss", ask=SlotLoss(item.metadata["slots"][0]), states=(10, 11), live=True)

    @property
    def analysis(self):
        shared = {"unit": "nats per token", "test": "permutation", "side": "greater", "margin": 0.01, "smallest_effect": 0.05}
        return Analysis(
            (
                Outcome(name="gain", estimand="loss gain by state", family="descriptive", **shared),
                Outcome(name="late gain", estimand="gain at the end", family="primary", **shared),
            )
        )
