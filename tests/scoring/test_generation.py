"""Continuations with keys and values kept are those of reading the whole text again for every token."""

import numpy as np
import pytest
import torch

from megatron_exp.model import generation
from megatron_exp.scoring.batches import pack
from megatron_exp.scoring.engine import Scorer
from megatron_exp.scoring.huggingface import HuggingFaceScorer
from megatron_exp.seeding import key
from tests.model.test_olmo2 import build_pair
from tests.model.tiny import LENGTH, VOCABULARY, running
from tests.scoring.bigram import VOCABULARY as BIGRAM_VOCABULARY
from tests.scoring.bigram import Bigram, sequences

GENERATOR = np.random.default_rng(1)
PROMPTS = [GENERATOR.integers(0, VOCABULARY, size).astype(np.int32) for size in (5, 5, 18, 9, 1, 22)]
KEYS = [key(0, "draw", number) for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def pair():
    with running() as layout:
        model, reference = build_pair(layout, kv_groups=2)
        reference.config.max_position_embeddings = LENGTH
        yield model, reference


class Rereading(Scorer):
    """The scorer as it is where nothing can be kept."""

    @property
    def _keeps(self) -> bool:
        return False


def test_continuations_are_those_of_reading_everything_again(pair):
    model, reference = pair
    written = Scorer(model).greedy(PROMPTS, 8), Scorer(model).sample(PROMPTS, 8, 1.3, KEYS)
    least = Scorer(model).least_likely(PROMPTS, 4, np.arange(3))
    assert (Rereading(model).least_likely(PROMPTS, 4, np.arange(3)) == least).all()
    for other in (Rereading(model), HuggingFaceScorer(reference, noise_dtype=torch.float32)):
        assert (other.greedy(PROMPTS, 8) == written[0]).all()
        assert (other.sample(PROMPTS, 8, 1.3, KEYS) == written[1]).all()
    assert len({tuple(row) for row in written[0].tolist()}) > 1


def test_a_token_is_read_once(pair, monkeypatch):
    read = []
    monkeypatch.setattr(
        generation.CachedReader, "__call__", counted(generation.CachedReader.__call__, lambda reader, tokens: read.append(tokens.shape))
    )
    Scorer(pair[0]).greedy(PROMPTS[:2], 6)
    assert read == [(2, 5)] + [(2, 1)] * 5


def counted(call, note):
    def wrapped(*arguments):
        note(*arguments)
        return call(*arguments)

    return wrapped


def test_the_last_position_of_the_model_can_be_written(pair):
    prompt = GENERATOR.integers(0, VOCABULARY, LENGTH - 1)
    assert (Scorer(pair[0]).greedy([prompt], 2) == Rereading(pair[0]).greedy([prompt], 2)).all()


class ReadingBigram(Bigram):
    """A bigram model that keeps what it has read, which for a bigram is nothing."""

    @property
    def _keeps(self) -> bool:
        return True

    def _reader(self, num_rows, max_positions):
        seen = [0]

        def read(tokens):
            seen[0] += tokens.shape[1]
            assert len(tokens) == num_rows and seen[0] <= max_positions and (seen[0] == tokens.shape[1] or tokens.shape[1] == 1)
            return self.table[tokens[:, -1]]

        return read


def test_prompts_of_any_length_are_continued_from_their_own_end():
    prompts, keys = sequences(60, longest=30), [key(2, number) for number in range(60)]
    assert (ReadingBigram().greedy(prompts, 9) == Bigram().greedy(prompts, 9)).all()
    assert (ReadingBigram().sample(prompts, 9, 1.0, keys) == Bigram().sample(prompts, 9, 1.0, keys)).all()


def test_a_model_that_says_nothing_finite_breaks_its_own_rows_only():
    table = np.random.default_rng(0).normal(size=(BIGRAM_VOCABULARY, BIGRAM_VOCABULARY))
    table[3] = np.nan
    prompts = [np.array([3]), np.array([1, 2, 4, 5, 3]), np.array([2, 2])]
    kept, anew = ReadingBigram(table).greedy(prompts, 1), Bigram(table).greedy(prompts, 1)
    assert (kept == anew).all()
    assert kept[:, 0].tolist()[:2] == [-1, -1] and kept[2, 0] >= 0


def test_a_batch_holds_no_more_rows_and_no_more_different_lengths_than_allowed():
    lengths = np.array([40, 3, 39, 24, 23, 4, 40])
    batches = pack(lengths, 1 << 20, 64, max_rows=2, max_spread=16)
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(7))
    for batch in batches:
        assert len(batch.rows) <= 2 and np.ptp(lengths[batch.rows]) <= 16
    assert [len(batch.rows) for batch in pack(lengths, 1 << 20, 64, max_spread=16)] == [4, 1, 2]
    assert len(pack(lengths, 1 << 20, 64)) == 1
