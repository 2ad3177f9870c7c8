"""A plan that cannot be written: nothing under its name, and the next attempt makes the whole."""

import errno

import pytest

from megatron_exp import files
from megatron_exp.manifest.reader import Manifest
from megatron_exp.preparation.plan import plan
from megatron_exp.shards.corpus import Corpus
from tests.training import toy

STEPS = ("_write", "_fsync", "_rename", "_fsync_directory")


class Crash(BaseException):
    """Stands for a process that is killed: nothing catches it."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"), Crash()])
def test_a_manifest_is_whole_or_not_there_at_every_durable_step_that_fails(tmp_path, monkeypatch, error):
    config = toy.make_config(Corpus.open(toy.make_corpus(tmp_path)).path)
    out, count, at = tmp_path / "plan" / "manifest", 0, 0

    def counted(step):
        def run(*arguments):
            nonlocal count
            count += 1
            if count == at:
                raise error
            return step(*arguments)

        return run

    for name in STEPS:
        monkeypatch.setattr(files, name, counted(getattr(files, name)))
    whole = plan(config, tmp_path / "whole").fingerprint
    num_steps = count
    assert num_steps > 10
    for step in range(1, num_steps + 1, 1 if isinstance(error, Crash) else 3):
        count, at = 0, step
        with pytest.raises(type(error)):
            plan(config, out)
        if out.exists():  # the last step alone comes after the name is there
            assert step == num_steps and Manifest.open(out).fingerprint == whole
        else:
            assert list(out.parent.iterdir()) == [], "no half-written manifest stays"
    at = 0
    if not out.exists():
        assert plan(config, out).fingerprint == whole
