"""After training: ask run and twin the manifest's probes, let each experiment score the answers, correct, judge, write.

subjects (run, twin or external reference) -> questions -> responses -> results with verdicts -> RUN/evals/step-XXXXXXXX/
"""

from megatron_exp.evaluation.evaluate import evaluate as evaluate
from megatron_exp.evaluation.external import evaluate_model as evaluate_model
