"""`plan` with AI2's order: the stored order is part of the manifest, and every reader takes it from there."""

import dataclasses
import shutil

import numpy as np
import pytest

from megatron_exp.config.load import validate
from megatron_exp.errors import UserError
from megatron_exp.inspection.targets import open_target
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.plan import plan
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.repetition import is_repetitive
from tests.training import toy


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    directory = tmp_path_factory.mktemp("olmo")
    data = toy.make_config(toy.make_corpus(directory)).model_dump(mode="json")
    data["corpus"]["order"] = "olmo"
    return plan(validate(data, "test"), directory / "manifest")


def test_the_order_is_fingerprinted_and_the_manifest_is_sound(manifest):
    stream = manifest.open_stream(Corpus.open(manifest.corpus_path))
    assert manifest.record["fingerprints"]["order"] == stream.fingerprint
    assert manifest.record["fingerprints"]["order_file"] == stream.order_root
    assert (manifest.path / "order.u32").stat().st_size == 4 * len(stream.order)
    assert verify(manifest.path) == []


def test_inspection_reads_the_planned_samples(manifest):
    target = open_target(manifest.path)
    tokens = target.corpus.tokens(0)
    order = np.fromfile(manifest.path / "order.u32", dtype="<u4")
    for slot in range(target.stream.num_slots):
        first = int(order[slot]) * toy.LENGTH
        assert np.array_equal(target.overlay.stream.read(slot).tokens[:-1], tokens[first : first + toy.LENGTH])


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_order_file_is_named_by_reader_and_verify(manifest, tmp_path, keep):
    copy = tmp_path / "manifest"
    shutil.copytree(manifest.path, copy)
    content = bytearray((copy / "order.u32").read_bytes())
    content[5] ^= 1
    (copy / "order.u32").write_bytes(content if keep < 0 else content[:keep])
    with pytest.raises(UserError, match=r"order\.u32"):
        Manifest.open(copy).open_stream(Corpus.open(manifest.corpus_path))
    assert any("order.u32" in str(finding) for finding in verify(copy))


def test_a_payload_counts_in_a_slot_that_the_filter_leaves_out(manifest):
    overlay = Overlay.open(manifest.open_stream(Corpus.open(manifest.corpus_path)), manifest)
    row = next(row for row in manifest.insertions().to_pylist() if row["kind"] == "tokens" and row["offset"] > 0)

    class Filtered(type(overlay.stream)):
        def read(self, slot):
            content = super().read(slot)
            content.loss_mask[:] = 0
            return content

    values = {field.name: getattr(overlay.stream, field.name) for field in dataclasses.fields(overlay.stream)}
    filtered = Filtered(**values)
    mask = Overlay(filtered, manifest).read(row["slot"]).loss_mask
    supervised = range(row["offset"] - 1, row["offset"] + row["length"] - 1)
    assert all(mask[position] for position in supervised)
    others = [one for one in manifest.insertions().to_pylist() if one["slot"] == row["slot"]]
    assert int(mask.sum()) == sum(one["length"] for one in others if one["kind"] == "tokens")


def test_nothing_in_the_toy_text_is_repetitive(manifest):
    stream = manifest.open_stream(Corpus.open(manifest.corpus_path))
    assert not any(is_repetitive(stream.read(slot).tokens[:-1]) for slot in range(stream.num_slots))


def test_a_run_that_is_too_long_is_refused_and_nothing_is_written(manifest, tmp_path):
    config = manifest.config
    longer = config.model_copy(update={"geometry": config.geometry.model_copy(update={"steps": 5000})})
    longer = longer.model_copy(update={"corpus": config.corpus.model_copy(update={"path": manifest.corpus_path})})
    with pytest.raises(UserError, match="Train at most"):
        plan(longer, tmp_path / "manifest")
    assert list(tmp_path.iterdir()) == []
