"""The GPU benchmark as far as a machine without GPU can go: what it says there, and its measurements at toy size on the CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_exp.parallel.device import has_cuda
from tests.model.tiny import running

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(has_cuda(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_so(tmp_path):
    results = tmp_path / "results.jsonl"
    done = subprocess.run([sys.executable, FOLDER / "run.py", "--out", results], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["name"] for line in lines] == list(load("run").part_names())
    assert {line["state"] for line in lines} == {"not run"}
    assert all(line["reason"].startswith("no CUDA") for line in lines)
    assert len(done.stdout.splitlines()) == len(lines)


def test_what_is_known_is_not_run_again_and_what_failed_is(tmp_path, monkeypatch, capsys):
    run = load("run")
    monkeypatch.setattr(run, "reason_not_to_run", lambda: None)
    monkeypatch.setattr(run, "reason_not_to_run_part", lambda part: "no engine" if part.startswith("fp8") else None)
    asked = []
    monkeypatch.setattr(run, "command_of", lambda part: asked.append(part) or [sys.executable, "-c", OK if part == "machine" else FAILS])
    only, out = ["machine", "deterministic", "fp8-delayed"], tmp_path / "results.jsonl"
    run.run(out, only, minutes=1)
    run.run(out, only, minutes=1)
    assert asked == ["machine", "deterministic", "deterministic"]
    found = {line["name"]: line for line in run.lines_of(out)}
    assert found["machine"]["result"] == {"gpu": "none"}
    assert (found["deterministic"]["state"], found["fp8-delayed"]["state"]) == ("failed", "not run")
    assert "out of luck" in found["deterministic"]["reason"]
    assert "no engine" in capsys.readouterr().out


OK = "print('noise'); print('{\"gpu\": \"none\"}')"
FAILS = "raise SystemExit('out of luck')"


@pytest.mark.skipif(has_cuda(), reason="there is a GPU")
def test_the_measurements_themselves_work_at_toy_size(monkeypatch):
    parts = load("parts")
    monkeypatch.setattr(parts, "IDS", 384)
    monkeypatch.setattr(parts, "DIFFERENT_IDS", 50)
    monkeypatch.setattr(parts, "SHAPES", dict.fromkeys(parts.SHAPES, {"preset": "tiny", "layers": 1, "hidden": 32, "heads": 2, "ffn": 32}))
    monkeypatch.setattr(parts, "shape_of", lambda name, length=32, original=parts.shape_of: original(name, 32))
    monkeypatch.setattr(parts.precisions, "engine_version", parts.precisions.engine_version)  # put back what the parts replace
    monkeypatch.setattr(parts, "make", lambda shape, layout, precision, recipe="", make=parts.make: make(shape, layout, precision.replace("fp8", "bf16")))
    with running() as layout:
        assert parts.bf16_local(layout)["relative_difference_to_fp32"] < 0.02
        same = parts.engine_against_local(layout)
        assert same["token_losses"]["largest_difference"] == same["relative_difference_in_training"] == 0
        resumed = parts.fp8(layout, "tensorwise")
        assert resumed["resume_is_bitwise"] and resumed["losses"][-1] < resumed["losses"][0]
        assert parts.deterministic(layout)["bitwise_equal"]
        speed = parts.throughput(layout, "179m", "fp32")
    assert speed["tokens_per_second"] > 0 and speed["mfu"] is None and sum(speed["kernels"]["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norms"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_what_they_do(name, kind):
    assert load("parts").kernel_class(name) == kind
