"""`convert`: checkpoints to and from Hugging Face."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_exp.cli.show import console

if TYPE_CHECKING:
    from megatron_exp.checkpoint.convert import Converted

_Dtype = Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Type of the weights written; default: as stored.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="Convert a checkpoint to or from a Hugging Face Olmo2ForCausalLM."
    )
    group.command("to-hf")(to_hf)
    group.command("from-hf")(from_hf)
    app.add_typer(group, name="convert")


def to_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="RUN/checkpoints/step-XXXXXXXX, or RUN for its last checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Hugging Face directory to write.")],
    dtype: _Dtype = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Largest safetensors file in bytes; it is written from memory.")] = 4 << 30,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer to put beside the weights; default: that of the run's corpus.")] = None,
) -> None:
    """Write the weights of a checkpoint, stored in any layout, as a Hugging Face model."""
    from megatron_exp.model.precision import require_engine

    require_engine()
    from megatron_exp.checkpoint.convert import to_huggingface

    converted = to_huggingface(source, target, precision=dtype, shard_bytes=shard_size, tokenizer=tokenizer)
    _show(converted, "The corpus of the run is not where it was: name its tokenizer with --tokenizer.")


def from_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory with config.json and safetensors weights.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Checkpoint directory to write.")],
    dtype: _Dtype = None,
) -> None:
    """Write the weights of a Hugging Face OLMo-2 model as a checkpoint that loads in any layout. It has no optimizer state."""
    from megatron_exp.model.precision import require_engine

    require_engine()
    from megatron_exp.checkpoint.convert import from_huggingface

    _show(from_huggingface(source, target, precision=dtype), "There is none beside the model.")


def _show(converted: "Converted", without_tokenizer: str) -> None:
    shape = converted.shape
    known = "" if converted.vocabulary_size is None else f" ({converted.vocabulary_size:,} in use)"
    console.print(
        f"{converted.target}: {shape.num_parameters:,} weights in {converted.precision} of {converted.source}; "
        f"{shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary_size:,}{known}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if not converted.has_tokenizer:
        console.print(f"No tokenizer was written. {without_tokenizer}", highlight=False, soft_wrap=True)
