"""From a configuration and a cluster profile to sbatch scripts. Nothing here starts a process; `megatron_exp.cli.submit` does.

profile   what may be said about a cluster, and which values are allowed
stages    the chain of a run as commands, each an argument list
render    the scripts: templates with values that are checked before and quoted once
"""
