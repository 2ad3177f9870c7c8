"""Scoring a megatron-core model: live in training, or loaded from a checkpoint, at any layout.

Nothing of the training state is touched: no parameter has its gradient, gradient buffer or mode changed, and no random number
is drawn. So a run with probes at every step has bitwise the weights of a run without.
"""

import numpy as np
import torch

from megatron_exp.model import scoring
from megatron_exp.model.build import LanguageModel
from megatron_exp.scoring.batched import BatchedScorer, TokenScores


class Scorer(BatchedScorer):
    """The scorer of a `LanguageModel`. Every process of the run calls each method with the same arguments and gets all answers."""

    def __init__(self, model: LanguageModel, max_tokens: int | None = None):
        super().__init__(model.shape.sequence_length, model.shape.vocabulary_size, model.dtype, max_tokens)
        self._model = model

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

    def _embedding_gradients(self, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
        return scoring.embedding_gradients(self._model, self._tensor(tokens), self._tensor(loss_mask))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.layout.device)
