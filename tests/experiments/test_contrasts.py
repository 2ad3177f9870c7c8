from dataclasses import replace

import numpy as np
import pytest

from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.frames import Frame
from megatron_exp.seeding import Words

WORDS = Words.of(0, "tests", "contrasts")


def frame_of(run, treated, *, twin=None, cluster=None, stratum=None):
    """One state of an experiment, one row per item."""
    num = len(run)
    names = np.array(["x"] * num, dtype=object)
    return Frame(
        experiment="toy",
        has_twin=twin is not None,
        item=np.arange(num),
        arm=names,
        condition=names,
        role=np.where(treated, "treated", "control").astype(object),
        stratum=names if stratum is None else stratum,
        cluster=np.arange(num) if cluster is None else cluster,
        probe=names,
        step=np.ones(num, np.int64),
        num_tokens=np.ones(num),
        run=np.asarray(run, np.float64),
        twin=np.full(num, np.nan) if twin is None else np.asarray(twin, np.float64),
        metadata_json=names,
    )


def score(frame, **options):
    return contrast_score(frame, "outcome", "x", 1, "greater", **options)


def test_a_cluster_counts_once_whatever_its_size():
    cluster = np.repeat([0, 1, 2, 3], [10, 1, 1, 4])
    run = np.array([5.0, 3.0, 1.0, 2.0])[cluster]
    found = score(frame_of(run, cluster < 2, cluster=cluster))
    assert (found.estimate, found.control, found.n, found.num_clusters) == (2.5, 1.5, 16, 4)


def test_clusters_make_p_larger_than_their_rows_would():
    cluster, treated = np.repeat(np.arange(24), 5), np.repeat(np.arange(24) < 12, 5)
    run = WORDS.normals(24)[cluster] + 0.8 * treated
    assert score(frame_of(run, treated, cluster=cluster)).p > 20 * score(frame_of(run, treated)).p


def test_the_twin_is_taken_out_and_shown():
    twin, treated = 10.0 * WORDS.normals(40), np.arange(40) < 20
    found = score(frame_of(twin + 1.0 * treated + 0.1 * WORDS.child("run").normals(40), treated, twin=twin))
    assert found.estimate == pytest.approx(1.0, abs=0.1) and found.p < 1e-6
    assert found.twin == pytest.approx(twin[:20].mean() - twin[20:].mean())


def test_nothing_that_varies_claims_no_certainty():
    found = score(frame_of(np.zeros(40), np.arange(40) < 20))
    assert found.estimate == 0.0 and found.p == 0.5
    assert np.isnan([found.low, found.high, found.mde]).all()


def test_the_interval_of_a_small_group_covers_as_often_as_it_says():
    treated = np.arange(26) < 2
    found = [score(frame_of(WORDS.normals(26, stream=i), treated)) for i in range(400)]
    assert np.mean([one.low < 0 < one.high for one in found]) > 0.92


def test_rows_without_an_answer_are_counted_and_strata_of_one_kind_give_a_reason():
    frame = frame_of([1.0, np.nan, 2.0, 3.0], np.array([True, True, False, False]), stratum=np.array(["a", "a", "b", "b"], dtype=object))
    found = score(frame)
    assert found.num_unscored == 1 and np.isnan(found.estimate) and found.reason
    assert not score(replace(frame, stratum=np.array(["a"] * 4, dtype=object))).reason
