"""The reference model as `plan` sees it: questions with recorded answers, asked of a model only where none is recorded.

The model itself lives in layers above (`megatron_exp.scoring.reference`) and is handed in by the command line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.manifest.reference_answers import Answer, AnswerParts, question, read_answers, write_answers
from megatron_exp.shards.corpus import Corpus

_QUESTIONS_AT_ONCE = 4096
"""Questions between two durable parts: what a killed plan has to ask again."""


@dataclass(frozen=True)
class ReferenceIdentity:
    """Which model it is.

    fingerprint: of its weights. tokenizer: fingerprint of the tokenizer it reads. kind: `run` (a checkpoint of ours) or `huggingface`. state:
    updates done, None where nothing says it. relation: `twin` where everything but the insertions agrees with the run that is planned, else
    `external`. differences: why it is no twin. precision: what it was computed in, None where that is what it was trained in.
    """

    fingerprint: str
    tokenizer: str
    kind: str
    state: int | None
    relation: str
    differences: tuple[str, ...] = ()
    precision: str | None = None

    def record(self) -> dict[str, Any]:
        """JSON-able, for manifest.json and for the file of answers."""
        fields = {**vars(self), "differences": list(self.differences)}
        return fields if self.precision else {name: value for name, value in fields.items() if name != "precision"}


class Model(Protocol):
    """A model that can be asked (`megatron_exp.scoring.reference.ReferenceModel`); every method answers in the order of its questions."""

    def loglikelihood(self, sequences: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> np.ndarray: ...

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray: ...

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray: ...


class Reference:
    """Answers, each asked for once. It implements `ReferenceLike` of the experiments' context."""

    def __init__(self, identity: ReferenceIdentity, model: Model | None, recorded: dict[bytes, tuple[str, Answer]] | None = None):
        """`recorded`: answers of an earlier plan; with them alone (no model) only the questions of that plan can be asked again."""
        self.identity = identity
        self._model = model
        self._recorded = recorded or {}
        self._parts: AnswerParts | None = None
        self._used: dict[bytes, tuple[str, Answer]] = {}

    @classmethod
    def recorded_in(cls, path: Path) -> "Reference":
        """The answers that another manifest keeps, without a model."""
        answers, identity, _ = read_answers(path)
        return cls(ReferenceIdentity(**identity | {"differences": tuple(identity["differences"])}), None, answers)

    @property
    def state(self) -> int | None:
        return self.identity.state

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    def begin(self, corpus: Corpus, out: Path) -> None:
        """Get ready to plan OUT on `corpus`; answers are kept in OUT.reference/ until the manifest holds them. UserError for another tokenizer."""
        if self.identity.tokenizer != corpus.tokenizer_fingerprint:
            raise UserError(
                f"The reference reads token ids of another tokenizer (fingerprint {self.identity.tokenizer[:12]}) than the corpus {corpus.path} "
                f"({corpus.tokenizer_fingerprint[:12]}), so the same ids mean other text to it. Give a model trained with the corpus's tokenizer."
            )
        self._parts = AnswerParts(out.with_name(f"{out.name}.reference"), self.identity.record()) if self._model else None

    def finish(self, directory: Path) -> dict[str, Any]:
        """Write the answers used into a manifest under construction; what manifest.json says about the reference."""
        return {**self.identity.record(), "answers": write_answers(directory, self._used, self.identity.record())}

    def close(self) -> None:
        """The manifest is written: its own file holds the answers."""
        if self._parts:
            self._parts.remove()

    def loglikelihood(self, sequences: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int]) -> np.ndarray:
        """float64 [n], nats."""
        names = [
            question("loglikelihood", (int(start), int(end)), np.asarray(tokens)[:end])
            for tokens, start, end in zip(sequences, starts, ends, strict=True)
        ]

        def ask(model: Model, rows: list[int]) -> list[Answer]:
            return model.loglikelihood(
                [sequences[row] for row in rows], [starts[row] for row in rows], [ends[row] for row in rows]
            ).tolist()

        return np.array(self._answers("loglikelihood", names, ask), dtype=np.float64)

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens]."""
        return self._generated("greedy", prompts, num_tokens)

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int32 [n, num_tokens]."""
        return self._generated("least_likely", prompts, num_tokens)

    def _generated(self, name: str, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        def ask(model: Model, rows: list[int]) -> list[Answer]:
            written = np.asarray(getattr(model, name)([prompts[row] for row in rows], num_tokens), np.int32)
            if written.size and written.min() < 0:
                raise UserError(
                    "The reference gives numbers that are not finite, so nothing can be chosen by it. Take an earlier state (--reference-step), or another one."
                )
            return list(written)

        answers = self._answers(name, [question(name, (num_tokens,), prompt) for prompt in prompts], ask)
        return np.array(answers, dtype=np.int32).reshape(len(prompts), num_tokens)

    def _answers(self, name: str, names: list[bytes], ask: Callable[[Model, list[int]], list[Answer]]) -> list[Answer]:
        """The answers by question; what is not recorded is asked, in blocks that are made durable one by one."""
        missing = list({one: row for row, one in enumerate(names) if self._known(one) is None}.values())
        if missing and self._model is None:
            raise UserError(
                f"{len(missing)} questions to the reference have no recorded answer: this plan differs from the one that the answers are of. "
                "Give the model itself as --reference."
            )
        for start in range(0, len(missing), _QUESTIONS_AT_ONCE):
            rows = missing[start : start + _QUESTIONS_AT_ONCE]
            assert self._model is not None and self._parts is not None, "begin comes first"
            self._parts.add({names[row]: (name, answer) for row, answer in zip(rows, ask(self._model, rows), strict=True)})
        found = [self._known(one) for one in names]
        self._used |= {one: (name, answer) for one, answer in zip(names, found, strict=True) if answer is not None}
        return [answer for answer in found if answer is not None]

    def _known(self, name: bytes) -> Answer | None:
        if name in self._recorded:
            return self._recorded[name][1]
        return self._parts.get(name) if self._parts else None
