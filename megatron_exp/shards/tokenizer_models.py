"""The two kinds of tokenizer files: a Hugging Face tokenizer.json and a SentencePiece .model, behind one set of methods."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import sentencepiece
import tokenizers

from megatron_exp import fingerprint
from megatron_exp.errors import UserError

_EOS_STRINGS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<｜end▁of▁sentence｜>")
"""Strings that published tokenizers use to end a document; exactly one of them must exist where no configuration names the EOS."""


class TokenizerModel(Protocol):
    """A tokenizer file and the library it was made for. Both libraries here are the reference for their format."""

    data: bytes
    file_name: str
    vocabulary_size: int
    eos_id: int
    special_strings: dict[str, int]
    fingerprint: str

    def encode_batch(self, texts: Sequence[str], *, specials_as_ids: bool) -> list[np.ndarray]:
        """int32 ids of each text, nothing added; special strings in the text become their ids only where asked."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class HuggingFaceModel:
    """A tokenizer.json.

    The file does not say which token ends a document: `eos` (from tokenizer_config.json) does, or the one well-known string in it.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, path: Path, eos: str | None):
        self.data = data
        content = _parse(data, path)
        if content["model"].get("dropout"):
            raise UserError(
                f"{path} uses BPE dropout, which encodes the same text differently each time. Set model.dropout to null in the file."
            )
        try:
            self._library = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            raise UserError(
                f"{path} is not a tokenizer the `tokenizers` library can load ({error}). Give a complete tokenizer.json."
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path} has an empty vocabulary, so it can encode nothing. Give a complete tokenizer.json.")
        self.vocabulary_size = max(vocabulary.values()) + 1
        added = self._library.get_added_tokens_decoder()
        self.special_strings = {token.content: number for number, token in sorted(added.items()) if token.special}
        self.eos_string = _find_eos(path, eos, vocabulary, self.special_strings)
        self.eos_id = vocabulary[self.eos_string]
        kept = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
        self.fingerprint = fingerprint.of_parsed({"kind": "tokenizer.json", "eos": self.eos_id, "content": kept})

    def encode_batch(self, texts: Sequence[str], *, specials_as_ids: bool) -> list[np.ndarray]:
        self._library.encode_special_tokens = not specials_as_ids
        # One text at a time: a batch keeps about 90 bytes per byte of text and starts a thread on every core.
        encoded = (self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in texts)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Give a Hugging Face tokenizer.json or a SentencePiece .model.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(
            f"{path} has no `model` (an object), so it is not a Hugging Face tokenizer.json. Give the tokenizer file, not its configuration."
        )
    return content


def _find_eos(path: Path, named: str | None, vocabulary: dict[str, int], specials: dict[str, int]) -> str:
    if named is not None:
        if named not in vocabulary:
            raise UserError(
                f"The configuration beside {path} names {named!r} as eos_token, which is not in its vocabulary. Correct one of the two files."
            )
        return named
    found = [candidate for candidate in _EOS_STRINGS if candidate in specials]
    if len(found) != 1:
        what = f"several tokens that could end a document ({', '.join(found)})" if found else "no token that ends a document (EOS)"
        raise UserError(
            f"{path} has {what}. Documents must end with one known token: call the file tokenizer.json and put a tokenizer_config.json "
            'beside it with {"eos_token": "..."}, or use a tokenizer that has one.'
        )
    return found[0]


class SentencePieceModel:
    """A SentencePiece .model, encoded by the `sentencepiece` library. Its control symbols never come out of text."""

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, path: Path):
        self.data = data
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a SentencePiece model ({error}). Give a .model file or a Hugging Face tokenizer.json."
            ) from error
        self.vocabulary_size = self._library.GetPieceSize()
        self.eos_id = self._library.eos_id()
        if self.eos_id < 0:
            raise UserError(
                f"{path} has no token that ends a document: its eos_id is disabled. Train it with an EOS, or use another tokenizer."
            )
        numbers = range(self.vocabulary_size)
        marks = (n for n in numbers if self._library.IsControl(n) or self._library.IsUnknown(n))
        self.special_strings = {self._library.IdToPiece(number): number for number in marks}
        self.fingerprint = fingerprint.of_bytes(b"sentencepiece", data)

    def encode_batch(self, texts: Sequence[str], *, specials_as_ids: bool) -> list[np.ndarray]:
        if specials_as_ids:
            raise UserError(
                "A SentencePiece model never turns text into control symbols: special_in_text=special has no meaning for it. Use plain or reject."
            )
        return [np.array(self._library.EncodeAsIds(text), dtype=np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._library.DecodeIds(ids)


def configured_eos(config_path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json, or None where there is no such file or it names none."""
    if not config_path.is_file():
        return None
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path} is not valid JSON ({error}). Correct or remove it.") from error
    named = content.get("eos_token") if isinstance(content, dict) else content
    named = named.get("content") if isinstance(named, dict) else named
    if not isinstance(content, dict) or not (named is None or isinstance(named, str)):
        raise UserError(
            f"{config_path} gives {json.dumps(named)[:200]} as its eos_token, which must be one string (or an object with its `content`): documents "
            'end with one token. Write {"eos_token": "..."} with that token, or remove the file.'
        )
    return named
