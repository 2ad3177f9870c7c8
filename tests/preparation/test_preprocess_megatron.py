"""Stock megatron-core reads the shards and trains from them; on real data no document and no id is lost."""

import gzip

import numpy as np
import orjson
import pytest
import torch
import zstandard
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from megatron_exp.preparation.preprocess import preprocess
from tests.shards.making import REAL_DATA, decoded, make_corpus, texts

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data (olmo-mix-mini and the dolma2 tokenizer)")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("small"))


def test_megatron_reads_every_document(small):
    tokenizer = small.tokenizer()
    read = []
    for shard in small.shards:
        dataset = IndexedDataset(str(small.path / shard.name))
        read += [tokenizer.decode(dataset[index][:-1]) for index in range(len(dataset))]
        assert all(dataset[index][-1] == small.eos_id for index in range(len(dataset)))
    assert read == texts(50)


class StockTokenizer:
    """The part of a tokenizer that GPTDataset asks for."""

    def __init__(self, corpus):
        self.eod, self.pad, self.vocab_size = corpus.eos_id, corpus.eos_id, corpus.vocabulary_size
        self.unique_identifiers = {"class": "small"}


def gpt_dataset(corpus, num_samples, length):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(corpus.path / corpus.shards[0].name)], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=StockTokenizer(corpus),
        path_to_cache=str(corpus.path.parent / "cache"),
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]


def test_stock_gpt_dataset_trains_from_the_shards(small):
    """Two epochs through Megatron's own builder; a bigram model learns from its batches."""
    dataset = gpt_dataset(small, 60, 32)
    samples = [dataset[index] for index in range(60)]
    tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert set(tokens.unique().tolist()) <= set(np.unique(small.tokens(0)).tolist())
    model = torch.nn.Embedding(small.vocabulary_size, small.vocabulary_size)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(small.vocabulary_size))
    assert losses[-1] < losses[0] - 1


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return preprocess(
        [str(REAL_DATA / "olmo-mix-mini" / "data")],
        REAL_DATA / "tokenizers" / "dolma2.json",
        tmp_path_factory.mktemp("mini") / "corpus",
        workers=1,
    )


def read_plainly(path):
    """(id, text) of a compressed file, read with nothing of ours."""
    if path.suffix == ".gz":
        content = gzip.decompress(path.read_bytes())
    else:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
            content = stream.read()
    return [(line["id"], line["text"]) for line in map(orjson.loads, content.splitlines())]


@needs_real_data
def test_olmo_mix_mini_has_the_documents_its_authors_counted(mini):
    found = {shard.source: shard.num_documents for shard in mini.shards}
    assert found == {"wiki": 121, "books": 797, "math": 7473}
    assert list(mini.verify()) == []


@needs_real_data
def test_olmo_mix_mini_comes_back_text_for_text(mini):
    files = sorted((REAL_DATA / "olmo-mix-mini" / "data").glob("*/*"), key=str)
    expected = [document for path in files for document in read_plainly(path)]
    assert decoded(mini) == [text for _, text in expected]
    assert [row for shard in range(3) for row in mini.documents(shard)["id"].to_pylist()] == [identity for identity, _ in expected]


@needs_real_data
@pytest.mark.parametrize("source", ["wiki", "books", "math"])
def test_shards_equal_those_of_megatrons_own_tool(mini, tmp_path, source):
    """The steps of tools/preprocess_data.py --append-eod with the `tokenizers` library: one call, and one builder document per line."""
    (index,) = (index for index, shard in enumerate(mini.shards) if shard.source == source)
    library = Tokenizer.from_file(str(REAL_DATA / "tokenizers" / "dolma2.json"))
    library.encode_special_tokens = True  # strings of special tokens in a text stay text
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(mini.vocabulary_size))
    for path in sorted((REAL_DATA / "olmo-mix-mini" / "data" / source).iterdir(), key=str):
        for _, text in read_plainly(path):
            ids = [*library.encode(text, add_special_tokens=False).ids, library.token_to_id("<|endoftext|>")]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert mini.file(index, suffix).read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
