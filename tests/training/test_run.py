"""What one process trains: determinism, the ledger, probes that change nothing, masks and the twin."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.evaluation import evaluate
from megatron_exp.inspection.verify import verify
from megatron_exp.ledger import slot_hash, step_hash
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.run_record import RunRecord
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.keyed import KeyedStream
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.loop import train_loop
from megatron_exp.training.record import end_attempt
from megatron_exp.training.train import train
from tests.training.compare import answers, losses, step_hashes, weights
from tests.training.processes import metrics
from tests.training.toy import BATCH, EXPERIMENTS, LENGTH, STEPS, make_manifest


def planned_hashes(manifest_path: Path, masked: frozenset[str] = frozenset(), baseline: bool = False) -> dict[int, bytes]:
    manifest = Manifest.open(manifest_path)
    base = KeyedStream.open(manifest.config, Corpus.open(manifest.corpus_path))
    stream = base if baseline else Overlay.open(base, manifest, masked)
    return {
        step: step_hash([slot_hash(slot, *stream.read(slot)) for slot in base.geometry.slots_of_step(step)])
        for step in range(base.geometry.steps)
    }


def test_the_same_config_twice_gives_the_same_ledger_and_bitwise_the_same_losses_and_weights(
    manifest: Path, whole_run: Path, run: Path
) -> None:
    assert train(manifest, run) == 0
    assert step_hashes(run) == step_hashes(whole_run)
    assert losses(run) == losses(whole_run)
    assert weights(run) == weights(whole_run)
    assert answers(run) == answers(whole_run)


def test_what_was_consumed_is_what_was_planned(manifest: Path, whole_run: Path) -> None:
    assert step_hashes(whole_run) == planned_hashes(manifest)


def test_the_model_learns(whole_run: Path) -> None:
    found = losses(whole_run)
    assert found[-1] < found[0] - 0.5


def test_a_twin_reads_the_bare_stream_and_rewrites_nothing(manifest: Path, whole_run: Path, run: Path) -> None:
    assert train(manifest, run, baseline=True) == 0
    assert step_hashes(run) == planned_hashes(manifest, baseline=True)
    assert losses(run)[:1] == losses(whole_run)[:1]  # no insertion in step 0
    assert weights(run) != weights(whole_run)
    assert {str(line["modified_tokens"]) for line in metrics(run) if "loss" in line} == {"{}"}
    assert answers(run).keys() == answers(whole_run).keys()


def test_a_mask_leaves_one_experiment_out_and_the_others_in(manifest: Path, run: Path) -> None:
    assert train(manifest, run, masked=["forgetting"]) == 0
    assert step_hashes(run) == planned_hashes(manifest, masked=frozenset({"forgetting"}))
    last = [line for line in metrics(run) if "loss" in line][-1]
    assert last["modified_tokens"].keys() == {"canaries", "watermarks"}


def test_noise_reaches_the_model_although_the_ledger_cannot_show_it(manifest: Path, whole_run: Path, run: Path) -> None:
    assert train(manifest, run, masked=["watermarks"]) == 0
    assert step_hashes(run) == step_hashes(whole_run)
    assert weights(run) != weights(whole_run)


def test_probes_of_every_kind_in_every_state_leave_the_weights_bitwise_alone(data: Path, whole_run: Path, run: Path) -> None:
    dense = {"name": "dense", "type": "tests.training.dense_probes"}
    manifest = make_manifest(data, "manifest-dense", experiments=[*EXPERIMENTS, dense])
    assert train(manifest, run) == 0
    asked = [key for key in answers(run) if key[1] == "dense"]
    assert len(asked) == 5 * (STEPS + 1)
    assert losses(run) == losses(whole_run)
    assert weights(run) == weights(whole_run)


def test_metrics_name_state_attempt_and_tokens_and_count_what_was_rewritten(manifest: Path, whole_run: Path) -> None:
    lines = [line for line in metrics(whole_run) if "loss" in line]
    assert [line["tokens"] for line in lines] == [state * BATCH * LENGTH for state in range(1, STEPS + 1)]
    assert {line["attempt"] for line in lines} == {1}
    counts = Manifest.open(manifest).counts
    for experiment, cells in counts.items():
        assert lines[-1]["modified_tokens"][experiment] == sum(cell["tokens"] for cell in cells.values())
    assert lines[-1]["norms"].keys() == {"input", "hidden", "output"}
    assert list(lines[-1]["layer_norms"]) == ["0", "1"]
    assert [line["step"] for line in metrics(whole_run) if "validation_loss" in line] == [0, 6, 12]


def test_a_run_on_a_moved_corpus_is_verified_and_evaluated_where_the_corpus_is_now(data: Path, tmp_path: Path, run: Path) -> None:
    shutil.copytree(data / "corpus", tmp_path / "corpus")
    manifest = make_manifest(tmp_path, experiments=EXPERIMENTS[:1])
    (tmp_path / "corpus").rename(tmp_path / "moved")
    assert train(manifest, run, overrides=[f"corpus.path={tmp_path / 'moved'}"]) == 0
    assert verify(run) == []
    assert (evaluate(run) / "results.parquet").exists()
    (tmp_path / "moved").rename(tmp_path / "corpus")  # what the run read was a copy, and only the corpus that was planned on is left
    assert verify(run) == []


def test_the_record_says_what_the_run_is_and_how_it_ended(manifest: Path, whole_run: Path) -> None:
    record = RunRecord.open(whole_run)
    assert record.record["state"] == "finished"
    assert record.manifest_fingerprint == Manifest.open(manifest).fingerprint
    assert (record.record["layout"]["processes"], record.record["precision"]["name"]) == (1, "fp32")
    assert [attempt["state"] for attempt in record.record["attempts"]] == ["finished"]
    assert orjson.loads((whole_run / "run.json").read_bytes())["versions"]["megatron-core"]


def test_a_finished_run_is_left_alone(manifest: Path, whole_run: Path) -> None:
    before = {file: file.read_bytes() for file in whole_run.rglob("*") if file.is_file()}
    assert train(manifest, whole_run) == 0
    assert {file: file.read_bytes() for file in whole_run.rglob("*") if file.is_file()} == before


def test_a_run_killed_after_its_last_checkpoint_is_entered_as_finished(manifest: Path, whole_run: Path, run: Path) -> None:
    shutil.copytree(whole_run, run)
    record = orjson.loads((run / "run.json").read_bytes())
    record["state"] = record["attempts"][-1]["state"] = "running"
    (run / "run.json").write_bytes(orjson.dumps(record))
    assert train(manifest, run) == 0
    assert RunRecord.open(run).record["state"] == "finished"


def test_an_attempt_that_ends_is_the_newest_of_its_number(whole_run: Path, run: Path) -> None:
    run.mkdir()
    record = orjson.loads((whole_run / "run.json").read_bytes())
    record["attempts"] = [{**record["attempts"][0], "state": "killed"}, {**record["attempts"][0], "state": "running"}]
    (run / "run.json").write_bytes(orjson.dumps(record))
    end_attempt(run, 1, STEPS, "stopped")
    ended = RunRecord.open(run).record
    assert ([one["state"] for one in ended["attempts"]], ended["state"]) == (["killed", "stopped"], "stopped")


def test_a_disk_that_refuses_the_record_of_an_error_hides_neither_the_error_nor_the_end_from_other_hooks() -> None:
    ended = []

    class Failing(Hook):
        def on_start(self, run: Any, state: Any) -> None:
            raise UserError("no room for a checkpoint")

        def on_error(self, run: Any, error: BaseException) -> None:
            raise OSError("no room for a record either")

    class Other(Hook):
        def on_error(self, run: Any, error: BaseException) -> None:
            ended.append(str(error))

    with pytest.raises(UserError, match="no room for a checkpoint"):
        train_loop(SimpleNamespace(hook_states={}), [Failing(), Other()])
    assert ended == ["no room for a checkpoint"]


def test_an_error_while_training_is_entered_in_the_record_and_goes_on(data: Path, run: Path) -> None:
    broken = data.parent / "broken"
    shutil.copytree(data, broken, dirs_exist_ok=True)
    manifest = make_manifest(broken, "manifest-broken", experiments=[])
    shard = next((broken / "corpus").glob("*.bin"))
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    with pytest.raises(UserError, match=r"holds the token id 65535 .* of shard "):
        train(manifest, run)
    assert RunRecord.open(run).record["state"] == "failed"
