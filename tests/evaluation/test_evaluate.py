"""A real run and its twin, tiny, from checkpoints and recorded answers to results."""

import shutil

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from megatron_exp.config.schema import ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.evaluation import evaluate
from megatron_exp.evaluation.asking import Examiner
from megatron_exp.evaluation.subjects import open_run
from megatron_exp.experiments.frames import joined
from megatron_exp.manifest.schema import RESPONSES, RESULTS
from megatron_exp.parallel.layout import start_parallel
from megatron_exp.scoring.engine import Scorer
from megatron_exp.scoring.probes import score_probes
from megatron_exp.scoring.responses import of_experiment
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.keyed import KeyedStream
from megatron_exp.training.launch import launch
from megatron_exp.training.train import train
from tests.training.toy import STEPS, make_manifest

NAME = f"step-{STEPS:08d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with `twin` and `run`; tests only read them, but for `evals`."""
    directory = tmp_path_factory.mktemp("evaluated")
    manifest = make_manifest(directory)
    assert train(manifest, directory / "twin", baseline=True) == 0
    assert train(manifest, directory / "run") == 0
    return directory


@pytest.fixture(scope="module")
def evaluated(trained):
    return evaluate(trained / "run", against=trained / "twin")


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run that a test may damage, not evaluated yet."""
    return shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evals"))


def read(directory):
    return orjson.loads((directory / "results.json").read_bytes())


def responses(directory, experiment):
    return of_experiment(pq.read_table(directory / "responses.parquet").cast(RESPONSES), experiment)


def test_an_evaluation_has_its_three_files(evaluated):
    assert evaluated.name == NAME
    assert sorted(path.name for path in evaluated.iterdir()) == ["responses.parquet", "results.json", "results.parquet"]
    assert pq.read_table(evaluated / "responses.parquet").schema.names == RESPONSES.names
    table = pq.read_table(evaluated / "results.parquet").cast(RESULTS)
    outcomes = [row for one in read(evaluated)["experiments"].values() for row in one["outcomes"]]
    assert len(outcomes) == table.num_rows
    assert {name for row in outcomes for name in row} == {*RESULTS.names, "family", "reason"} - {"experiment"}


def test_every_experiment_has_a_verdict_and_the_primaries_are_one_family(evaluated):
    record = read(evaluated)
    assert set(record["experiments"]) == {"canaries", "forgetting", "watermarks"}
    assert record["family_sizes"]["primary"] == 3
    assert all(one["verdict"] for one in record["experiments"].values())
    assert record["is_final"] and record["against"]["relation"] == "twin" and record["against"]["differences"] == []


def test_every_question_has_one_response_of_run_and_one_of_twin(evaluated):
    table = pq.read_table(evaluated / "responses.parquet")
    questions = table.group_by(["experiment", "item", "arm", "probe", "step"]).aggregate([("model", "count"), ("model", "count_distinct")])
    assert set(questions["model_count"].to_pylist()) == set(questions["model_count_distinct"].to_pylist()) == {2}
    assert set(table["reason"].to_pylist()) == {""} and table["value"].null_count == 0


def test_live_responses_are_what_training_recorded(trained, evaluated):
    recorded = pq.read_table(trained / "run" / "probes.parquet").to_pylist()
    run = [row for row in responses(evaluated, "forgetting").to_pylist() if row["model"] == "run"]
    assert sorted((r["item"], r["step"], r["value"]) for r in run) == sorted((r["item"], r["step"], r["value"]) for r in recorded)


def test_a_loaded_checkpoint_answers_as_the_live_model_did(trained, evaluated):
    subject, manifest = open_run(trained / "run")
    corpus = Corpus.open(manifest.corpus_path)
    probes = of_experiment(manifest.probes(), "forgetting")
    layout = start_parallel(ParallelConfig())
    try:
        examiner = Examiner(manifest, probes, KeyedStream.open(manifest.config, corpus), layout)
        loaded = score_probes(Scorer(examiner.loaded(subject, STEPS)), probes, manifest, examiner.stream).to_pylist()
    finally:
        layout.stop()
    table = responses(evaluated, "forgetting")
    final = table.filter(pc.and_(pc.equal(table["step"], STEPS), pc.equal(table["model"].cast("string"), "run"))).to_pylist()
    assert {row["item"]: row["value"] for row in final} == {row["item"]: row["value"] for row in loaded}


def test_evaluating_again_gives_the_same_bytes(trained, evaluated):
    before = {path.name: path.read_bytes() for path in evaluated.iterdir()}
    stamp = (evaluated / "results.json").stat().st_mtime_ns
    assert evaluate(trained / "run", against=trained / "twin") == evaluated
    assert (evaluated / "results.json").stat().st_mtime_ns == stamp, "the same inputs need no computation"
    assert evaluate(trained / "run", against=trained / "twin", overwrite=True) == evaluated
    assert (evaluated / "results.json").stat().st_mtime_ns != stamp
    assert {path.name: path.read_bytes() for path in evaluated.iterdir()} == before


def test_results_of_other_inputs_are_not_replaced_unasked(trained, evaluated):
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(trained / "run")
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(trained / "run", against=trained / "twin", experiments=["canaries"])


def test_without_a_twin_only_the_run_answers(copied):
    directory = evaluate(copied)
    assert set(pq.read_table(directory / "responses.parquet")["model"].to_pylist()) == {"run"}
    assert read(directory)["against"] is None
    assert {row["twin"] for one in read(directory)["experiments"].values() for row in one["outcomes"]} == {None}


def test_a_subset_keeps_the_size_of_the_primary_family(copied):
    record = read(evaluate(copied, experiments=["watermarks"]))
    assert list(record["experiments"]) == ["watermarks"] and record["family_sizes"]["primary"] == 3
    with pytest.raises(UserError, match="no experiment poems"):
        evaluate(copied, experiments=["poems"])


def test_a_run_that_is_no_baseline_is_an_external_reference_and_never_paired(trained, copied):
    directory = evaluate(copied, against=trained / "run")
    against = read(directory)["against"]
    assert against["relation"] == "external" and "no baseline" in against["differences"][0]
    assert set(pq.read_table(directory / "responses.parquet")["model"].to_pylist()) == {"run", "external"}
    items = open_run(copied)[1].items()
    assert not joined(of_experiment(items, "canaries"), responses(directory, "canaries")).has_twin


def test_a_twin_of_another_model_is_no_twin(trained, tmp_path, copied):
    other = shutil.copytree(trained / "twin", tmp_path / "twin")
    record = orjson.loads((other / "run.json").read_bytes())
    record["identity"]["model"] = "another"
    (other / "run.json").write_bytes(orjson.dumps(record))
    assert read(evaluate(copied, against=other))["against"]["differences"] == ["model or initialisation"]


def test_an_earlier_state_can_be_evaluated_and_has_its_own_directory(copied):
    directory = evaluate(copied, states=[8])
    assert directory.name == "step-00000008" and not read(directory)["is_final"]
    assert max(pq.read_table(directory / "responses.parquet")["step"].to_pylist()) <= 8


def test_a_run_can_be_asked_in_another_precision_which_is_part_of_the_inputs(trained, evaluated, copied):
    directory = evaluate(copied, against=trained / "twin", precision="bf16")
    assert read(directory)["inputs"]["precision"] == "bf16" and "precision" not in read(evaluated)["inputs"]
    exact, rounded = (pq.read_table(one / "responses.parquet")["nats"].drop_null().to_numpy() for one in (evaluated, directory))
    assert np.allclose(exact, rounded, rtol=0.05, atol=0.05) and not np.array_equal(exact, rounded)
    with pytest.raises(UserError, match="other inputs"):
        evaluate(copied, against=trained / "twin")
    assert evaluate(trained / "run", against=trained / "twin", precision="fp32") == evaluated, "what it was trained in is no other precision"


def test_a_state_without_checkpoint_is_refused_with_those_there_are(copied):
    with pytest.raises(UserError, match="state 7 .*8, 12"):
        evaluate(copied, states=[7])


def test_a_twin_without_that_checkpoint_leaves_reasons(trained, tmp_path, copied):
    other = shutil.copytree(trained / "twin", tmp_path / "twin")
    shutil.rmtree(other / "checkpoints" / NAME)
    record = read(evaluate(copied, against=other))
    assert record["experiments"]["canaries"]["unscored"] == {"twin": {"the twin has no checkpoint of this state": 16}}


def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(copied):
    file = max((copied / "checkpoints" / NAME).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        evaluate(copied)
    assert not (copied / "evals").exists() or not any((copied / "evals").iterdir())


def test_a_manifest_that_is_not_the_run_s_is_refused(copied):
    record = orjson.loads((copied / "run.json").read_bytes())
    record["manifest"]["fingerprint"] = "0" * 32
    (copied / "run.json").write_bytes(orjson.dumps(record))
    with pytest.raises(UserError, match="back in its place"):
        evaluate(copied)


def test_processes_that_share_a_model_answer_as_one_process_does(trained, evaluated, copied):
    command = ["eval", str(copied), "--against", str(trained / "twin"), "--tp", "2", "--pp", "1"]
    assert launch(command, 2) == 0
    shared, alone = (pq.read_table(folder / "responses.parquet") for folder in (copied / "evals" / NAME, evaluated))
    for field in alone.schema:
        ours, theirs = shared[field.name], alone[field.name]
        if pa.types.is_floating(field.type):
            np.testing.assert_allclose(ours.to_numpy(), theirs.to_numpy(), rtol=1e-4, atol=1e-4, err_msg=field.name)
        else:
            assert ours.to_pylist() == theirs.to_pylist(), field.name
    verdicts = [{name: one["verdict"] for name, one in read(folder)["experiments"].items()} for folder in (copied / "evals" / NAME, evaluated)]
    assert verdicts[0] == verdicts[1]


def test_a_model_that_shares_no_process_is_refused_before_anything_is_asked(copied):
    with pytest.raises(UserError, match="2 processes for each copy of the model, but 1 were started"):
        evaluate(copied, parallel=ParallelConfig(tp=2))
    assert not (copied / "evals").exists()
