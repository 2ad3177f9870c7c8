r"""Text from data, made safe to show: on a terminal, in a page, in a log.

Corpora and payloads hold escape sequences that move a cursor, and bidirectional or zero-width characters that make a line read
otherwise than it is stored. They are shown as what they are: `\x1b`, `\u202e`, `\U000e0001`.
"""

import unicodedata
from functools import lru_cache


def visible(text: str, keep: str = "\n\t") -> str:
    r"""TEXT with every control, format, private and unassigned character written as a Python escape, except those in `keep`.

    A backslash that stands in the text stays as it is, so the result is for reading, not for parsing back.
    """
    if text.isprintable():
        return text
    return "".join(character if character in keep else _shown(character) for character in text)


def visible_line(text: str) -> str:
    r"""Like `visible`, on one line: line breaks and tabs are escaped too."""
    return visible(text, keep="")


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    if character in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
