"""Commands before training: preprocess, import, plan, materialize, quickstart."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_exp.cli.show import console, print_counts, print_kept, progress_line
from megatron_exp.cli.tasks import parsed_task

if TYPE_CHECKING:
    from megatron_exp.shards.corpus import Corpus


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("quickstart")(quickstart)
    app.command("preprocess")(preprocess)
    app.command("import")(import_)
    app.command("plan")(plan)
    app.command("materialize")(materialize)


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(help="Rough time to spend; scales the number of training steps.")] = 8.0,
    input: Annotated[list[str] | None, typer.Option("--input", help="Your own files instead of Python's standard library.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of placement, assignment, order and initialisation.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="Another configuration, such as examples/ten-small.yaml; --minutes is ignored then.")
    ] = None,
) -> None:
    """The whole path, small, on this machine's own text: corpus, plan, twin, run, eval, verify, report."""
    from megatron_exp.cli.quickstart import quickstart as go

    go(out, minutes=minutes, inputs=input or [], seed=seed, config=config)


def preprocess(
    input: Annotated[list[str], typer.Option("--input", help="File, glob or directory; NAME=GLOB gives the source its name. Repeatable.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of Hugging Face, or a SentencePiece .model.")],
    output: Annotated[Path, typer.Option(help="CORPUS directory to write.")],
    workers: Annotated[int, typer.Option(help="Worker processes; the result does not depend on it.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Largest shard in bytes.")] = 8 << 30,
    special_in_text: Annotated[
        Literal["plain", "special", "reject"], typer.Option(help="Special-token strings in text: plain, special or reject.")
    ] = "plain",
    max_reject_rate: Annotated[float, typer.Option(help="Share of lines that may be rejected before the job fails.")] = 0.0,
    backend: Annotated[Literal["auto", "gigatoken", "reference"], typer.Option(help="How texts are encoded; a choice of speed.")] = "auto",
    task: Annotated[str | None, typer.Option(help="I/N: only the I-th of N shares of the input files (from 0), no shards yet.")] = None,
) -> None:
    """Tokenise text into Megatron indexed shards. A killed job continues where it was; after all tasks of an array job, the command without --task finishes."""
    from megatron_exp.preparation.preprocess import preprocess as go
    from megatron_exp.preparation.preprocess import preprocess_part

    shared: dict[str, Any] = {
        "workers": workers or None,
        "special_in_text": special_in_text,
        "max_reject_rate": max_reject_rate,
        "backend": backend,
    }
    if task is not None:
        with progress_line() as progress:
            preprocess_part(input, tokenizer, output, *parsed_task(task), progress=progress, **shared)
        console.print(f"{output}: task {task} is done; the same command without --task writes the shards.", markup=False, highlight=False)
        return
    with progress_line() as progress:
        corpus = go(input, tokenizer, output, shard_size=shard_size, progress=progress, **shared)
    _print_corpus(corpus)


def import_(
    shards: Annotated[
        list[str], typer.Argument(help="Prefix, file, glob or directory of .bin/.idx or .npy/.csv.gz; NAME=GLOB names the source.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer the tokens were made with.")],
    output: Annotated[Path, typer.Option(help="CORPUS directory to write.")],
    workers: Annotated[int, typer.Option(help="Worker processes; the result does not depend on it.")] = 0,
) -> None:
    """Adopt Megatron shards or AI2's pre-tokenised arrays; bytes are reused. A killed job continues where it was."""
    from megatron_exp.preparation.import_shards import import_shards as go

    with progress_line() as progress:
        corpus = go(shards, tokenizer, output, workers=workers or None, progress=progress)
    _print_corpus(corpus)


def _print_corpus(corpus: "Corpus") -> None:
    console.print(
        f"{corpus.path}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens, {len(corpus.shards)} shards, "
        f"fingerprint {corpus.fingerprint[:12]}",
        highlight=False,
    )


def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    out: Annotated[Path, typer.Option(help="MANIFEST directory to write.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a value: a.b=c. Repeatable.")] = None,
    diff: Annotated[Path | None, typer.Option(help="An older manifest: list the insertions that moved.")] = None,
    extends: Annotated[Path | None, typer.Option(help="An older manifest: keep all its rows, and only add experiments.")] = None,
    base_rates: Annotated[Path | None, typer.Option(help="What `search CORPUS --payloads MANIFEST --out FILE` found.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="The twin (RUN), a checkpoint or a Hugging Face directory, for experiments that need a trained model; or a manifest: its answers."
        ),
    ] = None,
    reference_step: Annotated[int | None, typer.Option(help="State of the reference; default: its newest checkpoint.")] = None,
    reference_precision: Annotated[
        Literal["fp32", "bf16", "fp8"] | None, typer.Option(help="What the reference is computed in; default: what it was trained in.")
    ] = None,
    power: Annotated[bool, typer.Option("--power", help="Also print what every primary outcome could detect, and the bill.")] = False,
    backend: Annotated[
        Literal["auto", "gigatoken", "reference"], typer.Option(help="How texts of experiments are encoded; a choice of speed.")
    ] = "auto",
) -> None:
    """Place all experiments and write the manifest."""
    from megatron_exp.cli.reference import opened_reference
    from megatron_exp.cli.tables import print_data
    from megatron_exp.config.load import load_config
    from megatron_exp.manifest.reader import Manifest
    from megatron_exp.preparation.diff import diff as compare
    from megatron_exp.preparation.diff import moved
    from megatron_exp.preparation.plan import plan as go
    from megatron_exp.stream.slot import slot_name

    older = Manifest.open(diff) if diff else None
    loaded = load_config(config, set_)
    with opened_reference(reference, reference_step, loaded, reference_precision) as (model, plans):
        if not plans:
            return
        manifest = go(loaded, out, Manifest.open(extends) if extends else None, base_rates, model, backend=backend)
    print_counts(manifest)
    print_data(manifest)
    print_kept(manifest)
    if waiting := manifest.record["waiting_for_reference"]:
        console.print(
            f"left out until there is a reference model: {', '.join(waiting)}. Train the twin on this manifest, then "
            f"`plan {config} --out MANIFEST2 --reference TWIN --extends {out}`",
            markup=False,
            highlight=False,
        )
    if older:
        for name, cell in compare(manifest, older).items():
            console.print(f"{name}: " + ", ".join(f"{number} {word}" for word, number in cell.items()), markup=False, highlight=False)
        for row in moved(manifest, older):
            (slot, offset), (new_slot, new_offset) = row["from"], row["to"]
            line = f"  {row['experiment']} {row['insertion_id']}: slot {slot_name(slot)} offset {offset} -> slot {slot_name(new_slot)} offset {new_offset}"
            console.print(line, markup=False, highlight=False)
    if power:
        from megatron_exp.cli.power import print_power

        print_power(manifest)


def materialize(
    manifest: Annotated[Path, typer.Argument(help="MANIFEST directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write; an existing one only gets the index of another --description.")],
    baseline: Annotated[bool, typer.Option("--baseline", help="Leave all experiments out.")] = False,
    mask: Annotated[list[str] | None, typer.Option("--mask", help="Leave this experiment out. Repeatable.")] = None,
    pad_id: Annotated[int | None, typer.Option(help="Id with which the trainer pads; -1 with its null tokenizer.")] = None,
    list_inexpressible: Annotated[
        bool, typer.Option("--list-inexpressible", help="List noise and loss masks in inexpressible.parquet instead of refusing them.")
    ] = False,
    description: Annotated[Path | None, typer.Option(help="The description.txt that the trainer wrote into its index cache.")] = None,
    seed: Annotated[int, typer.Option(help="The trainer's --seed, where no description is given.")] = 1234,
) -> None:
    """Write the rewritten shards for a stock Megatron trainer, with the index that keeps their order."""
    from megatron_exp.preparation.materialize import CACHE
    from megatron_exp.preparation.materialize import materialize as go

    with progress_line() as progress:
        prefix = go(
            manifest,
            out,
            baseline=baseline,
            masked=frozenset(mask or ()),
            pad_id=pad_id,
            list_inexpressible=list_inexpressible,
            description=description,
            seed=seed,
            progress=progress,
        )
    console.print(f"--train-data-path {prefix} --data-cache-path {prefix.parent / CACHE}", markup=False, highlight=False)
