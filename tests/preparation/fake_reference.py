"""A reference model without a model: arithmetic on token ids, and a count of what it was asked."""

import numpy as np

from megatron_exp.preparation.reference import ReferenceIdentity


class FakeModel:
    """Token t of an answer depends on the last token of the prompt. `asked` counts questions; from question `fails_after` on it breaks."""

    def __init__(self, vocabulary=300, fails_after=None):
        self.vocabulary, self.asked, self.fails_after = vocabulary, 0, fails_after

    def _count(self, num):
        self.asked += num
        if self.fails_after is not None and self.asked > self.fails_after:
            raise RuntimeError("killed")

    def loglikelihood(self, sequences, starts, ends):
        self._count(len(sequences))
        return np.array([-float(np.sum(tokens[start:end])) / 100 for tokens, start, end in zip(sequences, starts, ends, strict=True)])

    def _written(self, prompts, num_tokens, step):
        self._count(len(prompts))
        return np.array([(int(prompt[-1]) + step * np.arange(1, num_tokens + 1)) % self.vocabulary for prompt in prompts])

    def greedy(self, prompts, num_tokens):
        return self._written(prompts, num_tokens, 1)

    def least_likely(self, prompts, num_tokens):
        return self._written(prompts, num_tokens, 7)


def identity(corpus, **changes):
    """That of a twin of whatever is planned on `corpus`."""
    fields = {"fingerprint": "f" * 32, "tokenizer": corpus.tokenizer_fingerprint, "kind": "run", "state": 12, "relation": "twin"}
    return ReferenceIdentity(**{**fields, **changes})
