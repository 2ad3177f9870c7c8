"""Work for processes that do not end well. A module of its own, so that a spawned process loads little."""

import os
import signal
from pathlib import Path

from megatron_exp.errors import UserError


class FailingWork:
    """Tasks are names of what happens."""

    directory = Path()

    def open(self, counters):
        return lambda task: self._do(task, counters)

    def _do(self, task, counters):
        counters.add(documents=1)
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "mistake":
            raise UserError("this input is wrong")
        if task == "bug":
            raise KeyError("ours")
