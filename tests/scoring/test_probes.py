"""From probe definitions to answers: what values mean, and what has a reason instead."""

from types import SimpleNamespace

import numpy as np
import orjson
import pyarrow as pa
import pytest

from megatron_exp.manifest.schema import PROBE_DEFINITIONS
from megatron_exp.scoring.probes import ANSWERS, score_probes
from megatron_exp.stream.slot import Slot, pool_slot
from tests.scoring.bigram import LENGTH, VOCABULARY, Bigram

EOS = 0
PAYLOADS = [np.array(tokens, np.int32) for tokens in ([3, 4, 5, 6], [7, 8], [], range(LENGTH + 1), [1] * 60, [2, VOCABULARY])]
MANIFEST = SimpleNamespace(record={"seeds": {"placement": 0}}, payload=lambda number: PAYLOADS[number])


class Letters:
    """A tokenizer whose id i is the i-th letter."""

    eos_id = EOS
    vocabulary_size = VOCABULARY

    def decode(self, ids):
        return "".join(chr(ord("a") + int(token)) for token in ids)


class Slots:
    """Slot k holds k, k + 1, ... modulo the vocabulary; the pool's first slot counts nowhere in the loss."""

    corpus = SimpleNamespace(tokenizer=Letters)

    def read(self, slot):
        tokens = (np.arange(LENGTH + 1) + slot % 1000) % VOCABULARY
        return Slot(tokens.astype(np.int32), np.full(LENGTH, slot != pool_slot(0), np.uint8))


def probes(*rows):
    return pa.Table.from_pylist(
        [{"experiment": "e", "item": 1, "arm": "main", "name": f"probe-{i}", **row} for i, row in enumerate(rows)], PROBE_DEFINITIONS
    )


def ask(*rows, model=None):
    return score_probes(model or Bigram(), probes(*rows), MANIFEST, Slots()).to_pylist()


def test_loglikelihood_is_in_nats_and_never_positive():
    (answer,) = ask({"ask": "loglikelihood", "payload": 0, "start": 2, "end": 4})
    assert answer["value"] == answer["nats"] == pytest.approx(Bigram().log_probability(PAYLOADS[0], 2, 4))
    assert answer["value"] < 0 and answer["num_tokens"] == 2 and answer["greedy"] is False and answer["reason"] == ""


def test_slot_loss_is_the_mean_over_the_slot():
    (answer,) = ask({"ask": "slot_loss", "slot": 5})
    tokens = Slots().read(5).tokens
    assert answer["value"] == pytest.approx(-Bigram().log_probability(tokens, 1, LENGTH + 1) / LENGTH)
    assert answer["num_tokens"] == LENGTH and answer["nats"] == pytest.approx(LENGTH * answer["value"])


def test_greedy_hits_or_misses_its_target():
    most_likely = Bigram().greedy([PAYLOADS[0]], 2)[0]
    PAYLOADS.append(most_likely.astype(np.int32))
    row = {"ask": "greedy", "payload": 0, "num_tokens": 2}
    hit, miss, free = ask(row | {"target": len(PAYLOADS) - 1}, row | {"target": 1}, row)
    assert (hit["value"], hit["greedy"], miss["value"], free["value"], free["reason"]) == (1.0, True, 0.0, None, "")
    assert hit["text"] == free["text"]


def test_samples_are_texts_and_repeatable():
    row = {"ask": "sample", "payload": 0, "num_tokens": 6, "num_samples": 5, "temperature": 1.0}
    first, again = ask(row), ask(row)
    assert first == again
    texts = orjson.loads(first[0]["text"])
    assert first[0]["value"] is None and first[0]["reason"] == "" and len(texts) == 5 and len(set(texts)) > 1


def test_text_ends_with_the_document():
    always_eos = np.zeros((VOCABULARY, VOCABULARY))
    always_eos[:, EOS] = 50
    assert ask({"ask": "greedy", "payload": 0, "num_tokens": 4}, model=Bigram(always_eos))[0]["text"] == ""


def test_watermark_statistic_is_an_answer_like_any_other():
    (answer,) = ask({"ask": "embedding_gradient", "slot": 5, "key": 2**63 + 9, "noise_slot": 5, "scale": 0.075})
    assert np.isfinite(answer["value"]) and answer["num_tokens"] == LENGTH


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"ask": "loglikelihood", "payload": 4, "start": 1, "end": 60}, "sequence length of 40"),
        ({"ask": "loglikelihood", "payload": 0, "start": 0, "end": 2}, "span"),
        ({"ask": "loglikelihood", "payload": 0, "start": 2, "end": 9}, "span"),
        ({"ask": "loglikelihood", "payload": 5, "start": 1, "end": 2}, "vocabulary of 12"),
        ({"ask": "greedy", "payload": 4, "num_tokens": 2}, "sequence length of 40"),
        ({"ask": "greedy", "payload": 2, "num_tokens": 2}, "empty"),
        ({"ask": "greedy", "payload": 0, "num_tokens": 2, "target": 0}, "target is longer"),
        ({"ask": "sample", "payload": 4, "num_tokens": 2, "num_samples": 2, "temperature": 1.0}, "sequence length of 40"),
        ({"ask": "slot_loss", "slot": pool_slot(0)}, "no position"),
        ({"ask": "embedding_gradient", "slot": pool_slot(0), "key": 1, "noise_slot": 1, "scale": 0.1}, "not a finite number"),
    ],
)
def test_what_cannot_be_scored_has_a_reason_and_no_value(row, reason):
    (answer,) = ask(row)
    assert answer["value"] is None and reason in answer["reason"]


def test_a_broken_model_gives_reasons_not_numbers():
    rows = [
        {"ask": "loglikelihood", "payload": 0, "start": 2, "end": 4},
        {"ask": "slot_loss", "slot": 5},
        {"ask": "greedy", "payload": 0, "num_tokens": 2, "target": 1},
        {"ask": "sample", "payload": 0, "num_tokens": 2, "num_samples": 2, "temperature": 1.0},
    ]
    answers = ask(*rows, model=Bigram(np.full((VOCABULARY, VOCABULARY), np.nan)))
    assert [(answer["value"], answer["text"]) for answer in answers] == [(None, None)] * 4
    assert all("not a finite number" in answer["reason"] for answer in answers)


def test_the_longest_text_a_model_can_see_is_scored():
    (answer,) = ask({"ask": "loglikelihood", "payload": 3, "start": 1, "end": VOCABULARY})
    assert answer["reason"] == ""  # only tokens before the end of the span are looked at, and all but the last are inputs


def test_answers_come_in_the_order_of_the_probes_whatever_is_asked():
    rows = [{"ask": "slot_loss", "slot": 5}, {"ask": "loglikelihood", "payload": 0, "start": 2, "end": 4}, {"ask": "slot_loss", "slot": 6}]
    rows += [{"ask": "loglikelihood", "payload": 4, "start": 1, "end": 60}, {"ask": "greedy", "payload": 1, "num_tokens": 1}]
    table = score_probes(Bigram(), probes(*rows), MANIFEST, Slots())
    assert table.schema == ANSWERS
    assert table["name"].to_pylist() == [f"probe-{i}" for i in range(5)]
    assert [answer["value"] is None for answer in table.to_pylist()] == [False, False, False, True, True]


def test_no_probes_give_no_answers():
    assert len(score_probes(Bigram(), probes(), MANIFEST, Slots())) == 0
