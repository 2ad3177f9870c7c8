"""`doctor`: what this machine can run, and why not the rest."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One line: a capability, whether it is there, and what was found or is missing."""

    name: str
    available: bool
    detail: str


def examine(directory: Path = Path()) -> list[Finding]:
    """Look at Python, the machine, torch, megatron-core and the optional parts. Nothing is installed or changed."""
    return [_machine(), _disk(directory), *_torch(), _compiler(), _megatron(), _transformer_engine(), _apex(), _fp8(), _huggingface(), _slurm()]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Finding("machine", True, f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, {memory:.0f} GiB memory")


def _disk(directory: Path) -> Finding:
    usage = shutil.disk_usage(directory)
    return Finding(
        "disk", usage.free > 2**30, f"{usage.free / 2**30:.0f} GiB free of {usage.total / 2**30:.0f} GiB in {directory.resolve()}"
    )


def _torch() -> list[Finding]:
    import torch

    findings = [Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} CPU threads")]
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU: check the driver with nvidia-smi"
        return [*findings, Finding("CUDA", False, f"{reason}; training runs on CPU with gloo")]
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        size = torch.cuda.get_device_properties(index).total_memory / 2**30
        findings.append(
            Finding(f"GPU {index}", True, f"{name}, compute capability {major}.{minor}, {size:.0f} GiB, CUDA {torch.version.cuda}")
        )
    return findings


def _megatron() -> Finding:
    version = _version("megatron-core")
    tested = version is not None and version.startswith("0.16.")
    detail = f"{version}" if tested else f"{version or 'not installed'}; tested with 0.16.x: pip install 'megatron-core>=0.16.1,<0.17'"
    return Finding("megatron-core", tested, detail)


def _transformer_engine() -> Finding:
    from megatron_exp.model.precision import INSTALL_ENGINE, describe_fault, engine_fault, engine_version, is_tested_engine

    version, fault = engine_version(), engine_fault()
    if version is None:
        return Finding("Transformer Engine", False, f"not installed; needed for FP8 and the fused layers on GPUs: {INSTALL_ENGINE}")
    if fault is not None:
        return Finding("Transformer Engine", False, describe_fault(fault))
    tested = is_tested_engine(version)
    return Finding("Transformer Engine", tested, version if tested else f"{version}, but 2.9 up to, not including, 2.12 is wanted")


def _compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return Finding("C compiler", bool(found), found or "none found; on GPUs PyTorch needs one (and Python's headers) to build the kernels it compiles")


def _apex() -> Finding:
    version = _version("apex")
    if version is None:
        return Finding(
            "apex", False, "not installed; optional, only from NVIDIA's source (the package of that name on the index is unrelated)"
        )
    from megatron_exp.model.precision import engine_fault

    if engine_fault() is not None:
        return Finding("apex", False, f"{version}; it is not tried, since megatron-core does not start with this Transformer Engine")
    from megatron_exp.model.olmo2 import has_fused_gradient_sums

    if has_fused_gradient_sums():
        return Finding("apex", True, f"{version}; weight gradients are summed inside the products")
    return Finding("apex", False, f"{version}, but without NVIDIA's kernels (fused_weight_gradient_mlp_cuda): it is not used")


def _fp8() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("FP8", False, "needs a GPU of compute capability 8.9 or more and Transformer Engine")
    capable = torch.cuda.get_device_capability() >= (8, 9)
    engine = _transformer_engine().available
    missing = [
        reason
        for reason, there in (("the GPU is older than compute capability 8.9", capable), ("Transformer Engine is missing or unusable", engine))
        if not there
    ]
    return Finding("FP8", not missing, "; ".join(missing) or "hardware and Transformer Engine are there")


def _huggingface() -> Finding:
    version = _version("transformers")
    return Finding(
        "transformers", version is not None, version or "not installed; needed to score Hugging Face models: pip install 'megatron-exp[hf]'"
    )


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    return Finding("SLURM", path is not None, path or "no sbatch on this machine; runs start with `megatron-exp train` or torchrun")
