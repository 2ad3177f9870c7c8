"""The tokenizer of a corpus: text to ids and back, by the library the tokenizer file was made for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import require_file, write_file
from megatron_exp.shards.tokenizer_models import HuggingFaceModel, SentencePieceModel, TokenizerModel, configured_eos

_STANDARD_NAMES = (HuggingFaceModel.file_name, SentencePieceModel.file_name)
_CONFIG_NAME = "tokenizer_config.json"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer. `encode` never adds tokens; strings like `<|endoftext|>` in a text stay text.

    vocabulary_size: largest id + 1, so that every id is below it even where ids have gaps.
    """

    model: TokenizerModel

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a Hugging Face tokenizer.json, a SentencePiece .model, or a directory that holds one of them.

        The EOS of a tokenizer.json is the `eos_token` of a tokenizer_config.json in the same directory, else the one
        well-known EOS string among its special tokens.

        Raises:
            UserError: The file is missing, not a tokenizer, or has no EOS.
        """
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in _STANDARD_NAMES if (path / name).is_file()), path / _STANDARD_NAMES[0])
        data = require_file(path, "a tokenizer.json or SentencePiece .model").read_bytes()
        if data.lstrip()[:1] != b"{":
            return cls(SentencePieceModel(data, path))
        # Only a file of the standard name owns the configuration beside it: a folder may hold several tokenizers.
        eos = configured_eos(path.with_name(_CONFIG_NAME)) if path.name in _STANDARD_NAMES else None
        return cls(HuggingFaceModel(data, path, eos))

    @property
    def vocabulary_size(self) -> int:
        return self.model.vocabulary_size

    @property
    def eos_id(self) -> int:
        return self.model.eos_id

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which ids a text becomes."""
        return self.model.fingerprint

    @property
    def special_strings(self) -> dict[str, int]:
        """The strings of special tokens and their ids."""
        return self.model.special_strings

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.model.special_strings.values()) | {self.eos_id}

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, specials_as_ids: bool = False) -> list[np.ndarray]:
        """int32 ids of each text; with `specials_as_ids` the strings of special tokens become those tokens."""
        return self.model.encode_batch(texts, specials_as_ids=specials_as_ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, special tokens included; UserError for an id outside the vocabulary."""
        numbers = np.asarray(ids, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.vocabulary_size):
            raise UserError(
                f"Token ids from {numbers.min()} to {numbers.max()} were given to a tokenizer of {self.vocabulary_size} ids. "
                "The tokens come from another tokenizer or a damaged file."
            )
        return self.model.decode(numbers.tolist())

    def save_copy(self, directory: Path) -> Path:
        """Write the tokenizer into a directory so that `load` of that directory gives the same one; returns the file."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.model.file_name
        write_file(path, self.model.data)
        if isinstance(self.model, HuggingFaceModel):
            write_file(directory / _CONFIG_NAME, orjson.dumps({"eos_token": self.model.eos_string}, option=orjson.OPT_APPEND_NEWLINE))
        return path
