import os

import numpy as np
import pytest
import xxhash

from megatron_exp.errors import UserError
from megatron_exp.shards import checksums
from megatron_exp.shards.checksums import BLOCK_BYTES, BlockSums, SummedWriter, read_checked, root_of, sums_of_file

CONTENT = bytes(range(256)) * (10 * 1024) + b"the end"  # two and a half blocks


def test_sums_do_not_depend_on_how_the_bytes_arrive():
    expected = [xxhash.xxh3_64_intdigest(CONTENT[start : start + BLOCK_BYTES]) for start in range(0, len(CONTENT), BLOCK_BYTES)]
    for step in (1000, BLOCK_BYTES, 3 * BLOCK_BYTES):
        sums = BlockSums()
        for start in range(0, len(CONTENT), step):
            sums.update(CONTENT[start : start + step])
        assert sums.finish().tolist() == expected


def test_sums_made_while_writing_equal_those_of_the_file(tmp_path):
    writer = SummedWriter(tmp_path / "a")
    writer.write(CONTENT)
    written = writer.finish()
    assert written.num_bytes == len(CONTENT)
    assert written.root == root_of(sums_of_file(tmp_path / "a"))


def test_threads_and_short_reads_change_no_sum(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(CONTENT)
    expected = sums_of_file(tmp_path / "a")
    real = os.preadv
    monkeypatch.setattr(checksums, "_BLOCKS_PER_TASK", 1)
    monkeypatch.setattr(checksums.os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:70_001]], offset))
    assert np.array_equal(sums_of_file(tmp_path / "a", threads=3), expected)
    assert len(expected) == 3


@pytest.mark.parametrize(("start", "stop"), [(0, len(CONTENT)), (5, 6), (BLOCK_BYTES - 1, BLOCK_BYTES + 1), (BLOCK_BYTES, 2 * BLOCK_BYTES), (7, 7)])
def test_a_checked_read_gives_exactly_the_range(tmp_path, start, stop):
    (tmp_path / "a").write_bytes(CONTENT)
    assert b"".join(read_checked(tmp_path / "a", start, stop, sums_of_file(tmp_path / "a"))) == CONTENT[start:stop]


def test_a_checked_read_refuses_a_changed_block_and_only_that_block(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    sums = sums_of_file(tmp_path / "a")
    changed = bytearray(CONTENT)
    changed[BLOCK_BYTES + 3] ^= 1
    (tmp_path / "a").write_bytes(changed)
    assert b"".join(read_checked(tmp_path / "a", 0, BLOCK_BYTES, sums)) == CONTENT[:BLOCK_BYTES]
    with pytest.raises(UserError, match=f"byte {BLOCK_BYTES}"):
        list(read_checked(tmp_path / "a", 0, len(CONTENT), sums))


def test_an_empty_stream_has_no_blocks():
    assert BlockSums().finish().dtype == np.uint64
    assert len(BlockSums().finish()) == 0
