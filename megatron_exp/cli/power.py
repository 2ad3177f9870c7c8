"""Power and cost before a run, as `plan --power` and `cpdt --plan` print them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from rich.table import Table

from megatron_exp.cli.show import console
from megatron_exp.display.numbers import count
from megatron_exp.errors import UserError

if TYPE_CHECKING:
    from megatron_exp.manifest.reader import Manifest

_GIBIBYTE = 2**30


def shown(value: float | None) -> str:
    """A number at four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def print_plan(path: Path, seeds: int, steps: int, tokens_per_second: float | None, as_json: bool, only: Sequence[str] = ()) -> None:
    """Power and cost of a manifest, as tables or as JSON."""
    from megatron_exp.manifest.reader import Manifest

    manifest = Manifest.open(path)
    if as_json:
        console.print_json(orjson.dumps(plan_of(manifest, seeds, steps, tokens_per_second, only), default=str).decode())
    else:
        print_power(manifest, seeds=seeds, steps=steps, tokens_per_second=tokens_per_second, only=only)


def plan_of(
    manifest: "Manifest", seeds: int = 5, steps: int = 100, tokens_per_second: float | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Power of every primary, the bill of run and twin, and that of a dependence test."""
    from megatron_exp.dependence.bill import cpdt_bill, run_bill
    from megatron_exp.dependence.power import power_of
    from megatron_exp.dependence.what import tested
    from megatron_exp.model.presets import resolve_shape
    from megatron_exp.shards.corpus import Corpus

    corpus = Corpus.open(manifest.corpus_path)
    shape = resolve_shape(manifest.config.model, corpus.vocabulary_size, manifest.geometry.sequence_length)
    try:
        test = cpdt_bill(manifest, shape, tested(manifest, only), num_seeds=seeds, steps=steps, tokens_per_second=tokens_per_second)
    except UserError as error:
        test = {"not_possible": str(error)}
    return {"schema_version": 1, "power": [asdict(one) for one in power_of(manifest)], "bill": run_bill(manifest, shape), "cpdt": test}


def print_power(
    manifest: "Manifest", *, seeds: int = 5, steps: int = 100, tokens_per_second: float | None = None, only: Sequence[str] = ()
) -> None:
    """Power and cost before the run, as tables."""
    record = plan_of(manifest, seeds, steps, tokens_per_second, only)
    names = ("experiment", "outcome", "n", "clusters", "null spread", "detectable", "of interest", "source", "")
    table = Table(*names, box=None)
    for one in record["power"]:
        numbers = [shown(one[name]) for name in ("spread", "mde", "smallest_effect", "paper")]
        table.add_row(
            one["experiment"], f"{one['outcome']} ({one['unit']})", str(one["n"]), str(one["num_clusters"]), *numbers, one["warning"]
        )
    console.print(table)
    console.print(
        "detectable: with 80% power after correction over all primaries; null spread: simulated runs without an effect", style="dim"
    )
    bill, test = record["bill"], record["cpdt"]
    lines = [
        f"run: {count(bill['tokens'])} tokens, none extra ({count(bill['modified_tokens'])} rewritten); {bill['run_gpu_hours']:.3g} GPU-hours, "
        "the twin as many",
        f"scoring: {count(bill['num_questions'])} questions, {count(bill['scored_tokens'])} tokens, {bill['scoring_gpu_hours']:.3g} GPU-hours",
        f"checkpoints: {bill['num_checkpoints']} at a time, {bill['checkpoint_bytes'] / _GIBIBYTE:.3g} GiB",
    ]
    console.print("\n".join([*lines, *_test_lines(test), f"GPU-hours: {bill['assumption']}"]), markup=False, highlight=False)


def _test_lines(test: dict[str, Any]) -> list[str]:
    if "not_possible" in test:
        return [f"dependence test: not possible. {test['not_possible']}"]
    lines = [
        f"dependence test: {test['rows']} rows x {test['num_seeds']} seeds = {test['num_cells']} runs of {test['steps']} steps, "
        f"{count(test['tokens'])} tokens, {test['gpu_hours']:.3g} GPU-hours, scoring at most {test['scoring_gpu_hours_at_most']:.3g} more",
        f"  beside it: {test['pilot_cells_per_round']} runs per round of the pilot, {test['leave_one_out_cells']} where ALL changes something",
    ]
    if "hours_here" in test:
        lines.append(f"  here: {test['hours_here']:.3g} hours, {test['pilot_hours_here_per_round']:.3g} per round of the pilot")
    return lines
