"""The first thing a new user runs."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_exp.cli.quickstart import standard_library
from megatron_exp.run_record import RunRecord


def test_a_module_with_two_names_is_in_the_corpus_once(tmp_path, monkeypatch):
    """As Debian installs Python: a link beside the file it leads to."""
    (tmp_path / "json" / "test").mkdir(parents=True)
    for name in ("_sysconfigdata_a.py", "json/decoder.py", "json/test/test_decoder.py"):
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "_sysconfigdata_b.py").symlink_to("_sysconfigdata_a.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert standard_library() == [tmp_path / "_sysconfigdata_a.py", tmp_path / "json/decoder.py"]


@pytest.mark.slow
def test_one_command_goes_from_text_to_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_exp", "quickstart", "--out", str(out), "--minutes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {RunRecord.open(out / name).record["state"] for name in ("run", "twin")} == {"finished"}
    assert (out / "report.html").stat().st_size > 100_000
    assert len(list(out.glob("run/evals/*/results.json"))) == 1
