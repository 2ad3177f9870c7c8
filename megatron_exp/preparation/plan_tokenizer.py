"""The corpus's tokenizer as experiments are given it: fast where very many texts are made, and with the reference library's ids."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.preparation.preprocess_encode import Backend, Encoder, SpecialStrings, open_encoder
from megatron_exp.shards.tokenizer import Tokenizer

_FEW = 2_000
"""Texts that the reference library has encoded before loading another one begins to pay."""
_CHECK_EVERY = 1_000


class PlanTokenizer:
    """What `experiments.context.TokenizerLike` asks for. After the first `few` texts the bulk encoder of `preprocess` takes over.

    One text in a thousand is encoded by the reference library, too, and every text with the string of a special token by that library alone.

    Raises:
        UserError: from `encode`, where the two differ.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend = "auto", few: int = _FEW):
        self._tokenizer, self._backend, self._few = tokenizer, backend, few
        self._specials = SpecialStrings(list(tokenizer.special_strings))
        self._num_encoded = 0

    @property
    def vocabulary_size(self) -> int:
        return self._tokenizer.vocabulary_size

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def special_ids(self) -> frozenset[int]:
        return self._tokenizer.special_ids

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text; strings like `<|endoftext|>` in it stay text."""
        self._num_encoded += 1
        if self._num_encoded <= self._few or self._bulk.is_reference or self._specials.count(text):
            return self._tokenizer.encode(text)
        ids = self._bulk.encode_one(text)
        if self._num_encoded % _CHECK_EVERY == 0 and not np.array_equal(ids, self._tokenizer.encode(text)):
            raise UserError(
                f"{self._bulk.name} gives other token ids than the reference library for the text {text[:40]!r}... of an experiment, so nothing that "
                "was encoded so far can be trusted. Plan again with --backend reference."
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, special tokens included."""
        return self._tokenizer.decode(ids)

    @cached_property
    def _bulk(self) -> Encoder:
        return open_encoder(self._tokenizer, self._backend, "plain")
