"""One checkpoint and one finished test of it, which most tests only read."""

from pathlib import Path
from typing import Any

import pytest

from tests.dependence.toy import make_start, run_test


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `corpus`, `manifest` and `twin`."""
    return make_start(tmp_path_factory.mktemp("dependence"))


@pytest.fixture(scope="session")
def finished(start: Path) -> tuple[Path, dict[str, Any]]:
    """CPDT directory and matrix.json of a whole test."""
    record = run_test(start, start / "cpdt")
    assert record is not None
    return start / "cpdt", record
