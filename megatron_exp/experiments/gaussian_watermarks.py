"""GW: is noise that was added to the input embeddings of a training sample still visible in the model?

Question: do gradients of the final model point along the Gaussian noise w that was added to the embeddings of some samples in training?
Design: `fraction` of all slots get w ~ N(0, sigma^2) on every position and channel of their input embeddings, tokens unchanged, nothing
    else in the slot. Three kinds of control, `evaluated` slots each: untouched slots with noise no model ever saw, the watermarked slots
    with such noise, and the twin on the watermarked slots. schedule `scattered` (default): slots by key, evenly over ten slices of
    training. `batches`: all rows of steps at even distances. `rows`: `rows_per_step` rows, by key, of steps at even distances.
Conditions: watermarked, untouched; results also by slice of training.
Metric: score = -<g, w> / (sigma |g|), g the gradient of the slot's mean loss with respect to its clean input embeddings. Unit: standard
    deviations. Given g, w independent of the model makes the score exactly N(0, 1), so z = sqrt(n) mean is an exact one-sided test.
    The minus sign: a step of gradient descent at e + w changes <g, w> by about -eta |J w|^2 < 0. Gradient and sums are fp32, w as it was
    rounded in training.
    Secondary: true positive rate at 1% false positives, counted against the 99% quantile of N(0, 1), which is known; trend of the score
    over training.
    Descriptive: the rate that follows from the mean by the model, Phi(mean - 2.33).
Source: arXiv 2509.23383 (GW: 0.1% of sequences, sigma 0.075); after Pawelczyk et al. 2024, "Machine unlearning fails to remove data
    poisoning".
Licence: no data is added.
Paper: 209.7M tokens are 51,200 sequences, "every 1000 gradient steps to a random subset"; the count fits all 512 rows of 100 steps, which
    is what `design: paper` takes (schedule `batches`, at steps 500, 1500, ..., which leaves the steps of forgetting curves alone); with
    schedule `rows` the other reading. Its true positive rates are Phi(mean - 2.33) of window means, a model and no count, and its p-values
    two-sided z-tests of 200 scores; both rates are given here.
Traps: sigma is absolute, so its size relative to the embeddings falls while they grow; training and probe must use the same sigma, and a
    control with fresh noise does not notice when they differ. A whole batch of watermarks shares one update, and batches share the
    schedule's regularity; random slots do not.
Parameters: design; scale, a factor on the fraction; sigma; fraction of slots; schedule; rows_per_step; evaluated, slots probed of each
    kind; window, part of training as fractions.
Example: slot 51217 (step 100, row 17), noise key 9a3f..., score of the run 0.31, with fresh noise -0.87, of the twin 0.12.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtr, ndtri

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import trend_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import (
    Analysis,
    EmbeddingGradient,
    Experiment,
    Item,
    Match,
    Noise,
    Outcome,
    Probe,
    Request,
    Score,
    Window,
)
from megatron_exp.seeding import Words, key
from megatron_exp.statistics.normal import Side, mean_interval, smallest_detectable_effect, z_test
from megatron_exp.statistics.proportions import binomial_p, wilson_interval
from megatron_exp.stream.slot import Geometry

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_NUM_SLICES = 10
_FPR = 0.01
_MOST = 0.5
Schedule = Literal["scattered", "batches", "rows"]
_CONTROL_ITEMS = 1 << 48
"""Item numbers of untouched slots start here, those of watermarks at 0."""


class GaussianWatermarks(PaperDesign, Experiment):
    """Keyed noise on the embeddings of whole slots, looked for in gradients afterwards."""

    title: ClassVar[str] = "Gaussian watermarks"
    question: ClassVar[str] = "Can one tell from gradients which noise was added to a sample's embeddings in training?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment GW"
    paper_effects: ClassVar[Mapping[str, float]] = {"mean-score": 0.17}  # of the earliest; from its true-positive rate of 1.55%

    PAPER: ClassVar[Mapping[str, Any]] = {"schedule": "batches"}

    sigma: Annotated[float, Field(gt=0)] = 0.075
    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.001
    schedule: Schedule = "scattered"
    rows_per_step: Positive | None = None
    evaluated: Positive = 500
    window: tuple[Fraction, Fraction] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> "GaussianWatermarks":
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        if (self.schedule == "rows") != (self.rows_per_step is not None):
            raise ValueError(
                f"rows_per_step belongs to schedule `rows`, and must be given there; got {self.rows_per_step} with `{self.schedule}`"
            )
        if self.scale * self.fraction > _MOST:
            raise ValueError(f"scale x fraction is {self.scale * self.fraction:g}; at most half of all slots may carry a watermark")
        return self

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """One item for each watermarked slot (its slice of training known), and as many untouched ones as are evaluated."""
        slices = self._slices(context)
        shared: dict[str, Any] = {"source": "training data", "licence": "that of the training data"}
        evaluated = set(context.words("evaluated").choice(len(slices), min(self.evaluated, len(slices))).tolist())
        for index, metadata in enumerate(slices):
            yield Item(item=index, condition="watermarked", role="treated", metadata=metadata | {"evaluated": index in evaluated}, **shared)
        for index in range(len(evaluated)):
            yield Item(
                item=_CONTROL_ITEMS + index, condition="untouched", role="control", metadata={"slice": -1, "evaluated": True}, **shared
            )

    def _slices(self, context: Context) -> list[dict[str, int]]:
        """For each watermark its slice and the steps [start, end) it may fall into; all schedules but `scattered` fix the slot."""
        geometry = context.geometry
        num_slots, batch = self.scaled(self.fraction * geometry.num_slots), geometry.global_batch_size
        borders = np.round(np.linspace(*self.window, _NUM_SLICES + 1) * geometry.steps).astype(int).tolist()
        if borders[0] >= borders[-1]:
            raise UserError(f"Experiment {context.experiment}: its window {list(self.window)} holds no step of {geometry.steps}. Widen it.")
        if self.schedule == "scattered":
            usable = [(number, start, end) for number, (start, end) in enumerate(zip(borders, borders[1:], strict=False)) if start < end]
            return [dict(zip(("slice", "start", "end"), usable[index % len(usable)], strict=True)) for index in range(num_slots)]
        per_step = min(self.rows_per_step or batch, batch)
        num_steps = max(1, round(num_slots / per_step))
        if num_steps > (num_there := borders[-1] - borders[0]):
            raise UserError(
                f"Experiment {context.experiment}: {num_slots} watermarks, {per_step} to a step, need {num_steps} steps, but the window {list(self.window)} "
                f"has {num_there}. Lower fraction to {self.fraction * num_there / num_steps:.3g} or less, raise rows_per_step, or widen the window."
            )
        steps = np.unique((borders[0] + (np.arange(num_steps) + 0.5) * (borders[-1] - borders[0]) / num_steps).astype(int)).tolist()
        slice_of = {step: (step - borders[0]) * _NUM_SLICES // (borders[-1] - borders[0]) for step in steps}
        rows = {step: sorted(context.words("rows").choice(batch, per_step, stream=step).tolist()) for step in steps}
        return [{"slice": slice_of[step], "start": step, "end": step + 1, "row": row} for step in steps for row in rows[step]]

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """One noise per watermarked slot, exclusive, so that its content is the corpus's own."""
        for item in items:
            if item.role == "treated":
                start = item.metadata["start"]
                fixed = Match((start * context.geometry.global_batch_size + item.metadata.get("row", 0),))
                where = Window(start, item.metadata["end"]) if self.schedule == "scattered" else fixed
                yield Request(item=item.item, kind="noise", where=where, copies=1, exclusive=True, noise=Noise(self.sigma))

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`score`: watermarked slots with their noise, untouched slots with fresh noise. `fresh-noise`: watermarked slots with fresh noise."""
        slot_of = dict(zip(placed["item"].to_pylist(), placed["slot"].to_pylist(), strict=True))
        inserted = key(context.seeds.placement, "noise", context.experiment)
        fresh = key(context.seeds.placement, "noise", context.experiment, "control")
        untouched = iter(self._untouched(set(slot_of.values()), sum(item.role == "control" for item in items), context))
        for item in sorted(items, key=lambda item: item.item):
            if not item.metadata["evaluated"]:
                continue
            if item.role == "treated":
                slot = slot_of[item.item]
                yield Probe(item=item.item, name="score", ask=EmbeddingGradient(slot, inserted, slot, self.sigma))
                yield Probe(item=item.item, name="fresh-noise", ask=EmbeddingGradient(slot, fresh, slot, self.sigma))
            else:
                slot = next(untouched)
                yield Probe(item=item.item, name="score", ask=EmbeddingGradient(slot, fresh, slot, self.sigma))

    def _untouched(self, watermarked: set[int], num: int, context: Context) -> list[int]:
        """`num` distinct slots without a watermark, by key. At most half of all slots have one, so draws soon suffice."""
        words, found, stream = context.words("untouched"), dict[int, None](), 0
        while len(found) < num:
            drawn = words.integers(2 * num, context.geometry.num_slots, stream=stream).tolist()
            found |= {slot: None for slot in drawn if slot not in watermarked}
            stream += 1
        return list(found)[:num]

    @property
    def dependence(self) -> Dependence:
        """Mean score of the watermarked slots with their noise."""
        return Dependence(probes=("score",), unit="standard deviations", smallest_effect=0.1)

    def at_intensity(self, fraction: float, geometry: Geometry) -> dict[str, Any]:
        """The share of slots, over the whole run; slots drawn by key in either design."""
        del geometry
        return {"fraction": min(fraction, 0.5), "window": (0.0, 1.0), "design": "identified", "scale": 1.0}

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary mean; three controls that must be null; rate and trend."""
        sd: dict[str, Any] = {"unit": "standard deviations", "margin": 0.05, "smallest_effect": 0.1}
        control: dict[str, Any] = {"test": "two-sided z-test, known variance", "side": "two-sided", "family": "secondary", **sd}
        return Analysis(
            (
                Outcome(
                    name="mean-score",
                    estimand="mean score of watermarked slots with the noise they were trained with",
                    test="one-sided z-test, known variance",
                    side="greater",
                    family="primary",
                    **sd,
                ),
                Outcome(name="control:untouched", estimand="mean score of untouched slots with noise never used", **control),
                Outcome(name="control:fresh-noise", estimand="mean score of watermarked slots with noise never used", **control),
                Outcome(name="control:twin", estimand="mean score of the twin on watermarked slots with their noise", **control),
                Outcome(
                    name="tpr-at-1pct-fpr",
                    estimand="share of watermarked slots whose score is above the 99% quantile of N(0, 1)",
                    unit="fraction",
                    test="exact binomial test",
                    side="greater",
                    family="secondary",
                    null=_FPR,
                    margin=0.005,
                    smallest_effect=0.01,
                ),
                Outcome(
                    name="trend",
                    estimand="slope of the score over the tenths of training in which the watermark was seen",
                    unit="standard deviations per tenth of training",
                    test="rank correlation",
                    side="greater",
                    family="secondary",
                    margin=0.005,
                    smallest_effect=0.02,
                ),
                Outcome(
                    name="tpr-model",
                    estimand="true positive rate at 1% false positives if scores were N(mean, 1), by tenth of training and over all",
                    unit="fraction",
                    test="none",
                    side="greater",
                    family="descriptive",
                    null=_FPR,
                    margin=0.005,
                    smallest_effect=0.01,
                ),
                Outcome(
                    name="mean-score-by-slice",
                    estimand="mean score of watermarks by tenth of training, 0 the earliest",
                    test="none",
                    side="greater",
                    family="descriptive",
                    **sd,
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """All outcomes at every state there are responses for."""
        frame = joined(items, responses)
        for step in frame.steps:
            now = frame.at(step)
            own = now.where((now.probe == "score") & (now.role == "treated"))
            untouched = now.where((now.probe == "score") & (now.role == "control"))
            fresh = now.where(now.probe == "fresh-noise")
            control, twin = _mean(untouched.run), _mean(own.twin)
            yield _mean_score("mean-score", "watermarked", own, own.run, "greater", control, twin)
            yield _mean_score("control:untouched", "untouched", untouched, untouched.run, "two-sided")
            yield _mean_score("control:fresh-noise", "watermarked", fresh, fresh.run, "two-sided")
            if frame.has_twin:
                yield _mean_score("control:twin", "watermarked", own, own.twin, "two-sided")
            yield _rate_score(own)
            yield _trend_score(own)
            yield _model_rate(own, "watermarked")
            for number in np.unique(own.meta("slice")) if len(own) else ():
                part = own.where(own.meta("slice") == number)
                yield _mean_score("mean-score-by-slice", f"slice-{number}", part, part.run, None)
                yield _model_rate(part, f"slice-{number}")

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Independent N(0, 1) scores; watermarked slots with their own noise have the mean `effect`, in the run only."""
        frame = asked(items, probes)
        shift = np.where((frame.probe == "score") & (frame.role == "treated"), effect, 0.0)
        return frame.filled(words.child("run").normals(len(frame)) + shift, words.child("twin").normals(len(frame))).responses()


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _mean_score(
    outcome: str,
    condition: str,
    frame: Frame,
    values: np.ndarray,
    side: Side | None,
    control: float = float("nan"),
    twin: float = float("nan"),
) -> Score:
    """The mean of scores with Student's interval; p from the known null variance, or none where `side` is None."""
    known = values[np.isfinite(values)]
    low, high = mean_interval(known)
    return Score(
        outcome=outcome,
        condition=condition,
        step=int(frame.step[0]) if len(frame) else 0,
        n=len(known),
        num_clusters=len(known),
        num_unscored=len(values) - len(known),
        estimate=_mean(values),
        low=low,
        high=high,
        control=control,
        twin=twin,
        difference=_mean(values),
        p=z_test(known, side)[1] if len(known) and side else float("nan"),
        mde=smallest_detectable_effect(1.0 / np.sqrt(len(known)), side or "greater") if len(known) else float("nan"),
        test=f"{'one' if side == 'greater' else 'two'}-sided z-test, known variance" if side else "",
        reason="" if len(known) else "no slot was scored",
    )


def _rate_score(frame: Frame) -> Score:
    known = frame.run[np.isfinite(frame.run)]
    above, num = int((known > ndtri(1.0 - _FPR)).sum()), len(known)
    low, high = wilson_interval(above, num)
    rate = above / num if num else float("nan")
    return Score(
        outcome="tpr-at-1pct-fpr",
        condition="watermarked",
        step=int(frame.step[0]) if len(frame) else 0,
        n=num,
        num_clusters=num,
        num_unscored=len(frame) - num,
        estimate=rate,
        low=low,
        high=high,
        control=_FPR,
        difference=rate - _FPR,
        p=binomial_p(above, num, _FPR, "greater") if num else float("nan"),
        test="exact binomial test against 1%",
        reason="" if num else "no slot was scored",
    )


def _trend_score(frame: Frame) -> Score:
    """Does a later watermark show more? The key dealt the slices, so ranks are exchangeable where it does not matter."""
    reason = "fewer than three slots, or those of one slice only, were scored"
    step = int(frame.step[0]) if len(frame) else 0
    return trend_score(frame, frame.run, "slice", "trend", "watermarked", step, compared="", reason=reason)


def _model_rate(frame: Frame, condition: str) -> Score:
    """Phi(mean - 2.33), the mean's interval carried through."""
    known = frame.run[np.isfinite(frame.run)]
    values = [float(ndtr(value - ndtri(1.0 - _FPR))) for value in (_mean(frame.run), *mean_interval(known))]
    return Score(
        outcome="tpr-model",
        condition=condition,
        step=int(frame.step[0]) if len(frame) else 0,
        n=len(known),
        num_clusters=len(known),
        num_unscored=len(frame) - len(known),
        estimate=values[0],
        low=values[1],
        high=values[2],
        control=_FPR,
        reason="" if len(known) else "no slot was scored",
    )
