"""Adopt existing Megatron shards or AI2's pre-tokenised arrays as a corpus; their bytes are reused.

Usage: python data_prep/import_data.py SHARDS... --tokenizer tokenizer.json --output CORPUS

The same as `megatron-exp import`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "import")
    entry()
