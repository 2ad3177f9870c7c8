"""Judging what models wrote: the likelihood of a text under another model, for experiments that call an answer garbage by its perplexity."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.evaluation.responses import plain, stamped
from megatron_exp.evaluation.subjects import Label
from megatron_exp.manifest.reader import Manifest
from megatron_exp.scoring.batched import BatchedScorer, LogLikelihoodRequest
from megatron_exp.scoring.huggingface import HuggingFaceScorer
from megatron_exp.scoring.probes import ANSWERS
from megatron_exp.shards.tokenizer import Tokenizer

JUDGE = "judge"
"""`ask` of the probes that are answered here."""
_SUFFIX = "/judge"
_NO_JUDGE = "there is no twin to judge, and no --judge was given"
_NOTHING_WRITTEN = "what was to be judged was not written or not kept"
_TOO_LONG = "context and text are longer than the judge's sequence length"


class Judge(NamedTuple):
    """A model that judges. own: its tokenizer, where it is not the corpus's."""

    scorer: BatchedScorer
    own: Tokenizer | None = None


def open_judge(path: Path) -> Judge:
    """A Hugging Face directory with its own tokenizer.json."""
    return Judge(HuggingFaceScorer.open(str(path)), Tokenizer.load(Path(path)))


def without_judged(probes: pa.Table, rows: np.ndarray) -> np.ndarray:
    """The rows of PROBE_DEFINITIONS that a model is asked itself."""
    return rows[pc.not_equal(probes["ask"].cast(pa.string()), JUDGE).to_numpy(zero_copy_only=False)[rows]]


def judged(probes: pa.Table, answers: Sequence[pa.Table], judge: Judge | None, manifest: Manifest, tokenizer: Tokenizer) -> list[pa.Table]:
    """Answers to all `judge` probes, one for each model and state that was asked the probe it is about; none where there is no such probe."""
    mine = plain(probes.filter(pc.equal(probes["ask"].cast(pa.string()), JUDGE)))
    if not len(mine) or not answers:
        return []
    written = plain(pa.concat_tables([plain(part) for part in answers]))
    text_of = {
        (row["experiment"], row["item"], row["arm"], row["name"], row["model"], row["step"]): row["text"]
        for row in written.filter(pc.is_in(written["name"], pa.array({name.removesuffix(_SUFFIX) for name in mine["name"].to_pylist()})))
        .select(["experiment", "item", "arm", "name", "model", "step", "text"])
        .to_pylist()
    }
    parts = []
    for label, state in sorted({key[4:] for key in text_of}):
        rows = [row for row in mine.to_pylist() if (*_question(row), label, state) in text_of]
        texts = [text_of[(*_question(row), label, state)] for row in rows]
        contexts = [manifest.payload(row["payload"]) for row in rows]
        parts.append(_answers(rows, _likelihoods(judge, contexts, texts, tokenizer), label, state))
    return parts


def _question(row: dict[str, str]) -> tuple[str, ...]:
    return row["experiment"], row["item"], row["arm"], row["name"].removesuffix(_SUFFIX)


def _likelihoods(
    judge: Judge | None, contexts: Sequence[np.ndarray], texts: Sequence[str | None], tokenizer: Tokenizer
) -> list[tuple[float, int] | str]:
    """(nats, tokens) of every text after its context, or why there are none; an empty text has no nats and no tokens."""
    if judge is None:
        return [_NO_JUDGE] * len(texts)
    found: list[tuple[float, int] | str] = []
    requests, places = [], []
    for context, text in zip(contexts, texts, strict=True):
        if text is None:
            found.append(_NOTHING_WRITTEN)
            continue
        if judge.own is not None:  # a judge of another tokenizer reads the texts
            inner = context[context != tokenizer.eos_id]
            context = np.concatenate([[judge.own.eos_id], judge.own.encode(tokenizer.decode(inner))])
        tokens = np.concatenate([context, (judge.own or tokenizer).encode(text)])
        if len(tokens) > judge.scorer.sequence_length:
            found.append(_TOO_LONG)
        elif len(tokens) == len(context):
            found.append((0.0, 0))
        else:
            places.append(len(found))
            requests.append(LogLikelihoodRequest(tokens, len(context), len(tokens)))
            found.append(_NOTHING_WRITTEN)
    scored = judge.scorer.loglikelihood(requests)
    for place, nats, num_tokens in zip(places, scored.nats.tolist(), scored.num_tokens.tolist(), strict=True):
        found[place] = (nats, num_tokens) if np.isfinite(nats) else "the judge's answer is not a finite number"
    return found


def _answers(rows: Sequence[dict[str, str]], found: Sequence[tuple[float, int] | str], label: Label, state: int) -> pa.Table:
    answers = []
    for row, one in zip(rows, found, strict=True):
        values = {"reason": one} if isinstance(one, str) else {"reason": "", "value": one[0], "nats": one[0], "num_tokens": one[1]}
        answers.append({name: row[name] for name in ("experiment", "item", "arm", "name")} | values)
    return stamped(pa.Table.from_pylist(answers, schema=ANSWERS), label, state)
