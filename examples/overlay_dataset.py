"""The samples of a run as a plain torch Dataset, for any trainer that takes one.

    dataset = OverlayDataset.open(Path("manifest"))
    loader = DataLoader(dataset, batch_size=8, shuffle=False)

Item k is slot k, so read the items in order: step = k // global batch size. The manifest's experiments are applied while reading; nothing is
copied. Noise on embeddings (`gaussian_watermarks`) is the model's part: `Overlay.noise` tells what to add, and a manifest
with any is refused here. Workers of a DataLoader share the memory-mapped files.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.shards.corpus import Corpus


class Sample(NamedTuple):
    """S positions: tokens int64, labels int64 (labels[i] follows tokens[i]), loss_mask float32, 1 where the loss counts."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor


class OverlayDataset(Dataset[Sample]):
    """Item k is slot k of the run, with the experiments of the manifest in it."""

    def __init__(self, overlay: Overlay):
        noisy = {one["experiment"] for one in overlay.manifest.record["perturbations"].values()} - overlay.masked
        if noisy:
            raise UserError(
                f"{', '.join(sorted(noisy))} of {overlay.manifest.path} adds noise to embeddings, which a dataset cannot. Mask it, or add "
                "Overlay.noise(slot) in the model."
            )
        self.overlay = overlay

    @classmethod
    def open(cls, manifest_path: Path, masked: frozenset[str] = frozenset()) -> "OverlayDataset":
        manifest = Manifest.open(manifest_path)
        corpus = Corpus.open(manifest.corpus_path)
        manifest.check_corpus(corpus)
        return cls(Overlay.open(manifest.open_stream(corpus), manifest, masked))

    def __len__(self) -> int:
        return self.overlay.num_slots

    def __getitem__(self, slot: int) -> Sample:
        if not 0 <= slot < len(self):
            raise IndexError(slot)
        tokens, mask = self.overlay.read(slot)
        ids = torch.from_numpy(tokens.astype(np.int64))
        return Sample(ids[:-1], ids[1:], torch.from_numpy(mask.astype(np.float32)))
