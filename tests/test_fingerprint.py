import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp import fingerprint


def test_encodings_and_column_order_do_not_count_but_content_does():
    plain = pa.table({"a": pa.array([1, None, 3], pa.uint32()), "b": ["x", "y", "x"]})
    encoded = pa.table({"b": pa.chunked_array([pa.array(["x"]), pa.array(["y", "x"])]).dictionary_encode(), "a": plain["a"]})
    assert fingerprint.of_table(plain) == fingerprint.of_table(encoded)
    assert fingerprint.of_table(plain) != fingerprint.of_table(plain.set_column(0, "a", pa.array([1, 0, 3], pa.uint32())))
    assert fingerprint.of_table(plain) != fingerprint.of_table(plain.set_column(0, "a", plain["a"].cast(pa.uint64())))
    assert fingerprint.of_table(plain) != fingerprint.of_table(plain.take([1, 0, 2]))


def test_a_table_has_the_same_fingerprint_after_parquet(tmp_path):
    spans = pa.array([[{"name": "a", "start": 1}], None, []], pa.list_(pa.struct([("name", pa.string()), ("start", pa.uint32())])))
    table = pa.table(
        {"spans": spans, "kind": pa.array(["x", None, "x"]).dictionary_encode(), "rate": pa.array([None, 0.5, 1.0], pa.float32())}
    )
    pq.write_table(table, tmp_path / "table.parquet")
    assert fingerprint.of_table(pq.read_table(tmp_path / "table.parquet")) == fingerprint.of_table(table)


def test_texts_that_no_row_of_a_dictionary_has_do_not_count():
    plain = pa.table({"a": ["y", None, "x", "y"]})
    spare = pa.table({"a": pa.DictionaryArray.from_arrays(pa.array([2, None, 1, 2], pa.int32()), pa.array(["spare", "x", "y", "other"]))})
    assert fingerprint.of_table(spare) == fingerprint.of_table(plain)


def test_borders_of_parts_count():
    assert fingerprint.of_bytes(b"ab", b"c") != fingerprint.of_bytes(b"a", b"bc")


def test_key_order_of_json_does_not_count():
    assert fingerprint.of_json({"a": 1, "b": [2]}) == fingerprint.of_json({"b": [2], "a": 1})


@dataclasses.dataclass
class Holder:
    value: float


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("around", [lambda x: x, lambda x: {"a": [None, (1, x)]}, np.float32, lambda x: np.array([0.0, x]), Holder])
def test_infinity_and_nan_have_no_fingerprint_since_json_would_call_both_null(number, around):
    with pytest.raises(ValueError, match="infinity or NaN"):
        fingerprint.of_json(around(number))


def test_null_and_texts_that_say_null_have_one():
    assert fingerprint.of_json([None, {"null": "null"}, 1.5, np.array([1.0, 2.0])]) == fingerprint.of_json([None, {"null": "null"}, 1.5, [1.0, 2.0]])


def test_golden_fingerprints_never_change():
    assert fingerprint.of_json({"a": 1}) == "0cb17a3cc6ab6dec0b163dea8db678c2"
    assert fingerprint.of_table(pa.table({"a": [1, 2], "s": ["x", None]})) == "ebd79577edd950e2f5b2bd51844bbfa4"
    hashes = pa.array([b"b" * 16, None, b"a" + b"\0" * 15, b"b" * 16], pa.binary(16))
    assert fingerprint.of_table(pa.table({"hash": hashes})) == "acfcde106ec93e011f8002accd724a2e"


def test_a_parsed_value_has_the_fingerprint_of_the_value():
    value = {"a": [1, 2.5, None, "x"], "b": {"c": True}}
    assert fingerprint.of_parsed(value) == fingerprint.of_json(value)
