"""The texts of input files, read as `preprocess` reads them: for training a tokenizer."""

from collections.abc import Iterator, Sequence

from megatron_exp.preparation.preprocess_inputs import find_inputs
from megatron_exp.preparation.preprocess_ledger import FileLedger
from megatron_exp.preparation.preprocess_readers import read_documents


def texts_of(inputs: Sequence[str]) -> Iterator[str]:
    """Every document of the inputs, in the order `preprocess` would take them. UserError as there."""
    for file in find_inputs(inputs):
        for document in read_documents(
            file, FileLedger(file.path, file.source, file.format, file.codec, file.num_bytes, file.modified_ns), lambda _: None
        ):
            yield document.text
