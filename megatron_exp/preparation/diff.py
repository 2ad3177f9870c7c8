"""`plan --diff`: which insertions of an older manifest moved, and to where."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.manifest.reader import Manifest


class Matched(NamedTuple):
    """Rows of two insertions tables with the same insertion id (int64, in order of id), and the rows that only one of them has."""

    new: np.ndarray
    old: np.ndarray
    only_new: np.ndarray
    only_old: np.ndarray


def match(new: pa.Table, old: pa.Table) -> Matched:
    """Which rows of two insertions tables are the same copy."""
    ids = [table["insertion_id"].to_numpy() for table in (new, old)]
    _, rows, others = np.intersect1d(*ids, return_indices=True)
    return Matched(rows, others, *(np.setdiff1d(np.arange(len(one)), used) for one, used in zip(ids, (rows, others), strict=True)))


def differs(new: pa.Table, old: pa.Table, matched: Matched, columns: tuple[str, ...]) -> np.ndarray:
    """bool [matched]: whether any of the (never null) columns differs."""
    result = np.zeros(len(matched.new), dtype=bool)
    for name in columns:
        result |= new[name].to_numpy()[matched.new] != old[name].to_numpy()[matched.old]
    return result


def _places(manifest: Manifest) -> pa.Table:
    """insertion_id, experiment, slot and offset of all insertions, and of the places kept for controllers."""
    names = ["insertion_id", "experiment", "slot", "offset"]
    reserve = manifest.reserve().rename_columns({"place_id": "insertion_id"}).select(names)
    return pa.concat_tables([manifest.insertions().select(names), reserve]).unify_dictionaries()


def diff(new: Manifest, old: Manifest) -> dict[str, dict[str, int]]:
    """How the insertions and the reserve of `new` differ from `old`: per experiment the numbers added, removed, moved and unchanged."""
    tables = _places(new), _places(old)
    matched = match(*tables)
    moves = differs(*tables, matched, ("slot", "offset"))
    rows = {
        "added": (tables[0], matched.only_new),
        "removed": (tables[1], matched.only_old),
        "moved": (tables[0], matched.new[moves]),
        "unchanged": (tables[0], matched.new[~moves]),
    }
    result: dict[str, dict[str, int]] = {}
    for word, (table, chosen) in rows.items():
        for entry in pc.value_counts(table["experiment"].take(pa.array(chosen)).cast(pa.string())).to_pylist():
            result.setdefault(entry["values"], dict.fromkeys(rows, 0))[word] = entry["counts"]
    return dict(sorted(result.items()))


def moved(new: Manifest, old: Manifest) -> list[dict[str, Any]]:
    """The insertions and reserved places that are in both manifests at different places, with both places."""
    tables = _places(new), _places(old)
    matched = match(*tables)
    moves = differs(*tables, matched, ("slot", "offset"))
    now, before = tables[0].take(pa.array(matched.new[moves])), tables[1].take(pa.array(matched.old[moves]))
    places = [list(zip(table["slot"].to_pylist(), table["offset"].to_pylist(), strict=True)) for table in (before, now)]
    names = zip(now["experiment"].to_pylist(), now["insertion_id"].to_pylist(), *places, strict=True)
    return sorted(
        ({"experiment": experiment, "insertion_id": number, "from": start, "to": end} for experiment, number, start, end in names),
        key=lambda row: (row["experiment"], row["insertion_id"]),
    )
