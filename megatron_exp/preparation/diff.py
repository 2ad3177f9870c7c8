"""`plan --diff`: which insertions of an older manifest moved, and to where."""

from typing import Any

from megatron_exp.manifest.reader import Manifest


def diff(new: Manifest, old: Manifest) -> dict[str, dict[str, int]]:
    """How the insertions of `new` differ from `old`: per experiment the numbers added, removed, moved and unchanged."""
    places = [_places(manifest) for manifest in (new, old)]
    result: dict[str, dict[str, int]] = {}
    for key in places[0].keys() | places[1].keys():
        cell = result.setdefault(key[0], dict.fromkeys(("added", "removed", "moved", "unchanged"), 0))
        now, before = places[0].get(key), places[1].get(key)
        cell["added" if before is None else "removed" if now is None else "unchanged" if now == before else "moved"] += 1
    return dict(sorted(result.items()))


def moved(new: Manifest, old: Manifest) -> list[dict[str, Any]]:
    """The insertions that are in both manifests at different places, with both places."""
    now, before = _places(new), _places(old)
    return [
        {"experiment": key[0], "insertion_id": key[1], "from": before[key], "to": now[key]}
        for key in sorted(now.keys() & before.keys())
        if now[key] != before[key]
    ]


def _places(manifest: Manifest) -> dict[tuple[str, int], tuple[int, int]]:
    table = manifest.insertions()
    columns = [table[name].to_pylist() for name in ("experiment", "insertion_id", "slot", "offset")]
    return {(experiment, number): (slot, offset) for experiment, number, slot, offset in zip(*columns, strict=True)}
