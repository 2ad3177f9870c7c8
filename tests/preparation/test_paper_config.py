"""The paper's configuration on a corpus that has its sizes and no content, scaled down."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.plan_paper_config import stand_in
from megatron_exp.cli import tables
from megatron_exp.config.load import load_config
from megatron_exp.display.paper_numbers import PAPER_NUMBERS, REFERENCE_GEOMETRY, compared
from megatron_exp.experiments.loading import available_types
from megatron_exp.experiments.paper import REFERENCE
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.texts import texts_of

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, BATCH = 100, 8
SHRUNK = STEPS * BATCH / (REFERENCE.steps * REFERENCE.global_batch_size)
COUNTED = {"knowledge_acquisition", "mathematical_reasoning", "benchmark_contamination", "memorization_patterns", "muse"}
"""Experiments whose numbers of items do not follow the geometry."""


def shrunk(entry):
    extra = {"scale": 2 * SHRUNK} if entry.type in COUNTED else {}
    extra |= {"num_tests": 2, "num_swapped": 1} if entry.type == "placebo" else {}
    extra |= (
        {"window": [0, 0.9]} if entry.type == "gaussian_watermarks" else {}
    )  # its one step is not in the middle, where a batch is swapped
    extra |= (
        {"num_shots": 0, "max_new_tokens": 50} if entry.type == "mathematical_reasoning" else {}
    )  # a small vocabulary makes long prompts
    extra |= {"interval": STEPS // 10} if entry.type == "knowledge_acquisition" else {}  # one of a single step may be a swapped batch
    extra |= {"num_held_out": 20} if entry.type == "memorization_patterns" else {}
    extra |= {"num_prompts": 50, "num_generation_prompts": 2, "num_evaluation_prompts": 2} if entry.type == "pretraining_poisoning" else {}
    return entry.model_copy(update={"parameters": entry.parameters | extra})


@pytest.fixture(scope="module", params=["paper.yaml", "paper-slots.yaml"])
def manifest(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    source = folder / "words.txt"
    source.write_text(" ".join(f"word{number % 300} and" for number in range(2_000)))
    train_bpe(texts_of([str(source)]), 500, folder / "tokenizer.json")
    (folder / "corpus").mkdir()
    corpus = stand_in(folder / "corpus", folder / "tokenizer.json", num_tokens=20_000_000)
    config = load_config(
        EXAMPLES / request.param,
        [
            f"corpus.path={corpus}",
            f"geometry.steps={STEPS}",
            f"geometry.global_batch_size={BATCH}",
            "training.schedule.warmup_steps=4",
            f"training.checkpoint.keep=[{STEPS // 2}]",
            f"training.schedule.decay_start={STEPS - STEPS // 10}",
            "pool.slots=900",
            "budget.fraction=0.9",
        ],
    )
    experiments = tuple(shrunk(entry) for entry in config.experiments)
    validation = config.training.validation.model_copy(update={"slots": 8})
    training = config.training.model_copy(update={"validation": validation})
    return plan(config.model_copy(update={"experiments": experiments, "training": training}), folder / "manifest")


def test_the_papers_configuration_plans_all_that_needs_no_reference(manifest):
    waiting = manifest.record["waiting_for_reference"]
    assert set(manifest.experiments) | set(waiting) == {entry.name for entry in manifest.config.experiments}
    assert all(manifest.analyses[name]["parameters"].get("design") in ("paper", None) for name in manifest.experiments)


def test_shares_of_the_run_are_the_papers(manifest):
    fractions = {name: cell["fraction"] for name, cell in manifest.record["data_kinds"].items()}
    assert fractions["watermark"] == 1 / STEPS  # one whole batch is the least there is
    assert fractions["poisoning"] == pytest.approx(0.0011, rel=0.1)
    assert fractions["forgetting"] == pytest.approx(9 / STEPS)


def test_every_experiment_has_one_kind_of_data_or_says_which_tokens_are_unusual(manifest):
    kinds = manifest.record["data_kinds"]
    assert kinds["forgetting"]["iid"] == kinds["forgetting"]["tokens"] and kinds["watermark"]["unusual"] == kinds["watermark"]["tokens"]
    lengths = {"rare": (1, 8, 32), "random": (1, 8, 32)}
    num = kinds["memorization"]["items"] / (3 + 18)
    assert kinds["memorization"]["unusual"] == num * (1 + 4 + 16) * sum(map(sum, lengths.values()))
    assert 0 < kinds["poisoning"]["unusual"] < kinds["poisoning"]["tokens"] and kinds["mathematics"]["unusual"] == 0
    for cell in kinds.values():
        assert cell["tokens"] == cell["iid"] + cell["ood"] + cell["unusual"]


def test_the_table_of_the_paper_has_every_experiment_and_adds_up():
    known = set(available_types())
    assert set(PAPER_NUMBERS) <= known
    rows = PAPER_NUMBERS.values()
    assert sum(row.tokens for row in rows) == pytest.approx(3700, rel=0.02)
    for column, total in (("iid", 2600), ("ood", 904), ("unusual", 250)):
        assert sum(getattr(row, column) for row in rows) == pytest.approx(total, rel=0.03)
    assert {
        "sequence_length": REFERENCE.sequence_length,
        "global_batch_size": REFERENCE.global_batch_size,
        "steps": REFERENCE.steps,
    } == REFERENCE_GEOMETRY


def test_differences_from_the_paper_are_named_with_their_reason_and_agreement_is_not():
    cell = {"tokens": 18_874_368, "iid": 18_874_368, "ood": 0, "unusual": 0}
    rows = {row.label: row for row in compared({"fc": cell}, {"fc": "forgetting_curves"})}
    assert (
        rows["FC"].reason == ""
        and rows["GW"].reason.startswith("not in this plan")
        and rows["total"].ours["tokens"] == pytest.approx(18.87, abs=0.01)
    )


def test_plan_prints_the_papers_numbers_beside_its_own_at_the_papers_geometry_only(manifest, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(tables, "console", Console(file=out, width=200))
    tables.print_data(manifest)
    assert "unusual" in out.getvalue() and "paper" not in out.getvalue()
    monkeypatch.setitem(manifest.record, "geometry", REFERENCE_GEOMETRY)
    tables.print_data(manifest)
    assert "MemV differs from the paper" in out.getvalue()
