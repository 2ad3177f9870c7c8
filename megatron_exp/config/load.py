"""Reading a config file strictly: YAML 1.2 numbers and booleans, no duplicate and no unknown keys, errors with their line."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_exp.config.schema import Config, ExperimentEntry
from megatron_exp.errors import UserError
from megatron_exp.files import require_file

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 core scalars and refusal of duplicate keys; whatever cannot be made of a node is an error with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # what constructors of tags such as !!bool raise
            raise _refused(f"the value is not of the type that its tag {node.tag} names ({error})", node) from error


_FLOAT = r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first) + ([""] if "null" in _tag else []))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    try:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    except ValueError as error:  # tagged !!int, or of more digits than Python converts
        raise _refused(f"{_shortened(text)} is not a whole number that can be read", node) from error


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError as error:
        raise _refused(f"{_shortened(text)} is not a number", node) from error


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict | set):
            raise _refused("a key is a list or a group of keys; a key is one word (a template such as {{ name }} must be filled in first)", key_node)
        if key in result:
            raise _refused(f"the key {key!r} is given twice", key_node)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _refused(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:30]}... ({len(text):,} characters)")


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError with file and line for anything that is not one."""
    path = require_file(path, "a YAML file")
    try:
        data = _parsed(path.read_text(encoding="utf-8"), lambda line: f"{path}, line {line}" if line else str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {'nothing' if data is None else type(data).__name__}, expected keys and values. See examples/.")
    return data


def _parsed(text: str, at: Callable[[int | None], str]) -> Any:
    """The value that YAML text holds; UserError that begins with `at(line)` for text that is none."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{at(line)}: the control character U+{error.character:04X} stands there, which YAML does not allow. Remove it."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{at(mark.line + 1 if mark else None)}: {error.problem}. Correct the YAML.") from error
    except RecursionError as error:
        raise UserError(f"{at(None)}: lists or groups of keys are nested too deeply to be read. A configuration has a few levels.") from error


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """The checked configuration; `overrides` are `a.b=value` strings. Paths of the corpus and of files of experiments are relative to the file.

    Raises UserError naming file, line and key.
    """
    path = Path(path)
    data = load_yaml(path)
    for override in overrides or []:
        _override(data, override)
    config = validate(data, str(path), _line_finder(path))
    corpus_path = config.corpus.path if config.corpus.path.is_absolute() else (path.parent / config.corpus.path)
    entries = tuple(_beside(entry, path.parent) for entry in config.experiments)
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"path": corpus_path}), "experiments": entries})


_LONGEST_SHOWN = 200

_PATHS = ("file", "paraphrases", "queries")
"""Parameters of experiments that are paths, besides the values of `files`."""


def _beside(entry: ExperimentEntry, folder: Path) -> ExperimentEntry:
    """The entry with the paths that it has found from the config's folder (absolute paths stay as they are)."""
    found: dict[str, Any] = {name: str(folder / file) for name in _PATHS if isinstance(file := entry.parameters.get(name), str)}
    if isinstance(files := entry.parameters.get("files"), dict):
        found["files"] = {name: str(folder / one) if isinstance(one, str) else one for name, one in files.items()}
    return entry.model_copy(update={"parameters": entry.parameters | found}) if found else entry


def override_config(config: Config, overrides: list[str]) -> Config:
    """A checked configuration with `a.b=value` strings applied to it; UserError naming the key."""
    data = config.model_dump(mode="json")
    for override in overrides:
        _override(data, override)
    return validate(data, "The configuration with --set")


def validate(data: dict[str, Any], where: str, line_of: Any = None) -> Config:
    """Check plain data against the schema; UserError lists every problem in one paragraph."""
    return _check(Config, data, f"{where} is not a valid configuration", "docs/formats.md", line_of)


def load_model(path: Path, model: type[Model], what: str, page: str) -> Model:
    """Another YAML file than a configuration, checked as strictly. what: for the message; page: the documentation that lists its keys."""
    path = Path(path)
    return _check(model, load_yaml(path), f"{path} is not a valid {what}", page, _line_finder(path))


def _check(model: type[Model], data: dict[str, Any], refusal: str, page: str, line_of: Any) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(model, one, line_of) for one in error.errors())
        raise UserError(f"{refusal}: {problems}. Correct the keys named; {page} lists them all.") from error


def _problem(model: type[BaseModel], one: Any, line_of: Any) -> str:
    location = [str(part) for part in one["loc"]]
    name = ".".join(location)
    line = f" (line {line_of(location)})" if line_of and line_of(location) else ""
    if one["type"] == "extra_forbidden":
        return f"unknown key {name}{line}{_suggestion(model, location)}"
    if one["type"] == "missing":
        return f"missing key {name}{line}"
    return f"{name}{line}: {plain_reason(one['msg'])}, found {_shown(one['input'])}"


def plain_reason(message: str) -> str:
    """A message of pydantic's; a validator's own words as they were written."""
    return message.removeprefix("Value error, ")


def _shown(value: Any) -> str:
    """A refused value, short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _suggestion(model: type[BaseModel], location: list[str]) -> str:
    group: Any = model
    for part in location[:-1]:
        field = getattr(group, "model_fields", {}).get(part)
        group = field.annotation if field else None
    close = difflib.get_close_matches(location[-1], list(getattr(group, "model_fields", {})), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _line_finder(path: Path) -> Any:
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)

    def line_of(location: list[str]) -> int | None:
        node, line = root, None
        for part in location:
            if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                pair = next(((key, value) for key, value in node.value if key.value == part), None)
                if pair is None:
                    return line
                line, node = pair[0].start_mark.line + 1, pair[1]
        return line

    return line_of


def _override(data: dict[str, Any], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"--set {text!r} is not of the form key.subkey=value.")
    *parents, last = name.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {name}: {parent} is not a group of keys. Name a key that can have the subkey {last}.")
    target[last] = _parsed(value, lambda _: f"--set {name}={_shortened(value)}")


def require_kept_states(config: Config) -> None:
    """UserError where a checkpoint that is to be kept lies beyond the end of the run."""
    last = config.geometry.steps
    beyond = [state for state in config.training.checkpoint.keep if state > last]
    if beyond:
        raise UserError(
            f"training.checkpoint.keep holds {beyond[0]}, but the run has {last} steps, so its last state is {last}. Use states from 0 to that one."
        )
