"""`materialize`: what a run would be trained on as shards of its own, which a stock Megatron trainer reads in slot order.

DIR/slots.{bin,idx} hold one document of S + 1 tokens for each slot; DIR/cache the index that makes the trainer take them one after the other;
DIR/materialized.json says what they are. Such a trainer knows neither noise nor loss masks. What it cannot express is refused, or listed in
DIR/inexpressible.parquet.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp import __version__
from megatron_exp.errors import UserError
from megatron_exp.files import durable_directory, write_file
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.stock_index import describe, null_tokenizer, read_description, write_stock_index
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.indexed import IndexedWriter, token_dtype
from megatron_exp.stream.base import Stream
from megatron_exp.stream.slot import Slot

RECORD_NAME, PREFIX, CACHE, INEXPRESSIBLE_NAME = "materialized.json", "slots", "cache", "inexpressible.parquet"
SCHEMA_VERSION = 1
INEXPRESSIBLE = pa.schema(
    [
        ("slot", pa.uint64()),
        ("kind", pa.string()),
        ("offset", pa.uint32()),
        ("length", pa.uint32()),
        ("key", pa.uint64()),
        ("scale", pa.float64()),
    ]
)
"""kind `mask`: positions whose loss must not count. kind `noise`: the slot's embeddings are perturbed with this key and scale."""

_ROWS = 1 << 16
_REPORT_EVERY = 1000


def materialize(
    manifest_path: Path,
    out: Path,
    *,
    baseline: bool = False,
    masked: frozenset[str] = frozenset(),
    pad_id: int | None = None,
    list_inexpressible: bool = False,
    description: Path | None = None,
    seed: int = 1234,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write all slots of a run to `out`; nothing is left under that name if it does not come to its end.

    Args:
        manifest_path: what `plan` wrote.
        out: directory to write. Where it holds these slots already and `description` is given, only the index for that trainer is added.
        baseline: leave the overlay off.
        masked: experiments whose insertions are left out.
        pad_id: the id with which the trainer's tokenizer pads (-1 where it has none). It gives such labels no loss, so a last label that must
            not count is written as this id and is thereby expressed exactly.
        list_inexpressible: write what the shards cannot say to DIR/inexpressible.parquet instead of refusing it.
        description: a description that the trainer wrote into its index cache. Default: that of a trainer with the `null` tokenizer.
        seed: the trainer's --seed; only for the default description.
        progress: told how far it is.

    Returns:
        The prefix to give to the trainer.

    Raises:
        UserError: for what cannot be expressed, an `out` that exists, and a description of another dataset.
    """
    if baseline and masked:
        raise UserError("--baseline leaves out all experiments, so --mask has nothing left to mask. Use one of them.")
    manifest = Manifest.open(Path(manifest_path))
    corpus = Corpus.open(manifest.corpus_path)
    manifest.check_corpus(corpus)
    overlay = Overlay.open(manifest.open_stream(corpus), manifest, masked)
    stream = overlay.stream if baseline else overlay
    num_slots, length = overlay.num_slots, overlay.geometry.sequence_length
    out = Path(out).absolute()
    prefix = out / PREFIX
    if description is None:
        text = describe(prefix, num_slots, length, null_tokenizer(corpus.vocabulary_size), seed)
    else:
        text = read_description(description, prefix, num_slots, length)
    if description is not None and (out / RECORD_NAME).is_file():
        _check_record(out, stream.fingerprint, pad_id)
        write_stock_index(out / CACHE, text, num_slots, length)
        return prefix
    if not baseline:
        _refuse_controllers(manifest, masked)
        _refuse_kinds(manifest, masked, list_inexpressible)
    dtype = token_dtype(corpus.vocabulary_size) if pad_id is None or pad_id >= 0 else np.dtype("<i4")
    with durable_directory(out) as directory:
        written = _write_slots(directory, stream, dtype, pad_id, list_inexpressible, progress)
        write_stock_index(directory / CACHE, text, num_slots, length)
        record = _record(manifest, stream, pad_id) | {"baseline": baseline, "masked": sorted(masked)} | written
        write_file(directory / RECORD_NAME, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return prefix


def _record(manifest: Manifest, stream: Stream | Overlay, pad_id: int | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "manifest": {"path": str(manifest.path.absolute()), "fingerprint": manifest.fingerprint},
        "stream": stream.fingerprint,
        "num_slots": stream.num_slots,
        "sequence_length": stream.geometry.sequence_length,
        "pad_id": pad_id,
    }


def _check_record(out: Path, fingerprint: str, pad_id: int | None) -> None:
    record = orjson.loads((out / RECORD_NAME).read_bytes())
    if (record["stream"], record["pad_id"]) != (fingerprint, pad_id):
        raise UserError(
            f"{out} holds other slots (stream {record['stream'][:12]}, pad id {record['pad_id']}) than these (stream {fingerprint[:12]}, pad id {pad_id}). "
            "Give the manifest and options it was made with, or another directory."
        )


def _refuse_controllers(manifest: Manifest, masked: frozenset[str]) -> None:
    found = sorted(set(manifest.controllers) - masked)
    if found:
        raise UserError(
            f"What experiments {', '.join(found)} of {manifest.path} insert is decided while training, by the model that is trained; shards made beforehand "
            "cannot hold it. Leave them out (--mask), or train with `megatron-exp train`."
        )


def _refuse_kinds(manifest: Manifest, masked: frozenset[str], list_inexpressible: bool) -> None:
    """Refuse at once what the table of insertions already shows, before terabytes are written."""
    if list_inexpressible:
        return
    insertions = manifest.insertions().select(["experiment", "kind"])
    names, kinds = (insertions[name].cast(pa.string()) for name in ("experiment", "kind"))
    affected = pc.and_(pc.is_in(kinds, pa.array(["noise", "mask"])), pc.invert(pc.is_in(names, pa.array(sorted(masked), pa.string()))))
    found = sorted(set(names.filter(affected).to_pylist()))
    if found:
        raise UserError(
            f"Experiments {', '.join(found)} of {manifest.path} add noise to embeddings or mask the loss, which the shards of a stock trainer cannot say. "
            f"Leave them out (--mask), or list what is lost in {INEXPRESSIBLE_NAME} (--list-inexpressible) and apply it in the trainer."
        )


def _write_slots(
    directory: Path,
    stream: Stream | Overlay,
    dtype: np.dtype,
    pad_id: int | None,
    list_inexpressible: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write .bin, .idx and the list; what is recorded of them."""
    rows: list[dict[str, Any]] = []
    num_rows = 0
    with ExitStack() as stack:
        writer = stack.enter_context(IndexedWriter(directory / f"{PREFIX}.bin", directory / f"{PREFIX}.idx", dtype))
        table = stack.enter_context(pq.ParquetWriter(directory / INEXPRESSIBLE_NAME, INEXPRESSIBLE)) if list_inexpressible else None
        for slot in range(stream.num_slots):
            tokens, mask = _padded(slot, stream.read(slot), pad_id)
            found = list(_inexpressible(stream, slot, mask))
            if found and table is None:
                raise UserError(_refusal(slot, found[0], stream.geometry.sequence_length))
            rows += found
            num_rows += len(found)
            if table is not None and len(rows) >= _ROWS:
                table.write_table(pa.Table.from_pylist(rows, INEXPRESSIBLE))
                rows.clear()
            writer.add(tokens)
            if (slot + 1) % _REPORT_EVERY == 0:
                progress(f"{slot + 1:,} of {stream.num_slots:,} slots")
        if table is not None:
            table.write_table(pa.Table.from_pylist(rows, INEXPRESSIBLE))
    assert writer.bin_sum and writer.idx_sum
    return {"files": {"bin": writer.bin_sum.as_record(), "idx": writer.idx_sum.as_record()}, "num_inexpressible": num_rows}


def _padded(slot: int, content: Slot, pad_id: int | None) -> Slot:
    """The slot with a last label that must not count replaced by padding, which the trainer gives no loss."""
    if pad_id is None:
        return content
    tokens, mask = content
    if not mask[-1]:
        tokens[-1], mask[-1] = pad_id, 1
        inputs = tokens[:-1]
    else:
        inputs = tokens
    if (inputs == pad_id).any():
        raise UserError(
            f"Slot {slot} holds token {pad_id}, which is given as the trainer's padding: the trainer would replace it by 0 and give it no loss. Use a "
            "tokenizer there whose padding is no token of this text (the null tokenizer pads with -1), and give its id with --pad-id."
        )
    return content


def _inexpressible(stream: Stream | Overlay, slot: int, mask: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows of INEXPRESSIBLE: the runs of masked positions, then the noise."""
    borders = np.flatnonzero(np.diff(mask == 0, prepend=False, append=False))
    for start, end in borders.reshape(-1, 2).tolist():
        yield {"slot": slot, "kind": "mask", "offset": start, "length": end - start, "key": None, "scale": None}
    for noise in stream.noise(slot):
        yield {"slot": slot, "kind": "noise", "offset": 0, "length": len(mask), "key": noise.key, "scale": noise.scale}


def _refusal(slot: int, row: dict[str, Any], length: int) -> str:
    start, end = row["offset"], row["offset"] + row["length"]
    way = (
        "Give --pad-id, the id with which the trainer pads (-1 with its null tokenizer): a last label that must not count is then written as padding"
        if (start, end) == (length - 1, length)
        else "Where an experiment masks it, leave that out (--mask)"
    )
    return (
        f"The loss of positions {start} to {end - 1} of slot {slot} must not count, which the shards of a stock trainer cannot say. "
        f"{way}, or list what is lost in {INEXPRESSIBLE_NAME} (--list-inexpressible) and apply it in the trainer."
    )
