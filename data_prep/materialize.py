"""Write the rewritten shards of a manifest for a stock Megatron trainer, which reads them in slot order.

Usage: python data_prep/materialize.py MANIFEST --out DIR

The same as `megatron-exp materialize`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "materialize")
    entry()
