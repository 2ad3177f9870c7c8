"""Which number formats a model computes in, and whether this machine and these sizes can: asked before anything is built.

megatron-core accepts FP8 without Transformer Engine and then ignores it, and fails in the middle of a step where a size does not fit.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from megatron_exp.errors import UserError
from megatron_exp.model.presets import ModelShape
from megatron_exp.parallel import device as devices
from megatron_exp.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

Precision = Literal["fp32", "bf16", "fp8"]

ENGINE_VERSIONS = ((2, 9), (2, 12))
"""Transformer Engine from the first on and below the second: what megatron-core 0.16.1 is developed against (its own requirement)."""
INSTALL_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12'"


_TRAINED = "A model that is trained already is asked in another precision with `eval --precision` or `plan --reference-precision`."


class _Recipe(NamedTuple):
    """lowest, highest: compute capability that has it, highest excluded. needs: in words.

    multiple: of every side of a product. gathered: of both sides of what tensor-parallel ranks gather under sequence_parallel.
    """

    lowest: tuple[int, int]
    highest: tuple[int, int]
    multiple: int
    gathered: int
    needs: str


_NEVER = (99, 0)
RECIPES = {
    "delayed": _Recipe((8, 9), _NEVER, 16, 16, "an Ada, Hopper or Blackwell GPU (compute capability 8.9 or more)"),
    "tensorwise": _Recipe((9, 0), _NEVER, 16, 16, "a Hopper or Blackwell GPU (compute capability 9.0 or more)"),
    "blockwise": _Recipe((9, 0), (10, 0), 16, 128, "a Hopper GPU (compute capability 9.0)"),
    "mxfp8": _Recipe((10, 0), _NEVER, 32, 32, "a Blackwell GPU (compute capability 10.0 or more)"),
}


def engine_version() -> str | None:
    """The version of Transformer Engine that is installed, None where there is none."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def engine_fault() -> Exception | None:
    """Why the Transformer Engine that is installed does not load; None where it does, and where there is none."""
    if engine_version() is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # noqa: BLE001 - what a library of another version raises is anything
        return error
    return None


def require_engine() -> None:
    """Called by every command that needs a model, before megatron-core is imported: it imports Transformer Engine in many places.

    Raises:
        UserError: where Transformer Engine is installed and does not load. On a machine without a GPU megatron-core does without it, if only
            a library is missing there.
    """
    fault = engine_fault()
    if fault is not None and (devices.has_cuda() or not isinstance(fault, ImportError)):
        raise UserError(describe_fault(fault))


def describe_fault(fault: Exception) -> str:
    """Installed, but of no use, and what to do."""
    told = f"{type(fault).__name__}: {fault}".splitlines()[0]
    return (
        f"Transformer Engine {engine_version()} is installed but does not load ({told}), often because it was built for another PyTorch or CUDA. "
        f"Reinstall it ({INSTALL_ENGINE}), or uninstall it to use PyTorch's layers."
    )


def is_tested_engine(version: str) -> bool:
    """Whether a version of Transformer Engine is in the range that this version of megatron-core knows."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and ENGINE_VERSIONS[0] <= (int(found[1]), int(found[2])) < ENGINE_VERSIONS[1]


def choose_implementation(layout: Layout, precision: Precision) -> Literal["torch", "transformer-engine"]:
    """Whose linear layers and attention run: Transformer Engine's on a GPU where it is installed, else PyTorch's.

    Raises:
        UserError: where Transformer Engine is of a version nobody has tried, or FP8 is asked for and it is missing.
    """
    assert precision in get_args(Precision), precision
    version = engine_version() if layout.device.type == "cuda" else None
    if version is not None and not is_tested_engine(version):
        raise UserError(
            f"Transformer Engine {version} is installed, but this megatron-core is made for 2.9 up to, not including, 2.12; "
            f"with another version layers may be wired wrongly without an error. Install one of the range ({INSTALL_ENGINE}), or uninstall it to train in "
            "bf16 with PyTorch's layers."
        )
    if precision == "fp8" and version is None:
        missing = "no Transformer Engine is installed" if layout.device.type == "cuda" else "it computes on the CPU"
        raise UserError(
            f"training.precision is fp8, but FP8 needs an NVIDIA GPU of the Hopper generation or later and Transformer Engine, and on this machine {missing}. "
            f"Install it on a GPU machine ({INSTALL_ENGINE}), or set training.precision to bf16 (fp32 on CPU). {_TRAINED}"
        )
    return "torch" if version is None else "transformer-engine"


def check_fp8(shape: ModelShape, layout: Layout, recipe: str) -> None:
    """UserError where the GPU has no such recipe, or a side of a product that runs in FP8 is no multiple of what the recipe asks for."""
    known = RECIPES[recipe]
    capability = devices.compute_capability()
    if not known.lowest <= capability < known.highest:
        raise UserError(
            f"training.fp8_recipe is {recipe}, which needs {known.needs}; this machine has {devices.describe_device(layout.device)} "
            f"({capability[0]}.{capability[1]}). {_other_recipes(capability)} {_TRAINED}"
        )
    for what, number in fp8_sides(shape, layout).items():
        multiple = positions_multiple(recipe, layout) if what in _GATHERED else known.multiple
        if number % multiple:
            raise UserError(
                f"training.precision fp8 with fp8_recipe {recipe} multiplies matrices whose sides are multiples of {multiple}, but {what} is {number} "
                f"on each process. Change that size or degree, or set training.precision to bf16. {_TRAINED}"
            )


def positions_multiple(recipe: str | None, layout: Layout) -> int:
    """The positions that one process holds of a sequence must be a multiple of this; of 1 without FP8 (recipe None)."""
    if recipe is None:
        return 1
    return RECIPES[recipe].gathered if layout.sequence_parallel else RECIPES[recipe].multiple


def _other_recipes(capability: tuple[int, int]) -> str:
    possible = [name for name, recipe in RECIPES.items() if recipe.lowest <= capability < recipe.highest]
    return f"Set it to {' or '.join(possible)}." if possible else "Set training.precision to bf16."


_HIDDEN, _LENGTH = "model.hidden", "geometry.sequence_length / training.parallel.cp (/ tp under sequence_parallel)"
_GATHERED = {_HIDDEN, _LENGTH}


def fp8_sides(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """The sides of all products that run in FP8, on one process, named by the settings that make them."""
    qkv = (shape.hidden + 2 * shape.kv_width) // layout.tp_size
    length = shape.sequence_length // layout.cp_size // (layout.tp_size if layout.sequence_parallel else 1)
    return {
        _HIDDEN: shape.hidden,
        "model.hidden / training.parallel.tp": shape.hidden // layout.tp_size,
        "the width of queries, keys and values together (model.hidden, model.kv_groups; / training.parallel.tp)": qkv,
        "model.ffn / training.parallel.tp": shape.ffn // layout.tp_size,
        _LENGTH: length,
    }


def effective_precision(chunk: "GPTModel", recipe: str | None) -> dict[str, str]:
    """What the products of each kind are computed in, read off the layers that were built; `recipe` is None without FP8."""
    layer = chunk.decoder.layers[0]
    weights = next(layer.parameters()).dtype
    wide = _name(weights)
    kinds = {
        "attention.qkv": layer.self_attention.linear_qkv,
        "attention.projection": layer.self_attention.linear_proj,
        "mlp.gate_and_up": layer.mlp.linear_fc1,
        "mlp.down": layer.mlp.linear_fc2,
    }
    made = {kind: f"fp8 {recipe}: e4m3 forward, e5m2 gradients" if recipe and _is_engine(module) else wide for kind, module in kinds.items()}
    return {
        **made,
        "attention.scores": wide,
        "head": wide,
        "norms": f"fp32 inside, {wide} out",
        "loss": "fp32",
        "gradient_sums": "fp32",
        "master_weights_and_moments": "fp32",
    }


def _is_engine(module: torch.nn.Module) -> bool:
    """Whether one of the module's classes is Transformer Engine's."""
    return any(owner.__module__.startswith("transformer_engine") for owner in type(module).__mro__)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
