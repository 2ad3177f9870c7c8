"""The dependence test on the page: what is dependent stands out, what is missing is said, and another manifest's matrix is refused."""

import re

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.report import report
from megatron_exp.report.build import render
from megatron_exp.report.gather import gather
from tests.report.chromium import EXECUTABLE, Chromium
from tests.report.fabricated import HOSTILE, make_world

COLUMNS = ("memory", "swaps", "noise")


def comparison(row, column, reference, kind, verdict, **numbers):
    names = ("estimate", "standard_error", "low", "high", "p", "p_corrected", "df", "margin", "relative", "seeds_needed", "minus_sham")
    return dict.fromkeys(names) | {"row": row, "column": column, "reference": reference, "comparison": kind, "verdict": verdict} | numbers


def matrix(manifest, /, **changes):
    """matrix.json: memory is suppressed by the others, swaps undecided, noise independent."""
    rows = [*COLUMNS, "ALL", "none", "sham"]
    effects = [
        {"row": row, "column": column, "estimate": 1.0 if row == column else 0.02, "low": -0.1, "high": 1.2, "n": 3}
        for row in rows
        for column in COLUMNS
        if row != "none"
    ]
    cells = [
        comparison(
            "swaps", "memory", "none", "spill-over", "independent", estimate=0.01, low=-0.02, high=0.04, margin=0.05, p_corrected=1.0
        ),
        comparison(
            "ALL",
            "memory",
            "memory",
            "primary",
            "dependent",
            estimate=-0.6,
            low=-0.8,
            high=-0.4,
            margin=0.05,
            p_corrected=1e-4,
            relative=-0.6,
        ),
        comparison(
            "ALL",
            "swaps",
            "swaps",
            "primary",
            "undecided",
            estimate=-0.1,
            low=-0.3,
            high=0.1,
            margin=0.05,
            p_corrected=0.4,
            seeds_needed=11,
        ),
        comparison("ALL", "noise", "noise", "primary", "independent", estimate=0.0, low=-0.01, high=0.01, margin=0.05, p_corrected=1.0),
    ]
    record = {
        "schema_version": 1,
        "manifest": {"path": str(manifest.path), "fingerprint": manifest.fingerprint},
        "checkpoint": {"path": "RUN", "fingerprint": "0" * 32},
        "steps": 100,
        "fractions": {name: 0.01 for name in COLUMNS},
        "notes": [f"a note {HOSTILE}"],
        "not_inserted": {},
        "not_measured": {"verbatim": "an absence cannot be applied for 100 steps"},
        "complete": True,
        "missing": [],
        "seeds": [0, 1, 2],
        "alpha": 0.05,
        "family_size": 6,
        "rows": rows,
        "columns": {name: {"unit": "nats", "testable": True, "margin": 0.05} for name in COLUMNS},
        "cells": cells,
        "leave_one_out": [
            {"column": "memory", "left_out": "noise", "culprit": True},
            {"column": "memory", "left_out": "swaps", "culprit": False},
        ],
        "effects": effects,
        "verdict": "dependent",
        "cost": {"num_cells": 18, "overhead": 1.04, "score_seconds": 75.0},
    }
    return record | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("dependence"))


def written(path, record):
    path.mkdir(exist_ok=True)
    (path / "matrix.json").write_bytes(orjson.dumps(record))
    return path


def section(world, directory):
    page = render(gather(world.run, world.twin), show_text=False, cpdt=directory)
    return page[page.index('<h2 id="dependence"') : page.index('<h2 id="methods"')]


def test_verdicts_come_first_and_undecided_pairs_name_the_seeds_they_need(world, tmp_path):
    text = section(world, written(tmp_path / "cpdt", matrix(world.manifest)))
    assert text.index("dependent</span>") < text.index("Every comparison")
    assert "ALL on swaps: 11 seeds would decide" in text and "noise changes memory" in text and "swaps changes memory" not in text
    verdicts = re.findall(r'<th scope="row">(\w+)</th><td>(\w+)</td>.*?<span class="verdict \w+">([\w ]+)</span>', text, re.DOTALL)
    assert verdicts[0] == ("memory", "ALL", "dependent") and verdicts[-1] == ("memory", "swaps", "independent")
    assert "1.04 times their training steps" in text and "an absence cannot be applied" in text
    assert "&lt;script&gt;" in text and "<script>" not in text


def test_every_number_of_the_heat_map_is_in_its_description(world, tmp_path):
    text = section(world, written(tmp_path / "cpdt", matrix(world.manifest)))
    alt = re.search(r'<img [^>]*alt="(Heat map[^"]*)"', text)[1]
    assert alt.count(" on ") == 5 * 3 and "memory on memory: 1.00" in alt


def test_missing_cells_are_named_and_show_no_zero(world, tmp_path):
    record = matrix(world.manifest, complete=False, verdict="incomplete", missing=[{"row": "ALL", "seed": 2}])
    record["effects"] = [one | dict.fromkeys(("estimate", "low", "high")) if one["row"] == "ALL" else one for one in record["effects"]]
    record["cells"] = [comparison(one["row"], one["column"], one["reference"], one["comparison"], "incomplete") for one in record["cells"]]
    text = section(world, written(tmp_path / "cpdt", record))
    assert "This matrix is incomplete" in text and "ALL, seed 2" in text and "ALL on memory: –" in text
    assert "dependent</span>" not in text and not re.search(r'<td class="number">0(\.0+)?</td>', text)


def test_a_page_without_the_test_has_no_such_section(world):
    assert 'id="dependence"' not in render(gather(world.run, world.twin), show_text=False)


def test_the_matrix_of_another_manifest_is_refused(world, tmp_path):
    record = matrix(world.manifest, manifest={"path": "elsewhere", "fingerprint": "f" * 32})
    with pytest.raises(UserError, match="--cpdt"):
        section(world, written(tmp_path / "cpdt", record))
    with pytest.raises(UserError, match=r"matrix\.json"):
        section(world, tmp_path / "nothing")


@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_it_fits_a_phone_and_a_screen(world, tmp_path):
    page = report(world.run, world.twin, tmp_path / "report.html", cpdt=written(tmp_path / "cpdt", matrix(world.manifest)))
    with Chromium() as browser:
        for width in (390, 1400):
            browser.open(page, width)
            assert browser.complaints == [] and browser.evaluate("document.documentElement.scrollWidth") <= width
