"""Whole dependence tests at toy size: what is run, what is resumed, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from megatron_exp.dependence.cells import Block, cell_path, run_cell
from megatron_exp.dependence.rows import standard_rows
from megatron_exp.dependence.run import training_config
from megatron_exp.dependence.start import open_start
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.presets import resolve_shape
from megatron_exp.parallel.layout import start_parallel
from megatron_exp.shards.corpus import Corpus
from megatron_exp.training.continuation import Continuation, rate_at
from tests.dependence.toy import SETTINGS, TESTED, make_start, run_test
from tests.training.toy import make_manifest

NAMES = [one["name"] for one in TESTED]
ROWS = standard_rows(NAMES)


def trainer_of(start: Path, layout) -> Continuation:
    manifest = Manifest.open(start / "manifest")
    corpus = Corpus.open(manifest.corpus_path)
    shape = resolve_shape(manifest.config.model, corpus.vocabulary_size, manifest.geometry.sequence_length)
    opened = open_start(start / "twin", manifest, corpus, shape)
    return Continuation.open(opened.path, shape, training_config(manifest, []).training, layout, rate_at(manifest.config, opened.step))


def block_of(cpdt: Path, seed: int) -> Block:
    manifest = Manifest.open(cpdt / "blocks" / str(seed))
    return Block(seed, manifest, manifest.open_stream(Corpus.open(manifest.corpus_path)))


def cell_value(cpdt: Path, row: str, seed: int) -> list[float]:
    return pq.read_table(cell_path(cpdt, row, seed) / "results.parquet")["value"].to_pylist()


def test_every_row_of_every_replicate_has_a_cell_with_every_outcome(finished):
    directory, record = finished
    assert record["complete"] and record["missing"] == []
    table = pq.read_table(directory / "matrix.parquet")
    found = set(zip(*(table[name].to_pylist() for name in ("row", "column", "seed")), strict=True))
    assert found == {(row, column, seed) for row in ROWS for column in NAMES for seed in range(2)}
    assert all(np.isfinite(table["value"].to_numpy()))
    assert {(cell["column"], cell["row"], cell["reference"]) for cell in record["cells"]} == {
        (column, row, reference)
        for column in NAMES
        for row, reference in [("ALL", column), *((row, "none") for row in ROWS if row not in ("ALL", "none"))]
    }


def test_a_cell_after_others_is_bitwise_what_a_fresh_load_gives(finished, start):
    """Cells of the finished test were run one after the other in one process group; this one is the first of its own."""
    directory, _ = finished
    layout = start_parallel(training_config(Manifest.open(start / "manifest"), []).training.parallel)
    try:
        for row in ("sham", "ALL"):
            table, _ = run_cell(trainer_of(start, layout), block_of(directory, 1), row, NAMES, NAMES)
            assert table["value"].to_pylist() == cell_value(directory, row, 1)
    finally:
        layout.stop()


def test_an_experiment_moves_its_own_outcome_and_the_sham_does_not(finished):
    _, record = finished
    effects = {(one["row"], one["column"]): one["estimate"] for one in record["effects"]}
    assert effects["canaries", "canaries"] > 5 * abs(effects["sham", "canaries"])
    assert effects["ALL", "canaries"] > 5 * abs(effects["swaps", "canaries"])


def test_nothing_is_run_again_and_more_replicates_keep_what_is_there(finished, start, tmp_path):
    directory = tmp_path / "cpdt"
    shutil.copytree(finished[0], directory)
    times = {path: path.stat().st_mtime_ns for path in directory.glob("cells/*/results.parquet")}
    assert len(times) == 2 * len(ROWS)
    record = run_test(start, directory, num_seeds=3)
    assert record is not None and record["complete"] and record["seeds"] == [0, 1, 2]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(directory.glob("cells/*"))) == 3 * len(ROWS)


def test_tasks_share_the_cells_and_the_plain_command_adds_the_rest_and_the_matrix(finished, start, tmp_path):
    directory = tmp_path / "cpdt"
    assert run_test(start, directory, task=(1, 4)) is None
    done = sorted(path.name for path in directory.glob("cells/*"))
    assert len(done) == 2 * len(ROWS) // 4
    assert not (directory / "matrix.json").exists()
    early = run_test(start, directory, collect=True)
    assert early is not None
    assert not early["complete"] and early["verdict"] == "incomplete"
    assert len(early["missing"]) == 2 * len(ROWS) - len(done)
    assert {cell["verdict"] for cell in early["cells"]} == {"incomplete"}
    assert {cell["estimate"] for cell in early["cells"]} == {None}
    record = run_test(start, directory)
    assert record is not None and record["complete"]
    assert record["cells"] == finished[1]["cells"]


def test_a_lost_cell_makes_the_matrix_incomplete_and_never_a_zero(finished, start, tmp_path):
    directory = tmp_path / "cpdt"
    shutil.copytree(finished[0], directory)
    shutil.rmtree(cell_path(directory, "swaps", 1))
    record = run_test(start, directory, collect=True)
    assert record is not None
    assert record["missing"] == [{"row": "swaps", "seed": 1}]
    assert all(cell["verdict"] == "incomplete" for cell in record["cells"])
    assert orjson.loads((directory / "matrix.json").read_bytes())["verdict"] == "incomplete"


def test_cells_of_another_plan_are_refused(finished, start, tmp_path):
    with pytest.raises(UserError, match="another plan: steps was 4, is 5"):
        run_test(start, finished[0], steps=5)
    with pytest.raises(UserError, match="another plan: intensity"):
        run_test(start, finished[0], intensity=0.05)
    directory = tmp_path / "cpdt"
    run_test(start, directory, task=(0, 6), steps=3)
    cell = next((directory / "cells").iterdir())
    shutil.copytree(finished[0], tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/cells" / cell.name)
    shutil.copytree(cell, tmp_path / "mixed/cells" / cell.name)
    with pytest.raises(UserError, match="is a cell of another plan"):
        run_test(start, tmp_path / "mixed", collect=True)


def test_another_manifest_is_refused(finished, start, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "corpus").symlink_to(start / "corpus")
    (other / "twin").symlink_to(start / "twin")
    make_manifest(other, experiments=[TESTED[0], TESTED[2]])
    with pytest.raises(UserError, match="another plan: manifest"):
        run_test(other, finished[0])


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "corpus").symlink_to(start / "corpus")
    (other / "twin").symlink_to(start / "twin")
    make_manifest(other, experiments=TESTED, model={"preset": "tiny", "layers": 2, "hidden": 64, "heads": 2, "ffn": 64})
    with pytest.raises(UserError, match=r"another model than the manifest .*: hidden 32 \(here 64\)"):
        run_test(other, tmp_path / "cpdt")
    assert not (tmp_path / "cpdt").exists()


def test_a_state_of_the_final_decay_is_refused_unless_a_rate_is_given(start, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(start / "twin", twin)
    record = orjson.loads((twin / "run.json").read_bytes())
    record["config"]["training"]["schedule"]["decay_start"] = 6
    (twin / "run.json").write_bytes(orjson.dumps(record))
    (tmp_path / "manifest").symlink_to(start / "manifest")
    with pytest.raises(UserError, match="falls to zero from step 6"):
        run_test(tmp_path, tmp_path / "cpdt")


def test_settings_that_make_no_test_are_refused(start, tmp_path):
    for changes, message in [({"num_seeds": 1}, "at least 2"), ({"intensity": 0.3}, "0 <= intensity")]:
        with pytest.raises(UserError, match=message):
            run_test(start, tmp_path / "cpdt", **changes)
    with pytest.raises(UserError, match="replicates of 400 steps need"):
        run_test(start, tmp_path / "cpdt", num_seeds=5, steps=400)
    with pytest.raises(UserError, match="holds no dependence test yet"):
        run_test(start, tmp_path / "cpdt", collect=True)


def test_the_cost_outside_scoring_is_counted(finished):
    cost = finished[1]["cost"]
    assert cost["num_cells"] == cost["cells_planned"] == 2 * len(ROWS)
    assert cost["steps"] == 2 * len(ROWS) * SETTINGS["steps"]
    assert cost["overhead"] > 1.0 and cost["score_seconds"] > 0


@pytest.mark.slow
def test_the_pilot_raises_what_does_not_show_and_leaves_one_out_where_all_differs(tmp_path):
    start = make_start(tmp_path)
    record = run_test(start, tmp_path / "cpdt", num_seeds=3, intensity=0.05, raise_to=0.2, leave_one_out="always")
    plan = orjson.loads((tmp_path / "cpdt/plan.json").read_bytes())
    assert record is not None and record["fractions"] == plan["fractions"]
    assert plan["pilot"] and set(plan["fractions"].values()) <= {0.05, 0.1, 0.2}
    raised = {name for name in NAMES if plan["fractions"][name] > 0.05}
    assert raised == {name for name in NAMES if plan["pilot"][0]["clearness"][name] < 4}
    assert {(one["column"], one["left_out"]) for one in record["leave_one_out"]} == {(a, b) for a in NAMES for b in NAMES if a != b}


def test_names_that_are_not_tested_are_refused(start, tmp_path):
    with pytest.raises(UserError, match="--share names elsewhere"):
        run_test(start, tmp_path / "cpdt", shares={"elsewhere": 0.1})
    with pytest.raises(UserError, match="has no experiment elsewhere"):
        run_test(start, tmp_path / "cpdt", only=("canaries", "elsewhere"))
    with pytest.raises(UserError, match="at least two and one are needed"):
        run_test(start, tmp_path / "cpdt", only=("canaries",))


def test_single_shares_and_what_experiments_request_themselves_decide_what_a_block_holds(start, tmp_path):
    counts = {}
    for name, changes in {"own": {"intensity": 0.0, "raise_to": 0.0}, "share": {"shares": {"canaries": 0.2}}}.items():
        run_test(start, tmp_path / name, task=(0, 5), only=("canaries", "watermarks"), steps=8, **changes)
        block = Manifest.open(tmp_path / name / "blocks" / "0")
        counts[name] = {key: sum(cell["tokens"] for cell in cells.values()) for key, cells in block.counts.items()}
        assert set(counts[name]) == {"canaries", "watermarks", "sham"}
    run_tokens = 8 * 4 * 32
    assert counts["share"]["canaries"] == pytest.approx(0.2 * run_tokens, abs=20)
    assert counts["share"]["watermarks"] == pytest.approx(0.1 * run_tokens, abs=32)
    assert counts["own"]["canaries"] != counts["share"]["canaries"]
    assert counts["own"]["sham"] == counts["own"]["canaries"] + counts["own"]["watermarks"]
