"""Noise on a few slots."""

from megatron_exp.experiments.protocol import Analysis, Experiment, Item, Noise, Outcome, Request, Window


class NoiseOnSlots(Experiment):
    """Gaussian noise on embeddings."""

    title = "Watermark"
    question = "Does the gradient remember the noise?"
    citation = "Somebody, 2026"

    def items(self, context):
        yield Item(item=1, condition="all", role="treated", source="built in", licence="none")

    def requests(self, items, context):
        yield Request(item=1, kind="noise", where=Window(15, 30), copies=6, exclusive=True, noise=Noise(0.1))

    def probes(self, items, placed, context):
        return iter(())

    @property
    def analysis(self):
        shared = {"unit": "standard deviations", "test": "z", "side": "greater", "margin": 0.5, "smallest_effect": 1.0}
        return Analysis((Outcome(name="statistic", estimand="mean statistic", family="primary", **shared),))
