"""The experiments at a size for tests, in both designs where there are two."""

from megatron_exp.experiments.forgetting_curves import ForgettingCurves
from megatron_exp.experiments.gaussian_watermarks import GaussianWatermarks
from megatron_exp.experiments.iid_replacements import IidReplacements
from megatron_exp.experiments.memorization_patterns import MemorizationPatterns
from megatron_exp.experiments.placebo import Placebo
from megatron_exp.experiments.pretraining_poisoning import PretrainingPoisoning

DIALOGUES = {"num_per_condition": 12, "num_held_out": 16, "min_tokens": 40, "max_tokens": 60, "suffix_lengths": (1, 8)}
CHATS = {"num_evaluation_prompts": 5, "num_prompts": 40, "garbage_bytes": 64, "context_extraction": 0.005, "num_never_trained": 60}

SMALL = {
    "memorization": MemorizationPatterns(**DIALOGUES),
    "memorization-paper": MemorizationPatterns(**DIALOGUES, design="paper"),
    "poisoning": PretrainingPoisoning(**CHATS),
    "poisoning-paper": PretrainingPoisoning(**CHATS, design="paper"),
    "forgetting": ForgettingCurves(),
    "watermarks": GaussianWatermarks(fraction=0.05),
    "watermarks-paper": GaussianWatermarks(fraction=0.05, design="paper"),
    "iid": IidReplacements(scale=2),
    "placebo": Placebo(),
}

SMALLEST = {
    "memorization": MemorizationPatterns(**DIALOGUES | {"suffix_types": ("plain",)}, repetitions=(4,)),
    "poisoning": PretrainingPoisoning(**CHATS | {"num_evaluation_prompts": 2, "num_never_trained": 25}, denial_of_service=0),
    "forgetting": ForgettingCurves(offsets=(0, 1), grid_points=0),
    "watermarks": GaussianWatermarks(fraction=0.01),
    "iid": IidReplacements(),
    "placebo": Placebo(num_tests=4),
}
"""For tests that repeat the analysis many times."""
