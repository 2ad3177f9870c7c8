"""The benchmark of preprocessing also runs Megatron's own scripts: with their options, on a stand-in checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# Takes the options that Megatron-LM's tools/preprocess_data.py and preprocess_data_fast.py take, and writes what they write.
STAND_IN = """
import argparse, json, sys
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
for name in ("--input", "--output-prefix", "--tokenizer-model"):
    parser.add_argument(name, required=True)
parser.add_argument("--tokenizer-type", choices=["HuggingFaceTokenizer"], required=True)
parser.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
parser.add_argument("--append-eod", action="store_true")
if "fast" in sys.argv[0]:
    parser.add_argument("--use-gigatoken", action="store_true", required=True)
else:
    parser.add_argument("--workers", type=int, required=True)
options = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_model)
builder = IndexedDatasetBuilder(f"{options.output_prefix}_text_document.bin", dtype=DType.optimal_dtype(len(tokenizer)))
for line in open(options.input, encoding="utf-8"):
    ids = [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    builder.add_document(torch.IntTensor(ids), [len(ids)])
builder.finalize(f"{options.output_prefix}_text_document.idx")
"""


@pytest.mark.slow
def test_megatrons_own_scripts_are_called_as_they_want_to_be_and_give_the_same_tokens(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "tools").mkdir()
    for name in ("preprocess_data.py", "preprocess_data_fast.py"):
        (tmp_path / "tools" / name).write_text(STAND_IN)
    options = ["--megabytes", "1", "--files", "2", "--pairs", "1", "--megatron", str(tmp_path)]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "preprocess.py"), *options], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["benchmark"] for result in results] == ["preprocess-against-preprocess-data", "preprocess-against-gigatoken-script"]
    assert all(result["same_tokens"] and result["peer"] == "Megatron-LM's own script" for result in results)
