"""The account of every input file: lines in = documents out + rejected, by reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import pyarrow as pa

from megatron_exp.errors import UserError

REJECT_REASONS = {
    "invalid_utf8": "bytes that are not UTF-8",
    "invalid_json": "a line that is not JSON",
    "not_an_object": "JSON that is not an object",
    "missing_text": "no field `text`",
    "null_text": "`text` is null",
    "text_not_a_string": "`text` is not a string",
    "empty_text": "`text` is the empty string",
    "lone_surrogate": "`text` holds half of a surrogate pair, which no encoding can express",
    "bad_id": "`id` is neither a string nor an integer",
    "too_long": "a line, text file or text of Parquet above 104 MiB",
    "special_string": "the text holds the string of a special token (special_in_text=reject)",
}

_NUM_PLACES = 20  # rejects whose place is kept, per file

INPUTS_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("source", pa.string()),
        ("format", pa.string()),
        ("codec", pa.string()),
        ("bytes", pa.uint64()),
        ("modified_ns", pa.int64()),
        ("hash", pa.string()),
        ("lines_in", pa.uint64()),
        ("docs_out", pa.uint64()),
        ("tokens", pa.uint64()),
        ("text_bytes", pa.uint64()),
        ("blank_lines", pa.uint64()),
        ("nonstandard_lines", pa.uint64()),
        ("special_documents", pa.uint64()),
        ("special_strings", pa.uint64()),
        ("checked_documents", pa.uint64()),
        ("rejected", pa.list_(pa.struct([("reason", pa.string()), ("count", pa.uint64())]))),
        ("rejects", pa.list_(pa.struct([("line", pa.uint64()), ("reason", pa.string())]))),
    ]
)
"""inputs.parquet: one row per input file, in input order."""


@dataclass
class FileLedger:
    """What became of one input file.

    lines_in: lines of JSON lines, rows of Parquet, 1 for a text file that is not empty. blank_lines hold only white space; they
    are no documents and not part of lines_in. nonstandard_lines: documents whose line only Python's json reads (NaN, a lone
    surrogate outside the text). special_documents, special_strings: documents that hold strings of special tokens, and how
    many. checked_documents: re-encoded with the reference library. rejects: places (line, reason) of the first rejects.
    """

    file: str
    source: str
    format: str
    codec: str
    bytes: int
    modified_ns: int
    hash: str = ""
    lines_in: int = 0
    docs_out: int = 0
    tokens: int = 0
    text_bytes: int = 0
    blank_lines: int = 0
    nonstandard_lines: int = 0
    special_documents: int = 0
    special_strings: int = 0
    checked_documents: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects: list[tuple[int, str]] = field(default_factory=list)

    def reject(self, line: int, reason: str) -> None:
        assert reason in REJECT_REASONS, reason
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        if len(self.rejects) < _NUM_PLACES:
            self.rejects.append((line, reason))

    def close(self) -> None:
        """AssertionError unless every line is accounted for."""
        assert self.lines_in == self.docs_out + sum(self.rejected.values()), f"the ledger of {self.file} does not add up: {self}"

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def inputs_table(ledgers: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The rows of inputs.parquet from ledger records."""
    rows = [
        {
            **ledger,
            "rejected": [{"reason": reason, "count": count} for reason, count in sorted(ledger["rejected"].items())],
            "rejects": [{"line": line, "reason": reason} for line, reason in ledger["rejects"]],
        }
        for ledger in ledgers
    ]
    return pa.Table.from_pylist(rows, schema=INPUTS_SCHEMA)


def ledgers_of(table: pa.Table) -> list[dict[str, Any]]:
    """The ledger records in inputs.parquet, the reverse of `inputs_table`."""
    return [
        {
            **row,
            "rejected": {reject["reason"]: reject["count"] for reject in row["rejected"]},
            "rejects": [(reject["line"], reject["reason"]) for reject in row["rejects"]],
        }
        for row in table.to_pylist()
    ]


def refuse_no_document(ledgers: Sequence[Mapping[str, Any]]) -> NoReturn:
    """UserError that says why input files gave no document."""
    total = totals(ledgers)
    if not total["lines_in"]:
        raise UserError(f"The input holds no document: {total['files']} files were read, and there is nothing in them. Check the inputs.")
    raise UserError(
        f"The input holds no document that can be used: {total['files']} files were read, and all of their {total['lines_in']} lines were rejected: "
        f"{_reasons(total)}. First places: {_places(ledgers)}. Check that these are the right files, and correct them."
    )


def _reasons(total: Mapping[str, Any]) -> str:
    return "; ".join(f"{count} with {REJECT_REASONS[reason]} ({reason})" for reason, count in total["rejected"].items())


def _places(ledgers: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join([f"{ledger['file']}:{line} ({reason})" for ledger in ledgers for line, reason in ledger["rejects"]][:5])


def totals(ledgers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The corpus-wide ledger that corpus.json holds."""
    counted = (
        "lines_in",
        "docs_out",
        "tokens",
        "text_bytes",
        "blank_lines",
        "nonstandard_lines",
        "special_documents",
        "special_strings",
        "checked_documents",
    )
    rejected: Counter[str] = Counter()
    for ledger in ledgers:
        rejected.update(ledger["rejected"])
    return {
        "files": len(ledgers),
        **{name: _sum_of_known(ledger[name] for ledger in ledgers) for name in counted},
        "rejected": dict(sorted(rejected.items())),
    }


def _sum_of_known(counts: Iterable[int | None]) -> int | None:
    """The sum; None where a count is not known, as for imported shards."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def check_rejects(ledgers: Sequence[Mapping[str, Any]], max_reject_rate: float) -> None:
    """UserError where more lines were rejected than allowed; it names reasons, counts and the first places."""
    total = totals(ledgers)
    num_rejected = sum(total["rejected"].values())
    if num_rejected <= max_reject_rate * total["lines_in"]:
        return
    rate = num_rejected / total["lines_in"]
    raise UserError(
        f"{num_rejected} of {total['lines_in']} lines cannot be used: {_reasons(total)}. First places: {_places(ledgers)}. Nothing is dropped without "
        f"your consent: correct the input, or allow it with a max_reject_rate of at least {rate:.2g}; finished files are not read again."
    )
