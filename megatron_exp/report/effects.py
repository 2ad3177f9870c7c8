"""A plot for every outcome, made from its rows of results alone, so that a new experiment has plots without plotting code.

Conditions with several states: curves over states. One row for each condition, and every condition ends in a number (plain/x1,
plain/x4, random-8/x4): estimate against that number, one line for each of what stands before it. Else: estimate and interval of each
condition, or of each outcome that is a single value, one below the other.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_exp.display.numbers import count, interval, is_number, measured
from megatron_exp.display.visible import visible_line
from megatron_exp.report.figures import CONTROL, DASHES, MARKERS, PALETTE, RUN, TWIN, Picture, label, picture, plain_log_scale

Row = dict[str, Any]

MAX_PICTURES = 8
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LAST_NUMBER = re.compile(r"(.*?)(\d+(?:\.\d+)?)\D*", re.DOTALL)
_MAX_CURVES = 12
_MAX_DOTS = 24
_MANY_DOSES = 8
_FEW_POINTS = 40
_REFERENCES = (("control", CONTROL, "s", (0, (4, 2)), "control items"), ("twin", TWIN, "D", (0, (1, 1.5)), "twin"))


def outcome_pictures(rows: Sequence[Row], outcomes: Mapping[str, Row]) -> list[Picture]:
    """Plots of one experiment's outcomes, primary ones first, at most MAX_PICTURES; outcomes without any estimate have none.

    Outcomes that are a single value share a plot with the others of their unit and null (a test beside its controls).
    outcomes: the pre-registered ones by name, for unit and null.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (_rank(outcomes.get(row["outcome"])), natural(row["outcome"]))):
        if is_number(row["estimate"]):
            registered = outcomes.get(row["outcome"], {})
            is_single = sum(other["outcome"] == row["outcome"] for other in rows) == 1
            key = (registered.get("unit"), registered.get("null")) if is_single else (row["outcome"],)
            groups.setdefault(key, []).append(row)
    return [_picture(group, outcomes.get(group[0]["outcome"], {})) for group in groups.values()][:MAX_PICTURES]


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key that puts copies-4 before copies-16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if _NUMBER.fullmatch(part) else (1, 0.0, part) for part in parts if part]


def _rank(outcome: Row | None) -> int:
    return ("primary", "secondary", "descriptive").index(outcome["family"]) if outcome else 3


def _picture(rows: list[Row], outcome: Row) -> Picture:
    if len({row["outcome"] for row in rows}) > 1:
        return _dots(rows, outcome, by="outcome")
    conditions = sorted({row["condition"] for row in rows}, key=natural)
    if len(conditions) < len(rows):
        return _curves(rows, conditions, outcome)
    ordered = sorted(rows, key=lambda row: natural(row["condition"]))
    lines = _dose_lines(ordered)
    return _doses(ordered, lines, outcome) if lines else _dots(ordered, outcome, by="condition")


def _dose_lines(rows: list[Row]) -> dict[str, list[tuple[float, Row]]] | None:
    """{what stands before the last number of a condition: [(the number, row)]}, where every condition has one and some line has three points."""
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        found = _LAST_NUMBER.fullmatch(row["condition"])
        if not found:
            return None
        lines.setdefault(found[1], []).append((float(found[2]), row))
    return lines if max(map(len, lines.values())) > 2 and len(lines) <= len(PALETTE) else None


def _curves(rows: list[Row], conditions: list[str], outcome: Row) -> Picture:
    shown = conditions[:: -(-len(conditions) // _MAX_CURVES)]

    def draw(axes: Axes) -> None:
        for index, condition in enumerate(shown):
            _curve(axes, index, sorted((row for row in rows if row["condition"] == condition), key=lambda row: row["step"]))
        _reference_curves(axes, rows)
        _frame(axes, rows, outcome, x_label="model state (updates done)", null="horizontal")
        axes.legend(ncols=3 if len(shown) > 6 else 2)

    left_out = (
        f" {len(conditions) - len(shown)} of {len(conditions)} conditions are in the table only." if len(shown) < len(conditions) else ""
    )
    states = sorted({row["step"] for row in rows})
    name = visible_line(rows[0]["outcome"])
    bands = f" Bands: {_levels(rows)} intervals." if _levels(rows) else ""
    return picture(
        draw,
        alt=f"Curves of {name} over {len(states)} model states, one for each of {len(shown)} conditions. {_summary(rows, states[-1])}",
        caption=f"{name} by model state; n = {_sizes(rows)}.{bands}{left_out}",
    )


def _curve(axes: Axes, index: int, rows: list[Row]) -> None:
    colour, steps = PALETTE[index % len(PALETTE)], [row["step"] for row in rows]
    marker = MARKERS[index % len(MARKERS)] if len(rows) <= _FEW_POINTS else None
    dashes = DASHES[(index + index // len(PALETTE)) % len(DASHES)]
    axes.plot(
        steps,
        [row["estimate"] for row in rows],
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=3.2,
        label=label(rows[0]["condition"]),
    )
    low, high = (np.array([_nan(row[side]) for row in rows]) for side in ("low", "high"))
    if np.isfinite(low).any() and np.isfinite(high).any():
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _reference_curves(axes: Axes, rows: list[Row]) -> None:
    """Controls and twin, averaged over the conditions of a state (they are usually the same for all)."""
    for key, colour, _, dashes, name in _REFERENCES:
        by_step: dict[int, list[float]] = {}
        for row in rows:
            if is_number(row[key]):
                by_step.setdefault(row["step"], []).append(row[key])
        if by_step:
            steps = sorted(by_step)
            axes.plot(steps, [float(np.mean(by_step[step])) for step in steps], color=colour, linestyle=dashes, linewidth=1.0, label=name)


def _doses(rows: list[Row], lines: dict[str, list[tuple[float, Row]]], outcome: Row) -> Picture:
    doses = sorted({dose for line in lines.values() for dose, _ in line})
    spread = len(doses) > _MANY_DOSES
    place = {dose: dose if spread else index for index, dose in enumerate(doses)}

    def draw(axes: Axes) -> None:
        for index, (name, line) in enumerate(lines.items()):
            shift = 0.0 if spread else 0.06 * (index - (len(lines) - 1) / 2)
            _dose_line(
                axes,
                index,
                np.array([place[dose] + shift for dose, _ in line]),
                [row for _, row in line],
                "estimate" if len(lines) == 1 else name,
            )
        if spread and doses[0] > 0 and doses[-1] / doses[0] > 20:
            plain_log_scale(axes, "x")
        elif not spread:
            axes.set_xticks(range(len(doses)), [f"{dose:g}" for dose in doses])
        _references(
            axes,
            np.array([place[dose] for line in lines.values() for dose, _ in line]),
            [row for line in lines.values() for _, row in line],
            along_x=True,
        )
        x_label = f"condition {next(iter(lines))}…" if len(lines) == 1 else "number at the end of the condition's name"
        _frame(axes, rows, outcome, x_label=label(x_label), null="horizontal")
        axes.legend(ncols=2)

    name = visible_line(rows[0]["outcome"])
    return picture(draw, alt=f"Estimates of {name} against {len(doses)} doses. {_summary(rows)}", caption=_caption(rows))


def _dose_line(axes: Axes, index: int, places: np.ndarray, rows: list[Row], name: str) -> None:
    estimates, colour = [row["estimate"] for row in rows], PALETTE[index % len(PALETTE)]
    style = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linestyle": DASHES[index % len(DASHES)], "linewidth": 0.9}
    axes.errorbar(places, estimates, yerr=_arms(rows), capsize=2.5, markersize=4.5, label=label(name), **style)


def _dots(rows: list[Row], outcome: Row, by: str) -> Picture:
    shown = rows[:_MAX_DOTS]

    def draw(axes: Axes) -> None:
        places = np.arange(len(shown))[::-1]
        axes.errorbar(
            [row["estimate"] for row in shown], places, xerr=_arms(shown), fmt="o", color=RUN, capsize=3, markersize=5, label="estimate"
        )
        _references(axes, places, shown, along_x=False)
        axes.set_yticks(places, [f"{label(row[by])}\nn = {count(row['n'])}" for row in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=6)
        _frame(axes, shown, outcome, x_label=label(outcome.get("unit", "")), null="vertical")
        axes.figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside lower center")

    left_out = f" The first {len(shown)} of {len(rows)}; all are in the table." if len(shown) < len(rows) else ""
    return picture(
        draw,
        alt=f"Estimates of {_names(rows)} with intervals for {len(shown)} {by}s. {_summary(shown)}",
        caption=_caption(shown) + left_out,
        height_inches=1.45 + 0.34 * len(shown),
    )


def _names(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(visible_line(row["outcome"]) for row in rows))


def _references(axes: Axes, places: np.ndarray, rows: list[Row], *, along_x: bool) -> None:
    for key, colour, marker, _, name in _REFERENCES:
        values = np.array([_nan(row[key]) for row in rows])
        if np.isfinite(values).any():
            points = (places, values) if along_x else (values, places)
            axes.plot(*points, linestyle="none", marker=marker, markersize=5, markerfacecolor="white", markeredgecolor=colour, label=name)


def _frame(axes: Axes, rows: list[Row], outcome: Row, *, x_label: str, null: str) -> None:
    """Title, labels and the line where the estimate would be without an effect."""
    if outcome:
        line = axes.axhline if null == "horizontal" else axes.axvline
        line(outcome.get("null", 0.0), color="black", linewidth=0.8, linestyle=":", label="no effect")
    names = list(dict.fromkeys(row["outcome"] for row in rows))
    axes.set_title(label(names[0]) if len(names) == 1 else f"{len(names)} outcomes of one value")
    axes.set_xlabel(x_label)
    if null == "horizontal":
        axes.set_ylabel(label(outcome.get("unit", "")))


def _arms(rows: list[Row]) -> np.ndarray:
    """float64 [2, n]: lengths of the error bars; 0 where a bound does not exist or is infinite."""
    estimate = np.array([row["estimate"] for row in rows])
    below = estimate - np.array([_nan(row["low"]) for row in rows])
    above = np.array([_nan(row["high"]) for row in rows]) - estimate
    return np.where(np.isfinite([below, above]), np.maximum([below, above], 0), 0)


def _caption(rows: list[Row]) -> str:
    states = sorted({row["step"] for row in rows})
    when = f"in state {states[0]}" if len(states) == 1 else f"in states {states[0]} to {states[-1]}"
    bars = f" Bars: {_levels(rows)} intervals." if _levels(rows) else ""
    words = {"control": "Open squares: control items.", "twin": "Open diamonds: the twin on the same items."}
    present = [text for key, text in words.items() if any(is_number(row[key]) for row in rows)]
    return " ".join([f"{_names(rows)} {when}; n = {_sizes(rows)}.{bars}", *present])


def _levels(rows: list[Row]) -> str:
    levels = sorted({row["level"] for row in rows if is_number(row["low"]) or is_number(row["high"])})
    return "/".join(f"{100 * level:g}%" for level in levels)


def _sizes(rows: list[Row]) -> str:
    sizes = sorted({row["n"] for row in rows})
    return count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"


def _summary(rows: list[Row], step: int | None = None) -> str:
    """The numbers of a plot in words, for those who do not see it; the table below the plot has all of them."""
    last = [row for row in rows if step is None or row["step"] == step][:8]
    parts = [
        f"{visible_line(row['outcome'])}, {visible_line(row['condition'])}: {measured(row['estimate'])} {_bounds(row)}".strip()
        for row in last
    ]
    return ("In state " + str(step) + ": " if step is not None else "") + "; ".join(parts) + "."


def _bounds(row: Row) -> str:
    return interval(row["low"], row["high"]) if is_number(row["low"]) or is_number(row["high"]) else ""


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
