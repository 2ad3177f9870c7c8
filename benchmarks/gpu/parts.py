"""The measurements of run.py, each for a process of its own. Models are real presets; tokens are drawn by key."""

import contextlib
import hashlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_exp.model import precision as precisions
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.memory import TrainingLayout, training_memory
from megatron_exp.model.optimizer import Optimizer, build_optimizer
from megatron_exp.model.presets import ModelShape, resolve_shape
from megatron_exp.model.scoring import token_scores
from megatron_exp.model.step import MicroBatch, StepResult, train_step
from megatron_exp.parallel import device as devices
from megatron_exp.parallel.layout import Layout, start_parallel
from megatron_exp.seeding import Words

Activity = torch.profiler.ProfilerActivity

IDS, DIFFERENT_IDS, STEPS, LEARNING_RATE = 100_278, 2000, 20, 1e-3
SHAPES = {
    "small": {"preset": "olmo2-179m", "layers": 4},
    "179m": {"preset": "olmo2-179m"},
    "1b": {"preset": "olmo2-1b"},
    "7b-shaped": {"preset": "olmo2-7b", "layers": 4},
}
TIMED_STEPS = 6
MICRO_BATCHES = 4
KERNELS = {
    "communication": ("nccl",),
    "attention": ("fmha", "flash", "fused_attn", "cudnn_generated", "sdpa"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "wgrad", "matmul"),
    "fp8 conversion": ("quantize", "amax", "fp8", "cast_transpose", "transpose_cast", "rowwise", "scaling"),
    "norms": ("norm", "rsqrt", "pow_sum"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "loss": ("softmax", "logsumexp", "scatter_gather", "scatter", "exp_kernel", "arange"),
    "copies": ("memcpy", "memset", "copy", "catarray"),
}
"""Class of kernel to parts of its name; the first class that matches counts, all others are elementwise."""


def shape_of(name: str, length: int = 4096) -> ModelShape:
    """A shape of SHAPES with the vocabulary of the dolma2 tokenizer."""
    return resolve_shape(ModelConfig(**SHAPES[name]), IDS, length)


def batches(shape: ModelShape, rows: int, num_micro: int, step: int) -> list[MicroBatch]:
    """Micro-batches of ids drawn by key; few different ids, so that there is something to learn in 20 steps."""
    drawn = Words.of(0, "gpu", step).integers(rows * num_micro * (shape.sequence_length + 1), DIFFERENT_IDS)
    tokens = torch.from_numpy(drawn).view(num_micro, rows, -1).long()
    return [MicroBatch(part, torch.ones((rows, shape.sequence_length), dtype=torch.uint8)) for part in tokens]


def make(shape: ModelShape, layout: Layout, precision: str, recipe: str = "tensorwise") -> tuple[LanguageModel, Optimizer]:
    """A model with its optimizer."""
    model = build_model(shape, layout, precision, 0, recipe)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer.set_learning_rate(LEARNING_RATE)
    return model, optimizer


def train(model: LanguageModel, optimizer: Optimizer, steps: range) -> list[StepResult]:
    """Updates on batches that depend on the step alone."""
    return [train_step(model, optimizer, batches(model.shape, 4, 1, step)) for step in steps]


def losses(results: list[StepResult]) -> list[float]:
    """Of each step."""
    return [result.loss for result in results]


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def without_engine() -> None:
    """From here on in this process PyTorch's layers are built, as on a machine without Transformer Engine."""
    precisions.engine_version = lambda: None


def weights_hash(model: LanguageModel) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for parameter in model.chunks[0].parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def different_weights(one: LanguageModel, other: LanguageModel) -> dict[str, list[float]]:
    """Name of a parameter to the number of weights that differ and the largest difference."""
    found = {}
    for (name, mine), theirs in zip(one.chunks[0].named_parameters(), other.chunks[0].parameters(), strict=True):
        difference = (mine.detach().float() - theirs.detach().float()).abs()
        if int(difference.count_nonzero()):
            found[name] = [int(difference.count_nonzero()), float(difference.max())]
    return found


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "gpu": devices.describe_device(device),
        "capability": ".".join(map(str, devices.compute_capability())),
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformer_engine": precisions.engine_version(),
        "peak_tflops": (devices.peak_flops(device) or 0) / 1e12 or None,
    }


def bf16_local(layout: Layout) -> dict[str, Any]:
    """PyTorch's layers in bf16 against fp32, from the same weights."""
    without_engine()
    shape = shape_of("small", 1024)
    exact = losses(train(*make(shape, layout, "fp32"), range(STEPS)))
    rounded = losses(train(*make(shape, layout, "bf16"), range(STEPS)))
    return {"losses": rounded, "relative_difference_to_fp32": apart(rounded, exact), "goal": 0.02}


def engine_against_local(layout: Layout) -> dict[str, Any]:
    """Transformer Engine's layers against PyTorch's: losses of every token before, and of steps while training."""
    shape = shape_of("small", 1024)
    tokens = batches(shape, 4, 1, 0)[0].tokens
    model, optimizer = make(shape, layout, "bf16")
    made = token_scores(model, tokens).losses
    trained = losses(train(model, optimizer, range(STEPS)))
    implementation = model.implementation
    without_engine()
    local, optimizer = make(shape, layout, "bf16")
    difference = (token_scores(local, tokens).losses - made).abs()
    return {
        "layers": implementation,
        "token_losses": {"mean_difference": float(difference.mean()), "largest_difference": float(difference.max())},
        "relative_difference_in_training": apart(trained, losses(train(local, optimizer, range(STEPS)))),
        "goal": 0.01,
    }


def fp8(layout: Layout, recipe: str) -> dict[str, Any]:
    """A recipe against bf16; resumed after half of the steps, and repeated from the start, against not interrupted: deterministic, see `measure`."""
    shape = shape_of("small", 1024)
    reference = losses(train(*make(shape, layout, "bf16"), range(STEPS)))
    model, optimizer = make(shape, layout, "fp8", recipe)
    half = STEPS // 2
    first = train(model, optimizer, range(half))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "half", model, optimizer, {})
        rest = losses(train(model, optimizer, range(half, STEPS)))
        again, its_optimizer = make(shape, layout, "fp8", recipe)
        load_checkpoint(Path(folder) / "half", again, its_optimizer)
    its_optimizer.set_learning_rate(LEARNING_RATE)
    resumed = losses(train(again, its_optimizer, range(half, STEPS)))
    repeated, repeats_optimizer = make(shape, layout, "fp8", recipe)
    train(repeated, repeats_optimizer, range(STEPS))
    return {
        "products": precisions.effective_precision(model.chunks[0], recipe),
        "losses": losses(first) + rest,
        "relative_difference_to_bf16": apart(losses(first) + rest, reference),
        "resume_relative_difference": apart(resumed, rest),
        "resume_is_bitwise": resumed == rest and weights_hash(again) == weights_hash(model),
        "differs_after_resume": different_weights(again, model),
        "differs_when_repeated": different_weights(repeated, model),
    }


def deterministic(layout: Layout) -> dict[str, Any]:
    """Two runs: equal bit for bit or not, and what a step costs."""
    shape = shape_of("small", 1024)
    runs = [make(shape, layout, "bf16") for _ in range(2)]
    made = [losses(train(*run, range(STEPS))) for run in runs]
    equal = made[0] == made[1] and weights_hash(runs[0][0]) == weights_hash(runs[1][0])
    return {"deterministic": layout.deterministic, "bitwise_equal": equal, "seconds_per_step": timed(*runs[0], rows=4)}


def synchronize(layout: Layout) -> None:
    """Wait for the device."""
    if layout.device.type == "cuda":
        torch.cuda.synchronize()


def timed(model: LanguageModel, optimizer: Optimizer, rows: int) -> float:
    """Median seconds of an update of MICRO_BATCHES micro-batches."""
    prepared = [batches(model.shape, rows, MICRO_BATCHES, step) for step in range(2)]
    seconds = []
    for step in range(TIMED_STEPS + 2):
        synchronize(model.layout)
        begin = time.perf_counter()
        train_step(model, optimizer, prepared[step % 2])
        synchronize(model.layout)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[2:])[TIMED_STEPS // 2]


def calculated_bytes(shape: ModelShape, precision: Literal["bf16", "fp8"], rows: int) -> float:
    """What training with so many rows in a micro-batch is calculated to take on this GPU alone."""
    return training_memory(shape, TrainingLayout(precision=precision, micro_batch_size=rows)).total


def largest_that_fits(shape: ModelShape, layout: Layout, precision: Literal["bf16", "fp8"], recipe: str) -> tuple[LanguageModel, Optimizer, int, float]:
    """Model, optimizer, rows of a micro-batch, seconds of a step: as many rows as are calculated to fit, or fewer where they do not."""
    on_gpu = layout.device.type == "cuda"
    room = 0.92 * torch.cuda.get_device_properties(layout.device).total_memory if on_gpu else float("inf")
    for rows in (16, 8, 4, 2, 1):
        if rows > 1 and calculated_bytes(shape, precision, rows) > room:
            continue
        try:
            model, optimizer = make(shape, layout, precision, recipe)
            return model, optimizer, rows, timed(model, optimizer, rows)
        except torch.OutOfMemoryError:
            model = optimizer = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
    raise MemoryError("not even one row of a micro-batch fits on this GPU")


def throughput(layout: Layout, name: str, precision: Literal["bf16", "fp8"], recipe: str = "tensorwise") -> dict[str, Any]:
    """Speed of updates alone, and where the device's time goes."""
    shape = shape_of(name)
    model, optimizer, rows, seconds = largest_that_fits(shape, layout, precision, recipe)
    tokens = rows * MICRO_BATCHES * shape.sequence_length / seconds
    peak = devices.peak_flops(layout.device)
    return {
        "parameters": shape.num_parameters,
        "micro_batch_size": rows,
        "seconds_per_step": seconds,
        "tokens_per_second": tokens,
        "mfu": tokens * shape.flops_per_token / peak if peak else None,
        "memory_gib": devices.peak_memory_bytes(layout.device) / 2**30,
        "calculated_memory_gib": calculated_bytes(shape, precision, rows) / 2**30,
        "kernels": kernels(model, optimizer, rows),
    }


def kernels(model: LanguageModel, optimizer: Optimizer, rows: int) -> dict[str, Any]:
    """Device milliseconds of one update by class of kernel, and the costliest kernels by name."""
    micro_batches = batches(model.shape, rows, MICRO_BATCHES, 0)
    on_gpu = model.layout.device.type == "cuda"
    with torch.profiler.profile(activities=[Activity.CUDA if on_gpu else Activity.CPU]) as profile:
        train_step(model, optimizer, micro_batches)
        synchronize(model.layout)
    by_name: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        by_name[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    by_class: dict[str, float] = defaultdict(float)
    for name, milliseconds in by_name.items():
        by_class[kernel_class(name)] += milliseconds
    costliest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {"milliseconds": dict(sorted(by_class.items(), key=lambda item: -item[1])), "costliest": [[name[:120], time] for name, time in costliest]}


def kernel_class(name: str) -> str:
    """The class of KERNELS that a kernel's name belongs to."""
    lowered = name.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in lowered for part in parts)), "elementwise")


def measure(part: str) -> dict[str, Any]:
    """The result of one part; run by run.py in a process of its own. Only in deterministic mode is equal bit for bit no accident."""
    if part == "machine":
        return machine()
    kind, _, rest = part.partition("-")
    with one_process(deterministic=part == "deterministic" or kind == "fp8") as layout:
        if part == "bf16-local":
            return bf16_local(layout)
        if part == "engine-against-local":
            return engine_against_local(layout)
        if kind == "fp8":
            return fp8(layout, rest)
        if kind == "deterministic":
            return deterministic(layout)
        name, _, precision = rest.rpartition("-")
        recipe = precision if precision in precisions.RECIPES else "tensorwise"
        return throughput(layout, name, "fp8" if precision in precisions.RECIPES else "bf16", recipe)


@contextlib.contextmanager
def one_process(deterministic: bool) -> Iterator[Layout]:
    """A layout of this process alone, for a block."""
    layout = start_parallel(ParallelConfig(), deterministic=deterministic)
    try:
        yield layout
    finally:
        layout.stop()

