"""Place all experiments of a configuration and write the manifest.

Usage: python data_prep/build_manifest.py CONFIG.yaml --out MANIFEST

The same as `megatron-exp plan`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "plan")
    entry()
