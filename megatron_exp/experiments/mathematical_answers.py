"""What written solutions of word problems say: the answer, whether every step holds, and how often both models are right."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp.experiments.igsm_check import check_solution
from megatron_exp.experiments.igsm_problem import MODULUS
from megatron_exp.experiments.protocol import Score
from megatron_exp.statistics.normal import smallest_detectable_effect
from megatron_exp.statistics.proportions import binomial_p, wilson_interval

_INTEGER = re.compile(r"\d+")
_MARK, _NEXT = "Answer:", "Problem"
_MODELS = ("run", "twin")


class WrittenAnswers(NamedTuple):
    """One entry per test problem and state: step, operations int [n]; run, twin float [n]: 1 right, 0 wrong, NaN not scored; sound likewise, of the run."""

    step: np.ndarray
    operations: np.ndarray
    run: np.ndarray
    twin: np.ndarray
    sound: np.ndarray


def read_answer(text: str) -> int | None:
    """The first integer after the first "Answer:" and before another problem begins, None where there is none: that is a wrong answer, not a missing one."""
    found = _INTEGER.search(text.partition(_MARK)[2].partition(_NEXT)[0])
    return int(found[0]) if found else None


def read_solution(text: str) -> str:
    """What stands before the answer."""
    return text.partition(_MARK)[0].strip()


def with_texts(items: pa.Table, responses: pa.Table) -> WrittenAnswers:
    """The `solve` responses of run and twin, judged."""
    known = {
        number: orjson.loads(metadata)
        for number, arm, metadata in zip(*(items[name].to_pylist() for name in ("item", "arm", "metadata")), strict=True)
        if arm == "right"
    }
    rows = responses.select(["item", "probe", "model", "step", "text"]).to_pylist()
    asked = sorted({(row["step"], row["item"]) for row in rows if row["probe"] == "solve"})
    place_of = {question: place for place, question in enumerate(asked)}
    values = {name: np.full(len(asked), np.nan) for name in (*_MODELS, "sound")}
    for row in rows:
        if row["probe"] != "solve" or row["text"] is None or row["model"] not in _MODELS:
            continue
        place, about = place_of[row["step"], row["item"]], known[row["item"]]
        is_right = read_answer(row["text"]) == about["answer"]
        values[row["model"]][place] = is_right
        if row["model"] == "run":
            values["sound"][place] = is_right and check_solution(about["problem"], read_solution(row["text"])).is_right
    operations = np.array([known[item]["operations"] for _, item in asked], np.int64)
    return WrittenAnswers(np.array([step for step, _ in asked], np.int64), operations, **values)


def gain_score(written: WrittenAnswers, step: int, max_operations: int) -> Score:
    """Run minus twin on the same problems by McNemar's exact test; without a twin, the run against guessing."""
    now = (written.step == step) & (written.operations <= max_operations)
    run, twin = written.run[now], written.twin[now]
    has_twin = bool(np.isfinite(twin).any())
    compared = twin if has_twin else np.full(len(run), 1 / MODULUS)
    known = np.isfinite(run) & np.isfinite(compared)
    n = int(known.sum())
    differences = (run - compared)[known]
    error = float(np.std(differences) / np.sqrt(n)) if n > 1 else float("nan")
    if has_twin:
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        p, test = binomial_p(gained, gained + lost, 0.5, "greater"), "McNemar's exact test, run minus twin"
    else:
        p, test = binomial_p(int(run[known].sum()), n, 1 / MODULUS, "greater"), "exact binomial test against 1/23, run alone"
    estimate = float(differences.mean()) if n else float("nan")
    return Score(
        outcome="accuracy-gain",
        condition=f"test/op-1..{max_operations}",
        step=step,
        n=n,
        num_clusters=n,
        num_unscored=int((~known).sum()),
        estimate=estimate,
        low=estimate - 1.96 * error,
        high=estimate + 1.96 * error,
        twin=float(twin[known].mean()) if has_twin and n else float("nan"),
        difference=estimate,
        p=p if n else float("nan"),
        mde=smallest_detectable_effect(error, "greater"),
        test=test,
        reason="" if n else "no solution was written",
    )


def accuracy_scores(written: WrittenAnswers, step: int) -> Iterator[Score]:
    """`accuracy` and `sound-solutions` for each number of operations."""
    for operations in np.unique(written.operations[written.step == step]):
        now = (written.step == step) & (written.operations == operations)
        for outcome, values in (("accuracy", written.run[now]), ("sound-solutions", written.sound[now])):
            known = np.isfinite(values)
            n, hits = int(known.sum()), int(values[known].sum())
            low, high = wilson_interval(hits, n)
            twin = written.twin[now][np.isfinite(written.twin[now])]
            yield Score(
                outcome=outcome,
                condition=f"test/op-{operations}",
                step=step,
                n=n,
                num_clusters=n,
                num_unscored=int((~known).sum()),
                estimate=hits / n if n else float("nan"),
                low=low,
                high=high,
                twin=float(twin.mean()) if len(twin) and outcome == "accuracy" else float("nan"),
                test="none",
                reason="" if n else "no solution was written",
            )
