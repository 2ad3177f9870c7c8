"""Test whether the experiments of a manifest disturb one another, with short runs from one checkpoint.

Usage: python evals/run_cpdt.py MANIFEST --from CHECKPOINT --out CPDT

The same as `megatron-exp cpdt`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "cpdt")
    entry()
