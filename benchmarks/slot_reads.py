"""Reading samples of 4096 tokens in training order: overlay, base stream, and stock GPTDataset, on the same shards in one run.

Usage: python benchmarks/slot_reads.py [--slots N] [--pairs P]

Goals: with the overlay on at least twice stock GPTDataset's rate; the overlay costs at most 5% over the base stream. All read N slots in
their own shuffled order from one shard of 64M tokens, cached by the operating system.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import orjson
from measuring import interleaved, ratios, show, spread

from megatron_exp.config.load import validate
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.seeding import Words
from megatron_exp.shards.corpus import Corpus

_LENGTH, _BATCH, _DOCUMENTS, _DOCUMENT_WORDS = 4096, 8, 16_000, 2_000


def make_run(directory: Path, num_slots: int) -> Overlay:
    """A corpus of some 64M tokens and a manifest that touches about 9% of the slots, as 1.8% of the tokens spread one by one do."""
    words = [f"{a}{b}" for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ai", "on", "er")]
    with open(directory / "texts.jsonl", "wb") as file:
        for number in range(_DOCUMENTS):
            drawn = Words.of(0, "benchmark", number).integers(_DOCUMENT_WORDS, len(words))
            file.write(orjson.dumps({"text": " ".join(words[index] for index in drawn)}) + b"\n")
    tokenizer = train_bpe([" ".join(words) + " the old lamp"], 320, directory / "tokenizer.json")
    preprocess([str(directory / "texts.jsonl")], tokenizer, directory / "corpus")
    canaries = {
        "name": "canaries", "type": "memorization_patterns", "suffix_types": ["random"], "suffix_lengths": [8], "repetitions": [1], "max_tokens": 500,
        "min_tokens": 300, "num_per_condition": round(0.09 * num_slots), "num_held_out": 10,
    }  # fmt: skip
    geometry = {"sequence_length": _LENGTH, "global_batch_size": _BATCH, "steps": num_slots // _BATCH}
    config = {"name": "reads", "corpus": {"path": str(directory / "corpus")}, "geometry": geometry, "experiments": [canaries]}
    manifest = plan(validate(config, "benchmark"), directory / "manifest")
    return Overlay.open(manifest.open_stream(Corpus.open(directory / "corpus")), manifest)


def stock_dataset(prefix: Path, num_slots: int):  # noqa: ANN201 - a library's type
    """megatron-core's own GPTDataset over the shard."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, unique_identifiers, vocab_size = 0, {"name": "benchmark"}, 320

    config = GPTDatasetConfig(
        random_seed=0, sequence_length=_LENGTH, blend=([str(prefix)], None), split="1,0,0", tokenizer=Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(prefix.parent / "cache"),
    )  # fmt: skip
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_slots, 0, 0], lambda: True, config).build()
    return train


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, default=4_000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overlay = make_run(Path(folder), options.slots)
        stock = stock_dataset(Path(folder) / "corpus" / overlay.stream.corpus.shards[0].name, options.slots)

        def read(source: object) -> None:
            for slot in range(options.slots):
                source.read(slot)  # type: ignore[attr-defined]

        def read_stock() -> None:
            for index in range(options.slots):
                stock[index]

        read(overlay), read_stock()
        by_overlay, by_stock = interleaved(lambda: read(overlay), read_stock, options.pairs)
        again, by_base = interleaved(lambda: read(overlay), lambda: read(overlay.stream), options.pairs)
        touched = len(overlay.manifest.index.slots) / options.slots
    show(
        "slot-reads",
        overlay_per_second=spread([options.slots / value for value in by_overlay], 0),
        stock_per_second=spread([options.slots / value for value in by_stock], 0),
        times_stock=ratios(by_stock, by_overlay),
        goal_times_stock=2,
        overlay_over_base=ratios(again, by_base),
        goal_overlay_over_base=1.05,
        touched_fraction=round(touched, 3),
        tokens=int(np.sum([shard.num_tokens for shard in overlay.stream.corpus.shards])),
    )


if __name__ == "__main__":
    main()
