"""FC: how much does one batch change a model, and how fast is it forgotten?

Question: by how much does training on one whole batch lower the loss on that batch, one step later and over the rest of training?
Design: for each of `num_batches` steps two batches come from the pool, which is identically distributed to the training data and never
    trained on. A keyed coin decides which of the two replaces the whole batch of that step; the other is never injected. The loss on
    every row of both is measured, in run and twin, just before the step and at `offsets` after it, during training, and then on a
    coarse grid to the end.
Conditions: injected, never-injected; one pair for each injection step.
Metric: gain = twin's loss minus run's loss, in nats per token (without a twin: the run's loss just before the step minus its loss now). The
    primary is gain(injected) - gain(never-injected) one step after the injection; the coins are fair, so a sign-flip test over the pairs is
    exact: nine pairs can reach p = 1/512. Descriptions: the curve of that contrast; `gain-against-twin`, the gain on injected batches
    alone, which the paper plots; the noise band, within which 95% of the gains on never-injected batches lie; the offset from which on the
    mean gain stays in it; retention, and a power law a (1 + t/tau)^-b from the peak on.
Source: arXiv 2509.23383 (FC: nine batches at 10%, 20%, ..., 90% of training); forgetting after Pagliardini et al. 2024.
Licence: the training data's own; nothing is added.
Paper: nine batches replace those of steps "10001", "20001", ..., counted from 1: here steps 10000, 20000, ..., first visible in states
    10001, 20001, ... `design: paper` measures just before and after, every 10 steps to +200, every 500 to +10,000, and every 5,000 steps
    of the whole run. The paper compares with the twin alone, which counts every other difference between run and twin (about 0.001 nats)
    as gain; the never-injected batches take it out, in both designs.
Traps: the gain grows after the batch has gone (momentum): its peak lies tens of steps later. An injected batch takes its whole step, so
    other experiments find no room there: list this experiment first, or theirs will move.
Parameters: design; num_batches at even distances over the part `window` of training, times scale; offsets in steps after the injection (0
    is the state before it, 1 the first that has seen it); grid_points, states over the whole of training at which all earlier pairs are
    measured again; evaluated_rows of each batch, by key (default all).
Example (batch 3 at step 30000; nats per token of the injected batch in run and twin):
    state 30000  2.787 2.788 | 30001  2.748 2.788 | 30020  2.567 2.787 | 30200  2.660 2.786
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, Match, Outcome, Probe, Request, Score, SlotLoss
from megatron_exp.seeding import Words
from megatron_exp.statistics.decay import fit_power_law
from megatron_exp.statistics.normal import Side, mean_interval, smallest_detectable_effect, standard_error
from megatron_exp.statistics.resampling import sign_flip_test
from megatron_exp.stream.slot import POOL, Geometry

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_PROBE = "loss"
_BAND, _FEWEST_FOR_A_BAND = 0.95, 20


class ForgettingCurves(PaperDesign, Experiment):
    """Whole batches swapped in from the pool, each with a never-injected partner."""

    title: ClassVar[str] = "Forgetting curves"
    question: ClassVar[str] = "How much does one batch lower the loss on itself, and how fast is that lost?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment FC"
    needs: ClassVar[frozenset[str]] = frozenset({"pool"})
    paper_effects: ClassVar[Mapping[str, float]] = {"gain-after-one-step": 0.038}  # read from its figure: 0.039, 0.037, 0.038

    PAPER: ClassVar[Mapping[str, Any]] = {"offsets": (0, 1, *range(10, 201, 10), *range(500, 10_001, 500)), "grid_points": 20}

    num_batches: Positive = 9
    window: tuple[Fraction, Fraction] = (0.1, 0.9)
    offsets: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
    grid_points: Annotated[int, Field(ge=0)] = 20
    evaluated_rows: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "ForgettingCurves":
        if not {0, 1} <= set(self.offsets):
            raise ValueError(f"offsets must hold 0 (the state before the injection) and 1 (the first after it), got {list(self.offsets)}")
        if self.window[0] > self.window[1] or (self.num_batches > 1 and self.window[0] == self.window[1]):
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        return self

    @property
    def num_pairs(self) -> int:
        """Injected batches, each with a never-injected one."""
        return self.scaled(self.num_batches)

    # ---- planning ----

    def steps(self, context: Context) -> list[int]:
        """The injection steps, at even distances from the start of the window to its end."""
        last = context.geometry.steps - 1
        fractions = np.linspace(*self.window, self.num_pairs) if self.num_pairs > 1 else [self.window[0]]
        steps = [min(round(fraction * context.geometry.steps), last) for fraction in fractions]
        if len(set(steps)) < len(steps):
            raise UserError(
                f"Experiment {context.experiment}: {self.num_pairs} batches do not fit into the window {list(self.window)} of "
                f"{context.geometry.steps} steps. Ask for fewer batches or widen the window."
            )
        return steps

    def items(self, context: Context) -> Iterator[Item]:
        """One item for each row of each batch; the two batches of a pair are one cluster and the coin falls within it."""
        batch = context.geometry.global_batch_size
        units = range(2 * self.num_pairs)
        counts = {"injected": self.num_pairs, "never-injected": self.num_pairs}
        assigned = context.assign(units, counts, {unit: f"pair-{unit // 2:04d}" for unit in units})
        for pair, step in enumerate(self.steps(context)):
            slots = context.take_pool(f"pair-{pair}", 2 * batch)
            for unit in (2 * pair, 2 * pair + 1):
                for row in range(batch):
                    slot = int(slots[(unit % 2) * batch + row])
                    yield Item(
                        item=unit * batch + row,
                        condition=assigned[unit],
                        role="treated" if assigned[unit] == "injected" else "control",
                        assignment_unit=unit,
                        stratum=f"pair-{pair:04d}",
                        cluster=pair,
                        source="training data, from the pool",
                        licence="that of the training data",
                        metadata={"pair": pair, "step": step, "row": row, "pool_place": slot - POOL},
                    )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Row r of an injected batch replaces row r of its step, exclusively."""
        batch = context.geometry.global_batch_size
        for item in items:
            if item.role == "treated":
                place = item.metadata["step"] * batch + item.metadata["row"]
                source = np.array([POOL + item.metadata["pool_place"]], dtype=np.uint64)
                yield Request(item=item.item, kind="swap", where=Match((place,)), copies=1, exclusive=True, source_slots=source)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The loss of every row of both batches around its injection and on the grid, of the model in memory."""
        del placed
        total = context.geometry.steps
        grid = {round(total * point / self.grid_points) for point in range(1, self.grid_points + 1)} | {total}
        states = {
            step: tuple(sorted({step + offset for offset in self.offsets if step + offset <= total} | {t for t in grid if t > step}))
            for step in self.steps(context)
        }
        batch = context.geometry.global_batch_size
        rows = set(context.words("rows").choice(batch, min(self.evaluated_rows or batch, batch)).tolist())
        for item in items:
            slot = POOL + item.metadata["pool_place"]
            if item.metadata["row"] in rows:
                yield Probe(item=item.item, name=_PROBE, ask=SlotLoss(slot), states=states[item.metadata["step"]], live=True)

    @property
    def dependence(self) -> Dependence:
        """Log-likelihood of the batches swapped in, at the end."""
        return Dependence(smallest_effect=0.005)

    def at_intensity(self, fraction: float, geometry: Geometry) -> dict[str, Any]:
        """So many batches that they are `fraction` of all steps, in the second half: a batch swapped in early is forgotten when it is asked about."""
        return {
            "num_batches": max(1, round(fraction * geometry.steps)),
            "window": (0.5, 0.95),
            "offsets": (0, 1),
            "grid_points": 0,
            "scale": 1.0,
        }

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary contrast one step after the injection; curve, retention and power law as description."""
        nats: dict[str, Any] = {"unit": "nats per token", "margin": 0.002, "smallest_effect": 0.01}
        gain = "gain on injected minus gain on never-injected batches"
        return Analysis(
            (
                Outcome(
                    name="gain-after-one-step",
                    estimand=f"{gain} in the state after the injection, mean over pairs",
                    test="sign-flip test over pairs",
                    side="greater",
                    family="primary",
                    **nats,
                ),
                Outcome(
                    name="control:twin",
                    estimand="the twin's own fall in loss over that step, injected minus never-injected batches; it saw neither",
                    test="sign-flip test over pairs",
                    side="two-sided",
                    family="secondary",
                    **nats,
                ),
                *self._curves(gain, nats),
            )
        )

    def _curves(self, gain: str, nats: dict[str, Any]) -> tuple[Outcome, ...]:
        described: dict[str, Any] = {"side": "greater", "test": "none", "family": "descriptive"}
        return (
            Outcome(name="gain", estimand=f"{gain}, mean over pairs, by steps since the injection", **nats, **described),
            Outcome(
                name="gain-against-twin",
                estimand="gain on injected batches alone, mean over them, by steps since the injection",
                **nats,
                **described,
            ),
            Outcome(
                name="noise-band",
                estimand="half width of the band that holds 95% of the gains on never-injected batches",
                **nats,
                **described,
            ),
            Outcome(
                name="forgotten-after",
                estimand="first offset from which on the mean gain on injected batches stays in the noise band",
                unit="steps",
                margin=0.5,
                smallest_effect=1.0,
                **described,
            ),
            Outcome(name="gain-of-pair", estimand=f"{gain}, of one pair, by state", **nats, **described),
            Outcome(
                name="retention",
                estimand="mean gain as a fraction of its largest value over offsets",
                unit="fraction",
                margin=0.02,
                smallest_effect=0.1,
                **described,
            ),
            Outcome(
                name="decay-exponent",
                estimand="b of a (1 + t/tau)^-b fitted to the mean gain from its peak on",
                unit="1",
                margin=0.1,
                smallest_effect=0.1,
                **described,
            ),
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The contrast of every pair at every state, averaged at every offset; p for the primary and the twin's control only.

        Tested rows carry the last state asked about, since they use the states of all pairs.
        """
        frame = joined(items, responses).of_probe(_PROBE)
        contrasts = _contrasts(frame)
        starts = dict(zip(frame.cluster.tolist(), frame.meta("step").tolist(), strict=True))
        first = [contrasts[pair, start + 1] for pair, start in sorted(starts.items()) if (pair, start + 1) in contrasts]
        used = frame.where(frame.step == frame.meta("step") + 1)
        yield _tested("gain-after-one-step", "greater", [one.gain for one in first], used, frame, control=[one.control for one in first])
        if frame.has_twin:
            yield _tested("control:twin", "two-sided", [one.twin for one in first], used, frame)
        for pair, state in sorted(contrasts):
            yield _described("gain-of-pair", f"pair-{pair}", state, [contrasts[pair, state].gain])
        mean_gain: dict[int, float] = {}
        injected: dict[int, float] = {}
        for offset in sorted(set(self.offsets) - {0}):
            found = {pair: contrasts[pair, start + offset] for pair, start in starts.items() if (pair, start + offset) in contrasts}
            if found:
                state = max(starts[pair] for pair in found) + offset
                gain = _described("gain", f"+{offset}", state, [one.gain for one in found.values()])
                alone = _described("gain-against-twin", f"+{offset}", state, [one.gain + one.control for one in found.values()])
                mean_gain[offset], injected[offset] = gain.estimate, alone.estimate
                yield gain
                yield alone
        yield from _retention(mean_gain, max(starts.values(), default=0))
        yield from _forgotten(injected, [one.control for one in contrasts.values()], max(frame.steps, default=0))

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Rows differ by 0.2 nats, run and twin by row noise and a shared offset; injected rows gain `effect` from one step after the injection on."""
        frame = asked(items, probes)
        row = 2.8 + 0.2 * words.child("rows").normals(int(frame.item.max()) + 1)[frame.item]
        learning = -1e-6 * frame.step
        gain = np.where((frame.role == "treated") & (frame.step > frame.meta("step")), effect, 0.0)
        twin = row + learning + 0.01 * words.child("twin").normals(len(frame))
        run = row + learning + 0.01 * words.child("run").normals(len(frame)) - 0.001 - gain
        return frame.filled(run, twin).responses()


class _Contrast(NamedTuple):
    """One pair in one state, nats per token. gain: on injected minus on never-injected rows; control: on the latter; twin: the twin's own."""

    gain: float
    control: float
    twin: float


def _contrasts(frame: Frame) -> dict[tuple[int, int], _Contrast]:
    """{(pair, state): contrast}, wherever both batches were scored.

    With a twin a gain is twin minus run in that state. Without one it is the run's loss just before the injection minus that now.
    The twin's own contrast is made the second way, from a model that saw neither batch: it shows what the coin alone does.
    """
    known = frame.where(np.isfinite(frame.change))
    sums: dict[tuple[int, int, str], np.ndarray] = {}
    for pair, state, role, run, twin in zip(known.cluster.tolist(), known.step.tolist(), known.role, known.run, known.twin, strict=True):
        sums[pair, state, role] = sums.get((pair, state, role), np.zeros(3)) + (run, twin, 1.0)
    mean = {key: total[:2] / total[2] for key, total in sums.items()}
    before = dict(zip(frame.cluster.tolist(), frame.meta("step").tolist(), strict=True))
    unknown = np.full(2, np.nan)
    found = {}
    for pair, state in {(pair, state) for pair, state, _ in mean}:
        now = [mean.get((pair, state, role), unknown) for role in ("treated", "control")]
        start = [mean.get((pair, before[pair], role), unknown) for role in ("treated", "control")]
        gains = [n[1] - n[0] if frame.has_twin else s[0] - n[0] for n, s in zip(now, start, strict=True)]
        own = [s[1] - n[1] for n, s in zip(now, start, strict=True)]
        if np.isfinite(gains).all():
            found[pair, state] = _Contrast(float(gains[0] - gains[1]), float(gains[1]), float(own[0] - own[1]))
    return found


def _tested(outcome: str, side: Side, values: Sequence[float], used: Frame, frame: Frame, control: Sequence[float] = ()) -> Score:
    """The mean over pairs with Student's interval and the sign-flip test."""
    known = np.array([value for value in values if np.isfinite(value)])
    test = sign_flip_test(known, side, Words.of(0, "score", frame.experiment, outcome))
    low, high = mean_interval(known)
    return Score(
        outcome=outcome,
        condition="all pairs",
        step=max(frame.steps, default=0),
        n=len(used),
        num_clusters=len(known),
        num_unscored=int((~np.isfinite(used.change)).sum()),
        estimate=test.mean,
        low=low,
        high=high,
        control=float(np.mean(control)) if len(control) else float("nan"),
        difference=test.mean,
        p=test.p,
        mde=smallest_detectable_effect(standard_error(known), side, freedom=len(known) - 1),
        test=f"{test.method}, {frame.compared}",
        reason="" if len(known) else "no pair has scored rows of both batches in the states it needs",
    )


def _described(outcome: str, condition: str, state: int, values: Sequence[float]) -> Score:
    low, high = mean_interval(np.array(values))
    return Score(
        outcome=outcome,
        condition=condition,
        step=state,
        n=len(values),
        num_clusters=len(values),
        estimate=float(np.mean(values)),
        low=low,
        high=high,
    )


def _retention(mean_gain: Mapping[int, float], last_start: int) -> Iterator[Score]:
    """The mean gain relative to its peak, and the power law from the peak on."""
    if not mean_gain or max(mean_gain.values()) <= 0:
        return
    peak = max(mean_gain, key=lambda offset: mean_gain[offset])
    for offset, gain in mean_gain.items():
        yield _described("retention", f"+{offset}", last_start + offset, [gain / mean_gain[peak]])
    after = [offset for offset in mean_gain if offset >= peak]
    fit = fit_power_law(np.array([offset - peak for offset in after], np.float64), np.array([mean_gain[offset] for offset in after]))
    if np.isfinite(fit.exponent):
        yield _described("decay-exponent", f"tau = {fit.time:.3g} steps, peak at +{peak}", last_start + after[-1], [fit.exponent])


def _forgotten(injected: Mapping[int, float], never: Sequence[float], state: int) -> Iterator[Score]:
    """The noise band, around the mean of the gains on never-injected batches, and when the mean gain of injected ones stays in it."""
    if len(never) < _FEWEST_FOR_A_BAND:
        return
    centre, values = float(np.mean(never)), np.array(never)
    half = float(np.quantile(np.abs(values - centre), _BAND))
    yield replace(_described("noise-band", f"around {centre:.4g}", state, [half]), n=len(values))
    outside = [offset for offset, gain in injected.items() if abs(gain - centre) > half]
    after = [offset for offset in injected if offset > max(outside, default=-1)]
    if after and outside:
        yield _described("forgotten-after", f"out of the band until +{max(outside)}", state, [float(min(after))])
