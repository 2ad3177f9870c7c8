"""`python -m megatron_exp`: the same as the command `megatron-exp`."""

from megatron_exp.cli.main import entry

if __name__ == "__main__":
    entry()
