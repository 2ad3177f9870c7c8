"""Rules of the house that no linter knows: sizes, hidden inputs, thin doors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from megatron_exp.cli.main import app

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "megatron_exp").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOORS = sorted(file for folder in ("tools", "data_prep", "launch", "evals") for file in (ROOT / folder).glob("*.py"))

MOST_LINES, MOST_FUNCTION_LINES = 400, 60

ENVIRONMENT_READERS = {"megatron_exp/parallel/launched.py", "megatron_exp/parallel/layout.py"}
"""torchrun and srun tell a process its rank in variables, and SLURM its job; libraries want to be told things in others."""

MAY_CATCH_EVERYTHING = {"megatron_exp/training/trackers.py", "megatron_exp/model/precision.py"}
"""A service for looking at metrics may raise anything, and must not stop a run of weeks; a library built for another PyTorch raises anything, too."""

FORBIDDEN = {
    "print": "use logging, or rich in cli",
    "eval": "parse what you expect",
    "exec": "import what you need",
    "os.chdir": "join paths",
    "pickle.load": "a pickle executes code when read",
    "pickle.loads": "a pickle executes code when read",
    "os.getenv": "take a parameter",
}


def named(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def forbidden_uses(source: str) -> Iterator[str]:
    """Calls and names that hide an input, an output or a danger, and handlers that hide a fault."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN:
            yield f"line {node.lineno}: {ast.unparse(node.func)}: {FORBIDDEN[ast.unparse(node.func)]}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            yield f"line {node.lineno}: os.environ: take a parameter"
        if isinstance(node, ast.ExceptHandler) and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            caught = ast.unparse(node.type) if node.type else "everything"
            if caught in {"Exception", "BaseException", "everything"}:
                yield f"line {node.lineno}: catches {caught} and goes on: catch what you can answer"


def test_files_are_short():
    lengths = {named(file): len(file.read_text().splitlines()) for file in LIBRARY + TESTS + DOORS}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}, f"over {MOST_LINES} lines: split by topic"


def test_functions_are_short():
    found = [
        f"{named(file)}:{node.lineno} {node.name} has {length} lines"
        for file in LIBRARY
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and (length := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert not found, f"over {MOST_FUNCTION_LINES} lines: " + "; ".join(found)


def test_the_library_has_no_hidden_inputs_or_outputs():
    found = [f"{named(file)}, {text}" for file in LIBRARY for text in forbidden_uses(file.read_text())]
    allowed = {"os.environ": ENVIRONMENT_READERS, "catches Exception": MAY_CATCH_EVERYTHING}
    assert not [text for text in found if not any(what in text and text.split(",")[0] in files for what, files in allowed.items())]


@pytest.mark.parametrize(
    "source",
    ["print(1)", "eval('1')", "x = os.environ['A']", "try:\n    f()\nexcept Exception:\n    pass", "try:\n    f()\nexcept:\n    x = 1"],
)
def test_a_planted_fault_is_found(source):
    assert len(list(forbidden_uses(source))) == 1


@pytest.mark.parametrize("door", DOORS, ids=named)
def test_a_door_says_how_it_is_used_and_makes_one_library_call(door):
    tree = ast.parse(door.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert f"python {named(door)}" in docstring, "the docstring shows the command"
    assert "megatron-exp " in docstring, "the docstring names the same subcommand"
    command = next(node.args[1].value for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.argv.insert")
    assert command in typer.main.get_command(app).commands
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"megatron_exp.cli.main"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While)]
