"""The report in a real browser: nothing complains, nothing runs, nothing overflows."""

import pytest

from megatron_exp.report import report
from tests.report.chromium import EXECUTABLE, Chromium, serious_findings
from tests.report.fabricated import make_world

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    world = make_world(root, steps_done=30)
    return report(world.run, world.twin, root / "report.html", show_text=True)


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@pytest.mark.parametrize("width", [390, 1400])
def test_it_opens_without_complaint_and_fits_the_width(browser, page, width):
    browser.open(page, width)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_hostile_texts_show_as_text_and_make_no_element(browser, page):
    browser.open(page, 1400)
    text = browser.evaluate("document.body.innerText")
    assert "<script>alert(1)</script>" in text and "<img src=x onerror=alert(2)>" in text and "{{ 7*7 }}" in text
    assert "\\x1b[31m" in text and "\\u202e" in text
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("[...document.querySelectorAll('b, i, img:not([alt])')].length") == 0
    assert browser.evaluate("[...document.querySelectorAll('pre')].some(one => one.textContent.includes('1 <script>alert(1)</script>'))")


def test_a_script_put_into_the_page_by_hand_would_not_run(browser, page, tmp_path):
    tampered = tmp_path / "tampered.html"
    tampered.write_text(
        page.read_text().replace("</main>", "<script>document.title = 'ran'</script><img src='https://example.invalid/x.png'></main>")
    )
    browser.open(tampered, 1400)
    assert browser.evaluate("document.title") != "ran"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@pytest.mark.parametrize("width", [390, 1400])
def test_axe_finds_nothing_serious(browser, page, width):
    browser.open(page, width)
    assert serious_findings(browser) == []


def test_headings_go_down_one_level_at_a_time(browser, page):
    browser.open(page, 1400)
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
