import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.benchmark_questions import generated_questions, read_benchmark
from megatron_exp.seeding import Words

LETTERED = {
    "question": {"stem": "Which is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
    "answerKey": "B",
}
HUB = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
STEM = "Question: Which is hot?\nAnswer: "
BOOLQ = {"title": "Ice", "passage": "Ice floats.", "question": "does ice float"}
SIQA = {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "rain", "answerC": "joy"}
GRANDE = {"sentence": "The cup fell because _ was wet.", "option1": "it", "option2": "she"}

RECORDS = {
    ("arc_easy", "published"): (LETTERED, [STEM + "fire", STEM + "ice"]),
    ("arc_challenge", "hub"): (HUB, [STEM + "fire", STEM + "ice"]),
    ("csqa", "published"): (LETTERED, [STEM + "fire", STEM + "ice"]),
    ("openbookqa", "hub"): (HUB | {"question_stem": "Which is hot?"}, [STEM + "fire", STEM + "ice"]),
    ("mmlu", "hub"): (
        {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1},
        [STEM + "fire", STEM + "ice"],
    ),
    ("boolq", "published"): (
        BOOLQ | {"answer": True},
        [f"Ice -- Ice floats.\nQuestion: does ice float?\nAnswer: {answer}" for answer in ("yes", "no")],
    ),
    ("boolq", "superglue"): (
        {"passage": "Ice -- Ice floats.", "question": "does ice float?", "label": 0},
        [f"Ice -- Ice floats.\nQuestion: does ice float?\nAnswer: {answer}" for answer in ("no", "yes")],
    ),
    ("boolq", "boolean"): (
        {"passage": "Ice -- Ice floats.", "question": "does ice float?", "label": False},
        [f"Ice -- Ice floats.\nQuestion: does ice float?\nAnswer: {answer}" for answer in ("no", "yes")],
    ),
    ("hellaswag", "published"): (
        {"activity_label": "Skating", "ctx_a": "A man falls.", "ctx_b": "he", "endings": ["sings [loud] now.", "gets up."], "label": "1"},
        ["Skating: A man falls. He gets up.", "Skating: A man falls. He sings now."],
    ),
    ("piqa", "hub"): (
        {"goal": "cool a drink", "sol1": "add ice", "sol2": "add fire", "label": 0},
        ["Goal: cool a drink\nAnswer: add ice", "Goal: cool a drink\nAnswer: add fire"],
    ),
    ("socialiqa", "hub"): (
        SIQA | {"label": "1"},
        [f"Question: Ann fell. Why?\nAnswer: {answer}" for answer in ("ice", "rain", "joy")],
    ),
    ("winogrande", "published"): (
        GRANDE | {"answer": "2"},
        ["The cup fell because she was wet.", "The cup fell because it was wet."],
    ),
}


def write(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", RECORDS, ids=" ".join)
def test_every_layout_becomes_the_texts_of_its_format_the_right_one_first(case, tmp_path):
    record, texts = RECORDS[case]
    [question] = read_benchmark(case[0], write(tmp_path / "some.jsonl", record))
    assert list(question.texts) == texts
    assert all(text.startswith(question.stem) for text in texts)
    assert all(answer in text for answer, text in zip(question.answers, question.texts, strict=True))
    assert question.source == f"{case[0]}, line 1"


@pytest.mark.parametrize(
    ("text", "stem", "answer"),
    [("Question: Which?\nAnswer: fire", "Question: Which?\nAnswer:", "fire"), ("The cup fell.", "", "The cup fell.")],
)
def test_gold_texts_alone_are_questions_with_one_option(text, stem, answer, tmp_path):
    [question] = read_benchmark("arc_easy", write(tmp_path / "gold.jsonl", {"text": text}))
    assert question.texts == (text,) and question.stem == stem and question.answers == (answer,)


def test_labels_may_stand_in_a_file_beside_the_questions(tmp_path):
    path = write(tmp_path / "dev.jsonl", SIQA, SIQA)
    (tmp_path / "dev-labels.lst").write_text("3\n1\n")
    assert [question.answers[0] for question in read_benchmark("socialiqa", path)] == ["joy", "ice"]
    (tmp_path / "dev-labels.lst").write_text("3\n")
    with pytest.raises(UserError, match="1 labels but .* has 2 questions"):
        list(read_benchmark("socialiqa", path))


def test_mmlu_is_read_from_a_folder_of_csv_files(tmp_path):
    (tmp_path / "b_test.csv").write_text('"Which, of these, is hot?",ice,fire,rain,snow,B\n')
    (tmp_path / "a_test.csv").write_text("Which is cold?,ice,fire,steam,sun,A\n")
    found = list(read_benchmark("mmlu", tmp_path))
    assert [question.texts[0] for question in found] == [
        "Question: Which is cold?\nAnswer: ice",
        "Question: Which, of these, is hot?\nAnswer: fire",
    ]
    assert found[1].source == "mmlu, b_test.csv, line 1"


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


BAD = {
    "missing field": ("piqa", {"goal": "x", "sol1": "a", "label": 0}, "the field `sol2` is missing; there are `goal`, `sol1`, `label`"),
    "no label": ("socialiqa", SIQA, "the field `label` is missing"),
    "label too high": ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": 2}, "number 3, but there are 2 options"),
    "label no number": ("winogrande", GRANDE | {"answer": "x"}, "`answer` is 'x', not the number of an option"),
    "label 0 of 1, 2": ("winogrande", GRANDE | {"answer": "0"}, "number 0"),
    "unknown letter": ("arc_easy", LETTERED | {"answerKey": "Z"}, "`answerKey` is 'Z'"),
    "no gap": ("winogrande", GRANDE | {"sentence": "No gap.", "answer": "1"}, "no gap"),
    "wrong type": ("boolq", BOOLQ | {"answer": "true"}, "`answer` is 'true', which is of the wrong type"),
    "no title": ("boolq", without(BOOLQ, "title") | {"answer": True}, "the field `title` is missing"),
    "other benchmark": ("hellaswag", LETTERED, "activity_label, ctx_a"),
    "one option": ("mmlu", {"question": "Which?", "choices": ["a"], "answer": 0}, "fewer than two options"),
    "no object": ("mmlu", ["a"], "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_with_file_reason_and_layout(case, tmp_path):
    benchmark, record, message = BAD[case]
    good = {"text": "Question: Which?\nAnswer: fire"}
    path = write(tmp_path / "bad.jsonl", good, record)
    with pytest.raises(UserError, match="Expected is the layout of") as raised:
        list(read_benchmark(benchmark, path))
    assert message in str(raised.value) and str(raised.value).startswith(f"{path}, line 2: ")


def test_a_csv_row_of_another_width_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("Which?,ice,fire,A\n")
    with pytest.raises(UserError, match=r"a\.csv, line 1: the row has 4 columns"):
        list(read_benchmark("mmlu", tmp_path))


def test_a_csv_file_that_is_not_utf_8_is_named_with_the_line(tmp_path):
    (tmp_path / "some.csv").write_bytes(b"Which?,a,b,c,d,A\n" + "Caf\u00e9?,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(UserError, match="some.csv, line 2: it is not UTF-8"):
        list(read_benchmark("mmlu", tmp_path))


def test_generated_questions_are_about_different_people_and_each_has_four_options():
    questions = list(generated_questions(Words.of(0, "questions"), 3000))
    assert len({question.stem for question in questions}) == len(questions) == 3000
    assert all(len(set(question.answers)) == 4 for question in questions)
    assert set(Counter(question.benchmark for question in questions).values()) == {1000}


def test_a_longer_list_of_generated_questions_begins_with_the_shorter_one():
    words = Words.of(0, "questions")
    assert list(generated_questions(words, 1500))[:40] == list(generated_questions(words, 40))


DATA = Path(__file__).parents[2].parent / "shared/data/experiments/olmes"
REAL = {
    "arc_challenge": ("arc_challenge_test", 1172),
    "arc_easy": ("arc_easy_test", 2376),
    "boolq": ("boolq_validation", 3270),
    "csqa": ("csqa_validation", 1221),
    "hellaswag": ("hellaswag_validation", 10042),
    "openbookqa": ("openbookqa_test", 500),
    "socialiqa": ("socialiqa_validation", 1954),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the gold texts of OLMES tasks are not on this machine (../shared/data)")
@pytest.mark.parametrize("benchmark", REAL)
def test_real_gold_texts_are_read_completely(benchmark):
    name, num = REAL[benchmark]
    questions = list(read_benchmark(benchmark, DATA / f"{name}.jsonl"))
    assert len(questions) == num
    assert all(bool(question.stem) == (benchmark != "hellaswag") for question in questions)
