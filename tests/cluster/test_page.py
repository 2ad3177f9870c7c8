"""docs/cluster.md and the examples in launch/ say what the code does."""

import re
from pathlib import Path

import pytest

from megatron_exp.cluster.profile import STAGES, Cluster, Container, Dependence, PreprocessInputs, load_cluster
from megatron_exp.config.schema import ModelConfig
from megatron_exp.model.memory import TrainingLayout, checkpoint_bytes, throughput, training_memory
from megatron_exp.model.presets import resolve_shape
from tests.cluster.rendered import EXAMPLES, ROOT, rendered

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
DOLMA2_IDS = 100_278
SEQUENCE_LENGTH = 4096


def test_the_examples_are_what_submit_renders():
    found = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.sbatch")}
    assert found == rendered(), "python -m tests.cluster.rendered writes them anew"


@pytest.mark.parametrize("path", sorted((ROOT / "launch/clusters").glob("*.yaml")), ids=lambda path: path.name)
def test_the_profiles_in_launch_are_valid(path: Path):
    load_cluster(path)


def test_every_key_of_a_profile_is_documented_and_no_other():
    table = PAGE.partition("| key |")[2].partition("\n\n")[0]
    documented = {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1] if "|" in row else "")}
    groups = {"container": Container, "preprocess": PreprocessInputs, "cpdt": Dependence}
    expected = {name for name in Cluster.model_fields if name not in groups}
    expected |= {f"{group}.{name}" for group, model in groups.items() for name in model.model_fields}
    assert documented == expected
    assert all(f"`{stage}`" in PAGE for stage in STAGES)


MEASURED = {("olmo2-1b", 1): "75k on an H200, micro-batch 8"}
"""Of benchmarks/gpu/results-h200.jsonl."""


def row(preset: str, layout: TrainingLayout) -> str:
    shape = resolve_shape(ModelConfig(preset=preset), DOLMA2_IDS, SEQUENCE_LENGTH)
    memory = training_memory(shape, layout)
    how = f"tp {layout.tp}, micro-batch {layout.micro_batch_size}" + (", recompute" if layout.recompute else "")
    return (
        f"| {preset} | {layout.num_gpus} | {how} | {memory.total / 2**30:.0f} GiB | {throughput(shape, layout) / 1e3:,.0f}k | "
        f"{MEASURED.get((preset, layout.num_gpus), 'not measured')} | {checkpoint_bytes(shape, layout.precision) / 2**30:.0f} GiB |"
    )


def layout(gpus: int, tp: int, micro_batch_size: int, recompute: bool = False) -> TrainingLayout:
    return TrainingLayout(
        precision="fp8", tp=tp, dp=gpus // tp, micro_batch_size=micro_batch_size, sequence_parallel=tp > 1, recompute=recompute
    )


ROWS = [
    ("olmo2-179m", layout(1, 1, 8)),
    ("olmo2-179m", layout(8, 1, 8)),
    ("olmo2-179m", layout(64, 1, 8)),
    ("olmo2-546m", layout(1, 1, 8)),
    ("olmo2-546m", layout(8, 1, 8)),
    ("olmo2-546m", layout(64, 1, 8)),
    ("olmo2-1b", layout(1, 1, 4)),
    ("olmo2-1b", layout(8, 1, 4)),
    ("olmo2-1b", layout(64, 1, 4)),
    ("olmo2-2.7b", layout(1, 1, 1)),
    ("olmo2-2.7b", layout(8, 1, 2)),
    ("olmo2-2.7b", layout(64, 1, 2)),
    ("olmo2-7b", layout(8, 2, 1)),
    ("olmo2-7b", layout(64, 2, 2)),
]


@pytest.mark.parametrize(("preset", "divided"), ROWS, ids=lambda value: value if isinstance(value, str) else str(value.num_gpus))
def test_the_table_of_sizes_is_what_the_calculation_gives(preset, divided):
    assert row(preset, divided) in PAGE


def test_seven_billion_parameters_do_not_fit_on_one_gpu_as_the_page_says():
    shape = resolve_shape(ModelConfig(preset="olmo2-7b"), DOLMA2_IDS, SEQUENCE_LENGTH)
    assert training_memory(shape, layout(1, 1, 1, recompute=True)).total > 80 * 2**30
    assert "| olmo2-7b | 1 | does not fit" in PAGE
