"""Commands that need a model: train, eval, report."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_exp.cli.show import console, print_verdicts
from megatron_exp.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("train")(train)
    app.command("eval")(evaluate)
    app.command("report")(report)


def train(
    manifest: Annotated[Path, typer.Argument(help="MANIFEST directory.")],
    out: Annotated[Path, typer.Option(help="RUN directory to write or to continue.")],
    baseline: Annotated[bool, typer.Option("--baseline", help="Train the twin: the same run with the overlay off.")] = False,
    mask: Annotated[list[str] | None, typer.Option(help="Leave out this experiment's insertions. Repeatable.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a value under training: a.b=c. Repeatable.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint directory.")] = "auto",
    from_: Annotated[
        Path | None, typer.Option("--from", help="Begin a new run with weights and optimizer state of this checkpoint (or of a run's last).")
    ] = None,
    against: Annotated[list[Path] | None, typer.Option(help="A twin: an alert says when losses drift apart. Repeatable.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Read tokens from the copy that `megatron-exp cache` made here.")] = None,
    hang_seconds: Annotated[float, typer.Option(help="A process without a step for so long says where it is and ends; 0: never.")] = 1800,
    processes: Annotated[int, typer.Option(help="Processes on this machine; under torchrun or srun leave it at 1.")] = 1,
) -> None:
    """Train on the manifest (or its baseline). Exit code 75: stopped by a signal after a checkpoint, start again to continue."""
    _share_among(processes)
    from megatron_exp.model.precision import require_engine

    require_engine()
    from megatron_exp.training.train import train as go

    code = go(
        manifest,
        out,
        baseline=baseline,
        masked=tuple(mask or ()),
        overrides=tuple(set_ or ()),
        resume=resume,
        begin_from=from_,
        against=tuple(against or ()),
        cache=cache,
        hang_seconds=hang_seconds,
    )
    sys.exit(code)


def _share_among(processes: int) -> None:
    """Where several processes are asked for: start them, each with the rest of this command line, and end as they do."""
    if processes > 1:
        from megatron_exp.training.launch import launch

        sys.exit(launch(_without_processes(sys.argv[1:]), processes))


def _without_processes(arguments: list[str]) -> list[str]:
    """The same command line for each process."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--processes="):
            skip = False
        elif argument == "--processes":
            skip = True
        else:
            kept.append(argument)
    return kept


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="RUN directory; none with --model.")] = None,
    against: Annotated[Path | None, typer.Option(help="The twin: a baseline RUN of the same manifest.")] = None,
    model: Annotated[Path | None, typer.Option(help="Score this Hugging Face directory instead of a run: described, not tested.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="With --model: the MANIFEST whose probes are asked.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --model: the directory to write.")] = None,
    steps: Annotated[str | None, typer.Option(help="States to score, comma-separated; default: the final one.")] = None,
    experiment: Annotated[list[str] | None, typer.Option(help="Only this experiment. Repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compute again even where results exist.")] = False,
    judge: Annotated[
        Path | None, typer.Option(help="Hugging Face directory of a model that judges written text; default: the twin.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp8"] | None, typer.Option(help="What checkpoints are computed in; default: what their run was trained in.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel processes for each copy of the model, for one that no GPU holds alone.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages of each copy of the model.")] = 1,
    processes: Annotated[
        int, typer.Option(help="Processes on this machine, which share the questions; under torchrun or srun leave it at 1.")
    ] = 1,
) -> None:
    """Score the experiments of a run and write RUN/evals/; or let a Hugging Face model answer a manifest's probes."""
    if model is not None and (tp, pp, processes) != (1, 1, 1):
        raise UserError("`eval --model HF_DIR` runs in one process. Leave out --processes, --tp and --pp.")
    _share_among(processes)
    from megatron_exp.model.precision import require_engine

    require_engine()
    from megatron_exp.config.schema import ParallelConfig
    from megatron_exp.evaluation import evaluate as go
    from megatron_exp.evaluation import evaluate_model
    from megatron_exp.parallel.launched import launched_rank

    shared: dict[str, Any] = {"experiments": experiment or None, "overwrite": overwrite, "command": sys.argv, "judge": judge}
    if model is not None:
        if manifest is None or out is None or any(one is not None for one in (run, against, steps, precision)):
            raise UserError("`eval --model HF_DIR` takes --manifest MANIFEST and --out DIR, and neither a run, --against, --steps nor --precision.")
        directory = evaluate_model(model, manifest, out, **shared)
    elif run is None:
        raise UserError("`eval` needs a RUN directory, or --model HF_DIR with --manifest MANIFEST and --out DIR.")
    else:
        states, parallel = _states(steps) if steps else None, ParallelConfig(tp=tp, pp=pp)
        directory = go(run, against=against, states=states, parallel=parallel, precision=precision, **shared)
    if launched_rank() == 0:
        print_verdicts(directory)


def _states(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 20 for part in parts):
        raise UserError(f"--steps {text!r} is no list of model states. Give numbers with commas between them, for example 1000,2000.")
    return [int(part) for part in parts]


def report(
    run: Annotated[Path, typer.Argument(help="RUN directory.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    against: Annotated[Path | None, typer.Option(help="The twin.")] = None,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Show payload texts and what models wrote instead of masking them.")
    ] = False,
    cpdt: Annotated[Path | None, typer.Option(help="The directory of the dependence test.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write every plot as SVG and PDF into this directory.")] = None,
) -> None:
    """Write one self-contained HTML file."""
    from megatron_exp.report import report as go

    console.print(f"report: {go(run, against=against, out=out, show_text=show_text, figures=figures, cpdt=cpdt)}", highlight=False)
