"""Answers of all models to all questions, as one table of responses."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.evaluation.questions import Questions
from megatron_exp.evaluation.subjects import Label
from megatron_exp.manifest.schema import RESPONSES
from megatron_exp.scoring.probes import ANSWERS

NOT_RECORDED = "no answer was recorded in training"
UNSCORED_LIVE = "could not be scored in training"
_QUESTION = ["experiment", "item", "arm", "name"]
_ORDER = ["experiment", "probe", "step", "item", "arm", "model"]


def plain(table: pa.Table) -> pa.Table:
    """The table with dictionary columns as strings: joins and sorts then see values, not encodings."""
    fields = [(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type) for field in table.schema]
    return table.cast(pa.schema(fields))


def stamped(answers: pa.Table, label: Label, state: int) -> pa.Table:
    """Plain answers (columns of ANSWERS) with the model and state they are of."""
    answers = plain(answers).append_column("model", pa.array([label] * len(answers), pa.string()))
    return answers.append_column("step", pa.array(np.full(len(answers), state, np.uint32)))


def unanswered(probes: pa.Table, rows: np.ndarray, label: Label, state: int, reason: str) -> pa.Table:
    """Responses to questions nobody could be asked."""
    asked = probes.take(pa.array(rows)).select(_QUESTION)
    columns = {name: asked[name] if name in _QUESTION else pa.nulls(len(asked), ANSWERS.field(name).type) for name in ANSWERS.names}
    columns["reason"] = pa.array([reason] * len(asked), pa.string())
    return stamped(pa.table(columns), label, state)


def live_responses(probes: pa.Table, questions: Questions, recorded: pa.Table, label: Label, absent: str = NOT_RECORDED) -> pa.Table:
    """Responses to the live questions, from what training recorded (PROBES); the last attempt at a state counts.

    `absent`: the reason given where nothing was recorded.
    """
    live = questions.where(questions.live)
    asked = plain(probes.take(pa.array(live.probe)).select(_QUESTION)).append_column("step", pa.array(live.state.astype(np.uint32)))
    asked = asked.append_column("place", pa.array(np.arange(len(asked))))
    found = asked.join(_last_attempt(plain(recorded)), keys=[*_QUESTION, "step"], join_type="left outer").sort_by("place")
    missing = pc.if_else(pc.is_null(found["attempt"]), absent, pc.if_else(pc.is_null(found["value"]), UNSCORED_LIVE, ""))
    nothing = {name: pa.nulls(len(found), plain(ANSWERS.empty_table()).schema.field(name).type) for name in ("nats", "greedy", "text")}
    columns = {**{name: found[name] for name in (*_QUESTION, "value", "num_tokens", "step")}, **nothing, "reason": missing}
    columns["model"] = pa.array([label] * len(found), pa.string())
    return pa.table({name: columns[name] for name in (*ANSWERS.names, "model", "step")})


def _last_attempt(recorded: pa.Table) -> pa.Table:
    last = recorded.group_by("step").aggregate([("attempt", "max")])
    return recorded.join(last, keys="step").filter(pc.field("attempt") == pc.field("attempt_max")).drop_columns("attempt_max")


def responses_table(parts: list[pa.Table], items: pa.Table) -> pa.Table:
    """RESPONSES of all parts with the condition of each item, in an order that depends on the content alone."""
    answers = pa.concat_tables(parts).rename_columns({"name": "probe"})
    conditions = plain(items.select(["experiment", "item", "arm", "condition"]))
    table = answers.join(conditions, keys=["experiment", "item", "arm"], join_type="left outer")
    return table.sort_by([(name, "ascending") for name in _ORDER]).select(RESPONSES.names).cast(RESPONSES)
