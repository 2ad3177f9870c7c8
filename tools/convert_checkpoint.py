"""Convert a checkpoint to a Hugging Face Olmo2ForCausalLM, or one into a checkpoint.

Usage: python tools/convert_checkpoint.py to-hf RUN_OR_CHECKPOINT HF_DIRECTORY
       python tools/convert_checkpoint.py from-hf HF_DIRECTORY CHECKPOINT

The same as `megatron-exp convert`, whose --help lists every option.
"""

import sys

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    entry()
