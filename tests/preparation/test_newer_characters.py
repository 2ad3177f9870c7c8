"""Two libraries with two versions of Unicode, compared character by character."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.preparation.newer_characters import holds_newer_characters
from megatron_exp.preparation.preprocess_encode import GigatokenEncoder, ReferenceEncoder, open_encoder
from megatron_exp.shards.tokenizer import Tokenizer
from tests.shards.making import tokenizer_bytes

PATTERNS = {
    "gpt2": None,  # the tokenizer's own
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
FRAMES = ("a{c}(d b", "x {c}y", "1{c}2 {c}{c}'s", "\n{c}\n {c}", "({c}A{c}b")


def tokenizer_with(directory: Path, pattern: str | None) -> Tokenizer:
    content = json.loads(tokenizer_bytes(500))
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content))
    return Tokenizer.load(path)


def test_letters_of_the_newest_unicode_have_the_ids_of_the_reference(tmp_path):
    tokenizer = tokenizer_with(tmp_path, PATTERNS["gpt4"])
    fast, reference = open_encoder(tokenizer, "gigatoken", "plain"), ReferenceEncoder(tokenizer, "plain")
    texts = ["\ua7f1(dP=", "plain", "caf\u00e9 \U0001f600", "\u088f\U000323b0 d", ""]
    assert [holds_newer_characters(text) for text in texts] == [True, False, False, True, False]
    assert all(np.array_equal(fast.encode_one(text), reference.encode_one(text)) for text in texts)
    together, apart = fast.encode(texts), [reference.encode_one(text) for text in texts]
    assert np.array_equal(together.ids, np.concatenate(apart)) and together.lengths.tolist() == [len(ids) for ids in apart]


@given(st.text())
def test_a_text_is_left_to_the_reference_if_one_of_its_characters_is(text):
    assert holds_newer_characters(text) == any(holds_newer_characters(character) for character in text)


def test_characters_of_unicode_14_are_known_to_all_and_unassigned_ones_to_none():
    assert not any(map(holds_newer_characters, ["\u00e9", "\u2019", "\U0001f600", "\U00020000", "\ue000", "\ud800", "\U000f0000", "\u6f22"]))
    assert all(map(holds_newer_characters, ["\u0378", "\ufdd0", "\U0003ffff", "\U000e0fff", "\u0c5c", "\U000323b0", "\ud83d\u0378"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_every_character_has_the_ids_of_the_reference_or_is_left_to_it(tmp_path, name):
    tokenizer = tokenizer_with(tmp_path, PATTERNS[name])
    fast, reference = GigatokenEncoder(tokenizer, "plain", parallel=True), tokenizer.model._library
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and not holds_newer_characters(chr(code))]
    for start in range(0, len(codes), 20_000):
        texts = ["|".join(frame.format(c=chr(code)) for frame in FRAMES) for code in codes[start : start + 20_000]]
        encoded = fast.encode(texts)
        wanted = [found.ids for found in reference.encode_batch_fast(texts, add_special_tokens=False)]
        parts = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        different = [text for text, own, right in zip(texts, parts, wanted, strict=True) if own.tolist() != right]
        assert not different
