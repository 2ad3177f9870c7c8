import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_exp.errors import UserError
from megatron_exp.experiments.benchmark_accuracy import Ranking, characters
from megatron_exp.experiments.benchmark_contamination import BenchmarkContamination
from megatron_exp.experiments.conformance import ToyTokenizer, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.seeding import Words
from tests.experiments.small import QUESTIONS, SMALL

EXPERIMENT = SMALL["contamination"]
TOKENIZER = ToyTokenizer()
WORDS = Words.of(0, "tests", "contamination")


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("contamination"))


def hub_file(tmp_path, num, name="arc.jsonl"):
    """Questions in the hub's layout, each of words of its own."""
    path = tmp_path / name
    with open(path, "w", encoding="utf-8") as file:
        for index in range(num):
            choices = {"text": [f"red{index}", f"red{index} and blue"], "label": ["A", "B"]}
            record = {"question": f"What w{index} is x{index} of y{index}?", "choices": choices, "answerKey": "AB"[index % 2]}
            file.write(json.dumps(record) + "\n")
    return path


def of_files(tmp_path, benchmark="arc_challenge", num=150, **parameters):
    files = {benchmark: hub_file(tmp_path, num)}
    return BenchmarkContamination(**QUESTIONS | parameters, files=files, licences={benchmark: "CC BY-SA 4.0"})


def test_every_level_of_both_groups_and_the_held_out_questions_have_their_number(planned):
    counts = Counter(item.condition for item in planned.items)
    assert counts == {f"{group}/x{level}": 20 for group in ("uniform", "window") for level in (4, 16)} | {"held-out": 60}


def test_scale_is_a_factor_on_all_numbers_and_the_default_is_the_papers():
    assert sum(BenchmarkContamination().counts.values()) == 44_000
    assert BenchmarkContamination(scale=0.01).counts == {name: num // 100 for name, num in BenchmarkContamination().counts.items()}


def test_a_payload_is_the_question_with_its_right_answer_between_two_eos(planned):
    for item in planned.items:
        assert item.payload[0] == item.payload[-1] == 0
        assert TOKENIZER.decode(item.payload[1:-1]) == item.metadata["texts"][0]
        assert not any(text in TOKENIZER.decode(item.payload) for text in item.metadata["texts"][1:])


def test_conditions_are_balanced_within_benchmarks(planned):
    counts = Counter((item.stratum, item.condition) for item in planned.items)
    assert all(abs(num - sum(1 for item in planned.items if item.condition == name) / 3) <= 1 for (_, name), num in counts.items())


def test_copies_of_the_window_stay_in_it_and_those_of_the_other_group_do_not(planned):
    steps = planned.insertions["step"].to_numpy()
    is_window = np.char.startswith(planned.insertions["condition"].to_numpy().astype(str), "window/")
    assert steps[is_window].min() >= 85 and steps[is_window].max() < 172  # 0.143 and 0.286 of 600
    assert steps[~is_window].min() < 85 and steps[~is_window].max() > 172
    copies = Counter(planned.insertions["item"].to_pylist())
    assert copies == {item.item: item.metadata["copies"] for item in planned.items if item.role == "treated"}


def test_scored_parts_begin_where_the_options_part_and_characters_count_them(planned):
    probes = {(probe.item, probe.name): probe.ask for probe in planned.probes}
    for item in planned.items:
        asks = [probes[item.item, "gold"], *(probes[item.item, f"wrong-{number}"] for number in (1, 2, 3))]
        assert len({ask.start for ask in asks}) == 1
        assert len({bytes(ask.tokens[: ask.start]) for ask in asks}) == 1
        assert len({int(ask.tokens[ask.start]) for ask in asks}) > 1
        assert item.metadata["characters"] == [len(TOKENIZER.decode(ask.tokens[ask.start :])) for ask in asks]


def test_an_option_that_is_the_beginning_of_another_still_has_a_scored_part(tmp_path):
    planned = draft(of_files(tmp_path), toy_context("prefix"))
    assert all(probe.ask.start < probe.ask.end for probe in planned.probes)


def test_unconditional_probes_are_asked_where_the_benchmark_wants_them(tmp_path):
    names = {probe.name for probe in draft(of_files(tmp_path), toy_context("prior")).probes}
    assert names == {"gold", "wrong-1", "gold/unconditional", "wrong-1/unconditional"}
    [ask] = [p.ask for p in draft(of_files(tmp_path), toy_context("prior")).probes if p.name == "gold/unconditional"][:1]
    assert TOKENIZER.decode(ask.tokens[1:]).startswith("Answer: red")
    names = {probe.name for probe in draft(of_files(tmp_path, "arc_easy"), toy_context("prior")).probes}
    assert names == {"gold", "wrong-1"}


def test_the_three_normalisations_rank_as_defined(tmp_path):
    """Nats of right and wrong option, alone and given the question, worked out by hand for options of 4 and 13 characters or so."""
    planned = draft(of_files(tmp_path), toy_context("ranks"))
    frame = asked(planned.item_table, planned.probe_table)
    lengths = characters(frame)
    by_probe = {"gold": -6.0, "wrong-1": -5.0, "gold/unconditional": -9.0, "wrong-1/unconditional": -4.0}
    run = np.array([by_probe[name] for name in frame.probe])
    ranking = Ranking.of(frame.filled(run, np.full(len(run), np.nan)))
    assert (ranking.correct("none").run == 0).all()  # -6 < -5
    assert (ranking.correct("unconditional").run == 1).all()  # -6 + 9 > -5 + 4
    assert (ranking.correct(None).run == 1).all()  # the benchmark's own is unconditional
    gold, wrong = lengths[frame.probe == "gold"], lengths[frame.probe == "wrong-1"]
    np.testing.assert_array_equal(ranking.correct("char").run, -6.0 / gold > -5.0 / wrong)
    assert 0 < ranking.correct("char").run.mean() < 1


def test_a_question_with_an_unscored_option_is_unscored_and_not_wrong(planned):
    frame = asked(planned.item_table, planned.probe_table)
    run = np.where((frame.probe == "wrong-2") & (frame.item == frame.item[0]), np.nan, 0.0)
    correct = Ranking.of(frame.filled(run, run)).correct("none")
    assert np.isnan(correct.run[correct.item == frame.item[0]]).all()
    assert (correct.run[correct.item != frame.item[0]] == 0).all()  # a tie is no success


def test_easier_questions_in_a_condition_are_no_effect_with_a_twin_and_one_in_the_papers_design(planned):
    frame = asked(planned.item_table, planned.probe_table)
    easier = np.isin(frame.probe, ("gold", "curve")) & (frame.condition == "uniform/x16")
    twin = (2.0 * easier + 0.1 * WORDS.child("twin").normals(len(frame))) * characters(frame)
    answers = frame.filled(twin + 0.01 * WORDS.child("run").normals(len(frame)) * characters(frame), twin).responses()
    scores = {score.outcome: score for score in reversed(list(EXPERIMENT.score(planned.item_table, answers)))}
    assert scores["gold"].p > 1e-3 and scores["control:twin"].p < 1e-6
    papers = next(SMALL["contamination-paper"].score(planned.item_table, answers))
    assert papers.outcome == "accuracy" and papers.p < 1e-3 and "run alone" in papers.test


def test_a_simulated_effect_comes_back_for_each_condition(planned):
    large = BenchmarkContamination(**QUESTIONS | {"num_questions": (400, 400), "num_held_out": 800}, groups=("uniform",))
    plan = draft(large, toy_context("large", steps=4000))
    answers = large.simulate(plan.item_table, plan.probe_table, 0.1, WORDS)
    found = {(score.outcome, score.condition): score for score in large.score(plan.item_table, answers)}
    assert found["gold", "uniform/x16"].estimate == pytest.approx(0.1, abs=0.02)
    assert found["gold-by-condition", "uniform/x4"].estimate == pytest.approx(0.1 * np.log2(5) / np.log2(17), abs=0.02)
    assert found["accuracy-by-condition", "uniform/x16"].estimate > 0.02
    assert np.isnan(found["accuracy-char", "uniform/x16"].p)


def test_the_curve_is_scored_in_states_of_its_own(planned):
    answers = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.1, WORDS)
    states = {score.step for score in EXPERIMENT.score(planned.item_table, answers) if score.outcome == "curve"}
    assert states == {300, 600}


def test_gold_texts_alone_have_a_likelihood_and_no_accuracy(tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text("".join(json.dumps({"text": f"Question: a{i} b{i} c{i}?\nAnswer: d{i}"}) + "\n" for i in range(140)))
    experiment = BenchmarkContamination(**QUESTIONS, files={"csqa": path}, licences={"csqa": "MIT"})
    planned = draft(experiment, toy_context("gold"))
    scores = list(experiment.score(planned.item_table, experiment.simulate(planned.item_table, planned.probe_table, 0.1, WORDS)))
    assert scores[0].outcome == "gold" and scores[0].p < 0.01
    assert all(np.isnan(score.estimate) and score.reason for score in scores if score.outcome.startswith("accuracy"))


def test_items_depend_on_neither_the_order_of_lines_nor_the_place_of_the_file(tmp_path):
    first = of_files(tmp_path)
    lines = (tmp_path / "arc.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    second = first.model_copy(update={"files": {"arc_challenge": tmp_path / "other.jsonl"}})
    designs = [{item.item: (item.condition, item.payload.tobytes()) for item in one.items(toy_context("o"))} for one in (first, second)]
    assert designs[0] == designs[1]
    assert str(tmp_path) not in json.dumps(first.model_dump(mode="json"))


def test_near_duplicates_go_before_anything_is_assigned(tmp_path):
    path = hub_file(tmp_path, 141)
    path.write_text(path.read_text() + path.read_text())
    items = list(of_files(tmp_path, num=141).items(toy_context("once")))
    assert len(items) == 140 and len({item.item for item in items}) == 140


def test_too_few_questions_are_refused_with_a_scale_that_fits(tmp_path):
    with pytest.raises(UserError, match="140 questions are wanted.*there are 70. Set scale to 0.495"):
        list(of_files(tmp_path, num=70).items(toy_context("few")))
    assert list(of_files(tmp_path, num=70, scale=0.495).items(toy_context("few")))


def test_a_question_that_no_slot_holds_is_named_and_max_tokens_leaves_it_out(tmp_path):
    with pytest.raises(UserError, match=r"arc\.jsonl, line \d+, the question has \d+ tokens.*slot holds 40.*max_tokens"):
        list(of_files(tmp_path).items(toy_context("long", length=40)))
    with pytest.raises(UserError, match="there are 0"):
        list(of_files(tmp_path, max_tokens=40).items(toy_context("long", length=40)))


@pytest.mark.parametrize(
    "parameters",
    [{"files": {"arc_easy": "a.jsonl"}}, {"levels": (4, 4)}, {"num_questions": (1,)}, {"window": (0.5, 0.5)}, {"groups": ()}],
    ids=lambda parameters: next(iter(parameters)),
)
def test_parameters_that_contradict_each_other_are_refused(parameters):
    with pytest.raises(ValidationError, match=next(iter(parameters)).replace("files", "licence")):
        BenchmarkContamination(**QUESTIONS | parameters)


DATA = Path(__file__).parents[2].parent / "shared/data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the gold texts of OLMES tasks are not on this machine (../shared/data)")
def test_real_gold_texts_are_planned_with_the_real_tokenizer():
    from megatron_exp.shards.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DATA / "tokenizers/dolma2.json")
    context = replace(toy_context("real"), tokenizer=tokenizer, vocabulary_size=tokenizer.vocabulary_size)
    files = {"openbookqa": DATA / "experiments/olmes/openbookqa_test.jsonl"}
    items = list(BenchmarkContamination(scale=0.01, files=files, licences={"openbookqa": "Apache-2.0"}).items(context))
    assert len(items) == 440
    for item in items:
        span = item.spans[0]
        assert tokenizer.decode(item.payload[span.start : span.end]) == f" {item.metadata['answers'][0]}"


def test_questions_with_a_gap_are_duplicates_by_their_text_and_not_by_their_answer(tmp_path):
    things = ["cup", "lamp", "river", "stone", "garden", "window", "paper", "letter"]
    lines = [
        {"sentence": f"The {thing} near the {other} belongs to _ and nobody else.", "option1": "Sarah", "option2": "Maria", "answer": "1"}
        for thing in things
        for other in things
        if thing != other
    ]
    path = tmp_path / "winogrande.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    sizes = {"levels": (4,), "num_questions": (20,), "num_held_out": 20, "groups": ("uniform",)}
    experiment = BenchmarkContamination(files={"winogrande": path}, licences={"winogrande": "CC-BY-4.0"}, similarity=0.95, **sizes)
    assert len({item.metadata["texts"][0] for item in experiment.items(toy_context("gaps"))}) == 40
