"""What one experiment holds out, another must not insert."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.protocol import Forbidden, Item, Match, Request
from megatron_exp.experiments.tables import Wanted
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.safety import Planned, require_apart, require_clean_sources
from megatron_exp.stream.slot import POOL
from tests.experiments.small import SMALL
from tests.experiments.stubs import Passages
from tests.toy import toy_stream
from tests.training import toy


def item(number, role, tokens):
    return Item(item=number, condition="c", role=role, payload=np.array(tokens, np.int32), source="here", licence="none")


def planned(name, *items, experiment=None):
    return Planned(name, experiment or Passages(), list(items))


HELD_OUT = item(7, "control", [0, *range(100, 200), 0])


@pytest.mark.parametrize(
    ("tokens", "spoils"),
    [
        ([0, 5, *range(100, 200), 6, 0], True),
        ([*range(100, 200)], True),
        ([0, *range(100, 199), 5], False),  # all but the last token: beyond the head that is searched for
        ([0, *range(300, 400)], False),
    ],
)
def test_a_payload_that_holds_another_experiments_held_out_text_is_refused(tokens, spoils):
    both = [planned("one", HELD_OUT), planned("two", item(3, "treated", tokens))]
    if not spoils:
        require_apart(both)
        return
    with pytest.raises(UserError, match=r"Experiment two, condition c, item 3: .* its control item 7 \(c\) of experiment one"):
        require_apart(both)


def test_an_experiment_may_insert_what_it_forbids_to_others_and_controls_may_be_alike():
    require_apart([planned("one", HELD_OUT, item(3, "treated", HELD_OUT.payload))])
    require_apart([planned("one", HELD_OUT), planned("two", item(9, "control", HELD_OUT.payload))])


def test_a_payload_that_holds_another_experiments_trigger_is_refused():
    poisoning = Planned("poisoning", SMALL["poisoning"], list(SMALL["poisoning"].items(toy_context("poisoning"))))
    chat = next(item for item in poisoning.items if item.role == "treated")
    trigger = next(chat.payload[span.start : span.end] for span in chat.spans if span.name == "trigger")
    require_apart([poisoning, planned("two", item(3, "treated", [*range(300, 320), *trigger[1:]]))])
    with pytest.raises(UserError, match="two, condition c, item 3: .* holds the trigger of its item .* of experiment poisoning"):
        require_apart([poisoning, planned("two", item(3, "treated", [*range(300, 320), *trigger, 5]))])


def test_short_control_items_are_no_finger_print():
    require_apart([planned("one", item(1, "control", [0, 5, 6, 7, 0])), planned("two", item(2, "treated", [0, 5, 6, 7, 0]))])


class Removing(Passages):
    """Forbids a string in swapped-in slots, too."""

    def forbidden(self, items) -> Iterator[Forbidden]:
        yield Forbidden(np.arange(1010, 1016, dtype=np.int32), "the string it removed", in_sources=True)


def test_a_slot_that_is_swapped_in_may_not_bring_a_removed_string_back():
    stream = toy_stream(("a", 40), ("b", 400), pool=12)
    holding = next(POOL + place for place in range(12) if 1010 in stream.read(POOL + place).tokens[:3])
    other = next(POOL + place for place in range(12) if 1010 not in stream.read(POOL + place).tokens)
    swapped = item(1, "treated", [1, 2])
    both = [planned("removing", experiment=Removing()), planned("swapping", swapped)]

    def wanted(slot):
        request = Request(item=1, kind="swap", where=Match((3,)), copies=1, source_slots=np.array([slot], np.uint64))
        return [Wanted("swapping", swapped, request)]

    require_clean_sources(both, wanted(other), stream)
    with pytest.raises(
        UserError, match=r"Experiment swapping.*slot pool:\d+, which it swaps in, holds the string it removed of experiment removing"
    ):
        require_clean_sources(both, wanted(holding), stream)


def test_the_built_in_experiments_do_not_spoil_one_another():
    contexts = {name: toy_context(name) for name in ("memorization", "poisoning", "contamination", "muse")}
    all_of_them = [Planned(name, SMALL[name], list(SMALL[name].items(context))) for name, context in contexts.items()]
    assert sum(len(list(one.experiment.forbidden(one.items))) for one in all_of_them) > 100
    require_apart(all_of_them)


def test_two_experiments_with_the_same_rare_token_are_noticed():
    """In a small vocabulary two draws of rare tokens meet: a canary that another experiment trains on is no canary."""
    both = ("memorization", "memorization-paper")
    contexts = {name: toy_context(name) for name in both}
    with pytest.raises(UserError, match="holds the canary of its item"):
        require_apart([Planned(name, SMALL[name], list(SMALL[name].items(contexts[name]))) for name in both])


def test_plan_names_both_experiments(tmp_path):
    corpus = toy.make_corpus(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "".join(f'{{"id": {n}, "text": "the old river runs near the new bridge, take {n}"}}\n' for n in range(24))
    )
    texts = {"type": "texts", "file": str(tmp_path / "texts.jsonl"), "licence": "CC0-1.0", "copies": [0, 1]}
    config = toy.make_config(corpus, steps=20, experiments=[{"name": "mine", **texts}, {"name": "again", **texts}])
    with pytest.raises(
        UserError, match=r"Experiment (mine|again), .* what it inserts holds its control item \d+ .* of experiment (mine|again)"
    ):
        plan(config, tmp_path / "manifest")
    assert not (tmp_path / "manifest").exists()


def test_a_test_problem_with_either_last_value_may_not_be_inserted_elsewhere():
    experiment = SMALL["mathematics"]
    items = list(experiment.items(toy_context("mathematics")))
    mine = Planned("mathematics", experiment, items)
    for arm in ("right", "wrong"):
        test = next(item for item in items if item.arm == arm)
        other = replace(test, item=1, arm="main", role="treated", condition="copied", spans=())
        with pytest.raises(UserError, match="Experiment other, condition copied"):
            require_apart([mine, Planned("other", SMALL["iid"], [other])])
