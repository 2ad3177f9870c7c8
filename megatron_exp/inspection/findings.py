"""What `verify` reports."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MAX_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """place: the file and the row, record, step or block. problem: what is wrong there.

    normal: worth knowing but no fault (a ledger's torn tail after a kill).
    """

    place: str
    problem: str
    normal: bool = False


def is_sound(findings: list[Finding]) -> bool:
    """Whether nothing is wrong: the exit code of `verify` is 0 if so, else 2."""
    return all(finding.normal for finding in findings)


def rows_where(wrong: np.ndarray, file: str, problem: str) -> Iterator[Finding]:
    """One finding for each row that is True in `wrong` (bool [num_rows]), at most five, then their number."""
    rows = np.flatnonzero(wrong)
    for row in rows[:MAX_NAMED]:
        yield Finding(f"{file} row {int(row)}", problem)
    if len(rows) > MAX_NAMED:
        yield Finding(file, f"{len(rows) - MAX_NAMED} more rows: {problem}")
