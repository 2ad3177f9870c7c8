"""Check a corpus, a manifest or a run against what its records promise.

Usage: python tools/verify.py CORPUS_OR_MANIFEST_OR_RUN

The same as `megatron-exp verify`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "verify")
    entry()
