"""Reading a user's JSON lines: every mistake is named with file, line and remedy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import require_file


@dataclass(frozen=True)
class Line:
    """One object of a JSON lines file. number: of the line, from 1. layout: how the file should look, for messages."""

    path: Path
    number: int
    record: dict[str, Any]
    layout: str

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field that must be there, of this type (true and false are no numbers)."""
        if name not in self.record:
            self.refuse(f"the field `{name}` is missing; there are {', '.join(f'`{key}`' for key in self.record) or 'none'}")
        value = self.record[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            self.refuse(f"`{name}` is {value!r:.80}, which is of the wrong type")
        return value

    def text(self, name: str) -> str:
        """A field that must hold text, without white space around it."""
        value = self.field(name, str).strip()
        if not value:
            self.refuse(f"`{name}` is empty")
        return value

    def texts(self, name: str) -> list[str]:
        """A field that must be a list of texts."""
        values = self.field(name, list)
        if not values or not all(isinstance(value, str) for value in values):
            self.refuse(f"`{name}` must be a list of texts")
        return [value.strip() for value in values]

    def refuse(self, problem: str) -> NoReturn:
        """UserError that says where, what, and what is expected."""
        raise UserError(f"{self.path}, line {self.number}: {problem}. Expected is {self.layout}. Correct the line or give another file.")


def read_json_lines(path: Path, layout: str) -> Iterator[Line]:
    """The objects of a file, blank lines left out. UserError for a line that holds no object, and for a file that holds none at all."""
    found = False
    with open(require_file(path, layout), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found = True
                yield _line(path, number, line, layout)
    if not found:
        raise UserError(f"{path} is empty. Expected is {layout}; give another file.")


def _line(path: Path, number: int, line: bytes, layout: str) -> Line:
    empty = Line(path, number, {}, layout)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        empty.refuse(f"this is not valid JSON ({error})")
    if not isinstance(record, dict):
        empty.refuse("this is not a JSON object")
    return Line(path, number, record, layout)
