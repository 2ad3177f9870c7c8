"""A worker without torch: `python -m tests.training.worker exit CODE` or `... wait FILE` (for SIGTERM, then exit with 75)."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1] == "exit":
        sys.exit(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    Path(f"{sys.argv[2]}.{os.environ['RANK']}").touch()
    while True:
        signal.pause()
