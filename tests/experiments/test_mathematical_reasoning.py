from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import ToyTokenizer, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.igsm_check import check_solution
from megatron_exp.experiments.mathematical_answers import read_answer, read_solution
from megatron_exp.experiments.mathematical_problems import TRAINING_BINS, Documents, few_shot_prompt
from megatron_exp.experiments.mathematical_reasoning import MathematicalReasoning
from megatron_exp.seeding import Words
from tests.experiments.small import PROBLEMS, SMALL

EXPERIMENT = SMALL["mathematics"]
TOKENIZER = ToyTokenizer()


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("mathematics"))


def split(items):
    return [item for item in items if item.arm == "main"], [item for item in items if item.arm == "right"]


def traces(documents, num):
    training = {written.trace for _, written in documents.training(num, 10)}
    testing = [{written.trace for _, written in documents.testing(operations, num // 20)} for operations in (1, 2, 3, 5, 8, 10)]
    return training, set().union(*testing)


def test_training_and_test_problems_share_no_trace():
    training, testing = traces(Documents(toy_context("mathematics"), 20, 10**6), 600)
    assert training and testing and not training & testing


@pytest.mark.slow
def test_training_and_test_problems_share_no_trace_among_fifty_thousand():
    training, testing = traces(Documents(toy_context("mathematics"), 20, 10**6), 38_000)
    assert not training & testing


def test_training_problems_are_inserted_once_and_test_problems_never(planned):
    train, test = split(planned.items)
    assert len(train) == 40 and {item.role for item in train} == {"treated"}
    assert sorted(planned.insertions["item"].to_pylist()) == sorted(item.item for item in train)
    assert {item.metadata["trace_bin"] in TRAINING_BINS for item in train} == {True}
    assert {item.metadata["trace_bin"] in TRAINING_BINS for item in test} == {False}


def test_answers_of_test_problems_are_equally_frequent_for_every_length(planned):
    _, test = split(planned.items)
    counts = Counter((item.stratum, item.metadata["answer"]) for item in test)
    assert counts == {(f"op-{operations}", answer): 2 for operations in (1, 2) for answer in range(23)}
    documents = Documents(toy_context("mathematics"), 3, 10**6)
    assert set(Counter(written.answer for _, written in documents.testing(2, 60)).values()) == {2, 3}


def test_arms_differ_in_the_last_value_alone_and_the_scored_part_begins_there(planned):
    arms = defaultdict(dict)
    for item in planned.items:
        if item.spans:
            arms[item.item][item.arm] = item
    for pair in arms.values():
        right, wrong = (TOKENIZER.decode(pair[arm].payload) for arm in ("right", "wrong"))
        stem, value = right.removesuffix(".").rsplit(" = ", 1)
        assert int(value) == pair["right"].metadata["answer"]
        assert wrong.startswith(f"{stem} = ") and 0 <= int(wrong.removesuffix(".").rsplit(" = ", 1)[1]) < 23 and wrong != right
        start = pair["right"].spans[0].start
        assert np.array_equal(pair["right"].payload[:start], pair["wrong"].payload[:start])
        assert pair["right"].payload[start] != pair["wrong"].payload[start]


def test_a_document_is_preamble_problem_solution_and_answer_between_two_eos(planned):
    train, _ = split(planned.items)
    for item in train[:10]:
        assert item.payload[0] == item.payload[-1] == 0
        preamble, problem, solution, answer = TOKENIZER.decode(item.payload[1:-1]).split("\n")
        assert "23" in preamble and answer == f"Answer: {item.metadata['answer']}"
        assert check_solution(problem.removeprefix("Problem: "), solution.removeprefix("Solution: ")).is_right


def test_the_defaults_are_the_papers_numbers_and_scale_is_a_factor():
    paper = MathematicalReasoning()
    assert (paper.problems, paper.num_tested, paper.num_solved) == (500_000, 23 * 348, 23 * 348)
    assert MathematicalReasoning(scale=0.01).num_tested == 80 and MathematicalReasoning(scale=1e-6).num_tested == 23


def test_a_prompt_shows_worked_problems_drawn_for_its_item_and_ends_where_the_solution_begins():
    context = toy_context("mathematics")
    shots = Documents(context, 3, 10**6).shots(2)
    prompts = [TOKENIZER.decode(few_shot_prompt(context, number, "How?", shots, 3)) for number in (1, 2)]
    for prompt in prompts:
        assert prompt.count("\nSolution:") == 4 and prompt.count("\nAnswer: ") == 3
        assert prompt.endswith("\nProblem 4: How?\nSolution:") and "\nProblem 1: " in prompt
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so x = 4.\nAnswer: 17\nProblem", 17), ("Answer:22 Answer: 1", 22), ("Answer: none", None), ("so x = 4.", None), ("Answer: 1", 1),
     ("Answer: it is 5. Answer: 7", 5), ("Answer: unknown\nProblem 5: ...\nAnswer: 7", None)],
)
def test_the_answer_is_the_first_integer_after_the_first_mark(text, answer):
    assert read_answer(text) == answer


def test_a_written_solution_is_what_stands_before_the_answer():
    assert read_solution(" Define A's B as x; so x = 4.\nAnswer: 4\nProblem 5: ...") == "Define A's B as x; so x = 4."


def test_written_solutions_are_judged_by_their_text():
    experiment = SMALL["mathematics-paper"]
    planned = draft(experiment, toy_context("mathematics-paper"))
    responses = experiment.simulate(planned.item_table, planned.probe_table, 0.0, Words.of(0, "tests"))
    answers = {item.item: item.metadata for item in planned.items if item.arm == "right"}
    texts = [
        f"{answers[item]['solution']}\nAnswer: {answers[item]['answer']}" if probe == "solve" and model == "run" else text
        for item, probe, model, text in zip(*(responses[name].to_pylist() for name in ("item", "probe", "model", "text")), strict=True)
    ]
    responses = responses.set_column(responses.schema.get_field_index("text"), "text", pa.array(texts, pa.string()))
    scores = {score.outcome: score for score in experiment.score(planned.item_table, responses)}
    assert scores["accuracy"].estimate == scores["sound-solutions"].estimate == 1.0
    assert scores["accuracy-gain"].estimate == pytest.approx(1.0 - scores["accuracy-gain"].twin) and scores["accuracy-gain"].p < 1e-6


def test_a_prompt_that_does_not_fit_is_refused_with_the_remedy():
    experiment = MathematicalReasoning(**PROBLEMS | {"num_generated": 23})
    with pytest.raises(UserError, match="num_shots or max_new_tokens"):
        draft(experiment, toy_context("mathematics"))


def test_problems_that_no_slot_holds_are_refused_with_the_remedy():
    with pytest.raises(UserError, match="usable in 100 tokens"):
        draft(MathematicalReasoning(**PROBLEMS | {"max_tokens": 100}), toy_context("mathematics"))


def test_the_papers_design_without_written_solutions_is_refused():
    with pytest.raises(ValidationError, match="num_generated is 0"):
        MathematicalReasoning(design="paper", num_generated=0)
