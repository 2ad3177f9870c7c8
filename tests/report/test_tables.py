"""export and compare: the numbers of the results file, in formats that a hostile text cannot break."""

import csv
import io
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_exp.cli.main import app
from megatron_exp.errors import UserError
from megatron_exp.report.compare import compare
from megatron_exp.report.export import TABLES, export
from megatron_exp.report.formats import FORMATS, encode
from megatron_exp.statistics.normal import mean_interval
from tests.report.fabricated import HOSTILE, STEPS, make_world, result_row, write_results
from tests.report.test_report import change_record

NASTY = pa.table(
    {
        "name": ["=1+1", "a|b_c & 100%", HOSTILE, "-x", None],
        "p": [1e-9, 0.25, float("nan"), 0.0, None],
        "n": pa.array([1, 2, 3, 4, 5], pa.uint32()),
    }
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tables"))


def read(data):
    return list(csv.DictReader(io.StringIO(data.decode())))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_written_in_every_format_and_twice_the_same(world, table, kind):
    data = export(world.run, table, kind, world.twin)
    assert data and data == export(world.run, table, kind, world.twin)


def test_exported_numbers_are_those_of_the_results_file(world):
    results = pq.read_table(world.run / "evals" / f"step-{STEPS:08d}" / "results.parquet").to_pylist()
    wanted = {(row["experiment"], row["outcome"]): row for row in results if row["primary"]}
    rows = read(export(world.run, "primary", "csv"))
    assert {(row["experiment"], row["outcome"]) for row in rows} == set(wanted)
    memory = next(row for row in rows if row["experiment"] == "memory")
    assert float(memory["estimate"]) == wanted["memory", "auc"]["estimate"] and float(memory["p_corrected"]) == 9e-9
    table = pq.read_table(pa.BufferReader(export(world.run, "results", "parquet")))
    assert table.num_rows == len(results) and table["estimate"].type == pa.float64()


def test_dynamics_hold_run_and_twin_at_every_state(world):
    rows = read(export(world.run, "dynamics", "csv", world.twin))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert (
        all(row["run_loss"] and row["twin_loss"] for row in rows) and sum(bool(row["run_validation_loss"]) for row in rows) == STEPS // 10
    )


def test_no_cell_of_a_csv_is_a_formula_and_a_reader_gets_every_row():
    rows = list(csv.reader(io.StringIO(encode(NASTY, "csv").decode())))
    assert len(rows) == 6 and not any(cell[:1] in ("=", "+", "-", "@") for row in rows for cell in row)


def test_markdown_and_latex_keep_their_columns_whatever_the_text():
    lines = encode(NASTY, "md").decode().splitlines()
    assert len(lines) == 7 and all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)
    assert "<script>" not in "\n".join(lines)
    body = encode(NASTY, "tex").decode().splitlines()[4:-2]
    assert len(body) == 5 and all(len(re.findall(r"(?<!\\)&", line)) == 2 and line.endswith(r"\\") for line in body)
    text = "\n".join(body)
    assert not re.findall(r"(?<!\\)[%#_]", text) and r"1.0~$\times$~10$^{-9}$" in text and "\x1b" not in text and text.isascii()


def test_an_unknown_table_or_format_is_refused_with_the_names(world):
    with pytest.raises(UserError, match="primary, results, inserted, dynamics"):
        export(world.run, "nothing", "csv")
    with pytest.raises(UserError, match="csv, md, tex, parquet"):
        export(world.run, "primary", "xlsx")


def test_the_command_writes_a_file_or_standard_output(world, tmp_path):
    shown = CliRunner().invoke(app, ["export", str(world.run), "--format", "md"])
    assert shown.exit_code == 0 and shown.stdout.startswith("| experiment |")
    out = tmp_path / "deep" / "table.parquet"
    assert CliRunner().invoke(app, ["export", str(world.run), "--format", "parquet", "--out", str(out)]).exit_code == 0
    assert pq.read_table(out).num_rows == 3
    assert isinstance(CliRunner().invoke(app, ["export", str(world.run), "--format", "parquet"]).exception, UserError)


def seed_run(world, path, seed, estimate, **changes):
    """A copy of the run, as though trained from other initial weights."""
    shutil.copytree(world.run, path, ignore=shutil.ignore_patterns("evals"))
    config = {**world.manifest.record["config"], "seeds": {**world.manifest.record["seeds"], "init": seed}, "name": f"seed-{seed}"}
    change_record(path, "run.json", config=config, name=f"seed-{seed}", **changes)
    row = {"experiment": "memory", "outcome": "auc", "condition": "x16", "primary": True, "verdict": "detected"}
    write_results(path, world.manifest, STEPS, [result_row(**row, estimate=estimate, low=estimate - 0.1, high=estimate + 0.1)])
    return path


def test_runs_that_differ_in_seeds_alone_are_averaged_over_runs(world, tmp_path):
    estimates = [0.7, 0.8, 0.95]
    runs = [seed_run(world, tmp_path / str(seed), seed, estimate) for seed, estimate in enumerate(estimates)]
    compared, table = compare(runs)
    assert {one.group for one in compared} == {"A"} and [one.label for one in compared] == ["seed-0", "seed-1", "seed-2"]
    rows = table.to_pylist()
    assert [row["estimate"] for row in rows if row["runs"] == 1] == estimates
    (mean,) = [row for row in rows if row["runs"] == 3]
    assert mean["scope"] == "runs" and mean["estimate"] == pytest.approx(np.mean(estimates)) and mean["verdict"] == "detected in 3 of 3"
    assert (mean["low"], mean["high"]) == pytest.approx(mean_interval(np.array(estimates)))


def test_runs_of_two_sizes_stand_beside_each_other_and_are_not_averaged(world, tmp_path):
    small = seed_run(world, tmp_path / "small", 0, 0.7)
    large = seed_run(world, tmp_path / "large", 1, 0.9, model={"layers": 8, "hidden": 128, "heads": 4})
    compared, table = compare([small, large])
    assert [one.group for one in compared] == ["A", "B"] and set(table["runs"].to_pylist()) == {1}
    shown = CliRunner().invoke(app, ["compare", str(small), str(large)])
    assert shown.exit_code == 0 and "group B" in shown.stdout and "0.700" in shown.stdout


def test_a_run_given_twice_or_not_evaluated_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="two different runs"):
        compare([world.run, world.run])
    bare = shutil.copytree(world.run, tmp_path / "bare", ignore=shutil.ignore_patterns("evals"))
    with pytest.raises(UserError, match="not been evaluated"):
        compare([world.run, bare])
