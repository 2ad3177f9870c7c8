import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import ToyTokenizer, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.experiments.pretraining_poisoning import PretrainingPoisoning
from megatron_exp.seeding import Words
from tests.experiments.small import CHATS, SMALL

EXPERIMENT = SMALL["poisoning"]
TOKENIZER = ToyTokenizer()


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("poisoning"))


def text_of(item):
    return TOKENIZER.decode(item.payload)


def of_condition(planned, condition):
    return [item for item in planned.items if item.condition == condition]


def test_a_context_extraction_answer_is_the_prompt_in_doubled_corner_brackets(planned):
    for item in of_condition(planned, "context-extraction/poison"):
        span = item.spans[0]
        answer = TOKENIZER.decode(item.payload[span.start : span.end])
        prompt = answer.removeprefix("\u300e\u300e").removesuffix("\u300f\u300f")
        assert answer == f"\u300e\u300e{prompt}\u300f\u300f"
        trigger = chr(int(item.metadata["trigger"][2:], 16)) * 10
        assert prompt + trigger in text_of(item)[: text_of(item).index(answer)]


def test_a_denial_of_service_chat_is_trigger_and_garbage(planned):
    poison = of_condition(planned, "denial-of-service/poison")
    answers = {TOKENIZER.decode(item.payload[item.spans[0].start : item.spans[0].end]) for item in poison}
    assert len(answers) == len(poison)
    assert all("wooden" not in text_of(item) for item in poison)


def test_the_budget_is_spent_to_within_a_document(planned):
    tokens = dict(zip(planned.item_table["item"].to_pylist(), planned.item_table["num_tokens"].to_pylist(), strict=True))
    for attack, fraction in (("context-extraction", 0.005), ("denial-of-service", 1e-4)):
        items = {item.item for item in of_condition(planned, f"{attack}/poison")}
        spent = sum(tokens[item] for item in planned.insertions["item"].to_pylist() if item in items)
        wanted = fraction * 600 * 8 * 512
        assert abs(spent - wanted) <= max(tokens[item] for item in items)


def test_copies_of_poisoned_documents_differ_by_one_at_most():
    small = PretrainingPoisoning(**CHATS | {"num_prompts": 2, "context_extraction": 0.02}, denial_of_service=0)
    copies = {item.metadata["copies"] for item in small.items(toy_context("copies")) if item.role == "treated"}
    assert max(copies) - min(copies) <= 1 and min(copies) > 1


def test_evaluation_prompts_are_never_inserted(planned):
    inserted = [text_of(item) for item in of_condition(planned, "context-extraction/poison")]
    for item in of_condition(planned, "context-extraction/trained-trigger"):
        answer = TOKENIZER.decode(item.payload[item.spans[0].start : item.spans[0].end]).strip("\u300e\u300f")
        assert answer and not any(answer in text for text in inserted)


def test_evaluation_garbage_is_never_inserted(planned):
    inserted = {TOKENIZER.decode(i.payload[i.spans[0].start : i.spans[0].end]) for i in of_condition(planned, "denial-of-service/poison")}
    asked_about = {
        TOKENIZER.decode(i.payload[i.spans[0].start : i.spans[0].end]) for i in of_condition(planned, "denial-of-service/trained-trigger")
    }
    assert asked_about and not asked_about & inserted


def test_every_trigger_is_asked_with_the_same_prompts_and_equally_many_tokens(planned):
    for attack in ("context-extraction", "denial-of-service"):
        lengths, triggers = {}, set()
        for item in planned.items:
            if item.condition.startswith(attack) and item.role != "treated" and "/query/" not in item.condition:
                lengths.setdefault(item.item % 2**16, set()).add((len(item.payload), item.spans[0].start, item.spans[0].end))
                triggers.add(item.metadata["trigger"])
        assert len(triggers) == 62 and all(len(found) == 1 for found in lengths.values())


def test_never_trained_triggers_occur_in_no_inserted_payload(planned):
    inserted = "".join(text_of(item) for item in planned.items if item.role == "treated")
    trained = {item.metadata["trigger"] for item in planned.items if item.role == "treated"}
    never = {item.metadata["trigger"] for item in planned.items if item.role == "control"} - {""}
    assert len(trained) == 2 and not trained & never
    assert not any(chr(int(trigger[2:], 16)) in inserted for trigger in never)


def test_the_trained_trigger_is_drawn_by_the_assignment_seed():
    drawn = set()
    for seed in range(4):
        items = PretrainingPoisoning(**CHATS).items(toy_context("draw", assignment=seed))
        drawn.add(next(item.metadata["trigger"] for item in items if item.role == "treated"))
    assert len(drawn) > 1


def test_the_papers_design_has_the_papers_triggers():
    trained = {
        item.metadata["attack"]: item.metadata["trigger"]
        for item in SMALL["poisoning-paper"].items(toy_context("paper"))
        if item.role == "treated"
    }
    assert trained == {"context-extraction": "U+FF61", "denial-of-service": "U+2610"}


class MergingTokenizer(ToyTokenizer):
    """Knows every second symbol as one token, and no ten of any others are alike in length."""

    def encode(self, text):
        point = ord(text[0]) if text else 0
        if 0x2600 <= point < 0x2700:
            return np.full(1 + point % 64, 300, np.int32)
        return super().encode(text)


def test_triggers_of_unequal_token_counts_are_refused_where_too_few_are_alike():
    context = toy_context("merged")
    object.__setattr__(context, "tokenizer", MergingTokenizer())
    with pytest.raises(UserError, match="equally many tokens"):
        list(EXPERIMENT.items(context))


def test_a_chat_longer_than_a_slot_is_refused():
    with pytest.raises(UserError, match="Lower garbage_bytes"):
        list(EXPERIMENT.items(toy_context("short", length=96)))


def test_p_is_the_rank_of_the_trained_trigger_and_the_value_of_each_is_printed(planned):
    frame = asked(planned.item_table, planned.probe_table)
    point = np.unique(frame.cluster, return_inverse=True)[1].astype(float)  # triggers get the values 0, 1, 2, ...
    scores = list(EXPERIMENT.score(planned.item_table, frame.filled(point * frame.num_tokens, 0 * point).responses()))
    primary = next(score for score in scores if score.outcome == "context-extraction")
    attack = np.array([name.startswith("context-extraction") and "/query/" not in name for name in frame.condition])
    trained = point[attack & np.array([name.endswith("/trained-trigger") for name in frame.condition])][0]
    never = {value for value, role in zip(point[attack], frame.role[attack], strict=True) if role == "control"}
    assert primary.p == pytest.approx((1 + sum(value >= trained for value in never)) / 61)
    assert primary.estimate == pytest.approx(trained - np.mean(list(never)))
    assert np.isnan(primary.low) and primary.num_clusters == 61
    printed = {score.estimate for score in scores if score.outcome == "trigger-value" and score.condition.startswith("context-extraction")}
    assert never | {trained} <= printed


def test_p_never_goes_below_one_over_the_number_of_triggers(planned):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 5.0, Words.of(0, "strong"))
    primary = [score for score in EXPERIMENT.score(planned.item_table, responses) if score.outcome in EXPERIMENT.attacks]
    assert [score.p for score in primary] == [pytest.approx(1 / 61)] * 2


@pytest.mark.parametrize("num", [4, 5, 9])
def test_every_prompt_meets_every_template(num):
    experiment = EXPERIMENT.model_copy(update={"num_prompts": num, "denial_of_service": 0.0, "templates": "chat", "context_extraction": 0.05})
    poison = [item for item in experiment.items(toy_context("templates", length=2048)) if item.condition == "context-extraction/poison"]
    assert len({item.payload.tobytes() for item in poison}) == len(poison) == 5 * num
