"""Plots as self-contained SVG pictures: deterministic bytes, no reference to anything outside, readable without colour."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megatron_exp.display.visible import visible_line
from megatron_exp.run_record import Series

RUN, TWIN, CONTROL, GRID = "#0072B2", "#D55E00", "#595959", "#D9D9D9"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours without the yellow, which is too pale on white. Never the only difference: markers and dashes differ too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), (0, (1, 2.5)), (0, (8, 2)))

WIDTH_INCHES = 4.6  # 442 CSS pixels: legible when shrunk to a phone, fills half a page when enlarged
_FONT = "DejaVu Sans"  # comes with matplotlib
_MAX_POINTS = 300
_LABEL_LENGTH = 28
_STYLE: Any = {
    "svg.hashsalt": "megatron-exp",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names come from data: a dollar sign is a dollar sign
    "font.family": _FONT,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#595959",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Picture:
    """An image for the page. alt: what it shows, in words. caption: how to read it. draw, height_inches: how it is made, for other formats."""

    svg: str
    alt: str
    caption: str
    draw: Callable[[Axes], None]
    height_inches: float

    @property
    def uri(self) -> str:
        """The SVG as a `data:` address."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()

    def pdf(self) -> bytes:
        """The same drawing as a PDF, without a date: equal inputs give equal bytes."""
        with matplotlib.rc_context(_STYLE):
            stream = io.BytesIO()
            FigureCanvasPdf(_figure(self.draw, self.height_inches)).print_pdf(
                stream, metadata={"CreationDate": None, "Creator": None, "Producer": None}
            )
        return stream.getvalue()


def picture(draw: Callable[[Axes], None], *, alt: str, caption: str, height_inches: float = 2.8) -> Picture:
    """Draw on fresh axes and keep the SVG."""
    with matplotlib.rc_context(_STYLE):
        stream = io.StringIO()
        canvas = FigureCanvasSVG(_figure(draw, height_inches))
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]  # without the document type, whose address some viewers would fetch
    return Picture(svg, alt, caption, draw, height_inches)


def _figure(draw: Callable[[Axes], None], height_inches: float) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    draw(figure.add_subplot())
    return figure


def plain_log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5; the usual labels need the mathematical text that is off here."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label(text: str) -> str:
    """A name as a plot label: escaped, also what the font has no glyph for, and cut where it would take the room of the data."""
    font = get_font(findfont(_FONT))
    line = "".join(one if font.get_char_index(ord(one)) else ascii(one)[1:-1] for one in visible_line(text))
    return line if len(line) <= _LABEL_LENGTH else line[: _LABEL_LENGTH - 1] + "…"


def thinned(series: Series) -> Series:
    """At most 300 points: means of equal numbers of consecutive values, at their mean state."""
    size = _group_size(series)
    if size == 1:
        return series
    groups = [slice(start, start + size) for start in range(0, len(series), size)]
    return Series(np.array([series.steps[group].mean() for group in groups]), np.array([series.values[group].mean() for group in groups]))


def thinning_note(series: Series) -> str:
    """The sentence a caption needs where a curve was thinned."""
    return f" Each point is the mean of {_group_size(series)} updates." if _group_size(series) > 1 else ""


def _group_size(series: Series) -> int:
    return max(1, -(-len(series) // _MAX_POINTS))
