import numpy as np
import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.diff import diff, moved
from megatron_exp.preparation.plan import plan
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.keyed import KeyedStream
from megatron_exp.stream.slot import is_pool
from tests.training import toy

CANARIES, FORGETTING, WATERMARKS = toy.EXPERIMENTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    return plan(toy.make_config(corpus), tmp_path_factory.mktemp("plan") / "manifest")


def open_overlay(manifest, corpus, masked=()):
    return Overlay.open(KeyedStream.open(manifest.config, Corpus.open(corpus)), manifest, frozenset(masked))


def planned(corpus, path, experiments, **options):
    return plan(toy.make_config(corpus, experiments=experiments, **options), path)


def test_the_same_config_gives_the_same_manifest(corpus, manifest, tmp_path):
    again = plan(toy.make_config(corpus), tmp_path / "again")
    assert again.record["fingerprints"] == manifest.record["fingerprints"]
    assert (again.path / "overlay-entries.npy").read_bytes() == (manifest.path / "overlay-entries.npy").read_bytes()


def test_another_seed_gives_another_manifest(corpus, manifest, tmp_path):
    config = toy.make_config(corpus)
    other = plan(config.model_copy(update={"seeds": config.seeds.model_copy(update={"placement": 1})}), tmp_path / "other")
    assert other.fingerprint != manifest.fingerprint


def test_the_overlay_changes_exactly_what_the_manifest_says(corpus, manifest):
    overlay = open_overlay(manifest, corpus)
    expected = {slot: overlay.stream.read(slot).tokens.copy() for slot in range(overlay.num_slots)}
    for row in sorted(manifest.insertions().to_pylist(), key=lambda row: row["layer"]):
        tokens = expected[row["slot"]]
        if row["kind"] == "swap":
            assert is_pool(row["source_slot"])
            tokens[:] = overlay.stream.read(row["source_slot"]).tokens
        elif row["kind"] == "tokens":
            tokens[row["offset"] : row["offset"] + row["length"]] = manifest.payload(row["payload"])
    for slot, tokens in expected.items():
        assert np.array_equal(overlay.read(slot).tokens, tokens)


def test_noise_is_named_for_exactly_the_slots_of_the_manifest(corpus, manifest):
    overlay = open_overlay(manifest, corpus)
    rows = [row for row in manifest.insertions().to_pylist() if row["kind"] == "noise"]
    noisy = {slot: overlay.noise(slot) for slot in range(overlay.num_slots) if overlay.noise(slot)}
    assert {row["slot"] for row in rows} == set(noisy)
    assert {(spec.key, spec.scale) for specs in noisy.values() for spec in specs} == {(rows[0]["key"], 0.075)}


def test_reading_through_the_overlay_leaves_the_base_as_it_was(corpus, manifest):
    overlay = open_overlay(manifest, corpus)
    before = [overlay.stream.read(slot).tokens.copy() for slot in range(overlay.num_slots)]
    for slot in range(overlay.num_slots):
        overlay.read(slot).tokens[:] = 0
    assert all(np.array_equal(overlay.stream.read(slot).tokens, tokens) for slot, tokens in enumerate(before))


def test_a_masked_experiment_leaves_no_trace_and_the_others_stay(corpus, manifest):
    overlay, without = open_overlay(manifest, corpus), open_overlay(manifest, corpus, ["canaries"])
    names = {found.experiment for slot in range(without.num_slots) for found in without.insertions(slot)}
    assert names == {"forgetting", "watermarks"}
    for slot in range(overlay.num_slots):
        if not any(found.experiment == "canaries" for found in overlay.insertions(slot)):
            assert np.array_equal(overlay.read(slot).tokens, without.read(slot).tokens)
    assert overlay.fingerprint != without.fingerprint


def test_a_payload_at_the_end_of_a_slot_has_no_label_after_it(corpus, tmp_path):
    long = {**CANARIES, "min_tokens": 26, "max_tokens": 26, "repetitions": [2], "num_per_condition": 4}
    manifest = planned(corpus, tmp_path / "m", [long])
    overlay = open_overlay(manifest, corpus)
    for row in manifest.insertions().to_pylist():
        ends = row["offset"] + row["length"] == toy.LENGTH
        base = overlay.stream.read(row["slot"]).loss_mask[-1]
        assert overlay.read(row["slot"]).loss_mask[-1] == (0 if ends else base)
    assert any(row["offset"] + row["length"] == toy.LENGTH for row in manifest.insertions().to_pylist())


def test_appending_a_token_experiment_moves_nothing(corpus, manifest, tmp_path):
    more = planned(corpus, tmp_path / "more", [*toy.EXPERIMENTS, {**CANARIES, "name": "more"}])
    changes = diff(more, manifest)
    assert changes.pop("more")["added"] == 6
    assert all(cell["moved"] == cell["added"] == cell["removed"] == 0 for cell in changes.values())


def test_appending_forgetting_curves_moves_only_the_copies_it_hits(corpus, tmp_path):
    many = {**CANARIES, "repetitions": [1, 4], "num_per_condition": 5, "num_held_out": 4}
    before = planned(corpus, tmp_path / "before", [many])
    after = planned(corpus, tmp_path / "after", [many, FORGETTING])
    swapped = {row["slot"] for row in after.insertions().to_pylist() if row["kind"] == "swap"}
    rows = moved(after, before)
    assert rows and all(row["from"][0] in swapped for row in rows)
    assert not swapped & {row["to"][0] for row in rows}
    assert diff(after, before)["canaries"]["moved"] == len(rows)


def test_a_disabled_experiment_keeps_its_places_and_writes_nothing(corpus, manifest, tmp_path):
    off = planned(corpus, tmp_path / "off", [CANARIES, {**FORGETTING, "enabled": False}, WATERMARKS])
    changes = diff(off, manifest)
    assert changes["forgetting"]["removed"] == 4
    assert changes["canaries"]["moved"] == changes["watermarks"]["moved"] == 0
    assert off.experiments == ["canaries", "watermarks"]


def test_counts_and_fractions_are_exact(corpus, manifest):
    overlay = open_overlay(manifest, corpus)
    changed = sum(
        int((overlay.read(slot).tokens[:-1] != overlay.stream.read(slot).tokens[:-1]).sum())
        for slot in range(overlay.num_slots)
        if not overlay.noise(slot)
    )
    budget, rows = manifest.record["budget"], manifest.insertions().to_pylist()
    assert budget["modified_tokens"] == sum(row["length"] for row in rows) >= changed
    assert budget["touched_slots"] == len({row["slot"] for row in rows})
    assert budget["modified_fraction"] == budget["modified_tokens"] / (toy.STEPS * toy.BATCH * toy.LENGTH)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": {"fraction": 0.01}}, "more than budget.fraction"),
        ({"pool": {"slots": 6}}, "Raise pool.slots by at least"),
        ({"pool": {"slots": 2}}, "Validation uses the pool"),
        ({"geometry": {"sequence_length": 32, "global_batch_size": 4, "steps": 900}}, "Train at most"),
        ({"model": {"preset": "olmo2-1B"}}, "no model preset.*Did you mean 'olmo2-1b'"),
        ({"model": {"preset": "tiny", "kv_groups": 3}}, "kv_groups = 3"),
        ({"model": {"preset": "tiny", "vocabulary_size": 3}}, "smaller than the tokenizer's"),
        ({"training": {"schedule": {"decay_start": 12}}}, "decay_start is 12"),
        ({"training": {"schedule": {"warmup_steps": 13}}}, "would never reach its peak"),
        ({"training": {"checkpoint": {"keep": [0, 12, 13]}}}, "keep holds 13.* last state is 12"),
        ({"experiments": [{"name": "x", "type": "no_such_experiment"}]}, "no_such_experiment"),
        ({"experiments": [{**CANARIES, "copies": 3}]}, "copies"),
        ({"experiments": [{**CANARIES, "max_tokens": 400, "min_tokens": 400}]}, "slot holds 32"),
        ({"experiments": [{**CANARIES, "repetitions": [300], "num_per_condition": 60}]}, "finds no free place"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(corpus, tmp_path, change, words):
    from megatron_exp.config.load import validate

    data = toy.make_config(corpus).model_dump(mode="json")
    config = validate({**data, **change}, "test")
    with pytest.raises(UserError, match=words):
        plan(config, tmp_path / "manifest")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_slots_confines_everything_to_the_drawn_slots(corpus, tmp_path):
    from megatron_exp.config.load import validate

    data = toy.make_config(corpus).model_dump(mode="json")
    manifest = plan(validate({**data, "budget": {"unit": "slots", "fraction": 0.4}}, "test"), tmp_path / "m")
    budget = manifest.record["budget"]
    assert budget["drawn_slots"] == 19
    assert budget["touched_slots"] <= 19
    assert len(manifest.insertions()) == 15


def test_a_manifest_of_another_corpus_is_refused(manifest, tmp_path):
    (tmp_path / "x").mkdir()
    texts = tmp_path / "x" / "other.jsonl"
    texts.write_text('{"text": "entirely other words stand here"}\n' * 50)
    from megatron_exp.preparation.preprocess import preprocess

    other = preprocess([str(texts)], manifest.corpus_path / "tokenizer", tmp_path / "corpus", workers=1)
    with pytest.raises(UserError, match="planned on a corpus with fingerprint"):
        manifest.check_corpus(other)


@pytest.mark.parametrize("name", ["manifest.json", "insertions.parquet", "overlay-slots.npy", "overlay-entries.npy"])
def test_a_damaged_manifest_file_is_named(manifest, tmp_path, name):
    import shutil

    copy = tmp_path / "manifest"
    shutil.copytree(manifest.path, copy)
    file = copy / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=name):
        opened = Manifest.open(copy)
        opened.insertions()
        list(opened.index.within(0, 1))


def test_the_record_holds_what_was_registered_before_the_run(manifest):
    record = orjson.loads((manifest.path / "manifest.json").read_bytes())
    assert record["schema_version"] == 1 and record["warnings"] == []
    for analysis in record["analyses"].values():
        assert {"title", "question", "citation", "outcomes", "parameters"} <= set(analysis)
        assert any(outcome["family"] == "primary" for outcome in analysis["outcomes"])
