"""Texts to token ids in bulk: gigatoken where it gives the reference library's ids, else that library itself."""

import logging
import os.path
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import gigatoken
import numpy as np
import orjson

from megatron_exp.errors import UserError
from megatron_exp.preparation.newer_characters import holds_newer_characters
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.shards.tokenizer_models import HuggingFaceModel

logger = logging.getLogger(__name__)

Backend = Literal["auto", "gigatoken", "reference"]
SpecialPolicy = Literal["plain", "special", "reject"]

# Scripts, normalisation forms, joiners, white space, digits, contractions, control characters, long runs: where tokenizers differ.
_PROBES = (
    "Hello world, it's 12345.678 o'clock!  \n\n\t x = {'a': [1, 2]}  # comment\r\n",
    "na\u00efve cafe\u0301 \ufb01ne \u0130stanbul \u017f \u1e9e stra\u00dfe \u212b \u00bd",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3068 \u4e2d\u6587\uff0c\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f \ufeff\u2028\u00a0\u3000\u200b",
    "\x00\x01\x7f \x1b[0m",
    " ",
    "\n",
    "  leading and trailing  ",
    "a" * 300 + " " * 300 + "=" * 300 + "\u4e00" * 50,
    "<0x0A> \u2581 <0x00>\u2581\u2581x",
    "C\u0301\u0301 \u2581\u0301 \u3000\u0301x \u00a0\u200d a\u0301\u200d",
)


class Encoded(NamedTuple):
    """A batch of documents: ids uint32 or int32 [total], one after another; lengths int64 [documents]."""

    ids: np.ndarray
    lengths: np.ndarray


class Encoder(Protocol):
    """Turns texts into ids. name: library and version, for the record. is_reference: its ids need no checking."""

    name: str
    is_reference: bool

    def encode(self, texts: Sequence[str]) -> Encoded: ...

    def encode_one(self, text: str) -> np.ndarray:
        """int32 ids of one text, without what a batch costs."""
        ...


class ReferenceEncoder:
    """The library the tokenizer file was made for. Exact and slow; about 90 bytes of memory per byte of a document."""

    is_reference = True
    name = "reference"

    def __init__(self, tokenizer: Tokenizer, special: SpecialPolicy):
        self._tokenizer = tokenizer
        self._specials_as_ids = special == "special"

    def encode(self, texts: Sequence[str]) -> Encoded:
        parts = self._tokenizer.encode_batch(texts, specials_as_ids=self._specials_as_ids)
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.int32), lengths)

    def encode_one(self, text: str) -> np.ndarray:
        return self.encode([text]).ids


class GigatokenEncoder:
    """gigatoken's batch encoder for strings. Its file readers are never used: they drop documents.

    parallel: use all cores for each batch; the ids are the same. Two kinds of text go to the reference: those with characters that only one of the libraries
    may know (`newer_characters`), and for a SentencePiece model those with the string of a control symbol, which gigatoken makes that symbol of.

    RuntimeError or ValueError where gigatoken does not support the model.
    """

    is_reference = False
    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, special: SpecialPolicy, *, parallel: bool = False):
        self._parallel = parallel
        data = tokenizer.model.data
        if isinstance(tokenizer.model, HuggingFaceModel):
            self._library = gigatoken.Tokenizer.from_json(data if special == "special" else _without_specials(data))
        else:
            self._library = gigatoken.Tokenizer.from_sentencepiece(data)
        self._reference = ReferenceEncoder(tokenizer, special)
        self._controls = None if isinstance(tokenizer.model, HuggingFaceModel) else SpecialStrings(list(tokenizer.special_strings))

    def encode(self, texts: Sequence[str]) -> Encoded:
        encoded = self._encode(texts)
        numbers = [number for number, text in enumerate(texts) if self._controls.count(text)] if self._controls else []
        if holds_newer_characters("".join(text for text in texts if not text.isascii())):
            numbers += [number for number, text in enumerate(texts) if holds_newer_characters(text)]
        if not numbers:
            return encoded
        parts = np.split(encoded.ids.astype(np.int32), np.cumsum(encoded.lengths)[:-1])
        for number in numbers:
            parts[number] = self._reference.encode([texts[number]]).ids
        return Encoded(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))

    def encode_one(self, text: str) -> np.ndarray:
        if holds_newer_characters(text) or (self._controls and self._controls.count(text)):
            return self._reference.encode_one(text)
        return self._library.encode(text).astype(np.int32)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        layout = self._library.encode_batch(list(texts), parallel=self._parallel).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        assert len(offsets) == len(texts) + 1, f"gigatoken returned {len(offsets) - 1} documents for {len(texts)}"
        return Encoded(ids, np.diff(offsets))


def _without_specials(data: bytes) -> bytes:
    """A tokenizer.json whose special tokens no longer match in text (added tokens that are not special still do)."""
    content = orjson.loads(data)
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token["special"]]
    return orjson.dumps(content)


def open_encoder(tokenizer: Tokenizer, backend: Backend, special: SpecialPolicy, *, parallel: bool = False) -> Encoder:
    """The encoder of a backend; `auto` takes gigatoken where it supports the model and agrees with the reference on probes.

    Either gives the same ids, so the choice is one of speed. UserError where `gigatoken` is asked for and cannot serve.
    """
    reference = ReferenceEncoder(tokenizer, special)
    if backend == "reference":
        return reference
    try:
        fast = GigatokenEncoder(tokenizer, special, parallel=parallel)
        refusal = _disagreement(fast, reference, [*_PROBES, *_special_probes(tokenizer)])
    except (RuntimeError, ValueError) as error:
        refusal = f"it refuses the model: {str(error).splitlines()[0]}"
    if not refusal:
        return fast
    if backend == "gigatoken":
        raise UserError(f"gigatoken cannot encode for this tokenizer: {refusal}. Use the backend `auto` or `reference`.")
    logger.info("encoding with the reference library, because of gigatoken %s", refusal)
    return reference


class Encoders:
    """A loaded tokenizer with its bulk encoder and the reference.

    Pickled as its path and options: each process loads its own, for one thread, because the processes share the cores.
    """

    def __init__(self, path: Path, backend: Backend, special: SpecialPolicy, *, parallel: bool = False):
        self._arguments, self._parallel = (path, backend, special), parallel
        self.tokenizer = Tokenizer.load(path)
        self.special: SpecialPolicy = special
        self.reference = ReferenceEncoder(self.tokenizer, special)
        self.reference.encode([""])  # policies that the model cannot follow are refused here, before any work

    @cached_property
    def bulk(self) -> Encoder:
        """The encoder of the backend; loaded when it is first used, which a process that leaves the work to others never does."""
        _, backend, special = self._arguments
        return open_encoder(self.tokenizer, backend, special, parallel=self._parallel)

    def __reduce__(self) -> tuple[type["Encoders"], tuple[Path, Backend, SpecialPolicy]]:
        return Encoders, self._arguments


def _special_probes(tokenizer: Tokenizer) -> list[str]:
    return [f"a {string} b{string}\n{string[:-1]}" for string in tokenizer.special_strings]


def _disagreement(fast: Encoder, reference: Encoder, probes: Sequence[str]) -> str:
    differing = [probe for probe in probes if not np.array_equal(fast.encode([probe]).ids, reference.encode([probe]).ids)]
    return f"its ids differ from the reference library's, first for {differing[0][:40]!r}" if differing else ""


class SpecialStrings:
    """Finds the strings of special tokens in texts. Most texts have none, so a cheap test of shared beginnings comes first."""

    def __init__(self, strings: Sequence[str]):
        groups: dict[str, list[str]] = {}
        for string in filter(None, strings):
            groups.setdefault(string[:2], []).append(string)
        self._beginnings = [os.path.commonprefix(group) for group in groups.values()]
        longest_first = sorted(filter(None, strings), key=lambda string: (-len(string), string))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def count(self, text: str) -> int:
        """How many occurrences the text holds."""
        for beginning in self._beginnings:
            if beginning in text:
                return sum(1 for _ in self._pattern.finditer(text))
        return 0
