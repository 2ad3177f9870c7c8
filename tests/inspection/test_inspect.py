"""Looking: what the model saw, in text, with every insertion marked, safely."""

import io
import json
import shutil
import subprocess
import sys

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from megatron_exp.errors import UserError
from megatron_exp.inspection import slots
from megatron_exp.inspection.document import as_json
from megatron_exp.inspection.items import view_experiment, view_item
from megatron_exp.inspection.query import query, table_files
from megatron_exp.inspection.render import show
from megatron_exp.inspection.slots import view_slot, view_step
from megatron_exp.inspection.status import status
from megatron_exp.inspection.summary import summarise
from megatron_exp.inspection.targets import open_target
from megatron_exp.stream.slot import POOL
from tests.report.fabricated import BATCH, HOSTILE, LENGTH, STEPS, make_run


def printed(answer):
    stream = io.StringIO()
    show(answer, Console(file=stream, width=200, force_terminal=True, color_system="truecolor"))
    return stream.getvalue()


def insertions(world, kind):
    return [row for row in world.manifest.insertions().to_pylist() if row["kind"] == kind]


def test_a_step_shows_every_slot_and_marks_every_insertion(world, run):
    row = insertions(world, "tokens")[0]
    view = view_step(run, row["step"])
    assert [slot.row for slot in view.slots] == list(range(BATCH))
    slot = view.slots[row["row"]]
    [(number, mark)] = [(n, m) for n, m in enumerate(slot.marks) if m.offset == row["offset"]]
    assert (mark.experiment, mark.condition, mark.item, mark.repetition) == ("memory", row["condition"], row["item"], row["repetition"])
    marked = "".join(piece.text for piece in slot.pieces if number in piece.marks)
    assert marked == world.corpus.tokenizer().decode(world.manifest.payload(row["payload"]))
    assert (slot.pieces[0].start, slot.pieces[-1].end) == (0, LENGTH)


def test_the_pieces_are_what_the_overlay_gives_to_training(world, run):
    for step in range(STEPS):
        for slot in view_step(run, step).slots:
            tokens = run.overlay.read(int(slot.slot)).tokens[:-1]
            assert "".join(piece.text for piece in slot.pieces) == world.corpus.tokenizer().decode(tokens)


def test_a_step_of_very_many_tokens_is_abridged_but_shows_every_insertion(world, run, monkeypatch):
    monkeypatch.setattr(slots, "MOST_TOKENS", 1)
    monkeypatch.setattr(slots, "_CONTEXT_TOKENS", 4)
    step = insertions(world, "tokens")[0]["step"]
    short = view_step(run, step)
    assert not any(piece.omitted for piece in view_slot(run, int(short.slots[0].slot)).slots[0].pieces)
    monkeypatch.undo()
    for abridged, whole in zip(short.slots, view_step(run, step).slots, strict=True):
        assert abridged.marks == whole.marks
        assert [piece.start for piece in abridged.pieces] == [0, *(piece.end for piece in abridged.pieces[:-1])]
        assert abridged.pieces[-1].end == LENGTH
        assert set(abridged.document) == {"document", "offset"} and abridged.document.items() <= whole.document.items()
        assert any(piece.omitted for piece in abridged.pieces)
        for mark in (mark for mark in whole.marks if mark.kind == "tokens"):
            starts = {piece.start for piece in abridged.pieces if not piece.omitted}
            assert mark.offset in starts and any(piece.end == mark.offset + mark.length and not piece.omitted for piece in abridged.pieces)
    assert f"--slot {short.slots[0].slot}" in printed(short)


def test_a_swapped_slot_says_where_its_content_comes_from(world, run):
    row = insertions(world, "swap")[0]
    [mark] = view_slot(run, row["slot"]).slots[0].marks
    assert mark.source == f"pool:{row['source_slot'] - POOL}"
    swapped = view_slot(run, row["slot"]).slots[0].pieces
    assert swapped == view_slot(run, row["source_slot"]).slots[0].pieces


def test_run_and_manifest_show_the_same_and_a_baseline_shows_the_base_stream(world, run, manifest):
    step = insertions(world, "tokens")[0]["step"]
    assert view_step(run, step).slots == view_step(manifest, step).slots
    twin = open_target(world.twin)
    assert not any(slot.marks for slot in view_step(twin, step).slots)
    assert "baseline run: no insertions" in printed(view_step(twin, step))


def test_a_masked_experiment_is_not_shown(world, tmp_path):
    path = make_run(tmp_path / "run", world.manifest, world.corpus)
    record = orjson.loads((path / "run.json").read_bytes()) | {"masked": ["memory"]}
    (path / "run.json").write_bytes(orjson.dumps(record))
    steps = {row["step"] for row in insertions(world, "tokens")}
    marks = {mark.experiment for step in steps for slot in view_step(open_target(path), step).slots for mark in slot.marks}
    assert "memory" not in marks


def test_nothing_from_the_data_acts_on_the_terminal(world, run):
    step = insertions(world, "tokens")[0]["step"]
    for answer in (
        view_step(run, step),
        view_item(run, 2, "memory"),
        view_experiment(run, "memory"),
        query(run, f"SELECT '{HOSTILE.replace(chr(39), '')}' AS text"),
    ):
        output = printed(answer)
        assert "<script>" in output and "\\x1b[31" in output
        assert "\u202e" not in output and "\u200b" not in output
        assert "\x1b[31mr" not in output  # Rich's own colours are escape sequences; the text's must not be among them


def test_square_brackets_are_no_markup(run):
    assert "[bold]x[/bold]" in printed(query(run, "SELECT '[bold]x[/bold]' AS text"))


def test_every_answer_is_versioned_ascii_json(world, run):
    step = insertions(world, "tokens")[0]["step"]
    for kind, answer in {
        "summary": summarise(run),
        "step": view_step(run, step),
        "item": view_item(run, 2, "memory"),
        "experiment": view_experiment(run, "noise"),
        "rows": query(run, "SELECT * FROM insertions LIMIT 3"),
        "status": status(world.run),
    }.items():
        text = as_json(kind, answer)
        assert text.isascii() and "\x1b" not in text
        document = json.loads(text)
        assert (document["schema_version"], document["kind"]) == (1, kind)
        assert printed(answer)


def test_summaries_tell_corpus_manifest_and_run_apart(world, run, manifest):
    corpus = summarise(open_target(world.corpus.path))
    assert {source.source: source.documents for source in corpus.sources} == {"web": 400, "wiki": 400}
    assert sum(row.tokens for row in summarise(manifest).conditions) == world.manifest.record["budget"]["modified_tokens"]
    assert summarise(run).status.finished


def test_an_item_number_that_several_experiments_have_needs_the_experiment(run):
    with pytest.raises(UserError, match="--experiment"):
        view_item(run, 1)
    assert view_item(run, 2).experiment == "memory"
    assert [row["repetition"] for row in sorted(view_item(run, 2).insertions, key=lambda row: row["repetition"])] == list(range(16))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda target: view_step(target, STEPS), "steps are 0 to 39"),
        (lambda target: view_step(target, -1), "steps are 0 to 39"),
        (lambda target: view_slot(target, STEPS * BATCH), "outside this run"),
        (lambda target: view_item(target, 999), "no item 999"),
        (lambda target: view_experiment(target, "nothing"), "memory, swaps, noise"),
        (lambda target: query(target, "SELECT nothing FROM insertions"), "refused"),
        (lambda target: query(target, "SELECT 1; SELECT 2"), "exactly one SELECT"),
        (lambda target: query(target, "DELETE FROM insertions"), "exactly one SELECT"),
    ],
)
def test_mistakes_are_explained(run, ask, message):
    with pytest.raises(UserError, match=message):
        ask(run)


def test_a_directory_that_is_nothing_of_ours_and_a_corpus_without_steps_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="no corpus, manifest or run"):
        open_target(tmp_path)
    with pytest.raises(UserError, match="is a corpus"):
        view_step(open_target(world.corpus.path), 0)


def test_sql_sees_all_tables(run):
    counts = query(run, "SELECT experiment, count(*) AS n FROM insertions GROUP BY experiment ORDER BY experiment").to_pydict()
    assert counts == {"experiment": ["memory", "noise", "swaps"], "n": [21, 6, 4]}
    for name in ("items", "probes", "responses", "results"):
        assert query(run, f"SELECT count(*) FROM {name}").num_rows == 1


def test_sql_reads_these_files_and_nothing_else_and_writes_nothing(run, tmp_path):
    files = table_files(run)
    before = {path: path.read_bytes() for paths in files.values() for path in paths}
    secret = tmp_path / "secret.parquet"
    pq.write_table(pa.table({"a": [1]}), secret)
    statements = [
        f"SELECT * FROM '{secret}'",
        "SELECT * FROM read_text('/etc/hostname')",
        f"COPY (SELECT 1) TO '{files['insertions'][0]}'",
        f"COPY (SELECT 1) TO '{tmp_path / 'new.csv'}'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        f"ATTACH '{tmp_path / 'new.db'}'",
    ]
    for statement in statements:
        with pytest.raises(UserError):
            query(run, statement)
    assert {path: path.read_bytes() for paths in files.values() for path in paths} == before
    assert sorted(tmp_path.iterdir()) == [secret]


def test_looking_at_a_step_loads_neither_torch_nor_other_slow_libraries(world):
    script = (
        "import sys\n"
        "from megatron_exp.inspection import render, slots, summary, targets\n"
        f"render.render(slots.view_step(targets.open_target({str(world.run)!r}), 3))\n"
        "print(sorted({'torch', 'duckdb', 'matplotlib', 'numba', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_status_counts_attempts_and_estimates_the_time_left(world, tmp_path):
    run = make_run(tmp_path / "run", world.manifest, world.corpus, steps_done=30)
    found = status(run)
    assert (found.step, found.num_steps, found.finished, found.num_attempts) == (30, STEPS, False, 2)
    assert found.seconds_left == pytest.approx(10 * 0.25)
    assert found.tokens == 30 * BATCH * LENGTH
    assert found.last_checkpoint is None
    shutil.rmtree(run / "metrics.jsonl", ignore_errors=True)
    (run / "metrics.jsonl").unlink()
    assert (status(run).step, status(run).loss, status(run).updated) == (0, None, None)
    assert printed(status(run))
