import re
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest

from megatron_exp.config.load import load_config
from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import check_experiment, null_p_values, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Greedy
from megatron_exp.experiments.text_lines import FIELDS
from megatron_exp.experiments.texts import Texts
from megatron_exp.seeding import Words
from tests.experiments.calibration import REPLICATES, require_no_more_than_nominal, require_nominal, require_stated_power

WORDS = Words.of(0, "tests", "texts")
METRICS = ("loss", "completion", "choice", "membership")


def rivers(num=160):
    """Two groups of rivers, four to a cluster, with one or two wrong choices."""
    return [
        {
            "id": f"river-{i}",
            "group": f"group-{i % 2}",
            "cluster": f"cluster-{i % 2}-{i // 8}",
            "prompt": f"River {i} ends in",
            "target": f" Lake {7 * i}.",
            "choices": [" Lake A.", " the Sea of B."][: 1 + i % 2],
        }
        for i in range(num)
    ]


def written(tmp_path, records):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def texts(tmp_path, records=None, **parameters):
    path = written(tmp_path, rivers() if records is None else records)
    return Texts(**{"file": path, "licence": "CC0-1.0", "copies": (0, 2, 8), "fpr": 0.8, **parameters})


def planned(experiment, **options):
    return draft(experiment, toy_context("texts", **options))


def scores_of(experiment, design, run, twin):
    frame = asked(design.item_table, design.probe_table)
    return list(experiment.score(design.item_table, frame.filled(run(frame), twin(frame)).responses()))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_conforms(tmp_path, metric):
    assert check_experiment(texts(tmp_path, metric=metric), toy_context("texts")) == []


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_calibrated_with_clusters(tmp_path, metric):
    experiment = texts(tmp_path, metric=metric, copies=(0, 8))
    require_no_more_than_nominal(null_p_values(experiment, planned(experiment), REPLICATES, Words.of(0, "calibration", metric)))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_two_thousand_runs_without_an_effect_give_the_nominal_rate_of_false_positives(tmp_path, metric, request):
    require_nominal(texts(tmp_path, metric=metric, copies=(0, 8)), toy_context("texts"), Words.of(0, request.node.name))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_the_smallest_detectable_effect_is_detected_in_four_of_five_runs(tmp_path, metric, request):
    experiment = texts(tmp_path, rivers(640), metric=metric, copies=(0, 8))
    require_stated_power(experiment, toy_context("texts", steps=2400), Words.of(0, request.node.name))


def test_clusters_are_dealt_as_a_whole_and_evenly_within_groups(tmp_path):
    items = planned(texts(tmp_path)).items
    conditions = {item.cluster: item.condition for item in items}
    assert all(item.condition == conditions[item.cluster] for item in items)
    groups = {item.cluster: item.stratum for item in items}
    for group in ("group-0", "group-1"):
        counts = Counter(conditions[cluster] for cluster in groups if groups[cluster] == group)
        assert max(counts.values()) - min(counts.values()) <= 2 and set(counts) == {"x2", "x8", "held-out"}


def test_as_many_copies_are_placed_as_dealt_inside_the_window(tmp_path):
    design = planned(texts(tmp_path, window=(0.5, 0.75)), steps=400)
    copies = Counter(design.insertions["item"].to_pylist())
    assert copies == {item.item: item.metadata["copies"] for item in design.items if item.role == "treated"}
    steps = design.insertions["step"].to_numpy()
    assert steps.min() >= 200 and steps.max() < 300


def test_a_share_of_the_clusters_is_held_out_as_asked(tmp_path):
    items = planned(texts(tmp_path, control_fraction=0.6)).items
    held_out = {item.cluster for item in items if item.role == "control"}
    assert len(held_out) == 0.6 * len({item.cluster for item in items})


def test_the_order_of_the_lines_has_no_meaning(tmp_path):
    forwards = planned(texts(tmp_path)).items
    backwards = planned(texts(tmp_path, list(reversed(rivers())))).items
    assert {item.item: item.condition for item in forwards} == {item.item: item.condition for item in backwards}


def test_token_ids_are_inserted_as_they_are_and_texts_between_ends(tmp_path):
    records = [{"id": 1, "token_ids": [5, 6, 7]}, *({"id": f"t{i}", "text": f"text {i}"} for i in range(40))]
    items = {item.metadata["id"]: item for item in planned(texts(tmp_path, records, copies=(0, 1))).items}
    assert items["1"].payload.tolist() == [5, 6, 7]
    assert items["t3"].payload[0] == items["t3"].payload[-1] == 0
    assert toy_context("x").tokenizer.decode(items["t3"].payload) == "text 3"


def test_a_completion_asks_for_the_target_and_inserts_prompt_and_target(tmp_path):
    design = planned(texts(tmp_path, metric="completion"))
    item, probe = design.items[0], design.probes[0]
    decode = toy_context("x").tokenizer.decode
    assert isinstance(probe.ask, Greedy) and probe.item == item.item
    assert (decode(probe.ask.prompt), decode(probe.ask.target)) == tuple(item.metadata["asked"])
    assert decode(item.payload) == "".join(item.metadata["asked"])


def test_a_choice_is_right_where_the_target_beats_every_choice_per_character(tmp_path):
    experiment = texts(tmp_path, metric="choice")
    design = planned(experiment)

    def run(frame):
        """Inserted: two nats below the choices in all, but above them per character, since targets are longer."""
        nats = {"target": -1.0, "choice-1": -1.5, "choice-2": -1.2}
        per_character = np.array([nats[name] for name in frame.probe])
        right = (frame.role == "treated") | (frame.probe != "target")
        return np.where(right, per_character, -2.0) * frame.num_tokens  # a token of the toy tokenizer is a character

    primary = scores_of(experiment, design, run, lambda frame: np.full(len(frame), np.nan))[0]
    assert (primary.outcome, primary.estimate, primary.control) == ("choice", 1.0, 0.0)


def test_an_unscored_choice_leaves_its_question_out(tmp_path):
    experiment = texts(tmp_path, metric="choice")
    design = planned(experiment)
    missing = min(item.item for item in design.items if item.condition == "x8")

    def run(frame):
        return np.where((frame.item == missing) & (frame.probe == "choice-1"), np.nan, -frame.num_tokens)

    assert scores_of(experiment, design, run, lambda frame: np.full(len(frame), np.nan))[0].num_unscored == 1


def test_the_loss_is_per_token_and_relative_to_the_twin(tmp_path):
    experiment = texts(tmp_path)
    design = planned(experiment)

    def run(frame):
        return -frame.num_tokens * (3.0 + frame.item % 5 - 0.4 * (frame.condition == "x8") - 0.1 * (frame.condition == "x2"))

    scores = scores_of(experiment, design, run, lambda frame: -frame.num_tokens * (3.2 + frame.item % 5))
    found = {(score.outcome, score.condition): score for score in scores}
    assert found["loss", "x8"].estimate == pytest.approx(0.4) and found["loss", "x8"].control == pytest.approx(0.2)
    assert found["loss-by-copies", "x2"].estimate == pytest.approx(0.1)
    assert found["loss", "x8"].num_clusters == len({i.cluster for i in design.items if i.condition in ("x8", "held-out")})


def test_a_path_is_relative_to_the_configuration_and_not_part_of_the_record(tmp_path):
    (tmp_path / "texts").mkdir()
    written(tmp_path / "texts", rivers())
    (tmp_path / "run.yaml").write_text(
        "name: toy\ncorpus: {path: corpus}\ngeometry: {sequence_length: 256, global_batch_size: 8, steps: 60}\n"
        "experiments: [{name: mine, type: texts, file: texts/mine.jsonl, licence: CC0-1.0, copies: [0, 2]}]\n"
    )
    experiment = load_experiment(load_config(tmp_path / "run.yaml").experiments[0])
    assert len(list(experiment.items(toy_context("mine")))) == 160
    assert "file" not in experiment.model_dump()


BAD_LINES = [
    ({"id": "new", "txt": "a"}, r"mine.jsonl, line 161: there is no field `txt` \(did you mean `text`\?\)"),
    ({"text": "a b c"}, r"line 161: the field `id` is missing"),
    ({"id": "new"}, r"line 161: the field `text` is missing"),
    ({"id": "new", "text": ""}, r"line 161: `text` is empty"),
    ({"id": True, "text": "abc"}, r"line 161: `id` is True"),
    ({"id": "river-4", "text": "abc"}, r"line 161: the id 'river-4' is that of line 5 already"),
    ({"id": "new", "text": "River 4 ends in Lake 28."}, r"line 161: it inserts the same tokens as line 5"),
    (
        {"id": "new", "text": "abc", "cluster": "cluster-0-0", "group": "group-1"},
        r"line 161: its cluster is in group 'group-1' here and in",
    ),
    ({"id": "new", "text": "long " * 200}, r"line 161: it has 1002 tokens to insert, EOS included, but a slot holds 512; shorten it"),
    ({"id": "new", "text": "abc", "token_ids": [1, 2]}, r"line 161: it has both `text` and `token_ids`"),
    ({"id": "new", "token_ids": [1, 512]}, r"line 161: `token_ids` holds 512, which is no id of the vocabulary of 512"),
    ({"id": "new", "token_ids": [1]}, r"line 161: it has 1 tokens to insert, too few"),
    ([1], r"line 161: this is not a JSON object"),
]


@pytest.mark.parametrize(("record", "words"), BAD_LINES, ids=[words[:40] for _, words in BAD_LINES])
def test_a_bad_line_is_refused_by_file_line_and_remedy(tmp_path, record, words):
    with pytest.raises(UserError, match=words):
        planned(texts(tmp_path, [*rivers(), record]))


@pytest.mark.parametrize(("metric", "missing"), [("completion", "target"), ("choice", "choices")])
def test_a_field_that_the_metric_needs_is_missed(tmp_path, metric, missing):
    records = [{name: value for name, value in record.items() if name != missing} | {"text": record["id"]} for record in rivers()]
    with pytest.raises(UserError, match=f"line 1: the field `{missing}` is missing"):
        planned(texts(tmp_path, records, metric=metric))


@pytest.mark.parametrize(
    ("parameters", "num", "words"),
    [
        ({}, 16, "too few for the conditions|too few held-out"),
        ({"metric": "membership", "fpr": 0.01}, 160, "needs 1000. Set fpr to"),
    ],
)
def test_too_few_held_out_texts_are_refused_with_a_remedy(tmp_path, parameters, num, words):
    with pytest.raises(UserError, match=words):
        planned(texts(tmp_path, rivers(num), **parameters))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"licence": ""}, "licence"),
        ({"copies": (1, 4)}, "copies must hold 0"),
        ({"copies": (0,)}, "copies must hold 0"),
        ({"window": (0.5, 0.5)}, "window"),
    ],
)
def test_impossible_parameters_are_refused(tmp_path, parameters, words):
    with pytest.raises(ValueError, match=words):
        texts(tmp_path, **parameters)


def test_a_source_without_a_licence_is_refused(tmp_path):
    with pytest.raises(ValueError, match="licence"):
        Texts(file=written(tmp_path, rivers()))


def test_a_rate_is_found_where_there_are_enough_held_out_clusters(tmp_path):
    experiment = texts(tmp_path, metric="membership", copies=(0, 8))
    design = planned(experiment)
    responses = experiment.simulate(design.item_table, design.probe_table, 0.49, WORDS)
    rate = next(score for score in experiment.score(design.item_table, responses) if score.outcome == "tpr")
    assert rate.low <= rate.estimate <= rate.high and rate.estimate == 1.0


def test_formats_md_lists_every_field_and_every_parameter():
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    section = page.partition("### File of the experiment texts\n")[2].partition("\n##")[0]
    fields, parameters = (
        {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
        for table in section.split("| parameter |")
    )
    assert fields == set(FIELDS) and parameters == set(Texts.model_fields)


def test_a_dependence_test_follows_target_against_choices_where_the_metric_is_choice(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [{"id": number, "prompt": f"key {number}", "target": " one", "choices": [" two", " three"]} for number in range(16)]
    path.write_text("\n".join(map(lambda line: orjson.dumps(line).decode(), lines)))
    experiment = Texts(file=path, licence="none", copies=(0, 4), metric="choice")
    planned = draft(experiment, toy_context("mine"))
    means = []
    for effect in (0.0, 0.5):
        responses = experiment.simulate(planned.item_table, planned.probe_table, effect, Words.of(0, "choice"))
        responses = responses.filter(pa.array([model == "run" for model in responses["model"].to_pylist()]))
        values = experiment.item_values(planned.item_table, responses)
        assert len(values) == 16 and np.isfinite(values).all()
        means.append(values.mean())
    assert means[1] > means[0]
