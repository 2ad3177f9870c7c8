"""Memorised strings: found, removed everywhere or kept, and judged within the run."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import check_experiment, null_p_values
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked, joined
from megatron_exp.experiments.verbatim_completion import VerbatimCompletion
from megatron_exp.experiments.verbatim_strings import clusters
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import POOL
from tests.experiments.calibration import REPLICATES, require_no_more_than_nominal, require_nominal, require_stated_power
from tests.experiments.repeated_documents import LENGTH, PROMPT, STEPS, STRING, document, repeated_context

SIZES = {"string_tokens": STRING, "prompt_tokens": PROMPT, "num_strings": 40, "min_strings": 20, "states": (0.5,)}
EXPERIMENT = VerbatimCompletion(**SIZES)
LIKELIHOOD = VerbatimCompletion(**SIZES, selection="likelihood")
WORDS = Words.of(0, "tests", "verbatim")


@pytest.fixture(scope="module")
def context():
    return repeated_context()


@pytest.fixture(scope="module")
def planned(context):
    return draft(EXPERIMENT, context)


def holds(tokens, string):
    return bool((np.lib.stride_tricks.sliding_window_view(tokens, STRING) == string).all(axis=1).any())


def of(planned, condition):
    return [item for item in planned.items if item.condition == condition]


@pytest.mark.parametrize("experiment", [EXPERIMENT, LIKELIHOOD], ids=lambda one: one.selection)
def test_it_conforms_with_either_selection(experiment):
    assert check_experiment(experiment, repeated_context()) == []


@pytest.mark.parametrize("experiment", [EXPERIMENT, LIKELIHOOD], ids=lambda one: one.selection)
def test_its_primary_is_calibrated_without_an_effect(experiment):
    planned = draft(experiment, repeated_context())
    require_no_more_than_nominal(null_p_values(experiment, planned, REPLICATES, WORDS.child(experiment.selection)))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [EXPERIMENT, LIKELIHOOD], ids=lambda one: one.selection)
def test_two_thousand_runs_without_an_effect_give_the_nominal_rate_of_false_positives(experiment, request):
    require_nominal(experiment, repeated_context(), Words.of(0, request.node.name))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [EXPERIMENT, LIKELIHOOD], ids=lambda one: one.selection)
def test_the_smallest_detectable_effect_is_detected_in_four_of_five_runs(experiment, request):
    require_stated_power(experiment, repeated_context(), Words.of(0, request.node.name))


def test_every_string_is_the_beginning_of_a_document_that_the_reference_completes(planned, context):
    strings = [item for item in planned.items if item.payload is not None]
    known = {document(number)[:STRING].tobytes() for number in range(context.stream.corpus.num) if 1 + number % 8 >= 3}
    assert len(strings) == 40 and all(item.payload.tobytes() in known for item in strings)
    assert Counter(item.condition for item in strings) == {"removed": 20, "kept": 20}


def test_after_the_swaps_no_slot_holds_a_removed_string_and_kept_ones_are_where_they_were(planned, context):
    swapped = {row["slot"]: row["source_slot"] for row in planned.insertions.to_pylist()}
    shown = [context.stream.read(swapped.get(slot, slot)).tokens for slot in range(context.stream.num_slots)]
    base = [context.stream.read(slot).tokens for slot in range(context.stream.num_slots)]
    for item in of(planned, "removed"):
        assert not any(holds(tokens, item.payload) for tokens in shown)
        assert item.metadata["slots"] == sum(holds(tokens, item.payload) for tokens in base) > 0
        assert item.metadata["occurrences_left"] == 0
    for item in of(planned, "kept"):
        kept = sum(holds(base[slot], item.payload) for slot in range(len(base)) if slot not in swapped)
        assert item.metadata["occurrences_left"] == kept
    assert np.mean([item.metadata["occurrences_left"] / item.metadata["occurrences"] for item in of(planned, "kept")]) > 0.6


def test_only_slots_that_held_a_removed_string_are_swapped_and_each_says_which(planned, context):
    removed = {item.item: item.payload for item in of(planned, "removed")}
    for item in of(planned, "replacement"):
        tokens = context.stream.read(item.item).tokens
        assert item.metadata["strings"] == sorted(number for number, string in removed.items() if holds(tokens, string)) != []
    assert all(row["kind"] == "swap" and not row["exclusive"] and row["length"] == LENGTH for row in planned.insertions.to_pylist())


def test_the_label_after_a_slot_counts_as_seen(planned, context):
    """A string whose last token is only a label of the slot was predicted whole: its slot goes as well."""
    removed = {item.payload.tobytes() for item in of(planned, "removed")}
    swapped = {item.item for item in of(planned, "replacement")}
    at_the_border = [
        slot for slot in range(context.stream.num_slots) if context.stream.read(slot).tokens[LENGTH + 1 - STRING : LENGTH + 1].tobytes() in removed
    ]
    assert set(at_the_border) <= swapped


def test_strings_are_drawn_from_what_the_reference_has_seen():
    context = repeated_context()
    early = replace(context, reference=replace(context.reference, state=STEPS // 4))
    seen = [context.stream.read(slot).tokens for slot in range(STEPS // 4 * 8)]
    experiment = VerbatimCompletion(**SIZES | {"num_strings": 24})
    for item in experiment.items(early):
        assert item.payload is None or any(holds(tokens, item.payload) for tokens in seen)


class Others:
    """What other experiments do: it implements `EarlierLike`."""

    def __init__(self, texts=(), replaced=(), sources=(), closed=()):
        self.texts = texts
        self.replaced, self.sources, self.closed = (np.array(slots, np.uint64) for slots in (replaced, sources, closed))

    def payloads(self):
        yield from (("other", text) for text in self.texts)


def test_strings_that_others_insert_swap_in_or_hold_fast_are_in_neither_arm(planned, context):
    first, second, third = of(planned, "removed")[:3]
    slots = [next(slot for slot in range(480) if holds(context.stream.read(slot).tokens, one.payload)) for one in (second, third)]
    others = Others(
        texts=(np.concatenate([[5], first.payload, [6]]).astype(np.int32),),
        sources=slots[:1],
        closed=slots[1:],
    )
    again = [item.payload.tobytes() for item in EXPERIMENT.items(repeated_context(earlier=others)) if item.payload is not None]
    assert len(again) == 40 and not {one.payload.tobytes() for one in (first, second, third)} & set(again)


def test_a_slot_that_another_experiment_has_replaced_is_not_swapped_again(planned):
    slot = of(planned, "replacement")[0].item
    again = draft(EXPERIMENT, repeated_context(earlier=Others(replaced=[slot])))
    assert slot not in set(again.insertions["slot"].to_pylist())


def test_a_replacement_never_holds_a_removed_string(planned, context):
    removed = [item.payload for item in of(planned, "removed")]
    pools = [context.stream.read(POOL + place).tokens for place in range(160)]
    assert any(holds(tokens, string) for tokens in pools for string in removed), "the pool is no test otherwise"
    for item in of(planned, "replacement"):
        assert not any(holds(pools[item.metadata["pool_place"]], string) for string in removed)


@pytest.mark.parametrize(
    ("changes", "least", "words"),
    [
        ({"num_strings": 4_000, "min_strings": 400}, 3, r"at least 400 strings .* has \d+: the reference completes exactly \d+ of"),
        ({}, 99, "has 0: the reference completes exactly 0 of .* `selection: likelihood`"),
    ],
)
def test_too_few_strings_are_an_error_that_counts_them(changes, least, words):
    with pytest.raises(UserError, match=words):
        draft(VerbatimCompletion(**SIZES | changes), repeated_context(least=least))


def test_a_reference_is_needed(context):
    with pytest.raises(UserError, match="Give --reference"):
        list(EXPERIMENT.items(replace(context, reference=None)))


def test_near_duplicates_share_an_arm():
    string = np.arange(100, 150, dtype=np.int32)
    other, near = np.arange(300, 350, dtype=np.int32), np.concatenate([np.arange(400, 430), string[:20]]).astype(np.int32)
    assert clusters([string, other, near]) == [0, 1, 0]


def test_the_classes_say_what_remains():
    """A periodic string counts; one whose first half stands elsewhere has a near-duplicate; others have nothing left."""
    from megatron_exp.experiments import verbatim_strings as strings

    context = repeated_context()
    stream = context.stream
    slot = next(slot for slot in range(480) if (stream.read(slot).tokens[:STRING] != 0).all())
    half = np.concatenate([stream.read(slot).tokens[: STRING // 2], np.arange(501, 501 + STRING // 2)]).astype(np.int32)
    periodic, alone = np.tile([7, 8, 9], 4).astype(np.int32), np.arange(480, 480 + STRING, dtype=np.int32)
    nowhere = np.empty(0, np.uint64)
    found = [strings.Found(string, nowhere, nowhere) for string in (periodic, half, alone)]
    assert strings.classes(context, found, nowhere, 480) == [strings.COUNTING, strings.NEAR_DUPLICATE, strings.OTHER]


def test_the_winners_curse_is_in_both_arms(planned):
    """All strings are completed by the twin where they were selected, fewer later: no difference between the arms, so no effect."""
    frame = asked(planned.item_table, planned.probe_table)
    completed = WORDS.child("curse").uniforms(len(frame)) < 0.7
    answers = frame.filled(completed.astype(float), np.where(frame.step == STEPS // 2, 1.0, WORDS.child("twin").uniforms(len(frame)) < 0.7))
    scores = [score for score in EXPERIMENT.score(planned.item_table, answers.responses()) if score.outcome == "completion"]
    assert len(scores) == 2 and all(score.p > 0.01 for score in scores)


def test_lingering_is_counted_by_class(planned):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.5, WORDS.child("lingering"))
    scores = [score for score in EXPERIMENT.score(planned.item_table, responses) if score.outcome == "lingering" and score.step == STEPS]
    run = joined(planned.item_table, responses).of_probe("completion").at(STEPS)
    removed = next(score for score in scores if score.condition == "removed")
    assert removed.estimate == run.run[run.condition == "removed"].mean() and removed.n == 20 and removed.low < removed.estimate < removed.high
    assert sum(score.n for score in scores if score.condition.startswith("removed, ")) == 20


@pytest.mark.parametrize(("effect", "power"), [(0.3, 0.5), (0.6, 0.95)])
def test_a_true_loss_is_found(planned, effect, power):
    """Twenty against twenty strings, 75% completed: the power of a two-sample test of such proportions, within a tenth."""
    found = 0
    for replicate in range(100):
        responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, effect, WORDS.child("power", replicate))
        found += next(EXPERIMENT.score(planned.item_table, responses)).p < 0.05
    alone_power = _power(effect)
    assert found / 100 == pytest.approx(alone_power, abs=0.12) and (effect < 0.6 or found / 100 > power - 0.15)


def _power(effect):
    """Normal approximation for the difference of run minus twin between the arms."""
    variance = (0.75 * 0.25 + (0.75 - effect) * (0.25 + effect)) / 20 + 2 * 0.75 * 0.25 / 20
    return stats.norm.sf(1.645 - effect / np.sqrt(variance))
