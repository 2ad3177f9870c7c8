"""What `doctor` says of this machine."""

from megatron_exp.cli import doctor


def test_every_capability_is_named_once_with_a_reason_where_it_is_missing(tmp_path):
    findings = doctor.examine(tmp_path)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) and {"torch", "C compiler", "megatron-core", "SLURM"} <= set(names)
    assert all(finding.detail for finding in findings)


def test_a_machine_without_a_compiler_says_what_needs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = next(finding for finding in doctor.examine(tmp_path) if finding.name == "C compiler")
    assert not finding.available and "GPUs" in finding.detail
