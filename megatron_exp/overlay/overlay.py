"""The overlay: the base stream with the manifest's insertions applied when a slot is read. Shards are never written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.manifest.overlay_index import SPLICE
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.overlay.decided import Decided
from megatron_exp.stream.base import Instance, NoiseSpec, Stream
from megatron_exp.stream.slot import Geometry, Slot

_GROUP_BITS, _GROUPS_KEPT = 6, 1024
"""Slots of a group, as a power of two, and groups kept: finding one slot or sixty-four neighbours takes about as long."""
_KINDS = {layer: kind for kind, layer in LAYERS.items() if kind != "splice"} | {LAYERS["splice"] | SPLICE: "splice"}


class Insertion(NamedTuple):
    """One insertion of a slot, in order of application. value: payload number, source slot or noise key, by kind."""

    experiment: str
    kind: str
    layer: int
    offset: int
    length: int
    value: int


@dataclass(frozen=True, eq=False)
class Overlay:
    """The same members as the stream it wraps; reads give what the model is trained on.

    masked: experiments whose insertions are left out (an ablation is the same manifest with a mask). decided: what controllers handed out
    in a run; without it, only what was planned. It is no part of the fingerprint, which names what was planned: segments have a chain of their own.
    """

    stream: Stream
    manifest: Manifest
    masked: frozenset[str] = frozenset()
    decided: Decided | None = None

    @classmethod
    def open(cls, stream: Stream, manifest: Manifest, masked: frozenset[str] = frozenset(), decided: Decided | None = None) -> "Overlay":
        """Check that stream and manifest belong together; UserError where they do not or a masked name is unknown."""
        planned = manifest.record["fingerprints"]["order"]
        if stream.fingerprint != planned:
            raise UserError(
                f"The manifest {manifest.path} was planned on order {planned[:12]}, but this corpus and configuration give {stream.fingerprint[:12]}. "
                "Sequence length, order seed, sources or pool differ: use the manifest's own configuration, or plan again."
            )
        unknown = sorted(masked - set(manifest.experiments))
        if unknown:
            raise UserError(
                f"The manifest has no experiment {', '.join(unknown)} to mask; it has {', '.join(manifest.experiments) or 'none'}."
            )
        return cls(stream, manifest, masked, decided)

    @property
    def geometry(self) -> Geometry:
        return self.stream.geometry

    @property
    def num_slots(self) -> int:
        return self.stream.num_slots

    @property
    def pool_slots(self) -> int:
        return self.stream.pool_slots

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint.of_json([self.stream.fingerprint, self.manifest.fingerprint, sorted(self.masked)])

    def instance(self, slot: int) -> Instance:
        """Where the slot's base content lies."""
        return self.stream.instance(slot)

    def slots(self, source: str, index: int) -> list[int]:
        """All slots whose base content is this instance."""
        return self.stream.slots(source, index)

    def insertions(self, slot: int) -> list[Insertion]:
        """What is done to the slot, in order of application."""
        return self._insertions(slot, self._planned(slot >> _GROUP_BITS).get(slot, []))

    def _insertions(self, slot: int, planned: list[Insertion]) -> list[Insertion]:
        """What is planned, and in a run what controllers decided."""
        added = [Insertion(name, "tokens", LAYERS["tokens"], *place) for name, *place in self.decided.of(slot)] if self.decided else []
        return sorted([*planned, *added], key=lambda one: (one.layer, one.offset)) if added else planned.copy()

    def noise(self, slot: int) -> list[NoiseSpec]:
        """The noise to add to the slot's input embeddings."""
        return [
            NoiseSpec(found.value, slot, self.manifest.noise_scale(found.value)) for found in self.insertions(slot) if found.kind == "noise"
        ]

    def read(self, slot: int) -> Slot:
        """The slot as trained on."""
        planned = self._planned(slot >> _GROUP_BITS).get(slot)
        if planned is None and self.decided is None:
            return self.stream.read(slot)
        insertions = self._insertions(slot, planned or [])
        swaps = [found.value for found in insertions if found.kind == "swap"]
        tokens, mask = self.stream.read(swaps[-1] if swaps else slot)
        for _, kind, _, offset, length, value in insertions:
            end = offset + length
            if kind == "tokens":
                tokens[offset:end] = self.manifest.payload(value)
                mask[max(offset - 1, 0) : end - 1] = 1  # a payload counts wherever it lies, also in a slot that a filter left out
                if end == len(mask):
                    mask[end - 1] = 0  # the look-ahead token does not continue the payload
            elif kind == "splice":
                splice(tokens, mask, self.manifest.payload(value), offset)
            elif kind == "mask":
                mask[offset:end] = 0
        return Slot(tokens, mask)

    @cached_property
    def _planned(self) -> Callable[[int], dict[int, list[Insertion]]]:
        """The planned insertions of a group of neighbouring slots; the last groups are kept, since slots are read in order."""
        return lru_cache(_GROUPS_KEPT)(self._read_group)

    def _read_group(self, group: int) -> dict[int, list[Insertion]]:
        names, masked, found = self.manifest.experiments, self.masked, {}
        for slot, entries in self.manifest.index.within(group << _GROUP_BITS, (group + 1) << _GROUP_BITS):
            found[slot] = [
                Insertion(names[experiment], _KINDS[layer], layer & ~SPLICE, offset, length, value)
                for layer, experiment, offset, length, value in entries.tolist()
                if names[experiment] not in masked
            ]
        return found


def splice(tokens: np.ndarray, mask: np.ndarray, payload: np.ndarray, offset: int) -> None:
    """Insert `payload` at `offset` into a slot (int32 [S + 1], uint8 [S]), in place: what stood there moves right, the tail falls off.

    Every position keeps the mask of the label it had, since labels move with their positions; the payload counts wherever it lies. The first moved
    token is the label of the payload's last one, but not where the payload ends the slot, as with any payload.
    """
    length, end, before = len(mask), offset + len(payload), max(offset - 1, 0)
    moved = tokens[offset : length + 1 - len(payload)].copy()
    # The position before the boundary has the first moved token as its label; at the slot's beginning there is none, and the next one stands in.
    moved_mask = np.concatenate([mask[: 0 if offset else 1], mask[before : length - len(payload)]])
    tokens[offset:end], tokens[end:] = payload, moved
    mask[before : end - 1], mask[end - 1 :] = 1, moved_mask
    if end == length:
        mask[length - 1] = 0
