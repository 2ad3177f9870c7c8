"""Randomness that is addressed, not consumed: every number is a pure function of a seed, names and indices.

The source is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written out
here so that no library release can change a result. A key is a 64-bit hash of the root seed and a list of names, never
of list positions; the 128-bit counter holds the indices (item, repetition, draw, ...). The same integer words are made
on any device (`megatron_exp.model.random` holds the torch twin).
"""

from dataclasses import dataclass

import numpy as np
import xxhash

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_ROUNDS = 10


def key(root_seed: int, *names: str | int) -> int:
    """The 64-bit key of a root seed and a path of names, e.g. `key(0, "placement", "canaries")`.

    Names are length-prefixed and typed, so that ("ab", "c") and ("a", "bc"), or "1" and 1, differ.
    """
    parts = [f"i{root_seed}"] + [f"i{name}" if isinstance(name, int) else f"s{name}" for name in names]
    encoded = b"".join(len(raw).to_bytes(4, "little") + raw for raw in (part.encode() for part in parts))
    return xxhash.xxh3_64_intdigest(encoded)


def philox(key: int | np.ndarray, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of 64-bit keys and four 32-bit counter words, which broadcast.

    Returns uint32 [..., 4].
    """
    keys = np.asarray(key, dtype=np.uint64)
    k0, k1 = keys & _LOW_32, keys >> _SHIFT_32
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) & _LOW_32 for c in (c0, c1, c2, c3)))
    for round_index in range(_ROUNDS):
        r0 = (k0 + np.uint64(round_index * _WEYL_0)) & _LOW_32
        r1 = (k1 + np.uint64(round_index * _WEYL_1)) & _LOW_32
        p0, p1 = _MULTIPLIER_0 * x0, _MULTIPLIER_1 * x2
        x0, x1, x2, x3 = (p1 >> _SHIFT_32) ^ x1 ^ r0, p1 & _LOW_32, (p0 >> _SHIFT_32) ^ x3 ^ r1, p0 & _LOW_32
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)


def words64(key: int | np.ndarray, index: np.ndarray, stream: int | np.ndarray = 0) -> np.ndarray:
    """One uint64 word per 64-bit index; `stream` (64-bit) separates uses of one key. Shape: that of the broadcast."""
    index = np.asarray(index, dtype=np.uint64)
    stream = np.asarray(stream, dtype=np.uint64)
    raw = philox(key, index, index >> _SHIFT_32, stream, stream >> _SHIFT_32).astype(np.uint64)
    return raw[..., 0] | (raw[..., 1] << _SHIFT_32)


def multiply_high(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """The upper 64 bits of the 128-bit product of uint64 arrays."""
    a, b = np.asarray(a, dtype=np.uint64), np.asarray(b, dtype=np.uint64)
    a_low, a_high, b_low, b_high = a & _LOW_32, a >> _SHIFT_32, b & _LOW_32, b >> _SHIFT_32
    middle = a_high * b_low + ((a_low * b_low) >> _SHIFT_32)
    middle_2 = a_low * b_high + (middle & _LOW_32)
    return a_high * b_high + (middle >> _SHIFT_32) + (middle_2 >> _SHIFT_32)


@dataclass(frozen=True)
class Words:
    """The words of one key, with the few distributions this project uses. Every method is pure.

    `stream` numbers independent sequences below the same key (an item, a repetition).
    """

    key: int

    @classmethod
    def of(cls, root_seed: int, *names: str | int) -> "Words":
        return cls(key(root_seed, *names))

    def child(self, *names: str | int) -> "Words":
        """The words of a path below this one."""
        return Words(key(self.key, *names))

    def words(self, num: int, stream: int = 0) -> np.ndarray:
        """uint64 [num]."""
        return words64(self.key, np.arange(num, dtype=np.uint64), stream)

    def integers(self, num: int, high: int | np.ndarray, stream: int = 0) -> np.ndarray:
        """int64 [num] uniform on [0, high); the deviation from uniform is below high / 2**64."""
        if np.any(np.asarray(high) < 1):
            raise ValueError(f"integers needs high >= 1, got {high}")
        return multiply_high(self.words(num, stream), high).astype(np.int64)

    def one_each(self, high: int, streams: np.ndarray) -> np.ndarray:
        """int64 [n] on [0, high): what `integers(1, high, stream)` gives for each of n streams, at once."""
        return multiply_high(words64(self.key, np.zeros(1, dtype=np.uint64), streams), high).astype(np.int64)

    def uniforms(self, num: int, stream: int = 0) -> np.ndarray:
        """float64 [num] on the open interval (0, 1), 53 bits."""
        return ((self.words(num, stream) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normals(self, num: int, stream: int = 0) -> np.ndarray:
        """float64 [num], standard normal by Box-Muller."""
        uniforms = self.uniforms(2 * num, stream).reshape(num, 2)
        return np.sqrt(-2.0 * np.log(uniforms[:, 0])) * np.cos(2.0 * np.pi * uniforms[:, 1])

    def permutation(self, num: int, stream: int = 0) -> np.ndarray:
        """int64 [num]: a uniform permutation, by sorting words (ties, below num**2 / 2**65, go to the lower index)."""
        return np.argsort(self.words(num, stream), kind="stable").astype(np.int64)

    def choice(self, num: int, size: int, stream: int = 0) -> np.ndarray:
        """int64 [size]: distinct members of range(num), in random order."""
        if size > num:
            raise ValueError(f"cannot choose {size} of {num}")
        return self.permutation(num, stream)[:size]
