"""Count exact occurrences of token strings in shards, in the stream as trained, and in payloads.

Usage: python tools/search_strings.py CORPUS_OR_MANIFEST_OR_RUN --strings FILE.jsonl [--out DIR]

The same as `megatron-exp search`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "search")
    entry()
