"""`plan --extends`: a manifest that keeps every row of an older one and adds experiments."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import fingerprint
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.writer import Tables
from megatron_exp.preparation.diff import differs, match
from megatron_exp.preparation.order import Order, comparable, placed_names
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream

_MOST_NAMED = 5


def require_same_frame(config: Config, corpus: Corpus, stream: Stream, older: Manifest, order: Order) -> None:
    """UserError unless corpus, geometry, seeds and order are those of `older`, and its experiments come first, as they were."""
    older.check_corpus(corpus)
    for name in ("geometry", "seeds"):
        now, before = getattr(config, name).model_dump(), getattr(older.config, name).model_dump()
        changed = [f"{name}.{key} is {now[key]}, was {before[key]}" for key in now if now[key] != before[key]]
        if changed:
            raise _refusal(older, "; ".join(changed))
    if stream.fingerprint != older.record["fingerprints"]["order"]:
        raise _refusal(older, "the order of slots is another: corpus.order, corpus.sources or pool.slots changed")
    placed = frozenset(placed_names(older))
    kept = comparable(config, order, placed)
    for number, before in enumerate(entry for entry in older.config.experiments if entry.name in placed):
        if number >= len(kept) or kept[number] != before:
            raise _refusal(
                older,
                f"experiment {before.name}, number {number + 1} of its list, is not there with the same type, parameters and `enabled`",
            )


def require_same_rows(older: Manifest, tables: Tables, record: dict[str, Any]) -> None:
    """UserError unless the rows of the older experiments are those of `older`, by hash; insertions that moved are named.

    record: that of the new manifest.
    """
    names = pa.array(older.experiments, pa.string())
    now = {name: _of(table, names) for name, table in tables.present().items()}
    before, planned = older.insertions(), older.record["fingerprints"]
    if fingerprint.of_table(now["insertions"]) != planned["insertions"]:
        raise _refusal(older, _moves(now["insertions"], before))
    if fingerprint.of_table(now["items"]) != planned["items"]:
        raise _refusal(older, "items of its experiments differ: their data files or their code changed since")
    # Payloads of probes are numbered after those of all items, so their numbers are others now.
    unnumbered = [name for name in tables.probes.column_names if name not in ("payload", "target")]
    if fingerprint.of_table(now["probes"].select(unnumbered)) != fingerprint.of_table(older.probes().select(unnumbered)):
        raise _refusal(older, "what its experiments ask differs: their code changed since")
    for name in older.experiments:
        if fingerprint.of_json(record["analyses"][name]) != fingerprint.of_json(older.analyses[name]):
            raise _refusal(older, f"the analysis of experiment {name} differs from the one it registered: its code changed since")
    _require_same_controllers(older, now, record)


def _require_same_controllers(older: Manifest, now: dict[str, pa.Table], record: dict[str, Any]) -> None:
    for name, one in older.controllers.items():
        mine = record.get("controllers", {}).get(name)
        if mine is None or {**mine, "rule_hash": None} != {**one, "rule_hash": None}:
            raise _refusal(older, f"the controller of experiment {name} differs from the one it planned: its code changed since")
    for table, what in (
        ("reserve", "places kept for controllers would move, because a new experiment needs their slots for itself"),
        ("bank", "what controllers hand out differs: data files or code changed since"),
    ):
        if older.controllers and fingerprint.of_table(now[table]) != older.record["fingerprints"][table]:
            raise _refusal(older, what)


def _of(table: pa.Table, experiments: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["experiment"].cast(pa.string()), value_set=experiments))


def _moves(now: pa.Table, before: pa.Table) -> str:
    """Which insertions moved, in words."""
    matched = match(now, before)
    moves = differs(now, before, matched, ("slot", "offset"))
    if not moves.any():
        lost = len(matched.only_old) + len(matched.only_new)
        return (
            f"{lost} insertions are in one of the two only" if lost else "insertions have another window, payload, source slot or condition"
        )
    rows = matched.new[moves][:_MOST_NAMED], matched.old[moves][:_MOST_NAMED]
    tables = (table.take(pa.array(chosen)).to_pylist() for table, chosen in zip((now, before), rows, strict=True))
    told = [
        f"{new['experiment']} item {new['item']}, copy {new['repetition']} from slot {old['slot']} offset {old['offset']} "
        f"to slot {new['slot']} offset {new['offset']}"
        for new, old in zip(*tables, strict=True)
    ]
    return (
        f"{int(moves.sum())} insertions would move, because a new experiment needs their slots for itself: {'; '.join(told)}"
        f"{'; ...' if moves.sum() > _MOST_NAMED else ''}"
    )


def _refusal(older: Manifest, found: str) -> UserError:
    return UserError(
        f"This configuration does not extend {older.path}: {found}. Keep what the older manifest was planned with, put new experiments after its own "
        "and away from the slots that they use, or plan anew without --extends (then runs of the older manifest are no runs of this one)."
    )
