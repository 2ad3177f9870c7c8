"""From an entry of the config to an experiment object: by module name, without a registry."""

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from pydantic import ValidationError

import megatron_exp.experiments
from megatron_exp.config.load import plain_reason
from megatron_exp.config.schema import ExperimentEntry
from megatron_exp.errors import UserError
from megatron_exp.experiments.protocol import Experiment

_PACKAGE = megatron_exp.experiments.__name__


def load_experiment(entry: ExperimentEntry) -> Experiment:
    """The experiment of a config entry.

    `type` is the name of a module of `megatron_exp.experiments`, or the dotted name of a third party's module; the module defines
    exactly one public subclass of `Experiment`. Raises UserError for an unknown type and for parameters the class refuses.
    """
    module = _load_module(entry)
    found = experiment_class(module)
    try:
        return found(**entry.parameters)
    except ValidationError as error:
        raise UserError(_parameter_message(entry, found, error)) from error


def experiment_class(module: ModuleType) -> type[Experiment]:
    """The one public subclass of `Experiment` that `module` itself defines; UserError where there are none or several."""
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Experiment) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if len(classes) != 1:
        listed = ", ".join(sorted(one.__name__ for one in classes)) or "none"
        raise UserError(
            f"The module {module.__name__} must define exactly one public subclass of megatron_exp.experiments.protocol.Experiment; it defines {listed}. "
            "Put each experiment in a file of its own, and start names of base classes with an underscore."
        )
    return classes[0]


def available_types() -> list[str]:
    """Names of the built-in experiment types, found by looking at which modules of the package define one."""
    names = [module.name for module in pkgutil.iter_modules(megatron_exp.experiments.__path__)]
    return [name for name in names if _defines_experiment(importlib.import_module(f"{_PACKAGE}.{name}"))]


def _defines_experiment(module: ModuleType) -> bool:
    return any(
        inspect.isclass(value) and issubclass(value, Experiment) and value is not Experiment and value.__module__ == module.__name__
        for value in vars(module).values()
    )


def _load_module(entry: ExperimentEntry) -> ModuleType:
    """Import the module of `entry.type`. An ImportError inside an existing module is the author's bug and passes through."""
    name = entry.type if "." in entry.type else f"{_PACKAGE}.{entry.type}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(_unknown_type_message(entry, error.name)) from error
    if "." not in entry.type and not _defines_experiment(module):
        raise UserError(_unknown_type_message(entry, name))
    return module


def _unknown_type_message(entry: ExperimentEntry, missing: str) -> str:
    start = f"Experiment {entry.name} has the type {entry.type!r}, "
    if "." in entry.type:
        return start + f"but no module {missing} can be imported. Install its package, or put its folder on PYTHONPATH."
    available = available_types()
    close = get_close_matches(entry.type, available, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return start + f"which does not exist. {hint}There are {', '.join(available)}; an experiment of your own is named package.module."


def _parameter_message(entry: ExperimentEntry, found: type[Experiment], error: ValidationError) -> str:
    """One sentence per refused parameter: key, value, reason."""
    problems = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            close = get_close_matches(key, found.model_fields, n=1)
            problems.append(f"it has no parameter {key!r}" + (f" (did you mean {close[0]}?)" if close else ""))
        elif problem["type"] == "missing":
            problems.append(f"{key} is missing")  # the input of such a problem is the whole entry
        elif key:
            problems.append(f"{key} is {problem['input']!r}: {plain_reason(problem['msg'])}")
        else:
            problems.append(plain_reason(problem["msg"]))
    return (
        f"Experiment {entry.name} ({entry.type}) cannot be set up: {'; '.join(problems)}. Its parameters are {', '.join(found.model_fields)}; "
        f"the docstring of {found.__module__} explains them."
    )
