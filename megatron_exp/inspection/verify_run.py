"""A run against its manifest and its corpus: what was fed to the model is what was planned, and its files are whole."""

from collections.abc import Iterator

import numpy as np

from megatron_exp.checkpoint.catalogue import is_finished, list_checkpoints, list_directories, verify_checkpoint
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import Finding
from megatron_exp.inspection.targets import Target
from megatron_exp.inspection.verify_manifest import verify_manifest
from megatron_exp.inspection.verify_segments import verify_segments
from megatron_exp.ledger import RECORD, Entry, Ledger, read_ledger, slot_hash, step_hash
from megatron_exp.run_record import RunRecord
from megatron_exp.seeding import Words

LEDGER_NAME = "ledger.bin"
_SLOTS_PER_BLOCK = 1 << 15  # a block is read in order of shards; its hashes take 8 bytes a slot


def verify_run(target: Target, steps: tuple[int, int] | None = None, sample: int | None = None) -> list[Finding]:
    """All findings of manifest, record, ledger and checkpoints; where a step differs, those of the corpus too."""
    run = target.run
    assert run is not None
    findings = [*_record(target, run)]
    if findings:
        return findings  # nothing below could be compared
    findings += verify_manifest(target.manifest)
    ledger = read_ledger(run.path / LEDGER_NAME)
    findings += _ledger_file(ledger)
    entries = ledger.steps()
    findings += _sequence(run, entries)
    findings += verify_segments(target, max((entry.step + 1 for entry in entries), default=0))
    differing = list(_content(target, _chosen(entries, steps, sample)))
    if differing:
        findings += [Finding(str(target.corpus.path), problem) for problem in target.corpus.verify()]
    findings += differing
    for _, path in list_directories(run.path):
        findings += [Finding(str(path), problem) for problem in verify_checkpoint(path)]
    return findings


def _record(target: Target, run: RunRecord) -> Iterator[Finding]:
    """run.json names the manifest, the corpus and the stream (base stream, overlay and mask) that lie there now."""
    try:
        now = {"corpus": target.corpus.fingerprint, "manifest": target.manifest.fingerprint, "stream": target.stream.fingerprint}
    except UserError as error:
        yield Finding(str(run.path / "run.json"), str(error))
        return
    for name, value in now.items():
        recorded = run.record[name]["fingerprint"]
        if recorded != value:
            yield Finding(
                f"run.json {name}", f"the run was trained on {name} {recorded[:12]}, but the record's paths and masks now give {value[:12]}"
            )


def _ledger_file(ledger: Ledger) -> Iterator[Finding]:
    for number in ledger.damaged:
        start = (number + 1) * RECORD.itemsize
        yield Finding(
            f"{LEDGER_NAME} record {number}",
            f"its checksum is wrong: bytes {start} to {start + RECORD.itemsize - 1} were changed after they were written",
        )
    if ledger.torn_bytes:
        yield Finding(
            LEDGER_NAME,
            f"{ledger.torn_bytes} bytes at the end are half a record: the process was killed while writing; resuming cuts them off",
            normal=True,
        )


def _sequence(run: RunRecord, entries: list[Entry]) -> Iterator[Finding]:
    """Steps 0, 1, 2, ... without a gap, each with its own slots, up to the last step that the metrics or a checkpoint know.

    The ledger is written every few steps and before each checkpoint. So a process that was killed, or is at work, has done steps after its last record and
    its last checkpoint; a resumed run does them again.
    """
    present = {entry.step for entry in entries}
    recorded = max(present, default=-1) + 1
    kept = max([recorded, *(step for step, _ in list_checkpoints(run.path))])
    done = run.history().last_step
    finished = is_finished(run)
    if kept < done and not finished:
        problem = f"steps {kept} to {done - 1} are not recorded yet: the process was killed, or is at work; resuming does them again"
        yield Finding(LEDGER_NAME, problem, normal=True)
    if began := run.first_state:
        problem = f"steps 0 to {began - 1} are in the directory of the checkpoint that this run began with, and not checked here"
        yield Finding(LEDGER_NAME, problem, normal=True)
    missing = [step for step in range(began, max(kept, done if finished else 0)) if step not in present]
    for step in missing[:5]:
        yield Finding(f"{LEDGER_NAME} step {step}", "the ledger has no record of this step, though later ones were done")
    if len(missing) > 5:
        yield Finding(LEDGER_NAME, f"{len(missing) - 5} more steps have no record")
    for entry in entries:
        planned = (entry.step * run.slots_per_step, run.slots_per_step)
        if entry.step >= run.num_steps or (entry.first_slot, entry.num_slots) != planned:
            yield Finding(
                f"{LEDGER_NAME} step {entry.step}",
                f"it consumed {entry.num_slots} slots from slot {entry.first_slot}, planned were {planned[1]} from slot {planned[0]}",
            )


def _chosen(entries: list[Entry], steps: tuple[int, int] | None, sample: int | None) -> list[Entry]:
    chosen = [entry for entry in entries if steps is None or steps[0] <= entry.step < steps[1]]
    if steps is not None and not chosen:
        raise UserError(
            f"--steps {steps[0]}:{steps[1]} holds none of the steps in the ledger, which has {len(entries)}. Give steps that were trained, or leave it out."
        )
    if sample is None or sample >= len(chosen):
        return chosen
    return [chosen[index] for index in sorted(Words.of(0, "verify", "sample").choice(len(chosen), sample))]


def _content(target: Target, entries: list[Entry]) -> Iterator[Finding]:
    """Hashes of all slots of `entries` made again from shards and manifest, in blocks, each read in order of shards."""
    batch = target.manifest.geometry.global_batch_size
    whole = [entry for entry in entries if entry.num_slots == batch and entry.first_slot == entry.step * batch < target.stream.num_slots]
    per_block = max(1, _SLOTS_PER_BLOCK // batch)
    for start in range(0, len(whole), per_block):
        block = whole[start : start + per_block]
        hashes = _slot_hashes(target, [slot for entry in block for slot in range(entry.first_slot, entry.first_slot + batch)])
        for index, entry in enumerate(block):
            if step_hash(hashes[index * batch : (index + 1) * batch]) != entry.hash:
                slots = f"slots {entry.first_slot} to {entry.first_slot + batch - 1}"
                yield Finding(
                    f"{LEDGER_NAME} step {entry.step}, first slot {entry.first_slot}",
                    f"attempt {entry.attempt} was fed other tokens in {slots} than manifest and shards give now",
                )


def _slot_hashes(target: Target, slots: list[int]) -> np.ndarray:
    """uint64 [len(slots)] in the order given; read in the order of shard and offset."""
    stream = target.stream
    places = [stream.instance(slot)[3:] for slot in slots]
    hashes = np.empty(len(slots), dtype=np.uint64)
    for index in sorted(range(len(slots)), key=places.__getitem__):
        tokens, loss_mask = stream.read(slots[index])
        hashes[index] = slot_hash(slots[index], tokens, loss_mask)
    return hashes
