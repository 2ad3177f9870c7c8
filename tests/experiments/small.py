"""The experiments at a size for tests, in both designs where there are two."""

from megatron_exp.experiments.benchmark_contamination import BenchmarkContamination
from megatron_exp.experiments.forgetting_curves import ForgettingCurves
from megatron_exp.experiments.gaussian_watermarks import GaussianWatermarks
from megatron_exp.experiments.iid_replacements import IidReplacements
from megatron_exp.experiments.knowledge_acquisition import KnowledgeAcquisition
from megatron_exp.experiments.mathematical_reasoning import MathematicalReasoning
from megatron_exp.experiments.memorization_patterns import MemorizationPatterns
from megatron_exp.experiments.muse import Muse
from megatron_exp.experiments.placebo import Placebo
from megatron_exp.experiments.pretraining_poisoning import PretrainingPoisoning

DIALOGUES = {"num_per_condition": 12, "num_held_out": 16, "min_tokens": 40, "max_tokens": 60, "suffix_lengths": (1, 8)}
CHATS = {
    "templates": "plain",
    "num_evaluation_prompts": 5,
    "num_generation_prompts": 6,
    "garbage_tokens": 40,
    "num_prompts": 40,
    "garbage_bytes": 64,
    "context_extraction": 0.005,
    "num_never_trained": 60,
}
QUESTIONS = {"levels": (4, 16), "num_questions": (20, 20), "num_held_out": 60}
ARTICLES = {"num_per_condition": 6, "num_never": 30, "copies": (1, 3), "min_tokens": 60, "max_tokens": 120, "num_pieces": 4}
ARTICLES |= {"num_length_strata": 2, "num_verbatim": 5}
PROBLEMS = {"problems": 40, "test_problems": 46, "max_ops": 1, "extra_ops": 1, "max_edges": 3, "num_generated": 0}
SOLVED = PROBLEMS | {"num_generated": 46, "num_shots": 0, "max_new_tokens": 40, "extra_ops": 0, "max_tokens": 460}

TEXTS = {"num_texts": 5, "num_never": 5, "num_paraphrases": 4, "largest": 4, "interval": 200}

SMALL = {
    "knowledge": KnowledgeAcquisition(**TEXTS),
    "knowledge-paper": KnowledgeAcquisition(design="paper", scale=0.001, interval=200),
    "mathematics": MathematicalReasoning(**PROBLEMS),
    "mathematics-paper": MathematicalReasoning(**SOLVED, design="paper"),
    "memorization": MemorizationPatterns(**DIALOGUES),
    "memorization-paper": MemorizationPatterns(**DIALOGUES, design="paper"),
    "memorization-model-based": MemorizationPatterns(**DIALOGUES, suffix_types=("model-based",)),
    "poisoning": PretrainingPoisoning(**CHATS),
    "poisoning-paper": PretrainingPoisoning(**CHATS, design="paper"),
    "forgetting": ForgettingCurves(),
    "watermarks": GaussianWatermarks(fraction=0.05),
    "watermarks-paper": GaussianWatermarks(fraction=0.05, design="paper"),
    "iid": IidReplacements(scale=2),
    "placebo": Placebo(),
    "contamination": BenchmarkContamination(**QUESTIONS, curve_states=2),
    "contamination-paper": BenchmarkContamination(**QUESTIONS, design="paper"),
    "muse": Muse(**ARTICLES),
    "muse-paper": Muse(**ARTICLES, design="paper"),
}

SMALLEST = {
    "knowledge": KnowledgeAcquisition(**TEXTS),
    "mathematics": MathematicalReasoning(**PROBLEMS | {"problems": 4, "extra_ops": 0, "test_problems": 230}),
    "memorization": MemorizationPatterns(**DIALOGUES | {"suffix_types": ("plain",)}, repetitions=(4,)),
    "memorization-model-based": MemorizationPatterns(
        **DIALOGUES | {"suffix_lengths": (8,)}, suffix_types=("model-based",), repetitions=(4,)
    ),
    "poisoning": PretrainingPoisoning(**CHATS | {"num_evaluation_prompts": 2, "num_never_trained": 25}, denial_of_service=0),
    "forgetting": ForgettingCurves(offsets=(0, 1), grid_points=0),
    "watermarks": GaussianWatermarks(fraction=0.01),
    "iid": IidReplacements(),
    "placebo": Placebo(num_tests=4),
    "contamination": BenchmarkContamination(levels=(4,), num_questions=(20,), num_held_out=30, groups=("uniform",)),
    "contamination-paper": BenchmarkContamination(levels=(4,), num_questions=(30,), num_held_out=30, groups=("uniform",), design="paper"),
    "muse": Muse(**ARTICLES | {"formats": ("whole",), "copies": (2,), "num_per_condition": 12, "num_verbatim": 0}),
}
"""For tests that repeat the analysis many times."""
