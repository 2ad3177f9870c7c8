"""The reserve: placed by the plan, never in the way of anything, counted in the budget, kept by --extends."""

import shutil

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp.config.load import validate
from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.placement.place import SlotBudget, place
from megatron_exp.placement.rows import Copies
from megatron_exp.preparation.diff import diff
from megatron_exp.preparation.materialize import materialize
from megatron_exp.preparation.plan import plan
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import Geometry
from tests.control.facts import FACTS, Facts
from tests.training import toy

CANARIES, FORGETTING, WATERMARKS = toy.EXPERIMENTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


def planned(corpus, path, experiments, **changes):
    config = toy.make_config(corpus, experiments=experiments).model_dump(mode="json")
    return plan(validate({**config, **changes}, "test"), path)


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    return planned(corpus, tmp_path_factory.mktemp("controlled") / "manifest", [FACTS, *toy.EXPERIMENTS])


def test_the_largest_number_is_kept_in_every_interval_and_the_record_says_so(manifest):
    reserve, bank = manifest.reserve().to_pylist(), manifest.bank().to_pylist()
    assert [(row["interval"], row["number"]) for row in reserve] == [(k, i) for k in range(4) for i in range(4)]
    assert all(row["step"] // 3 == row["interval"] for row in reserve)
    assert {row["length"] for row in reserve} == {max(row["length"] for row in bank)}
    assert [row["item"] for row in bank] == [0, 2, 4]
    assert manifest.controllers["facts"]["largest"] == 4
    assert manifest.record["budget"]["reserved_tokens"] == sum(row["length"] for row in reserve)
    assert manifest.record["budget"]["reserved_slots"] == len({row["slot"] for row in reserve})
    assert verify(manifest.path) == []


def test_a_manifest_without_controllers_has_no_trace_of_them(corpus, tmp_path):
    plain = planned(corpus, tmp_path / "plain", toy.EXPERIMENTS)
    assert "controllers" not in plain.record
    assert not {"reserve", "bank"} & plain.record["fingerprints"].keys()
    assert not (plain.path / "reserve.parquet").exists()
    assert len(plain.reserve()) == len(plain.bank()) == 0


def covered(slots, offsets, lengths):
    """Every position that is taken, as many times as it is."""
    parts = [slot * 64 + np.arange(offset, offset + length) for slot, offset, length in zip(slots, offsets, lengths, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [None, 40], ids=["tokens", "slots"])
def test_static_rows_and_reserves_never_share_a_position(seed, budget):
    words = Words.of(seed, "collisions")
    lengths, windows, copies = words.integers(8, 20, 0) + 1, words.integers(8, 40, 1), words.integers(8, 12, 2) + 1
    requests = [
        Copies(f"e{i // 2}", "reserve" if i % 2 else "x", 100 + i, i, int(lengths[i]), False, int(copies[i]), int(windows[i]), 80)
        for i in range(8)
    ]
    requests.append(Copies("whole", "swap", 9, 9, 0, True, 5, 0, 80))
    slots_budget = SlotBudget(budget, seed) if budget else None
    placement = place(requests, Geometry(sequence_length=64, global_batch_size=4, steps=20), slots_budget)
    tokens = placement.table.of_request("length", slice(None)) > 0
    rows = placement.slots[tokens], placement.offsets[tokens], placement.table.of_request("length", slice(None))[tokens]
    positions = covered(*(column.astype(np.int64) for column in rows))
    assert len(np.unique(positions)) == len(positions)
    assert not np.isin(placement.slots[tokens], placement.slots[~tokens]).any()


def test_a_reserve_keeps_its_places_whatever_is_appended_and_an_exclusive_slot_moves_only_what_it_hits(corpus, manifest, tmp_path):
    alone = planned(corpus, tmp_path / "alone", [FACTS])
    more = planned(corpus, tmp_path / "more", [FACTS, CANARIES])
    assert more.reserve().equals(alone.reserve())
    taken = {row["slot"] for row in manifest.insertions().to_pylist() if row["exclusive"]}
    hit = [row["slot"] in taken for row in alone.reserve().to_pylist()]
    moved = [a != b for a, b in zip(alone.reserve()["slot"].to_pylist(), manifest.reserve()["slot"].to_pylist(), strict=True)]
    assert moved == hit
    assert diff(manifest, alone)["facts"] == {"added": 0, "removed": 0, "moved": sum(hit), "unchanged": len(hit) - sum(hit)}


def test_a_disabled_controller_keeps_its_places_and_writes_nothing(corpus, tmp_path):
    on = planned(corpus, tmp_path / "on", [FACTS, CANARIES])
    off = planned(corpus, tmp_path / "off", [{**FACTS, "enabled": False}, CANARIES])
    assert off.controllers == {}
    mine = on.insertions().filter(pa.array([name == "canaries" for name in on.insertions()["experiment"].to_pylist()]))
    assert off.insertions()["slot"].to_pylist() == mine["slot"].to_pylist()


def test_what_is_reserved_counts_against_the_budget(corpus, tmp_path):
    with pytest.raises(UserError, match=r"rewrite 0 tokens and keep \d+ in reserve for controllers.*lower the largest number"):
        planned(corpus, tmp_path / "manifest", [FACTS], budget={"unit": "tokens", "fraction": 0.05})


def test_with_a_budget_of_slots_the_reserve_lies_in_the_drawn_ones(corpus, tmp_path):
    whole = planned(corpus, tmp_path / "whole", [FACTS, CANARIES], budget={"unit": "slots", "fraction": 0.7})
    used = {*whole.reserve()["slot"].to_pylist(), *whole.insertions()["slot"].to_pylist()}
    assert len(used) <= whole.record["budget"]["drawn_slots"] == round(0.7 * 48)
    assert verify(whole.path) == []


def test_extends_keeps_reserve_bank_and_controller_and_refuses_what_would_move_them(corpus, manifest, tmp_path):
    older = planned(corpus, tmp_path / "older", [FACTS])
    config = toy.make_config(corpus, experiments=[FACTS, CANARIES])
    newer = plan(config, tmp_path / "newer", older)
    assert newer.reserve().equals(older.reserve())
    assert newer.record["extends"] == older.fingerprint
    with pytest.raises(UserError, match="places kept for controllers would move"):
        plan(toy.make_config(corpus, experiments=[FACTS, FORGETTING, WATERMARKS]), tmp_path / "moved", older)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"largest": 2, "first": 3}, "begins with 3 copies and may go up to 2"),
        ({"interval": 99}, "its interval is 99 steps, but the run has 12"),
        ({"rule": "fuzzy"}, "There is no rule 'fuzzy'"),
        ({"rule_parameters": {"caps": []}}, "caps must begin at 0"),
        ({"target": 0.0}, "its target is 0.0"),
        ({"silent": True}, "decides every 3 steps by the probe 'sea', but item 0 is not asked it live"),
        ({"num_facts": 0}, "yields no items"),
        ({"largest": 60_000, "num_facts": 1}, "could be handed out more than 65,535 times over"),
        ({"largest": 500}, r"condition reserve, item 0: copy \d+ of \d+ tokens finds no free place in steps 0 to 3"),
    ],
)
def test_a_controller_that_cannot_work_is_refused_before_anything_is_written(corpus, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        planned(corpus, tmp_path / "manifest", [{**FACTS, **changes}])
    assert list(tmp_path.iterdir()) == []


class TwiceInTheBank(Facts):
    def controller(self, items, context):
        one = super().controller(items, context)
        return type(one)(**{**vars(one), "bank": (0, 2, 2)})


class ControlInTheBank(Facts):
    def controller(self, items, context):
        one = super().controller(items, context)
        return type(one)(**{**vars(one), "bank": (0, 1)})


@pytest.mark.parametrize(
    ("faulty", "words"),
    [(TwiceInTheBank, "item 2 of its bank stands there twice"), (ControlInTheBank, "item 1 of its bank is not a treated")],
)
def test_a_bank_of_other_items_is_refused(faulty, words):
    with pytest.raises(UserError, match=words):
        draft(faulty(), toy_context("facts", steps=12, length=64))


def edited(manifest, path, name, change):
    """A copy of the manifest in which one table has been changed."""
    copy = Manifest.open(shutil.copytree(manifest.path, path))
    table = getattr(copy, name)()
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy.path / f"{name}.parquet")
    return copy.path


def overlap(rows):
    rows[1].update({name: rows[0][name] for name in ("slot", "step", "row", "offset")})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("reserve", overlap, "overlaps another reserved place"),
        ("reserve", lambda rows: rows.pop(), "other places than 4 in each of 4 intervals"),
        ("reserve", lambda rows: rows[0].update(step=rows[0]["step"] + 1), "its step is not slot"),
        ("reserve", lambda rows: rows[0].update(offset=31), "does not lie inside the slot"),
        ("bank", lambda rows: rows[0].update(item=1), "no such treated item"),
        ("bank", lambda rows: rows.reverse(), "other items than the 3 of its controller"),
        ("bank", lambda rows: rows[0].update(payload_hash=bytes(16)), "do not have the recorded hash"),
    ],
)
def test_verify_finds_a_changed_reserve_and_a_changed_bank(manifest, tmp_path, name, change, words):
    findings = verify(edited(manifest, tmp_path / "copy", name, change))
    assert any(words in finding.problem for finding in findings), findings
    assert any("fingerprint" in finding.problem for finding in findings)


def test_a_changed_controller_breaks_the_plan_fingerprint(manifest, tmp_path):
    copy = shutil.copytree(manifest.path, tmp_path / "copy")
    record = orjson.loads((copy / "manifest.json").read_bytes())
    record["controllers"]["facts"]["target"] = 0.5
    (copy / "manifest.json").write_bytes(orjson.dumps(record))
    assert any("plan fingerprint" in finding.problem for finding in verify(copy))


def test_what_is_decided_while_training_cannot_be_materialised_beforehand(manifest, tmp_path):
    with pytest.raises(UserError, match="What experiments facts of .* insert is decided while training"):
        materialize(manifest.path, tmp_path / "out", list_inexpressible=True)
    assert list(tmp_path.iterdir()) == []
    materialize(manifest.path, tmp_path / "out", masked=frozenset({"facts"}), list_inexpressible=True, pad_id=-1)
