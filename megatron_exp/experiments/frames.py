"""Items and responses joined into aligned numpy columns: what `score` computes on and `simulate` fills."""

from dataclasses import dataclass, replace

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp.manifest import schema

FINAL = 0xFFFFFFFF
"""Step of simulated responses to probes of the final state, whose number a simulation does not know."""

_ITEM_COLUMNS = ("condition", "role", "stratum")


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """One row per (item, arm, probe, state); every column has shape [num_rows].

    item, cluster, step: int64. arm, condition, role, stratum, probe: str. run, twin: float64 values of the two models, NaN where
    not scored or not asked. num_tokens: float64, tokens the value is a sum over. metadata_json: str. has_twin: whether the
    twin answered anything in the whole experiment; it stays with every part of the frame, so that no part changes its meaning.
    """

    experiment: str
    has_twin: bool
    item: np.ndarray
    arm: np.ndarray
    condition: np.ndarray
    role: np.ndarray
    stratum: np.ndarray
    cluster: np.ndarray
    probe: np.ndarray
    step: np.ndarray
    num_tokens: np.ndarray
    run: np.ndarray
    twin: np.ndarray
    metadata_json: np.ndarray

    def __len__(self) -> int:
        return len(self.item)

    def where(self, rows: np.ndarray) -> "Frame":
        """The rows of a boolean mask or an index array."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)})

    def of_probe(self, name: str) -> "Frame":
        """The rows of one probe."""
        return self.where(self.probe == name)

    def at(self, step: int) -> "Frame":
        """The rows of one model state."""
        return self.where(self.step == step)

    @property
    def steps(self) -> list[int]:
        """The model states there are responses for, ascending."""
        return [int(step) for step in np.unique(self.step)]

    @property
    def change(self) -> np.ndarray:
        """float64: run minus twin on the same question; without a twin, the run alone."""
        return self.run - self.twin if self.has_twin else self.run

    @property
    def compared(self) -> str:
        """What `change` is, for the description of a test."""
        return "run minus twin" if self.has_twin else "run alone"

    def meta(self, name: str) -> np.ndarray:
        """One entry of the items' metadata."""
        parsed = {text: orjson.loads(text)[name] for text in set(self.metadata_json)}
        return np.array([parsed[text] for text in self.metadata_json])

    def filled(self, run: np.ndarray, twin: np.ndarray) -> "Frame":
        """The same questions with these answers."""
        twin = np.asarray(twin, np.float64)
        return replace(self, run=np.asarray(run, np.float64), twin=twin, has_twin=bool(np.isfinite(twin).any()))

    def responses(self) -> pa.Table:
        """The rows as a responses table: one row per model that answered or was asked (NaN becomes null with a reason)."""
        parts = [_response_columns(self, "run", self.run)]
        if self.has_twin:
            parts.append(_response_columns(self, "twin", self.twin))
        return pa.concat_tables([pa.table(part, schema=schema.RESPONSES) for part in parts])


def joined(items: pa.Table, responses: pa.Table) -> Frame:
    """One experiment's responses with the columns of their items. Rows come in the order (probe, step, item, arm).

    Raises ValueError where a response has no item or two responses answer the same question.
    """
    columns = {name: _texts(responses[name]) for name in ("arm", "probe", "model")}
    item, step = (responses[name].to_numpy().astype(np.int64) for name in ("item", "step"))
    value, tokens = (responses[name].cast(pa.float64()).to_numpy() for name in ("value", "num_tokens"))
    places: dict[tuple[str, int, int, str], int] = {}
    asked = sorted(set(zip(columns["probe"], step.tolist(), item.tolist(), columns["arm"], strict=True)))
    places = {question: place for place, question in enumerate(asked)}
    values = {"run": np.full(len(asked), np.nan), "twin": np.full(len(asked), np.nan)}
    num_tokens = np.full(len(asked), np.nan)
    answered: set[tuple[int, str]] = set()
    for row, model in enumerate(columns["model"]):
        if model not in values:
            continue
        place = places[(columns["probe"][row], int(step[row]), int(item[row]), columns["arm"][row])]
        if (place, model) in answered:
            raise ValueError(f"two responses of the {model} to {asked[place]}")
        answered.add((place, model))
        values[model][place] = value[row]
        num_tokens[place] = tokens[row]
    return _with_items(items, asked, num_tokens, values["run"], values["twin"])


def asked(items: pa.Table, probes: pa.Table) -> Frame:
    """The questions of a probe table, unanswered: every probe at each of its states (FINAL where it names none)."""
    rows = []
    for probe in probes.select(["name", "item", "arm", "states", "start", "end"]).to_pylist():
        tokens = float("nan") if probe["end"] is None else float(probe["end"] - probe["start"])
        rows += [((probe["name"], state, probe["item"], probe["arm"]), tokens) for state in probe["states"] or [FINAL]]
    rows.sort(key=lambda row: row[0])
    unanswered = np.full(len(rows), np.nan)
    return _with_items(items, [question for question, _ in rows], np.array([tokens for _, tokens in rows]), unanswered, unanswered)


def _with_items(
    items: pa.Table, questions: list[tuple[str, int, int, str]], num_tokens: np.ndarray, run: np.ndarray, twin: np.ndarray
) -> Frame:
    row_of = {key: row for row, key in enumerate(zip(items["item"].to_pylist(), _texts(items["arm"]), strict=True))}
    unknown = next((question for question in questions if question[2:] not in row_of), None)
    if unknown:
        raise ValueError(f"item {unknown[2]}, arm {unknown[3]} is asked about but not among the items")
    rows = np.array([row_of[question[2:]] for question in questions], dtype=np.int64)
    names = items["experiment"].unique().to_pylist()
    if len(names) > 1:
        raise ValueError(f"items of several experiments: {names}")
    return Frame(
        experiment=names[0] if names else "",
        has_twin=bool(np.isfinite(twin).any()),
        item=np.array([question[2] for question in questions], dtype=np.int64),
        arm=np.array([question[3] for question in questions], dtype=object),
        probe=np.array([question[0] for question in questions], dtype=object),
        step=np.array([question[1] for question in questions], dtype=np.int64),
        cluster=items["cluster"].to_numpy()[rows].astype(np.int64),
        metadata_json=_texts(items["metadata"])[rows],
        num_tokens=num_tokens,
        run=run,
        twin=twin,
        **{name: _texts(items[name])[rows] for name in _ITEM_COLUMNS},
    )


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.string()).to_numpy(zero_copy_only=False)


def _response_columns(frame: Frame, model: str, values: np.ndarray) -> dict[str, pa.Array]:
    num, missing = len(frame), np.isnan(values)
    plain = {
        "experiment": [frame.experiment] * num,
        "condition": frame.condition,
        "item": frame.item,
        "arm": frame.arm,
        "probe": frame.probe,
        "model": [model] * num,
        "step": frame.step,
        "value": pa.array(values, pa.float64(), mask=missing),
        "reason": ["not scored" if lost else "" for lost in missing],
        "nats": pa.array(values, pa.float64(), mask=missing),
        "num_tokens": pa.array(np.nan_to_num(frame.num_tokens).astype(np.uint32)),
        "greedy": [None] * num,
        "text": [None] * num,
    }
    return {name: pa.array(value).cast(schema.RESPONSES.field(name).type) for name, value in plain.items()}
