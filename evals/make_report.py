"""Write one self-contained HTML file about a run.

Usage: python evals/make_report.py RUN [--against TWIN] --out FILE.html

The same as `megatron-exp report`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "report")
    entry()
