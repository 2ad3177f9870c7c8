"""`plan --reference`: the model is opened here, since planning itself knows none."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import RECORD_NAME
from megatron_exp.manifest.reference_answers import ANSWERS_NAME
from megatron_exp.preparation.reference import Reference, ReferenceIdentity
from megatron_exp.shards.corpus import Corpus


@contextlib.contextmanager
def opened_reference(
    path: Path | None, step: int | None, config: Config, precision: Literal["fp32", "bf16", "fp8"] | None = None
) -> Iterator[tuple[Reference | None, bool]]:
    """(the reference, whether this process plans). Of several processes one plans, and the others have served it when they get here.

    PATH may be a run, a checkpoint, a Hugging Face directory, or a manifest (or its reference.parquet) whose recorded answers are to be used again,
    without a model.
    """
    if path is None:
        if step is not None or precision is not None:
            raise UserError("--reference-step and --reference-precision say how --reference is asked, which was not given. Give both.")
        yield None, True
    elif recorded := _recorded(path):
        if step is not None:
            raise UserError(f"{path} holds the answers of one state. Leave --reference-step out.")
        if precision is not None:
            raise UserError(f"{path} holds answers, which are not computed again. Leave --reference-precision out.")
        yield Reference.recorded_in(recorded), True
    else:
        from megatron_exp.model.precision import require_engine

        require_engine()
        from megatron_exp.scoring.reference import find_reference, loaded

        corpus = Corpus.open(config.corpus.path)
        found = find_reference(path, step, config, corpus, precision)
        with loaded(path, found, corpus) as model:
            if not model.plans:
                model.serve()
                yield None, False
                return
            try:
                yield Reference(ReferenceIdentity(**found.fields), model), True
            finally:
                model.dismiss()


def _recorded(path: Path) -> Path | None:
    """The file of recorded answers, where PATH is one or a manifest."""
    if path.is_dir() and (path / RECORD_NAME).is_file():
        if not (path / ANSWERS_NAME).is_file():
            raise UserError(
                f"{path} is a manifest that was planned without a reference, so it records no answers. Give a run (its twin), a checkpoint, or a "
                "Hugging Face directory."
            )
        return path / ANSWERS_NAME
    return path if path.is_file() else None
