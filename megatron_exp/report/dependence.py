"""The dependence test (CPDT) on the page: a heat map with intervals, the comparisons with their verdicts, and what is missing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from megatron_exp.display.numbers import count, duration, interval, is_number, measured
from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.manifest.reader import Manifest
from megatron_exp.report.figures import WIDTH_INCHES, Picture, label, picture

Row = dict[str, Any]

MATRIX_NAME = "matrix.json"
SCHEMA_VERSION = 1
_COLOURS = LinearSegmentedColormap.from_list("lost to gained", ["#B35806", "#F7F7F7", "#2166AC"])
"""Orange to white to blue: told apart by all common kinds of colour vision; every cell also says its number."""
_MOST_COLUMNS_WITH_INTERVALS = 6
_ORDER = {"primary": 0, "spill-over": 1, "sham": 2, "diagonal": 3}


@dataclass(frozen=True)
class DependenceSection:
    """What the page shows. comparisons: cells of the matrix, primary ones first. open_pairs: sentences about what is undecided. facts: in sentences."""

    file: Path
    verdict: str
    complete: bool
    missing: list[str]
    picture: Picture | None
    comparisons: list[Row]
    culprits: list[str]
    open_pairs: list[str]
    facts: list[str]


def dependence_section(directory: Path | None, manifest: Manifest) -> DependenceSection | None:
    """Read CPDT/matrix.json; None where no directory was given.

    Raises UserError where there is no matrix, it cannot be read, or it tests the experiments of another manifest.
    """
    if directory is None:
        return None
    path = require_file(Path(directory) / MATRIX_NAME, "the result of a dependence test")
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Write it again with `megatron-exp cpdt`, whose finished cells are kept."
        ) from error
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {record.get('schema_version')}, this program reads {SCHEMA_VERSION}. Use the program that wrote it."
        )
    tested = record["manifest"]["fingerprint"]
    if tested not in (manifest.fingerprint, manifest.record["extends"]):
        raise UserError(
            f"{path} tests the experiments of a manifest with fingerprint {tested[:12]}, but the run was trained on {manifest.fingerprint[:12]}. "
            "Give the dependence test of this manifest, or leave --cpdt out."
        )
    return _section(path, record)


def _section(path: Path, record: Row) -> DependenceSection:
    cells = sorted(record["cells"], key=lambda cell: _ORDER.get(cell["comparison"], len(_ORDER)))
    open_pairs = [
        f"{cell['row']} on {cell['column']}: "
        + (f"{count(cell['seeds_needed'])} seeds would decide" if cell["seeds_needed"] else "no number of seeds is known")
        for cell in cells
        if cell["verdict"] == "undecided"
    ]
    return DependenceSection(
        file=path,
        verdict=record["verdict"],
        complete=record["complete"],
        missing=[f"{one['row']}, seed {one['seed']}" for one in record["missing"]],
        picture=_heat_map(record),
        comparisons=cells,
        culprits=[f"{one['left_out']} changes {one['column']}" for one in record["leave_one_out"] if one["culprit"]],
        open_pairs=open_pairs,
        facts=_facts(record),
    )


def _facts(record: Row) -> list[str]:
    cost = record["cost"]
    shares = ", ".join(f"{name} {100 * share:.2g}%" for name, share in record["fractions"].items())
    sentences = [
        f"{count(record['steps'])} steps from one checkpoint for each of {count(cost['num_cells'])} cells ({count(len(record['seeds']))} seeds); "
        f"shares of the tokens: {shares}.",
        f"{count(record['family_size'])} units of comparison share an error rate of {record['alpha']:g}; intervals hold at once.",
    ]
    if is_number(cost["overhead"]):
        sentences.append(
            f"Outside scoring the cells cost {cost['overhead']:.2f} times their training steps; scoring took {duration(cost['score_seconds'])} beside it."
        )
    return [*sentences, *_said(record["notes"]), *_said(record["not_measured"]), *_said(record["not_inserted"])]


def _said(notes: Any) -> list[str]:
    """Notes are sentences, or a reason for each experiment."""
    if isinstance(notes, dict):
        return [f"{name}: {reason}" for name, reason in notes.items()]
    return [str(note) for note in notes or ()]


def _heat_map(record: Row) -> Picture | None:
    """Every row minus `none`, coloured by its share of the column's own effect; a cell without values is hatched, never zero."""
    columns = list(record["columns"])
    rows = [row for row in record["rows"] if row != "none"]
    effects = {(one["row"], one["column"]): one for one in record["effects"]}
    if not columns or not rows:
        return None
    estimates = np.array([[_number(effects.get((row, column))) for column in columns] for row in rows])
    own = np.array([abs(_number(effects.get((column, column)))) for column in columns])
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.clip(estimates / np.where(own > 0, own, np.nan), -1, 1)
    dependent = {(cell["row"], cell["column"]) for cell in record["cells"] if cell["verdict"] == "dependent"}

    def draw(axes: Axes) -> None:
        axes.set_facecolor("#E6E6E6")
        axes.imshow(np.ma.masked_invalid(shares), cmap=_COLOURS, vmin=-1, vmax=1, aspect="auto")
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                _cell(axes, x, y, effects.get((row, column)), len(columns), dark=abs(shares[y, x]) > 0.7, boxed=(row, column) in dependent)
        axes.set_xticks(range(len(columns)), [label(name) for name in columns], rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [label(name) for name in rows])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_title("Change against no insertion, by row trained on")

    said = "; ".join(f"{row} on {column}: {measured(_number(one))}" for (row, column), one in list(effects.items())[:40])
    return picture(
        draw,
        alt=f"Heat map of {len(rows)} rows (what was inserted) by {len(columns)} columns (whose outcome). {said}.",
        caption="Rows: what was inserted. Columns: whose outcome. Each cell: mean over seeds of the row minus no insertion, in the column's unit"
        + (", with its 95% interval of pairs" if len(columns) <= _MOST_COLUMNS_WITH_INTERVALS else "; intervals are in the table")
        + ". Colour: share of the column's own effect, from −1 (orange) to 1 (blue). Framed: dependent. Grey: no values yet.",
        height_inches=1.3 + (0.5 if len(columns) <= _MOST_COLUMNS_WITH_INTERVALS else 0.3) * len(rows) * max(1.0, WIDTH_INCHES / 6),
    )


def _cell(axes: Axes, x: int, y: int, effect: Row | None, num_columns: int, *, dark: bool, boxed: bool) -> None:
    text = measured(_number(effect), 2) if is_number(_number(effect)) else "?"
    if effect and is_number(effect["low"]) and num_columns <= _MOST_COLUMNS_WITH_INTERVALS:
        text += f"\n{interval(effect['low'], effect['high'])}"
    size = 6.0 if num_columns > _MOST_COLUMNS_WITH_INTERVALS else 6.5
    axes.text(
        x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "black", fontweight="bold" if boxed else "normal"
    )
    if boxed:
        axes.add_patch(_frame_of(x, y))


def _frame_of(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, edgecolor="black", linewidth=1.6)


def _number(effect: Row | None) -> float:
    value = effect["estimate"] if effect else None
    return float("nan") if value is None else float(value)
