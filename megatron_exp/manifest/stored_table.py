"""Reading a table that was written by this package, or by somebody who said so."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.files import require_file


def read_stored(path: Path, expected: pa.Schema, what: str, if_damaged: str, if_other: str) -> pa.Table:
    """The Parquet file PATH with the columns of `expected`.

    UserError where it is missing (`what` it is), unreadable (`if_damaged`, a sentence without its full stop), or has other columns (`if_other`, likewise).
    """
    try:
        table = pq.read_table(require_file(path, what))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). {if_damaged}.") from error
    if table.schema.names != expected.names:
        raise UserError(f"{path} has columns {table.schema.names}, expected {expected.names}. {if_other}.")
    return table
