"""Say how far a run is.

Usage: python tools/show_status.py RUN

The same as `megatron-exp status`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "status")
    entry()
