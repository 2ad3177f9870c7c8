"""What insertions stand in the place of: hashed in a pass of its own, and compared later."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_exp.errors import UserError
from megatron_exp.inspection.base_hashes import base_hashes, write_base_hashes
from megatron_exp.inspection.targets import open_target
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.preparation.plan import plan
from tests.inspection.test_verify import changed, flipped
from tests.report.fabricated import LENGTH, make_config


@pytest.fixture(scope="module")
def target(world, tmp_path_factory):
    experiments = [{"name": "spliced", "type": "tests.preparation.spliced"}, *make_config(world.corpus.path).model_dump()["experiments"]]
    path = tmp_path_factory.mktemp("base") / "manifest"
    plan(make_config(world.corpus.path, experiments=experiments), path)
    return open_target(path)


@pytest.fixture(scope="module")
def hashed(target, tmp_path_factory):
    path = tmp_path_factory.mktemp("hashes") / "base.parquet"
    assert write_base_hashes(target, path) == len(target.manifest.insertions())
    return path


def test_every_insertion_has_the_hash_of_what_stood_there(target, hashed):
    stream = target.overlay.stream
    rows = target.manifest.insertions().to_pylist()
    assert {row["kind"] for row in rows} == {"tokens", "splice", "swap", "noise"}
    for row, stored in zip(rows, pq.read_table(hashed).to_pylist(), strict=True):
        end = LENGTH if row["kind"] == "splice" else row["offset"] + row["length"]
        expected = payload_hash(stream.read(row["slot"]).tokens[row["offset"] : end])
        assert stored == {"insertion_id": row["insertion_id"], "base_hash": expected}


def test_an_unchanged_corpus_agrees_and_a_changed_token_names_the_rows_that_cover_it(target, hashed):
    assert verify(target.path, base=hashed) == []
    rows, stream = target.manifest.insertions().to_pylist(), target.overlay.stream
    number, row = next((number, row) for number, row in enumerate(rows) if row["kind"] == "tokens")
    place = stream.instance(row["slot"])
    position = (place.offset + row["offset"]) * stream.corpus.shards[place.shard].dtype.itemsize
    with flipped(stream.corpus.file(place.shard, "bin"), position):
        found = {finding.place for finding in verify(target.path, base=hashed)}
    assert f"insertions.parquet row {number}" in found


def test_the_file_of_another_manifest_is_refused_and_a_shorter_one_is_found(world, target, hashed):
    with pytest.raises(UserError, match="not of"):
        verify(world.manifest.path, base=hashed)
    table = pq.read_table(hashed)
    short = hashed.with_name("short.parquet")
    pq.write_table(table.take(np.arange(len(table) - 1)), short)
    assert [finding.place for finding in verify(target.path, base=short)] == [str(short)]
    with changed(hashed, b"nothing"), pytest.raises(UserError, match="cannot be read"):
        verify(target.path, base=hashed)
    with pytest.raises(UserError, match="already exists"):
        write_base_hashes(target, hashed)


def test_repeated_hashing_gives_the_same_table(target):
    assert base_hashes(target).equals(base_hashes(target))
