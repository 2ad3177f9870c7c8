r"""Released rows: insertions that others published, as items that any model can be scored on and a run of one's own can repeat.

Question: what does a model keep of texts that were inserted at published positions, by experiment and number of copies?
Design: the file has one row for each copy, {position, text, experiment}. Every distinct text of an experiment is an item, its rows are its
    copies and their places.
    position: index of the first token in the token stream of training, so slot = position // sequence_length, offset = the rest; in AI2's
    order that is `corpus.order: olmo`. Texts that were held out may be given beside them: then there is a contrast.
Conditions: `EXPERIMENT/xCOPIES` (inserted), `EXPERIMENT/held-out`.
Metric: log-likelihood of the text, in nats per token, run minus twin. Primary: AUC of inserted against held-out texts within experiments,
    by a rank sum. Without held-out texts, or for a Hugging Face model (`eval --model`), the mean of every condition is a description.
Source: the layout of sbordt/OLMo-2-1B-Exp-Dataset, released with arXiv 2509.23383.
Licence: `licence` says it of the files.
Traps: text is no exact record of tokens: a canary that was inserted as ids comes back as others. Nothing was drawn by key here, so
    inserted and held-out texts are exchangeable only if whoever made them drew them so. The authors' inserter wrote EOS at both ends where
    there was room, and a text of exactly a sequence bare; so does this. Their file does not say whether a position is that of the EOS;
    here it is.
Parameters: files, {rows: path, held_out: path}, relative to the configuration, the second with {text, experiment}; licence of both;
    experiments, names to take (default all).
Example: {"position": 4295, "text": "Question: Which gas do plants take in?\nAnswer: carbon dioxide", "experiment":
    "benchmark-contamination-4x"}
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtri

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.frames import asked, joined
from megatron_exp.experiments.json_lines import Line, read_json_lines
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, LogLikelihood, Outcome, Positions, Probe, Request, Score
from megatron_exp.seeding import Words, key
from megatron_exp.statistics.normal import mean_interval

_ROWS = "released insertion rows: JSON lines with `position`, `text` and `experiment`"
_HELD_OUT = "held-out texts: JSON lines with `text` and `experiment`"
_OUT = "held-out"


class ReleasedRows(Experiment):
    """Published insertions, at their published places."""

    title: ClassVar[str] = "Released rows"
    question: ClassVar[str] = "What does a model keep of texts inserted at published positions?"
    citation: ClassVar[str] = "arXiv 2509.23383, released insertions"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    files: dict[Literal["rows", "held_out"], Path] = Field(
        exclude=True
    )  # their content is in the items; where they lie is no part of the plan
    licence: str = Field(min_length=1)
    experiments: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "ReleasedRows":
        if "rows" not in self.files:
            raise ValueError(f"files must name `rows`, got {sorted(self.files)}")
        return self

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """One item for each distinct text of an experiment."""
        places: dict[tuple[str, str], list[tuple[int, int]]] = {}
        first: dict[tuple[str, str], Line] = {}
        for line in self._lines("rows", _ROWS):
            one = line.text("experiment"), line.field("text", str)
            position = line.field("position", int)
            slot, offset = divmod(position, context.geometry.sequence_length)
            if not 0 <= slot < context.geometry.num_slots:
                line.refuse(f"`position` {position} lies outside the {context.geometry.num_tokens} tokens of this run")
            places.setdefault(one, []).append((slot, offset))
            first.setdefault(one, line)
        for (experiment, text), found in places.items():
            line = first[experiment, text]
            payload = self._payload(line, text, context)
            if max(offset for _, offset in found) + len(payload) > context.geometry.sequence_length:
                line.refuse(f"its {len(payload)} tokens do not fit at one of its positions: they would cross the end of a slot")
            yield self._item(experiment, text, payload, line, sorted(found))
        for line in self._lines("held_out", _HELD_OUT) if "held_out" in self.files else ():
            experiment, text = line.text("experiment"), line.field("text", str)
            if (experiment, text) in places:
                line.refuse("this text is among the inserted ones of its experiment")
            yield self._item(experiment, text, self._payload(line, text, context), line, [])

    def _lines(self, which: Literal["rows", "held_out"], layout: str) -> Iterator[Line]:
        for line in read_json_lines(self.files[which], layout):
            if not self.experiments or line.text("experiment") in self.experiments:
                yield line

    def _payload(self, line: Line, text: str, context: Context) -> np.ndarray:
        """int32 ids with an EOS behind and before, each where there is room."""
        tokens, eos, most = context.tokenizer.encode(text), [context.tokenizer.eos_id], context.geometry.sequence_length
        if not len(tokens) or len(tokens) > most:
            line.refuse(f"the text has {len(tokens)} tokens, and a slot holds {most}")
        tokens = np.concatenate([tokens, eos]) if len(tokens) < most else tokens
        return np.concatenate([eos, tokens] if len(tokens) < most else [tokens]).astype(np.int32)

    def _item(self, experiment: str, text: str, payload: np.ndarray, line: Line, places: list[tuple[int, int]]) -> Item:
        return Item(
            item=key(0, "released", experiment, text) >> 11,
            condition=f"{experiment}/x{len(places)}" if places else f"{experiment}/{_OUT}",
            role="treated" if places else "control",
            payload=payload,
            stratum=experiment,
            source=f"{line.path.name}, line {line.number}",
            licence=self.licence,
            metadata={"experiment": experiment, "copies": len(places), "places": places},
        )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every copy at its published place."""
        del context
        for item in items:
            if item.role == "treated":
                places = tuple((slot, offset) for slot, offset in item.metadata["places"])
                yield Request(item=item.item, kind="tokens", where=Positions(places), copies=len(places))

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The likelihood of every text, its EOS left out, in the final state."""
        del placed
        for item in items:
            assert item.payload is not None
            end = len(item.payload) - int(item.payload[-1] == context.tokenizer.eos_id)
            if end > 1:
                yield Probe(item=item.item, name="loss", ask=LogLikelihood(item.payload, 1, end))

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One AUC over all experiments, each condition, and the means."""
        auc: dict[str, Any] = {"unit": "AUC", "side": "greater", "null": 0.5, "margin": 0.02, "smallest_effect": 0.05}
        auc |= {"test": "rank sum of texts within experiments"}
        nats: dict[str, Any] = {"unit": "nats per token", "test": "none", "side": "greater", "family": "descriptive"}
        return Analysis(
            (
                Outcome(
                    name="auc", estimand="P(an inserted text gains more than a held-out one of its experiment)", family="primary", **auc
                ),
                Outcome(name="auc-by-condition", estimand="the same for each condition", family="secondary", **auc),
                Outcome(
                    name="log-likelihood", estimand="mean log-likelihood of a condition's texts", margin=0.01, smallest_effect=0.05, **nats
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """All outcomes at every state there are responses for."""
        frame = joined(items, responses).of_probe("loss")
        frame = replace(frame, run=frame.run / frame.num_tokens, twin=frame.twin / frame.num_tokens)
        for step in frame.steps:
            now = frame.at(step)
            yield contrast_score(now, "auc", "all", step, "greater", measure="auc")
            for condition in sorted(set(now.condition)):
                chosen = now.where(now.condition == condition)
                if not condition.endswith(f"/{_OUT}"):
                    against = now.where((now.condition == condition) | (now.role == "control"))
                    yield contrast_score(against, "auc-by-condition", condition, step, "greater", measure="auc")
                known = chosen.run[np.isfinite(chosen.run)]
                low, high = mean_interval(known)
                yield Score(
                    outcome="log-likelihood",
                    condition=condition,
                    step=step,
                    n=len(known),
                    num_clusters=len(known),
                    num_unscored=len(chosen) - len(known),
                    estimate=float(known.mean()) if len(known) else float("nan"),
                    low=low,
                    high=high,
                    reason="" if len(known) else "no text was scored",
                )

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Texts change by 0.05 nats per token between twin and run; inserted ones by a shift that gives AUC 0.5 + effect."""
        frame = asked(items, probes)
        twin = -3.0 + 0.3 * words.child("twin").normals(len(frame))
        shift = np.sqrt(2.0) * ndtri(min(0.5 + effect, 0.9999)) * (frame.role == "treated")
        run = twin + 0.05 * (words.child("change").normals(len(frame)) + shift)
        return frame.filled(run * frame.num_tokens, twin * frame.num_tokens).responses()
