"""Tokenise text into Megatron indexed shards.

Usage: python tools/preprocess_data.py --input FILE_GLOB_OR_DIRECTORY... --tokenizer tokenizer.json --output CORPUS

The same as `megatron-exp preprocess`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "preprocess")
    entry()
