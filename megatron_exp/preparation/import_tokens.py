"""Comparing tokens with their index while they pass by: every id exists, and every document ends with EOS."""

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.preparation.import_inputs import TokenFile


class TokenCheck:
    """Sees the bytes of a token file from first to last.

    ends: int64 [num_documents], where documents end, in tokens. In a dolma array an EOS stands only there; Megatron's own tool
    also makes one of the string `<|endoftext|>` in a text, so inside documents of a Megatron shard they are counted.
    """

    def __init__(self, tokens: TokenFile, ends: np.ndarray, vocabulary_size: int, eos_id: int):
        self.ends = ends
        self.num_inner_eos = 0
        self.documents_with_inner_eos = 0
        self._tokens = tokens
        self._vocabulary_size, self._eos_id = vocabulary_size, eos_id
        self._position = 0
        self._next = 0
        self._rest = b""
        self._last_with_inner = -1

    def add(self, block: bytes, dtype: np.dtype) -> int:
        """Check the next bytes; the number of tokens that they complete. UserError names the first document that is wrong."""
        data = self._rest + block if self._rest else block
        num = len(data) // dtype.itemsize
        self._rest = data[num * dtype.itemsize :]
        # As unsigned numbers, negative ids are above any vocabulary too.
        ids = np.frombuffer(data, dtype=f"<u{dtype.itemsize}", count=num)
        if num:
            self._check_ids(ids)
            self._check_ends(ids)
        self._position += num
        return num

    def _check_ids(self, ids: np.ndarray) -> None:
        if int(ids.max()) < self._vocabulary_size:
            return
        first = int(np.flatnonzero(ids >= self._vocabulary_size)[0])
        place = self._position + first
        document = int(np.searchsorted(self.ends, place, side="right"))
        raise UserError(
            f"{self._tokens.path}: token {place}, in document {document} (from 0), has the id {int(ids[first])}; this tokenizer has {self._vocabulary_size} "
            "ids. The tokens come from another tokenizer, or the file is damaged. Give the tokenizer they were made with, or fetch the file again."
        )

    def _check_ends(self, ids: np.ndarray) -> None:
        stop = int(np.searchsorted(self.ends, self._position + len(ids), side="right"))
        lasts = self.ends[self._next : stop] - 1 - self._position
        wrong = np.flatnonzero(ids[lasts] != self._eos_id)
        if len(wrong):
            self._refuse_end(self._next + int(wrong[0]), int(ids[lasts[wrong[0]]]))
        is_eos = ids == self._eos_id
        if int(np.count_nonzero(is_eos)) != len(lasts):
            is_eos[lasts] = False
            self._count_inner(np.flatnonzero(is_eos) + self._position)
        self._next = stop

    def _refuse_end(self, document: int, last: int) -> None:
        reason = (
            "The index beside it is that of another array, or the tokenizer is not the one it was made with."
            if self._tokens.layout == "dolma"
            else "Documents must end with EOS: make the shard again with it (in Megatron's preprocess_data.py, --append-eod), or give its own tokenizer."
        )
        raise UserError(
            f"{self._tokens.path}: document {document} (from 0) ends with id {last} at token {int(self.ends[document]) - 1}, not with EOS "
            f"(id {self._eos_id}). {reason}"
        )

    def _count_inner(self, places: np.ndarray) -> None:
        documents = np.searchsorted(self.ends, places, side="right")
        if self._tokens.layout == "dolma":
            raise UserError(
                f"{self._tokens.path}: EOS (id {self._eos_id}) stands at token {int(places[0])}, inside document {int(documents[0])} (from 0), where "
                f"{self._tokens.index} has no border. The index is that of another array, or rows are missing: fetch both again."
            )
        distinct = np.unique(documents)
        self.num_inner_eos += len(places)
        self.documents_with_inner_eos += len(distinct) - int(distinct[0] == self._last_with_inner)
        self._last_with_inner = int(distinct[-1])

    def close(self) -> None:
        """UserError unless exactly the documents of the index were seen: the file was changed while it was read."""
        if self._rest or self._position != int(self.ends[-1]) or self._next != len(self.ends):
            raise UserError(
                f"{self._tokens.path} changed while it was read: it ended after {self._position} tokens. Import it when nothing writes to it."
            )
