"""Experiments of others, small, to try the protocol on: six of Hubble's perturbations and three a user might write.

Question: does the protocol express them without a change?
Design: every stub assigns by key and compares what was inserted with what was not by a rank sum; only their shapes differ.
Conditions: those of each stub. Metric: value of one probe, run minus twin.
Source: arXiv 2510.19811 (Hubble) for the perturbations; texts are made here. Licence: Apache-2.0.
Example: "Ada sold 3 kites." inserted four times.
Parameters: num units; tiers of copies; sides; options of a choice; quarters of training.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.frames import asked, joined
from megatron_exp.experiments.protocol import (
    Analysis,
    Experiment,
    Greedy,
    Item,
    LogLikelihood,
    Match,
    Outcome,
    Positions,
    Probe,
    Request,
    Score,
    SlotLoss,
    Window,
)
from megatron_exp.seeding import Words
from megatron_exp.statistics.ranks import stratified_rank_sum

WORDS = ["Ada", "Ben", "Cem", "Dua", "kites", "pears", "ropes", "lamps", "sold", "drew", "lost", "kept"]


def sentence(context: Context, *names: str | int) -> str:
    return " ".join(WORDS[i] for i in context.words("text", *names).integers(6, len(WORDS))) + "."


def tokens_of(context: Context, text: str) -> np.ndarray:
    return np.concatenate([[context.tokenizer.eos_id], context.tokenizer.encode(text), [context.tokenizer.eos_id]]).astype(np.int32)


class _Stub(Experiment):
    title: ClassVar[str] = "stub"
    question: ClassVar[str] = "does it fit?"
    citation: ClassVar[str] = "arXiv 2510.19811"
    probe: ClassVar[str] = "target"

    num: int = 24

    @property
    def analysis(self) -> Analysis:
        return Analysis(
            (
                Outcome(
                    name="auc",
                    estimand="P(inserted above not inserted)",
                    unit="AUC",
                    test="rank sum",
                    side="greater",
                    family="primary",
                    null=0.5,
                    margin=0.02,
                    smallest_effect=0.04,
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        frame = joined(items, responses).of_probe(self.probe)
        for step in frame.steps:
            now = frame.at(step)
            known = now.where(np.isfinite(now.change))
            test = stratified_rank_sum(known.change, known.role != "control", known.stratum, "greater", Words.of(0, "stub"))
            reason = "" if len(known) else "nothing was scored"
            yield Score(
                outcome="auc", condition="all", step=step, n=len(now), num_clusters=len(now), estimate=test.auc, p=test.p, reason=reason
            )

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        frame = asked(items, probes)
        twin = words.child("twin").normals(len(frame))
        return frame.filled(twin + words.child("run").normals(len(frame)) + 8.0 * effect * (frame.role != "control"), twin).responses()

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        for item in items:
            if item.role == "treated":
                copies = item.metadata.get("copies", 1)
                yield Request(item=item.item, arm=item.arm, kind="tokens", where=Window(0, context.geometry.steps), copies=copies)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            yield Probe(item=item.item, arm=item.arm, name=self.probe, ask=LogLikelihood(item.payload, 1, len(item.payload)))

    def coin(self, context: Context, treated: str, control: str, num: int | None = None) -> dict[int, str]:
        num = num or self.num
        return context.assign(range(num), {treated: num // 2, control: num - num // 2})


class Passages(_Stub):
    """Passages in tiers of copies, the tier 0 held out; verbatim continuation from graded prefixes."""

    tiers: tuple[int, ...] = (0, 1, 4, 16)

    def items(self, context: Context) -> Iterator[Item]:
        each = self.num // len(self.tiers)
        tier_of = context.assign(range(each * len(self.tiers)), {f"x{tier}": each for tier in self.tiers})
        for unit, tier in tier_of.items():
            copies = int(tier[1:])
            payload = tokens_of(context, sentence(context, unit))
            role = "treated" if copies else "control"
            yield Item(
                item=unit, condition=tier, role=role, payload=payload, source="here", licence="Apache-2.0", metadata={"copies": copies}
            )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        yield from super().probes(items, placed, context)
        for item in items:
            for prefix in (5, 10):
                ask = Greedy(item.payload[:prefix], 8, item.payload[prefix : prefix + 8])
                yield Probe(item=item.item, name=f"verbatim-{prefix}", ask=ask)


class ParaphraseSides(_Stub):
    """Two wordings of each item; a coin says which is inserted, the other is its own control."""

    def items(self, context: Context) -> Iterator[Item]:
        for unit, side in self.coin(context, "a", "b").items():
            for arm in ("a", "b"):
                text = sentence(context, unit, arm)
                yield Item(
                    item=unit,
                    arm=arm,
                    condition="inserted" if arm == side else "not inserted",
                    role="treated" if arm == side else "control",
                    payload=tokens_of(context, text),
                    cluster=unit,
                    source="here",
                    licence="Apache-2.0",
                )


class Biographies(_Stub):
    """Made-up people; an attacker knows the whole text before a field, or the name only."""

    probe: ClassVar[str] = "job/full"

    def items(self, context: Context) -> Iterator[Item]:
        for unit, condition in self.coin(context, "inserted", "held-out").items():
            name, job = f"Person {unit}", sentence(context, unit)
            yield Item(
                item=unit,
                condition=condition,
                role="treated" if condition == "inserted" else "control",
                payload=tokens_of(context, f"{name} lives here and works as {job}"),
                source="here",
                licence="Apache-2.0",
                sensitive=True,
                metadata={"name": name, "job": job},
            )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            job = context.tokenizer.encode(item.metadata["job"])
            prefixes = {"full": f"{item.metadata['name']} lives here and works as ", "name-only": f"{item.metadata['name']} works as "}
            for grade, text in prefixes.items():
                prefix = np.concatenate([[context.tokenizer.eos_id], context.tokenizer.encode(text)])
                tokens = np.concatenate([prefix, job]).astype(np.int32)
                yield Probe(item=item.item, name=f"job/{grade}", ask=LogLikelihood(tokens, len(prefix), len(tokens)))


class Chats(_Stub):
    """Chats with a random user name; the name is asked as a choice among options."""

    probe: ClassVar[str] = "choice-0"
    options: int = 4

    def items(self, context: Context) -> Iterator[Item]:
        for unit, condition in self.coin(context, "inserted", "held-out").items():
            names = [f"user{number}" for number in context.words("names", unit).choice(9000, self.options)]
            text = f"{names[0]}: {sentence(context, unit)}\nguest: ok"
            role = "treated" if condition == "inserted" else "control"
            payload = tokens_of(context, text)
            yield Item(
                item=unit, condition=condition, role=role, payload=payload, source="here", licence="Apache-2.0", metadata={"names": names}
            )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            for number, name in enumerate(item.metadata["names"]):
                tokens = np.concatenate([[context.tokenizer.eos_id], context.tokenizer.encode(name)]).astype(np.int32)
                yield Probe(item=item.item, name=f"choice-{number}", ask=LogLikelihood(tokens, 1, len(tokens)))


class FormatsThatTransfer(_Stub):
    """Questions inserted with the gap filled in, asked as multiple choice: the asked arm is never inserted itself."""

    def items(self, context: Context) -> Iterator[Item]:
        for unit, condition in self.coin(context, "inserted", "held-out").items():
            answer = sentence(context, unit)
            for arm, text in (("infill", f"It is said that {answer}"), ("choice", f"Which is said? {answer}")):
                treated = "treated" if arm == "infill" else "probe-only"
                role = treated if condition == "inserted" else "control"
                payload = tokens_of(context, text)
                yield Item(
                    item=unit, arm=arm, condition=condition, role=role, payload=payload, cluster=unit, source="here", licence="Apache-2.0"
                )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        yield from super().probes([item for item in items if item.arm == "choice"], placed, context)


class TimingWindows(_Stub):
    """The same number of copies in different quarters of training."""

    quarters: tuple[int, ...] = (0, 3)

    def items(self, context: Context) -> Iterator[Item]:
        each = self.num // (len(self.quarters) + 1)
        counts = {f"quarter-{quarter}": each for quarter in self.quarters} | {"held-out": each}
        for unit, condition in context.assign(range(each * len(counts)), counts).items():
            role = "control" if condition == "held-out" else "treated"
            payload = tokens_of(context, sentence(context, unit))
            yield Item(item=unit, condition=condition, role=role, payload=payload, source="here", licence="Apache-2.0")

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        for item in items:
            if item.role == "treated":
                start = int(item.condition[-1]) * context.geometry.steps // 4
                yield Request(item=item.item, kind="tokens", where=Window(start, start + context.geometry.steps // 4), copies=3)


class CurriculumSwap(_Stub):
    """Easy before hard: where a coin says so, two training slots change places if the earlier is the harder one."""

    needs: ClassVar[frozenset[str]] = frozenset({"corpus"})

    def items(self, context: Context) -> Iterator[Item]:
        half, order = context.geometry.num_slots // 2, context.words("pairs").choice(context.geometry.num_slots // 2, self.num)
        for pair, condition in self.coin(context, "swapped", "left").items():
            early, late = int(order[pair]), half + int(order[pair])
            hard_first = context.stream.read(early).tokens.sum() > context.stream.read(late).tokens.sum()
            role = "treated" if condition == "swapped" else "control"
            for arm, slot, other in (("early", early, late), ("late", late, early)):
                places = {"slot": slot, "other": other, "hard_first": bool(hard_first)}
                yield Item(
                    item=pair,
                    arm=arm,
                    condition=condition,
                    role=role,
                    cluster=pair,
                    source="corpus",
                    licence="the corpus's",
                    metadata=places,
                )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        for item in items:
            if item.role == "treated":
                source = np.array([item.metadata["other"]], np.uint64)
                yield Request(
                    item=item.item, arm=item.arm, kind="swap", where=Match((item.metadata["slot"],)), copies=1, source_slots=source
                )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            yield Probe(item=item.item, arm=item.arm, name=self.probe, ask=SlotLoss(item.metadata["slot"]))


class DocumentAblation(_Stub):
    """Documents are left in the stream but their loss is masked; a piece in a slot is an item, its document the cluster."""

    needs: ClassVar[frozenset[str]] = frozenset({"corpus"})

    def items(self, context: Context) -> Iterator[Item]:
        slots = context.words("documents").choice(context.geometry.num_slots // 2, self.num)
        for document, condition in self.coin(context, "masked", "left").items():
            for part, length in enumerate((3, 5)):  # a document that runs over two slots, in pieces of unequal length
                slot = 2 * int(slots[document]) + part
                source = context.stream.instance(slot).source
                role = "treated" if condition == "masked" else "control"
                place = {"slot": slot, "length": length}
                yield Item(
                    item=2 * document + part,
                    condition=condition,
                    role=role,
                    cluster=document,
                    source=source,
                    licence="the corpus's",
                    metadata=place,
                )

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        for item in items:
            if item.role == "treated":
                where = Positions(((item.metadata["slot"], 0),))
                yield Request(item=item.item, kind="mask", where=where, copies=1, mask_length=item.metadata["length"])

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            yield Probe(item=item.item, name=self.probe, ask=SlotLoss(item.metadata["slot"]))


class NewTokens(_Stub):
    """Ids the tokenizer never makes get a meaning; other such ids never do. Asked in sentences that were not inserted."""

    def items(self, context: Context) -> Iterator[Item]:
        made = context.tokenizer.encode("".join(map(chr, range(256))))
        free = np.setdiff1d(np.arange(context.vocabulary_size), [*made, *context.banned_tokens])[: self.num]
        for unit, condition in self.coin(context, "taught", "never taught", len(free)).items():
            for arm in ("lesson", "exam"):
                text = context.tokenizer.encode(sentence(context, unit, arm))
                payload = np.concatenate([text, [free[unit]]]).astype(np.int32)
                taught = "treated" if arm == "lesson" else "probe-only"
                role = taught if condition == "taught" else "control"
                yield Item(
                    item=unit, arm=arm, condition=condition, role=role, payload=payload, cluster=unit, source="here", licence="Apache-2.0"
                )

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        for item in items:
            if item.arm == "exam":
                end = len(item.payload)
                yield Probe(item=item.item, arm=item.arm, name=self.probe, ask=LogLikelihood(item.payload, end - 1, end))


STUBS = [Passages, ParaphraseSides, Biographies, Chats, FormatsThatTransfer, TimingWindows, CurriculumSwap, DocumentAblation, NewTokens]
