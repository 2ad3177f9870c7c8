import sys
import textwrap

import pytest

from megatron_exp.config.schema import ExperimentEntry
from megatron_exp.errors import UserError
from megatron_exp.experiments.forgetting_curves import ForgettingCurves
from megatron_exp.experiments.loading import available_types, load_experiment
from tests.experiments.stubs import Passages

OWN = """
    from megatron_exp.experiments.protocol import Experiment

    class _Base(Experiment):
        pass

    class Mine(_Base):
        depth: int = 3
"""


def entry(kind, **parameters):
    return ExperimentEntry(name="trial", type=kind, parameters=parameters)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a third party; they can be imported for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("")

    def write(name, source):
        (tmp_path / "theirs" / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "theirs"]:
        del sys.modules[name]


def test_a_built_in_type_is_loaded_with_its_parameters():
    assert load_experiment(entry("forgetting_curves", num_batches=4)) == ForgettingCurves(num_batches=4)


def test_every_experiment_of_the_package_is_found_and_nothing_else():
    found = available_types()
    assert {"benchmark_contamination", "forgetting_curves", "muse", "texts"} <= set(found)
    assert not {"protocol", "conformance", "contrasts", "news_articles", "benchmark_questions"} & set(found)


def test_a_third_partys_module_is_loaded_by_its_dotted_name(package):
    package("mine", OWN)
    assert load_experiment(entry("theirs.mine", depth=5)).depth == 5


def test_an_unknown_type_lists_what_exists_and_the_closest():
    with pytest.raises(UserError, match="(?s)trial.*forgetting_curve.*Did you mean forgetting_curves.*gaussian_watermarks"):
        load_experiment(entry("forgetting_curve"))


@pytest.mark.parametrize("kind", ["protocol", "conformance"])
def test_a_module_of_the_package_that_is_no_experiment_is_an_unknown_type(kind):
    with pytest.raises(UserError, match="does not exist"):
        load_experiment(entry(kind))


@pytest.mark.parametrize("kind", ["nowhere.mine", "theirs.absent"])
def test_a_missing_module_of_a_third_party_is_the_users_mistake(package, kind):
    with pytest.raises(UserError, match="PYTHONPATH"):
        load_experiment(entry(kind))


def test_an_import_error_inside_a_third_partys_module_is_not_hidden(package):
    package("broken", "import a_package_that_is_missing")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_experiment(entry("theirs.broken"))


@pytest.mark.parametrize("source", ["x = 1", OWN + "\n    class Second(Experiment):\n        pass\n"])
def test_a_module_must_define_exactly_one_public_experiment(package, source):
    package("several", source)
    with pytest.raises(UserError, match="exactly one public subclass"):
        load_experiment(entry("theirs.several"))


def test_a_misspelt_parameter_names_experiment_key_and_closest():
    with pytest.raises(UserError, match=r"trial .*no parameter 'num_batch' \(did you mean num_batches\?\)"):
        load_experiment(entry("forgetting_curves", num_batch=3))


def test_a_bad_value_names_experiment_key_value_and_reason():
    with pytest.raises(UserError, match="trial .*sigma is -1: Input should be greater than 0"):
        load_experiment(entry("gaussian_watermarks", sigma=-1))


def test_a_bad_combination_says_why():
    with pytest.raises(UserError, match="min_tokens 50 is above max_tokens 40"):
        load_experiment(entry("memorization_patterns", min_tokens=50, max_tokens=40))


class Endless(Passages):
    """A default that no manifest can keep."""

    limit: float = float("inf")


def test_a_default_that_is_infinite_is_refused_as_a_value_would_be():
    with pytest.raises(ValueError, match="limit"):
        Endless()
