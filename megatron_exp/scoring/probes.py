"""From the probes of a manifest to answers of one model.

What a value means depends on what was asked:

    loglikelihood       sum of log-probabilities of the span in nats (<= 0); `greedy`: whether greedy decoding would write it
    slot_loss           mean loss in nats per unmasked token
    greedy              1.0 where the continuation begins with the target, else 0.0; null where there is no target
    embedding_gradient  -<g, w> / (scale |g|)
    sample              null; `text` is a JSON list with one continuation per sample

What could not be scored has value null and a reason, never a zero. The reason is "" where there is an answer; then a null value
means that the answer is the `text`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp import seeding
from megatron_exp.manifest.schema import DICT
from megatron_exp.scoring.batched import BROKEN, BatchedScorer, LogLikelihoodRequest
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.stream.base import NoiseSpec
from megatron_exp.stream.slot import Slot

ANSWERS = pa.schema(
    [
        ("experiment", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("name", DICT),
        ("value", pa.float64()),
        ("reason", DICT),
        ("nats", pa.float64()),
        ("num_tokens", pa.uint32()),
        ("greedy", pa.bool_()),
        ("text", pa.string()),
    ]
)
"""One row for each probe asked, in the order of the probes. `nats` is the sum behind the value, `num_tokens` what it is over."""

_NOT_FINITE = "the model's answer is not a finite number"
_SLOTS_AT_ONCE = 256
"""Slots read and held together."""

Row = dict[str, Any]


class ManifestLike(Protocol):
    """The part of a manifest that scoring needs."""

    @property
    def record(self) -> dict[str, Any]: ...

    def payload(self, number: int) -> np.ndarray: ...


class StreamLike(Protocol):
    """The base stream: `read` gives unmodified content."""

    @property
    def corpus(self) -> Any: ...

    def read(self, slot: int) -> Slot: ...


@dataclass(eq=False)
class _Asking:
    """One call of `score_probes`: where questions come from and answers go."""

    scorer: BatchedScorer
    manifest: ManifestLike
    stream: StreamLike
    answers: list[Row]
    tokenizers: list[Tokenizer] = field(default_factory=list)

    def answer(self, index: int, **values: Any) -> None:
        value = values.get("value")
        if value is not None and not np.isfinite(value):
            values = {"reason": _NOT_FINITE}
        self.answers[index].update(values)

    def refuse(self, index: int, reason: str) -> None:
        self.answers[index]["reason"] = reason

    def text(self, tokens: np.ndarray) -> str:
        """Generated tokens up to the end of the document, as text; U+FFFD for an id that only pads the model's vocabulary."""
        if not self.tokenizers:
            self.tokenizers.append(self.stream.corpus.tokenizer())
        tokenizer = self.tokenizers[0]
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        written = tokens[: ends[0]] if len(ends) else tokens
        is_known = written < tokenizer.vocabulary_size
        pieces = np.split(written, np.flatnonzero(is_known[1:] != is_known[:-1]) + 1)
        return "".join(
            "\ufffd" * len(piece) if len(piece) and piece[0] >= tokenizer.vocabulary_size else tokenizer.decode(piece) for piece in pieces
        )


def score_probes(scorer: BatchedScorer, probes: pa.Table, manifest: ManifestLike, stream: StreamLike) -> pa.Table:
    """Ask one model all `probes` (rows of PROBE_DEFINITIONS), the questions of all experiments in shared batches.

    Args:
        scorer: the model; every process calls with the same arguments.
        probes: which probes; whether they are due at this state is the caller's business.
        manifest: payloads and seeds.
        stream: the base stream, without overlay.

    Returns:
        ANSWERS, one row per probe in the same order.
    """
    rows = probes.to_pylist()
    answers = [{"reason": "", **{name: row[name] for name in ("experiment", "item", "arm", "name")}} for row in rows]
    asking = _Asking(scorer, manifest, stream, answers)
    by_kind: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_kind[row["ask"]].append((index, row))
    for kind, asked in by_kind.items():
        _ASK[kind](asking, asked)
    return pa.Table.from_pylist(answers, schema=ANSWERS)


def _ask_loglikelihood(asking: _Asking, asked: list[tuple[int, Row]]) -> None:
    requests, indices = [], []
    for index, row in asked:
        request = LogLikelihoodRequest(asking.manifest.payload(row["payload"]), row["start"], row["end"], row.get("scale") or 1.0)
        if not 1 <= request.start < request.end <= len(request.tokens):
            asking.refuse(index, "the span does not lie in the tokens, after a first one")
        elif not _readable(asking, index, request.tokens[: request.end], request.end - 1):
            continue
        else:
            requests.append(request)
            indices.append(index)
    found = asking.scorer.loglikelihood(requests)
    for index, nats, num_tokens, greedy in zip(indices, found.nats.tolist(), found.num_tokens.tolist(), found.greedy.tolist(), strict=True):
        asking.answer(index, value=nats, nats=nats, num_tokens=num_tokens, greedy=greedy)


def _ask_greedy(asking: _Asking, asked: list[tuple[int, Row]]) -> None:
    for num_tokens, group in _grouped(asked, lambda row: row["num_tokens"]):
        prompts, kept = _prompts(asking, group)
        for (index, row), written in zip(kept, asking.scorer.greedy(prompts, num_tokens), strict=True):
            if (written == BROKEN).any():
                asking.refuse(index, _NOT_FINITE)
                continue
            target = _target(asking.manifest, row)
            hit = None if target is None else bool(np.array_equal(written[: len(target)], target))
            asking.answer(index, value=None if hit is None else float(hit), num_tokens=num_tokens, greedy=hit, text=asking.text(written))


def _ask_sample(asking: _Asking, asked: list[tuple[int, Row]]) -> None:
    for (num_tokens, num_samples, temperature), group in _grouped(
        asked, lambda row: (row["num_tokens"], row["num_samples"], row["temperature"])
    ):
        prompts, kept = _prompts(asking, group)
        keys = [_sample_key(asking.manifest, row, number) for _, row in kept for number in range(num_samples)]
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        written = asking.scorer.sample(repeated, num_tokens, temperature, keys).reshape(len(kept), num_samples, num_tokens)
        for (index, _), samples in zip(kept, written, strict=True):
            if (samples == BROKEN).any():
                asking.refuse(index, _NOT_FINITE)
                continue
            texts = [asking.text(sample) for sample in samples]
            asking.answer(index, num_tokens=num_tokens, text=orjson.dumps(texts).decode())


def _target(manifest: ManifestLike, row: Row) -> np.ndarray | None:
    return None if row["target"] is None else manifest.payload(row["target"])


def _sample_key(manifest: ManifestLike, row: Row, number: int) -> int:
    """The key of one sample: the same for every model and state, so that they are compared on the same draws."""
    return seeding.key(manifest.record["seeds"]["placement"], "sample", row["experiment"], row["item"], row["arm"], row["name"], number)


def _ask_slot_loss(asking: _Asking, asked: list[tuple[int, Row]]) -> None:
    for part, tokens, mask in _read_slots(asking.stream, asked):
        losses = asking.scorer.slot_losses(tokens, mask)
        for (index, _), loss, count in zip(part, losses.tolist(), mask.sum(axis=1).tolist(), strict=True):
            if count == 0:
                asking.refuse(index, "no position of the slot counts in the loss")
            else:
                asking.answer(index, value=loss, nats=loss * count, num_tokens=count)


def _ask_embedding_gradient(asking: _Asking, asked: list[tuple[int, Row]]) -> None:
    for part, tokens, mask in _read_slots(asking.stream, asked):
        noise = [NoiseSpec(row["key"], row["noise_slot"], row["scale"]) for _, row in part]
        statistics = asking.scorer.embedding_gradient(tokens, mask, noise)
        for (index, _), statistic, count in zip(part, statistics.tolist(), mask.sum(axis=1).tolist(), strict=True):
            asking.answer(index, value=statistic, num_tokens=count)


_ASK: dict[str, Callable[[_Asking, list[tuple[int, Row]]], None]] = {
    "loglikelihood": _ask_loglikelihood,
    "greedy": _ask_greedy,
    "sample": _ask_sample,
    "slot_loss": _ask_slot_loss,
    "embedding_gradient": _ask_embedding_gradient,
}


def _prompts(asking: _Asking, group: Sequence[tuple[int, Row]]) -> tuple[list[np.ndarray], list[tuple[int, Row]]]:
    """The prompts of those rows that the model can continue; the others get their reason."""
    prompts, kept = [], []
    for index, row in group:
        prompt = asking.manifest.payload(row["payload"])
        if len(prompt) == 0:
            asking.refuse(index, "the prompt is empty")
        elif (target := _target(asking.manifest, row)) is not None and len(target) > row["num_tokens"]:
            asking.refuse(index, "the target is longer than what is generated")
        elif _readable(asking, index, prompt, len(prompt) + row["num_tokens"] - 1):
            prompts.append(prompt)
            kept.append((index, row))
    return prompts, kept


def _readable(asking: _Asking, index: int, tokens: np.ndarray, num_positions: int) -> bool:
    """Whether the model has the positions and the embeddings for this input; else the row gets its reason."""
    if num_positions > asking.scorer.sequence_length:
        asking.refuse(index, f"longer than the model's sequence length of {asking.scorer.sequence_length}")
    elif int(tokens.max()) >= asking.scorer.vocabulary_size or int(tokens.min()) < 0:
        asking.refuse(index, f"a token id outside the model's vocabulary of {asking.scorer.vocabulary_size}")
    else:
        return True
    return False


def _read_slots(stream: StreamLike, asked: list[tuple[int, Row]]) -> Iterator[tuple[list[tuple[int, Row]], np.ndarray, np.ndarray]]:
    """Parts of the rows with their slots' tokens [n, S + 1] and loss mask [n, S]."""
    for first in range(0, len(asked), _SLOTS_AT_ONCE):
        part = asked[first : first + _SLOTS_AT_ONCE]
        slots = [stream.read(row["slot"]) for _, row in part]
        yield part, np.stack([slot.tokens for slot in slots]), np.stack([slot.loss_mask for slot in slots])


def _grouped(asked: Iterable[tuple[int, Row]], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[tuple[int, Row]]]]:
    groups: dict[Any, list[tuple[int, Row]]] = {}
    for index, row in asked:
        groups.setdefault(key(row), []).append((index, row))
    yield from groups.items()
