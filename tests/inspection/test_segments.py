"""What controllers decided is proven and shown: a changed, missing or invented segment is found, and its rows are in every view."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from megatron_exp.control.chain import Chain
from megatron_exp.control.segments import decode, segment_path
from megatron_exp.inspection.items import view_experiment, view_item
from megatron_exp.inspection.query import query
from megatron_exp.inspection.render import show
from megatron_exp.inspection.slots import view_step
from megatron_exp.inspection.targets import open_target
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.training.train import train
from tests.control.facts import FACTS
from tests.training.toy import EXPERIMENTS, STEPS, make_manifest


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A finished run with a controller, and one that was stopped in state 5; tests change copies."""
    path = tmp_path_factory.mktemp("segments")
    manifest = make_manifest(path, experiments=[{**FACTS, "target": 0.002}, EXPERIMENTS[0]])
    train(manifest, path / "run")
    train(manifest, path / "stopped", stop_at=5)
    return path


@pytest.fixture
def run(directory, tmp_path):
    return shutil.copytree(directory / "run", tmp_path / "run")


def problems(run):
    return [f"{finding.place}: {finding.problem}" for finding in verify(run)]


def handed_out(run):
    return [row for segment in open_target(run).segments for row in segment.rows.to_pylist()]


def test_runs_with_controllers_are_sound_finished_or_not(directory):
    assert verify(directory / "run") == verify(directory / "stopped") == []


def test_a_flipped_byte_in_a_segment_is_found(run):
    path = segment_path(run, 2)
    data = bytearray(path.read_bytes())
    data[data.index(b'"handed"') + 9] ^= 1
    path.write_bytes(bytes(data))
    assert any("0002.parquet" in one for one in problems(run))


def rewritten_chain(run, change):
    """All segments written again with sound fingerprints, after `change` had its way with the decisions of segment 2."""
    manifest = Manifest.open(run.parent / "manifest") if (run.parent / "manifest").exists() else open_target(run).manifest
    found, chain = open_target(run).segments, Chain(manifest)
    for segment in found:
        decisions = dict(segment.decisions)
        if segment.number == 2:
            change(decisions)
        made = chain.made_of(decisions)
        segment_path(run, segment.number).write_bytes(made.encode())
        chain.add(made)


def test_a_decision_that_the_rule_did_not_make_is_found_although_all_fingerprints_are_sound(run):
    def one_more(decisions):
        state = decisions["facts"]
        decisions["facts"] = type(state)(**{**vars(state), "number": state.number + 1 if state.number < 4 else 3})

    rewritten_chain(run, one_more)
    found = problems(run)
    assert any("0002.parquet: the rules decide otherwise on the answers" in one for one in found), found
    assert any("ledger.bin step" in one and "was fed other tokens" in one for one in found), found


def test_a_chain_written_again_without_a_change_is_sound(run):
    rewritten_chain(run, lambda decisions: None)
    assert problems(run) == []


def test_rows_that_the_decisions_do_not_give_are_found(run):
    path = segment_path(run, 3)
    segment = decode(path.read_bytes(), path)
    rows = segment.rows.to_pylist()
    rows[0]["item"] = next(item for item in (0, 2, 4) if item != rows[0]["item"])
    changed = type(segment)(
        segment.number, segment.step, segment.decisions, pa.Table.from_pylist(rows, segment.rows.schema), segment.previous
    )
    path.write_bytes(changed.encode())
    assert any("0003.parquet: its rows are not what its decisions hand out" in one for one in problems(run))


def test_a_missing_last_segment_is_found(run):
    segment_path(run, 3).unlink()
    assert any("0003.parquet: it is missing, but steps were made from 9 on" in one for one in problems(run))


def test_a_missing_segment_in_the_middle_is_found(run):
    segment_path(run, 1).unlink()
    assert any("0001.parquet is missing before it" in one for one in problems(run))


def test_changed_and_missing_probe_values_are_found(run):
    path = run / "probes.parquet"
    table = pq.read_table(path)
    values = np.where(table["step"].to_numpy() == 3, 0.0, table["value"].to_numpy())
    pq.write_table(table.set_column(table.schema.get_field_index("value"), "value", pa.array(values)), path)
    assert any("0001.parquet: the rules decide otherwise" in one for one in problems(run))
    path.unlink()
    assert any("has no answers of state 3" in one for one in problems(run))


def test_a_step_shows_what_was_handed_out_into_it(run):
    target = open_target(run)
    row = handed_out(run)[-1]
    (slot,) = [one for one in view_step(target, row["step"]).slots if one.row == row["row"]]
    assert ("facts", row["item"], row["offset"], row["repetition"]) in [
        (mark.experiment, mark.item, mark.offset, mark.repetition) for mark in slot.marks
    ]
    assert any("river opens" in piece.text for piece in slot.pieces if piece.marks)


def test_a_step_about_which_nothing_is_decided_says_so(directory, capsys):
    stopped, planned = open_target(directory / "stopped"), open_target(directory / "manifest")
    assert view_step(stopped, 5).undecided == ()
    assert view_step(stopped, STEPS - 1).undecided == view_step(planned, 0).undecided == ("facts",)
    show(view_step(planned, 0), Console(width=200))
    assert "not decided yet: facts" in capsys.readouterr().out


def test_an_experiment_shows_its_decisions_and_an_item_its_copies(run, capsys):
    target, rows = open_target(run), handed_out(run)
    view = view_experiment(target, "facts")
    assert view.controller is not None and view.controller["largest"] == 4
    assert [one["number"] for one in view.decisions] == [len(segment.rows) for segment in target.segments]
    assert sum(one["tokens"] for one in view.decisions) == sum(row["length"] for row in rows)
    show(view, Console(width=200))
    assert "decisions of the controller" in capsys.readouterr().out
    item = rows[0]["item"]
    assert len(view_item(target, item, "facts").insertions) == sum(row["item"] == item for row in rows)


def test_segments_reserve_and_bank_can_be_asked_in_sql(run):
    rows = query(open_target(run), "select count(*) as n, sum(length) as tokens from segments").to_pylist()
    assert rows == [{"n": len(handed_out(run)), "tokens": sum(row["length"] for row in handed_out(run))}]
    assert query(open_target(run), "select count(*) as n from reserve, bank").to_pylist() == [{"n": 16 * 3}]
