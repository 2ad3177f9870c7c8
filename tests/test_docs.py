"""The documentation says what the code does: every configuration key, every column, every command, every link."""

import re
from pathlib import Path
from typing import get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

from megatron_exp.cli.main import app
from megatron_exp.config.schema import Config
from megatron_exp.dependence.cells import CELL
from megatron_exp.experiments.benchmark_contamination import BenchmarkContamination
from megatron_exp.experiments.knowledge_acquisition import KnowledgeAcquisition
from megatron_exp.experiments.loading import available_types
from megatron_exp.experiments.memorization_patterns import MemorizationPatterns
from megatron_exp.experiments.muse import Muse
from megatron_exp.experiments.pretraining_poisoning import PretrainingPoisoning
from megatron_exp.experiments.released_rows import ReleasedRows
from megatron_exp.experiments.texts import Texts
from megatron_exp.manifest import reference_answers, schema
from megatron_exp.manifest.overlay_index import ENTRY_DTYPE, SLOT_DTYPE
from megatron_exp.model.presets import PRESETS
from megatron_exp.preparation.preprocess_ledger import INPUTS_SCHEMA
from megatron_exp.shards import documents

ROOT = Path(__file__).parent.parent
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

TABLES = {
    "shard-00000.docs.parquet": documents.SCHEMA,
    "inputs.parquet": INPUTS_SCHEMA,
    "items.parquet": schema.ITEMS,
    "insertions.parquet": schema.INSERTIONS,
    "reserve.parquet": schema.RESERVE,
    "bank.parquet": schema.BANK,
    "probes.parquet (of a manifest)": schema.PROBE_DEFINITIONS,
    "probes.parquet (of a run)": schema.PROBES,
    "reference.parquet": reference_answers.SCHEMA,
    "responses.parquet": schema.RESPONSES,
    "results.parquet": schema.RESULTS,
    "results.parquet (of a cell)": CELL,
}


def section(title: str) -> str:
    """The text below a heading of formats.md, up to the next of its level or above."""
    match = re.search(rf"^(##+) {re.escape(title)}\n(.*?)(?=^##|\Z)", FORMATS, re.MULTILINE | re.DOTALL)
    assert match, f"docs/formats.md has no section {title!r}"
    return match[2]


def first_cells(text: str, heading: str) -> set[str]:
    """Every name in backticks in the first column of the table whose first column is called `heading`."""
    table = re.search(rf"^\| {heading} \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"no table with a column {heading!r}"
    return {name for row in table[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def config_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all values of a configuration model."""
    keys = set()
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        is_group = kinds and get_origin(field.annotation) is not tuple
        keys |= config_keys(kinds[0], f"{prefix}{name}.") if is_group else {f"{prefix}{name}"}
    return keys


def documented_config_keys() -> set[str]:
    """Keys of section 2; `.pp` after `training.parallel.tp` stands for its sibling."""
    keys, last = set(), ""
    for row in re.findall(r"^\|([^|]*)\|", section("2 Configuration"), re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            last = f"{last.rpartition('.')[0]}{name}" if name.startswith(".") else name
            keys.add(last)
    return keys


def test_every_configuration_key_is_documented_and_no_other():
    assert documented_config_keys() == config_keys(Config)


@pytest.mark.parametrize("title", TABLES)
def test_every_column_is_documented_and_no_other(title):
    assert first_cells(section(title), "column") == set(TABLES[title].names)


def test_the_overlay_index_is_documented():
    text = section("overlay-slots.npy, overlay-entries.npy")
    for dtype in (SLOT_DTYPE, ENTRY_DTYPE):
        assert ", ".join(f"`{name}` u{8 * dtype[name].itemsize}" for name in dtype.names) in text


def test_every_preset_is_documented_with_its_numbers():
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", section("7 Model presets"), re.MULTILINE)
    documented = {name: [int(number) for number in numbers] for name, *numbers in rows}
    assert documented == {name: [one.layers, one.hidden, one.heads, one.ffn] for name, one in PRESETS.items()}


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("File of the experiment texts", Texts),
        ("File of the experiment memorization_patterns", MemorizationPatterns),
        ("Files of the experiment benchmark_contamination", BenchmarkContamination),
        ("Files of the experiment muse", Muse),
        ("Files of the experiment knowledge_acquisition", KnowledgeAcquisition),
        ("Files of the experiment pretraining_poisoning", PretrainingPoisoning),
        ("Files of the experiment released_rows", ReleasedRows),
    ],
)
def test_every_parameter_of_an_experiment_that_reads_files_is_documented_and_no_other(title, kind):
    assert first_cells(section(title), "parameter") == set(kind.model_fields)


def test_the_readme_lists_every_command():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Commands")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `megatron-exp ([a-z]+)`", table, re.MULTILINE)) == COMMANDS


def test_the_readme_lists_every_experiment():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| experiment |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE)) == set(available_types())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)?(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if target and not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
