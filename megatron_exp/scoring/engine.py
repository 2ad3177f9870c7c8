"""Scoring a megatron-core model: live in training, or loaded from a checkpoint, at any layout.

Nothing of the training state is touched: no parameter has its gradient, gradient buffer or mode changed, and no random number
is drawn. So a run with probes at every step has bitwise the weights of a run without.
"""

import numpy as np
import torch

from megatron_exp.model import generation, scoring
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.scoring.batched import BatchedScorer, Reader, TokenScores

_LOGITS_PER_BATCH_CUDA = 1 << 29
"""Bound on positions x vocabulary of one forward pass on a GPU: 1 GiB of 16-bit logits, enough to fill it."""
_CACHE_BYTES_CUDA, _CACHE_BYTES_CPU = 1 << 31, 1 << 28
"""Bounds on the keys and values kept while text is generated, beside a model that may be in training."""


class Scorer(BatchedScorer):
    """The scorer of a `LanguageModel`. Every process of the run calls each method with the same arguments and gets all answers."""

    def __init__(self, model: LanguageModel, max_tokens: int | None = None):
        super().__init__(model.shape.sequence_length, model.shape.vocabulary_size, model.dtype, max_tokens)
        self._model = model
        if max_tokens is None:
            on_gpu = model.layout.device.type == "cuda"
            if on_gpu:
                self.max_tokens = max(model.shape.sequence_length, _LOGITS_PER_BATCH_CUDA // model.shape.vocabulary_size)
            kept = (_CACHE_BYTES_CUDA if on_gpu else _CACHE_BYTES_CPU) // generation.cache_bytes_per_position(model)
            self.max_kept_tokens = max(model.shape.sequence_length, kept)

    @property
    def _replica(self) -> tuple[int, int]:
        return self._model.layout.dp_rank, self._model.layout.dp_size

    def _over_replicas(self, answers: np.ndarray) -> np.ndarray:
        if self._model.layout.dp_size == 1:
            return answers
        return np.sum(self._model.layout.gather_replicas(answers), axis=0)

    def _token_scores(self, tokens: np.ndarray) -> TokenScores:
        scores = scoring.token_scores(self._model, self._tensor(tokens))
        return TokenScores(scores.losses.cpu().numpy(), scores.most_likely.cpu().numpy())

    def _next_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return scoring.next_token_logits(self._model, self._tensor(tokens), self._tensor(positions)).cpu().numpy()

    @property
    def _keeps(self) -> bool:
        return generation.keeps_keys(self._model)

    def _reader(self, num_rows: int, max_positions: int) -> Reader:
        read = generation.CachedReader(self._model, num_rows, max_positions)
        return lambda tokens: read(self._tensor(tokens)).cpu().numpy()

    def _embedding_gradients(self, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
        return scoring.embedding_gradients(self._model, self._tensor(tokens), self._tensor(loss_mask))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.layout.device)


def fp32_scorer(model: LanguageModel) -> Scorer:
    """A scorer of the same weights that computes in fp32, with embedding noise rounded as the model itself rounds it.

    For what is lost in 16 bits: the direction of a gradient, in which a watermark is a small part.
    """
    exact = build_model(model.shape, model.layout, "fp32", 0)
    with torch.no_grad():
        for chunk, own in zip(exact.chunks, model.chunks, strict=True):
            weights = dict(own.named_parameters())
            for name, parameter in chunk.named_parameters():
                parameter.copy_(weights[name])
    scorer = Scorer(exact)
    scorer.noise_dtype = model.dtype
    return scorer
