"""Proving: a sound directory has no findings, and any damage is named by its place."""

import contextlib
import shutil

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.ledger import RECORD
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import INSERTIONS
from megatron_exp.preparation.plan import plan
from megatron_exp.seeding import Words
from tests.report.fabricated import BATCH, STEPS, make_run


@contextlib.contextmanager
def changed(path, content):
    """The file with other content, and as it was afterwards."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x20
    return changed(path, bytes(data))


def told(findings):
    return "\n".join(f"{finding.place}: {finding.problem}" for finding in findings if not finding.normal)


@pytest.fixture
def run_copy(world, tmp_path):
    return shutil.copytree(world.run, tmp_path / "run")


def test_sound_directories_have_no_findings(world):
    for path in (world.corpus.path, world.manifest.path, world.run, world.twin):
        assert verify(path) == []


def test_an_unfinished_run_is_sound(world, tmp_path):
    assert verify(make_run(tmp_path / "run", world.manifest, world.corpus, steps_done=13)) == []


def test_a_flipped_byte_in_a_shard_names_the_shard_and_the_steps_that_read_it(world):
    place = world.run  # the first slot of step 0 is read for sure
    from megatron_exp.inspection.targets import open_target

    instance = open_target(place).stream.instance(0)
    shard = world.corpus.file(instance.shard, "bin")
    itemsize = world.corpus.shards[instance.shard].dtype.itemsize
    with flipped(shard, (instance.offset + 3) * itemsize):
        assert shard.name in told(verify(world.corpus.path))
        found = verify(world.run)
    assert shard.name in told(found)
    assert any(finding.place == "ledger.bin step 0, first slot 0" for finding in found)
    assert not is_sound(found)


CHANGES = {
    "slot": lambda value: value + BATCH,
    "step": lambda value: value + 1,
    "row": lambda value: (value + 1) % BATCH,
    "offset": lambda value: value + 1,
    "length": lambda value: value - 1,
    "item": lambda value: value + 1000,
    "repetition": lambda value: value + 1,
    "condition": lambda value: value + "!",
    "arm": lambda value: value + "!",
    "insertion_id": lambda value: value ^ 1,
    "payload": lambda value: value + 1,
    "payload_hash": lambda value: bytes([value[0] ^ 1]) + value[1:],
    "layer": lambda value: value + 1,
    "window_end": lambda value: 1,
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_value_in_a_manifest_row_names_the_row(world, column):
    path = world.manifest.path / "insertions.parquet"
    rows = pq.read_table(path).to_pylist()
    number = next(i for i, row in enumerate(rows) if row["kind"] == "tokens" and row["step"] > 5)
    rows[number][column] = CHANGES[column](rows[number][column])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=INSERTIONS), sink)
    with changed(path, sink.getvalue().to_pybytes()):
        found = verify(world.manifest.path)
        in_run = verify(world.run)
    assert f"insertions.parquet row {number}" in {finding.place for finding in found}
    assert f"insertions.parquet row {number}" in {finding.place for finding in in_run}


def test_a_row_that_is_missing_or_there_twice_is_found(world):
    path = world.manifest.path / "insertions.parquet"
    table = pq.read_table(path)
    row = next(i for i, one in enumerate(table.to_pylist()) if one["kind"] == "tokens" and one["repetition"] == 2)
    for numbers in (np.delete(np.arange(table.num_rows), row), np.sort(np.append(np.arange(table.num_rows), row))):
        sink = pa.BufferOutputStream()
        pq.write_table(table.take(numbers), sink)
        with changed(path, sink.getvalue().to_pybytes()):
            found = told(verify(world.manifest.path))
        assert "insertions.parquet row" in found and "were requested" in found


@pytest.mark.parametrize(
    "file",
    ["insertions.parquet", "items.parquet", "probes.parquet", "payloads.bin", "overlay-entries.npy", "overlay-slots.npy", "manifest.json"],
)
def test_a_flipped_byte_in_any_file_of_a_manifest_is_found(world, file):
    path = world.manifest.path / file
    if file.endswith(".parquet"):
        column = pq.ParquetFile(path).metadata.row_group(0).column(3 if file != "items.parquet" else 0)
        position = column.data_page_offset + column.total_compressed_size // 2
    else:
        position = path.read_bytes().index(b'"sequence_length"') + 1 if file == "manifest.json" else path.stat().st_size - 3
    with flipped(path, position):
        found = told(verify(world.manifest.path))
    assert file in found


MANIFEST_FILES = ["insertions.parquet", "items.parquet", "probes.parquet", "payloads.bin", "payloads.idx", "overlay-entries.npy", "overlay-slots.npy"]


def answer(path):
    """What a user is told: the findings, or the error where a file cannot be read at all."""
    try:
        return told(verify(path))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("how", ["empty", "one byte", "half", "without its last byte", "a byte more", "a zeroed page"])
@pytest.mark.parametrize("file", [*MANIFEST_FILES, "manifest.json"])
def test_a_cut_or_zeroed_file_of_a_manifest_is_named(world, file, how):
    path = world.manifest.path / file
    content = path.read_bytes()
    page = min(4096, len(content))
    damaged = {
        "empty": b"",
        "one byte": content[:1],
        "half": content[: len(content) // 2],
        "without its last byte": content[:-2] if file == "manifest.json" else content[:-1],  # its very last is the end of the line
        "a byte more": content + b"x",
        "a zeroed page": content[: len(content) - page] + bytes(page),
    }[how]
    with changed(path, damaged):
        assert file in answer(world.manifest.path)


@pytest.mark.parametrize("file", MANIFEST_FILES)
def test_a_stale_file_of_another_manifest_is_named(world, tmp_path_factory, file):
    """Of the same configuration with another seed: every file is sound by itself."""
    config = world.manifest.config.model_copy(update={"seeds": world.manifest.config.seeds.model_copy(update={"placement": 99, "assignment": 99})})
    other = plan(config, tmp_path_factory.mktemp("other") / "manifest")
    content = (other.path / file).read_bytes()
    if content == (world.manifest.path / file).read_bytes():
        pytest.skip("the two have the same content")
    with changed(world.manifest.path / file, content):
        assert file.split(".")[0] in answer(world.manifest.path)


def test_two_swapped_files_of_a_manifest_are_found(world):
    first, second = world.manifest.path / "overlay-entries.npy", world.manifest.path / "overlay-slots.npy"
    with changed(first, second.read_bytes()):
        assert first.name in answer(world.manifest.path)


def test_a_changed_budget_or_seed_in_the_record_is_found(world):
    path = world.manifest.path / "manifest.json"
    for name, change in {
        "budget": {"modified_tokens": 1},
        "seeds": {"placement": 1},
        "geometry": {"steps": 41},
        "keep_steps": None,
    }.items():
        record = orjson.loads(path.read_bytes())
        record[name] = record[name] | change if change else [7]
        with changed(path, orjson.dumps(record)):
            assert f"manifest.json{'' if name == 'keep_steps' else f' {name}'}" in told(verify(world.manifest.path))
    with changed(path, b"{half"), pytest.raises(UserError, match="manifest.json"):
        verify(world.manifest.path)


def leaves(value, *path):
    """The paths of all numbers and texts of a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return [path]
    return [leaf for key, one in inner for leaf in leaves(one, *path, key)]


def test_no_value_of_the_record_can_be_changed_unnoticed(world):
    path = world.manifest.path / "manifest.json"
    content = path.read_bytes()
    for *above, last in leaves(orjson.loads(content)):
        if "config" in above or above[:1] == ["counts"]:
            record = orjson.loads(content)
            place = record
            for key in above:
                place = place[key]
            place[last] = not place[last] if isinstance(place[last], bool) else "x" if isinstance(place[last], str) else 3
            if record == orjson.loads(content):
                continue
            with changed(path, orjson.dumps(record)):
                assert "manifest.json" in told(verify(world.manifest.path))
                with pytest.raises(UserError, match="changed after it was written"):
                    Manifest.open(world.manifest.path)


@pytest.mark.parametrize("file", MANIFEST_FILES)
def test_every_flipped_bit_of_a_file_is_found_and_none_breaks_the_search(world, file):
    path = world.manifest.path / file
    size = path.stat().st_size
    places = sorted({*Words.of(0, "flips", file).integers(24, size).tolist(), *range(0, min(size, 128), 9), size - 1})
    for place in places:
        with flipped(path, place):
            assert file.split(".")[0] in answer(world.manifest.path), place


def test_a_flipped_byte_in_the_ledger_names_the_record(run_copy):
    with flipped(run_copy / "ledger.bin", RECORD.itemsize * (1 + 7) + 20):
        found = verify(run_copy)
    assert [finding.place for finding in found] == ["ledger.bin record 7", "ledger.bin step 7"]


def test_a_torn_ledger_tail_is_normal(run_copy):
    ledger = run_copy / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes() + b"half a record")
    found = verify(run_copy)
    assert [finding.normal for finding in found] == [True]
    assert is_sound(found)


def test_steps_that_a_killed_process_had_not_recorded_yet_are_normal_unless_a_checkpoint_holds_them(run_copy):
    ledger = run_copy / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes()[: -7 * RECORD.itemsize])
    record = run_copy / "run.json"
    with changed(record, record.read_bytes().replace(b'"state":"finished"', b'"state":"running"')):
        found = verify(run_copy)
        assert [finding.normal for finding in found] == [True] and f"steps {STEPS - 7} to" in found[0].problem
        (run_copy / "checkpoints" / f"step-{STEPS - 3:08d}").mkdir(parents=True)
        (run_copy / "checkpoints" / f"step-{STEPS - 3:08d}" / "COMPLETE").touch()
        assert f"ledger.bin step {STEPS - 7}" in {finding.place for finding in verify(run_copy)}


def test_steps_that_a_finished_run_has_not_recorded_are_found(run_copy):
    ledger = run_copy / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes()[: -3 * RECORD.itemsize])
    assert [finding.place for finding in verify(run_copy)] == [f"ledger.bin step {STEPS - number}" for number in (3, 2, 1)]


def test_steps_that_hold_nothing_to_compare_are_refused(world, run_copy):
    with pytest.raises(UserError, match=f"--steps {STEPS}:{STEPS + 9} holds none"):
        verify(run_copy, steps=(STEPS, STEPS + 9))
    with pytest.raises(UserError, match="choose steps of a run"):
        verify(world.manifest.path, sample=3)


def test_a_run_that_was_fed_the_base_stream_is_found_at_its_first_rewritten_step(world, run_copy):
    shutil.copy(world.twin / "ledger.bin", run_copy / "ledger.bin")
    found = verify(run_copy)
    first = int(world.manifest.insertions()["step"].to_numpy()[world.manifest.insertions()["kind"].to_numpy() != "noise"].min())
    assert found[0].place == f"ledger.bin step {first}, first slot {first * BATCH}"


def test_only_the_chosen_steps_are_recomputed(world, run_copy):
    shutil.copy(world.twin / "ledger.bin", run_copy / "ledger.bin")
    steps = {row["step"] for row in world.manifest.insertions().to_pylist() if row["kind"] != "noise"}
    quiet = next(step for step in range(STEPS) if step not in steps)
    assert verify(run_copy, steps=(quiet, quiet + 1)) == []
    loud = min(steps)
    assert len(verify(run_copy, steps=(loud, loud + 1))) == 1
    assert 1 <= len(verify(run_copy, sample=STEPS - 1)) <= len(verify(run_copy))


def test_a_run_on_another_manifest_or_corpus_is_found(run_copy):
    record = orjson.loads((run_copy / "run.json").read_bytes())
    for name in ("manifest", "corpus", "stream"):
        with changed(run_copy / "run.json", orjson.dumps(record | {name: record[name] | {"fingerprint": "f" * 32}})):
            assert name in told(verify(run_copy))


def test_a_damaged_checkpoint_file_is_named(run_copy):
    directory = run_copy / "checkpoints" / "step-00000040"
    directory.mkdir(parents=True)
    (directory / "weights.bin").write_bytes(b"weights")
    (directory / "files.json").write_bytes(b"{}")
    (directory / "COMPLETE").write_bytes(b"no hash of files.json")
    assert "step-00000040" in told(verify(run_copy))
