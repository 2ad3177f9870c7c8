"""Answers of all models to all questions, as one table of responses."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.evaluation.questions import Questions
from megatron_exp.evaluation.subjects import Label
from megatron_exp.scoring.probes import ANSWERS
from megatron_exp.scoring.responses import plain, stamped

NOT_RECORDED = "no answer was recorded in training"
UNSCORED_LIVE = "could not be scored in training"
_QUESTION = ["experiment", "item", "arm", "name"]


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
