"""Input files as bytes: the codec is told by magic bytes, every member and frame is read, a cut or damaged stream is an error.

Decompression is ours because the usual shortcuts lose data without a word: readers that stop after the first gzip member or
zstd frame, and zstandard's `stream_reader`, which takes a truncated frame for the end of the file.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import xxhash
import zstandard

from megatron_exp.errors import UserError

Codec = Literal["plain", "gzip", "zstd"]

MAX_RECORD_BYTES = 104 << 20
"""Longest line, text file or text of Parquet that is held in memory; longer ones are rejected as too_long.

Text and tokens of one document take up to ten times its bytes; this limit keeps a process within 1.5 GiB.
"""

_BLOCK_BYTES = 1 << 20
# Compressed bytes decoded at a time. A hostile zstd block gives 128 KiB for 4 bytes, so this bounds one step's output at 256 MiB.
_STEP_BYTES = 8 << 10
_HEAD_BYTES = 8
_REFUSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf": "7z"}


class InputReader:
    """The stored bytes of a file, counted, hashed and reported while they are read."""

    def __init__(self, path: str | Path, on_bytes: Callable[[int], None] | None = None):
        self.path = Path(path)
        self.num_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._on_bytes = on_bytes

    def blocks(self) -> Iterator[bytes]:
        """The bytes as stored, in blocks of a MiB."""
        with open(self.path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                self._hash.update(block)
                self.num_bytes += len(block)
                if self._on_bytes:
                    self._on_bytes(len(block))
                yield block

    @property
    def hash(self) -> str:
        """Hex xxh3_128 of the bytes read so far."""
        return self._hash.hexdigest()


def codec_of(path: Path) -> tuple[Codec, bytes]:
    """The codec of a file and its first bytes; UserError for a codec that is known and not supported."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    for magic, name in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is compressed with {name}, which is not read. Decompress it, or compress it with gzip or zstd.")
    if head[:2] == b"\x1f\x8b":
        return "gzip", head
    # Skippable frames (0x184D2A50 to 5F) stand first in files made by pzstd and others.
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd", head
    return "plain", head


def decompressed(reader: InputReader, codec: Codec) -> Iterator[bytes]:
    """The content of a file in pieces.

    Raises:
        UserError: The compressed stream is damaged or ends in the middle.
    """
    if codec == "plain":
        yield from reader.blocks()
        return
    # Window sizes up to zstd's own default (128 MiB) are accepted; more would break the memory bound.
    new_frame: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj if codec == "zstd" else lambda: zlib.decompressobj(wbits=31)
    try:
        yield from _frames(reader, new_frame, padding=b"\0" if codec == "gzip" else b"")
    except (zlib.error, zstandard.ZstdError) as error:
        raise UserError(
            f"{reader.path} is damaged: its {codec} stream cannot be decoded near byte {reader.num_bytes} ({error}). How many documents follow is "
            "unknown, so nothing of it is used. Fetch or make the file again."
        ) from error


def _frames(reader: InputReader, new_frame: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """Decode frame after frame (gzip: member after member); zeros after a gzip member are padding, as in gzip itself."""
    frame = None
    for block in reader.blocks():
        for start in range(0, len(block), _STEP_BYTES):
            data = block[start : start + _STEP_BYTES]
            while data:
                if frame is None:
                    data = data.lstrip(padding) if padding else data
                    if not data:
                        break
                    frame = new_frame()
                if content := frame.decompress(data):
                    yield content
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    if frame is not None:
        raise UserError(
            f"{reader.path} is cut short: its compressed stream ends in the middle, after {reader.num_bytes} bytes. How many documents are missing is "
            "unknown, so nothing of it is used. Fetch or make the file again."
        )


def first_bytes(path: Path, codec: Codec, limit: int) -> bytes:
    """Up to `limit` bytes from the start of the content; less where a damaged stream ends earlier (reading it will tell)."""
    collected = b""
    try:
        for piece in decompressed(InputReader(path), codec):
            collected += piece
            if len(collected) >= limit:
                break
    except UserError:
        return collected
    return collected[:limit]


def lines(pieces: Iterator[bytes]) -> Iterator[list[bytes | None]]:
    r"""Lines (ended by \n, or by the end of the content) in lists; None stands for a line above MAX_RECORD_BYTES.

    The start of a line that spans pieces is kept in parts and joined once, so that a long line costs linear time. Such a line is alone in
    its list, which is then the only place that holds it.
    """
    tail: list[bytes] = []
    tail_bytes = 0
    for piece in _coalesced(pieces):
        *ended, rest = piece.split(b"\n")
        if ended:
            yield [_joined(tail, tail_bytes, ended[0])]
            tail_bytes = 0
            yield list(ended[1:])
        tail_bytes += len(rest)
        if tail_bytes <= MAX_RECORD_BYTES:
            tail.append(rest)
        else:
            tail.clear()
    if tail_bytes:
        yield [_joined(tail, tail_bytes, b"")]


def whole(pieces: Iterator[bytes]) -> bytes | None:
    """The content of a file in one piece, or None where it is above MAX_RECORD_BYTES (it is still read to its end)."""
    parts: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        num_bytes += len(piece)
        if num_bytes <= MAX_RECORD_BYTES:
            parts.append(piece)
        else:
            parts.clear()
    return b"".join(parts) if num_bytes <= MAX_RECORD_BYTES else None


def _joined(tail: list[bytes], tail_bytes: int, end: bytes) -> bytes | None:
    """The whole line; its parts are given up."""
    line = b"".join([*tail, end]) if tail_bytes + len(end) <= MAX_RECORD_BYTES else None
    tail.clear()
    return line


def _coalesced(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to about a MiB: decoders give small ones, and splitting has a fixed cost."""
    waiting: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        waiting.append(piece)
        num_bytes += len(piece)
        if num_bytes >= _BLOCK_BYTES:
            yield b"".join(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield b"".join(waiting)
