"""Characters that one library may know and another may not, by the version of Unicode each was built with.

Whether a character is a letter decides where a tokenizer cuts a text. gigatoken 0.10 follows Unicode 17, tokenizers 0.23 Unicode 16: texts with letters of
2025 have other ids in each (`tests/preparation/test_newer_characters.py` compares them character by character). A text with a character that is no part of
Unicode 16 is therefore left to the library that the tokenizer file was made for.
"""

import functools
import unicodedata

import numpy as np

_FIRST_NEWER = 0x378
"""The first character that Unicode 16 leaves unassigned."""
_EMPTY_PLANES = range(0x33480, 0xE0000)
_ASSIGNED = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0xD800, 0xF900), range(0x20000, 0x2A6E0))
"""Long blocks that Unicode 14 has filled (ideographs, Hangul), surrogates and private use: they need no looking up."""
_PART = 1 << 20
_NEW_IN_17 = """
    88f c5c cdc a7ce-a7cf a7d2 a7d4 a7f1 10940-10959 10ec5-10ec7 11b60-11b67 11db0-11ddb 11de0-11de9 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff
    18d09-18d1e 18d80-18df2 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479
"""
"""Letters, marks and numbers, for a Python that knows them."""


def holds_newer_characters(text: str) -> bool:
    """Whether libraries may disagree about a character of the text."""
    # By parts: what is made of a text here takes several times its memory.
    return not text.isascii() and any(_part_holds(text[start : start + _PART]) for start in range(0, len(text), _PART))


def _part_holds(text: str) -> bool:
    if text.isascii():
        return False
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    wide = units[units >= _FIRST_NEWER]
    return bool(_is_newer()[wide].any()) or bool(_is_newer()[_beyond_16_bits(wide)].any())


def _beyond_16_bits(units: np.ndarray) -> np.ndarray:
    """int64: the characters that take two units, a high surrogate and a low one."""
    first, second = units[:-1].astype(np.int64) - 0xD800, units[1:].astype(np.int64) - 0xDC00
    is_pair = (first >= 0) & (first < 0x400) & (second >= 0) & (second < 0x400)
    return 0x10000 + (first[is_pair] << 10) + second[is_pair]


@functools.cache
def _is_newer() -> np.ndarray:
    """bool [code points]: not assigned in the Unicode of this Python (14 to 16), or new in 17."""
    newer = np.zeros(0x110000, bool)
    newer[_EMPTY_PLANES.start : _EMPTY_PLANES.stop] = True
    unsure = np.ones(_EMPTY_PLANES.start, bool)
    for block in _ASSIGNED:
        unsure[block.start : block.stop] = False
    for code in (*np.flatnonzero(unsure).tolist(), *range(_EMPTY_PLANES.stop, 0xE1000)):
        newer[code] = unicodedata.category(chr(code)) == "Cn"
    newer[0xE1000:0xF0000] = True
    for part in _NEW_IN_17.split():
        first, _, last = part.partition("-")
        newer[int(first, 16) : int(last or first, 16) + 1] = True
    return newer
