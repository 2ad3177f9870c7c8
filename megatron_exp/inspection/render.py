"""Answers on a terminal. Texts from data are plain `Text` with control characters made visible: no markup, no escape sequence."""

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import pyarrow as pa
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_exp.display.numbers import count, duration, measured, percent
from megatron_exp.display.visible import visible, visible_line
from megatron_exp.inspection.findings import Finding
from megatron_exp.inspection.items import ExperimentView, ItemView
from megatron_exp.inspection.search import SearchResult
from megatron_exp.inspection.slots import Mark, SlotView, StepView
from megatron_exp.inspection.status import RunStatus
from megatron_exp.inspection.submission_status import SubmissionStatus
from megatron_exp.inspection.summary import ConditionSummary, CorpusSummary, ManifestSummary, RunSummary

_MARK_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_MAX_SHOWN_ROWS = 200


def show(answer: Any, console: Console) -> None:
    """Print any answer of this package."""
    console.print(render(answer), soft_wrap=False, highlight=False, markup=False)


@singledispatch
def render(answer: Any) -> RenderableType:
    """An answer as something Rich can print."""
    raise TypeError(f"nothing renders a {type(answer).__name__}")


@render.register
def _(answer: CorpusSummary) -> RenderableType:
    head = _pairs(
        [
            ("corpus", answer.path),
            ("fingerprint", answer.fingerprint),
            ("vocabulary", count(answer.vocabulary_size)),
            ("tokenizer", answer.tokenizer_fingerprint),
        ]
    )
    return Group(
        head, _table(("source", "shards", "documents", "tokens"), [(s.source, s.shards, s.documents, s.tokens) for s in answer.sources])
    )


@render.register
def _(answer: ManifestSummary) -> RenderableType:
    geometry, budget = answer.geometry, answer.budget
    head = _pairs(
        [
            ("manifest", answer.path),
            ("name", answer.name),
            ("fingerprint", answer.fingerprints["plan"]),
            (
                "geometry",
                f"{count(geometry['steps'])} steps of {geometry['global_batch_size']} slots of {geometry['sequence_length']} tokens",
            ),
            (
                "modified",
                f"{count(budget['modified_tokens'])} tokens ({percent(budget['modified_fraction'])}), "
                f"in {count(budget['touched_slots'])} slots ({percent(budget['touched_fraction'])})"
                + (f"; {count(budget['reserved_tokens'])} tokens reserved for controllers" if budget["reserved_tokens"] else ""),
            ),
            ("kept states", ", ".join(map(str, answer.keep_steps)) or "none"),
        ]
    )
    return Group(head, _conditions(answer.conditions))


@render.register
def _(answer: RunSummary) -> RenderableType:
    return Group(render(answer.status), Text(), render(answer.manifest))


@render.register
def _(answer: RunStatus) -> RenderableType:
    checkpoint = "none yet" if answer.last_checkpoint is None else f"step {answer.last_checkpoint}"
    return _pairs(
        [
            ("run", answer.path),
            ("name", answer.name + (" (baseline)" if answer.baseline else "")),
            ("state", answer.state),
            ("step", f"{answer.step} of {answer.num_steps}" + (", finished" if answer.finished else "")),
            ("tokens", count(answer.tokens)),
            (
                "loss",
                measured(answer.loss, 4)
                + (f", validation {measured(answer.validation_loss, 4)}" if answer.validation_loss is not None else ""),
            ),
            ("speed", f"{count(answer.tokens_per_second)} tokens/s"),
            ("time left", duration(answer.seconds_left)),
            ("last checkpoint", checkpoint),
            ("attempts", f"{answer.num_attempts}, {answer.num_requeues} requeues"),
            ("last written", answer.updated or "never"),
            *([("reason", visible_line(answer.reason))] if answer.reason else []),
            ("next", answer.advice),
        ]
    )


@render.register
def _(answer: SubmissionStatus) -> RenderableType:
    head = _pairs([("submission", answer.path), ("name", answer.name), ("next", answer.advice)])
    rows = [
        (stage.name, stage.job or "", stage.state, str(stage.num_requeues or ""), visible_line(stage.detail)) for stage in answer.stages
    ]
    return Group(head, Text(), _table(("stage", "job", "state", "requeues", ""), rows))


@render.register
def _(answer: StepView) -> RenderableType:
    title = f"step {answer.step}" if answer.step is not None else "pool"
    note = "" if answer.overlay else "  (baseline run: no insertions)"
    if answer.undecided:
        note += f"  (not decided yet: {', '.join(answer.undecided)})"
    return Group(Text(f"{title} of {visible_line(answer.path)}{note}", style="bold"), *(_slot(slot) for slot in answer.slots))


def _slot(view: SlotView) -> RenderableType:
    row = "" if view.row is None else f"  row {view.row}"
    origin = f"{view.source}, epoch {view.epoch}, {_document(view)}"
    lines: list[RenderableType] = [
        Text(),
        Text.assemble((f"slot {view.slot}{row}", "bold"), f"   {visible_line(origin)}, loss on {view.num_loss_positions} positions"),
    ]
    lines += [Text(f"  [{number + 1}] {_mark(mark)}", style=_style(number)) for number, mark in enumerate(view.marks)]
    return Group(*lines, Padding(_text(view), (0, 0, 0, 2), expand=False))


def _document(view: SlotView) -> str:
    place = view.document
    if "file" in place:
        return f"{place['file']} line {place.get('line')}"
    return f"document {place['document']} of shard {view.shard}" if place else "source document unknown"


def _mark(mark: Mark) -> str:
    place = f"tokens {mark.offset} to {mark.offset + mark.length - 1}" if mark.kind not in ("swap", "noise") else "whole slot"
    source = f" from {mark.source}" if mark.source else ""
    return visible_line(
        f"{mark.kind}{source}: {mark.experiment} / {mark.condition} / item {mark.item} {mark.arm}, copy {mark.repetition}, {place}"
    )


def _text(view: SlotView) -> Text:
    """The slot's text; a marked piece stands in ⟦number: ...⟧, so that marks survive a terminal without colours."""
    text = Text()
    for piece in view.pieces:
        shown = f" [{piece.end - piece.start} tokens: --slot {view.slot}] " if piece.omitted else visible(piece.text)
        if piece.marks:
            numbers = ",".join(str(number + 1) for number in piece.marks)
            text.append(f"⟦{numbers}: {shown}⟧", style=_style(piece.marks[-1]))
        else:
            text.append(shown)
    return text


def _style(number: int) -> str:
    return _MARK_STYLES[number % len(_MARK_STYLES)]


@render.register
def _(answer: ExperimentView) -> RenderableType:
    parts: list[RenderableType] = [
        _pairs([("experiment", answer.experiment), ("title", answer.title), ("question", answer.question), ("source", answer.citation)]),
        _conditions(answer.conditions),
        Text("outcomes", style="bold"),
        _rows(answer.outcomes, ("name", "family", "estimand", "unit", "test", "side", "margin", "smallest_effect")),
        Text("first items", style="bold"),
        _rows(answer.first_items, ("item", "condition", "arm", "role", "num_tokens", "stratum", "source")),
    ]
    if answer.decisions:
        shown = ("step", "number", "tokens", "value", "aim", "handed", "index")
        parts += [Text("decisions of the controller", style="bold"), _rows(list(answer.decisions), shown)]
    if answer.results:
        columns = ("outcome", "condition", "step", "n", "estimate", "low", "high", "control", "twin", "p", "p_corrected", "verdict")
        parts += [Text("results", style="bold"), _rows(answer.results, columns)]
    return Group(*parts)


@render.register
def _(answer: ItemView) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"item {answer.item} of {answer.experiment}", style="bold"),
        _rows(answer.arms, ("arm", "condition", "role", "num_tokens", "stratum", "cluster", "source", "licence", "sensitive", "metadata")),
    ]
    for arm, text in answer.texts.items():
        parts += [Text(f"payload, arm {visible_line(arm)}", style="bold"), Padding(Text(visible(text)), (0, 0, 0, 2), expand=False)]
    parts += [
        Text("insertions", style="bold"),
        _rows(answer.insertions, ("step", "row", "slot", "offset", "length", "kind", "repetition", "arm")),
    ]
    if answer.responses:
        parts += [
            Text("responses", style="bold"),
            _rows(answer.responses, ("step", "model", "arm", "probe", "value", "reason", "num_tokens", "text")),
        ]
    return Group(*parts)


@render.register
def _(answer: pa.Table) -> RenderableType:
    return Group(_rows(answer.slice(0, _MAX_SHOWN_ROWS).to_pylist(), answer.column_names), _cut(answer.num_rows))


@render.register
def _(answer: SearchResult) -> RenderableType:
    names = ("id", "num_tokens", "corpus", "training", "steps", "payloads")
    return _table(names, [tuple(getattr(one, name) for name in names) for one in answer.strings])


def render_findings(findings: Sequence[Finding]) -> RenderableType:
    """What `verify` found, one line each."""
    lines = [Text(visible_line(f"{'normal' if finding.normal else 'FOUND'}  {finding.place}: {finding.problem}")) for finding in findings]
    return Group(*lines) if lines else Text("sound: nothing found")


def _conditions(conditions: Sequence[ConditionSummary]) -> Table:
    names = ("experiment", "condition", "items", "controls", "insertions", "tokens", "slots")
    return _table(names, [tuple(getattr(row, name) for name in names) for row in conditions])


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in pairs:
        grid.add_row(Text(name, style="dim"), Text(visible_line(value)))
    return grid


def _rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> RenderableType:
    return Group(_table(columns, [tuple(row[name] for name in columns) for row in rows[:_MAX_SHOWN_ROWS]]), _cut(len(rows)))


def _cut(num_rows: int) -> Text:
    return Text(f"... {num_rows - _MAX_SHOWN_ROWS} more rows; --json has all") if num_rows > _MAX_SHOWN_ROWS else Text(end="")


def _table(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        table.add_column(Text(visible_line(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return measured(value)
    if isinstance(value, bytes):
        return value.hex()
    return "–" if value is None else visible_line(str(value))
