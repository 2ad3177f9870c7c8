import pytest

from megatron_exp.inspection.targets import open_target
from tests.report.fabricated import make_world


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world):
    return open_target(world.run)


@pytest.fixture
def manifest(world):
    return open_target(world.manifest.path)
