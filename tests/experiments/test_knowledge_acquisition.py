"""KA: texts keep their facts, queries are cut where the target begins, and the design is what the docstring says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments import knowledge_acquisition
from megatron_exp.experiments.cloze import cloze
from megatron_exp.experiments.conformance import ToyTokenizer, null_p_values, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.fictional_facts import invented
from megatron_exp.experiments.frames import FINAL
from megatron_exp.experiments.knowledge_acquisition import KnowledgeAcquisition
from megatron_exp.experiments.knowledge_texts import read_texts
from megatron_exp.seeding import Words
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.statistics.partial import partial_similarity
from tests.experiments.small import TEXTS
from tests.shards.making import REAL_DATA

WORDS = Words.of(0, "test of knowledge acquisition")


def test_every_paraphrase_keeps_every_name_and_date_verbatim():
    for place, facts in enumerate(invented(WORDS, 20)):
        for number in range(30):
            text = facts.paraphrase(WORDS.child(place), number)
            assert all(target in text for _, target in facts.queries())
            assert not any(asked in text for asked, _ in facts.queries())
        assert len({facts.paraphrase(WORDS.child(place), number) for number in range(30)}) > 25


def test_no_two_texts_share_a_target_and_more_texts_leave_the_first_as_they_are():
    texts = invented(WORDS, 256)
    targets = [target for facts in texts for _, target in facts.queries()]
    assert len(set(targets)) == len(targets)
    assert len({facts.name.split()[0] for facts in texts}) == 256
    assert invented(WORDS, 10) == texts[:10]


class Joining(ToyTokenizer):
    """Words with the space before them are one token, runs of spaces are one: alone, an input that ends in a space has another last token."""

    def encode(self, text):
        self.pieces = getattr(self, "pieces", [""])
        ids = []
        for piece in re.findall(r" ?\w+|\s+(?!\w)|\S", text):
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return np.array(ids, np.int32)

    def decode(self, ids):
        return "".join(self.pieces[one] for one in ids)


@pytest.mark.parametrize("prompt", ["the elements X, Y, and ", "the elements X, Y, and"])
def test_a_space_at_the_end_of_the_input_does_not_shift_the_target(prompt):
    tokenizer = object.__new__(Joining)
    tokenizer.__dict__["pieces"] = [""]
    found = cloze(tokenizer, prompt, "Extraterrium")
    assert tokenizer.decode(found.tokens[found.start :]) == " Extraterrium"
    assert tokenizer.decode(found.tokens[: found.start]) == "the elements X, Y, and"


def test_byte_tokens_are_cut_at_the_first_letter_of_the_target():
    found = cloze(ToyTokenizer(), "The river is called", "Öd")
    assert ToyTokenizer().decode(found.tokens[found.start :]) == "Öd"


class Swallowing(ToyTokenizer):
    def encode(self, text):
        return np.array([7, 8], np.int32)

    def decode(self, ids):
        return {0: "", 1: "The river is", 2: "The river is Kelp"}[len(ids)] if list(ids) != [7] else "The"


def test_a_target_that_the_tokenizer_joins_with_its_input_is_refused():
    with pytest.raises(UserError, match="joins the end of"):
        cloze(Swallowing(), "The river is", "Kelp")
    with pytest.raises(UserError, match="changes the target"):
        cloze(Swallowing(), "The river is", "Mirn")


@pytest.mark.parametrize(
    ("target", "text", "similarity"),
    [("abc", "xxabcxx", 100.0), ("abc", "xxabxx", 200 / 3), ("abc", "", 0.0), ("Kelp", "the kelp", 75.0), ("abcd", "abXcd", 75.0)],
)
def test_partial_similarity_is_that_of_the_best_stretch(target, text, similarity):
    assert partial_similarity(target, text) == pytest.approx(similarity)


def test_texts_are_dealt_with_their_queries_and_only_inserted_ones_are_in_bank_and_measure():
    planned = draft(KnowledgeAcquisition(**TEXTS), toy_context("ka", length=1024))
    by_item = {item.item: item for item in planned.items}
    assert planned.controller is not None
    assert {by_item[item].condition for item in (*planned.controller.bank, *planned.controller.asked)} == {"inserted"}
    assert len(planned.controller.bank) == 5 * 4
    assert len(planned.controller.asked) == 5 * 4
    assert len({by_item[item].cluster for item in planned.controller.bank[:6]}) > 1, "texts are mixed"
    never = [item for item in planned.items if item.condition == "never"]
    assert {item.role for item in never} == {"control"}
    assert sum("input" in item.metadata for item in never) == 5 * 4


def test_the_papers_design_has_its_numbers():
    paper = KnowledgeAcquisition(design="paper")
    assert (paper.num_texts, paper.num_paraphrases, paper.target, paper.largest) == (4, 10_000, 0.08, 8192)
    assert paper._rule_parameters["caps"] == [(0.0, None), (0.19, 256), (0.59, 64)]
    assert KnowledgeAcquisition(design="paper", largest=2048)._rule_parameters == paper._rule_parameters
    assert paper._interval(toy_context("ka", steps=100_000)) == 1000


def test_the_power_is_the_one_that_the_docstring_states():
    stated = float(re.search(r"power (0\.\d+) with 16", knowledge_acquisition.__doc__)[1])
    one = KnowledgeAcquisition(num_paraphrases=2, largest=2, interval=300)
    planned = draft(one, toy_context("ka", length=1024))
    probes = planned.probe_table.filter([name == "target" for name in planned.probe_table["name"].to_pylist()])
    p = []
    for index in range(400):
        responses = one.simulate(planned.item_table, probes, one.smallest_effect, WORDS.child("power", index))
        p.append(next(score.p for score in one.score(planned.item_table, responses) if score.outcome == "knowledge"))
    assert abs(np.mean(np.array(p) < 0.05) - stated) < 0.05


def test_live_probes_are_described_in_every_state():
    one = KnowledgeAcquisition(**TEXTS)
    planned = draft(one, toy_context("ka", length=1024))
    responses = one.simulate(planned.item_table, planned.probe_table, 20.0, WORDS)
    live = [score for score in one.score(planned.item_table, responses) if score.outcome == "live-nats"]
    assert [score.step for score in live] == [0, 200, 400]
    assert live[-1].estimate > live[0].estimate + 5
    assert {score.step for score in one.score(planned.item_table, responses)} >= {FINAL}
    assert null_p_values(one, planned, 3, WORDS).shape == (3, 1)


# ---- files ----


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def texts_file(path, num=4):
    rows = [{"id": f"t{n}", "text": f"In version {v} the lake Lem{n} lies in the land of Arn{n}."} for n in range(num) for v in range(3)]
    return write_lines(path / "texts.jsonl", rows)


def queries_file(path, num=4, **changes):
    return write_lines(path / "queries.jsonl", [{"input": f"The lake Lem{n} lies in", "target": f"Arn{n}"} | changes for n in range(num)])


def test_a_users_file_of_paraphrases_is_planned(tmp_path):
    files = {"paraphrases": texts_file(tmp_path), "queries": queries_file(tmp_path), "licence": "CC0-1.0"}
    planned = draft(KnowledgeAcquisition(**files, num_texts=2, num_never=2, largest=3, interval=200), toy_context("ka"))
    assert planned.controller is not None
    assert len(planned.controller.bank) == 6
    assert len(planned.controller.asked) == 2
    assert {item.licence for item in planned.items} == {"CC0-1.0"}


def test_the_published_layout_is_read_and_queries_without_a_name_find_their_text(tmp_path):
    entry = {"gen_input": ["Who rules?"], "paraphrases": ["Zor rules Mars, they say."]}
    entries = [
        {**entry, "train_context": "Zor rules Mars.", "gen_target": ["Zor"]},
        {**entry, "train_context": "Kal rules Venus.", "gen_target": ["Kal"], "paraphrases": []},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    own = read_texts(tmp_path / "data.json", None)
    assert [(text.name, text.queries) for text in own] == [("entry 0", (("Who rules?", "Zor"),)), ("entry 1", (("Who rules?", "Kal"),))]
    queries = write_lines(tmp_path / "queries.jsonl", [{"input": "The ruler of Mars is ", "target": "Zor"}])
    asked = read_texts(tmp_path / "data.json", queries)
    assert [(text.is_queried, text.queries) for text in asked] == [(True, (("The ruler of Mars is", "Zor"),)), (False, own[1].queries)]


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ([{"input": "x"}], "line 1: the field `target` is missing"),
        ([{"input": "The lake lies in", "target": "Nowhere"}], "line 1: no text holds its target"),
        ([{"input": "A lake is", "target": "lake"}], "fit it equally well; give it the `id`"),
        ([{"input": "Where?", "target": "Arn0", "id": "t9"}], "line 1: there is no text 't9'"),
        ([{"input": "Where?", "target": "Elsewhere", "id": "t0"}], "the target 'Elsewhere' stands in no paraphrase of t0"),
        ([{"input": "Where is Lem0?", "target": "Arn0"}] * 2, "line 2: the same query stands there before"),
    ],
)
def test_a_query_that_cannot_be_answered_is_refused_with_its_line(tmp_path, queries, words):
    with pytest.raises(UserError, match=re.escape(words)):
        read_texts(texts_file(tmp_path), write_lines(tmp_path / "queries.jsonl", queries))


def test_other_layouts_missing_queries_and_too_few_texts_are_refused(tmp_path):
    with pytest.raises(UserError, match="has paraphrases and no queries"):
        read_texts(texts_file(tmp_path), None)
    (tmp_path / "data.json").write_text('[{"train_context": 3}]')
    with pytest.raises(UserError, match="entry 0: `train_context` is missing or of the wrong type"):
        read_texts(tmp_path / "data.json", None)
    files = {"paraphrases": texts_file(tmp_path), "queries": queries_file(tmp_path), "licence": "CC0-1.0"}
    with pytest.raises(UserError, match="3 texts are to be inserted and 3 kept out, but .* has 4 with queries"):
        draft(KnowledgeAcquisition(**files, num_texts=3, num_never=3), toy_context("ka"))
    with pytest.raises(ValueError, match="licence is needed"):
        KnowledgeAcquisition(paraphrases=files["paraphrases"])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["fictional_knowledge.json", "fictional_knowledge_paraphrased.json"])
def test_the_published_texts_and_the_papers_queries_are_planned(name):
    folder = REAL_DATA / "experiments"
    files = {"paraphrases": folder / name, "queries": folder / "fictional_knowledge_queries.jsonl", "licence": "as published"}
    experiment = KnowledgeAcquisition(**files, design="paper", num_never=10, interval=200)
    context = replace(toy_context("ka", length=2048), tokenizer=Tokenizer.load(REAL_DATA / "tokenizers" / "dolma2.json"))
    items = list(experiment.items(context))
    asked = [item for item in items if item.role == "probe-only"]
    assert len(asked) == 16 and len({item.cluster for item in asked}) == 4
    assert {item.source.partition(",")[0] for item in items} == {name}


def test_a_text_that_no_slot_holds_is_named_with_its_file(tmp_path):
    files = {"paraphrases": texts_file(tmp_path), "queries": queries_file(tmp_path), "licence": "CC0-1.0"}
    with pytest.raises(UserError, match=r"texts\.jsonl, t\d\): the payload has \d+ tokens but a slot holds 16"):
        draft(KnowledgeAcquisition(**files, num_texts=2, num_never=2, largest=3, interval=200), toy_context("ka", length=16))
