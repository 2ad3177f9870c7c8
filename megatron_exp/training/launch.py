"""Starting the processes of a run on this machine, as torchrun does, without losing signals and exit codes.

torchrun itself ends with 1 whatever the workers say, and gives them 30 seconds after SIGTERM. Here stop signals are passed on and
the workers decide when they are done, and their exit code (75: start again to go on) is the command's.
"""

import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_exp.training.hooks.stop import STOP_SIGNALS

_AGENT_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
"""These end the launcher and its workers at once, as in torchrun."""


def launch(argv: Sequence[str], num_processes: int, module: str = "megatron_exp") -> int:
    """Run `python -m MODULE ARGV` in `num_processes` processes that know of each other; returns their exit code.

    0 where all ended well, else the code of the first that did not; 128 + n where signal n ended the launcher or that process.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in _AGENT_SIGNALS),
    )
    previous = {number: signal.signal(number, _pass_on) for number in STOP_SIGNALS}
    previous |= {number: signal.getsignal(number) for number in _AGENT_SIGNALS}  # the agent sets these itself
    try:
        elastic_launch(config, sys.executable)("-m", module, *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: Any) -> None:
    """Give a stop signal to the workers, which are the direct children; what they started themselves is theirs."""
    del frame
    for worker in psutil.Process().children():
        worker.send_signal(number)
