"""A table as csv, Markdown, LaTeX or Parquet. csv and Parquet keep every digit; the others show what a reader wants."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from megatron_exp.display.numbers import measured, probability
from megatron_exp.display.visible import visible_line
from megatron_exp.errors import UserError

_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "∞": r"$\infty$",
    "\u00a0": "~",
}
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_PROBABILITIES = ("p", "p_corrected")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def encode(table: pa.Table, kind: str) -> bytes:
    """The table in one of FORMATS; equal tables give equal bytes. UserError for another name."""
    if kind not in FORMATS:
        raise UserError(f"{kind!r} is no format. Choose one of {', '.join(FORMATS)}.")
    plain = pa.table({name: _plain(table[name]) for name in table.column_names})
    return _ENCODERS[kind](plain)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _csv(table: pa.Table) -> bytes:
    """Texts that a spreadsheet would take for a formula get an apostrophe before them."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            texts = [f"'{text}" if text and text.startswith(_FORMULA_STARTS) else text for text in table[field.name].to_pylist()]
            table = table.set_column(place, field, pa.array(texts, pa.string()))
    stream = io.BytesIO()
    pc.write_csv(table, stream)
    return stream.getvalue()


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _markdown(table: pa.Table) -> bytes:
    head, *rows = _cells(table, lambda text: text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;"))
    rule = ["---:" if _is_number(field.type) else "---" for field in table.schema]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows)).encode()


def _latex(table: pa.Table) -> bytes:
    """A booktabs tabular, to be put into a table environment."""
    head, *rows = _cells(table, _escape_latex)
    columns = "".join("r" if _is_number(field.type) else "l" for field in table.schema)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", f"{' & '.join(head)} \\\\", r"\midrule"]
    lines += [f"{' & '.join(row)} \\\\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""]).encode()


def _escape_latex(text: str) -> str:
    escaped = "".join(_TEX.get(letter, letter) for letter in text)
    return re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"$^{{{found[0].translate(_SUPERSCRIPTS)}}}$", escaped)


def _cells(table: pa.Table, escape: Callable[[str], str]) -> list[list[str]]:
    """Head and rows as short escaped texts."""
    names = table.column_names
    rows = [[escape(shown(name, row[name])) for name in names] for row in table.to_pylist()]
    return [[escape(name.replace("_", " ")) for name in names], *rows]


def shown(name: str, value: Any) -> str:
    """A value of a column as a reader wants it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return probability(value) if name in _PROBABILITIES else measured(value)
    return visible_line(str(value))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


_ENCODERS: dict[str, Callable[[pa.Table], bytes]] = {"csv": _csv, "md": _markdown, "tex": _latex, "parquet": _parquet}

FORMATS = tuple(_ENCODERS)
