"""One manifest and one uninterrupted run of it, which most tests compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_exp.training.train import train
from tests.training.toy import make_manifest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `corpus` and `manifest`."""
    directory = tmp_path_factory.mktemp("toy")
    make_manifest(directory)
    return directory


@pytest.fixture(scope="session")
def manifest(data: Path) -> Path:
    return data / "manifest"


@pytest.fixture(scope="session")
def whole_run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `manifest`, never interrupted; tests only read it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(manifest, run) == 0
    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """An empty place for a run."""
    yield tmp_path / "run"
