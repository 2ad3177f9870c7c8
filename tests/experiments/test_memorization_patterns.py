from collections import Counter
from dataclasses import replace

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.experiments.memorization_patterns import MemorizationPatterns
from megatron_exp.seeding import Words
from tests.experiments.small import DIALOGUES, SMALL
from tests.toy import toy_stream

EXPERIMENT = SMALL["memorization"]
WORDS = Words.of(0, "tests", "memorization")


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("memorization"))


def suffix_of(item):
    span = item.spans[-1]
    return item.payload[span.start : span.end] if span.name == "suffix" else None


def test_every_cell_has_its_conditions_and_held_out_dialogues(planned):
    counts = Counter(item.condition for item in planned.items)
    cells = ["plain", "random-1", "random-8", "rare-1", "rare-8"]
    expected = {f"{cell}/x{copies}": 12 for cell in cells for copies in (1, 4, 16)} | {f"{cell}/held-out": 16 for cell in cells}
    assert counts == expected | {f"rare-{length}/held-out-pool": 16 for length in (1, 8)}


def test_a_payload_is_eos_dialogue_suffix_eos(planned):
    for item in planned.items:
        assert item.payload[0] == item.payload[-1] == 0 and not (item.payload[1:-1] == 0).any()
        assert item.spans[0].start == 1 and item.spans[-1].end == len(item.payload) - 1
        assert 40 <= item.spans[0].end - item.spans[0].start <= 60


def test_dialogues_are_lines_with_a_name_and_all_different(planned):
    tokenizer = toy_context("x").tokenizer
    texts = [tokenizer.decode(item.payload[1 : item.spans[0].end]) for item in planned.items]
    assert len(set(texts)) == len(texts)
    assert all(text.split(":")[0].isalpha() for text in texts)


def test_random_suffixes_are_drawn_for_each_dialogue_and_rare_ones_repeat_one_token(planned):
    random = [tuple(suffix_of(item)) for item in planned.items if item.condition.startswith("random-8/")]
    assert len(set(random)) == len(random) and np.mean([len(set(one)) for one in random]) > 7
    for item in planned.items:
        if item.condition.startswith("rare-8/"):
            assert len(set(suffix_of(item))) == 1


def test_members_and_held_out_dialogues_rotate_through_the_same_rare_tokens():
    large = MemorizationPatterns(**DIALOGUES | {"num_per_condition": 60, "num_held_out": 60}, suffix_types=("rare",), num_rare_tokens=4)
    found = {}
    for item in large.items(toy_context("rare")):
        found.setdefault(item.condition, set()).add(int(suffix_of(item)[0]))
    pools = [found.pop(condition) for condition in list(found) if condition.endswith("held-out-pool")]
    assert all(tokens == set.union(*found.values()) for tokens in found.values())
    assert len(set.union(*found.values())) == 4
    assert len(pools) == 2 and not set.union(*pools) & set.union(*found.values())


def test_the_papers_design_gives_each_rare_condition_one_token_of_its_own():
    found = {}
    for item in SMALL["memorization-paper"].items(toy_context("rare")):
        if item.condition.startswith("rare"):
            found.setdefault(item.condition, set()).add(int(suffix_of(item)[0]))
    held_out = {cell: found.pop(f"{cell}/held-out") for cell in ("rare-1", "rare-8")}
    pools = [found.pop(f"{cell}/held-out-pool") for cell in held_out]
    assert all(len(tokens) == 1 for tokens in found.values())
    assert len(set.union(*found.values())) == len(found) == 6
    assert all(tokens == set.union(*(found[f"{cell}/x{copies}"] for copies in (1, 4, 16))) for cell, tokens in held_out.items())
    assert not set.union(*pools) & set.union(*found.values())


def test_the_papers_design_has_thirty_conditions_and_its_numbers():
    cells = MemorizationPatterns(design="paper").cells
    treated = [condition for cell in cells for condition, copies in cell.copies.items() if copies]
    assert len(treated) == 30 and {cell.counts[name] for cell in cells for name in cell.counts if "/x" in name} == {4000}
    assert {cell.counts[name] for cell in cells for name in cell.counts if "held-out" in name} == {34_907}


def test_model_based_suffixes_are_what_the_reference_finds_least_likely_after_the_dialogue():
    context = toy_context("model")
    items = list(SMALL["memorization-model-based"].items(context))
    assert {len(suffix_of(item)) for item in items} == {1, 8}
    for item in items:
        before = item.payload[: item.spans[-1].start]
        assert np.array_equal(suffix_of(item), context.reference.least_likely([before], len(suffix_of(item)))[0])
    assert {item.condition.split("/")[1] for item in items} == {"x1", "x4", "x16", "held-out"}


def test_only_model_based_suffixes_need_a_reference():
    assert "reference" not in MemorizationPatterns().needed and "reference" in MemorizationPatterns(design="paper").needed
    with pytest.raises(UserError, match="Give --reference"):
        draft(SMALL["memorization-model-based"], replace(toy_context("model"), reference=None))


def test_a_token_that_is_trained_in_general_fools_the_pool_and_not_the_primary():
    """Every dialogue with a trained token gains, inserted or not: membership says nothing, and only the pool seems to."""
    experiment = MemorizationPatterns(**DIALOGUES | {"num_held_out": 40}, suffix_types=("rare",))
    planned = draft(experiment, toy_context("exposure"))
    frame = asked(planned.item_table, planned.probe_table)
    exposed = np.array([not condition.endswith("held-out-pool") for condition in frame.condition])
    twin = WORDS.child("exposure twin").normals(len(frame))
    run = twin + WORDS.child("exposure").normals(len(frame)) + 5.0 * exposed
    scores = list(experiment.score(planned.item_table, frame.filled(run, twin).responses()))
    assert next(score for score in scores if score.outcome == "auc").p > 0.001
    assert all(score.estimate > 0.95 for score in scores if score.outcome == "auc-against-pool")


def test_the_papers_held_out_dialogues_are_compared_by_token():
    """Token 1 is easy in general, token 2 is not: a comparison across tokens would call members of token 1 memorised."""
    experiment = MemorizationPatterns(**DIALOGUES | {"num_held_out": 60}, suffix_types=("rare",), design="paper")
    planned = draft(experiment, toy_context("tokens"))
    frame = asked(planned.item_table, planned.probe_table)
    tokens = frame.meta("token")
    easy = 8.0 * (tokens == min(set(tokens[frame.condition == "rare-8/x16"])))
    twin = WORDS.child("tokens twin").normals(len(frame))
    scores = experiment.score(planned.item_table, frame.filled(twin + WORDS.child("tokens").normals(len(frame)) + easy, twin).responses())
    assert next(scores).p > 0.001


def test_dialogues_of_a_file_in_sodas_layout_are_dealt_whatever_their_order(tmp_path):
    rows = [
        {"dialogue": [f"Line {number} of a talk about the weather.", "I see."], "speakers": ["Ana", "Bo"], "head": "x"}
        for number in range(120)
    ]
    shuffled = [rows[index] for index in WORDS.permutation(120)]
    json_lines, parquet = tmp_path / "soda.jsonl", tmp_path / "soda.parquet"
    json_lines.write_bytes(b"\n".join(map(orjson.dumps, [*rows, rows[0]])))
    pq.write_table(pa.Table.from_pylist(shuffled), parquet)
    settings = DIALOGUES | {"num_per_condition": 4, "num_held_out": 8, "suffix_types": ("plain", "random"), "licence": "CC-BY-4.0"}
    planned = [list(MemorizationPatterns(**settings, file=file).items(toy_context("soda"))) for file in (json_lines, parquet)]
    assert len(planned[0]) == 3 * 20 and len({item.item for item in planned[0]}) == 60
    assert [(a.item, a.condition) for a in planned[0]] == [(b.item, b.condition) for b in planned[1]]
    assert all(np.array_equal(a.payload, b.payload) for a, b in zip(*planned, strict=True))
    text = toy_context("soda").tokenizer.decode(planned[0][0].payload[1 : planned[0][0].spans[0].end])
    assert text.startswith("Ana: Line ") and text.endswith("\nBo: I see.") and planned[0][0].licence == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"dialogue": ["a"], "speakers": ["A", "B"]}], "line 1: it has 1 utterances and 2 speakers"),
        ([{"dialogue": ["a"]}], "line 1: the field `speakers` is missing"),
        ([{"dialogue": ["a talk that is long enough to be used, I hope"], "speakers": ["A"]}], "has 1 different ones of 40 to 60 tokens"),
    ],
)
def test_a_file_of_dialogues_that_cannot_be_used_is_refused_by_line(tmp_path, lines, words):
    (tmp_path / "soda.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    with pytest.raises(UserError, match=words):
        draft(MemorizationPatterns(**DIALOGUES, file=tmp_path / "soda.jsonl", licence="CC-BY-4.0"), toy_context("soda"))


def test_a_file_needs_a_licence():
    with pytest.raises(ValueError, match="under which licence"):
        MemorizationPatterns(file="soda.jsonl")


def test_a_dialogue_and_its_suffix_do_not_depend_on_what_it_was_dealt(planned):
    other = {item.item: item for item in EXPERIMENT.items(toy_context("memorization", assignment=1))}
    alike = [(item, other[item.item]) for item in planned.items if not any("pool" in one.condition for one in (item, other[item.item]))]
    assert len(alike) > 200 and all(np.array_equal(one.payload, again.payload) for one, again in alike)
    assert any(item.condition != other[item.item].condition for item in planned.items)


def test_conditions_are_balanced_over_lengths(planned):
    counts = Counter((item.stratum, item.condition) for item in planned.items)
    for item in planned.items:
        expected = (16 if item.role == "control" else 12) / EXPERIMENT.num_length_strata
        assert abs(counts[item.stratum, item.condition] - expected) <= 1


def test_as_many_copies_are_placed_as_dealt(planned):
    copies = Counter(planned.insertions["item"].to_pylist())
    assert copies == {item.item: item.metadata["copies"] for item in planned.items if item.metadata["copies"]}


def test_copies_stay_inside_the_window():
    experiment = MemorizationPatterns(**DIALOGUES, window=(0.25, 0.5))
    steps = draft(experiment, toy_context("window", steps=400)).insertions["step"].to_numpy()
    assert steps.min() >= 100 and steps.max() < 200


def test_the_target_is_the_suffix_or_the_whole_dialogue(planned):
    asks = {(probe.item, probe.name): probe.ask for probe in planned.probes}
    for item in planned.items:
        ask = asks[item.item, "target"]
        assert (ask.start, ask.end) == (item.spans[-1].start, item.spans[-1].end)


def test_a_rate_at_one_percent_is_no_outcome_with_few_held_out_dialogues_and_refused_where_it_is_asked_for(planned):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.4, WORDS)
    assert not [score for score in EXPERIMENT.score(planned.item_table, responses) if score.outcome.startswith("tpr")]
    assert not [outcome for outcome in EXPERIMENT.analysis.outcomes if outcome.name.startswith("tpr")]
    with pytest.raises(ValueError, match="needs 1000 held-out dialogues with the tokens of each condition.* gives 500"):
        MemorizationPatterns(num_held_out=1500, design="paper", tpr=True)
    assert MemorizationPatterns(num_held_out=1500).has_rate and not MemorizationPatterns(num_held_out=1500, design="paper").has_rate


def test_rare_tokens_are_those_that_the_training_data_has_least_often():
    stream = toy_stream(("a", 40_000), steps=60, batch=8, length=64, pool=32)
    context = replace(toy_context("rare", steps=60, length=256), stream=stream)
    experiment = MemorizationPatterns(**DIALOGUES, num_rare_tokens=4)
    tokens = {item.metadata["token"] for item in experiment.items(context)} - {-1}
    counts = np.bincount(np.concatenate([stream.read(slot).tokens for slot in range(480)]), minlength=512)
    late = np.sort(counts[-25:])
    assert tokens and max(counts[sorted(tokens)]) <= late[max(7, (late == 0).sum() - 1)]


def test_a_rate_at_one_percent_is_found_with_enough():
    sizes = {"num_per_condition": 50, "num_held_out": 1000, "min_tokens": 8, "max_tokens": 9}
    experiment = MemorizationPatterns(**sizes, suffix_types=("plain",), repetitions=(16,))
    planned = draft(experiment, toy_context("rates"))
    responses = experiment.simulate(planned.item_table, planned.probe_table, 0.49, WORDS)
    rate = next(score for score in experiment.score(planned.item_table, responses) if score.outcome == "tpr-at-1pct-fpr")
    assert rate.low <= rate.estimate <= rate.high and rate.estimate > 0.5 and rate.p < 1e-10


def test_the_simulated_auc_is_the_one_asked_for():
    experiment = MemorizationPatterns(
        num_per_condition=400, num_held_out=400, min_tokens=8, max_tokens=9, suffix_types=("plain",), repetitions=(4,)
    )
    planned = draft(experiment, toy_context("auc", steps=2000))
    scores = experiment.score(planned.item_table, experiment.simulate(planned.item_table, planned.probe_table, 0.2, WORDS))
    assert next(scores).estimate == pytest.approx(0.7, abs=0.06)


def test_the_twins_own_difference_is_taken_out(planned):
    """Held-out dialogues that are easier for both models do not hide a gain, and do not make one."""
    frame = asked(planned.item_table, planned.probe_table)
    twin = np.where(frame.role == "control", 0.0, -50.0) + WORDS.child("twin").normals(len(frame))
    gain = np.where(frame.role == "treated", 3.0, 0.0) + WORDS.child("run").normals(len(frame))
    scores = {score.outcome: score for score in EXPERIMENT.score(planned.item_table, frame.filled(twin + gain, twin).responses())}
    assert scores["auc"].estimate > 0.9
    assert scores["control:twin"].p < 1e-10  # the twin never saw a copy, so this difference must raise the alarm


def test_dialogues_longer_than_a_slot_are_refused():
    with pytest.raises(UserError, match="slot holds 64"):
        draft(MemorizationPatterns(**DIALOGUES | {"min_tokens": 70, "max_tokens": 80}), toy_context("long", length=64))
