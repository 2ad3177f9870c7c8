"""The import direction: what a module may know about. Checked on the source, so lazy and type-only imports count too."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_exp"

LAYERS = {
    "foundation": {"config", "display", "errors", "files", "fingerprint", "seeding", "statistics"},
    "data": {"control", "ledger", "manifest", "overlay", "placement", "run_record", "search", "shards", "stream", "submission"},
    "experiments": {"experiments"},
    "model": {"model", "parallel"},
    "machinery": {"checkpoint", "scoring"},
    "applications": {"cluster", "dependence", "evaluation", "inspection", "preparation", "report", "training"},
    "command line": {"__main__", "cli"},
}
"""From the bottom up. A part imports from its own layer and from those below; applications not even one another."""

RANK = {part: rank for rank, parts in enumerate(LAYERS.values()) for part in parts}

TORCH = {"apex", "megatron", "torch", "transformer_engine", "transformers"}
MAY_USE_TORCH = LAYERS["model"] | LAYERS["machinery"] | {"cli", "dependence", "evaluation", "training"}
"""From the model layer up, but for the applications whose commands start without it."""

TORCH_FREE_MODULES = [
    "megatron_exp.cli.main",
    "megatron_exp.config.load",
    "megatron_exp.preparation.plan",
    "megatron_exp.overlay.overlay",
    "megatron_exp.inspection",
    "megatron_exp.model.presets",
    "megatron_exp.checkpoint.catalogue",
    "megatron_exp.ledger",
    "megatron_exp.report",
]
SLOW_TO_IMPORT = {"duckdb", "matplotlib", "numba", "scipy.stats", "sentencepiece", "tokenizers"}


def part_of(name: str) -> str:
    """The top-level part of a module of ours: `stream` for megatron_exp.stream.slot."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def parts_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of one of our own parts."""
    for line, name in imported_names(tree):
        if name.startswith("megatron_exp.") and part_of(name) in RANK:
            yield line, part_of(name)


def violations(part: str, source: str) -> Iterator[str]:
    """Every import in `source`, a file of `part`, that breaks a rule, with the rule."""
    tree = ast.parse(source)
    for line, other in parts_used(tree):
        if RANK[other] > RANK[part]:
            yield f"line {line}: {part} imports {other}, which lies above it. Imports go down only: {' <- '.join(LAYERS)}."
        elif other != part and part in LAYERS["applications"] and other in LAYERS["applications"]:
            yield f"line {line}: {part} imports {other}. Applications never import one another: share in a lower layer or join them in cli."
    for line, name in imported_names(tree):
        if name.split(".")[0] in TORCH and part not in MAY_USE_TORCH:
            yield f"line {line}: {part} imports {name}. torch lives in {', '.join(sorted(MAY_USE_TORCH))} only."


def modules() -> list[tuple[str, Path]]:
    """(part, file) of every module of the package; the package's own __init__ has the part ''."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", ""), file) for file in files]


def test_every_part_has_a_layer():
    parts = {part for part, _ in modules()} - {""}
    unknown = sorted(parts - set(RANK))
    assert not unknown, f"{unknown} stand in no layer. Add them to LAYERS in {Path(__file__).name}, as low as their imports allow."


def test_imports_go_one_way():
    checked = [(file.relative_to(PACKAGE.parent), violations(part, file.read_text())) for part, file in modules() if part in RANK]
    found = [f"{name}, {text}" for name, texts in checked for text in texts]
    assert not found, "\n".join(found)


def test_the_package_itself_imports_nothing():
    assert list(imported_names(ast.parse((PACKAGE / "__init__.py").read_text()))) == [], "importing megatron_exp must cost nothing"


@pytest.mark.parametrize("layer", LAYERS)
def test_parts_of_a_layer_form_no_cycle(layer):
    graph: dict[str, set[str]] = {part: set() for part in LAYERS[layer]}
    for part, file in modules():
        if part in graph:
            graph[part] |= {other for _, other in parts_used(ast.parse(file.read_text())) if other in graph and other != part}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{' -> '.join(reversed(error.args[1]))} import one another. Move what both need into the lower one.")


@pytest.mark.parametrize(
    ("part", "source", "rule"),
    [
        ("stream", "from megatron_exp.overlay import Overlay\nfrom megatron_exp.experiments.context import Context", "go down only"),
        ("stream", "def f():\n    from megatron_exp import training", "go down only"),
        ("report", "import megatron_exp.evaluation.run", "never import one another"),
        ("experiments", "from torch import nn", "torch lives in"),
        ("inspection", "import megatron.core.parallel_state", "torch lives in"),
    ],
)
def test_a_planted_violation_is_found(part, source, rule):
    assert [rule in text for text in violations(part, source)] == [True]


def test_commands_that_need_no_torch_do_not_load_it():
    script = (
        "import importlib, json, sys\n"
        "importlib.import_module('megatron_exp.cli.main'); importlib.import_module('megatron_exp.inspection')\n"
        "first = sorted(sys.modules)\n"
        f"for name in {TORCH_FREE_MODULES}: importlib.import_module(name)\n"
        "print(json.dumps([first, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    first, all_loaded = map(set, json.loads(done.stdout))
    assert not all_loaded & TORCH, "these commands must start without torch: import it inside the function that needs it"
    assert not first & SLOW_TO_IMPORT, "`inspect` must start in under a second: import these inside the function that needs them"
