"""`megatron-exp search`: counts in shards, in the stream as trained, and in payloads, through the command line."""

import json

import orjson
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_exp.cli.main import app
from megatron_exp.errors import UserError
from tests.report.fabricated import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("search"))


def search(path, strings, tmp_path, *options):
    file = tmp_path / "strings.jsonl"
    file.write_bytes(b"".join(orjson.dumps(string) + b"\n" for string in strings))
    return CliRunner().invoke(app, ["search", str(path), "--strings", str(file), "--json", *options])


def test_an_inserted_payload_is_found_as_often_as_the_manifest_says_and_not_in_the_shards(world, tmp_path):
    row = next(row for row in world.manifest.insertions().to_pylist() if row["kind"] == "tokens")
    copies = sum(other["payload"] == row["payload"] for other in world.manifest.insertions().to_pylist())
    tokens = world.manifest.payload(row["payload"]).tolist()
    answer = search(world.manifest.path, [{"id": "inserted", "token_ids": tokens}], tmp_path, "--out", str(tmp_path / "found"))
    assert answer.exit_code == 0, answer.output
    (found,) = json.loads(answer.stdout)["answer"]["strings"]
    assert (found["corpus"], found["training"], found["payloads"]) == (0, copies, 1)
    assert pq.read_table(tmp_path / "found" / "training.parquet").num_rows == copies


def test_a_corpus_is_searched_for_texts(world, tmp_path):
    answer = search(world.corpus.path, [{"text": "Document 7 of wiki says that 49"}, {"text": "no such words"}], tmp_path)
    strings = json.loads(answer.stdout)["answer"]["strings"]
    assert strings[0]["corpus"] >= 1 and strings[0]["training"] is None and strings[1]["corpus"] == 0


def test_strings_or_payloads_must_be_given(world):
    assert isinstance(CliRunner().invoke(app, ["search", str(world.corpus.path)]).exception, UserError)
