"""The five moments of a run at which a feature may act."""

from typing import Any

from megatron_exp.training.run import Run


class Hook:
    """A feature of the trainer; override the moments it needs. Every process of the run calls every moment.

    A hook may read everything and change nothing of the weights, the optimizer or the data.
    """

    name = ""
    """Under which its state is kept in checkpoints; empty for a hook without state."""

    def on_start(self, run: Run, state: Any) -> None:
        """Before the first step of this attempt; STATE is what `on_checkpoint` gave, None at the start of a run."""

    def on_step(self, run: Run) -> None:
        """After every update; `run.step` is the state just reached."""

    def on_checkpoint(self, run: Run) -> Any:
        """Before a checkpoint of `run.step` is written: make durable what must not be lost, return JSON-able state or None."""

    def on_end(self, run: Run) -> None:
        """After the last step of this attempt, whether the run is over or stopped."""

    def on_error(self, run: Run, error: BaseException) -> None:
        """When ERROR ends this attempt: release what is held, record what is known; the error goes on."""
