"""Reading the strings to search for: JSON lines with `text` or `token_ids`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import require_file

if TYPE_CHECKING:
    from megatron_exp.shards.tokenizer import Tokenizer


class SearchString(NamedTuple):
    """id: as given, else the line number. tokens: int32."""

    id: str
    tokens: np.ndarray


def read_strings(path: Path, tokenizer: "Tokenizer") -> list[SearchString]:
    """The strings of a JSONL file, texts encoded with the corpus's tokenizer; UserError names the line that cannot be used."""
    strings = []
    for number, line in enumerate(require_file(path, "JSON lines with the strings").read_bytes().splitlines(), start=1):
        if line.strip():
            strings.append(_string(path, number, line, tokenizer))
    if not strings:
        raise UserError(f"{path} holds no string. Write one JSON object per line, with `text` or `token_ids`.")
    return strings


def _string(path: Path, number: int, line: bytes, tokenizer: "Tokenizer") -> SearchString:
    where = f"{path}, line {number}"
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}). Write one object per line.") from error
    if not isinstance(record, dict) or not {"text", "token_ids"} & record.keys():
        raise UserError(f"{where} must be an object with `text` or `token_ids` (where both are there, the ids are taken).")
    identity = str(record.get("id", number))
    if "token_ids" not in record:
        if not isinstance(record["text"], str):
            raise UserError(f"{where}: `text` must be a string.")
        return SearchString(identity, _not_empty(where, tokenizer.encode(record["text"])))
    ids = record["token_ids"]
    if not isinstance(ids, list) or not all(isinstance(token, int) and 0 <= token < tokenizer.vocabulary_size for token in ids):
        raise UserError(f"{where}: `token_ids` must be a list of ids from 0 to {tokenizer.vocabulary_size - 1}.")
    return SearchString(identity, _not_empty(where, np.array(ids, dtype=np.int32)))


def _not_empty(where: str, tokens: np.ndarray) -> np.ndarray:
    if not len(tokens):
        raise UserError(f"{where} has no token; the empty string is everywhere. Remove the line.")
    return tokens
