"""The report: self-contained, safe with hostile texts, honest about what is missing."""

import base64
import re
import shutil
import unicodedata
from dataclasses import replace

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.report import report
from megatron_exp.report.build import render
from megatron_exp.report.gather import gather
from tests.report.fabricated import STEPS, make_run, make_world, result_row, write_results


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    return report(world.run, world.twin, tmp_path_factory.mktemp("out") / "deep" / "report.html").read_text()


def pictures(page):
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def test_the_page_refers_to_nothing_outside_itself(page):
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", page)
    assert not re.findall(r'(?:src|href|action|data)="(?!data:|#)[^"]*"', page)
    assert "@import" not in page and "url(" not in page and "<script" not in page
    for svg in pictures(page):
        references = re.findall(r'href="([^"]*)"', svg)
        assert all(reference.startswith("#") for reference in references)
        assert "<!DOCTYPE" not in svg and "<script" not in svg and "<metadata" not in svg


def test_hostile_names_and_commands_appear_as_text(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\\x1b[31mred" in page and "\\u202eright to left" in page and "{{ 7*7 }}" in page
    assert not {unicodedata.category(character) for character in page} & {"Cf", "Cs", "Co"}
    assert "\x1b" not in page


def test_payload_texts_are_in_the_file_only_when_asked_for(world, page):
    text = "2 &lt;script&gt;alert(1)"  # the beginning of item 2, and of no name
    item = "1 &lt;script&gt;alert(1)"
    assert item not in page and text not in page
    assert item in render(gather(world.run, world.twin), show_text=True)


def test_what_models_wrote_is_in_the_file_only_when_asked_for(world, page):
    assert "plain answer" not in page and "12 characters, hidden" in page
    shown = render(gather(world.run, world.twin), show_text=True)
    assert (
        "plain answer" in shown and "first &lt;script&gt;" in shown and "second" not in shown[shown.index("plain answer") - 2000 :][:1900]
    )


def test_the_methods_paragraph_has_the_numbers_of_plan_and_run(world, page):
    paragraphs = page[page.index('<h2 id="methods"') : page.index('id="provenance"')]
    budget = world.manifest.record["budget"]
    assert f"{STEPS} steps of 4 samples of 64 tokens, 10,240 tokens" in paragraphs and "4 layers, hidden size 128, 4 heads" in paragraphs
    assert f"{100 * budget['modified_fraction']:.2f}% of the tokens" in paragraphs and world.manifest.fingerprint[:12] in paragraphs
    assert "A twin with the same initial weights" in paragraphs
    assert "A twin" not in render(gather(world.run, None), show_text=False).partition('<h2 id="methods"')[2].partition('id="provenance"')[0]


def test_every_plot_is_written_as_svg_and_pdf(world, tmp_path):
    page = report(world.run, world.twin, tmp_path / "report.html", figures=tmp_path / "figures").read_text()
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert len(drawn) == 2 * len(pictures(page)) and {path.rpartition(".")[2] for path in drawn} == {"svg", "pdf"}
    assert {(tmp_path / "figures" / name).read_text() for name in drawn if name.endswith("svg")} == set(pictures(page))
    assert all((tmp_path / "figures" / name).read_bytes().startswith(b"%PDF-") for name in drawn if name.endswith("pdf"))


def test_the_same_inputs_give_the_same_bytes(world, page):
    assert render(gather(world.run, world.twin), show_text=False) == page


def test_the_first_screen_has_the_numbers_of_the_run(world, page):
    first = page[: page.index('id="inserted"')]
    budget = world.manifest.record["budget"]
    assert f"{budget['modified_tokens']:,} of 10,240 tokens" in first
    assert f"{budget['touched_slots']} of 160 training samples" in first
    assert "+0.0200" in first  # the validation loss of the run minus that of the twin, as fabricated
    assert ">not scorable<" in first and "no gradients were kept" in first and "12 unscored" in first
    assert "machinery and dense effects" in first


def test_every_plot_says_what_it_shows_and_every_table_has_a_caption(page):
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 8
    assert all(len(re.search(r'alt="([^"]*)"', image)[1]) > 30 for image in images)
    assert page.count("<table") == page.count("<caption>")


def test_provenance_names_results_file_manifest_and_command(world, page):
    provenance = page[page.index('id="provenance"') :]
    assert str(world.run / "evals" / f"step-{STEPS:08d}" / "results.parquet") in provenance
    assert world.manifest.fingerprint in provenance
    assert "megatron-exp train" in provenance


def test_an_unfinished_unevaluated_run_without_a_twin_is_shown_as_such(world, tmp_path):
    run = make_run(tmp_path / "run", world.manifest, world.corpus, steps_done=17)
    page = render(gather(run, None), show_text=False)
    assert page.count(f"step 17 of {STEPS}") >= 2
    assert "has not been evaluated" in page and "no twin was given" in page and "No results yet" in page


def test_a_baseline_run_claims_no_insertions(world):
    page = render(gather(world.twin, None), show_text=False)
    first = page[: page.index('id="inserted"')]
    assert "Baseline run" in first
    assert "0 of 10,240 tokens" in first


def test_results_of_several_states_are_joined_and_the_newest_evaluation_wins(world, tmp_path):
    run = shutil.copytree(world.run, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    row = {"experiment": "memory", "outcome": "auc", "condition": "x16", "primary": True}
    write_results(run, world.manifest, 20, [result_row(**row, step=10, estimate=0.1), result_row(**row, step=20, estimate=0.2)])
    write_results(run, world.manifest, 40, [result_row(**row, step=20, estimate=0.3), result_row(**row, step=40, estimate=0.4)])
    rows = gather(run, None).results.of("memory")
    assert {row["step"]: row["estimate"] for row in rows} == {10: 0.1, 20: 0.3, 40: 0.4}


def change_record(path, name, /, **changes):
    record = orjson.loads((path / name).read_bytes())
    (path / name).write_bytes(orjson.dumps(record | changes))


def test_a_run_that_is_no_twin_is_refused_with_what_differs(world, tmp_path):
    other = shutil.copytree(world.twin, tmp_path / "other")
    change_record(other, "run.json", identity={"model": "n" * 32, "training": "t" * 32})
    with pytest.raises(UserError, match="differ in model or initialisation"):
        gather(world.run, other)
    with pytest.raises(UserError, match="baseline"):
        gather(world.run, world.run)


def test_results_of_another_manifest_are_refused(world, tmp_path):
    run = shutil.copytree(world.run, tmp_path / "run")
    change_record(run / "evals" / f"step-{STEPS:08d}", "results.json", manifest={"fingerprint": "f" * 32})
    with pytest.raises(UserError, match="Evaluate this run again"):
        gather(run, None)


def test_a_manifest_that_was_replaced_is_refused(world, tmp_path):
    run = shutil.copytree(world.run, tmp_path / "run")
    change_record(run, "run.json", manifest={"path": str(world.manifest.path), "fingerprint": "f" * 32})
    with pytest.raises(UserError, match="Put the manifest"):
        gather(run, None)


def test_a_masked_experiment_is_marked_and_not_counted(world):
    inputs = gather(world.run, world.twin)
    record = inputs.run.record | {"masked": ["memory"]}
    masked = replace(inputs, run=replace(inputs.run, record=record))
    assert set(masked.insertions["experiment"].to_pylist()) == {"swaps", "noise"}
    assert "This experiment was off in this run" in render(masked, show_text=False)
