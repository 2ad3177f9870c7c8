"""Which probe is asked of which model in which state."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.evaluation.subjects import Label


@dataclass(frozen=True, eq=False)
class Questions:
    """Probes exploded over states: row number in the probe table int64 [n], state int64 [n], asked in training bool [n]."""

    probe: np.ndarray
    state: np.ndarray
    live: np.ndarray

    def where(self, mask: np.ndarray) -> "Questions":
        """The questions of a boolean mask [n]."""
        return Questions(self.probe[mask], self.state[mask], self.live[mask])

    def of_checkpoints(self) -> dict[int, np.ndarray]:
        """For each state, ascending: the probes to be asked of its checkpoint."""
        later = self.where(~self.live)
        return {int(state): later.probe[later.state == state] for state in np.unique(later.state)}


def questions(probes: pa.Table, label: Label, final_states: list[int], num_steps: int) -> Questions:
    """What one model is asked.

    Args:
        probes: PROBE_DEFINITIONS.
        label: an external reference is asked what the run is asked.
        final_states: states in which probes without states of their own are asked; questions about later states than the last
            of these are left out.
        num_steps: the run's last state, in which live probes without states were asked.
    """
    asked_of = "twin" if label == "twin" else "run"
    of = probes["of"].combine_chunks()
    is_asked = np.zeros(len(probes), bool)
    is_asked[pc.list_parent_indices(of).filter(pc.equal(pc.list_flatten(of), asked_of)).to_numpy()] = True
    states = probes["states"].combine_chunks()
    own_probe = pc.list_parent_indices(states).to_numpy().astype(np.int64)
    own_state = pc.list_flatten(states).to_numpy().astype(np.int64)
    live = probes["live"].to_numpy()
    without = np.flatnonzero(pc.list_value_length(states).to_numpy() == 0)
    at_end = [(without[~live[without]], state) for state in final_states] + [(without[live[without]], num_steps)]
    probe = np.concatenate([own_probe, *(rows for rows, _ in at_end)])
    state = np.concatenate([own_state, *(np.full(len(rows), state) for rows, state in at_end)])
    return Questions(probe, state, live[probe]).where(is_asked[probe] & (state <= final_states[-1]))
