"""What `doctor` says of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def broken_engine(tmp_path: Path) -> Path:
    """A directory with a Transformer Engine whose metadata is there and whose libraries are not the right ones."""
    for name, content in {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "raise RuntimeError('undefined symbol')",
        "transformer_engine-2.11.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.11.0\n",
    }.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "site"


COMMANDS = """
import contextlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from megatron_exp.cli import doctor, reference
from megatron_exp.cli.main import entry
from megatron_exp.errors import UserError
for line in ("train M --out R", "eval R", "eval --model H --manifest M --out R", "convert to-hf C H", "convert from-hf H C", "cpdt M --from C --out D"):
    with contextlib.suppress(SystemExit):
        entry(line.split())
with contextlib.suppress(UserError), reference.opened_reference(Path("R"), None, None):
    print("opened")
print(*[finding.detail for finding in doctor.examine() if finding.name == "Transformer Engine"])
assert not any(name.startswith("megatron.") for name in sys.modules)
"""


def test_an_engine_that_does_not_load_is_named_by_doctor_and_refused_by_every_command_that_needs_a_model(tmp_path, broken_engine):
    done = subprocess.run([sys.executable, "-c", COMMANDS, broken_engine], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = r"Transformer Engine 2.11.0 is installed but does not load (RuntimeError: undefined symbol)"
    assert done.stderr.count(told) == 6, done.stderr
    assert done.stdout.startswith(told)
