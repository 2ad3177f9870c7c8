"""Is a text garbage? A judge that needs no model."""

import string
import zlib

_ORDINARY = set(string.punctuation)
_FEWEST_BYTES_TO_COMPRESS = 100
"""A shorter text does not compress, whatever it says."""


def unusual_share(text: str) -> float:
    """Share of characters that are neither letters nor digits of any script, nor white space, nor ASCII punctuation; 0 for an empty text."""
    if not text:
        return 0.0
    return sum(not (one.isalnum() or one.isspace() or one in _ORDINARY) for one in text) / len(text)


def compression_ratio(text: str) -> float:
    """Bytes after over bytes before zlib; random bytes stay near 1. NaN where the text is too short to say."""
    raw = text.encode("utf-8", errors="replace")
    return len(zlib.compress(raw, 9)) / len(raw) if len(raw) >= _FEWEST_BYTES_TO_COMPRESS else float("nan")


def is_garbage(text: str, most_unusual: float, least_compressible: float) -> bool:
    """Whether a text has more than `most_unusual` unusual characters, or stays above `least_compressible` of its size; an empty text is no garbage."""
    return unusual_share(text) > most_unusual or compression_ratio(text) > least_compressible
