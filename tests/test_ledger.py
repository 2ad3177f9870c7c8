"""The ledger survives being cut anywhere, names damage, and counts the last attempt of a step."""

from pathlib import Path

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.ledger import RECORD, Entry, LedgerWriter, read_ledger, slot_hash, step_hash


def entry(step: int, attempt: int = 1, value: int = 0) -> Entry:
    return Entry(attempt, step, step * 8, 8, step_hash([step, value]))


def written(path: Path, entries: list[Entry]) -> Path:
    writer = LedgerWriter(path)
    for one in entries:
        writer.append(one)
    writer.close()
    return path


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    entries = [entry(step) for step in range(5)]
    ledger = read_ledger(written(tmp_path / "ledger.bin", entries))
    assert ledger.steps() == entries
    assert (ledger.damaged, ledger.torn_bytes) == ((), 0)


def test_a_file_cut_at_any_byte_keeps_the_whole_records_before(tmp_path: Path) -> None:
    entries = [entry(step) for step in range(3)]
    data = written(tmp_path / "whole.bin", entries).read_bytes()
    for length in range(RECORD.itemsize, len(data)):
        path = tmp_path / "cut.bin"
        path.write_bytes(data[:length])
        num_whole, torn_bytes = divmod(length - RECORD.itemsize, RECORD.itemsize)
        ledger = read_ledger(path)
        assert (ledger.steps(), ledger.torn_bytes) == (entries[:num_whole], torn_bytes)


def test_the_next_attempt_cuts_a_torn_tail_off_and_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.bin", [entry(0), entry(1)])
    path.write_bytes(path.read_bytes()[:-5])
    written(path, [entry(1, attempt=2), entry(2, attempt=2)])
    ledger = read_ledger(path)
    assert ledger.steps() == [entry(0), entry(1, attempt=2), entry(2, attempt=2)]
    assert ledger.torn_bytes == 0


def test_two_writers_at_once_lose_no_record(tmp_path: Path) -> None:
    first, second = LedgerWriter(tmp_path / "ledger.bin"), LedgerWriter(tmp_path / "ledger.bin")
    for step in range(3):
        first.append(entry(step))
        second.append(entry(step, attempt=2))
    assert len(read_ledger(tmp_path / "ledger.bin").records) == 6


def test_a_tail_of_zeros_left_by_a_power_cut_is_a_torn_tail(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.bin", [entry(0)])
    path.write_bytes(path.read_bytes() + bytes(2 * RECORD.itemsize))
    ledger = read_ledger(path)
    assert (ledger.steps(), ledger.torn_bytes) == ([entry(0)], 2 * RECORD.itemsize)


def test_a_flipped_bit_anywhere_in_a_record_is_named(tmp_path: Path) -> None:
    data = bytearray(written(tmp_path / "whole.bin", [entry(step) for step in range(3)]).read_bytes())
    for position in range(2 * RECORD.itemsize, 3 * RECORD.itemsize):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        path = tmp_path / "flipped.bin"
        path.write_bytes(flipped)
        ledger = read_ledger(path)
        assert ledger.damaged == (1,)
        assert ledger.steps() == [entry(0), entry(2)]


def test_the_last_attempt_of_a_step_counts_in_whatever_order_the_records_stand(tmp_path: Path) -> None:
    first, second = entry(3, attempt=1, value=1), entry(3, attempt=2, value=2)
    for number, order in enumerate(([first, second, entry(4)], [entry(4), second, first])):
        assert read_ledger(written(tmp_path / f"{number}.bin", order)).steps() == [second, entry(4)]


def test_an_empty_ledger_has_no_steps(tmp_path: Path) -> None:
    assert read_ledger(written(tmp_path / "ledger.bin", [])).steps() == []


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    path.write_bytes(b"something else, longer than a header would have to be")
    with pytest.raises(UserError, match="ledger.bin"):
        read_ledger(path)
    with pytest.raises(UserError, match="does not exist"):
        read_ledger(tmp_path / "none.bin")


def test_slot_hash_sees_id_every_token_and_every_mask_position_but_not_the_integer_type() -> None:
    tokens, mask = np.arange(9, dtype=np.int32), np.ones(8, dtype=np.uint8)
    hashes = {slot_hash(5, tokens, mask), slot_hash(6, tokens, mask)}
    for position in range(9):
        hashes.add(slot_hash(5, np.where(np.arange(9) == position, 77, tokens), mask))
    for position in range(8):
        hashes.add(slot_hash(5, tokens, np.where(np.arange(8) == position, 0, mask)))
    assert len(hashes) == 2 + 9 + 8
    assert slot_hash(5, tokens.astype(np.int64), mask.astype(bool)) == slot_hash(5, tokens, mask)


def test_hashes_never_change() -> None:
    tokens, mask = np.arange(5, dtype=np.int32), np.array([1, 1, 0, 1], dtype=np.uint8)
    assert slot_hash(7, tokens, mask) == GOLDEN_SLOT
    assert step_hash([1, 2, 2**64 - 1]).hex() == GOLDEN_STEP
    assert step_hash(np.array([1, 2, 2**64 - 1], dtype=np.uint64)).hex() == GOLDEN_STEP


GOLDEN_SLOT = 8743843922794091155
GOLDEN_STEP = "8c3bed287fc4cd8e43bede0fc23c4aee"
