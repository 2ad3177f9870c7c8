"""A small stream whose documents repeat, and a reference that knows by heart those that repeat most. Everything in memory."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.experiments.conformance import ToyReference, toy_context
from megatron_exp.seeding import Words
from megatron_exp.stream.keyed import KeyedStream
from tests.toy import ToyShard, toy_config

STRING, PROMPT = 12, 6
LENGTH, BATCH, STEPS, POOL_SLOTS = 64, 8, 60, 160
EOS = 0
_WORDS = Words.of(0, "repeated documents")


def document(number):
    """int32: document `number`, 20 to 40 tokens of its own and EOS."""
    size = 20 + number % 21
    return np.concatenate([1 + _WORDS.child(number).integers(size, 500), [EOS]]).astype(np.int32)


@dataclass
class RepeatedCorpus:
    """One shard: documents 0 .. num - 1, document n standing 1 + n % most times, in keyed order."""

    num: int = 330
    most: int = 8
    path: str = "repeated"
    eos_id: int = EOS
    vocabulary_size: int = 512

    def __post_init__(self):
        numbers = np.repeat(np.arange(self.num), 1 + np.arange(self.num) % self.most)
        pieces = [document(int(number)) for number in numbers[_WORDS.child("order").permutation(len(numbers))]]
        self._tokens = np.concatenate(pieces)
        self._starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        self.shards = (ToyShard("shard-00000", "a", len(self._tokens)),)

    @property
    def fingerprint(self):
        return fingerprint.of_json([self.num, self.most])

    def tokens(self, shard):
        return self._tokens

    def document_starts(self, shard):
        return self._starts


@dataclass(frozen=True)
class Memorising(ToyReference):
    """Continues the beginning of a document of which at least `least` copies are in the corpus; knows nothing else."""

    corpus: RepeatedCorpus | None = None
    least: int = 3

    def greedy(self, prompts, num_tokens):
        known = _beginnings(self.corpus.num, self.corpus.most, self.least)
        unknown = super().greedy(prompts, num_tokens)
        texts = [known.get(prompt.tobytes()) for prompt in prompts]
        return np.array([other if text is None else text[PROMPT : PROMPT + num_tokens] for text, other in zip(texts, unknown, strict=True)])

    def loglikelihood(self, sequences, starts, ends):
        written = self.greedy([tokens[: starts[0]] for tokens in sequences], ends[0] - starts[0])
        right = [np.array_equal(text, tokens[starts[0] : ends[0]]) for text, tokens in zip(written, sequences, strict=True)]
        return super().loglikelihood(sequences, starts, ends) / np.where(right, 5.0, 1.0)


@cache
def _beginnings(num, most, least):
    return {document(number)[:PROMPT].tobytes(): document(number) for number in range(num) if 1 + number % most >= least}


def repeated_context(name="verbatim", corpus=None, least=3, earlier=None, **seeds):
    """A context over RepeatedCorpus, with a reference in the last state of the run."""
    corpus = corpus or RepeatedCorpus()
    config = toy_config(steps=STEPS, batch=BATCH, length=LENGTH, pool=POOL_SLOTS)
    context = toy_context(name, steps=STEPS, batch=BATCH, length=LENGTH, pool_slots=POOL_SLOTS, **seeds)
    reference = Memorising(512, state=STEPS, corpus=corpus, least=least)
    return replace(context, stream=KeyedStream.open(config, corpus), reference=reference, earlier=earlier)
