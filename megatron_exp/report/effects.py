"""A plot for every outcome, made from its rows of results alone, so that a new experiment has plots without plotting code.

Several states: curves over states, one for each condition. One state and conditions that are numbers (copies-1, copies-4, copies-16):
estimate against that number. Else: estimate and interval of each condition, one below the other.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_exp.display.numbers import count, interval, is_number, measured
from megatron_exp.display.visible import visible_line
from megatron_exp.report.figures import CONTROL, DASHES, MARKERS, PALETTE, RUN, TWIN, Picture, label, picture

Row = dict[str, Any]

MAX_PICTURES = 6
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_MAX_CURVES = len(PALETTE)
_MAX_DOTS = 24


def outcome_pictures(rows: Sequence[Row], units: dict[str, str]) -> list[Picture]:
    """Plots of one experiment's outcomes, primary ones first, at most MAX_PICTURES; outcomes without any estimate have none."""
    outcomes = sorted({row["outcome"] for row in rows}, key=lambda name: (not any(r["primary"] for r in rows if r["outcome"] == name), natural(name)))
    drawn = [_outcome_picture(name, [row for row in rows if row["outcome"] == name], units.get(name, "")) for name in outcomes]
    return [one for one in drawn if one is not None][:MAX_PICTURES]


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key that puts copies-4 before copies-16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if _NUMBER.fullmatch(part) else (1, 0.0, part) for part in parts if part]


def _outcome_picture(outcome: str, rows: list[Row], unit: str) -> Picture | None:
    scored = [row for row in rows if is_number(row["estimate"])]
    if not scored:
        return None
    conditions = sorted({row["condition"] for row in scored}, key=natural)
    if len({row["step"] for row in scored}) > 1:
        return _curves(outcome, scored, conditions, unit)
    numbers = _as_numbers(conditions)
    if numbers and len(conditions) > 2:
        return _doses(outcome, scored, conditions, numbers, unit)
    return _dots(outcome, scored, conditions, unit)


def _as_numbers(conditions: Sequence[str]) -> list[float] | None:
    """The number in each condition's name, where each name has exactly one and they differ in nothing else."""
    found = [_NUMBER.findall(name) for name in conditions]
    frames = {_NUMBER.sub("#", name) for name in conditions}
    return [float(numbers[0]) for numbers in found] if len(frames) == 1 and all(len(numbers) == 1 for numbers in found) else None


def _curves(outcome: str, rows: list[Row], conditions: list[str], unit: str) -> Picture:
    shown = conditions[:: -(-len(conditions) // _MAX_CURVES)]

    def draw(axes: Axes) -> None:
        for index, condition in enumerate(shown):
            mine = sorted((row for row in rows if row["condition"] == condition), key=lambda row: row["step"])
            colour, steps = PALETTE[index % len(PALETTE)], [row["step"] for row in mine]
            low, high = (np.array([_nan(row[side]) for row in mine]) for side in ("low", "high"))
            few = len(mine) <= 40
            axes.plot(steps, [row["estimate"] for row in mine], color=colour, linestyle=DASHES[index], marker=MARKERS[index] if few else None, markersize=3.5, label=label(condition))
            if np.isfinite(low).any() and np.isfinite(high).any():
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        _reference_curves(axes, rows)
        _finish(axes, outcome, unit)
        axes.set_xlabel("model state (updates done)")
        axes.legend(ncols=2)

    left_out = f" {len(conditions) - len(shown)} of {len(conditions)} conditions are in the table only." if len(shown) < len(conditions) else ""
    states = sorted({row["step"] for row in rows})
    return picture(
        draw,
        alt=f"Curves of {visible_line(outcome)} over {len(states)} model states, one for each of {len(shown)} conditions. {_summary(rows, states[-1])}",
        caption=f"{visible_line(outcome)} by model state; bands are intervals, n = {_sizes(rows)}. Grey: controls. Orange dots: the twin.{left_out}",
    )


def _reference_curves(axes: Axes, rows: list[Row]) -> None:
    """Controls and twin, averaged over conditions where they differ (they are usually the same for all)."""
    for key, colour, style, name in (("control", CONTROL, (0, (4, 2)), "controls"), ("twin", TWIN, (0, (1, 1.5)), "twin")):
        by_step: dict[int, list[float]] = {}
        for row in rows:
            if is_number(row[key]):
                by_step.setdefault(row["step"], []).append(row[key])
        if by_step:
            steps = sorted(by_step)
            axes.plot(steps, [float(np.mean(by_step[step])) for step in steps], color=colour, linestyle=style, linewidth=1.0, label=name)


def _doses(outcome: str, rows: list[Row], conditions: list[str], numbers: list[float], unit: str) -> Picture:
    mine = [next(row for row in rows if row["condition"] == condition) for condition in conditions]

    def draw(axes: Axes) -> None:
        positions = np.arange(len(mine))
        axes.plot(positions, [row["estimate"] for row in mine], color=RUN, linewidth=0.8, alpha=0.6)
        axes.errorbar(positions, [row["estimate"] for row in mine], yerr=_arms(mine), fmt="o", color=RUN, capsize=3, markersize=5, label="run, treated")
        _references(axes, positions, mine, along_x=True)
        axes.set_xticks(positions, [f"{number:g}\nn={count(row['n'])}" for number, row in zip(numbers, mine, strict=True)])
        axes.set_xlabel(label(_NUMBER.sub("…", conditions[0])))
        _finish(axes, outcome, unit)
        axes.legend(ncols=3)

    return picture(draw, alt=f"Estimates of {visible_line(outcome)} against {len(mine)} doses. {_summary(mine)}", caption=_dots_caption(outcome, mine))


def _dots(outcome: str, rows: list[Row], conditions: list[str], unit: str) -> Picture:
    mine = [next(row for row in rows if row["condition"] == condition) for condition in conditions][:_MAX_DOTS]

    def draw(axes: Axes) -> None:
        positions = np.arange(len(mine))[::-1]
        axes.errorbar([row["estimate"] for row in mine], positions, xerr=_arms(mine), fmt="o", color=RUN, capsize=3, markersize=5, label="run, treated")
        _references(axes, positions, mine, along_x=False)
        axes.set_yticks(positions, [f"{label(row['condition'])}\nn={count(row['n'])}" for row in mine])
        axes.set_ylim(-0.7, len(mine) - 0.3)
        axes.grid(visible=False, axis="y")
        _finish(axes, outcome, "")
        axes.set_xlabel(label(unit))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.5 / (0.5 + 0.25 * len(mine)) - 0.25))

    left_out = f" The first {len(mine)} of {len(conditions)} conditions; all are in the table." if len(mine) < len(conditions) else ""
    return picture(
        draw,
        alt=f"Estimates of {visible_line(outcome)} with intervals for {len(mine)} conditions. {_summary(mine)}",
        caption=_dots_caption(outcome, mine) + left_out,
        height_inches=1.5 + 0.36 * len(mine),
    )


def _references(axes: Axes, positions: np.ndarray, rows: list[Row], *, along_x: bool) -> None:
    for key, colour, marker, name in (("control", CONTROL, "s", "controls"), ("twin", TWIN, "D", "twin, same items")):
        values = np.array([_nan(row[key]) for row in rows])
        if np.isfinite(values).any():
            place = (positions, values) if along_x else (values, positions)
            axes.plot(*place, linestyle="none", marker=marker, markersize=5, markerfacecolor="white", markeredgecolor=colour, label=name)


def _arms(rows: list[Row]) -> np.ndarray:
    """float64 [2, n]: lengths of the error bars; 0 where a bound does not exist or is infinite."""
    estimate = np.array([row["estimate"] for row in rows])
    below = estimate - np.array([_nan(row["low"]) for row in rows])
    above = np.array([_nan(row["high"]) for row in rows]) - estimate
    return np.where(np.isfinite([below, above]), np.maximum([below, above], 0), 0)


def _finish(axes: Axes, outcome: str, unit: str) -> None:
    axes.set_title(label(outcome))
    axes.set_ylabel(label(unit))


def _dots_caption(outcome: str, rows: list[Row]) -> str:
    levels = sorted({row["level"] for row in rows if is_number(row["low"]) or is_number(row["high"])})
    bars = f"Bars: {'/'.join(f'{100 * level:g}%' for level in levels)} intervals; n" if levels else "N"
    return f"{visible_line(outcome)} in state {rows[0]['step']}. {bars} = {_sizes(rows)}. Open squares: control items. Open diamonds: the twin on the same items."


def _sizes(rows: list[Row]) -> str:
    sizes = sorted({row["n"] for row in rows})
    return count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"


def _summary(rows: list[Row], step: int | None = None) -> str:
    """The numbers of a plot in words, for those who do not see it; the table below the plot has all of them."""
    last = [row for row in rows if step is None or row["step"] == step][:8]
    parts = [f"{visible_line(row['condition'])}: {measured(row['estimate'])} {_bounds(row)}".strip() for row in last]
    return ("In state " + str(step) + ": " if step is not None else "") + "; ".join(parts) + "."


def _bounds(row: Row) -> str:
    return interval(row["low"], row["high"]) if is_number(row["low"]) or is_number(row["high"]) else ""


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
