"""Training dynamics of the run beside its twin: losses, gradient norm, layer norms."""

import numpy as np
from matplotlib.axes import Axes

from megatron_exp.display.numbers import measured, signed
from megatron_exp.report.figures import (
    CONTROL,
    DASHES,
    MARKERS,
    PALETTE,
    RUN,
    TWIN,
    Picture,
    picture,
    plain_log_scale,
    thinned,
    thinning_note,
)
from megatron_exp.report.gather import Inputs
from megatron_exp.run_record import Series

_X_LABEL = "updates done"


def dynamics_pictures(inputs: Inputs) -> list[Picture]:
    """The plots that the metrics allow, in reading order; a quantity nobody measured has no plot."""
    drawn = [
        _pair(inputs, ("loss",), "Training loss", "nats per token"),
        _difference(inputs),
        _pair(inputs, ("validation_loss",), "Validation loss", "nats per token"),
        _pair(inputs, ("grad_norm",), "Gradient norm", "norm before clipping"),
        _norms(inputs),
        _distance(inputs),
    ]
    return [one for one in drawn if one is not None]


def _pair(inputs: Inputs, keys: tuple[str, ...], title: str, unit: str) -> Picture | None:
    run, twin = inputs.history.series(*keys), inputs.twin_history.series(*keys)
    if not len(run):
        return None
    ending = f"ends at {measured(run.last)}" + (f", the twin at {measured(twin.last)}" if len(twin) else "")

    def draw(axes: Axes) -> None:
        _line(axes, run, "run", RUN, "-")
        if len(twin):
            _line(axes, twin, "twin", TWIN, DASHES[1])
        _finish(axes, title, unit)

    return picture(
        draw,
        alt=f"Line plot of {title.lower()} over {int(run.steps[-1])} updates for the run{' and its twin' if len(twin) else ''}; the run {ending}.",
        caption=f"{title} ({unit}); the run {ending}.{thinning_note(run)}",
    )


def _difference(inputs: Inputs) -> Picture | None:
    gap = inputs.history.series("loss").minus(inputs.twin_history.series("loss"))
    if not len(gap):
        return None

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=CONTROL, linewidth=0.8)
        _line(axes, gap, "run − twin", RUN, "-")
        _finish(axes, "Training loss, run − twin", "nats per token")

    caption = (
        f"Difference of the training losses at the same update ({signed(gap.last)} at the last). The batches differ where experiments rewrote them, "
        f"so peaks show rewritten batches.{thinning_note(gap)}"
    )
    return picture(
        draw, alt=f"Line plot of the training loss of the run minus that of the twin over {int(gap.steps[-1])} updates.", caption=caption
    )


def _norms(inputs: Inputs) -> Picture | None:
    names = inputs.history.names("norms")
    if not names:
        return None

    def draw(axes: Axes) -> None:
        for index, name in enumerate(names):
            colour = PALETTE[index % len(PALETTE)]
            _line(axes, inputs.history.series("norms", name), name, colour, "-", MARKERS[index % len(MARKERS)])
            twin = inputs.twin_history.series("norms", name)
            if len(twin):
                _line(axes, twin, f"{name}, twin", colour, DASHES[1])
        _finish(axes, "Weight norms", "L2 norm")
        if all((inputs.history.series("norms", name).values > 0).all() for name in names):
            plain_log_scale(axes, "y")

    last = ", ".join(f"{name} {measured(inputs.history.series('norms', name).last)}" for name in names)
    return picture(
        draw,
        alt=f"Line plot of the weight norms of the parts {', '.join(names)} over updates; last values: {last}.",
        caption=f"L2 norms of the weights by part of the model; dashed: the twin. Last values: {last}.",
    )


def _distance(inputs: Inputs) -> Picture | None:
    """Relative distance of the weights of run and twin, in the states that `eval` found checkpoints of both in."""
    found = inputs.results.record.get("weight_distance") or {}
    states = sorted(map(int, found))
    if not states:
        return None
    parts = list(found[str(states[0])])
    steps = np.array(states)
    shares = {part: np.array([found[str(state)][part]["distance"] / found[str(state)][part]["norm"] for state in states]) for part in parts}

    def draw(axes: Axes) -> None:
        for index, part in enumerate(parts):
            _line(
                axes,
                Series(steps, shares[part]),
                part,
                PALETTE[index % len(PALETTE)],
                DASHES[index % len(DASHES)],
                MARKERS[index % len(MARKERS)],
            )
        _finish(axes, "Weight distance, run and twin", "share of the twin's norm")

    last = ", ".join(f"{part} {measured(float(shares[part][-1]))}" for part in parts)
    return picture(
        draw,
        alt=f"Line plot of the distance between the weights of run and twin over {len(states)} states; in state {states[-1]}: {last}.",
        caption=f"L2 distance of the weights of run and twin, as a share of the twin's norm, by part of the model. In state {states[-1]}: {last}.",
    )


def _line(axes: Axes, series: Series, name: str, colour: str, dashes: object, marker: str | None = None) -> None:
    points = thinned(series)
    few = len(points) <= 40
    axes.plot(
        points.steps, points.values, color=colour, linestyle=dashes, label=name, marker=(marker or "o") if few else None, markersize=3
    )


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(_X_LABEL)
    axes.set_ylabel(unit)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(ncols=2)
