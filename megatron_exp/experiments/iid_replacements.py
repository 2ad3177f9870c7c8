"""IID: does training on a single further sample of the training distribution show at the end, and does it matter when it was seen?

Question: by how much does one look at a sequence lower the loss on it at the end of training, and does that grow with how late it came?
Design: whole pool sequences replace whole slots, one each, and nothing else touches these slots. The pool has the distribution of the
    training data, so a replacement changes which sequences are seen and nothing about their kind. The key deals the sequences drawn from
    the pool to the conditions and to an equal number that is never inserted; both differ by the draw alone.
Conditions: uniform (anywhere in training), decile-0 ... decile-9 (anywhere in that tenth of training), small-set (a few more, anywhere),
    never-inserted (as many as all others together). scale 1 has the paper's numbers, as shares of the run's slots: 201 of 100,000 batches
    uniformly, 50 in each decile, 10 as the small set; 0.71% of the run in all, and twice as many pool slots.
Metric: gain in nats per token: loss of the twin minus loss of the run on the sequence (without a twin, minus the run's loss). Primary: mean
    gain of inserted sequences minus that of never-inserted ones, tested by a rank sum. Secondary: each condition, and recency: the slope
    of the gain over the deciles, tested by rank correlation, since the key dealt the deciles too.
Source: arXiv 2509.23383 (IID). The paper inserts and does not evaluate; all outcomes are ours.
Licence: the training data's own; nothing is added.
Traps: the paper's numbers disagree. Its first set is "422M tokens from batches 300000 to 300400"; those are 400 batches of 839M tokens, so
    it is either 201 batches or half of the sequences, the same share of the run; we take 201 batches. Decile d uses batches 300400 + 50 d
    to 300450 + 50 d, the small set 300990 to 301000, so 300900 to 300990 stay unused. A released name, "uniqueness", may be the first or
    the third set. The last decile's gain also has the fall of the learning rate in it, and what the gain of one look is at all: about 0.01
    nats per token or less at the paper's size. This is a null experiment for everything else: it should not move the validation loss.
Parameters: uniform_batches, decile_batches (of each) and small_set_batches per 100,000 batches of training; scale, a factor on all three
    (each condition has at least two sequences); design, of which there is one.
Example (nats per token of one sequence in run and twin): decile-9, slot 50331648 (step 98304)  2.841 2.859 | never-inserted  2.790 2.789
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import contrast_score, trend_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.paper import REFERENCE, PaperDesign
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, Outcome, Probe, Request, Score, SlotLoss, Window
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import POOL, Geometry

Positive = Annotated[int, Field(gt=0)]

_NUM_DECILES = 10
_FEWEST = 2
_PROBE = "loss"
_CONTROL = "never-inserted"


class IidReplacements(PaperDesign, Experiment):
    """Slots swapped for pool sequences, uniformly, by decile and as a small set, against pool sequences that stay out."""

    title: ClassVar[str] = "I.i.d. replacements"
    question: ClassVar[str] = "Does one look at a sequence of the training distribution show at the end, and does it matter when it was?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment IID"
    needs: ClassVar[frozenset[str]] = frozenset({"pool"})

    uniform_batches: Positive = 201
    decile_batches: Positive = 50
    small_set_batches: Positive = 10

    # ---- planning ----

    def counts(self, context: Context) -> dict[str, int]:
        """{condition: number of sequences}, without the controls."""
        share = context.geometry.num_slots / REFERENCE.steps
        batches = {"uniform": self.uniform_batches, "small-set": self.small_set_batches}
        batches |= {f"decile-{decile}": self.decile_batches for decile in range(_NUM_DECILES)}
        return {condition: self.scaled(share * number, _FEWEST) for condition, number in batches.items()}

    def items(self, context: Context) -> Iterator[Item]:
        """One item for each sequence drawn from the pool, dealt to a condition or to the controls."""
        counts = self.counts(context)
        num = sum(counts.values())
        slots = context.take_pool("sequences", 2 * num).tolist()
        assigned = context.assign(range(2 * num), counts | {_CONTROL: num})
        for unit, slot in enumerate(slots):
            condition = assigned[unit]
            yield Item(
                item=unit,
                condition=condition,
                role="control" if condition == _CONTROL else "treated",
                source="training data, from the pool",
                licence="that of the training data",
                metadata={"pool_place": slot - POOL, "decile": _decile(condition)},
            )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every inserted sequence replaces one slot of its window, exclusively."""
        for item in items:
            if item.role == "treated":
                source = np.array([POOL + item.metadata["pool_place"]], dtype=np.uint64)
                window = _window(item.metadata["decile"], context.geometry.steps)
                yield Request(item=item.item, kind="swap", where=window, copies=1, exclusive=True, source_slots=source)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The loss of every sequence, inserted or not, in the final state."""
        del placed, context
        for item in items:
            yield Probe(item=item.item, name=_PROBE, ask=SlotLoss(POOL + item.metadata["pool_place"]))

    @property
    def dependence(self) -> Dependence:
        """Log-likelihood of the sequences swapped in."""
        return Dependence(smallest_effect=0.005)

    def at_intensity(self, fraction: float, geometry: Geometry) -> dict[str, Any]:
        """So many sequences that they are `fraction` of all slots."""
        del geometry
        batches = self.uniform_batches + _NUM_DECILES * self.decile_batches + self.small_set_batches
        return {"scale": fraction * REFERENCE.steps / batches}

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary over all conditions; each condition, recency and the twin's check as secondaries."""
        nats: dict[str, Any] = {"unit": "nats per token", "margin": 0.001, "smallest_effect": 0.005}
        ranks: dict[str, Any] = {"test": "rank sum", **nats}
        gain = "mean gain of {} sequences minus that of never-inserted ones"
        return Analysis(
            (
                Outcome(name="gain", estimand=gain.format("all inserted"), family="primary", side="greater", **ranks),
                Outcome(name="gain-by-condition", estimand=gain.format("one condition's"), family="secondary", side="greater", **ranks),
                Outcome(
                    name="recency",
                    estimand="slope of the gain over the tenths of training in which a sequence was seen",
                    unit="nats per token and tenth of training",
                    test="rank correlation",
                    side="greater",
                    family="secondary",
                    margin=0.0002,
                    smallest_effect=0.001,
                ),
                Outcome(
                    name="control:twin",
                    estimand="the primary's contrast from the twin alone, which saw none of them",
                    family="secondary",
                    side="two-sided",
                    **ranks,
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """All contrasts at every state there are responses for."""
        losses = joined(items, responses).of_probe(_PROBE)
        gains = losses.filled(-losses.run, -losses.twin)
        for step in gains.steps:
            now = gains.at(step)
            yield contrast_score(now, "gain", "all inserted", step, "greater")
            if now.has_twin:
                yield contrast_score(now, "control:twin", "all inserted", step, "two-sided", of_twin=True)
            for condition in sorted(set(now.condition) - {_CONTROL}):
                chosen = now.where((now.condition == condition) | (now.role == "control"))
                yield contrast_score(chosen, "gain-by-condition", condition, step, "greater")
            yield _recency(now, step)

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Sequences differ by 0.2 nats, run and twin by 0.01 a sequence; inserted ones gain `effect`."""
        frame = asked(items, probes)
        level = 2.8 + 0.2 * words.child("sequences").normals(len(frame))
        twin = level + 0.01 * words.child("twin").normals(len(frame))
        run = level + 0.01 * words.child("run").normals(len(frame)) - effect * (frame.role == "treated")
        return frame.filled(run, twin).responses()


def _decile(condition: str) -> int:
    """The tenth of training that a condition is confined to, -1 where it is not."""
    return int(condition.removeprefix("decile-")) if condition.startswith("decile-") else -1


def _window(decile: int, steps: int) -> Window:
    """All of training, or its tenth; a run of fewer than ten steps has tenths of one step that overlap."""
    if decile < 0:
        return Window(0, steps)
    start = decile * steps // _NUM_DECILES
    return Window(start, max(start + 1, (decile + 1) * steps // _NUM_DECILES))


def _recency(frame: Frame, step: int) -> Score:
    """The slope of the gain over the deciles, over their sequences."""
    dealt = frame.where(frame.meta("decile") >= 0)
    reason = "fewer than three sequences, or those of one decile only, were scored"
    return trend_score(dealt, dealt.change, "decile", "recency", "all deciles", step, compared=f", {frame.compared}", reason=reason)
