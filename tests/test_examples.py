"""The configurations that a newcomer copies are valid, and what the README shows is one of them."""

import re
from pathlib import Path

import pytest

from megatron_exp.config.load import load_config
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.model.presets import resolve_shape
from megatron_exp.preparation.trainable import require_schedule

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_configuration_of_valid_experiments(path):
    config = load_config(path)
    assert config.corpus.path == path.parent / "corpus"
    assert all(load_experiment(entry).analysis.outcomes for entry in config.experiments)
    assert resolve_shape(config.model, 4096, config.geometry.sequence_length).num_parameters > 1_000_000
    require_schedule(config)


def test_the_configuration_in_the_readme_is_valid(tmp_path):
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    path = tmp_path / "shown.yaml"
    path.write_text(shown[1])
    config = load_config(path)
    assert [load_experiment(entry).title for entry in config.experiments]
    require_schedule(config)
