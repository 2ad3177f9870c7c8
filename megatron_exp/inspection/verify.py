"""`verify`: everything that can be recomputed is recomputed, and what differs is named by place."""

from pathlib import Path

from megatron_exp.errors import UserError
from megatron_exp.inspection.base_hashes import compare_base_hashes
from megatron_exp.inspection.findings import Finding
from megatron_exp.inspection.targets import Target, open_target
from megatron_exp.inspection.verify_manifest import verify_manifest
from megatron_exp.inspection.verify_run import verify_run
from megatron_exp.manifest.reader import Manifest


def verify(path: Path, steps: tuple[int, int] | None = None, sample: int | None = None, base: Path | None = None) -> list[Finding]:
    """Check a corpus, a manifest or a run; an empty list means sound.

    Args:
        path: the directory.
        steps: for a run, recompute the ledger of steps [first, end) only.
        sample: for a run, recompute this many steps, drawn by key, instead of all.
        base: also compare the tokens that insertions stand in the place of with this file of `base_hashes.write_base_hashes`.

    Raises:
        UserError: where PATH is none of the three, or its record cannot be read at all.
    """
    target = open_target(path)
    if target.run is None and (steps is not None or sample is not None):
        raise UserError(f"--steps and --sample choose steps of a run, and {path} is a {target.kind}. Leave them out: all of it is checked.")
    if target.kind == "manifest":
        target = Target("manifest", target.path, opened=Manifest.open(target.path, is_checked=False))
    hashed = compare_base_hashes(target, base) if base else []
    if target.kind == "corpus":
        return [Finding(str(target.path), problem) for problem in target.corpus.verify()]
    return (verify_manifest(target.manifest) if target.run is None else verify_run(target, steps, sample)) + hashed
