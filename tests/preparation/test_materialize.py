"""A stock Megatron dataset reads the very samples that our own trainer would, in slot order."""

import errno
import json

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.tokenizers.megatron_tokenizer import MegatronTokenizer

from megatron_exp import files
from megatron_exp.config.load import validate
from megatron_exp.errors import UserError
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.materialize import materialize
from megatron_exp.preparation.plan import plan
from megatron_exp.shards.corpus import Corpus
from tests.training import toy

CANARIES, FORGETTING, WATERMARKS = toy.EXPERIMENTS
LONG = {**CANARIES, "min_tokens": 26, "max_tokens": 26, "repetitions": [2], "num_per_condition": 4}  # some of them end a slot


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


def planned(corpus, path, experiments, order="keyed"):
    data = toy.make_config(corpus, experiments=experiments).model_dump(mode="json")
    return plan(validate({**data, "corpus": {**data["corpus"], "order": order}}, "test"), path)


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    return planned(corpus, tmp_path_factory.mktemp("plan") / "manifest", [LONG, FORGETTING])


def open_overlay(manifest, masked=()):
    return Overlay.open(manifest.open_stream(Corpus.open(manifest.corpus_path)), manifest, frozenset(masked))


def stock_dataset(prefix, overlay, *, cache=None, seed=1234, tokenizer=None, blend=None, **options):
    """The train split as `BlendedMegatronDatasetBuilder` makes it."""
    vocabulary = overlay.stream.corpus.vocabulary_size
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=toy.LENGTH,
        **(blend or {"blend_per_split": [([str(prefix)], None), None, None]}),
        path_to_cache=str(cache or prefix.parent / "cache"),
        tokenizer=tokenizer or MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=vocabulary - 1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **options,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [overlay.num_slots, 0, 0], lambda: True, config).build()[0]


def differences(dataset, stream) -> list[int]:
    """Slots in which inputs, supervised labels or loss masks differ from what our trainer reads."""
    wrong = []
    for slot in range(stream.num_slots):
        tokens, mask = stream.read(slot)
        sample = dataset[slot]
        counts = mask.astype(bool)
        same = np.array_equal(sample["tokens"].numpy(), tokens[:-1]) and np.array_equal(sample["loss_mask"].numpy(), mask)
        same = same and np.array_equal(sample["labels"].numpy()[counts], tokens[1:][counts])
        wrong += [] if same else [slot]
    return wrong


def test_the_stock_dataset_reads_every_slot_in_order_with_its_loss_mask(manifest, tmp_path):
    overlay = open_overlay(manifest)
    assert any(not overlay.read(slot).loss_mask.all() for slot in range(overlay.num_slots)), "a mask must be at stake"
    dataset = stock_dataset(materialize(manifest.path, tmp_path / "out", pad_id=-1), overlay)
    assert differences(dataset, overlay) == []
    assert differences(dataset, overlay.stream), "the experiments must be at stake"
    assert len(list((tmp_path / "out" / "cache").glob("*description.txt"))) == 1, "the trainer found the index and made none of its own"


def test_the_order_olmo_is_read_too(corpus, tmp_path):
    manifest = planned(corpus, tmp_path / "manifest", [CANARIES], order="olmo")
    with pytest.raises(UserError, match="--pad-id"):
        materialize(manifest.path, tmp_path / "out")
    dataset = stock_dataset(materialize(manifest.path, tmp_path / "out", pad_id=-1), open_overlay(manifest))
    assert differences(dataset, open_overlay(manifest)) == []


def test_the_baseline_and_a_masked_experiment_are_materialised_as_such(manifest, tmp_path):
    overlay = open_overlay(manifest)
    assert (
        differences(stock_dataset(materialize(manifest.path, tmp_path / "base", baseline=True, pad_id=-1), overlay), overlay.stream) == []
    )
    prefix = materialize(manifest.path, tmp_path / "masked", masked=frozenset({"canaries"}), pad_id=-1)
    assert differences(stock_dataset(prefix, overlay), open_overlay(manifest, ["canaries"])) == []


def test_noise_is_refused_at_once_or_listed(corpus, tmp_path):
    manifest = planned(corpus, tmp_path / "manifest", [CANARIES, WATERMARKS])
    with pytest.raises(UserError, match="watermarks .* add noise"):
        materialize(manifest.path, tmp_path / "out", pad_id=-1)
    assert not (tmp_path / "out").exists()
    materialize(manifest.path, tmp_path / "without", masked=frozenset({"watermarks"}), pad_id=-1)
    materialize(manifest.path, tmp_path / "out", list_inexpressible=True, pad_id=-1)
    rows = pq.read_table(tmp_path / "out" / "inexpressible.parquet").to_pylist()
    overlay = open_overlay(manifest)
    expected = [(slot, noise.key, noise.scale) for slot in range(overlay.num_slots) for noise in overlay.noise(slot)]
    assert expected and [(row["slot"], row["key"], row["scale"]) for row in rows] == expected


def test_loss_masks_that_are_not_padding_are_listed_position_by_position(manifest, tmp_path):
    with pytest.raises(UserError, match="must not count"):
        materialize(manifest.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    prefix = materialize(manifest.path, tmp_path / "out", list_inexpressible=True)
    overlay = open_overlay(manifest)
    masks = np.ones((overlay.num_slots, toy.LENGTH), dtype=np.uint8)
    for row in pq.read_table(tmp_path / "out" / "inexpressible.parquet").to_pylist():
        masks[row["slot"], row["offset"] : row["offset"] + row["length"]] = 0
    assert np.array_equal(masks, [overlay.read(slot).loss_mask for slot in range(overlay.num_slots)])
    dataset = stock_dataset(prefix, overlay)
    assert all(np.array_equal(dataset[slot]["tokens"], overlay.read(slot).tokens[:-1]) for slot in range(overlay.num_slots))


def test_a_padding_that_the_text_uses_is_refused(manifest, tmp_path):
    used = int(open_overlay(manifest).read(0).tokens[3])
    with pytest.raises(UserError, match=f"holds token {used}"):
        materialize(manifest.path, tmp_path / "out", pad_id=used)
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_that_is_set_up_otherwise_gets_its_index_from_its_own_description(manifest, tmp_path):
    overlay = open_overlay(manifest)
    prefix = materialize(manifest.path, tmp_path / "out", pad_id=-1)
    blend = {"blend": ([str(prefix)], None), "split": "100,0,0"}
    strange = stock_dataset(prefix, overlay, cache=tmp_path / "theirs", seed=7, blend=blend)
    assert differences(strange, overlay), "without the index Megatron shuffles in its own way"
    (description,) = (tmp_path / "theirs").glob("*description.txt")
    content = (prefix.parent / "slots.bin").read_bytes()
    materialize(manifest.path, tmp_path / "out", pad_id=-1, description=description)
    assert differences(stock_dataset(prefix, overlay, seed=7, blend=blend), overlay) == []
    assert (prefix.parent / "slots.bin").read_bytes() == content
    with pytest.raises(UserError, match="holds other slots"):
        materialize(manifest.path, tmp_path / "out", baseline=True, pad_id=-1, description=description)


def test_a_miss_is_an_error_where_the_trainer_loads_its_cache_fast(manifest, tmp_path):
    overlay = open_overlay(manifest)
    prefix = materialize(manifest.path, tmp_path / "out", pad_id=-1)
    assert differences(stock_dataset(prefix, overlay, fast_cache_load=True), overlay) == []
    with pytest.raises(FileNotFoundError):
        stock_dataset(prefix, overlay, seed=7, fast_cache_load=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sequence_length", 64), ("index_split", "valid"), ("num_samples", 49), ("dataset_path", "/elsewhere"), ("split_matrix", [[0, 0.9]])],
)
def test_a_description_of_another_dataset_is_refused(manifest, tmp_path, key, value):
    materialize(manifest.path, tmp_path / "out", pad_id=-1)
    (description,) = (tmp_path / "out" / "cache").glob("*description.txt")
    changed = tmp_path / "changed.txt"
    changed.write_text(json.dumps({**json.loads(description.read_text()), key: value}))
    with pytest.raises(UserError, match=f"its {key} is"):
        materialize(manifest.path, tmp_path / "out", pad_id=-1, description=changed)


@pytest.mark.parametrize("call", ["_write", "_fsync", "_rename"])
def test_an_interrupted_job_leaves_nothing_under_the_final_name(manifest, tmp_path, monkeypatch, call):
    real, calls = getattr(files, call), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(files, call, failing)
    with pytest.raises(OSError, match="No space left"):
        materialize(manifest.path, tmp_path / "out", pad_id=-1)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(manifest, tmp_path):
    materialize(manifest.path, tmp_path / "out", pad_id=-1)
    with pytest.raises(UserError, match="already exists"):
        materialize(manifest.path, tmp_path / "out", pad_id=-1)


def test_the_record_says_what_the_shards_are(manifest, tmp_path):
    materialize(manifest.path, tmp_path / "out", pad_id=-1)
    record = orjson.loads((tmp_path / "out" / "materialized.json").read_bytes())
    assert record["stream"] == open_overlay(manifest).fingerprint and record["manifest"]["fingerprint"] == manifest.fingerprint
    assert record["files"]["bin"]["bytes"] == 4 * record["num_slots"] * (record["sequence_length"] + 1)
    assert record["num_inexpressible"] == 0


def test_the_example_dataset_gives_the_same_samples(manifest, corpus, tmp_path):
    from torch.utils.data import DataLoader

    from examples.overlay_dataset import OverlayDataset

    overlay = open_overlay(manifest)
    dataset = OverlayDataset.open(manifest.path)
    batches = list(DataLoader(dataset, batch_size=toy.BATCH, shuffle=False))
    assert len(batches) == toy.STEPS
    for step, batch in enumerate(batches):
        for row, slot in enumerate(overlay.geometry.slots_of_step(step)):
            tokens, mask = overlay.read(slot)
            assert np.array_equal(batch.tokens[row], tokens[:-1]) and np.array_equal(batch.labels[row], tokens[1:])
            assert np.array_equal(batch.loss_mask[row], mask)
    noisy = planned(corpus, tmp_path / "noisy", [WATERMARKS])
    with pytest.raises(UserError, match="watermarks"):
        OverlayDataset.open(noisy.path)
    assert len(OverlayDataset.open(noisy.path, masked=frozenset({"watermarks"}))) == overlay.num_slots
