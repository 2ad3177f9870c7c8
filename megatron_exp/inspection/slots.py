"""What the model sees in a slot: its text in pieces, with every insertion marked."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.inspection.targets import Target
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.stream.slot import is_pool, slot_name

_COLUMNS = ["experiment", "condition", "item", "arm", "repetition", "kind", "layer", "slot", "offset", "length", "source_slot"]
_WHOLE_SLOT = ("swap", "noise")

MOST_TOKENS = 1 << 18
"""A step of more tokens is shown abridged: nobody reads so much text, and making it takes many times as long as finding it."""

_CONTEXT_TOKENS = 32


@dataclass(frozen=True)
class Mark:
    """An insertion of the slot. source: where the content of a swap comes from, as people read slot ids."""

    experiment: str
    condition: str
    item: int
    arm: str
    repetition: int
    kind: str
    offset: int
    length: int
    source: str | None


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) as text. marks: positions in the slot's list of marks that cover them (whole-slot ones are not repeated here).

    omitted: the text is left out of an abridged step.
    """

    start: int
    end: int
    marks: tuple[int, ...]
    text: str
    omitted: bool = False


@dataclass(frozen=True)
class SlotView:
    """One slot as trained on. source, epoch, shard, offset: where its base content lies. look_ahead: the token that is only a label.

    num_loss_positions: positions whose loss counts. document: where its first token comes from; only its number in the shard where a step is abridged.
    """

    slot: str
    step: int | None
    row: int | None
    source: str
    epoch: int
    shard: int
    offset: int
    document: dict[str, Any]
    num_loss_positions: int
    marks: tuple[Mark, ...]
    pieces: tuple[Piece, ...]
    look_ahead: str


@dataclass(frozen=True)
class StepView:
    """All slots of a step, in row order. overlay: whether insertions were applied (not for a baseline run).

    undecided: experiments whose controllers have not decided yet what they insert in this step.
    """

    path: str
    step: int | None
    overlay: bool
    slots: tuple[SlotView, ...]
    undecided: tuple[str, ...] = ()


def view_step(target: Target, step: int) -> StepView:
    """The batch of a step (counted from 0: it is first visible in the model state after step + 1 updates)."""
    geometry = target.manifest.geometry
    steps = geometry.steps
    if not 0 <= step < steps:
        raise UserError(f"Step {step} is outside this run, whose steps are 0 to {steps - 1}. Give a step in that range.")
    abridged = geometry.global_batch_size * geometry.sequence_length > MOST_TOKENS
    views = _views(target, geometry.slots_of_step(step), abridged)
    return StepView(str(target.path), step, target.has_overlay, views, undecided(target, step))


def view_slot(target: Target, slot: int) -> StepView:
    """One train slot, or a pool slot (its id has the pool bit)."""
    step = None if is_pool(slot) else target.manifest.geometry.step(slot)
    views = _views(target, [slot], abridged=False)
    return StepView(str(target.path), step, target.has_overlay, views, () if step is None else undecided(target, step))


def undecided(target: Target, step: int) -> tuple[str, ...]:
    """The experiments with a controller that has not decided about this step: all of them where there is a manifest and no run."""
    if not target.has_overlay:
        return ()
    masked = target.run.masked if target.run else frozenset()
    decided = {(name, state.step) for segment in target.segments for name, state in segment.decisions.items()}
    loops = target.manifest.controllers.items()
    return tuple(name for name, one in loops if name not in masked and (name, step - step % one["interval"]) not in decided)


def _views(target: Target, slots: Iterable[int], abridged: bool) -> tuple[SlotView, ...]:
    """In full, or abridged: of each slot its beginning and what stands around insertions (`--slot` shows all of one)."""
    wanted = list(slots)
    rows = insertions_of(target, wanted)
    tokenizer = target.tokenizer
    return tuple(_view(target, slot, [row for row in rows if row["slot"] == slot], tokenizer, abridged) for slot in wanted)


def insertions_of(target: Target, slots: list[int]) -> list[dict[str, Any]]:
    """Rows of the insertions table for neighbouring slots, in order of application, without the masked experiments."""
    if not target.has_overlay:
        return []
    touched, entries = target.manifest.index
    first, end = (
        bisect.bisect_left(touched["slot"], slot) for slot in (slots[0], slots[-1] + 1)
    )  # numpy's own search would copy the mapped column
    starts = [int(touched["start"][place]) if place < len(touched) else len(entries) for place in (first, end)]
    rows = read_rows(target.manifest.path / "insertions.parquet", starts[0], starts[1])
    rows = [row for row in rows if row["experiment"] not in target.overlay.masked]
    decided = [row for segment in target.segments for row in _rows_between(segment.rows, slots[0], slots[-1])]
    return sorted(rows + decided, key=lambda row: (row["slot"], row["layer"], row["offset"])) if decided else rows


def _rows_between(table: pa.Table, first: int, last: int) -> list[dict[str, Any]]:
    """The columns shown here, of the rows of a segment whose slots lie in [first, last]."""
    slots = table["slot"].to_numpy()
    return table.select(_COLUMNS).filter(pa.array((slots >= np.uint64(first)) & (slots <= np.uint64(last)))).to_pylist()


def read_rows(path: Path, start: int, end: int) -> list[dict[str, Any]]:
    """Rows [start, end) of a table; only their row groups are read, and nothing of it needs pandas, which would double the time to start."""
    file = pq.ParquetFile(path)
    found: list[dict[str, Any]] = []
    position = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if position < end and start < position + size:
            offset = max(start - position, 0)
            found += file.read_row_group(group, columns=_COLUMNS).slice(offset, min(end - position, size) - offset).to_pylist()
        position += size
    return found


def _view(target: Target, slot: int, rows: list[dict[str, Any]], tokenizer: Tokenizer, abridged: bool) -> SlotView:
    stream, geometry = target.stream, target.manifest.geometry
    place = stream.instance(slot)
    content = stream.read(slot)
    names = ("experiment", "condition", "item", "arm", "repetition", "kind", "offset", "length")
    marks = tuple(
        Mark(**{name: row[name] for name in names}, source=slot_name(row["source_slot"]) if row["kind"] == "swap" else None) for row in rows
    )
    return SlotView(
        slot=slot_name(slot),
        step=None if is_pool(slot) else geometry.step(slot),
        row=None if is_pool(slot) else geometry.row(slot),
        source=place.source,
        epoch=place.epoch,
        shard=place.shard,
        offset=place.offset,
        document=target.corpus.locate(place.shard, place.offset, from_index=abridged),
        num_loss_positions=int(content.loss_mask.sum()),
        marks=marks,
        pieces=_pieces(content.tokens[:-1], marks, tokenizer, abridged),
        look_ahead=tokenizer.decode(content.tokens[-1:]),
    )


def _pieces(tokens: np.ndarray, marks: tuple[Mark, ...], tokenizer: Tokenizer, abridged: bool) -> tuple[Piece, ...]:
    """TOKENS cut wherever an insertion begins or ends. A character whose bytes are cut apart shows as a replacement character."""
    partial = [(number, mark) for number, mark in enumerate(marks) if mark.kind not in _WHOLE_SLOT]
    borders = {border for _, mark in partial for border in (mark.offset, mark.offset + mark.length)}
    cuts = sorted({0, len(tokens)} | borders)
    found = []
    for start, end in pairwise(cuts):
        covering = tuple(n for n, mark in partial if mark.offset <= start and end <= mark.offset + mark.length)
        inner = _left_out(start, end, borders) if abridged else (end, end)
        for first, last in ((start, inner[0]), inner, (inner[1], end)):
            if first < last:
                omitted = abridged and (first, last) == inner
                found.append(Piece(first, last, covering, "" if omitted else tokenizer.decode(tokens[first:last]), omitted))
    return tuple(found)


def _left_out(start: int, end: int, borders: set[int]) -> tuple[int, int]:
    """What an abridged view leaves out of tokens [start, end): all but the first ones, and the last ones where an insertion follows or ends."""
    after = _CONTEXT_TOKENS if end in borders else 0
    return (start + _CONTEXT_TOKENS, end - after) if end - start > _CONTEXT_TOKENS + after else (end, end)
