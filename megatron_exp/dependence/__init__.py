"""The dependence test (CPDT): do the experiments of a manifest disturb one another? Asked with short runs, before the long one is paid for.

manifest -> blocks (a short manifest per replicate, all experiments in it) -> cells (a row of experiments in a block: trained from one checkpoint,
scored) -> matrix (statistics, verdicts) -> CPDT/
"""
