"""One SLURM for all tests that need one, and a tiny run for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import daemons


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Slurm]:
    """A real SLURM of two nodes on this host (`daemons` says how)."""
    reason = daemons.missing()
    if reason:
        pytest.skip(f"no SLURM can be started here: {reason}")
    with daemons.running(Path(tmp_path_factory.mktemp("slurm"))) as running:
        yield running
