"""Ranked classification: from the log-likelihoods of all options to whether the right one ranks first.

Probes are named `gold`, `wrong-1`, `wrong-2`, ... (an option given its question) and `.../unconditional` (the same after "Answer:" alone). The items'
metadata hold `characters`, of the scored part of every option with the right one first, and `normalisation`, the benchmark's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from megatron_exp.experiments.benchmark_questions import Normalisation
from megatron_exp.experiments.frames import Frame

UNCONDITIONAL = "/unconditional"
_GOLD = "gold"
_RIGHT_FIRST = 0


def option_name(number: int) -> str:
    """The probe of an option, the right one being number 0."""
    return f"wrong-{number}" if number else _GOLD


def option_number(probe: str) -> int:
    """The option a probe is about; a probe with another name is about the right one."""
    return int(probe.removesuffix(UNCONDITIONAL).removeprefix("wrong-")) if probe.startswith("wrong-") else _RIGHT_FIRST


def characters(frame: Frame) -> np.ndarray:
    """float64 [rows]: characters of the scored part of the option that each row is about."""
    numbers = (option_number(name) for name in frame.probe)
    return np.array([lengths[number] for lengths, number in zip(_metadata(frame, "characters"), numbers, strict=True)], np.float64)


def per_character(frame: Frame) -> Frame:
    """The same rows with values in nats per character."""
    lengths = characters(frame)
    return replace(frame, run=frame.run / lengths, twin=frame.twin / lengths)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The options of every (question, state). base: its `gold` rows. The arrays are [rows, options], NaN where there is no such option or answer.

    num_options: int64 [rows]; questions of files with gold texts alone have one.
    """

    base: Frame
    num_options: np.ndarray
    lengths: np.ndarray
    conditional: dict[str, np.ndarray]
    unconditional: dict[str, np.ndarray]

    @classmethod
    def of(cls, frame: Frame) -> "Ranking":
        """Gather the options of all questions in a frame."""
        base = frame.of_probe(_GOLD)
        row_of = {place: row for row, place in enumerate(zip(base.item.tolist(), base.step.tolist(), strict=True))}
        lists = list(_metadata(base, "characters"))
        most = max(map(len, lists), default=1)
        lengths = np.array([[*one, *[np.nan] * (most - len(one))] for one in lists], np.float64).reshape(len(base), most)
        options = {model: np.full((len(base), most), np.nan) for model in ("run", "twin")}
        alone = {model: np.full((len(base), most), np.nan) for model in ("run", "twin")}
        for name in np.unique(frame.probe):
            target = alone if name.endswith(UNCONDITIONAL) else options
            if name.removesuffix(UNCONDITIONAL) == option_name(option_number(name)):
                part = frame.of_probe(name)
                rows = [row_of[place] for place in zip(part.item.tolist(), part.step.tolist(), strict=True)]
                for model, values in (("run", part.run), ("twin", part.twin)):
                    target[model][rows, option_number(name)] = values
        return cls(base, np.array([len(one) for one in lists], np.int64), lengths, options, alone)

    def correct(self, normalisation: Normalisation | None) -> Frame:
        """The base rows with 1.0 where the right option ranks first, else 0.0; NaN where an option was not scored or there is but one.

        None takes the normalisation of each question's own benchmark. A tie is no success.
        """
        own = np.array(list(_metadata(self.base, "normalisation")), dtype=object)
        chosen = own if normalisation is None else np.full(len(self.base), normalisation, dtype=object)
        return replace(self.base, run=self._hits("run", chosen), twin=self._hits("twin", chosen))

    def _hits(self, model: str, chosen: np.ndarray) -> np.ndarray:
        values = self.conditional[model].copy()
        by_character, by_prior = chosen == "char", chosen == "unconditional"
        values[by_character] /= self.lengths[by_character]
        values[by_prior] -= self.unconditional[model][by_prior]
        is_complete = (np.isfinite(values).sum(axis=1) == self.num_options) & (self.num_options > 1)
        rivals = np.where(np.isfinite(values), values, -np.inf)[:, 1:].max(axis=1, initial=-np.inf)
        return np.where(is_complete, values[:, _RIGHT_FIRST] > rivals, np.nan)


def _metadata(frame: Frame, name: str) -> Iterable[Any]:
    """One entry of the metadata of every row's item; unlike `Frame.meta` also lists of unequal length."""
    parsed = {text: orjson.loads(text)[name] for text in set(frame.metadata_json)}
    return [parsed[text] for text in frame.metadata_json]
