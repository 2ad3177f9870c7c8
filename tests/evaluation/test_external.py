"""A Hugging Face model answers a manifest, and a killed evaluation goes on where it was."""

import shutil

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from megatron_exp.checkpoint.convert import to_huggingface
from megatron_exp.errors import UserError
from megatron_exp.evaluation import asking, evaluate, evaluate_model
from megatron_exp.manifest.reader import Manifest
from megatron_exp.training.train import train
from tests.training.toy import STEPS, make_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`manifest`, `run`, its twin, and `hf`, the run's final model in the layout of transformers."""
    directory = tmp_path_factory.mktemp("external")
    manifest = make_manifest(directory)
    assert train(manifest, directory / "twin", baseline=True) == 0
    assert train(manifest, directory / "run") == 0
    to_huggingface(directory / "run", directory / "hf")
    return directory


def read(directory):
    return orjson.loads((directory / "results.json").read_bytes())


def test_a_converted_run_answers_as_the_run_does_and_nothing_is_tested(trained):
    manifest = Manifest.open(next(trained.glob("*/manifest.json")).parent)
    out = evaluate_model(trained / "hf", manifest.path, trained / "external")
    own = evaluate(trained / "run")
    theirs = pq.read_table(out / "responses.parquet").to_pylist()
    ours = {
        (r["experiment"], r["item"], r["arm"], r["probe"]): r["value"]
        for r in pq.read_table(own / "responses.parquet").to_pylist()
        if r["step"] == STEPS
    }
    compared = [(row["value"], ours.get((row["experiment"], row["item"], row["arm"], row["probe"]))) for row in theirs]
    pairs = np.array([pair for pair in compared if None not in pair])
    assert len(pairs) > 20 and pairs[:, 0] == pytest.approx(pairs[:, 1], rel=1e-3, abs=1e-3)
    assert {row["model"] for row in theirs} == {"external"}
    record = read(out)
    rows = [row for one in record["experiments"].values() for row in one["outcomes"]]
    assert rows and all(row["p"] is None and row["verdict"] is None and row["exploratory"] for row in rows)
    assert any(row["estimate"] is not None for row in rows)


def test_a_model_of_another_tokenizer_is_refused(trained, tmp_path):
    other = shutil.copytree(trained / "hf", tmp_path / "hf")
    record = orjson.loads((other / "tokenizer.json").read_bytes())
    vocabulary = record["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    extra = f"<|{len(vocabulary)}|>"
    vocabulary[extra] = max(vocabulary.values()) + 1
    (other / "tokenizer.json").write_bytes(orjson.dumps(record))
    manifest = next(trained.glob("*/manifest.json")).parent
    with pytest.raises(UserError, match="reads another tokenizer"):
        evaluate_model(other, manifest, tmp_path / "out")


def test_a_killed_evaluation_keeps_what_was_answered(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    whole = evaluate(run, against=trained / "twin")
    wanted = (whole / "responses.parquet").read_bytes()
    shutil.rmtree(run / "evals")
    asked, real = [], asking.score_probes

    def killed(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(asking, "score_probes", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, against=trained / "twin")
    assert len(list((run / "evals").glob("*.units/run-*.parquet"))) == 1
    monkeypatch.setattr(asking, "score_probes", real)
    monkeypatch.setattr(asking.Examiner, "loaded", only_the_twin(asking.Examiner.loaded))
    again = evaluate(run, against=trained / "twin")
    assert (again / "responses.parquet").read_bytes() == wanted and not list((run / "evals").glob("*.units"))


def only_the_twin(loaded):
    def checked(self, subject, state):
        assert subject.label == "twin", "the run has answered already"
        return loaded(self, subject, state)

    return checked
