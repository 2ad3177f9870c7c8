"""The inspector page: everything can be reached, slots are as trained on, and hostile texts stay text."""

import re

import pytest
from typer.testing import CliRunner

from megatron_exp.cli.main import app
from megatron_exp.errors import UserError
from megatron_exp.inspection.page import render_inspector, write_inspector
from megatron_exp.inspection.slots import view_slot
from megatron_exp.inspection.targets import open_target
from tests.report.chromium import EXECUTABLE, Chromium, serious_findings


@pytest.fixture(scope="module")
def page(world):
    return render_inspector(open_target(world.manifest.path), show_text=True)


def test_every_experiment_and_condition_is_on_the_page_and_every_link_leads_somewhere(world, page):
    for name in world.manifest.experiments:
        assert f"({name})" in page
        assert all(f": {cell['items'] + cell['controls']:,} items" in page for cell in world.manifest.counts[name].values())
    targets = set(re.findall(r'id="([^"]+)"', page))
    assert {link for link in re.findall(r'href="#([^"]+)"', page)} <= targets


def test_stretches_of_steps_count_every_insertion_once(world, page):
    table = page[page.index('<h2 id="steps"') : page.index('<h2 id="slots"')]
    rows = re.findall(r'<tr><th scope="row">.*?</tr>', table)
    counts = [[int(number) for number in re.findall(r'<td class="number">(\d+)</td>', row)] for row in rows]
    names = world.manifest.insertions()["experiment"].to_pylist()
    assert [sum(column) for column in zip(*counts, strict=True)] == [names.count(name) for name in world.manifest.experiments]
    assert len(rows) == world.manifest.geometry.steps


def test_a_slot_shows_what_the_model_sees_with_the_insertion_marked(world, manifest, page):
    row = next(row for row in world.manifest.insertions().to_pylist() if row["kind"] == "tokens")
    view = view_slot(manifest, row["slot"]).slots[0]
    start = page.index(f'id="slot-{row["slot"]}"')
    article = page[start : page.index("</article>", start)]
    assert article.count("<mark>") == sum(bool(piece.marks) for piece in view.pieces)
    assert f"item {row['item']}" in article and "&lt;script&gt;" in page and "<script" not in page


def test_texts_are_in_the_file_only_when_asked_for(world, page):
    hidden = render_inspector(open_target(world.manifest.path), show_text=False)
    assert " is more than " in page and " is more than " not in hidden and "tokens]" in hidden


def test_a_baseline_run_shows_no_insertion(world):
    page = render_inspector(open_target(world.twin), show_text=False)
    assert "a baseline: nothing was inserted" in page and "No slot is touched" in page


def test_the_command_writes_the_page_and_refuses_a_corpus(world, tmp_path):
    out = tmp_path / "deep" / "inspector.html"
    assert CliRunner().invoke(app, ["inspect", str(world.run), "--html", str(out)]).exit_code == 0
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="corpus"):
        write_inspector(open_target(world.corpus.path), tmp_path / "no.html")
    assert isinstance(CliRunner().invoke(app, ["inspect", str(world.run), "--html", str(out), "--step", "1"]).exception, UserError)


@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_it_opens_without_complaint_on_a_phone_and_a_screen(world, tmp_path):
    page = write_inspector(open_target(world.manifest.path), tmp_path / "inspector.html", show_text=True)
    with Chromium() as browser:
        for width in (390, 1400):
            browser.open(page, width)
            assert browser.complaints == [] and browser.evaluate("document.documentElement.scrollWidth") <= width
            assert serious_findings(browser) == []
