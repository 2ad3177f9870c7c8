import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import ToyTokenizer, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.muse import Muse
from megatron_exp.experiments.muse_scores import with_recall
from megatron_exp.experiments.news_articles import generated_article
from megatron_exp.seeding import Words
from tests.experiments.small import ARTICLES, SMALL

EXPERIMENT = SMALL["muse"]
TOKENIZER = ToyTokenizer()
WORDS = Words.of(0, "tests", "muse")
NINE = ARTICLES | {"copies": (1, 2, 3)}


@pytest.fixture(scope="module")
def planned():
    return draft(Muse(**NINE), toy_context("muse"))


def articles_of(planned):
    """{article: (its item, its inserted items by copy)}."""
    found = {item.cluster: (item, {}) for item in planned.items if item.arm == "article"}
    for item in planned.items:
        if item.arm == "inserted":
            found[item.cluster][1].setdefault(item.metadata["copy"], []).append(item)
    return found


def body(item):
    return item.payload[1:-1]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts(num, start=0):
    return [generated_article(WORDS, number, 4) for number in range(start, start + num)]


def of_files(tmp_path, **parameters):
    files = {"forget": write(tmp_path / "forget.jsonl", texts(30)), "retain2": write(tmp_path / "retain2.jsonl", texts(40, 1000))}
    small = {"num_per_condition": 4, "formats": ("whole", "once"), "num_never": 20}
    return Muse(**ARTICLES | small | {"files": files, "licence": "CC BY-NC 4.0"} | parameters)


def test_nine_conditions_have_equally_many_articles(planned):
    counts = Counter(item.condition for item, _ in articles_of(planned).values())
    assert counts == {f"{form}/x{copies}": 6 for form in ("whole", "once", "anew") for copies in (1, 2, 3)} | {"never": 30}


def test_the_pieces_of_every_copy_are_the_article(planned):
    for article, inserted in articles_of(planned).values():
        for pieces in inserted.values():
            ordered = sorted(pieces, key=lambda item: item.metadata["piece"])
            np.testing.assert_array_equal(np.concatenate([body(piece) for piece in ordered]), body(article))
            assert all(piece.payload[0] == piece.payload[-1] == 0 and len(body(piece)) for piece in ordered)
            borders = np.cumsum([len(body(piece)) for piece in ordered])[:-1]
            assert all(piece.metadata["cuts"] == borders.tolist() for piece in ordered)


def test_whole_articles_are_one_item_cut_ones_four_and_those_cut_anew_four_per_copy(planned):
    for article, inserted in articles_of(planned).values():
        form, copies = article.metadata["format"], article.metadata["copies"]
        expected = {"never": 0, "whole": 1, "once": 4, "anew": 4 * copies}[form]
        assert sum(map(len, inserted.values())) == expected
        cuts = {tuple(pieces[0].metadata["cuts"]) for pieces in inserted.values()}
        assert len(cuts) == {"never": 0, "whole": 1, "once": 1, "anew": copies}[form]


def test_every_token_of_an_article_is_inserted_as_often_as_its_condition_says(planned):
    length = {(item.item, item.arm): len(item.payload) - 2 for item in planned.items}
    cluster = {(item.item, item.arm): item.cluster for item in planned.items}
    inserted = Counter()
    for item, arm in zip(planned.insertions["item"].to_pylist(), planned.insertions["arm"].to_pylist(), strict=True):
        inserted[cluster[item, arm]] += length[item, arm]
    for number, (article, _) in articles_of(planned).items():
        assert inserted[number] == article.metadata["copies"] * len(body(article))


def test_never_inserted_articles_come_from_the_same_sets_unless_the_paper_is_followed(planned):
    never = {article.metadata["set"] for article, _ in articles_of(planned).values() if article.condition == "never"}
    assert never == {"forget", "retain1", "retain2"}
    papers = articles_of(draft(SMALL["muse-paper"], toy_context("paper"))).values()
    assert {article.metadata["set"] for article, _ in papers if article.condition == "never"} == {"retain2"}
    assert {article.metadata["set"] for article, _ in papers if article.condition != "never"} == {"forget", "retain1"}


def test_a_prompt_and_its_target_are_the_beginning_of_the_article(planned):
    payloads = {item.item: item.payload for item in planned.items if item.arm == "article"}
    facts = {item.item: item.metadata for item in planned.items if item.arm == "article"}
    verbatim = [probe for probe in planned.probes if probe.name == "verbatim"]
    assert Counter(facts[probe.item]["format"] for probe in verbatim)["never"] == 5
    for probe in verbatim:
        both = np.concatenate([probe.ask.prompt, probe.ask.target])
        np.testing.assert_array_equal(both, payloads[probe.item][: len(both)])
        assert TOKENIZER.decode(probe.ask.target) == facts[probe.item]["reference"]
        assert probe.ask.num_tokens == len(probe.ask.target)


def test_verbatim_is_the_recall_of_what_was_written_and_null_where_no_text_was_kept(planned):
    answers = Muse(**NINE).simulate(planned.item_table, planned.probe_table, 0.4, WORDS)
    place = answers["probe"].to_pylist().index("verbatim")
    continuation = next(
        item.metadata["reference"] for item in planned.items if item.arm == "article" and item.item == answers["item"][place].as_py()
    )
    column = answers.schema.get_field_index("text")
    for text, recall in ((continuation, 1.0), ("", 0.0), (None, None)):
        kept = answers["text"].to_pylist()
        kept[place] = text
        assert (
            with_recall(planned.item_table, answers.set_column(column, "text", pa.array(kept, pa.string())))["value"][place].as_py()
            == recall
        )


def test_a_simulated_effect_shows_in_the_loss_and_in_what_is_written():
    experiment = Muse(**ARTICLES | {"num_per_condition": 60, "num_never": 200, "formats": ("whole",), "copies": (4,), "num_verbatim": 60})
    planned = draft(experiment, toy_context("effect"))
    scores = {
        s.outcome: s for s in experiment.score(planned.item_table, experiment.simulate(planned.item_table, planned.probe_table, 0.3, WORDS))
    }
    assert scores["auc"].estimate == pytest.approx(0.8, abs=0.07)
    assert scores["auc"].num_clusters == 260
    assert scores["verbatim"].p < 1e-4 and scores["verbatim"].estimate > 0.1
    assert "tpr-at-1pct-fpr" not in scores | {outcome.name: outcome for outcome in experiment.analysis.outcomes}


def test_a_rate_at_one_percent_is_found_with_enough_articles():
    sizes = {"num_per_condition": 40, "num_never": 1000, "min_tokens": 20, "max_tokens": 24, "formats": ("whole",), "copies": (4,)}
    experiment = Muse(**ARTICLES | sizes | {"num_verbatim": 0})
    planned = draft(experiment, toy_context("rates"))
    answers = experiment.simulate(planned.item_table, planned.probe_table, 0.49, WORDS)
    rate = next(score for score in experiment.score(planned.item_table, answers) if score.outcome == "tpr-at-1pct-fpr")
    assert rate.low <= rate.estimate <= rate.high and rate.estimate > 0.5 and rate.p < 1e-10


def test_files_are_read_without_duplicates_blank_and_short_articles(tmp_path):
    forget = texts(30)
    double = [*forget, forget[0], "", forget[1] + "\n\nAnd so it ended.", "Too short."]
    experiment = of_files(tmp_path)
    write(tmp_path / "forget.jsonl", double)
    found = [item for item in experiment.items(toy_context("files")) if item.arm == "article"]
    assert len(found) == 36
    assert len({item.payload.tobytes() for item in found}) == 36
    assert {item.source.split(",")[0] for item in found} == {"forget", "retain2"}
    assert all(60 <= len(body(item)) <= 120 and item.licence == "CC BY-NC 4.0" for item in found)


def test_the_order_of_lines_does_not_matter(tmp_path):
    designs = []
    for backwards in (False, True):
        experiment = of_files(tmp_path)
        write(tmp_path / "forget.jsonl", texts(30)[::-1] if backwards else texts(30))
        designs.append({(item.item, item.arm): item.condition for item in experiment.items(toy_context("order"))})
    assert designs[0] == designs[1]


def test_the_papers_design_takes_its_controls_from_the_set_that_is_never_inserted(tmp_path):
    items = [item for item in of_files(tmp_path, design="paper").items(toy_context("paper")) if item.arm == "article"]
    assert all((item.metadata["set"] == "retain2") == (item.condition == "never") for item in items)
    with pytest.raises(ValidationError, match="never_inserted"):
        of_files(tmp_path, design="paper", never_inserted=("holdout",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "`text` is 3"),
        ('{"body": "x"}', "`text` is missing; there are `body`"),
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    experiment = of_files(tmp_path)
    with open(tmp_path / "forget.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"forget\.jsonl, line 31: .*MUSE's layout") as raised:
        list(experiment.items(toy_context("bad")))
    assert message in str(raised.value)


def test_what_does_not_fit_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="Lower max_tokens"):
        list(EXPERIMENT.items(toy_context("short", length=121)))
    with pytest.raises(UserError, match=r"116 articles are wanted .*, but 70 are left .* Lower num_per_condition"):
        list(of_files(tmp_path, num_per_condition=24).items(toy_context("few")))
    with pytest.raises(ValidationError, match="licence"):
        of_files(tmp_path, licence="")


def with_questions(tmp_path):
    rows = [{"text": text, "questions": [{"question": "Who?", "answer": f"the mayor {n}"}]} for n, text in enumerate(texts(30))]
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {"num_per_condition": 4, "formats": ("whole",), "copies": (1, 3), "num_never": 20}
    return draft(Muse(**ARTICLES | small, files={"forget": path}, licence="CC BY-NC 4.0"), toy_context("muse"))


def test_questions_in_a_file_are_asked_of_the_article_they_are_about(tmp_path):
    planned = with_questions(tmp_path)
    asked_about = [item for item in planned.items if item.arm == "question-0"]
    role_of = {item.cluster: item.role for item in planned.items if item.arm == "article"}
    assert len(asked_about) == 28 and all(item.role == role_of[item.cluster] for item in asked_about)
    assert TOKENIZER.decode(asked_about[0].payload[1:]) == "Question: Who?\nAnswer:"
    assert {probe.ask.num_tokens for probe in planned.probes if probe.name == "knowledge"} == {32}


def test_an_answer_is_judged_by_its_first_line(tmp_path):
    planned = with_questions(tmp_path)
    item = next(item for item in planned.items if item.arm == "question-0")
    answers = [(item.item, " The Mayor 3\nnothing"), (item.item, "nothing\nthe mayor 3")]
    columns = {"probe": ["knowledge"] * 2, "item": [one[0] for one in answers], "arm": ["question-0"] * 2, "value": [None] * 2}
    columns |= {"text": [one[1] for one in answers], "reason": [""] * 2}
    number = item.metadata["reference"].split()[-1]
    columns["text"] = [text.replace("3", number) for text in columns["text"]]
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    assert with_recall(planned.item_table, table)["value"].to_pylist() == [1.0, 0.0]


def test_the_least_likely_tokens_are_asked_about_and_leak_where_members_stand_out(planned):
    experiment = Muse(**NINE)
    lowest = [probe.ask for probe in planned.probes if probe.name == "min-k"]
    assert {ask.lowest for ask in lowest} == {0.4} and len(lowest) == sum(item.arm == "article" for item in planned.items)
    responses = experiment.simulate(planned.item_table, planned.probe_table, 0.4, Words.of(0, "privleak"))
    scores = {score.outcome: score for score in experiment.score(planned.item_table, responses)}
    leak = scores["privleak"]
    assert leak.estimate == pytest.approx(leak.control / leak.twin - 1.0) and 0.3 < leak.twin < 0.7


def test_the_papers_design_inserts_equal_parts_of_all_articles_but_those_of_the_controls(tmp_path):
    files = {"forget": write(tmp_path / "forget.jsonl", texts(23)), "retain2": write(tmp_path / "retain2.jsonl", texts(11, 1000))}
    experiment = Muse(
        **ARTICLES | {"num_per_condition": None, "num_never": None, "copies": (1, 3)}, design="paper", files=files, licence="x"
    )
    counts = Counter(item.condition for item in experiment.items(toy_context("muse")) if item.arm == "article")
    assert counts == {f"{form}/x{copies}": 3 for form in ("whole", "once", "anew") for copies in (1, 3)} | {"never": 11}
    assert Muse(design="paper").num_per_condition is None


def test_scale_is_one_factor_on_the_papers_numbers():
    experiment = Muse(design="paper", scale=0.02, formats=("whole",), copies=(1, 10), num_verbatim=0)
    articles = [item for item in experiment.items(toy_context("muse", length=4096)) if item.arm == "article"]
    assert Counter(item.condition for item in articles) == {"whole/x1": 12, "whole/x10": 12, "never": 20}
    assert 1_400 < max(len(item.payload) for item in articles) <= 1_486


def test_whole_articles_of_files_are_cut_where_a_slot_ends_and_no_sooner(tmp_path):
    written = [f"{number} " + "word " * (120 if number < 3 else 30) for number in range(6)]
    files = {"forget": write(tmp_path / "forget.jsonl", written), "retain2": write(tmp_path / "retain2.jsonl", texts(4, 1000))}
    sizes = ARTICLES | {"num_per_condition": None, "num_never": None, "max_tokens": None, "formats": ("whole",), "copies": (1,)}
    items = Muse(**sizes, design="paper", files=files, licence="x").items(toy_context("muse", length=512))
    inserted = {item.payload.tobytes(): item.payload for item in items if item.condition == "whole/x1" and item.arm == "inserted"}
    texts_of = {toy_context("muse").tokenizer.decode(payload[1:-1]) for payload in inserted.values()}
    assert texts_of == {text.strip()[:510] for text in written}


def test_a_rate_that_is_asked_for_with_too_few_articles_is_refused():
    with pytest.raises(ValueError, match="needs 1000 never-inserted articles, but num_never times scale is 30"):
        Muse(**ARTICLES, tpr=True)
    assert not Muse(num_never=2000, tpr=False).has_rate and Muse(num_never=2000).has_rate
