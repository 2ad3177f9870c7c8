"""From a trained twin to a second plan, to a run on it: everything real, tiny."""

import subprocess
import sys

import numpy as np
import orjson
import pytest
import yaml

from megatron_exp.checkpoint.convert import to_huggingface
from megatron_exp.cli.reference import opened_reference
from megatron_exp.errors import UserError
from megatron_exp.evaluation import evaluate
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.plan import plan
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import in_training
from megatron_exp.shards.corpus import Corpus
from megatron_exp.training.train import train
from tests.training import toy

CANARIES, FORGETTING, _ = toy.EXPERIMENTS
MODEL_BASED = {**CANARIES, "name": "model-based", "suffix_types": ["model-based"]}
VERBATIM = {"name": "verbatim", "type": "verbatim_completion", "selection": "likelihood", "string_tokens": 12, "prompt_tokens": 6}
VERBATIM |= {"num_strings": 16, "min_strings": 12, "states": [0.5, 1.0]}
LISTED = [MODEL_BASED, CANARIES, VERBATIM, FORGETTING]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a corpus of short documents, manifest (planned without a reference) and twin."""
    directory = tmp_path_factory.mktemp("reference")
    texts = [orjson.loads(line)["text"] for line in toy.write_texts(directory / "texts.jsonl").read_bytes().splitlines()]
    toy.make_corpus_of(directory, [sentence + "." for text in texts for sentence in text.split(".")[:7]])
    manifest = toy.make_manifest(directory, experiments=LISTED)
    assert train(manifest, directory / "twin", baseline=True) == 0
    return directory


def config_of(world):
    return toy.make_config(world / "corpus", experiments=LISTED)


def planned(world, out, reference, step=None):
    with opened_reference(reference, step, config_of(world)) as (model, plans):
        assert plans
        return plan(config_of(world), out, Manifest.open(world / "manifest"), reference=model)


@pytest.fixture(scope="module")
def second(world):
    return planned(world, world / "manifest-2", world / "twin")


def suffixes(manifest):
    rows = [row for row in manifest.items().to_pylist() if row["experiment"] == "model-based"]
    return {
        row["item"]: manifest.payload(row["payload"])[row["spans"][-1]["start"] : row["spans"][-1]["end"]].tolist() for row in rows
    }


def test_the_second_plan_adds_canaries_of_the_twin(second):
    told = second.record["reference"]
    assert (told["relation"], told["differences"], told["state"], told["kind"]) == ("twin", [], toy.STEPS, "run")
    found = suffixes(second)
    assert len(found) == 8 and all(len(set(one)) == len(one) == 4 or len(one) == 4 for one in found.values())
    assert verify(second.path) == []


def test_no_removed_string_is_left_in_the_stream_as_trained(world, second):
    items = [row for row in second.items().to_pylist() if row["experiment"] == "verbatim"]
    strings = {arm: [second.payload(row["payload"]) for row in items if row["condition"] == arm] for arm in ("removed", "kept")}
    assert len(strings["removed"]) == len(strings["kept"]) == 8
    corpus = Corpus.open(world / "corpus")
    stream = second.open_stream(corpus)
    trained = Overlay.open(stream, second)
    slots = {arm: in_training(stream, Patterns.of(found))["slot"].to_pylist() for arm, found in strings.items()}
    assert len(slots["removed"]) >= 4 and set(slots["removed"]) <= {row["slot"] for row in second.insertions().to_pylist()}
    assert in_training(trained, Patterns.of(strings["removed"])).num_rows == 0
    assert in_training(trained, Patterns.of(strings["kept"])).num_rows >= 4


def test_another_state_of_the_twin_is_another_reference(world, second, tmp_path):
    other = planned(world, tmp_path / "m", world / "twin", step=8)
    assert other.record["reference"]["state"] == 8
    assert other.record["reference"]["fingerprint"] != second.record["reference"]["fingerprint"]


def test_a_run_on_the_second_manifest_and_the_twin_of_the_first_are_a_pair(world, second):
    """Also the twin's live answers count: they were given to the same questions."""
    run = world / "run"
    assert train(second.path, run) == 0
    assert verify(run) == []
    directory = evaluate(run, against=world / "twin")
    results = orjson.loads((directory / "results.json").read_bytes())
    assert results["against"]["relation"] == "twin" and results["against"]["differences"] == []
    assert all(not one["unscored"] for one in results["experiments"].values()), results["experiments"]
    assert any(row["outcome"] == "continuation" and row["primary"] and row["p"] for row in results["experiments"]["verbatim"]["outcomes"])
    assert {row["outcome"] for row in results["experiments"]["model-based"]["outcomes"]} >= {"auc", "auc-by-condition", "gain"}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_command_gives_the_same_plan_in_one_process_and_under_torchrun(world, second, tmp_path, num_processes):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of(world).model_dump(mode="json")))
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if num_processes == 2 else []
    arguments = ["config.yaml", "--out", "m", "--reference", str(world / "twin"), "--extends", str(world / "manifest")]
    done = subprocess.run(
        [sys.executable, *start, "-m", "megatron_exp", "plan", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("modified tokens:") == 1
    assert Manifest.open(tmp_path / "m").fingerprint == second.fingerprint


def test_the_same_weights_as_a_hugging_face_model_choose_the_same_canaries(world, second, tmp_path):
    """Within one step of rounding: the least likely token of a tie may be another."""
    pytest.importorskip("transformers")
    to_huggingface(world / "twin", tmp_path / "hf")
    other = planned(world, tmp_path / "m", tmp_path / "hf")
    assert (other.record["reference"]["kind"], other.record["reference"]["relation"]) == ("huggingface", "external")
    ours, theirs = suffixes(second), suffixes(other)
    assert np.mean([ours[item] == theirs[item] for item in ours]) > 0.7


def test_a_run_with_insertions_is_an_external_reference(world, second, tmp_path):
    if not (world / "run" / "run.json").exists():
        train(second.path, world / "run")
    told = planned(world, tmp_path / "m", world / "run").record["reference"]
    assert told["relation"] == "external" and told["differences"] == ["insertions (it is no baseline)"]


@pytest.mark.parametrize(
    ("reference", "step", "words"),
    [
        ("twin", 5, r"no complete checkpoint of state 5 \(there are: .*12\)"),
        ("nowhere", None, "neither a checkpoint nor a run"),
        ("manifest", None, "planned without a reference, so it records no answers"),
        (None, 3, "which was not given"),
        ("manifest-2", 12, "answers of one state"),
    ],
)
def test_a_reference_that_is_not_there_is_refused(world, second, tmp_path, reference, step, words):
    with pytest.raises(UserError, match=words):
        planned(world, tmp_path / "m", reference and world / reference, step)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_can_be_asked_in_another_precision_and_is_another_one_then(world, second, tmp_path):
    with opened_reference(world / "twin", None, config_of(world), "bf16") as (model, _):
        identity = model.identity.record()
    exact = second.record["reference"]
    assert identity["precision"] == "bf16" and "precision" not in exact
    assert identity["fingerprint"] != exact["fingerprint"] and identity["relation"] == "twin"
    with opened_reference(world / "twin", None, config_of(world), "fp32") as (model, _):
        assert model.identity.fingerprint == exact["fingerprint"], "what it was trained in is no other precision"


def test_a_reference_that_never_saw_this_tokenizer_is_refused(world, tmp_path):
    texts = (world / "texts.jsonl").read_bytes().splitlines()
    other = toy.make_corpus_of(tmp_path, [orjson.loads(line)["text"].upper() for line in texts])
    config = config_of(world)
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"path": other})})
    with (
        pytest.raises(UserError, match="another tokenizer"),
        opened_reference(world / "twin", None, config) as (model, _),
    ):
        plan(config, tmp_path / "m", reference=model)
