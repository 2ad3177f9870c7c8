"""What the models wrote: a few kept texts per experiment, side by side, from the newest evaluation."""

from dataclasses import dataclass

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.report.gather import Inputs

_MOST = 6
_LONGEST = 1_000


@dataclass(frozen=True)
class Output:
    """One text a model wrote. text: None where it is hidden; num_characters: of the whole."""

    model: str
    condition: str
    probe: str
    item: int
    state: int
    num_characters: int
    text: str | None


def outputs_of(inputs: Inputs, experiment: str, *, show_text: bool) -> list[Output]:
    """At most six: for every condition and probe the first item that a model wrote about, run and twin together."""
    table = inputs.written
    if table is None:
        return []
    rows = table.filter(pc.equal(table["experiment"].cast(pa.string()), experiment)).to_pylist()
    first: dict[tuple[str, str], int] = {}
    for row in sorted(rows, key=lambda row: row["item"]):
        first.setdefault((row["condition"], row["probe"]), row["item"])
    chosen = [row for row in rows if first[row["condition"], row["probe"]] == row["item"]]
    chosen.sort(key=lambda row: (row["condition"], row["probe"], row["model"], row["step"]))
    return [_output(row, show_text=show_text) for row in chosen[:_MOST]]


def _output(row: dict[str, object], *, show_text: bool) -> Output:
    text = _first_sample(str(row["text"]))
    shortened = text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
    names = ("model", "condition", "probe", "item")
    return Output(**{name: row[name] for name in names}, state=row["step"], num_characters=len(text), text=shortened if show_text else None)  # type: ignore[arg-type]


def _first_sample(text: str) -> str:
    """A sampled answer is a JSON list of continuations; of these the first."""
    if text.startswith('["'):
        try:
            samples = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        return str(samples[0]) if samples else ""
    return text
