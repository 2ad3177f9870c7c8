"""Scores of the experiment MUSE: what was written, rates, leaks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp.experiments.frames import Frame
from megatron_exp.experiments.protocol import Score
from megatron_exp.statistics.roc import auc
from megatron_exp.statistics.rouge import rouge_l_recall

NEVER = "never"
"""The condition of articles that are never inserted."""
_WRITTEN = ("verbatim", "knowledge")


def with_recall(items: pa.Table, responses: pa.Table) -> pa.Table:
    """The responses with the ROUGE-L recall of what was written as value of every scored `verbatim` and `knowledge` row whose text was kept; else null.

    Of an answer the first line counts.
    """
    is_asked = [arm != "inserted" for arm in items["arm"].to_pylist()]
    rows = zip(items["item"].to_pylist(), items["arm"].to_pylist(), items["metadata"].to_pylist(), is_asked, strict=True)
    references = {(item, arm): orjson.loads(text)["reference"] for item, arm, text, chosen in rows if chosen}
    columns = (responses[name].to_pylist() for name in ("probe", "item", "arm", "value", "text", "reason"))
    values = [
        value if probe not in _WRITTEN else _recall(references[item, arm], text, probe, reason)
        for probe, item, arm, value, text, reason in zip(*columns, strict=True)
    ]
    return responses.set_column(responses.schema.get_field_index("value"), "value", pa.array(values, pa.float64()))


def _recall(reference: str, text: str | None, probe: str, reason: str) -> float | None:
    if text is None or reason:
        return None
    return rouge_l_recall(reference, text.strip().partition("\n")[0] if probe == "knowledge" else text)


def first_part(text: str, share: float) -> str:
    """This share of a text's words, from its beginning."""
    words = text.split()
    return " ".join(words[: round(share * len(words))])


def per_token(frame: Frame) -> Frame:
    """The same rows in nats per token."""
    return replace(frame, run=frame.run / frame.num_tokens, twin=frame.twin / frame.num_tokens)


def against_never(frame: Frame, conditions: Sequence[str]) -> Frame:
    """The rows of some conditions and of the articles never inserted."""
    return frame.where(np.isin(frame.condition, [*conditions, NEVER]))


def privleak_score(frame: Frame, step: int, condition: str) -> Score:
    """AUC of the run's own values over that of the twin's, minus one."""
    known = frame.where(np.isfinite(frame.run) & np.isfinite(frame.twin))
    is_member = known.role != "control"
    shared: dict[str, Any] = {"outcome": "privleak", "condition": condition, "step": step, "n": len(known)}
    shared |= {"num_clusters": len(known), "num_unscored": len(frame) - len(known)}
    if not len(known) or is_member.all() or not is_member.any():
        return Score(**shared, estimate=float("nan"), reason="run and twin have not both scored inserted and never-inserted articles")
    own, clean = (auc(values[is_member], values[~is_member]) for values in (known.run, known.twin))
    return Score(**shared, estimate=own / clean - 1.0, twin=clean, control=own)
