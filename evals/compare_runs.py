"""Put the primary results of several runs side by side.

Usage: python evals/compare_runs.py RUN RUN... [--format csv|md|tex|parquet --out FILE]

The same as `megatron-exp compare`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    entry()
