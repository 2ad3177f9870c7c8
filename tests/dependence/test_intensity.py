"""How much of an experiment a short run holds, and what stands in the sham."""

from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from megatron_exp.dependence.block import asked_items
from megatron_exp.dependence.intensity import at_tokens, open_loop
from megatron_exp.dependence.rows import ALL, NONE, SHAM, check_names, held, leave_one_out_rows, standard_rows
from megatron_exp.dependence.sham import overwrites
from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.protocol import Item, Match, Positions, Request, Window
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import Geometry, Slot
from tests.experiments.small import SMALL

GEOMETRY = Geometry(sequence_length=64, global_batch_size=4, steps=50)
WORDS = Words.of(0, "test")


def item(number: int, length: int = 10, **values) -> Item:
    payload = np.full(length, number, np.int32)
    return Item(**{"item": number, "condition": "c", "role": "treated", "payload": payload, "source": "s", "licence": "l", **values})


def tokens(requests, items) -> int:
    return sum(request.copies * len(items[request.item, request.arm].payload) for request in requests)


def of(requests, items, wanted):
    return at_tokens(requests, {(one.item, one.arm): one for one in items}, wanted, GEOMETRY, WORDS)


def test_what_is_too_much_is_drawn_by_key_until_there_is_enough():
    items = [item(number) for number in range(40)]
    requests = [Request(item=one.item, kind="tokens", where=Window(0, 50), copies=3) for one in items]
    by_key = {(one.item, one.arm): one for one in items}
    taken = of(requests, items, 200)
    assert tokens(taken, by_key) == 200
    assert {one.item for one in of(list(reversed(requests)), items, 200)} == {one.item for one in taken}
    assert {one.item for one in taken} <= {one.item for one in of(requests, items, 400)}


def test_clusters_stay_together():
    items = [item(number, cluster=number // 4) for number in range(40)]
    requests = [Request(item=one.item, kind="tokens", where=Window(0, 50), copies=1) for one in items]
    taken = {one.item for one in of(requests, items, 120)}
    assert len(taken) == 12 and len({number // 4 for number in taken}) == 3


def test_what_is_too_little_is_repeated_but_what_exists_once_is_not():
    items = [item(number) for number in range(4)]
    requests = [Request(item=one.item, kind="tokens", where=Window(0, 50), copies=1) for one in items]
    repeated = of(requests, items, 330)
    assert tokens(repeated, {(one.item, one.arm): one for one in items}) == 330
    assert {one.copies for one in repeated} == {8, 9}
    swaps = [Request(item=0, kind="swap", where=Match((7,)), copies=1, source_slots=np.array([1], np.uint64))]
    assert of(swaps, items, 100_000) == swaps


def test_fixed_places_are_cut_with_their_copies():
    items = [item(0)]
    fixed = [Request(item=0, kind="tokens", where=Positions(((0, 0), (1, 5), (2, 9))), copies=3)]
    assert of(fixed, items, 20)[0].where == Positions(((0, 0), (1, 5)))
    assert of(fixed, items, 60)[0].where == Window(0, 50)


def test_a_controllers_bank_is_inserted_without_the_controller():
    items = [item(0), item(1), item(2), item(3, role="control")]
    requests = [Request(item=0, kind="tokens", where=Window(0, 50), copies=2)]
    opened = open_loop(items, requests, (0, 2, 3), GEOMETRY)
    assert [(one.item, one.copies) for one in opened] == [(0, 2), (2, 1)]
    assert opened[1].where == Window(0, GEOMETRY.steps)


def test_asked_are_inserted_items_and_those_that_stand_for_them_or_the_conditions_declared():
    items = [
        item(0, cluster=5),
        item(1, role="probe-only", cluster=5),
        item(2, role="control", cluster=5),
        item(3, condition="a/x", role="probe-only"),
    ]
    assert asked_items(Dependence(), items, {(0, "main")}) == {(0, "main"), (1, "main")}
    assert asked_items(Dependence(conditions=("*/x",)), items, {(0, "main")}) == {(3, "main")}
    assert asked_items(Dependence(untestable="why"), items, {(0, "main")}) == set()


def test_rows_hold_what_their_names_say():
    names = ["a", "b"]
    assert standard_rows(names) == ["a", "b", ALL, NONE, SHAM]
    assert [held(row, names) for row in (*standard_rows(names), *leave_one_out_rows(names))] == [
        ["a"],
        ["b"],
        ["a", "b"],
        [],
        ["sham"],
        ["b"],
        ["a"],
    ]
    with pytest.raises(UserError, match="the name of a row"):
        check_names(["fine", "sham"])


class Pages:
    """A stream whose token at position p of slot s tells both."""

    def read(self, slot: int) -> Slot:
        return Slot((np.arange(65) + 1000 * (slot % 1000)).astype(np.int32), np.ones(64, np.uint8))


def test_the_sham_makes_as_many_overwrites_of_the_same_lengths_by_pool_text():
    context = toy_context(SHAM, steps=50, batch=4, length=64, pool_slots=40)
    context = type(context)(**{**vars(context), "stream": Pages()})
    items, requests = overwrites([("tokens", 10, 3), ("splice", 64, 1), ("swap", 0, 2), ("noise", 0, 1), ("mask", 5, 9)], context)
    assert sorted(len(one.payload) for one in items if one.payload is not None) == [10, 10, 10, 64]
    assert [one.kind for one in requests].count("swap") == 3
    assert all((np.diff(one.payload) == 1).all() for one in items if one.payload is not None)
    pieces = [int(one.payload[0]) for one in items if one.payload is not None]
    assert len(set(pieces)) == len(pieces), "no text is used twice while the pool lasts"


def test_a_sham_without_any_pool_is_refused():
    context = toy_context(SHAM, steps=50, batch=4, length=64, pool_slots=0)
    with pytest.raises(UserError, match=r"Raise pool\.slots"):
        overwrites([("swap", 0, 1)], context)


def as_scored(responses: pa.Table, asks: set[str]) -> pa.Table:
    """Simulated responses with the columns that scoring fills: no nats of a watermark's score, tokens of a slot."""
    if asks == {"embedding_gradient"}:
        return responses.set_column(responses.schema.get_field_index("nats"), "nats", pa.nulls(len(responses), pa.float64()))
    if asks == {"slot_loss"}:
        return responses.set_column(
            responses.schema.get_field_index("num_tokens"), "num_tokens", pa.array(np.ones(len(responses)), pa.uint32())
        )
    return responses


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_experiment_has_an_outcome_that_rises_with_its_effect_or_says_why_not(name):
    experiment = SMALL[name]
    if experiment.dependence.untestable:
        assert name == "placebo"
        return
    context = toy_context("mine")
    planned = draft(experiment, context)
    controller = experiment.controller(planned.items, context)
    requests = open_loop(planned.items, planned.requests, controller.bank if controller else (), context.geometry)
    primary = next(outcome for outcome in experiment.analysis.outcomes if outcome.family == "primary")
    asked = asked_items(experiment.dependence, planned.items, {(one.item, one.arm) for one in requests})
    rows = [
        place
        for place, row in enumerate(planned.probe_table.to_pylist())
        if (row["item"], row["arm"]) in asked and any(fnmatchcase(row["name"], pattern) for pattern in experiment.dependence.probes)
    ]
    assert rows, "the outcome asks nothing"
    means = []
    for effect in (0.0, 20.0 * primary.smallest_effect):
        responses = experiment.simulate(planned.item_table, planned.probe_table.take(rows), effect, Words.of(0, "rise"))
        responses = as_scored(
            responses.filter(pc.equal(responses["model"].cast(pa.string()), "run")), {planned.probe_table["ask"][rows[0]].as_py()}
        )
        values = experiment.item_values(planned.item_table, responses)
        means.append(np.nanmean(values))
    assert means[1] >= means[0] and np.isfinite(means).all()
