"""What a model sees where a text was spliced in, from the corpus to the overlay."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.inspection.slots import view_slot
from megatron_exp.inspection.targets import open_target
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.schema import INSERTIONS
from megatron_exp.overlay.overlay import Overlay, splice
from megatron_exp.placement.boundaries import DocumentBoundaries
from megatron_exp.preparation.plan import plan
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.keyed import KeyedStream
from tests.training import toy

ENTRY = {"name": "spliced", "type": "tests.preparation.spliced"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    return plan(toy.make_config(corpus, steps=60, experiments=[ENTRY, *toy.EXPERIMENTS]), tmp_path_factory.mktemp("plan") / "manifest")


@pytest.fixture(scope="module")
def overlay(manifest, corpus):
    return Overlay.open(KeyedStream.open(manifest.config, Corpus.open(corpus)), manifest)


def spliced_rows(manifest):
    return [row for row in manifest.insertions().to_pylist() if row["kind"] == "splice"]


@given(st.integers(0, 8), st.integers(1, 8), st.lists(st.booleans(), min_size=8, max_size=8))
def test_every_position_keeps_the_mask_of_its_label(offset, num, masked):
    num = min(num, 8 - offset)
    if not num:
        return
    tokens, mask = np.arange(9, dtype=np.int32), np.array([0 if hidden else 1 for hidden in masked], dtype=np.uint8)
    before = {int(tokens[i + 1]): int(mask[i]) for i in range(8)}
    splice(tokens, mask, np.full(num, 100, np.int32), offset)
    assert tokens.tolist() == [*range(offset), *[100] * num, *range(offset, 9 - num)]
    for position in range(7 if offset + num == 8 else 8):
        label = int(tokens[position + 1])
        if label == 100:
            assert mask[position] == 1
        elif label in before:
            assert mask[position] == before[label]
    if offset + num == 8:
        assert mask[7] == 0


def test_the_slot_is_its_documents_with_the_payload_between_two_of_them(manifest, overlay):
    rows = spliced_rows(manifest)
    assert len(rows) == 4
    for row in rows:
        base, seen = overlay.stream.read(row["slot"]).tokens, overlay.read(row["slot"]).tokens
        start, end = row["offset"], row["offset"] + row["length"]
        expected = np.concatenate([base[:start], manifest.payload(row["payload"]), base[start:]])[: toy.LENGTH + 1]
        assert np.array_equal(seen, expected)
        assert row["layer"] == 1 and end <= toy.LENGTH
        assert [found.kind for found in overlay.insertions(row["slot"])] == ["splice"]
        place = overlay.instance(row["slot"])
        assert place.offset + start in overlay.stream.corpus.document_starts(place.shard)


def test_boundaries_are_the_places_after_an_eos(overlay):
    find = DocumentBoundaries(overlay.stream)
    for slot in range(overlay.num_slots):
        tokens, eos = overlay.stream.read(slot).tokens, overlay.stream.corpus.eos_id
        inside = np.flatnonzero(tokens[: toy.LENGTH - 1] == eos) + 1
        assert [offset for offset in find(slot).tolist() if offset] == inside.tolist()
        place = overlay.instance(slot)
        begins = place.offset == 0 or overlay.stream.corpus.tokens(place.shard)[place.offset - 1] == eos
        assert (0 in find(slot)) == begins


def test_counts_tell_rewritten_from_shifted_positions(manifest):
    rows, budget = spliced_rows(manifest), manifest.record["budget"]
    assert manifest.counts["spliced"]["splice"]["tokens"] == 4 * 6
    assert budget["shifted_tokens"] == sum(toy.LENGTH - row["offset"] - row["length"] for row in rows)


def test_masking_the_experiment_gives_the_base_slot(manifest, overlay):
    without = Overlay.open(overlay.stream, manifest, frozenset(["spliced"]))
    for row in spliced_rows(manifest):
        assert np.array_equal(without.read(row["slot"]).tokens, overlay.stream.read(row["slot"]).tokens)


def test_verify_and_inspect_understand_it(manifest):
    assert verify(manifest.path) == []
    row = spliced_rows(manifest)[0]
    (view,) = view_slot(open_target(manifest.path), row["slot"]).slots
    (mark,) = view.marks
    assert (mark.kind, mark.offset, mark.length) == ("splice", row["offset"], row["length"])


def test_a_splice_away_from_a_boundary_is_found(manifest, tmp_path):
    copy = shutil.copytree(manifest.path, tmp_path / "manifest")
    rows = pq.read_table(copy / "insertions.parquet").to_pylist()
    number = next(number for number, row in enumerate(rows) if row["kind"] == "splice" and row["offset"])
    rows[number]["offset"] -= 1
    pq.write_table(pa.Table.from_pylist(rows, schema=INSERTIONS), copy / "insertions.parquet")
    found = {finding.place for finding in verify(copy) if "no document begins" in finding.problem}
    assert found == {f"insertions.parquet row {number}"}
