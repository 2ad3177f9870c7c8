"""Commands that read any result: inspect, verify, status, doctor. None of them needs torch but `doctor`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_exp.cli.show import console
from megatron_exp.errors import UserError

_EXIT_FINDINGS = 2

AnyPath = Annotated[Path, typer.Argument(help="A CORPUS, MANIFEST or RUN directory.")]
Json = Annotated[bool, typer.Option("--json", help="Versioned JSON instead of tables.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("inspect")(inspect)
    app.command("verify")(verify)
    app.command("search")(search)
    app.command("status")(status)
    app.command("doctor")(doctor)


def inspect(
    path: AnyPath,
    summary: Annotated[bool, typer.Option("--summary", help="What it is and holds (the default).")] = False,
    experiment: Annotated[str | None, typer.Option(help="One experiment: design, conditions, results so far.")] = None,
    step: Annotated[int | None, typer.Option(help="What the model saw at this step (from 0), insertions marked.")] = None,
    slot: Annotated[int | None, typer.Option(help="One slot, likewise.")] = None,
    item: Annotated[int | None, typer.Option(help="One item, with its insertions; --experiment where several have that number.")] = None,
    sql: Annotated[str | None, typer.Option(help="A SELECT over the tables insertions, items, probes, responses, results.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to browse a manifest or a run instead: one self-contained HTML file.")
    ] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="With --html: include texts instead of masking them.")] = False,
    json: Json = False,
) -> None:
    """Look at a corpus, a manifest or a run."""
    from megatron_exp.inspection import document, items, query, render, slots, targets
    from megatron_exp.inspection import summary as summaries

    wanted = {"--step": step, "--slot": slot, "--item": item, "--sql": sql, "--summary": summary or None}
    asked = [name for name, value in wanted.items() if value is not None]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} were given together. Ask one question at a time.")
    target = targets.open_target(path)
    if html is not None:
        from megatron_exp.inspection.page import write_inspector

        if asked or json or experiment is not None:
            raise UserError("--html writes the whole page, so it goes with no question. Leave the other options out.")
        console.print(f"inspector: {write_inspector(target, html, show_text=show_text)}", markup=False, highlight=False)
        return
    answer: Any
    if step is not None:
        kind, answer = "step", slots.view_step(target, step)
    elif slot is not None:
        kind, answer = "slot", slots.view_slot(target, slot)
    elif item is not None:
        kind, answer = "item", items.view_item(target, item, experiment)
    elif sql is not None:
        kind, answer = "rows", query.query(target, sql)
    elif experiment is not None:
        kind, answer = "experiment", items.view_experiment(target, experiment)
    else:
        kind, answer = "summary", summaries.summarise(target)
    if json:
        typer.echo(document.as_json(kind, answer))
    else:
        render.show(answer, console)


def verify(
    path: AnyPath,
    steps: Annotated[str | None, typer.Option(help="Of a run, only the steps A:B (B excluded).")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Of a run, only this many steps, drawn by key.")] = None,
    base: Annotated[Path | None, typer.Option(help="Compare the tokens that insertions stand in the place of with this file.")] = None,
    base_out: Annotated[Path | None, typer.Option(help="Write the file for --base, and check nothing.")] = None,
    json: Json = False,
) -> None:
    """Recompute everything that can be recomputed; exit code 2 and the place where something differs."""
    from megatron_exp.inspection import base_hashes, document, findings, render, targets
    from megatron_exp.inspection.verify import verify as go

    if base_out is not None:
        num = base_hashes.write_base_hashes(targets.open_target(path), base_out)
        console.print(f"{base_out}: {num:,} hashes of base tokens.", markup=False, highlight=False)
        return
    found = go(path, _range(steps) if steps else None, sample, base)
    if json:
        typer.echo(document.as_json("findings", found))
    elif found:
        console.print(render.render_findings(found))
    if findings.is_sound(found):
        if not json:
            console.print(f"{path}: everything checked agrees.", markup=False, highlight=False)
        return
    sys.exit(_EXIT_FINDINGS)


def _range(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not colon or not first.isdigit() or not end.isdigit() or int(first) >= int(end):
        raise UserError(f"--steps {text!r} is not of the form A:B with A < B, for example 100:200.")
    return int(first), int(end)


def search(
    path: Annotated[Path, typer.Argument(help="A CORPUS, MANIFEST or RUN directory.")],
    strings: Annotated[Path | None, typer.Option(help="JSON lines with `text` or `token_ids`, and an `id` if you like.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for all occurrences as Parquet; with --payloads, a file.")] = None,
    payloads: Annotated[Path | None, typer.Option(help="A manifest: count its payloads' n-grams in the corpus instead.")] = None,
    ngram: Annotated[int, typer.Option(help="With --payloads: tokens of an n-gram.")] = 13,
    per_payload: Annotated[int | None, typer.Option(help="With --payloads: at most so many n-grams of each, evenly spread (default: all).")] = None,
    json: Json = False,
) -> None:
    """Count exact occurrences of token strings in shards, in the stream as trained, and in payloads."""
    if (strings is None) == (payloads is None):
        raise UserError("Give either --strings FILE, or --payloads MANIFEST with --out FILE.")
    if payloads is not None:
        _search_payloads(path, payloads, out, ngram, per_payload)
        return
    assert strings is not None
    from megatron_exp.inspection import document
    from megatron_exp.inspection.search import search as go
    from megatron_exp.inspection.targets import open_target

    answer = go(open_target(path), strings, out)
    if json:
        typer.echo(document.as_json("search", answer))
    else:
        from megatron_exp.inspection import render

        render.show(answer, console)


def _search_payloads(path: Path, payloads: Path, out: Path | None, ngram: int, per_payload: int | None) -> None:
    """A resumable job; its result is for `plan --base-rates`."""
    from megatron_exp.cli.show import progress_line
    from megatron_exp.inspection.search import search_payloads

    if out is None:
        raise UserError("--payloads needs --out FILE: the base rates are for `plan --base-rates FILE`.")
    with progress_line() as progress:
        found, num = search_payloads(path, payloads, out, ngram, per_payload, progress)
    console.print(f"{out}: {found:,} of {num:,} items have n-grams in the corpus.", markup=False, highlight=False)


def status(run: Annotated[Path, typer.Argument(help="RUN directory, or that of a submission.")], json: Json = False) -> None:
    """How far a run or a submission is, how fast, what its last checkpoint is, and what to do next."""
    from megatron_exp.inspection import document, render
    from megatron_exp.inspection.status import status as go
    from megatron_exp.inspection.submission_status import submission_status
    from megatron_exp.submission import RECORD_NAME, Submission

    answer: Any
    if (run / RECORD_NAME).is_file():
        from megatron_exp.cli.submit import job_states

        answer = submission_status(run, job_states(Submission.open(run).jobs))
    else:
        answer = go(run)
    if json:
        typer.echo(document.as_json("status", answer))
    else:
        render.show(answer, console)


def doctor() -> None:
    """What this machine can run, and why not the rest."""
    from megatron_exp.cli.doctor import examine

    for finding in examine():
        mark, style = ("yes", "green") if finding.available else ("no", "yellow")
        console.print(f"[{style}]{mark:>3}[/] {finding.name}: ", end="", highlight=False)
        console.print(finding.detail, markup=False, highlight=False)
