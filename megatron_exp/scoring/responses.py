"""Answers of models as rows of one responses table."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.manifest.schema import RESPONSES

_ORDER = ["experiment", "probe", "step", "item", "arm", "model"]


def plain(table: pa.Table) -> pa.Table:
    """The table with dictionary columns as strings: joins and sorts then see values, not encodings."""
    fields = [(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type) for field in table.schema]
    return table.cast(pa.schema(fields))


def stamped(answers: pa.Table, label: str, state: int) -> pa.Table:
    """Plain answers (columns of ANSWERS) with the model and state they are of."""
    answers = plain(answers).append_column("model", pa.array([label] * len(answers), pa.string()))
    return answers.append_column("step", pa.array(np.full(len(answers), state, np.uint32)))


def responses_table(parts: list[pa.Table], items: pa.Table) -> pa.Table:
    """RESPONSES of all parts with the condition of each item, in an order that depends on the content alone."""
    answers = pa.concat_tables(parts).rename_columns({"name": "probe"})
    conditions = plain(items.select(["experiment", "item", "arm", "condition"]))
    table = answers.join(conditions, keys=["experiment", "item", "arm"], join_type="left outer")
    return table.sort_by([(name, "ascending") for name in _ORDER]).select(RESPONSES.names).cast(RESPONSES)


def of_experiment(table: pa.Table, name: str) -> pa.Table:
    """The rows of one experiment."""
    return table.filter(pc.equal(table["experiment"].cast(pa.string()), name))
