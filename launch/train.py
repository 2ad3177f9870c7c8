"""Train on a manifest, or its baseline twin; start it with torchrun for several processes.

Usage: python launch/train.py MANIFEST --out RUN [--baseline]
       torchrun --nproc-per-node 2 launch/train.py MANIFEST --out RUN [--baseline]

The same as `megatron-exp train`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    entry()
