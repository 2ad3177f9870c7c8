"""Score the experiments of a run against its manifest and its twin.

Usage: python evals/run_eval.py RUN [--against TWIN]

The same as `megatron-exp eval`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    entry()
