"""A small real world on disk: corpus, planned manifest, run and twin directories. Only the model's numbers are made up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_exp.config.schema import Config
from megatron_exp.ledger import Entry, LedgerWriter, slot_hash, step_hash
from megatron_exp.manifest import schema
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.plan import plan
from megatron_exp.seeding import Words
from megatron_exp.shards.corpus import INPUTS_NAME, TOKENIZER_FOLDER, Corpus, logical_fingerprint, write_record
from megatron_exp.shards.documents import DocumentMapWriter
from megatron_exp.shards.indexed import IndexedWriter
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.stream.keyed import KeyedStream

HOSTILE = "<script>alert(1)</script> \"quote' \x1b[31mred\x1b[0m \u202eright to left\u202c \u200bzero {{ 7*7 }} $\\frac$ <img src=x onerror=alert(2)>"
STEPS, BATCH, LENGTH = 40, 4, 64


def make_corpus(path: Path, num_documents: int = 400) -> Corpus:
    """Two sources of numbered sentences, tokenised with a byte-level BPE made for them."""
    path.mkdir()
    texts = {
        name: [f"Document {i} of {name} says that {i * 7} is more than {i}.\n" * 3 for i in range(num_documents)]
        for name in ("wiki", "web")
    }
    tokenizer = make_tokenizer(path / TOKENIZER_FOLDER, texts["wiki"])
    shards = [_shard(path, number, name, texts[name], tokenizer) for number, name in enumerate(sorted(texts))]
    total = sum(shard["num_documents"] for shard in shards)
    inputs = DocumentMapWriter(path / INPUTS_NAME)
    inputs.add(pa.table({"file": ["a.txt"], "line": [1], "id": ["0"]}))
    record: dict[str, Any] = {
        "schema_version": 1,
        "dtype": "uint16",
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "eos_id": tokenizer.eos_id, "vocabulary_size": tokenizer.vocabulary_size},
        "shards": shards,
        "ledger": {"file": inputs.close().as_record(), "lines_in": total, "docs_out": total, "rejected": {}},
    }
    record["fingerprint"] = logical_fingerprint(record["tokenizer"], shards)
    write_record(path, record)
    return Corpus.open(path)


def make_tokenizer(directory: Path, texts: list[str]) -> Tokenizer:
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    )
    directory.mkdir()
    bpe.save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


def _shard(path: Path, number: int, source: str, texts: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    name = f"shard-{number:05d}"
    writer = IndexedWriter(path / f"{name}.bin", path / f"{name}.idx", np.dtype(np.uint16))
    documents = [np.append(tokens, tokenizer.eos_id) for tokens in tokenizer.encode_batch(texts)]
    for document in documents:
        writer.add(document)
    writer.close()
    numbers = range(len(texts))
    maps = DocumentMapWriter(path / f"{name}.docs.parquet")
    maps.add(
        pa.table({"file": [f"{source}.jsonl"] * len(texts), "line": [i + 1 for i in numbers], "id": [f"{source}-{i}" for i in numbers]})
    )
    sums = {"bin": writer.bin_sum, "idx": writer.idx_sum, "docs.parquet": maps.close()}
    np.save(path / f"{name}.sums.npy", np.concatenate([one.sums for one in sums.values()]))
    return {
        "name": name,
        "source": source,
        "num_tokens": sum(map(len, documents)),
        "num_documents": len(texts),
        "files": {suffix: one.as_record() for suffix, one in sums.items()},
    }


def make_config(corpus: Path, **changes: Any) -> Config:
    experiments = [
        {"name": "memory", "type": "tests.report.fabricated_experiments.memory"},
        {"name": "swaps", "type": "tests.report.fabricated_experiments.swaps"},
        {"name": "noise", "type": "tests.report.fabricated_experiments.noise"},
    ]
    return Config.model_validate(
        {
            "name": "small-run",
            "corpus": {"path": str(corpus)},
            "geometry": {"sequence_length": LENGTH, "global_batch_size": BATCH, "steps": STEPS},
            "pool": {"slots": 24},
            "budget": {"unit": "tokens", "fraction": 0.3},
            "training": {"validation": {"slots": 4}},
            "experiments": experiments,
            **changes,
        }
    )


@dataclass(frozen=True)
class World:
    corpus: Corpus
    manifest: Manifest
    run: Path
    twin: Path


def make_world(root: Path, steps_done: int = STEPS, **changes: Any) -> World:
    corpus = make_corpus(root / "corpus")
    manifest = plan(make_config(corpus.path, **changes), root / "manifest")
    run = make_run(root / "run", manifest, corpus, steps_done=steps_done)
    twin = make_run(root / "twin", manifest, corpus, baseline=True, shift=0.02)
    write_results(run, manifest, STEPS)
    return World(corpus, manifest, run, twin)


def make_run(
    path: Path, manifest: Manifest, corpus: Corpus, *, baseline: bool = False, steps_done: int = STEPS, shift: float = 0.0
) -> Path:
    """A run directory with a true ledger and made-up metrics of two attempts: the first was killed at half time and lost three steps."""
    path.mkdir()
    base = KeyedStream.open(manifest.config, corpus)
    stream = base if baseline else Overlay.open(base, manifest)
    record = {
        "schema_version": 1,
        "name": manifest.config.name,
        "config": manifest.config.model_dump(mode="json"),
        "manifest": {"path": str(manifest.path), "fingerprint": manifest.fingerprint},
        "corpus": {"path": str(corpus.path), "fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer_fingerprint},
        "stream": {"fingerprint": stream.fingerprint},
        "identity": {"model": "m" * 32, "training": "t" * 32},
        "baseline": baseline,
        "masked": [],
        "state": "finished" if steps_done == manifest.geometry.steps else "running",
        "attempts": [make_attempt(1, 0), make_attempt(2, max(0, steps_done // 2 - 3))],
        "model": {"layers": 4, "hidden": 128, "heads": 4},
        "precision": "fp32",
        "layout": {"tp": 1, "dp": 1},
        "versions": {"megatron-core": "0.16.1", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "cores": 2},
        "command": ["megatron-exp", "train", HOSTILE],
        "created": "2026-01-01T00:00:00+00:00",
    }
    (path / "run.json").write_bytes(orjson.dumps(record))
    write_metrics(path / "metrics.jsonl", steps_done, manifest.geometry.global_batch_size * manifest.geometry.sequence_length, shift)
    write_ledger(path / "ledger.bin", stream, steps_done)
    return path


def make_attempt(number: int, from_step: int) -> dict[str, Any]:
    return {
        "attempt": number,
        "from_step": from_step,
        "begun": "2026-01-01T00:00:00+00:00",
        "state": "killed",
        "command": ["megatron-exp", "train"],
    }


def write_metrics(path: Path, steps_done: int, tokens_per_step: int, shift: float) -> None:
    half = max(1, steps_done // 2)
    noise = Words.of(1, "metrics", str(shift)).normals(steps_done + 1)
    order = [(1, step) for step in range(1, half + 1)] + [(2, step) for step in range(max(1, half - 2), steps_done + 1)]
    lines: list[dict[str, Any]] = []
    for attempt, step in order:
        loss = 2.0 + 6.0 * np.exp(-step / 12) - shift + 0.05 * noise[step] + (5.0 if attempt == 1 and step > half - 3 else 0.0)
        line: dict[str, Any] = {"step": step, "attempt": attempt, "loss": loss, "grad_norm": 1.0 + abs(noise[step]), "learning_rate": 3e-3}
        lines.append(
            {**line, "tokens": step * tokens_per_step, "tokens_per_second": 9000.0, "seconds": 0.25, "modified_tokens": {"memory": step}}
        )
        if step % 10 == 0:
            lines[-1]["norms"] = {"input": 3.0 + 0.01 * step, "hidden": 20.0 + 0.1 * step, "output": 3.0}
            lines.append({"step": step, "attempt": attempt, "validation_loss": 2.1 + 6.0 * np.exp(-step / 12) - shift})
    path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n" for line in lines))


def write_ledger(path: Path, stream: KeyedStream | Overlay, steps_done: int) -> None:
    writer = LedgerWriter(path)
    batch = stream.geometry.global_batch_size
    for step in range(steps_done):
        hashes = [slot_hash(slot, *stream.read(slot)) for slot in stream.geometry.slots_of_step(step)]
        writer.append(Entry(1, step, step * batch, batch, step_hash(hashes)))
    writer.close()


def result_row(**values: Any) -> dict[str, Any]:
    row = dict.fromkeys(schema.RESULTS.names) | {
        "primary": False,
        "step": STEPS,
        "n": 48,
        "num_clusters": 48,
        "num_unscored": 0,
        "level": 0.95,
    }
    return row | {"side": "greater", "test": "rank sum", "scope": "this run", "exploratory": False} | values


def result_rows() -> list[dict[str, Any]]:
    """Doses, a curve over states with decay, one condition with a hostile name, an unscorable row."""
    rows = [
        result_row(
            experiment="memory",
            outcome="auc-by-condition",
            condition=f"plain/x{copies}",
            estimate=0.5 + auc,
            low=0.42 + auc,
            high=0.58 + auc,
            twin=0.49,
            p=p,
        )
        for copies, auc, p in ((1, 0.04, 0.31), (4, 0.2, 0.002), (16, 0.41, 3e-9))
    ]
    rows[-1] |= {"verdict": "detected", "p_corrected": 9e-9, "difference": 0.41, "mde": 0.1}
    rows.append(rows[-1] | {"outcome": "auc", "condition": "x16", "primary": True})
    for state in (10, 11, 12, 14, 20, 30, 40):
        gain = 0.3 * np.exp(-(state - 11) / 4) if state > 10 else 0.0
        rows.append(
            result_row(
                experiment="swaps",
                outcome="gain",
                condition="lag curve",
                step=state,
                estimate=gain,
                low=gain - 0.05,
                high=gain + 0.05,
                control=0.0,
            )
        )
    late = {"verdict": "not detected", "p": 0.4, "p_corrected": 0.8, "mde": 0.12, "twin": 0.01}
    rows.append(
        result_row(
            experiment="swaps",
            outcome="late gain",
            condition=HOSTILE,
            primary=True,
            estimate=0.02,
            low=-0.05,
            high=0.09,
            control=0.0,
            **late,
        )
    )
    unscored = {"num_unscored": 12, "n": 0, "estimate": float("nan"), "verdict": "not scorable: no gradients were kept"}
    rows.append(result_row(experiment="noise", outcome="statistic", condition="all", primary=True, **unscored))
    return rows


def write_results(run: Path, manifest: Manifest, state: int, rows: list[dict[str, Any]] | None = None) -> Path:
    directory = run / "evals" / f"step-{state:08d}"
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows or result_rows(), schema=schema.RESULTS), directory / "results.parquet")
    responses = [
        {
            "experiment": "memory",
            "condition": "plain/x16",
            "item": 2,
            "arm": "main",
            "probe": "target",
            "model": "run",
            "step": state,
            "value": -3.5,
        }
    ]
    texts = {"run": orjson.dumps([f"first {HOSTILE}", "second"]).decode(), "twin": "plain answer"}
    responses += [responses[0] | {"probe": "written", "model": model, "value": None, "text": text} for model, text in texts.items()]
    pq.write_table(pa.Table.from_pylist(responses, schema=schema.RESPONSES), directory / "responses.parquet")
    record = {"schema_version": 1, "manifest": {"fingerprint": manifest.fingerprint}}
    (directory / "results.json").write_bytes(orjson.dumps(record))
    return directory
