"""Show what is in a corpus, a manifest or a run: counts, a step, a slot, an item, any SQL.

Usage: python tools/inspect_manifest.py MANIFEST_OR_RUN [--step N] [--slot K] [--item I]

The same as `megatron-exp inspect`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "inspect")
    entry()
