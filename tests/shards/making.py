"""Small real things for tests of data: a tokenizer, input files, a corpus."""

import functools
import tempfile
from pathlib import Path

import orjson

from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.shards.corpus import Corpus

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"

_VOCABULARY_TEXT = (ROOT / "megatron_exp" / "seeding.py").read_text(encoding="utf-8")


@functools.cache
def tokenizer_bytes(vocabulary_size: int = 300) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return train_bpe([_VOCABULARY_TEXT], vocabulary_size, Path(directory) / "tokenizer.json").read_bytes()


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of 300 ids."""
    path = directory / "small-tokenizer.json"
    path.write_bytes(tokenizer_bytes())
    return path


def json_lines(*records: object) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def texts(num: int, first: int = 0) -> list[str]:
    """Different texts of different lengths."""
    return [f"document {index}: " + "words and more words " * (1 + index % 5) for index in range(first, first + num)]


def text_lines(num: int, first: int = 0) -> bytes:
    return json_lines(*({"id": f"id-{first + index}", "text": text} for index, text in enumerate(texts(num, first))))


def write_inputs(directory: Path, sources: dict[str, list[bytes]]) -> Path:
    """SOURCE/part-N.jsonl below the directory."""
    for source, parts in sources.items():
        (directory / source).mkdir(parents=True, exist_ok=True)
        for index, part in enumerate(parts):
            (directory / source / f"part-{index}.jsonl").write_bytes(part)
    return directory


def make_corpus(directory: Path, **options: object) -> Corpus:
    """Two sources, three files, 50 documents."""
    directory.mkdir(parents=True, exist_ok=True)
    inputs = write_inputs(directory / "input", {"books": [text_lines(20), text_lines(20, 20)], "web": [text_lines(10, 40)]})
    return preprocess([str(inputs)], make_tokenizer(directory), directory / "corpus", workers=1, **options)  # type: ignore[arg-type]


def decoded(corpus: Corpus) -> list[str]:
    """The text of every document, in corpus order, checked to end with EOS."""
    tokenizer = corpus.tokenizer()
    found = []
    for shard in range(len(corpus.shards)):
        tokens, starts = corpus.tokens(shard), corpus.document_starts(shard)
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            assert tokens[stop - 1] == corpus.eos_id
            found.append(tokenizer.decode(tokens[start : stop - 1]))
    return found


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory and its content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
