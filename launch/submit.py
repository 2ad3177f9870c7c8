"""Hand the whole chain of a run, from text to report, to SLURM.

Usage: python launch/submit.py CONFIG --cluster CLUSTER.yaml [--out DIR] [--dry-run]

The same as `megatron-exp submit`, whose --help lists every option. launch/slurm/ shows what it renders.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "submit")
    entry()
