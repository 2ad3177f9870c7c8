"""Power and cost before the run."""

from dataclasses import asdict

from megatron_exp.cli.power import plan_of
from megatron_exp.dependence.power import power_of
from megatron_exp.manifest.reader import Manifest


def test_every_primary_has_its_spread_and_what_it_could_detect(start):
    found = {one.experiment: one for one in power_of(Manifest.open(start / "manifest"), num_draws=10)}
    assert set(found) == {"canaries", "swaps", "watermarks"}
    watermarks = found["watermarks"]
    assert watermarks.n > 0 and watermarks.spread is not None and watermarks.mde is not None
    assert watermarks.mde > 2 * watermarks.spread  # z of the corrected level and of the power
    assert "out of reach" in watermarks.warning  # a dozen slots cannot show a tenth of a standard deviation
    assert found["swaps"].paper == 0.038
    assert asdict(watermarks)["unit"] == "standard deviations"


def test_the_bill_counts_run_twin_scoring_checkpoints_and_test(start):
    manifest = Manifest.open(start / "manifest")
    record = plan_of(manifest, seeds=3, steps=10, tokens_per_second=1000.0)
    assert record["bill"]["tokens"] == manifest.geometry.num_tokens
    assert record["bill"]["run_gpu_hours"] == record["bill"]["twin_gpu_hours"] > 0
    assert record["bill"]["num_questions"] >= len(manifest.probes())
    assert record["cpdt"]["num_cells"] == 6 * 3
    assert record["cpdt"]["tokens"] == 6 * 3 * 10 * 4 * 32
    assert record["cpdt"]["hours_here"] > record["cpdt"]["tokens"] / 1000.0 / 3600.0
