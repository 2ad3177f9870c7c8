"""The example of docs/add-an-experiment.md is a file that works."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_exp.config.load import load_config
from megatron_exp.config.schema import ExperimentEntry
from megatron_exp.experiments.conformance import check_experiment, toy_context
from megatron_exp.experiments.loading import load_experiment

PAGE = (Path(__file__).parents[2] / "docs/add-an-experiment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def home_towns(tmp_path, monkeypatch):
    """The page's file, importable by its own name and as part of a package."""
    package = tmp_path / "my_experiments"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for folder in (tmp_path, package):
        (folder / "home_towns.py").write_text(BLOCKS[0][1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def test_the_example_passes_the_check_as_the_page_says(home_towns):
    exec(compile(BLOCKS[1][1], "add-an-experiment.md", "exec"), {})  # noqa: S102


def test_the_example_is_loaded_as_the_page_says(home_towns):
    entry = yaml.safe_load(BLOCKS[2][1])["experiments"][0]
    experiment = load_experiment(ExperimentEntry.model_validate(entry))
    assert experiment.model_dump() == {"num_people": 100, "copies": 8}


def test_the_texts_without_code_are_planned_as_the_page_says(tmp_path):
    """The configuration as it stands; of the lines, so many as an experiment needs."""
    shown = [json.loads(line) for line in re.search(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()]
    lines = shown + [one | {"id": f"{one['id']}-{i}", "prompt": f"In {i}, {one['prompt']}"} for i in range(40) for one in shown]
    (tmp_path / "rivers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = "name: toy\ncorpus: {path: corpus}\ngeometry: {sequence_length: 256, global_batch_size: 8, steps: 600}\n"
    (tmp_path / "run.yaml").write_text(base + BLOCKS[3][1])
    entry = load_config(tmp_path / "run.yaml").experiments[0]
    assert check_experiment(load_experiment(entry), toy_context(entry.name)) == []


def test_the_page_names_only_kinds_and_places_that_exist():
    from megatron_exp.experiments import protocol

    table = PAGE.partition("## Which request")[2].partition("## Habits")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    kinds = {kind for row in rows for kind in re.findall(r"`(\w+)`", row[2])}
    assert kinds <= set(protocol.Kind.__args__)
    assert all(hasattr(protocol, place) for row in rows for place in re.findall(r"`(\w+)`", row[3]))
